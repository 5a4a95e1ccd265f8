"""A folder of images as a data set."""

import contextlib
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from classifier.cli import command_line, program
from classifier.config import Config
from classifier.datasets import decode, named, pixel_range, unreadable
from classifier.datasets.archive import is_archive
from classifier.datasets.data_report import build_report
from classifier.datasets.dataset import Dataset, Split, build_dataset
from classifier.datasets.duplicates import first_occurrence, group_images, near_duplicates
from classifier.datasets.folder_layout import (
    SPLITS,
    find_splits,
    innermost,
    list_images,
    unlabelled_images,
)
from classifier.datasets.image_cache import DecodedCache, open_cache
from classifier.datasets.labels_file import list_labelled_images
from classifier.datasets.splits import ImageIds, hold_out
from classifier.datasets.walk import subfolders
from classifier.errors import UserError, format_error, is_out_of_memory
from classifier.text import escape_control_characters, pluralize

SIZES = (32, 48, 64)  # pixels; a network learns images of up to 64 in minutes on a laptop
TEST_FRACTION = 0.2  # of each class, where there is no test/
# If more of the files cannot be read, something is wrong with all of them. In a small folder a few
# damaged files are more than MAX_UNREADABLE.
MAX_UNREADABLE = 0.01  # share of the files
FEW_UNREADABLE = 5  # files, unless they are more than a tenth; one file never is too many
HOW_IT_FITS = {  # what is printed of --fit
    "crop": "its middle square, resized",
    "pad": "all of it, resized, with a grey border",
    "stretch": "all of it, squeezed",
}
MAX_BYTES_IN_MEMORY = 2**30  # of decoded images; more stay on disk and are read batch by batch


class Images(NamedTuple):
    """The images of a folder, decoded and divided among the splits.

    Attributes:
        classes: names of the classes, in the order of the labels.
        train, valid, test: the splits; valid is None if it is to be split off train.
        report: the content of data_report.json.
        files: path of each training image, relative to the folder.
        pixel_ranges: of the values of images with more than 8 bits a pixel.
        train_ids, valid_ids, test_ids: what the images of each split are known by.
        all_ids: the same of all images that can be read, also of copies that are in no split.
        drawn: see Dataset.
        test_files: path of each test image, relative to the folder.
    """

    classes: list[str]
    train: Split
    valid: Split | None
    test: Split
    report: dict[str, Any]
    files: list[str]
    pixel_ranges: pixel_range.Ranges
    train_ids: ImageIds
    valid_ids: ImageIds
    test_ids: ImageIds
    all_ids: ImageIds
    drawn: tuple[str, ...]
    test_files: list[str]


def load_folder(
    config: Config,
    image_size: int | None = None,
    *,
    folder: Path | None = None,
    order: list[str] | None = None,
) -> Dataset:
    """Load the folder `config.dataset`: train/, test/ and val/ of class folders, or those alone.

    With `config.labels` a table says which images there are of which class and split.

    Every image is decoded once, into a cache in `config.data_dir`. Without test/, about a fifth of
    each class is for testing. Which images are held out depends on their content, and those that
    are identical or nearly so are on one side: see `splits`.

    Args:
        image_size: height and width of the decoded images, in pixels, unless `config.image_size`
            is given; by default what suits the images, at most 64.
        folder: where the images are, if `config.dataset` is a ZIP file that was unpacked there.
        order: the classes in the order of their labels, if the folder has just these; by default
            they are sorted by name.

    Raises UserError for a folder that is no such data set, of which too much cannot be read, or
    whose cache cannot be written, and UsageError if --val-fraction leaves no images.
    """
    place = Path(config.dataset)
    folder = folder or place
    data_dir = Path(config.data_dir)
    try:
        size = config.image_size or image_size
        images = _read_images(config, folder, data_dir, size, order)
    except OSError as error:  # the disk is full, or a file has vanished meanwhile
        raise UserError(f"--dataset {config.dataset}: {format_error(error)}") from error
    except (ValueError, RuntimeError, EOFError) as error:  # a file was changed meanwhile
        if is_out_of_memory(error):
            raise
        raise UserError(f"--dataset {config.dataset}: {error}") from error
    test = images.test  # load_test holds only this: the other images are copied and may go
    return build_dataset(
        config,
        images.train,
        images.valid,
        name=_dataset_name(place),
        classes=images.classes,
        load_test=lambda: test,
        num_test_images=len(test.labels),
        flip_keeps_label=True,
        report=images.report,
        files=images.files,
        pixel_ranges=images.pixel_ranges,
        train_ids=images.train_ids,
        valid_ids=images.valid_ids,
        test_ids=images.test_ids,
        all_ids=images.all_ids,
        drawn=images.drawn,
        test_files=images.test_files,
    )


