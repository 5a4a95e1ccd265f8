"""What `--dataset` takes besides CIFAR-10 and the digits: five more by name, and folders of images.

Imports torch only where it is needed: `decode` is there for `inference.py` where it is not installed.
"""

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import re
import stat
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageOps
from tqdm import tqdm

# What somebody fetches by hand where the download fails, as torchvision names it.
IDX = ", ".join(f"{part}-ubyte.gz" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3",
                                                "t10k-labels-idx1"))  # fmt: skip
ARCHIVES = {
    "cifar100": "cifar-100-python.tar.gz", "mnist": IDX, "fashion-mnist": IDX,
    "svhn": "train_32x32.mat, test_32x32.mat", "stl10": "stl10_binary.tar.gz",
}  # fmt: skip
NAMES = list(ARCHIVES)
Pair = tuple[Any, Any]  # tensors: images, uint8 (N, 3, H, W), or a Mapped of them, and their labels, int64 (N,)


class Found(NamedTuple):
    """A data set as it was found."""

    name: str
    classes: list[str]
    train: Pair
    valid: Pair | None  # none: to be split off train
    test: Pair
    mirrored: bool  # may an image be flipped left to right and keep its label?
    report: dict[str, Any] | None = None  # of a folder: what data_report.json holds
    files: list[str] | None = None  # of a folder: the file of each training image, from the folder on


def load(dataset: str, data_dir: Path, image_size: int | None, split_off: Callable[..., Any]) -> Found:
    """The data set of that name, downloaded into data_dir if need be, or the images in the folder `dataset`.

    split_off(labels, fraction): indices of what stays and of a random fraction of each class, for a folder without test
    images; all three tensors. Raises ValueError for a folder that is no data set, and OSError or RuntimeError where a
    download fails or nothing can be written.
    """
    if dataset in NAMES:
        return by_name(dataset, data_dir)
    return from_folder(Path(dataset).expanduser(), data_dir, image_size, split_off)


def settings(count: int, size: int, mirrored: bool, pretrained: bool) -> dict[str, Any]:
    """Default settings for `count` training images of `size` pixels, so that a run sees some 400,000 images.

    Small data sets get smaller batches and more epochs, up to 60; of large ones there are at least 11. A pretrained
    network takes some 300 steps, in 5 to 30 epochs.
    """
    batch = min(64 if pretrained else 500, max(16, count // 13))
    augment = f"{'flip,' * mirrored}crop={max(1, size // 16)}"
    least, most, steps = (5, 30, 300) if pretrained else (11, 60, 800)
    epochs = min(most, max(least, round(steps * batch / count)))
    return {"epochs": epochs, "batch_size": batch, "augment": augment, "low_res": 0.7 if size >= 28 else 0.0}


# ==== By name =========================================================================================================


def by_name(name: str, data_dir: Path) -> Found:
    """One of NAMES by torchvision, which downloads it where it is missing.

    Raises ValueError where that fails or its files are damaged, OSError where nothing can be written.
    """
    import torch
    from torchvision import datasets

    kinds: dict[str, Any] = {
        "cifar100": datasets.CIFAR100, "mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST,
        "svhn": datasets.SVHN, "stl10": datasets.STL10,
    }  # fmt: skip
    parts: list[dict[str, Any]] = [{"train": True}, {"train": False}]
    labels = "targets"
    if name in ("svhn", "stl10"):
        parts, labels = [{"split": "train"}, {"split": "test"}], "labels"
    kind = kinds[name]
    place = data_dir / kind.__name__ / "raw" if ARCHIVES[name] == IDX else data_dir
    try:
        train, test = (kind(str(data_dir), **part, download=True) for part in parts)
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) in READ_ONLY | {errno.ENOSPC}:
            raise
        why = f"it is not in {data_dir}, nor to be had ({' '.join(str(error).split())})"
        raise ValueError(f"{why}: put {ARCHIVES[name]} into {place}") from error
    except (AssertionError, EOFError, LookupError, TypeError, ValueError) as error:  # what files that are cut off give
        raise ValueError(f"its files in {place} are damaged: delete them and run again") from error

    def pair(found: Any) -> Pair:
        images = torch.as_tensor(found.data)
        if images.ndim == 3:  # grey
            images = images[:, None].expand(-1, 3, -1, -1)
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2)
        return images, torch.as_tensor(getattr(found, labels)).long()

    classes = [str(each) for each in getattr(train, "classes", range(10))]
    return Found(type(train).__name__, classes, pair(train), None, pair(test), name not in ("mnist", "svhn"))


