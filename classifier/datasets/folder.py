"""A folder of images as a data set."""

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from classifier.config import Config
from classifier.datasets import decode, named
from classifier.datasets.data_report import build_report
from classifier.datasets.dataset import Dataset, Split, build_dataset
from classifier.datasets.duplicates import draw_test, first_occurrence, near_duplicates
from classifier.datasets.folder_layout import find_splits, list_images
from classifier.datasets.image_cache import DecodedCache, open_cache
from classifier.errors import UserError
from classifier.text import pluralize

SIZES = (32, 48, 64)  # pixels; a network learns images of up to 64 in minutes on a laptop
MAX_UNREADABLE = 0.01  # share of the files; if there are more, something is wrong with all of them
MAX_BYTES_IN_MEMORY = 2**30  # of decoded images; more stay on disk and are read batch by batch


class Images(NamedTuple):
    """The images of a folder, decoded and divided among the splits.

    Attributes:
        classes: names of the classes, in the order of the labels.
        train, valid, test: the splits; valid is None if it is to be split off train.
        report: the content of data_report.json.
        files: path of each training image, relative to the folder.
    """

    classes: list[str]
    train: Split
    valid: Split | None
    test: Split
    report: dict[str, Any]
    files: list[str]


def load_folder(config: Config, image_size: int | None = None) -> Dataset:
    """Load the folder `config.dataset`: train/, test/ and val/ of class folders, or those alone.

    Every image is decoded once, into a cache in `config.data_dir`. Without test/, a fifth of each
    class is for testing.

    image_size: height and width of the decoded images, in pixels, unless `config.image_size` is
        given; by default what suits the images, at most 64.

    Raises UserError for a folder that is no such data set, of which too much cannot be read, or
    whose cache cannot be written, and UsageError if --val-fraction leaves no images.
    """
    folder = Path(config.dataset).expanduser()
    data_dir = Path(config.data_dir).expanduser()
    try:
        images = _read_images(folder, data_dir, config.image_size or image_size)
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        # The disk is full, memory is short, a file vanished or was changed meanwhile.
        raise UserError(f"--dataset {config.dataset}: {error}") from error
    test = images.test  # load_test holds only this: the other images are copied and may go
    return build_dataset(
        config,
        images.train,
        images.valid,
        name=_dataset_name(folder),
        classes=images.classes,
        load_test=lambda: test,
        num_test_images=len(test.labels),
        flip_keeps_label=True,
        report=images.report,
        files=images.files,
    )


def _dataset_name(folder: Path) -> str:
    """The folder's name in UTF-8, made different from those of the other data sets."""
    name = folder.resolve().name or "images"
    # a byte that is not UTF-8 is a lone surrogate in Python, which TensorBoard does not take
    name = re.sub(r"[\ud800-\udfff]", "_", name)
    if name.lower() in ("cifar10", "digits", *named.NAMES):
        return f"{name}-images"
    return name


def _read_images(folder: Path, data_dir: Path, size: int | None) -> Images:
    """Find, decode, check and divide the images."""
    split_folders = find_splits(folder)
    learning = next(iter(split_folders))  # the split to learn from: train, or all
    files, classes, left_out = list_images(split_folders, folder)
    if left_out:
        _note_left_out(left_out)
    if size is None:
        size = suitable_size(folder, files["path"])
    _note_size(size)
    cache = open_cache(folder, data_dir, size, files)
    images = files[files["row"] >= 0]
    _check_readable(folder, files, classes, learning, cache.unreadable)

    pairs = near_duplicates(images, cache)
    used = np.arange(len(images))
    if learning == "all":
        used = _without_copies(images, len(classes))
    report = build_report(folder, classes, size, images, used, pairs, cache.unreadable, left_out)

    # Divide them.
    used_splits = images["split"][used]
    train = used[used_splits == learning]
    valid = used[used_splits == "valid"]
    test = used[used_splits == "test"]
    if not len(test):
        is_test = draw_test(images["label"], train, pairs)
        test = train[is_test]
        train = train[~is_test]
        if not len(test):
            needed = "3 that differ are needed, or a folder test/"
            raise UserError(f"{folder}: no class has enough images to test with: {needed}")

    in_memory = len(used) * cache.image_bytes <= MAX_BYTES_IN_MEMORY
    return Images(
        classes=classes,
        train=_to_split(images, train, cache, in_memory),
        valid=_to_split(images, valid, cache, in_memory) if len(valid) else None,
        test=_to_split(images, test, cache, in_memory),
        report=report,
        files=images["path"][train].tolist(),
    )


def _note_left_out(left_out: list[str]) -> None:
    """Print which files are no images, by extension."""
    suffixes = Counter(Path(path).suffix.lower() or "without an extension" for path in left_out)
    listed = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
    files = f"{pluralize(len(left_out), 'file')} ({listed}), such as {left_out[0]}"
    print(f"note: left out, of no format that Pillow knows: {files}")


def suitable_size(folder: Path, paths: np.ndarray) -> int:
    """The smallest of SIZES that keeps the median of the shorter sides, or the largest of them.

    paths: of the images, relative to the folder. About 200 of them are looked at.
    """
    every = max(1, len(paths) // 200)
    sides = []
    for path in paths[::every]:
        width_and_height = decode.image_size(folder / path)
        if width_and_height is not None:
            sides.append(min(width_and_height))
    if sides:
        for size in SIZES:
            if np.median(sides) <= size:
                return size
    return SIZES[-1]


def _note_size(size: int) -> None:
    """Print the size of the decoded images, and what it costs."""
    cost = ""
    if size > 32:
        cost = f", {(size / 32) ** 2:.1f} times the work of CIFAR-10's 32"
    how = "its middle square, resized; --image-size N for another size"
    print(f"Each image becomes {size} by {size} pixels{cost}: {how}")


def _check_readable(
    folder: Path,
    files: np.ndarray,
    classes: list[str],
    learning: str,
    unreadable: dict[str, str],
) -> None:
    """Raise UserError if a class has no images to learn from, or too many cannot be read."""
    is_learned = (files["row"] >= 0) & (files["split"] == learning)
    labels = set(files["label"][is_learned].tolist())
    for label, name in enumerate(classes):
        if label not in labels:
            reasons = "; ".join(unreadable.values())
            message = f"{folder}: no image of the class {name} can be read: {reasons}"
            raise UserError(message[:500])
    if len(unreadable) > MAX_UNREADABLE * len(files):
        examples = [f"{folder / path} ({reason})" for path, reason in unreadable.items()][:3]
        raise UserError(
            f"{folder}: {len(unreadable)} of {len(files)} images cannot be read, more than "
            f"{100 * MAX_UNREADABLE:g} %: repair or delete them: {'; '.join(examples)}"
        )


def _without_copies(images: np.ndarray, num_classes: int) -> np.ndarray:
    """Indices of the images, without those that are identical to an earlier one of their class."""
    indices = np.arange(len(images))
    first = first_occurrence(images["record"]["digest"])
    first_of_class = first_occurrence(first * num_classes + images["label"])
    return indices[first_of_class == indices]


def _to_split(
    images: np.ndarray, indices: np.ndarray, cache: DecodedCache, in_memory: bool
) -> Split:
    """Pixels and labels of the images, FILE (N,), at these indices."""
    rows = torch.from_numpy(images["row"][indices])
    labels = torch.from_numpy(images["label"][indices])
    return Split(cache.images(rows, in_memory), labels)