def _dataset_name(place: Path) -> str:
    """The name of a folder or ZIP file in UTF-8, unlike those of the other data sets."""
    resolved = place.resolve()
    name = resolved.stem if is_archive(place) else resolved.name
    name = name or "images"
    # a byte that is not UTF-8 is a lone surrogate in Python, which TensorBoard does not take
    name = re.sub(r"[\ud800-\udfff]", "_", name)
    others = ["cifar10", "digits", *named.NAMES]
    others += [each.class_name.lower() for each in named.DATASETS.values()]
    if name.lower() in others:
        return f"{name}-images"
    return name


def _read_images(
    config: Config,
    folder: Path,
    data_dir: Path,
    size: int | None,
    order: list[str] | None,
) -> Images:
    """Find, decode, check and divide the images; the arguments are those of `load_folder`."""
    if config.labels:
        table = Path(config.labels)
        files, classes, left_out = list_labelled_images(folder, table, order)
    else:
        split_folders = find_splits(folder)
        _note_layout(folder, split_folders)
        files, classes, left_out = list_images(split_folders, folder, order)
    learning = str(files["split"][0])  # the split to learn from: train, or all
    if left_out:
        _note_left_out(left_out)
    if size is None:
        size = suitable_size(folder, files["path"])
    _note_size(size, config.fit)
    are_all = not config.labels  # a table may name only some
    cache = open_cache(folder, data_dir, size, files, config.fit, are_all)
    images = files[files["row"] >= 0]
    listed_in = _list_unreadable(folder, cache)
    _check_each_class(folder, files, classes, learning, cache.unreadable, listed_in)
    if not config.skip_unreadable:
        _check_few_unreadable(folder, len(files), cache.unreadable, listed_in)

    twins = near_duplicates(images, cache)
    ids = _identify(images, twins.pairs)
    used = np.arange(len(images))
    if learning == "all":
        used = _without_copies(images, len(classes))
    report = build_report(folder, classes, cache, images, used, twins, left_out)
    if listed_in:
        report["words"].append(f"  all files that cannot be read, and why: {listed_in}")
    report |= _report_ranges(folder, images, cache.ranges, report["words"])
    report["words"] = [escape_control_characters(words) for words in report["words"]]

    # Divide them.
    used_splits = images["split"][used]
    train = used[used_splits == learning]
    valid = used[used_splits == "valid"]
    test = used[used_splits == "test"]
    drawn: tuple[str, ...] = ()
    if not len(test):
        drawn = ("testing",)
        test = _draw_test(images["label"], ids.groups.numpy(), train, valid)
        train = np.setdiff1d(train, test)
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
        pixel_ranges=cache.ranges,
        train_ids=ids.select(train),
        valid_ids=ids.select(valid),
        test_ids=ids.select(test),
        all_ids=ids,
        drawn=drawn,
        test_files=images["path"][test].tolist(),
    )


def _identify(images: np.ndarray, pairs: np.ndarray) -> ImageIds:
    """What each of the images, FILE (N,), is known by. pairs: see Duplicates."""
    digests = images["record"]["content_digest"].astype(np.int64)
    groups = group_images(digests, pairs)
    return ImageIds(torch.from_numpy(digests), torch.from_numpy(groups))