# ==== From a file =====================================================================================================

NEED_MORE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # another program, to be read


class Decoded(NamedTuple):
    """An image of a file."""

    pixels: np.ndarray  # uint8 (S, S, 3)
    size: tuple[int, int]  # width, height in the file
    digest: int  # of the pixels
    sketch: np.ndarray  # uint8 (32,), 256 bits: brighter to the right? Nearly the same for nearly the same picture


def decode(path: Path, size: int) -> Decoded:
    """Any image that Pillow opens: turned as its EXIF data say, transparent parts white, the middle square, resized."""
    with Image.open(path, formats=formats()) as file:
        width_height = file.size
        file.draft(None, (2 * size, 2 * size))  # a JPEG is read at a fraction of its size: several times as fast
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # 16 bits a pixel, or numbers of some other range
            values = np.nan_to_num(np.array(image, dtype=np.float32), posinf=0, neginf=0)
            ranges = (65535,) if image.mode.startswith("I;") else (1, 255, 65535)
            most = next((top for top in ranges if values.max() <= top), values.max())
            values[values == image.info.get("transparency")] = most
            image = Image.fromarray((values * (255 / most)).clip(0, 255).round().astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    rows = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    square = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    return Decoded(square, width_height, hashed(square.tobytes()), np.packbits(rows[:, 1:] > rows[:, :-1] + 2))


@functools.cache
def formats() -> list[str]:
    """That Pillow reads by itself, without starting another program."""
    Image.init()  # fills Image.OPEN
    return [kind for kind in Image.OPEN if kind not in NEED_MORE]


def extensions() -> set[str]:
    """Of such files."""
    return {extension for extension, kind in Image.registered_extensions().items() if kind in formats()}


def size_of(path: Path) -> tuple[int, int] | None:
    """Width and height of what Pillow opens, whatever its name; None of anything else."""
    with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError):
        with Image.open(path, formats=formats()) as file:
            return file.size
    return None


def is_image(path: Path) -> bool:
    return size_of(path) is not None


# ==== The map: decoded images on disk =================================================================================

RECORD = np.dtype([("key", "<u8"), ("digest", "<u8"), ("width", "<u4"), ("height", "<u4"), ("sketch", "u1", 32)])
FILE = np.dtype([
    ("path", object),  # str, from the data set's folder on
    ("part", "U5"),  # train, valid, test or all
    ("label", np.int64),
    ("key", np.uint64),  # see files_in
    ("row", np.int64),  # of the map, once look_up has found it there; else -1
    ("record", RECORD),  # any where the row is -1
])  # fmt: skip
DECODED_AS = 2  # to be raised when `decode`, RECORD or what is near-identical changes: older maps are not used then
HELD = 2**30  # bytes of images: more are not held in memory but read from the map, batch by batch
WRITTEN = 2**22  # bytes of decoded images that are written at once: so much is lost when decoding is stopped
PIECE = 2**16  # bytes, of at most 16 images, that a thread decodes in one go; one by one, small ones took twice as long
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = min(32, CORES)  # each holds a whole photograph
READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


