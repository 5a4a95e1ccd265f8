"""A data set in memory: images with their labels, and their split into training and validation.

Every loader reads all images that are not for testing and hands them to `build_dataset`.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from classifier.config import Config
from classifier.datasets.pixel_range import Ranges
from classifier.datasets.splits import ImageIds, hold_out, random_numbers
from classifier.errors import UsageError

# Not the seed of the run: every run holds out the same images and never trains on those of another.
SPLIT_SEED = 0
# How images are held out and --subset chosen. Model files name it; raise it when that changes.
SPLIT_RULES = 3


class Split(NamedTuple):
    """Images and their labels.

    Attributes:
        images: uint8 (N, C, H, W), [0, 255]: a tensor, or the MemmapImages of a large folder.
        labels: int64 (N,).
    """

    images: Any
    labels: torch.Tensor

    def select(self, indices: Any) -> "Split":
        """The images and labels at these indices: an int64 or bool tensor, or a slice."""
        if isinstance(self.images, torch.Tensor):
            return Split(self.images[indices], self.labels[indices])
        return Split(self.images.select(indices), self.labels[indices])

    def first(self, count: int) -> "Split":
        """The first `count` of them."""
        return Split(self.images[:count], self.labels[:count])

    def to(self, device: torch.device) -> "Split":
        """The same on a device; a MemmapImages stays on the disk."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass
class Dataset:
    """A data set, ready for training.

    Attributes:
        name: as it is printed, and part of the names of files and run folders.
        classes: names of the classes, in the order of the labels.
        train: the images to train on.
        valid: the images to validate on; none with --val-fraction 0.
        load_test: reads the test images, at their own size.
        num_test_images: number of test images, known before they are read.
        flip_keeps_label: whether an image that is flipped left to right keeps its label.
        mean: mean of the training images per channel, in [0, 1].
        std: standard deviation of the training images per channel, in [0, 1].
        fallback_reason: why this is not the data set that was asked for; empty if it is.
        report: of a folder of images, the content of data_report.json.
        files: of a folder of images, the paths, relative to it, of its training images before any
            were held out for validation or left out by --subset.
        train_indices: int64 (N,), which of these training images `train` holds.
        pixel_ranges: of a folder of images, the range of values of those with more than 8 bits a
            pixel: see `classifier.datasets.pixel_range`.
        train_ids, valid_ids, test_ids: of a folder of images, what the images of each part are
            known by.
        all_ids: of a folder of images, the same of all that can be read, also of copies that are in
            no part.
        drawn: what images were drawn for by rules that are not those of version 0.9: "testing",
            "validation", "--subset N".
        checksums: of the images to train on, to validate on and to test with; None: not computed
            yet, or no longer right.
        earlier_digests: int64, digests of the images that the weights to start from have seen.
        test_files: of a folder of images, the paths of the test images, relative to it.
    """

    name: str
    classes: list[str]
    train: Split
    valid: Split
    load_test: Callable[[], Split]
    num_test_images: int
    flip_keeps_label: bool
    mean: list[float]
    std: list[float]
    fallback_reason: str = ""
    report: dict[str, Any] | None = None
    files: list[str] | None = None
    train_indices: torch.Tensor | None = None
    pixel_ranges: Ranges = field(default_factory=dict)
    train_ids: ImageIds | None = None
    valid_ids: ImageIds | None = None
    test_ids: ImageIds | None = None
    all_ids: ImageIds | None = None
    drawn: tuple[str, ...] = ()
    checksums: tuple[int, int, int] | None = None
    earlier_digests: torch.Tensor | None = None
    test_files: list[str] | None = None

    @functools.cached_property
    def unresized_test(self) -> Split:
        """The test images at their own size; read at the first use."""
        return self.load_test()

    @functools.cached_property
    def test(self) -> Split:
        """The test images, at the size of the training images; read at the first use."""
        return resize(self.unresized_test, self.train.images.shape[-1])

    def first(self, count: int) -> "Dataset":
        """Only the first images of each part, for a trial run."""
        first = replace(
            self,
            checksums=None,
            train=self.train.first(count),
            valid=self.valid.first(count),
            load_test=lambda: self.unresized_test.first(count),
            num_test_images=min(self.num_test_images, count),
            train_indices=None if self.train_indices is None else self.train_indices[:count],
            train_ids=_first_ids(self.train_ids, count),
            valid_ids=_first_ids(self.valid_ids, count),
            test_ids=_first_ids(self.test_ids, count),
            test_files=None if self.test_files is None else self.test_files[:count],
        )
        return replace(first, checksums=first.compute_checksums())

    def fingerprint(self) -> list[float]:
        """Number and mean of the training images, and a checksum of each part.

        They tell the images from others: `same_images` compares two fingerprints.
        """
        checksums = self.checksums or self.compute_checksums()
        return [len(self.train.labels), *self.mean, *map(float, checksums)]

    def compute_checksums(self) -> tuple[int, int, int]:
        """Checksums of the images to train on, to validate on and to test with.

        Test images that are not files are not read for it: only their number counts.
        """
        train = split_checksum(self.train, self.train_ids)
        valid = split_checksum(self.valid, self.valid_ids)
        if self.test_ids is None:
            return train, valid, self.num_test_images
        return train, valid, split_checksum(self.load_test(), self.test_ids)


