"""A ZIP file of images as a data set: unpacked once, then used as that folder.

It is unpacked into `.unpacked/<name>-<hash>` in --data-dir. The hash is of what the ZIP says of its
files, their names, sizes and checksums: so the folder is found again wherever the ZIP is moved to,
and a ZIP that has changed gets another one.

A ZIP may be a stranger's. Nothing is written outside its folder, there are no links, and a file
that would fill the disk is refused before anything is written.
"""

import contextlib
import os
import shutil
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from classifier.datasets.cache_folders import use_first_writable
from classifier.datasets.decode import hash64
from classifier.datasets.walk import is_hidden
from classifier.errors import UserError
from classifier.text import escape_control_characters, pluralize

UNPACKED_FOLDER = ".unpacked"  # in --data-dir: the folders of all ZIP files
# Images hardly shrink. What grows more than so many times, and to more than so many bytes, is no
# data set but made to fill the disk.
MAX_GROWTH = 200
MAX_BYTES_UNCHECKED = 2**30
CHUNK_BYTES = 2**20
UTF8_NAME = 0x800  # flag of an entry whose name is in UTF-8
ENCRYPTED = 0x1
# what zipfile raises for a file that is damaged, or of a kind that it cannot read
DAMAGED: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
)
with contextlib.suppress(ImportError):  # some builds of Python lack it
    from lzma import LZMAError

    DAMAGED += (LZMAError,)


class Entry(NamedTuple):
    """A file or folder in a ZIP.

    Attributes:
        info: what the ZIP says of it.
        parts: its path, as the names of the folders and the file.
    """

    info: zipfile.ZipInfo
    parts: tuple[str, ...]


def is_archive(path: Path) -> bool:
    """Whether this is a ZIP file, by its name."""
    return path.suffix.lower() == ".zip" and path.is_file()


def unpack(path: Path, data_dir: Path) -> Path:
    """Unpack a ZIP file, unless that has been done before; returns the folder.

    It is in the first of `cache_folders(data_dir)` that can be written, and never there half
    unpacked. Raises UserError for a ZIP that is damaged or not safe, and OSError if it cannot be
    read, or the disk is full.
    """
    entries = read_entries(path)
    title = _title(path, entries)

    def unpack_in(folder: Path) -> Path:
        target = folder / UNPACKED_FOLDER / title
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if not _is_whole(target, entries):
                _unpack_into(target, path, entries)
        return target

    return use_first_writable(data_dir, unpack_in)


def is_unpacked(path: Path, data_dir: Path) -> bool:
    """Whether a ZIP file has been unpacked into this folder; False for one that cannot be read."""
    with contextlib.suppress(UserError, OSError):
        entries = read_entries(path)
        return (data_dir / UNPACKED_FOLDER / _title(path, entries)).is_dir()
    return False


def folder_names(path: Path) -> set[str]:
    """Names of all folders in a ZIP file, in Unicode's composed form. Raises as `unpack` does."""
    names: set[str] = set()
    for entry in read_entries(path):
        folders = entry.parts if entry.info.is_dir() else entry.parts[:-1]
        names.update(unicodedata.normalize("NFC", name) for name in folders)
    return names


# ---- What is in a ZIP ----------------------------------------------------------------------------


def read_entries(path: Path) -> list[Entry]:
    """The files and folders in a ZIP file that are not hidden.

    Raises UserError for a ZIP that is damaged or not safe, OSError for one that cannot be read.
    """
    with _explained(path), zipfile.ZipFile(path) as file:
        infos = file.infolist()
    entries = []
    for info in infos:
        parts = _parts(path, info)
        if parts and not any(is_hidden(name) for name in parts):
            entries.append(Entry(info, parts))
    if not entries:
        raise UserError(f"{path} holds no files")
    _check_size(path, entries)
    return entries


def _parts(path: Path, info: zipfile.ZipInfo) -> tuple[str, ...]:
    """The names in the path of an entry; UserError for one that could do harm."""
    name = _decode_name(info).replace("\\", "/")  # some Windows programs write these
    shown = escape_control_characters(name)
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    # on Windows, C:name within a path leads to another folder, and name:other to another file
    has_drive = any(PureWindowsPath(part).drive for part in parts)
    has_stream = os.name == "nt" and ":" in name
    if name.startswith("/") or ".." in parts or has_drive or has_stream:
        raise UserError(f"{path} holds {shown}, a path that leads outside: it is not unpacked")
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the ZIP does not say
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a link" if kind == stat.S_IFLNK else "no file"
        raise UserError(f"{path} holds {shown}, which is {what}: it is not unpacked")
    if info.flag_bits & ENCRYPTED:
        raise UserError(f"{path} is encrypted: unpack it yourself and name the folder")
    return parts


