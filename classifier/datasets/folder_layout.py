"""Which files of a folder are images, and of which class and split.

A folder holds train/ and perhaps test/ and val/, each with one folder per class, or the folders
of the classes alone. Class folders may have folders within. Anything else is refused.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from classifier.datasets import unreadable
from classifier.datasets.decode import counts_as_image, is_image
from classifier.datasets.image_records import FILE, file_key
from classifier.datasets.walk import fail, is_hidden, subfolders, walk_files
from classifier.errors import UserError
from classifier.text import natural_key

SPLITS = {  # names of folders, in lower case, and the splits that they hold
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
}
MAX_NESTED = 10  # folders with one folder within: a link may lead round in a circle
# Files are named after classes: characters and names that some file system refuses.
UNSAFE = re.compile(
    r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\ud800-\udfff]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)',
    re.IGNORECASE,
)


def find_splits(folder: Path) -> dict[str, Path]:
    """The folder of each split: "train", "valid" and "test", or "all", which is still to be split.

    They are looked for in `innermost(folder)`. A test/ without labels is none: see
    `unlabelled_images`.

    Raises UserError for a folder whose splits are incomplete or ambiguous.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    folder = innermost(folder)
    splits: dict[str, Path] = {}
    others: list[str] = []
    for path in subfolders(folder):
        split = SPLITS.get(path.name.lower())
        if split is None:
            others.append(path.name)
        elif split in splits:
            both = f"both {splits[split].name} and {path.name}"
            raise UserError(f"{folder} has {both}: keep one of them")
        else:
            splits[split] = path
    if not splits:
        _check_not_splits(folder, others)
        return {"all": folder}
    if others:
        first_split = next(iter(splits.values())).name
        raise UserError(
            f"{folder} has {first_split}/ and {others[0]}/ side by side: are these classes, or "
            "splits of the data? Keep either class folders or train/, test/ and val/"
        )
    if "train" not in splits:
        names = ", ".join(path.name for path in splits.values())
        raise UserError(f"{folder} has {names}, but no train/")
    if "test" in splits and unlabelled_images(splits["test"]):
        del splits["test"]
    return {split: splits[split] for split in ("train", "valid", "test") if split in splits}


def _check_not_splits(folder: Path, names: list[str]) -> None:
    """Raise UserError if these folders seem to be splits under other names: seg_train, seg_test.

    They do if each has another split's name as one of its words, and folders within.
    """
    names_by_split: dict[str, str] = {}
    for name in names:
        words = re.split(r"[\W_]+", name.lower())
        found = {SPLITS[word] for word in words if word in SPLITS}
        if len(found) != 1:  # not train_test, which may be a class
            return
        names_by_split[found.pop()] = name
    if len(names_by_split) < 2 or len(names_by_split) != len(names):
        return
    if all(subfolders(folder / name) for name in names):
        listed = " and ".join(names_by_split.values())
        raise UserError(
            f"{folder} has {listed}: splits of the data? "
            "Name the folders that hold the class folders train and test"
        )


def innermost(folder: Path) -> Path:
    """The folder that holds the class folders: photos/photos, as some ZIP files unpack, or itself.

    A folder that holds no images, but just one folder, is not meant to have one class.
    """
    inner = folder
    for _ in range(MAX_NESTED):
        inside = subfolders(inner)
        if not inside or loose_images(inner):
            return folder
        if len(inside) > 1 or inside[0].name.lower() in SPLITS:
            return inner
        inner = inside[0]
    return folder


def unlabelled_images(test_folder: Path) -> list[str]:
    """Names of the images in a test/ without class folders: they are to be predicted, not tested.

    Competitions hand out such folders. Empty for a test/ that has folders.
    """
    return [] if subfolders(test_folder) else loose_images(test_folder)


