"""Files that are never half written."""

import contextlib
import csv
import errno
import io
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from classifier.text import URL_REFUSED, is_url, printable

NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}  # errno of a place without write access
ATTEMPTS = 20  # to make a folder while other processes try whether they can make it, too

T = TypeVar("T")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, then rename it.

    Whoever reads `path` meanwhile sees the old content or the new one. With several processes the
    caller sees to it that only one of them writes. Raises OSError, which names `path`; the old file
    is then still there.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # gone already, if all went well


def delete_temporary_files(folder: Path) -> None:
    """Delete what `write_atomically` has left in a folder, in a process that was killed."""
    for path in folder.glob(".*.tmp"):
        if re.search(r"\.[0-9a-f]{32}\.tmp$", path.name):
            path.unlink()


def write_into_new_folder(path: Path, content: bytes) -> None:
    """Write a file atomically; its folder is made if need be."""

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)

    despite_trials(write)


def despite_trials(make: Callable[[], T]) -> T:
    """Return `make()`, which makes a folder and perhaps a file in it.

    It is called again if a folder was missing: another process may have removed it, because it had
    made it only to try that, in `check_writable`.
    """
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(FileNotFoundError):
            return make()
    return make()


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be written in a folder, which need not exist yet.

    It makes the folder and writes a file, then removes both.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        prepare_folder(folder)
    finally:
        for each in missing:  # the innermost first
            with contextlib.suppress(OSError):  # never made, or another process uses it already
                each.rmdir()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary as indented JSON, atomically."""
    write_atomically(path, json.dumps(content, indent=2).encode())


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows, the header first, as CSV in UTF-8, atomically.

    File names that are not UTF-8 are escaped: see `printable`.
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_atomically(path, printable(text.getvalue()).encode())


def prepare_file(path: Path) -> None:
    """See to it that a file can be written here, before the work whose result it will hold.

    Makes its folder. An old file stays as it is. Raises OSError, which names `path`, or its folder
    where that is what cannot be written.
    """
    if is_url(str(path)):
        raise OSError(errno.EINVAL, URL_REFUSED, str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    prepare_folder(path.parent)


def prepare_folder(folder: Path) -> None:
    """Make a folder, unless it exists, and see to it that files can be written into it.

    It writes a file and removes it: only that tells, because root and network drives do not go by
    permissions alone. Raises OSError, which names the folder, or the one above that is in the way.
    """
    if is_url(str(folder)):
        raise OSError(errno.EINVAL, URL_REFUSED, str(folder))
    trial = folder / f".{uuid.uuid4().hex}.tmp"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trial.touch(exist_ok=False)

    try:
        despite_trials(write)
    except OSError as error:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(
                errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)
            ) from None
        if error.filename == str(trial):
            raise OSError(error.errno, error.strerror, str(folder)) from None
        raise
    with contextlib.suppress(OSError):
        trial.unlink()