def same_images(first: list[float], second: list[float]) -> bool:
    """Whether two fingerprints are of the same images and labels, in the same order.

    One of an older version holds no checksums: then number and mean are compared.
    """
    return all(abs(a - b) <= 1e-9 for a, b in zip(first, second, strict=False))


def same_training_images(first: list[float], second: list[float]) -> bool:
    """Whether two fingerprints, both with checksums, are of the same images to train on."""
    return same_images(first[:-2], second[:-2])


def split_checksum(split: Split, ids: ImageIds | None = None) -> int:
    """CRC-32 of all images and labels, in their order: a float holds it exactly.

    ids: what the images are known by. It stands for their pixels, which are then not read.
    """
    labels = split.labels.cpu().numpy()
    if ids is not None:
        return zlib.crc32(labels.data, zlib.crc32(ids.digests.numpy().data))
    checksum = 0
    for images in split.images.split(500):
        pixels = images.cpu().permute(0, 2, 3, 1).contiguous()  # CIFAR-10 is (N, H, W, C) in memory
        checksum = zlib.crc32(pixels.numpy().data, checksum)
    return zlib.crc32(labels.data, checksum)


def _first_ids(ids: ImageIds | None, count: int) -> ImageIds | None:
    return None if ids is None else ids.select(slice(count))


def build_dataset(
    config: Config,
    train: Split,
    valid: Split | None = None,
    *,
    train_ids: ImageIds | None = None,
    valid_ids: ImageIds | None = None,
    drawn: tuple[str, ...] = (),
    **rest: Any,
) -> Dataset:
    """Hold out validation images, apply --subset and --image-size, and compute mean and std.

    Args:
        train: all images that are not for testing.
        valid: the validation images, if the data set comes with some; otherwise --val-fraction of
            each class of `train` is held out.
        train_ids, valid_ids: of a folder of images, what these are known by. Images without them
            are those of a data set that never changes, and are chosen by their positions.
        drawn: see Dataset; what was drawn before.
        rest: the other attributes of the Dataset: name, classes, load_test and so on.

    Raises UsageError if no images are left to train on or, unless --val-fraction is 0, to validate
    on.
    """
    # Choose the images.
    if valid is None:
        train_indices, valid_indices = _split_off(train.labels, config.val_fraction, train_ids)
        valid = train.select(valid_indices)
        if train_ids is not None:
            valid_ids = train_ids.select(valid_indices)
        if train_ids is not None and config.val_fraction:
            drawn = (*drawn, "validation")
    else:
        train_indices = torch.arange(len(train.labels))
    if config.subset:
        train_indices = _choose_subset(train.labels, train_indices, config.subset, train_ids)
        drawn = (*drawn, f"--subset {config.subset}")
    no_training_images = len(train_indices) == 0
    no_validation_images = len(valid.labels) == 0
    if no_training_images or (no_validation_images and config.val_fraction > 0):
        raise UsageError(
            f"--val-fraction {config.val_fraction} of {len(train.labels)} images, class by class, "
            "leaves no training or no validation images; use 0 to train on all of them"
        )

    # Bring them to one size and measure those to train on.
    size = config.image_size or train.images.shape[-1]
    train = resize(train.select(train_indices), size)
    mean, std = _channel_statistics(train.images)
    data = Dataset(
        train=train,
        valid=resize(valid, size),
        mean=mean,
        std=std,
        train_indices=train_indices,
        train_ids=None if train_ids is None else train_ids.select(train_indices),
        valid_ids=valid_ids,
        drawn=drawn,
        **rest,
    )
    return replace(data, checksums=data.compute_checksums())


