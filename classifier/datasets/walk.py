"""Which files of a folder count: the same ones in training and in prediction. Imports no torch."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

HIDDEN = (".", "__MACOSX", "@eaDir")  # how the names of hidden files and folders begin


def is_hidden(name: str) -> bool:
    """True for the name of a file or folder that is not meant to be seen."""
    return name.startswith(HIDDEN)


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, sorted; links to folders are among them."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            # Files are skipped at no cost here: there may be many, and Path.is_dir() asks the disk.
            if not entry.is_symlink() and not entry.is_dir():
                continue
            path = Path(entry.path)
            if path.is_dir() and not is_hidden(path.name):
                found.append(path)
    return sorted(found)


def fail(error: OSError) -> None:
    """For `walk_files`: raise the error of a folder that cannot be read."""
    raise error


def walk_files(
    start: Path, root: Path, on_error: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, os.stat_result | OSError]]:
    """The files in a folder and below it that are not hidden.

    Links to folders outside the root are followed; those to folders within are not, because they
    would mix the classes of a data set, or go round in circles.

    Args:
        start: the folder: a class, or a folder of images to classify.
        root: the folder of the data set, or the same folder.
        on_error: what to do about a folder that cannot be read; None: skip it.

    Yields the path of each file relative to the root, and its status, or the error if that cannot
    be read.
    """
    real_root = root.resolve()
    visited: set[Path] = set()
    for parent, subfolder_names, names in os.walk(start, onerror=on_error, followlinks=True):
        real = Path(parent).resolve()
        is_link = parent != str(start) and os.path.islink(parent)
        overlaps_root = real.is_relative_to(real_root) or real_root.is_relative_to(real)
        if real in visited or (is_link and overlaps_root):
            subfolder_names.clear()  # a circle, or another class: do not go there
            continue
        visited.add(real)
        subfolder_names[:] = _visible(subfolder_names)
        relative_parent = os.path.relpath(parent, root)
        for name in _visible(names):
            path = os.path.normpath(os.path.join(relative_parent, name))
            real_path = os.path.join(parent, name)
            try:
                status = os.stat(real_path)
            except OSError as error:
                if not os.path.islink(real_path):  # a link to nowhere is no image
                    yield path, error
                continue
            if stat.S_ISREG(status.st_mode):
                yield path, status


def _visible(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not is_hidden(name))