def hashed(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class Map(NamedTuple):
    """Where the decoded images of some files are."""

    folder: Path  # that has the map's files in it
    pixels: np.ndarray  # uint8 (M, S, S, 3), in there: np.memmap, if there are any
    unreadable: dict[str, str]  # path: why


class Mapped:
    """Images of a map that are not held in memory; used like a tensor, uint8 (N, 3, S, S).

    A slice, and `only`, give another such view; an index of another kind gives a tensor.
    """

    def __init__(self, store: Any, rows: Any, mapping: Any):
        self.store, self.rows, self.mapping = store, rows, mapping  # uint8 (M, 3, S, S), int64 (N,), see Map

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.store.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, which: Any) -> "Mapped":
        return Mapped(self.store, self.rows[which], self.mapping)

    def __getitem__(self, which: Any) -> Any:
        return self.only(which) if isinstance(which, slice) else self.store[self.rows[which]]

    def split(self, count: int) -> Iterator[Any]:
        """Tensors of so many images each."""
        return (self.store[rows] for rows in self.rows.split(count))

    def to(self, device: Any) -> "Mapped":
        """They stay where they are: only batches move.

        From now on they are read at random. Where memory was short, reading ahead made that fifteen times slower.
        """
        if hasattr(mmap, "MADV_RANDOM"):
            self.mapping.madvise(mmap.MADV_RANDOM)
        return self


def write_whole(path: Path, content: bytes) -> None:
    """So that nobody ever meets half of it; what cannot be written is not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        temporary.write_bytes(content)
        os.replace(temporary, path)
    with contextlib.suppress(OSError):
        temporary.unlink()  # gone already, if all went well


def places(data_dir: Path) -> Iterator[Path]:
    """Where a map may be: in data_dir, else in the user's cache, else in a folder of the user's for temporary files."""
    yield data_dir
    if os.path.isabs(home := os.path.expanduser("~")):
        yield Path(home) / ".cache" / "image_classification"
    user = str(os.getuid()) if hasattr(os, "getuid") else "me"
    with contextlib.suppress(OSError):
        own = Path(tempfile.gettempdir()) / f"image_classification-{user}"
        own.mkdir(mode=0o700, exist_ok=True)
        if user in ("me", str(own.stat().st_uid)):  # else somebody else's, who could have prepared it
            yield own


def map_of(folder: Path, data_dir: Path, size: int, files: np.ndarray) -> Map:
    """Decoded images of the files in `folder`, those of earlier runs and all that are missing.

    files: FILE (N,), whose rows and records are filled in. The map is in .decoded in the first of `places` that can be
    written. Raises OSError where none can, or the disk is full, and ValueError for a damaged map.
    """
    known_as = os.fsencode(f"{folder.resolve()} {DECODED_AS}")
    title = f"{folder.resolve().name}-{size}-{hashed(known_as):016x}"
    failed: Any = None
    for place in places(data_dir):
        if failed:
            print(f"note: {failed.filename or failed} cannot be written: the decoded images are in {place}")
        try:
            return fill_map(place / ".decoded" / title, folder, size, files)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            failed = error
    raise failed


def fill_map(own: Path, folder: Path, size: int, files: np.ndarray) -> Map:
    """The map in the folder `own`, after all that is missing in it was decoded; what is there stays.

    `images` has an image a row, in the order in which they were decoded, `index` a RECORD for each, and
    `unreadable.json` what this Pillow found wrong with other files.
    """
    from filelock import FileLock, Timeout

    def missing() -> np.ndarray:
        """Those that are neither there nor known to be broken."""
        known = np.array([int(key) for key in broken], np.uint64)
        return files[(files["row"] < 0) & ~np.isin(files["key"], known)]

    count, broken = look_up(own, size, files), known_broken(own)
    if not len(missing()):
        return open_map(own, size, count, files, broken)
    own.mkdir(parents=True, exist_ok=True)
    lock = FileLock(own / "lock")
    try:
        locked = lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is decoding these images into {own}: waiting for it")
        locked = lock.acquire()
    with locked:
        count, broken = look_up(own, size, files), known_broken(own)  # there may be more by now
        if count > 2 * len(files):  # most of it is of files that are gone
            with contextlib.suppress(PermissionError):  # on Windows, while another process reads it
                (own / "images").unlink()
                count = look_up(own, size, files)
        if len(left := missing()):
            lasting, passing = decode_missing(own, count, folder, size, left)
            if lasting:
                content = {"pillow": PIL.__version__, "files": broken | lasting}
                write_whole(own / "unreadable.json", json.dumps(content).encode())
            broken |= lasting | passing
        return open_map(own, size, look_up(own, size, files), files, broken)


def known_broken(own: Path) -> dict[str, str]:
    """Keys of files that cannot be read, and why, as far as this Pillow is to know."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads((own / "unreadable.json").read_text())
        if content["pillow"] == PIL.__version__:
            return dict(content["files"])
    return {}


