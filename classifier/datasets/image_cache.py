"""A folder's images, decoded, on disk: each file is decoded once, whatever happens.

A cache is a folder `.decoded/<name>-<size>-<hash>`, or `<name>-<size>-<fit>-<hash>` with another
--fit than crop, that holds

    images           one decoded image a row, uint8 (size, size, 3), in the order of decoding
    index            a RECORD for each of them
    measured         an EXTREMA for each file with more than 8 bits a pixel, if there are any
    unreadable.json  the files that this version of Pillow cannot read, and why
    unreadable.csv   the same for people, written by `folder`
    near.npz         pairs of near-identical images, written by `duplicates`
    lock             held by the process that decodes

Files are known by a key, so that those of earlier runs are found again, and only new or changed
ones are decoded. `images`, `index` and `measured` grow at their ends: decoding that was stopped is
continued.

Images of 8 bits are decoded in one pass. Those with more need the range of values of the whole data
set (see `pixel_range`): where the first pass, which finds it, has used another one for an image,
that image is decoded once more. Its key holds the range.
"""

import contextlib
import json
import math
import mmap
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from classifier.datasets import decode, pixel_range, unreadable
from classifier.datasets.cache_folders import use_first_writable
from classifier.datasets.image_records import DECODED_AS, EXTREMA, RECORD, key_with_range
from classifier.datasets.memmap_images import MemmapImages
from classifier.errors import UserError
from classifier.files import write_atomically
from classifier.text import pluralize

CACHE_FOLDER = ".decoded"  # in --data-dir: the caches of all data sets
WRITE_BYTES = 2**22  # of decoded images at once: this much is lost if decoding is stopped
PIECE_BYTES = 2**16  # decoded in one go by a thread, in at most MAX_PIECE images
MAX_PIECE = 16  # images; one at a time, small ones took twice as long
OUT_OF_MEMORY = "out of memory"  # how Pillow's OSError begins if that is what a decoder reports
BAR: dict[str, Any] = {"unit": "img", "leave": False, "disable": None}  # none without a terminal


def usable_cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


THREADS = min(32, usable_cores())  # each holds a whole photograph


class Piece(NamedTuple):
    """A few files, decoded by one thread.

    Attributes:
        num_files: how many files they were, readable or not.
        pixels: of the readable ones, as `images` holds them.
        records: of the readable ones, as `index` holds them.
        measured: of those with more than 8 bits a pixel, as `measured` holds them.
        broken: key and reason of files that this version of Pillow cannot read.
        failed: key and reason of files that may be readable another time: no memory, a disk error.
    """

    num_files: int
    pixels: bytes
    records: bytes
    measured: bytes
    broken: dict[str, str]
    failed: dict[str, str]


