"""Files that are never half written."""

import contextlib
import csv
import errno
import io
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from classifier.text import printable

NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}  # errno of a place without write access


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

    Makes its folder. An old file stays as it is. Raises OSError, which names `path`.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        prepare_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def prepare_folder(folder: Path) -> None:
    """Make a folder, unless it exists, and see to it that files can be written into it.

    Raises OSError, which names the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # os.access would not do: it knows neither read-only disks nor what root may not write
    trial = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
