"""Splits, resizing and statistics of a data set."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import load_photos
from PIL import Image

from classifier.config import Config
from classifier.datasets import dataset
from classifier.datasets.dataset import (
    Dataset,
    Split,
    build_dataset,
    resize,
    same_images,
    same_training_images,
    split_checksum,
    stratified_split,
)
from classifier.datasets.decode import decode
from classifier.datasets.splits import ImageIds
from classifier.errors import UsageError

NUM_IMAGES = 200


@pytest.fixture
def images_and_labels():
    """200 random images of 12 × 12 pixels in two classes, 150 and 50."""
    generator = torch.Generator().manual_seed(5)
    shape = (NUM_IMAGES, 3, 12, 12)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = (torch.arange(NUM_IMAGES) % 4 == 0).long()
    return Split(images, labels)


def build(split, valid=None, **settings):
    rest = {"name": "random", "classes": ["a", "b"], "load_test": lambda: split}
    rest |= {"num_test_images": len(split.labels), "flip_keeps_label": True}
    return build_dataset(Config(**settings), split, valid, **rest)


# ---- stratified_split ----


def test_split_takes_the_fraction_of_each_class():
    labels = torch.tensor([0] * 100 + [1] * 30 + [2] * 10)[torch.randperm(140)]
    kept, held_out = stratified_split(labels, 0.1)
    assert labels[held_out].bincount().tolist() == [10, 3, 1]
    assert kept.dtype == held_out.dtype == torch.int64
    assert kept.equal(kept.sort().values) and held_out.equal(held_out.sort().values)
    assert sorted(kept.tolist() + held_out.tolist()) == list(range(140))


def test_split_is_that_of_version_0_9():
    """A run that is resumed, and every figure that was published, need the same one."""
    _, held_out = stratified_split(torch.arange(40) % 4, 0.25)
    assert held_out.tolist() == [2, 4, 13, 16, 18, 31, 37, 39]


def test_split_does_not_depend_on_the_global_generator():
    labels = torch.arange(60) % 3
    torch.manual_seed(1)
    first = stratified_split(labels, 0.2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = stratified_split(labels, 0.2)
    assert first[0].equal(second[0]) and first[1].equal(second[1])
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(4, 0.1, 0), (5, 0.1, 0), (6, 0.1, 1), (3, 0.5, 2), (9, 0, 0)],
)
def test_number_of_a_small_class_is_rounded(count, fraction, expected):
    kept, held_out = stratified_split(torch.zeros(count, dtype=torch.int64), fraction)
    assert len(held_out) == expected and len(kept) == count - expected


def test_split_of_no_labels():
    kept, held_out = stratified_split(torch.empty(0, dtype=torch.int64), 0.5)
    assert len(kept) == len(held_out) == 0


# ---- Split and resize ----


def test_select_keeps_images_and_labels_together(images_and_labels):
    chosen = images_and_labels.select(torch.tensor([7, 3]))
    assert chosen.images[1].equal(images_and_labels.images[3])
    assert chosen.labels.tolist() == images_and_labels.labels[[7, 3]].tolist()
    assert len(images_and_labels.select(slice(10)).labels) == 10


def test_images_that_are_no_tensor_select_themselves():
    class Store:
        def select(self, indices):
            return ("selected", indices)

    split = Split(Store(), torch.tensor([4, 5, 6])).select([2, 0])
    assert split.images == ("selected", [2, 0]) and split.labels.tolist() == [6, 4]


def test_resize_keeps_type_range_and_labels(images_and_labels):
    larger = resize(images_and_labels, 30)
    assert larger.images.shape == (NUM_IMAGES, 3, 30, 30) and larger.images.dtype == torch.uint8
    assert larger.labels is images_and_labels.labels
    assert resize(images_and_labels, 12) is images_and_labels


def test_resize_neither_flips_nor_shifts():
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = torch.stack([rows * 8, columns * 8, rows * 0 + 77]).to(torch.uint8)
    smaller = resize(Split(image[None], torch.zeros(1, dtype=torch.int64)), 16).images[0].float()
    expected = torch.arange(16) * 16 + 4.0
    inner = slice(2, 14)  # the interpolation is not linear at the border
    assert (smaller[0, inner] - expected[inner, None]).abs().max() <= 1
    assert (smaller[1, :, inner] - expected[None, inner]).abs().max() <= 1
    assert (smaller[2] == 77).all()


def test_arrays_are_resized_as_files_are(folder):
    """By PyTorch in training and by Pillow in inference.py: equal but for rounding."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(4, 3, 6, 6, generator=generator) * 255
    images = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear").byte()
    for size in (24, 48):
        resized = resize(Split(images, torch.arange(4)), size).images
        for image, expected in zip(images, resized, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "image.png")
            pixels = torch.from_numpy(decode(folder / "image.png", size).pixels.copy())
            difference = (pixels.permute(2, 0, 1).int() - expected.int()).abs()
            assert difference.max() <= 2  # each direction is rounded
            assert (difference > 0).float().mean() < 0.05


# ---- build_dataset ----