class DecodedCache:
    """Decoded images of one folder, at one size and with one --fit.

    Attributes:
        path: folder of the cache.
        source: folder of the image files.
        size: height and width of the decoded images, in pixels.
        fit: how they became squares: see `fitting.to_square`.
        image_bytes: bytes of a decoded image.
        num_images: how many images the cache holds, of these files and of others.
        pixels: the images, uint8 (num_images, size, size, 3), as a memory map if there are any.
        ranges: of the values of images with more than 8 bits a pixel; empty if there are none.
        unreadable: path and reason of the files that could not be decoded.
    """

    def __init__(self, path: Path, source: Path, size: int, fit: str):
        self.path = path
        self.source = source
        self.size = size
        self.fit = fit
        self.image_bytes = 3 * size**2
        self.num_images = 0
        self.pixels = np.empty((0, size, size, 3), np.uint8)
        self.ranges: pixel_range.Ranges = {}
        self.unreadable: dict[str, str] = {}

    def fill(self, files: np.ndarray, are_all: bool = True) -> None:
        """Decode the files that are not in the cache, then open it.

        A cache that lacks nothing is only read.

        Args:
            files: FILE (N,); their rows, records and extrema are filled in.
            are_all: whether these are all images of the folder, so that others in the cache are of
                files that are gone. Where most are, the cache begins anew.

        Raises OSError if the cache cannot be written, and UserError if it is damaged.
        """
        self._look_up(files)
        broken = self._read_broken()
        if not len(_missing(files, broken)):
            self._open(files, broken)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._look_up(files)  # another process may have decoded some meanwhile
            broken = self._read_broken()
            num_found = int((files["row"] >= 0).sum())
            if are_all and 2 * num_found < self.num_images:
                self._delete_images()
                self._look_up(files)
            failed: dict[str, str] = {}
            # The range of images with more than 8 bits a pixel is known after the first pass.
            for how in ("", " again, now with the range of values of all of them,"):
                missing = _missing(files, broken | failed)
                if len(missing):
                    print(f"Decoding {pluralize(len(missing), 'image')}{how} into {self.path}")
                    newly_broken, newly_failed = self._decode(missing)
                    broken |= newly_broken
                    failed |= newly_failed
                    self._look_up(files)
            self._write_broken(broken)
            self._open(files, broken | failed)

    def images(self, rows: Tensor, in_memory: bool) -> Tensor | MemmapImages:
        """Images in these rows (int64 (N,)): uint8 (N, 3, S, S), copied or left on disk."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of an array that is not writable
            store = torch.from_numpy(self.pixels).permute(0, 3, 1, 2)
        if in_memory:
            return store[rows]
        mapping = cast(mmap.mmap, self.pixels.base)
        return MemmapImages(store, rows, mapping)

    # ---- reading ----

    def _look_up(self, files: np.ndarray) -> None:
        """Fill in rows and records of the files that are in the cache, and count its images."""
        records = self._read_index()
        self.num_images = len(records)
        self._look_up_extrema(files)
        keys = self._keys_with_ranges(files)
        files["row"] = -1
        _, rows, found = np.intersect1d(records["key"], keys, return_indices=True)
        files["row"][found] = rows
        files["record"][found] = records[rows]

    def _look_up_extrema(self, files: np.ndarray) -> None:
        """Fill in the extrema of the files that are known to have more than 8 bits a pixel.

        The ranges of values follow from them.
        """
        try:
            measured = np.fromfile(self.path / "measured", EXTREMA)
        except FileNotFoundError:
            return
        self.ranges = {}
        _, entries, found = np.intersect1d(measured["key"], files["key"], return_indices=True)
        for name in ("kind", "low", "high"):
            files[name][found] = measured[name][entries]
        for kind in (pixel_range.INTEGERS, pixel_range.FLOATS):
            of_kind = files[files["kind"] == kind]
            if len(of_kind):
                self.ranges[kind] = pixel_range.find_range(of_kind["low"], of_kind["high"])

    def _keys_with_ranges(self, files: np.ndarray) -> np.ndarray:
        """The key of each file in `index`: uint64 (N,)."""
        keys = files["key"].copy()
        for i in np.flatnonzero(files["kind"] != ""):
            keys[i] = key_with_range(int(keys[i]), self.ranges[files["kind"][i]])
        return keys

    def _read_index(self) -> np.ndarray:
        """The RECORD of each image that was written whole."""
        try:
            num_whole = (self.path / "images").stat().st_size // self.image_bytes
            return np.fromfile(self.path / "index", RECORD)[:num_whole]
        except FileNotFoundError:
            return np.empty(0, RECORD)

    def _read_broken(self) -> dict[str, str]:
        """Key and reason of the files that this version of Pillow is known not to read."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            content = json.loads((self.path / "unreadable.json").read_text())
            if content["pillow"] == PIL.__version__ and content["formats"] == decode.formats():
                return dict(content["files"])
        return {}

    def _open(self, files: np.ndarray, reasons: dict[str, str]) -> None:
        """Map the images into memory, check some, and note why files are not among them.

        reasons: key and reason of the files that could not be decoded.
        """
        if self.num_images:
            # Read-only: a writable mapping would be refused where it is larger than the memory.
            shape = (self.num_images, self.size, self.size, 3)
            self.pixels = np.memmap(self.path / "images", np.uint8, "r", shape=shape)
        self._check_sample(files[files["row"] >= 0])
        for file in files[files["row"] < 0]:
            self.unreadable[file["path"]] = reasons.get(str(file["key"]), "gone")

    def _check_sample(self, found: np.ndarray) -> None:
        """Raise UserError if one of about 100 images is not the one that was written.

        Two machines may have written at once where the lock of one is unknown to the other.
        """
        every = max(1, len(found) // 100)
        for file in found[::every]:
            pixels = self.pixels[file["row"]]
            if decode.hash64(pixels.tobytes()) != file["record"]["pixel_digest"]:
                problem = f"the decoded images in {self.path} are damaged"
                raise UserError(f"{problem}: delete that folder and run again")

    # ---- writing ----

    def _lock(self) -> AbstractContextManager:
        """Hold the cache alone; waits for another process that is decoding."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / "lock")
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            print(f"Another process is decoding these images into {self.path}: waiting for it")
            return lock.acquire()

    def _delete_images(self) -> None:
        """Start over. The index need not be deleted: it counts only as far as there are images."""
        with contextlib.suppress(PermissionError):  # on Windows, while another process reads them
            (self.path / "images").unlink()

    def _write_broken(self, broken: dict[str, str]) -> None:
        if broken == self._read_broken():
            return
        content = {"pillow": PIL.__version__, "formats": decode.formats(), "files": broken}
        with contextlib.suppress(OSError):  # these files are then tried again in the next run
            write_atomically(self.path / "unreadable.json", json.dumps(content).encode())

    def _decode(self, files: np.ndarray) -> tuple[dict[str, str], dict[str, str]]:
        """Decode these files, in threads, and append them to the cache.

        Returns key and reason of those that are broken, and of those that may be readable another
        time. Raises OSError, which names the cache.
        """
        piece_size = max(1, min(MAX_PIECE, PIECE_BYTES // self.image_bytes))
        pieces = np.array_split(files, math.ceil(len(files) / piece_size))
        pieces_at_once = max(4 * THREADS, WRITE_BYTES // (piece_size * self.image_bytes))
        broken: dict[str, str] = {}
        failed: dict[str, str] = {}
        try:
            with (
                (self.path / "images").open("ab") as images,
                (self.path / "index").open("ab") as index,
                warnings.catch_warnings(),
                ThreadPoolExecutor(THREADS) as pool,
                tqdm(desc="Decoding images", total=len(files), **BAR) as bar,
            ):
                warnings.simplefilter("ignore")  # Pillow warns of files that it reads nevertheless
                # Cut off what a run that was stopped has written only half.
                images.truncate(self.num_images * self.image_bytes)
                index.truncate(self.num_images * RECORD.itemsize)
                for start in range(0, len(pieces), pieces_at_once):
                    decoded: list[Piece] = []
                    some = pieces[start : start + pieces_at_once]
                    for piece in pool.map(self._decode_piece, some):
                        decoded.append(piece)
                        broken |= piece.broken
                        failed |= piece.failed
                        bar.update(piece.num_files)
                    self._append_measured([piece.measured for piece in decoded])
                    # The images first: there is never a record without its image.
                    _append(images, [piece.pixels for piece in decoded])
                    _append(index, [piece.records for piece in decoded])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        return broken, failed

    def _append_measured(self, contents: list[bytes]) -> None:
        """Add to `measured`, which exists only if a file has more than 8 bits a pixel."""
        if not any(contents):
            return
        with (self.path / "measured").open("ab") as measured:
            measured.truncate(measured.tell() // EXTREMA.itemsize * EXTREMA.itemsize)
            _append(measured, contents)

    def _decode_piece(self, files: np.ndarray) -> Piece:
        """Decode a few files; runs in a thread."""
        pixels: list[np.ndarray] = []
        records: list[tuple] = []
        measured: list[tuple] = []
        broken: dict[str, str] = {}
        failed: dict[str, str] = {}
        for file in files:
            path = self.source / file["path"]
            key = int(file["key"])
            try:
                content_digest = decode.hash64(path.read_bytes())
                image = decode.decode(path, self.size, self.ranges, self.fit)
            except Exception as error:  # a damaged file makes Pillow raise almost anything
                reasons = failed if _may_pass(error) else broken
                reasons[str(key)] = unreadable.reason(path, error)
                continue
            if image.extrema is not None and image.used_range is not None:
                measured.append((key, *image.extrema))
                key = key_with_range(key, image.used_range)
            width, height = image.size
            pixels.append(image.pixels)
            records.append((key, content_digest, image.pixel_digest, width, height, image.dhash))
        return Piece(
            num_files=len(files),
            pixels=np.array(pixels, np.uint8).tobytes(),
            records=np.array(records, RECORD).tobytes(),
            measured=np.array(measured, EXTREMA).tobytes(),
            broken=broken,
            failed=failed,
        )


def _missing(files: np.ndarray, broken: dict[str, str]) -> np.ndarray:
    """The files that are neither in the cache nor known to be broken."""
    broken_keys = np.array([int(key) for key in broken], np.uint64)
    is_broken = np.isin(files["key"], broken_keys)
    return files[(files["row"] < 0) & ~is_broken]


def _may_pass(error: Exception) -> bool:
    """True if the same file may be readable another time: short of memory, an error of the disk."""
    if type(error) is OSError and str(error).startswith(OUT_OF_MEMORY):
        return True
    return isinstance(error, MemoryError) or bool(getattr(error, "errno", None))


def _append(file: BinaryIO, contents: list[bytes]) -> None:
    """Write to the end of a file, and on to the disk."""
    file.write(b"".join(contents))
    file.flush()
    os.fsync(file.fileno())


def open_cache(
    source: Path,
    data_dir: Path,
    size: int,
    files: np.ndarray,
    fit: str = "crop",
    are_all: bool = True,
) -> DecodedCache:
    """The cache of a folder's images, after everything that it lacks was decoded.

    It is in the first of `cache_folders` that can be written.

    Args:
        source: the folder.
        data_dir: the folder for caches.
        size, fit: see `DecodedCache`.
        files, are_all: see `DecodedCache.fill`.

    Raises OSError if no folder can be written or the disk is full, and UserError if the cache is
    damaged.
    """
    # Caches of the time before --fit have the name of those with crop.
    kind = f"{size}" if fit == "crop" else f"{size}-{fit}"
    title = f"{source.resolve().name}-{kind}-{identity_of(source)}"

    def fill_in(folder: Path) -> DecodedCache:
        cache = DecodedCache(folder / CACHE_FOLDER / title, source, size, fit)
        cache.fill(files, are_all)
        return cache

    return use_first_writable(data_dir, fill_in, note="the decoded images are in")


def identity_of(source: Path) -> str:
    """What the names of all caches of a folder end in: 16 hexadecimal digits."""
    return f"{decode.hash64(os.fsencode(f'{source.resolve()} {DECODED_AS}')):016x}"
