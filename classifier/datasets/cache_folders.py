"""The folder for what is decoded or unpacked once: --data-dir, or another if that is read-only."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from classifier.files import NOT_WRITABLE

T = TypeVar("T")


def use_first_writable(data_dir: Path, use: Callable[[Path], T], note: str = "") -> T:
    """What `use` returns for the first of cache_folders that can be written.

    use: called with a folder. note: words before the folder, printed if it is not the first one;
    without them nothing is printed. Raises OSError if no folder can be written, and any other error
    of `use`.
    """
    failure: OSError | None = None
    for folder in cache_folders(data_dir):
        if failure is not None and note:
            print(f"note: {failure.filename or failure} cannot be written: {note} {folder}")
        try:
            return use(folder)
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            failure = error
    assert failure is not None  # there is at least one folder
    raise failure


def cache_folders(data_dir: Path) -> Iterator[Path]:
    """Where a cache may be: data_dir, the user's folder for caches, a temporary folder."""
    yield data_dir
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        yield Path(home) / ".cache" / "image_classification"
    temporary = _temporary_folder()
    if temporary is not None:
        yield temporary


def _temporary_folder() -> Path | None:
    """A folder for temporary files that only this user can write to; None if there is none."""
    user_id = os.getuid() if hasattr(os, "getuid") else None  # None on Windows
    user = "me" if user_id is None else str(user_id)
    folder = Path(tempfile.gettempdir()) / f"image_classification-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError:
        return None
    if user_id is not None and owner != user_id:  # another user may have prepared it
        return None
    return folder