def test_validation_images_are_held_out(images_and_labels):
    data = build(images_and_labels, val_fraction=0.2)
    assert data.valid.labels.bincount().tolist() == [30, 10]
    assert data.train.labels.bincount().tolist() == [120, 40]
    kept = data.train_indices
    assert data.train.images.equal(images_and_labels.images[kept])
    together = torch.cat([data.train.images, data.valid.images]).flatten(1)
    assert len(together.unique(dim=0)) == NUM_IMAGES  # no image is in both


def test_all_are_trained_on_without_validation(images_and_labels):
    data = build(images_and_labels, val_fraction=0.0)
    assert len(data.train.labels) == NUM_IMAGES and len(data.valid.labels) == 0
    assert data.train_indices.tolist() == list(range(NUM_IMAGES))


def test_given_validation_images_leave_all_others_for_training(images_and_labels):
    valid = images_and_labels.select(slice(20))
    data = build(images_and_labels, valid, val_fraction=0.5)
    assert len(data.train.labels) == NUM_IMAGES
    assert data.valid.images.equal(valid.images)


def test_subset_is_of_the_training_images_alone(images_and_labels):
    everything = build(images_and_labels, val_fraction=0.2)
    data = build(images_and_labels, val_fraction=0.2, subset=30)
    assert data.valid.images.equal(everything.valid.images)
    assert len(data.train.labels) == 30 == len(data.train_indices.unique())
    assert set(data.train_indices.tolist()) <= set(everything.train_indices.tolist())
    assert data.train.images.equal(images_and_labels.images[data.train_indices])
    assert data.train.labels.bincount().tolist() == [23, 7]  # of 120 and 40
    smaller = build(images_and_labels, val_fraction=0.2, subset=10)
    assert smaller.train_indices.equal(data.train_indices[:10])


@pytest.mark.parametrize("count", [2, 3, 7, 30, 64])
def test_each_class_is_in_a_subset_in_proportion(count):
    sizes = torch.tensor([100, 20, 3])
    labels = torch.arange(3).repeat_interleave(sizes)
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    data = build(Split(images, labels), val_fraction=0.0, subset=count)
    counts = data.train.labels.bincount(minlength=3)
    assert counts.sum() == count
    if count < 3:
        assert counts.tolist() == [1, 1, 0]  # those of the largest classes
        return
    assert counts.min() >= 1
    assert ((counts - count * sizes / sizes.sum()).abs() <= 1.5).all()


def test_small_subset_has_as_many_of_each_class():
    """They used to be drawn from all classes together: some had one image, some five."""
    labels = torch.arange(200) % 10
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    data = build(Split(images, labels), val_fraction=0.1, subset=30)
    assert data.train.labels.bincount().tolist() == [3] * 10


def test_subset_larger_than_the_data_set_is_all_of_it(images_and_labels):
    assert len(build(images_and_labels, val_fraction=0.0, subset=999).train.labels) == NUM_IMAGES


def test_all_parts_are_resized(images_and_labels):
    data = build(images_and_labels, image_size=16, val_fraction=0.1)
    for split in (data.train, data.valid, data.test):
        assert split.images.shape[1:] == (3, 16, 16)


def test_mean_and_std_are_those_of_the_training_images(images_and_labels):
    data = build(images_and_labels, val_fraction=0.3)
    values = data.train.images.numpy().astype(np.float64) / 255
    assert data.mean == pytest.approx(values.mean(axis=(0, 2, 3)), abs=1e-6)
    assert data.std == pytest.approx(values.std(axis=(0, 2, 3)), abs=1e-6)
    assert data.fingerprint()[:4] == [len(data.train.labels), *data.mean]


def test_fingerprint_is_of_pixels_labels_and_order():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1200, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(1200) % 4

    def fingerprint(images, labels):
        return build(Split(images, labels), val_fraction=0.0).fingerprint()

    original = fingerprint(images, labels)
    assert fingerprint(images.clone(), labels.clone()) == original
    assert same_images(original, original)

    reversed_order = torch.arange(1199, -1, -1)
    two_places = torch.arange(1200)
    two_places[[3, 700]] = two_places[[700, 3]]
    last_pixels = images.clone()
    last_pixels[3, -1, -1, -1] ^= 1  # and so that the mean stays the same
    last_pixels[4, -1, -1, -1] += images[3, -1, -1, -1] - last_pixels[3, -1, -1, -1]
    others = [
        (images[reversed_order], labels[reversed_order]),
        (images, labels[two_places]),  # labels were corrected: number and mean are the same
        (images[two_places], labels),
        (last_pixels, labels),
    ]
    for other_images, other_labels in others:
        other = fingerprint(other_images, other_labels)
        assert math.dist(original[:4], other[:4]) < 1e-9
        assert not same_images(original, other)


def test_fingerprint_does_not_depend_on_the_layout_in_memory():
    images = torch.randint(0, 256, (700, 3, 12, 12), dtype=torch.uint8)
    labels = torch.arange(700) % 4
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert split_checksum(Split(channels_last, labels)) == split_checksum(Split(images, labels))


