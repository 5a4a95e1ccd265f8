"""Which files of a folder are images, and of which class and split.

A folder holds train/ and perhaps test/ and val/, each with one folder per class, or the folders
of the classes alone. Class folders may have folders within. Anything else is refused.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from classifier.datasets.decode import extensions, is_image
from classifier.datasets.image_cache import FILE, file_key
from classifier.errors import UserError

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
HIDDEN = (".", "__MACOSX", "@eaDir")  # how the names of hidden files and folders begin
# Files are named after classes: characters and names that some file system refuses.
UNSAFE = re.compile(
    r'[<>:"/\\|?*\x00-\x1f\ud800-\udfff]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE
)


def find_splits(folder: Path) -> dict[str, Path]:
    """The folder of each split: "train", "valid" and "test", or "all", which is still to be split.

    Raises UserError for a folder whose splits are incomplete or ambiguous.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
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
        _check_not_nested(folder)
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


def _check_not_nested(folder: Path) -> None:
    """Raise UserError if all is in one folder within: photos/photos/, as some ZIP files unpack."""
    inner = folder
    inside = subfolders(inner)
    for _ in range(MAX_NESTED):
        if len(inside) != 1 or inside[0].name.lower() in SPLITS:
            break
        inner = inside[0]
        inside = subfolders(inner)
    if inner != folder and inside:
        raise UserError(
            f"{folder} has 1 class folder: at least two are needed; if the classes are in {inner}, "
            f"use --dataset {inner}"
        )


def class_folders(folder: Path) -> list[Path]:
    """The folders of the classes, sorted by name; UserError for what cannot be one."""
    classes = subfolders(folder)
    loose_images = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and not _is_hidden(path.name) and is_image(path):
            loose_images.append(path.name)
    if loose_images:
        raise UserError(
            f"{loose_images[0]} lies in {folder} itself, {len(loose_images)} such in all: "
            "put each image into the folder of its class"
        )
    if len(classes) < 2:
        found = "1 class folder" if classes else "no class folders"
        raise UserError(f"{folder} has {found}: at least two are needed")
    for path in classes:
        if UNSAFE.search(path.name):
            raise UserError(
                f"{path.name!r} in {folder} cannot be the name of a class, because files are named "
                "after it: rename it"
            )
    return classes


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, sorted; links to folders are among them."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            # Files are skipped at no cost here: there may be many, and Path.is_dir() asks the disk.
            if not entry.is_symlink() and not entry.is_dir():
                continue
            path = Path(entry.path)
            if path.is_dir() and not _is_hidden(path.name):
                found.append(path)
    return sorted(found)


def _is_hidden(name: str) -> bool:
    return name.startswith(HIDDEN)


def list_images(splits: dict[str, Path], folder: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """All images of a data set.

    Args:
        splits: the folder of each split, as `find_splits` returns them; the first one, "train" or
            "all", has all classes.
        folder: the folder of the data set.

    Returns:
        the images, FILE (N,), sorted by split, class and path; the names of the classes, in the
        order of the labels; and the paths of the files that are no images.

    Raises UserError for what is no such data set.
    """
    learning_folder = next(iter(splits.values()))
    classes = [path.name for path in class_folders(learning_folder)]
    known_extensions = extensions()
    images: list[np.ndarray] = []
    left_out: list[str] = []
    for split, split_folder in splits.items():
        names = [path.name for path in class_folders(split_folder)]
        unknown = set(names) - set(classes)
        if unknown:
            raise UserError(
                f"{split_folder} has a class {min(unknown)} that {learning_folder} does not have"
            )
        _check_inner_folders(split_folder, names)
        for name in names:
            found, other = _images_of_class(split_folder / name, folder, known_extensions)
            if not found and split != "valid":
                raise UserError(
                    f"the class folder {split_folder / name} holds no image: "
                    "put some into it, or delete it"
                )
            left_out += other
            images.append(_to_array(found, split, classes.index(name)))
    return np.concatenate(images), classes, left_out


def _check_inner_folders(split_folder: Path, classes: list[str]) -> None:
    """Raise UserError if the folders within the class folders seem to be splits, or the classes."""
    inner_names = []
    for name in classes:
        inner_names.append({path.name for path in subfolders(split_folder / name)})

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


def _images_of_class(
    class_folder: Path, folder: Path, known_extensions: set[str]
) -> tuple[list[tuple[str, int]], list[str]]:
    """Path and key of each image of a class, sorted by path, and the paths of its other files."""
    images = []
    others = []
    for path, key in walk_files(class_folder, folder):
        extension = os.path.splitext(path)[1].lower()
        # What is named like an image is taken for one until it is decoded.
        if key and (extension in known_extensions or is_image(folder / path)):
            images.append((path, key))
        else:
            others.append(str(folder / path))
    images.sort(key=lambda image: os.path.normcase(image[0]).split(os.sep))  # as Path compares
    return images, others


def _to_array(images: list[tuple[str, int]], split: str, label: int) -> np.ndarray:
    """Images, given as paths and keys, of one split and class: FILE (N,)."""
    array = np.zeros(len(images), FILE)
    array["path"] = [path for path, _ in images]
    array["key"] = np.array([key for _, key in images], np.uint64)
    array["split"] = split
    array["label"] = label
    return array


def walk_files(class_folder: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """The files of a class, in its folder and below, that are not hidden.

    Links to folders outside the data set's folder are followed; those to folders within are not,
    because they would mix its classes.

    Yields the path of each file relative to `folder`, and its key in a cache, or 0 if the size and
    time that it is made of cannot be read. Raises OSError for a folder that cannot be read.
    """
    root = folder.resolve()
    visited: set[Path] = set()
    for parent, subfolder_names, names in os.walk(class_folder, onerror=_fail, followlinks=True):
        real = Path(parent).resolve()
        is_link = parent != str(class_folder) and os.path.islink(parent)
        overlaps_root = real.is_relative_to(root) or root.is_relative_to(real)
        if real in visited or (is_link and overlaps_root):
            subfolder_names.clear()  # a circle, or another class: do not go there
            continue
        visited.add(real)
        subfolder_names[:] = _visible(subfolder_names)
        relative_parent = os.path.relpath(parent, folder)
        for name in _visible(names):
            path = os.path.join(relative_parent, name)
            real_path = os.path.join(parent, name)
            try:
                status = os.stat(real_path)
            except OSError:
                if not os.path.islink(real_path):  # a link to nowhere is no image
                    yield path, 0
                continue
            if stat.S_ISREG(status.st_mode):
                yield path, file_key(path, status)


def _fail(error: OSError) -> None:
    """os.walk would skip a folder that it cannot read."""
    raise error


def _visible(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not _is_hidden(name))