def _split_off(
    labels: torch.Tensor, fraction: float, ids: ImageIds | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the images to train on and of those to validate on, in ascending order."""
    if ids is None:
        return stratified_split(labels, fraction)
    is_valid = torch.from_numpy(
        hold_out(labels.numpy(), ids.groups.numpy(), fraction, "validation")
    )
    return (~is_valid).nonzero()[:, 0], is_valid.nonzero()[:, 0]


def _choose_subset(
    labels: torch.Tensor, indices: torch.Tensor, count: int, ids: ImageIds | None
) -> torch.Tensor:
    """The first `count` of these indices in an order in which the classes take turns.

    A class has its turn as often as its size demands (A. Sainte-Laguë, 1910), but each has one
    before any has a second. So a smaller subset is part of a larger one, and each class is in it as
    long as it holds an image for each.

    labels: int64 (N,), of all images. ids: of all images, if they are those of a folder.
    """
    if ids is None:
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        numbers = torch.randperm(len(indices), generator=generator).numpy()
    else:
        numbers = random_numbers(ids.digests[indices].numpy(), "subset")
    own_labels = labels[indices].numpy()
    turn = np.empty(len(own_labels))  # in units of the class's size, in (0, 1)
    is_first = np.zeros(len(own_labels), dtype=bool)
    for label in np.unique(own_labels):
        members = np.flatnonzero(own_labels == label)
        members = members[numbers[members].argsort()]
        turn[members] = (np.arange(len(members)) + 0.5) / len(members)
        is_first[members[0]] = True
    order = np.lexsort((own_labels, turn, ~is_first))
    return indices[torch.from_numpy(order[:count])]


def stratified_split(labels: torch.Tensor, fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Hold out a random `fraction` of each class; the same images in every run.

    labels: int64 (N,). Returns two int64 tensors of ascending indices: those that stay and those
    that are held out.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        count = round(len(members) * fraction)
        chosen = members[order[:count]]
        held_out[chosen] = True
    kept = ~held_out
    return kept.nonzero()[:, 0], held_out.nonzero()[:, 0]


def resize(split: Split, size: int) -> Split:
    """The same images at `size` × `size` pixels."""
    if split.images.shape[2:] == (size, size):
        return split
    images = F.interpolate(split.images, (size, size), mode="bicubic", antialias=True)
    return Split(images, split.labels)


def _channel_statistics(images: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in [0, 1], of images as a Split holds them.

    They are computed from a histogram of the 256 values: exactly, and without a float copy of the
    images. The standard deviation is at least 0.001: images of one color have none.
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for chunk in images.split(1000):
        for i, channel in enumerate(chunk.unbind(1)):
            counts[i] += torch.bincount(channel.flatten(), minlength=256)
    frequencies = counts / counts.sum(1, keepdim=True)
    values = (torch.arange(256) / 255.0).double()
    mean = frequencies @ values
    mean_of_squares = frequencies @ values**2
    variance = mean_of_squares - mean**2
    std = variance.clamp(min=1e-6).sqrt()
    return mean.tolist(), std.tolist()