def test_fingerprint_stays_the_same():
    """It is saved with each run."""
    images = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).to(torch.uint8)
    assert split_checksum(Split(images, torch.tensor([0, 1]))) == 0xE812D17F


def test_fingerprint_is_of_all_parts():
    """A run whose validation or test images had changed was resumed without a word."""
    split = Split(torch.arange(96).reshape(6, 1, 4, 4).to(torch.uint8), torch.arange(6) % 2)
    part = ImageIds(torch.arange(6), torch.arange(6))

    def build_parts(**parts):
        parts = {"valid": split, "valid_ids": part, "test_ids": part, "test": split} | parts
        test = parts.pop("test")
        return build_dataset(
            Config(),
            split,
            name="photos",
            classes=["a", "b"],
            load_test=lambda: test,
            num_test_images=len(test.labels),
            flip_keeps_label=True,
            train_ids=part,
            **parts,
        ).fingerprint()

    original = build_parts()
    assert same_images(original, build_parts())
    other_ids = ImageIds(torch.arange(1, 7), torch.arange(6))
    relabelled = Split(split.images, 1 - split.labels)
    for name, value in (
        ("valid", relabelled),
        ("valid_ids", other_ids),
        ("test", relabelled),
        ("test_ids", other_ids),
    ):
        other = build_parts(**{name: value})
        assert not same_images(original, other)
        assert same_training_images(original, other)
        assert same_images(original[:2], other)  # as an older version wrote it
    fewer = split.select(slice(4))
    without_files = build_parts(test_ids=None)
    assert not same_images(without_files, build_parts(test_ids=None, test=fewer))
    assert same_images(without_files, build_parts(test_ids=None, test=relabelled))  # not read


def test_images_of_files_are_not_read_for_the_fingerprint(photos, monkeypatch):
    data = load_photos()
    expected = data.fingerprint()
    monkeypatch.setattr(dataset.zlib, "crc32", lambda *given: pytest.fail("computed again"))
    assert replace(data, fallback_reason="a resumed run").fingerprint() == expected
    monkeypatch.undo()
    unreadable = replace(data, checksums=None, train=Split(None, data.train.labels))
    assert unreadable.fingerprint() == expected


def test_first_images_have_their_own_indices_and_fingerprint(photos):
    for data in (
        load_photos(),
        build(Split(torch.zeros(40, 3, 4, 4, dtype=torch.uint8), torch.arange(40) % 2)),
    ):
        first = data.first(5)
        assert torch.equal(first.train_indices, data.train_indices[:5])
        assert len(first.train.labels) == 5
        assert not same_images(first.fingerprint()[-3:], data.fingerprint()[-3:])


def test_fingerprint_of_an_older_version_is_compared_as_far_as_it_goes():
    new = [100, 0.5, 0.4, 0.3, 12345.0]
    assert same_images(new, [100, 0.5, 0.4, 0.3])
    assert same_images([100, 0.5, 0.4, 0.3], new)
    assert not same_images(new, [100, 0.5, 0.4, 0.31])
    assert not same_images(new, [100, 0.5, 0.4, 0.3, 12346.0])
    assert not same_images(new, [100, 0.5, 0.4, 0.3, math.nan])


def test_fingerprint_tells_images_from_others(images_and_labels):
    data = build(images_and_labels)
    assert same_images(data.fingerprint(), data.fingerprint())
    assert same_images(data.fingerprint(), data.fingerprint()[:4])  # as version 0.9.1 wrote it
    labels = images_and_labels.labels.clone()
    labels[[0, 1]] = labels[[1, 0]]  # the images are the same, and so many of each class
    relabelled = build(Split(images_and_labels.images, labels))
    others = [
        relabelled,
        build(images_and_labels, subset=100),
        build(Split(255 - images_and_labels.images, images_and_labels.labels)),
    ]
    for other in others:
        assert not same_images(data.fingerprint(), other.fingerprint())


def test_images_of_one_color_have_a_std_to_divide_by():
    split = Split(torch.full((20, 3, 8, 8), 9, dtype=torch.uint8), torch.arange(20) % 2)
    data = build(split)
    assert data.std == pytest.approx([1e-3] * 3)
    assert data.mean == pytest.approx([9 / 255] * 3)


@pytest.mark.parametrize(("count", "val_fraction"), [(4, 0.1), (2, 0.9), (0, 0.0)])
def test_too_few_images_to_train_and_validate(count, val_fraction):
    split = Split(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.arange(count) % 2)
    with pytest.raises(UsageError, match=f"--val-fraction {val_fraction}"):
        build(split, val_fraction=val_fraction)


def test_test_images_are_read_at_the_first_use_and_once(images_and_labels):
    calls = []

    def load_test():
        calls.append(1)
        return images_and_labels

    train = images_and_labels.select(slice(5))
    data = Dataset("random", ["a"], train, train, load_test, NUM_IMAGES, True, [0.5], [0.5])
    assert not calls
    assert data.test is data.test
    assert len(calls) == 1
