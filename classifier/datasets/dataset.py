"""A data set in memory: images with their labels, and their split into training and validation.

Every loader reads all images that are not for testing and hands them to `build_dataset`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from classifier.config import Config
from classifier.errors import UsageError

# Not the seed of the run: every run holds out the same images and never trains on those of another.
SPLIT_SEED = 0


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
        return replace(
            self,
            train=self.train.first(count),
            valid=self.valid.first(count),
            load_test=lambda: self.unresized_test.first(count),
            num_test_images=min(self.num_test_images, count),
            test_files=None if self.test_files is None else self.test_files[:count],
        )

    def fingerprint(self) -> list[float]:
        """Number and mean of the training images, which tell them from others."""
        return [len(self.train.labels), *self.mean]


def build_dataset(config: Config, train: Split, valid: Split | None = None, **rest: Any) -> Dataset:
    """Hold out validation images, apply --subset and --image-size, and compute mean and std.

    Args:
        train: all images that are not for testing.
        valid: the validation images, if the data set comes with some; otherwise --val-fraction of
            each class of `train` is held out.
        rest: the other attributes of the Dataset: name, classes, load_test and so on.

    Raises UsageError if no images are left to train on or, unless --val-fraction is 0, to validate
    on.
    """
    # Choose the images.
    val_fraction = config.val_fraction if valid is None else 0.0
    train_indices, valid_indices = stratified_split(train.labels, val_fraction)
    if config.subset:
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        order = torch.randperm(len(train_indices), generator=generator)
        train_indices = train_indices[order[: config.subset]]
    if valid is None:
        valid = train.select(valid_indices)
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
    return Dataset(
        train=train,
        valid=resize(valid, size),
        mean=mean,
        std=std,
        train_indices=train_indices,
        **rest,
    )


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