def _decode_name(info: zipfile.ZipInfo) -> str:
    """The name of an entry. Macs write UTF-8 without saying so, which zipfile takes for cp437."""
    if not info.flag_bits & UTF8_NAME:
        with contextlib.suppress(UnicodeError):
            return info.filename.encode("cp437").decode("utf-8")
    return info.filename


def _check_size(path: Path, entries: list[Entry]) -> None:
    """Raise UserError for a ZIP that is made to fill the disk."""
    packed_size = sum(entry.info.compress_size for entry in entries)
    size = _unpacked_size(entries)
    if packed_size > path.stat().st_size:
        raise UserError(f"{path} is damaged, or made to fill the disk: its files overlap")
    if size > MAX_BYTES_UNCHECKED and size > MAX_GROWTH * packed_size:
        raise UserError(
            f"{path} would grow from {_describe_size(packed_size)} to {_describe_size(size)}, more "
            "than images do: it is not unpacked; if you trust it, unpack it and name the folder"
        )


def _unpacked_size(entries: list[Entry]) -> int:
    return sum(entry.info.file_size for entry in entries)


def _describe_size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _title(path: Path, entries: list[Entry]) -> str:
    """The name of the folder that a ZIP is unpacked into."""
    lines = []
    for entry in entries:
        name = "/".join(entry.parts)
        lines.append(f"{name}\0{entry.info.file_size}\0{entry.info.CRC}")
    digest = hash64("\n".join(sorted(lines)).encode("utf-8", "surrogatepass"))
    return f"{path.stem[:50]}-{digest:016x}"


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Make a UserError of what zipfile raises for a file that it cannot read."""
    try:
        yield
    except DAMAGED as error:
        what = str(error) or type(error).__name__
        raise UserError(f"{path} is damaged or no ZIP file that can be read here: {what}") from None


# ---- Unpacking -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keep other processes from unpacking into the same folder; waits for one that does."""
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is unpacking into {target}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_whole(target: Path, entries: list[Entry]) -> bool:
    """Whether a folder has all files of a ZIP, in the right size."""
    for entry in entries:
        if entry.info.is_dir():
            continue
        try:
            size = os.stat(target.joinpath(*entry.parts)).st_size
        except OSError:
            return False
        if size != entry.info.file_size:
            return False
    return True


def _unpack_into(target: Path, path: Path, entries: list[Entry]) -> None:
    """Unpack into a folder beside the target, then rename it. Another process must not do so."""
    size = _unpacked_size(entries)
    num_files = sum(not entry.info.is_dir() for entry in entries)
    temporary = target.with_name(f"{target.name}.tmp")
    for leftover in (temporary, target):  # of a process that was killed; with files missing
        if leftover.exists():
            shutil.rmtree(leftover)
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise UserError(
            f"{path} needs {_describe_size(size)} in {target.parent}, where {_describe_size(free)} "
            "are free: make room, or name another place with --data-dir"
        )
    print(
        f"Unpacking {path} ({pluralize(num_files, 'file')}, {_describe_size(size)}) into {target}"
    )
    try:
        temporary.mkdir()
        bar = tqdm(
            desc="Unpacking", total=size, unit="B", unit_scale=True, leave=False, disable=None
        )
        with _explained(path), zipfile.ZipFile(path) as file, bar:
            for entry in entries:
                place = temporary.joinpath(*entry.parts)
                _unpack_entry(path, file, entry, place, bar)
        temporary.rename(target)
    except BaseException:  # Ctrl-C, too
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _unpack_entry(path: Path, file: zipfile.ZipFile, entry: Entry, place: Path, bar: tqdm) -> None:
    """Unpack one file or folder. Raises what zipfile raises, and UserError for a wrong size."""
    name = escape_control_characters("/".join(entry.parts))
    if entry.info.is_dir():
        place.mkdir(parents=True, exist_ok=True)
        return
    written = 0
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with file.open(entry.info) as source, place.open("xb") as out:
            while chunk := source.read(CHUNK_BYTES):
                written += len(chunk)
                if written > entry.info.file_size:
                    break
                out.write(chunk)
                bar.update(len(chunk))
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path} holds {name} twice, as file and folder or in other case") from None
    except OSError as error:
        if error.errno is None:  # of a decompressor
            raise zipfile.BadZipFile(f"{name}: {error}") from None
        raise
    if written != entry.info.file_size:
        raise UserError(f"{path} is damaged: the size of {name} is not what it says")