def _draw_test(
    labels: np.ndarray, groups: np.ndarray, train: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """Draw the images to test with from those to train on: int64, indices.

    labels, groups: int64 (N,), of all images. train, valid: indices of the images of these splits.
    What is like an image to validate on is not drawn, for settings are chosen by that one.
    """
    to_draw_from = train[~np.isin(groups[train], groups[valid])]
    is_test = hold_out(labels[to_draw_from], groups[to_draw_from], TEST_FRACTION, "test")
    return to_draw_from[is_test]


def _note_layout(folder: Path, split_folders: dict[str, Path]) -> None:
    """Print which folder was entered, and which one is left alone.

    split_folders: as `find_splits` returns them.
    """
    inner = innermost(folder)
    if inner != folder:
        note = f"{folder} holds nothing but {inner}, whose folders are taken for the classes"
        print(f"note: {escape_control_characters(note)}")
    if "all" in split_folders or "test" in split_folders:
        return
    for path in subfolders(inner):
        if SPLITS.get(path.name.lower()) == "test":
            count = pluralize(len(unlabelled_images(path)), "image")
            note = f"{path} has no class folders: its {count} without labels are left alone"
            tool = program("inference.py")
            if tool is not None:
                note += f"; once trained, predict them with: {command_line([*tool, str(path)])}"
            print(f"note: {escape_control_characters(note)}")


def _note_left_out(left_out: list[str]) -> None:
    """Print which files are no images, by extension."""
    suffixes = Counter(Path(path).suffix.lower() or "without an extension" for path in left_out)
    listed = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
    files = f"{pluralize(len(left_out), 'file')} ({listed}), such as {left_out[0]}"
    print(f"note: left out, of no format that Pillow knows: {escape_control_characters(files)}")
    advice: Counter[str] = Counter()
    for path in left_out:
        content = unreadable.recognise(Path(path))
        if content is not None and content.advice:
            advice[content.describe()] += 1
    for text, count in advice.most_common():
        print(f"    {pluralize(count, 'file')}: {text}")


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


def _note_size(size: int, fit: str) -> None:
    """Print the size of the decoded images, what it costs, and how they become squares."""
    cost = ""
    if size > 32:
        cost = f", {(size / 32) ** 2:.1f} times the work of CIFAR-10's 32"
    other_size = "--image-size N for another size"
    print(f"Each image becomes {size} by {size} pixels{cost}: {HOW_IT_FITS[fit]}; {other_size}")


def _list_unreadable(folder: Path, cache: DecodedCache) -> Path | None:
    """Write which files cannot be read, and why, beside the cache.

    Returns the path of the list; None if there are no such files, or it cannot be written.
    """
    path = cache.path / "unreadable.csv"
    if cache.unreadable:
        return unreadable.write_list(path, folder, cache.unreadable)
    with contextlib.suppress(OSError):
        path.unlink()  # of an earlier run
    return None


def _check_each_class(
    folder: Path,
    files: np.ndarray,
    classes: list[str],
    learning: str,
    reasons: dict[str, str],
    listed_in: Path | None,
) -> None:
    """Raise UserError if a class has no images to learn from.

    learning: the split to learn from; reasons: path and reason of the files that cannot be read.
    """
    learned = files[files["split"] == learning]
    labels = set(learned["label"][learned["row"] >= 0].tolist())
    for label, name in enumerate(classes):
        if label in labels:
            continue
        of_class = learned["path"][learned["label"] == label]
        summary = unreadable.summarize(reasons[path] for path in of_class)
        raise UserError(
            f"{folder}: no image of the class {name} can be read: {summary}{_see(listed_in)}"
        )


def _check_few_unreadable(
    folder: Path, num_files: int, reasons: dict[str, str], listed_in: Path | None
) -> None:
    """Raise UserError if too many of the files cannot be read.

    reasons: path and reason of those that cannot be read.
    """
    few = min(FEW_UNREADABLE, num_files / 10)
    if len(reasons) <= max(1, few, MAX_UNREADABLE * num_files):
        return
    example = next(iter(reasons))
    raise UserError(
        f"{folder}: {len(reasons)} of {num_files} images cannot be read, such as "
        f"{folder / example}: {unreadable.summarize(reasons.values())}{_see(listed_in)}: repair or "
        "delete them, or leave them out with --skip-unreadable"
    )


def _see(listed_in: Path | None) -> str:
    return f" (all are listed in {listed_in})" if listed_in else ""


def _report_ranges(
    folder: Path, images: np.ndarray, ranges: pixel_range.Ranges, words: list[str]
) -> dict[str, Any]:
    """Report the range of values of images with more than 8 bits a pixel.

    images: FILE (N,); words: lines to print are added to them. Returns what data_report.json says:
    nothing if all images have 8 bits.
    """
    if not ranges:
        return {}
    outside = []
    for kind, used_range in ranges.items():
        of_kind = images[images["kind"] == kind]
        black, white = used_range
        words.append(
            f"  {pluralize(len(of_kind), 'image')} with more than 8 bits a pixel ({kind}): "
            f"{black:g} becomes black, {white:g} white"
        )
        is_outside = (of_kind["low"] < black) | (of_kind["high"] > white)
        if is_outside.any():
            words.append(
                f"  {pluralize(int(is_outside.sum()), 'image')} of these with values outside, "
                f"which are cut off, such as {_with_values(folder, of_kind[is_outside][0])}"
            )
            outside += [str(folder / path) for path in of_kind["path"][is_outside]]
        if pixel_range.is_mostly_dark(of_kind["high"], used_range):
            in_order = of_kind[np.argsort(of_kind["high"], kind="stable")]
            typical = _with_values(folder, in_order[len(in_order) // 2])
            brightest = _with_values(folder, in_order[-1])
            words.append(
                f"  WARNING: most of these are nearly black, such as {typical}, because of others, "
                f"such as {brightest}: bring them to one unit"
            )
    return {"pixel_ranges": pixel_range.to_json(ranges), "outside_range": outside}


def _with_values(folder: Path, file: np.void) -> str:
    """An image, FILE, with its least and largest value."""
    return f"{folder / file['path']} ({file['low']:g} to {file['high']:g})"


def _without_copies(images: np.ndarray, num_classes: int) -> np.ndarray:
    """Indices of the images, without those that are identical to an earlier one of their class."""
    indices = np.arange(len(images))
    first = first_occurrence(images["record"]["pixel_digest"])
    first_of_class = first_occurrence(first * num_classes + images["label"])
    return indices[first_of_class == indices]


def _to_split(
    images: np.ndarray, indices: np.ndarray, cache: DecodedCache, in_memory: bool
) -> Split:
    """Pixels and labels of the images, FILE (N,), at these indices."""
    rows = torch.from_numpy(images["row"][indices])
    labels = torch.from_numpy(images["label"][indices])
    return Split(cache.images(rows, in_memory), labels)