def loose_images(folder: Path, judge: Callable[[Path], bool] = counts_as_image) -> list[str]:
    """Names of the images that lie in a folder itself, sorted. judge: whether a file is one."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and not is_hidden(path.name) and judge(path):
            names.append(path.name)
    return names


def class_folders(folder: Path) -> dict[str, Path]:
    """The name and folder of each class, in `natural_key` order; UserError for what cannot be one.

    Names are in Unicode's composed form (NFC): a Mac and an archive may write "é" as two
    characters, and mean the same class.
    """
    loose = loose_images(folder, is_image)
    if loose:
        raise UserError(
            f"{loose[0]} lies in {folder} itself, {len(loose)} such in all: put each image into "
            "the folder of its class, or name a table of labels with --labels FILE.csv"
        )
    paths = subfolders(folder)
    if len(paths) < 2:
        found = "1 class folder" if paths else "no class folders"
        raise UserError(f"{folder} has {found}: at least two are needed")
    for path in paths:
        if UNSAFE.search(path.name):
            raise UserError(
                f"{path.name!r} in {folder} cannot be the name of a class, because files are named "
                "after it: rename it"
            )
    _check_names_differ(folder, [path.name for path in paths])
    by_name = {class_name(path): path for path in paths}
    return {name: by_name[name] for name in natural_order(by_name)}


def natural_order(names: Iterable[str]) -> list[str]:
    """The names of classes in the order of their labels."""
    return sorted(names, key=natural_key)


def class_name(path: Path) -> str:
    """The name of the class whose images are in this folder."""
    return unicodedata.normalize("NFC", path.name)


def _check_names_differ(folder: Path, names: list[str]) -> None:
    """Raise UserError for names that are one for the file systems of Windows or a Mac.

    Files are named after the classes.
    """
    seen: dict[str, str] = {}
    for name in names:
        composed = unicodedata.normalize("NFC", name)
        earlier = seen.setdefault(composed.casefold(), name)
        if earlier == name:
            continue
        if unicodedata.normalize("NFC", earlier) == composed:
            raise UserError(
                f"{folder} has two folders {composed}, {earlier!a} and {name!a}, whose names are "
                "the same characters in two forms: put their images into one"
            )
        raise UserError(
            f"{folder} has {earlier} and {name}, and files are named after classes: on some "
            "systems these names are the same: rename one, or put their images together"
        )


def in_order(classes: list[str], order: list[str] | None) -> list[str]:
    """The classes, in this order if it names all of them and no others."""
    if order is not None and sorted(order) == sorted(classes):
        return list(order)
    return classes


def list_images(
    splits: dict[str, Path], folder: Path, order: list[str] | None = None
) -> tuple[np.ndarray, list[str], list[str]]:
    """All images of a data set.

    Args:
        splits: the folder of each split, as `find_splits` returns them; the first one, "train" or
            "all", has all classes.
        folder: the folder of the data set.
        order: see `in_order`.

    Returns:
        the images, FILE (N,), sorted by split, class and path; the names of the classes, in the
        order of the labels; and the paths of the files that are no images.

    Raises UserError for what is no such data set.
    """
    learning_folder = next(iter(splits.values()))
    classes = in_order(list(class_folders(learning_folder)), order)
    images: list[np.ndarray] = []
    left_out: list[str] = []
    for split, split_folder in splits.items():
        folders = class_folders(split_folder)
        for name in folders:
            if name not in classes:
                raise UserError(
                    f"{split_folder} has a class {name} that {learning_folder} does not have"
                    + _similar_name(name, classes)
                )
        _check_inner_folders(split_folder, list(folders.values()))
        for name in [each for each in classes if each in folders]:
            class_folder = folders[name]
            found, others = images_below(class_folder, folder)
            if not found and split != "valid":
                _fail_without_images(class_folder, others)
            left_out += [str(path) for path in others]
            images.append(to_array(found, split, classes.index(name)))
    return np.concatenate(images), classes, left_out


def _similar_name(name: str, classes: list[str]) -> str:
    """A question, if a class differs from this name only in upper and lower case."""
    for known in classes:
        if known.casefold() == name.casefold():
            return f": is it {known}? Name them alike"
    return ""


def _fail_without_images(class_folder: Path, others: list[Path]) -> None:
    """Raise UserError for a class without images, which says what its files are.

    others: the files in its folder, none of which is an image.
    """
    if not others:
        raise UserError(
            f"the class folder {class_folder} holds no image: put some into it, or delete it"
        )
    raise UserError(
        f"the class folder {class_folder} holds no image that can be read, but "
        f"{unreadable.summarize_files(others)} (such as {others[0].name})"
    )


def _check_inner_folders(split_folder: Path, class_folders: list[Path]) -> None:
    """Raise UserError if the folders within the class folders seem to be splits, or the classes."""
    inner_names = []
    for class_folder in class_folders:
        inner_names.append({path.name for path in subfolders(class_folder)})

    classes_with_splits = 0
    for names in inner_names:
        if any(name.lower() in SPLITS for name in names):
            classes_with_splits += 1
    if classes_with_splits > 1:
        raise UserError(
            f"{split_folder}: splits of the data inside the class folders? Put the class folders "
            "into the folders train, test and val"
        )
    in_all = sorted(set.intersection(*inner_names))
    if len(in_all) > 1:
        raise UserError(
            f"each folder in {split_folder} has {in_all[0]} and {in_all[1]} in it: which are the "
            "classes? Put the images of a class into its folder, without others between"
        )


def images_below(class_folder: Path, folder: Path) -> tuple[list[tuple[str, int]], list[Path]]:
    """Path and key of each image in a folder, sorted by path, and the paths of its other files.

    Paths of images are relative to `folder`, the data set.

    Raises OSError for a folder that cannot be read.
    """
    images = []
    others = []
    for path, status in walk_files(class_folder, folder, on_error=fail):
        file = folder / path
        if counts_as_image(file) or is_unknown(file, status):
            images.append((path, file_key(path, status, file)))
        else:
            others.append(file)
    images.sort(key=lambda image: os.path.normcase(image[0]).split(os.sep))  # as Path compares
    return images, others


def images_and_others(
    inside: Path, folder: Path, on_error: Callable[[OSError], None] | None = None
) -> tuple[list[Path], list[Path]]:
    """The images in a folder and below it, hidden ones aside, and the other files there.

    The images are those that training finds.

    Args:
        inside: where to look: `folder` or one within it.
        folder: the folder that the user has named.
        on_error: called for a folder that cannot be read; None: it is skipped.
    """
    images, others = [], []
    for path, _ in walk_files(inside, folder, on_error=on_error):
        file = folder / path
        if counts_as_image(file):
            images.append(file)
        else:
            others.append(file)
    return sorted(images), sorted(others)


def is_unknown(file: Path, status: os.stat_result | OSError) -> bool:
    """Whether neither content nor name of a file tells that it is no image."""
    return isinstance(status, OSError) and not file.suffix


def to_array(images: list[tuple[str, int]], split: str, label: int) -> np.ndarray:
    """Images, given as paths and keys, of one split and class: FILE (N,)."""
    array = np.zeros(len(images), FILE)
    array["path"] = [path for path, _ in images]
    array["key"] = np.array([key for _, key in images], np.uint64)
    array["split"] = split
    array["label"] = label
    return array