def open_map(own: Path, size: int, count: int, files: np.ndarray, broken: dict[str, str]) -> Map:
    """The map of `count` images, where look_up found the files; ValueError if some are not those that were written."""
    pixels = np.empty((0, size, size, 3), np.uint8)
    if count:  # a writable mapping would be refused for more than memory can hold
        pixels = np.memmap(own / "images", np.uint8, "r", shape=(count, size, size, 3))
    there = np.flatnonzero(files["row"] >= 0)
    for file in files[there[:: max(1, len(there) // 100)]]:  # a sample: two machines may have written at once, where
        if hashed(pixels[file["row"]].tobytes()) != file["record"]["digest"]:  # the lock of one is unknown to the other
            raise ValueError(f"the decoded images in {own} are damaged: delete that folder and run again")
    unread = files[files["row"] < 0]
    return Map(own, pixels, {file["path"]: broken.get(str(file["key"]), "gone") for file in unread})


def look_up(own: Path, size: int, files: np.ndarray) -> int:
    """How many images the map has; fills in the rows and records of the files."""
    records = np.empty(0, RECORD)
    with contextlib.suppress(FileNotFoundError):
        held = (own / "images").stat().st_size // (3 * size**2)
        records = np.fromfile(own / "index", RECORD)[:held]
    _, there, asked = np.intersect1d(records["key"], files["key"], return_indices=True)
    files["row"] = -1
    files["row"][asked], files["record"][asked] = there, records[there]
    return len(records)


def decode_missing(own: Path, count: int, folder: Path, size: int, files: np.ndarray) -> tuple[dict[str, str], ...]:
    """Decode these files, in threads, after the first `count` images of the map.

    Returns the keys of those that cannot be read, with the reasons: where it lasts, and where another time may do.
    """
    lasting, passing = dict[str, str](), dict[str, str]()

    def decode_some(some: np.ndarray) -> tuple[int, bytes, bytes]:
        """How many were looked at, and images and records of those that can be read."""
        pixels, records = [], []
        for file in some:
            try:
                pixels.append((each := decode(folder / file["path"], size)).pixels)
                records.append((file["key"], each.digest, *each.size, each.sketch))
            except Exception as error:  # whatever a damaged file makes Pillow raise
                why = str(error) or type(error).__name__
                passes = isinstance(error, MemoryError) or getattr(error, "errno", None) or "memory" in why
                (passing if passes else lasting)[str(file["key"])] = why
        return len(some), np.array(pixels, np.uint8).tobytes(), np.array(records, RECORD).tobytes()

    print(f"Decoding {many(len(files), 'image')}, once, into {own}")
    image = 3 * size**2  # bytes
    in_piece = max(1, min(16, PIECE // image))
    pieces = np.array_split(files, math.ceil(len(files) / in_piece))
    at_once = max(4 * THREADS, WRITTEN // (in_piece * image))
    try:
        with (
            (own / "images").open("ab") as images, (own / "index").open("ab") as index,
            warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool,
            tqdm(desc="Decoding images", total=len(files), unit="img", leave=False, disable=None) as bar,
        ):  # fmt: skip
            warnings.simplefilter("ignore")  # of Pillow, about files that it reads nevertheless
            images.truncate(count * image)  # without what was only half written
            index.truncate(count * RECORD.itemsize)
            for start in range(0, len(pieces), at_once):
                decoded = []
                for each in pool.map(decode_some, pieces[start : start + at_once]):
                    decoded.append(each)
                    bar.update(each[0])
                _, pixels, records = zip(*decoded, strict=True)
                for file, parts in ((images, pixels), (index, records)):  # never a record before its image
                    file.write(b"".join(parts))
                    file.flush()
                    os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(own)) from None
    return lasting, passing


# ==== From a folder ===================================================================================================

SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "valid", "valid": "valid", "validation": "valid",
}  # fmt: skip
LARGEST = 64  # pixels: what a network learns in minutes on a laptop
UNREADABLE = 0.01  # share of the files from which on something must be wrong with all of them
FEW = 10  # images of a class
TEST_FRACTION = 0.2  # of each class, where there is no test/
ALIKE = 20  # of 256 bits in which two images may differ and be near-identical
MOST_TWINS = 10_000  # pairs: more say no more
MOST_COMPARED = 100_000  # images
HIDDEN = (".", "__MACOSX", "@eaDir")
UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f\ud800-\udfff]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def folders_in(folder: Path) -> list[Path]:
    """Those that are not hidden. Files are left out before they are asked for one by one: there may be many."""
    found = [Path(entry.path) for entry in os.scandir(folder) if entry.is_symlink() or entry.is_dir()]
    return sorted(path for path in found if path.is_dir() and not path.name.startswith(HIDDEN))


def class_folders(folder: Path) -> list[Path]:
    """The folders of the classes in it; ValueError for what cannot be one."""
    folders = folders_in(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(HIDDEN))
    if loose := [path.name for path in files if is_image(path)]:
        raise ValueError(f"{loose[0]} lies in {folder} itself, {len(loose)} such in all: put it into a class folder")
    if len(folders) < 2:
        raise ValueError(f"{folder} has {'1 class folder' if folders else 'no class folders'}: at least two are needed")
    if wrong := [path.name for path in folders if UNSAFE.search(path.name)]:
        raise ValueError(f"{wrong[0]!r} in {folder} is no name for a class: files will be named after it; rename it")
    return folders


def layout(folder: Path) -> dict[str, Path]:
    """Which folder holds which split: train, valid and test, or "all", which is to be split."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    folders = folders_in(folder)
    splits: dict[str, Path] = {}
    for path in folders:
        if kind := SPLITS.get(path.name.lower()):
            if kind in splits:
                raise ValueError(f"{folder} has both {splits[kind].name} and {path.name}: keep one of them")
            splits[kind] = path
    others = [path.name for path in folders if path not in splits.values()]
    named = {part: name for name in others for word in re.split(r"[\W_]+", name) if (part := SPLITS.get(word.lower()))}
    if not splits and 1 < len(named) == len(others) and all(folders_in(folder / name) for name in others):
        both = " and ".join(named.values())
        raise ValueError(f"{folder} has {both}: parts of the data? Name the folders of their classes train and test")
    if splits and others:
        mend = "Leave either class folders or train/, test/ and val/"
        both = f"{next(iter(splits.values())).name}/ and {others[0]}/ side by side"
        raise ValueError(f"{folder} has {both}: are these classes, or parts of the data? {mend}")
    if splits and "train" not in splits:
        raise ValueError(f"{folder} has {', '.join(path.name for path in splits.values())}, but no train/")
    return {part: splits[part] for part in ("train", "valid", "test") if part in splits} or {"all": folder}


def from_folder(folder: Path, data_dir: Path, image_size: int | None, split_off: Callable[..., Any]) -> Found:
    """A folder with train/, test/ and val/ of class folders, or with class folders alone.

    Every image is decoded once, to image_size or to what suits the images, at most LARGEST, into a map in data_dir.
    Raises ValueError for a folder that is no such data set, or of which too much cannot be read.
    """
    import torch

    parts = layout(folder)
    learning = next(iter(parts))  # the part to learn from: train, or all
    classes = [path.name for path in class_folders(parts[learning])]
    files, other = list_images(folder, parts, classes)
    if other:
        kinds = Counter(Path(name).suffix.lower() or "without an extension" for name in other).most_common(5)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds)
        such = f"{many(len(other), 'file')} ({listed}), such as {other[0]}"
        print(f"note: left out, of no format that Pillow knows: {such}")
    size = image_size or suitable_size(folder, files["path"])
    cost = f", {(size / 32) ** 2:.1f} times the work of CIFAR-10's 32" if size > 32 else ""
    how = "its middle square, resized; --image-size N for another size"
    print(f"Each image becomes {size} by {size} pixels{cost}: {how}")
    store = map_of(folder, data_dir, size, files)
    kept = files[files["row"] >= 0]
    if lost := set(range(len(classes))) - set(kept["label"][kept["part"] == learning].tolist()):
        why = "; ".join(store.unreadable.values())
        raise ValueError(f"no image of the class {classes[min(lost)]} can be read: {why}"[:500])
    if len(store.unreadable) > UNREADABLE * len(files):
        first_ones = "; ".join(f"{folder / path} ({why})" for path, why in list(store.unreadable.items())[:3])
        most = f"more than {100 * UNREADABLE:g} %: mend or delete them"
        raise ValueError(f"{len(store.unreadable)} of {len(files)} images cannot be read, {most}: {first_ones}")
    pairs = twins(kept, store)
    chosen = np.arange(len(kept))
    if "all" in parts:  # of identical ones of a class the first
        alike = firsts(kept["record"]["digest"]) * len(classes) + kept["label"]
        chosen = chosen[firsts(alike) == chosen]
    report = describe(folder, classes, size, kept, chosen, store.unreadable, pairs) | {"left_out": other}

    learned, validated, tested = (chosen[kept["part"][chosen] == part] for part in (learning, "valid", "test"))
    if not len(tested):
        testing = draw_test(kept["label"], learned, pairs, split_off)
        learned, tested = learned[~testing], learned[testing]
        if not len(tested):
            raise ValueError("no class has enough images to test with: 3 that differ are needed, or a folder test/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that nobody may write to this
        pixels = torch.from_numpy(store.pixels).permute(0, 3, 1, 2)
    in_memory = len(chosen) * pixels[0].nbytes <= HELD

    def pair(which: np.ndarray) -> Pair:
        rows, labels = torch.from_numpy(kept["row"][which]), torch.from_numpy(kept["label"][which])
        return pixels[rows] if in_memory else Mapped(pixels, rows, store.pixels.base), labels

    name = folder.resolve().name or "images"
    name += "-images" if name.lower() in ("cifar10", "digits", *NAMES) else ""
    valid = pair(validated) if len(validated) else None
    return Found(name, classes, pair(learned), valid, pair(tested), True, report, kept["path"][learned].tolist())


def list_images(folder: Path, parts: dict[str, Path], classes: list[str]) -> tuple[np.ndarray, list[str]]:
    """All images, FILE (N,), and other files; ValueError for what is no such data set."""
    known, images, other = extensions(), list[np.ndarray](), list[str]()
    for part, place in parts.items():
        names = [path.name for path in class_folders(place)]
        if strange := set(names) - set(classes):
            raise ValueError(f"{place} has a class {min(strange)} that {parts['train']} has not")
        inner = [{path.name for path in folders_in(place / name)} for name in names]
        if sum(bool({name.lower() for name in each} & SPLITS.keys()) for each in inner) > 1:
            raise ValueError(f"{place}: parts of the data inside the classes? It has to be the other way round")
        if len(same := sorted(set.intersection(*inner))[:2]) > 1:
            mend = "Put the images of a class into its folder, without others between"
            raise ValueError(f"each folder in {place} has {' and '.join(same)} in it: which are the classes? {mend}")
        for name in names:
            found = []
            for path, key in files_in(place / name, folder):
                if key and (os.path.splitext(path)[1].lower() in known or is_image(folder / path)):
                    found.append((path, key))
                else:
                    other.append(str(folder / path))
            if not found and part != "valid":
                raise ValueError(f"the class folder {place / name} holds no image: put some into it, or delete it")
            found.sort(key=lambda each: os.path.normcase(each[0]).split(os.sep))  # as paths compare
            images.append(own := np.zeros(len(found), FILE))
            own[["path", "key"]] = found
            own["part"], own["label"] = part, classes.index(name)
    return np.concatenate(images), other


def draw_test(labels: np.ndarray, given: np.ndarray, pairs: np.ndarray, split_off: Callable[..., Any]) -> np.ndarray:
    """Which of the images in the places `given` are for testing: bool, as many as there.

    Those that are alike (pairs: see twins) are on the same side, or the training would know the test's answers.
    """
    import torch
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    own, testing = labels[given], np.zeros(len(given), dtype=bool)
    testing[split_off(torch.from_numpy(own), TEST_FRACTION)[1].numpy()] = True
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (len(labels), len(labels)))
    testing = testing[firsts(connected_components(links, directed=False)[1][given])]
    for label in np.unique(own):  # unless a class were all test
        testing[own == label] &= not testing[own == label].all()
    return testing


def files_in(place: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """The files below `place` that are not hidden: each one's path from `folder` on, and its key in a map.

    Links to folders are followed out of the data set's folder, not within it: there they would mix its classes.
    The key is a hash of this path, the size and the modification time, or 0 where these are not to be had. OSError for
    a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    root, walked = folder.resolve(), set[Path]()
    for parent, folders, names in os.walk(place, onerror=fail, followlinks=True):
        real, linked = Path(parent).resolve(), parent != str(place) and os.path.islink(parent)
        if real in walked or linked and (real.is_relative_to(root) or root.is_relative_to(real)):
            folders.clear()  # a circle, or another class
            continue
        walked.add(real)
        folders[:], shown = (sorted(n for n in each if not n.startswith(HIDDEN)) for each in (folders, names))
        inside = os.path.relpath(parent, folder)
        for name in shown:
            path = os.path.join(inside, name)
            try:
                about = os.stat(os.path.join(parent, name))
            except OSError:
                if not os.path.islink(os.path.join(parent, name)):  # a link to nowhere is no image
                    yield path, 0
                continue
            if stat.S_ISREG(about.st_mode):
                yield path, hashed(os.fsencode(f"{path}\0{about.st_size}\0{about.st_mtime_ns}"))


def suitable_size(folder: Path, paths: np.ndarray) -> int:
    """The median of the shorter sides of some images, as 32, 48 or 64 pixels: whatever they have, up to LARGEST."""
    some = paths[:: max(1, len(paths) // 200)]
    sides = [min(size) for path in some if (size := size_of(folder / path))]
    middle = np.median(sides) if sides else LARGEST
    return next((size for size in (32, 48) if middle <= size), LARGEST)


def twins(kept: np.ndarray, store: Map) -> np.ndarray:
    """Pairs of images that are identical or nearly so: int64 (P, 3) of two places in `kept` and 1 or 0, ascending.

    Of several identical ones each is paired with the first.
    """
    places = np.arange(len(kept))
    first = firsts(kept["record"]["digest"])
    copies = places[first != places]
    same = np.stack([first[copies], copies, np.ones_like(copies)], axis=1)
    near = near_identical(kept, places[first == places], store)
    return np.unique(np.concatenate([same, np.pad(near, ((0, 0), (0, 1)))]), axis=0)


def near_identical(kept: np.ndarray, places: np.ndarray, store: Map) -> np.ndarray:
    """Pairs of the images in these places that are nearly identical, by sketch and then by pixels: int64 (P, 2).

    Looked for where there is something to see in an image, until there are MOST_TWINS, among at most MOST_COMPARED
    images: each is compared with each. What was found is kept beside the map.
    """
    if len(places) > MOST_COMPARED:
        return np.empty((0, 2), dtype=np.int64)
    of, path = hashed(kept["record"]["digest"].tobytes()), store.folder / "near.npz"
    with contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile), np.load(path) as before:
        if before["of"] == of:
            return np.asarray(before["pairs"])
    sketches = np.unpackbits(kept["record"]["sketch"][places], axis=1)
    clear = (sketches.sum(1) > 16) & (sketches.sum(1) < 240)
    places, bits = places[clear], sketches[clear].astype(np.float32) * 2 - 1
    near: list[tuple[int, int]] = []
    for start in tqdm(range(0, len(places), 1000), "Comparing images", unit="kimg", leave=False, disable=None):
        alike = np.triu(bits[start : start + 1000] @ bits[start:].T >= 256 - 2 * ALIKE, 1)
        for row, column in np.argwhere(alike)[:MOST_TWINS].tolist():
            pair = int(places[start + row]), int(places[start + column])
            one, other = (store.pixels[kept["row"][place]].astype(np.int16) for place in pair)
            if np.abs(one - other).mean() < 255 * 0.03:
                near.append(pair)
        if len(near) > MOST_TWINS:
            break
    found = np.array(near, dtype=np.int64).reshape(-1, 2)
    np.savez(content := io.BytesIO(), of=np.uint64(of), pairs=found)
    write_whole(path, content.getvalue())
    return found


def firsts(values: np.ndarray) -> np.ndarray:
    """For each entry the place of the first one that is the same: int64 (N,)."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    return first[which]


def many(count: int, what: str) -> str:
    """1 image, 2 images."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def describe(
    folder: Path, classes: list[str], size: int, kept: np.ndarray, chosen: np.ndarray, unreadable: dict[str, str],
    pairs: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """The data report of the images `kept`, of which those `chosen` are used: data_report.json; "words": to print."""
    parts = list(dict.fromkeys(kept["part"].tolist()))

    def per_class(labels: np.ndarray) -> dict[str, int]:
        return dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))

    table = {part: per_class(kept["label"][kept["part"] == part]) for part in parts}
    words = [f"Data report of {folder}: {len(kept)} images in {len(classes)} classes"]
    for part, counts in table.items():
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        words.append(f"  {part}: {many(sum(counts.values()), 'image')} ({listed})")
    sides = np.sort(np.minimum(kept["record"]["width"], kept["record"]["height"]))
    spread = f"from {sides[0]} to {sides[-1]} pixels, half of them up to {sides[len(sides) // 2]}"
    words.append(f"  shorter sides {spread if sides[0] < sides[-1] else f'of {sides[0]} pixels'}")
    if small := int((sides < size / 2).sum()):
        are = "is" if small == 1 else "are"
        words.append(f"  {many(small, 'image')} {are} less than half as large as {size} pixels")
    learned = per_class(kept["label"][chosen][kept["part"][chosen] == parts[0]])
    if few := {name: count for name, count in learned.items() if count < FEW}:
        listed = ", ".join(f"{name} ({count})" for name, count in few.items())
        words.append(f"  fewer than {FEW} images: {listed}")
        if "test" not in table:
            words += [
                "    Without test/ and val/, classes of 1 or 2 are trained on only, those of 3 to 6 are tested, too,",
                "    and only larger ones also validated. So small a test says little",
            ]
    if max(learned.values()) > 5 * min(learned.values()):
        advice = "look at each class's accuracy, and try --class-balance weights"
        words.append(f"  the classes differ much in size: {advice}")
    if unreadable:
        listed = "; ".join(f"{folder / path} ({why})" for path, why in list(unreadable.items())[:5])
        words.append(f"  left out, because it cannot be read: {many(len(unreadable), 'file')}: {listed}")
    same = int(pairs[:, 2].sum())
    once = "; identical ones of a class are used once" if "all" in table else ""
    if (different := len(kept) - same) > MOST_COMPARED:
        more = f"{different} are too many to look for near-identical ones"
        words.append(f"  {many(same, 'pair')} of identical images{once}. {more}")
    elif len(pairs):
        words.append(f"  {many(same, 'pair')} of identical and {len(pairs) - same} of near-identical images{once}")

    alike = [[*(str(folder / kept["path"][place]) for place in pair), "identical" if same else "near-identical"]
             for *pair, same in pairs.tolist()]  # fmt: skip
    for one, other in itertools.combinations(parts, 2):
        if (across := (kept["part"][pairs[:, :2]] == [one, other]).all(1)).any():
            better = f"the {'test' if 'test' in (one, other) else 'validation'} accuracy will look better than it is"
            names = f"{one} and {other}, such as {' and '.join(alike[across.argmax()][:2])}"
            words.append(f"  WARNING: {many(across.sum(), 'pair')} across {names}: {better}")
    labels = kept["label"][pairs[:, :2]]
    if (crossed := labels[:, 0] != labels[:, 1]).any():
        such = f"such as {' and '.join(alike[crossed.argmax()][:2])}: both stay, one label is wrong"
        words.append(f"  {crossed.sum()} of these in two classes, {such}")
    sizes = Counter(kept["record"][["width", "height"]].tolist())
    return {
        "folder": str(folder), "image_size": size, "images_per_class": table, "words": words,
        "sizes": [[f"{width}x{height}", number] for (width, height), number in sizes.most_common(20)],
        "unreadable": {str(folder / path): why for path, why in unreadable.items()}, "classes_with_few_images": few,
        "twins": alike,
    }  # fmt: skip
