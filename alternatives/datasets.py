"""What `--dataset` takes besides CIFAR-10 and the digits: five more by name, and folders of images.

Arrays of NumPy, so that `decode` is there for `inference.py` where torch is not installed.
"""

import functools
import hashlib
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

NAMES = ["cifar100", "mnist", "fashion-mnist", "svhn", "stl10"]
Pair = tuple[np.ndarray, np.ndarray]  # images, uint8 (N, 3, H, W), and their labels, int64 (N,)


class Found(NamedTuple):
    """A data set as it was found."""

    name: str
    classes: list[str]
    train: Pair
    valid: Pair | None  # none: to be split off train
    test: Pair
    mirrored: bool  # may an image be flipped left to right and keep its label?
    report: dict[str, Any] | None = None  # of a folder: what data_report.json holds
    files: list[str] | None = None  # of a folder: the file of each training image


def load(dataset: str, data_dir: Path, image_size: int | None, split_off: Callable[..., Any]) -> Found:
    """The data set of that name, downloaded into data_dir if need be, or the images in the folder `dataset`.

    split_off(labels, fraction): indices of what stays and of a random fraction of each class, for a folder without test
    images. Raises ValueError for a folder that is no data set, and OSError or RuntimeError where a download fails.
    """
    if dataset in NAMES:
        return by_name(dataset, data_dir)
    return from_folder(Path(dataset).expanduser(), image_size, split_off)


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
    """One of NAMES by torchvision, which downloads it where it is missing."""
    import torch
    from torchvision import datasets

    kinds: dict[str, Any] = {
        "cifar100": datasets.CIFAR100, "mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST,
        "svhn": datasets.SVHN, "stl10": datasets.STL10,
    }  # fmt: skip

    def read(train: bool) -> Any:
        part = {"split": "train" if train else "test"} if name in ("svhn", "stl10") else {"train": train}
        return kinds[name](str(data_dir), **part, download=True)

    def pair(found: Any) -> Pair:
        images = torch.as_tensor(found.data)
        if images.ndim == 3:  # grey
            images = images[:, None].expand(-1, 3, -1, -1)
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2)
        labels = found.labels if name in ("svhn", "stl10") else found.targets
        return images.numpy(), torch.as_tensor(labels).long().numpy()

    train = read(True)
    classes = [str(each) for each in getattr(train, "classes", range(10))]
    mirrored, test = name not in ("mnist", "svhn"), pair(read(False))  # now, while there is a network
    return Found(type(train).__name__, classes, pair(train), None, test, mirrored)


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
HIDDEN = (".", "__MACOSX")
NEED_MORE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # another program, to be read
UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


class Decoded(NamedTuple):
    """An image of a file."""

    pixels: np.ndarray  # uint8 (S, S, 3)
    size: tuple[int, int]  # width, height in the file
    digest: bytes  # of the pixels
    sketch: np.ndarray  # bool (256,): is it brighter to the right? Nearly the same for nearly the same picture


def decode(path: Path, size: int) -> Decoded:
    """Any image that Pillow opens: turned as its EXIF data say, transparent parts white, the middle square, resized."""
    with Image.open(path, formats=formats()) as file:
        width_height = file.size
        file.draft(None, (2 * size, 2 * size))  # a JPEG is read at a fraction of its size: several times as fast
        image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # 16 bits a pixel, or numbers of some other range
            values = np.asarray(image, dtype=np.float32)
            ranges = (65535,) if image.mode.startswith("I;") else (1, 255, 65535)
            most = next((top for top in ranges if values.max() <= top), values.max())
            image = Image.fromarray((values * (255 / most)).clip(0, 255).round().astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    rows = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    square = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    digest = hashlib.blake2b(square.tobytes(), digest_size=16).digest()
    return Decoded(square, width_height, digest, (rows[:, 1:] > rows[:, :-1] + 2).ravel())


def visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(HIDDEN))


@functools.cache
def formats() -> list[str]:
    """That Pillow reads by itself, without starting another program."""
    Image.init()  # fills Image.OPEN
    return [kind for kind in Image.OPEN if kind not in NEED_MORE]


def extensions() -> set[str]:
    """Of such files."""
    return {extension for extension, kind in Image.registered_extensions().items() if kind in formats()}


def is_image(path: Path) -> bool:
    """Whatever its name: does Pillow open it?"""
    try:
        with Image.open(path, formats=formats()):
            return True
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def class_folders(folder: Path) -> list[Path]:
    """The folders of the classes in it; ValueError for what cannot be one."""
    folders = [path for path in visible(folder) if path.is_dir()]
    if loose := [path.name for path in visible(folder) if path.is_file() and is_image(path)]:
        raise ValueError(f"{loose[0]} lies in {folder} itself, {len(loose)} such in all: put it into a class folder")
    if len(folders) < 2:
        raise ValueError(
            f"{folder} has {len(folders) or 'no'} class folder{'s' * (not folders)}: at least two are needed"
        )
    if wrong := [path.name for path in folders if UNSAFE.search(path.name)]:
        raise ValueError(f"{wrong[0]!r} in {folder} is no name for a class: files will be named after it; rename it")
    return folders


def layout(folder: Path) -> dict[str, Path]:
    """Which folder holds which split: train, valid and test, or "all", which is to be split."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    inside = visible(folder)
    splits: dict[str, Path] = {}
    for path in inside:
        if path.is_dir() and (kind := SPLITS.get(path.name.lower())):
            if kind in splits:
                raise ValueError(f"{folder} has both {splits[kind].name} and {path.name}: keep one of them")
            splits[kind] = path
    others = [path.name for path in inside if path.is_dir() and path not in splits.values()]
    if splits and others:
        raise ValueError(
            f"{folder} has {next(iter(splits.values())).name}/ and {others[0]}/ side by side: are these"
            " classes, or parts of the data? Leave either class folders or train/, test/ and val/"
        )
    if splits and "train" not in splits:
        raise ValueError(f"{folder} has {', '.join(path.name for path in splits.values())}, but no train/")
    return {part: splits[part] for part in ("train", "valid", "test") if part in splits} or {"all": folder}


def from_folder(folder: Path, image_size: int | None, split_off: Callable[..., Any]) -> Found:
    """A folder with train/, test/ and val/ of class folders, or with class folders alone.

    Every image is decoded once, to image_size or to what suits the images, at most LARGEST. Prints what it found.
    Raises ValueError for a folder that is no such data set, or of which too much cannot be read.
    """
    parts = layout(folder)
    first = next(iter(parts.values())) if "all" in parts else parts["train"]
    classes = [path.name for path in class_folders(first)]
    known = extensions()
    other: list[Path] = []
    files: list[tuple[str, int, Path]] = []
    for part, place in parts.items():
        names = [path.name for path in class_folders(place)]
        if strange := set(names) - set(classes):
            raise ValueError(f"{place} has a class {min(strange)} that {first} has not")
        inner = [{path.name for path in visible(place / name) if path.is_dir()} for name in names]
        if sum(bool({name.lower() for name in each} & SPLITS.keys()) for each in inner) > 1:
            raise ValueError(f"{place}: parts of the data inside the classes? It has to be the other way round")
        if len(same := set.intersection(*inner)) > 1:
            raise ValueError(
                f"each folder in {place} has {' and '.join(sorted(same)[:2])} in it: which are the classes? Put the "
                "images of a class into its folder, without others between"
            )
        for name in names:
            inside = [path for path in sorted((place / name).rglob("*")) if path.is_file()]
            hidden = [any(part.startswith(HIDDEN) for part in path.relative_to(place).parts) for path in inside]
            found = [path for path, not_seen in zip(inside, hidden, strict=True) if not not_seen]
            seen = [path.suffix.lower() in known or is_image(path) for path in found]
            images = [path for path, is_one in zip(found, seen, strict=True) if is_one]
            other += [path for path, is_one in zip(found, seen, strict=True) if not is_one]
            if not images and part != "valid":
                raise ValueError(f"the class folder {place / name} holds no image")
            files += [(part, classes.index(name), path) for path in images]
    if other:
        print(f"note: {len(other)} files that Pillow knows no format of are left out, such as {other[0]}")
    size = image_size or suitable_size([path for _, _, path in files])
    cost = f", {(size / 32) ** 2:.1f} times the work of CIFAR-10's 32" if size > 32 else ""
    print(
        f"Each image becomes {size} by {size} pixels{cost}: its middle square, resized; --image-size N for another size"
    )
    decoded, unreadable = decode_all([path for _, _, path in files], size)
    kept = [(part, label, path, each) for (part, label, path), each in zip(files, decoded, strict=True) if each]
    learned = {label for part, label, *_ in kept if part in ("all", "train")}
    if lost := [name for label, name in enumerate(classes) if label not in learned]:
        raise ValueError(f"no image of the class {lost[0]} can be read: {'; '.join(unreadable.values())}"[:500])
    pairs = twins(kept)
    chosen = used(kept)
    report = describe(folder, classes, size, kept, chosen, unreadable, pairs)
    report, kept = report | {"left_out": [str(path) for path in other]}, chosen
    for line in report["words"]:
        print(line)
    if len(unreadable) > UNREADABLE * len(files):
        first_ones = "; ".join(f"{path} ({why})" for path, why in list(unreadable.items())[:3])
        raise ValueError(f"{len(unreadable)} of {len(files)} images cannot be read: {first_ones}")

    def pair(part: str) -> Pair:
        own = [(label, each.pixels) for kind, label, _, each in kept if kind == part]
        images = np.stack([pixels for _, pixels in own]).transpose(0, 3, 1, 2)
        return images, np.array([label for label, _ in own], dtype=np.int64)

    held = {part: pair(part) for part in dict.fromkeys(part for part, *_ in kept)}
    train, test = held["all" if "all" in held else "train"], held.get("test")
    split = [str(path) for part, _, path, _ in kept if part in ("all", "train")]
    if not test:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        tested = np.zeros(len(train[1]), dtype=bool)
        tested[split_off(train[1], TEST_FRACTION)[1]] = True
        places = {path: place for place, path in enumerate(split)}
        alike = [(places[a], places[b]) for a, b, _ in report["twins"] if a in places and b in places]
        links = coo_array((np.ones(len(alike)), np.array(alike, dtype=np.int32).reshape(-1, 2).T), (len(split),) * 2)
        group = connected_components(links, directed=False)[1]
        first_of = np.unique(group, return_index=True)[1]
        tested = tested[first_of[group]]  # on the same side, or the training would know the test's answers
        for label in range(len(classes)):  # unless a class were all test
            tested[train[1] == label] &= not tested[train[1] == label].all()
        test, train = ((train[0][part], train[1][part]) for part in (tested, ~tested))
        split = [file for file, is_tested in zip(split, tested, strict=True) if not is_tested]
    if not len(test[1]):
        raise ValueError("no class has enough images to test with: 3 that differ are needed, or a folder test/")
    name = folder.resolve().name or "images"
    name += "-images" if name.lower() in ("cifar10", "digits", *NAMES) else ""
    return Found(name, classes, train, held.get("valid"), test, True, report, split)


def suitable_size(paths: list[Path]) -> int:
    """The median of the shorter sides of some images, as 32, 48 or 64 pixels: whatever they have, up to LARGEST."""
    sides = []
    for path in paths[:: max(1, len(paths) // 200)]:
        try:
            with Image.open(path, formats=formats()) as file:
                sides.append(min(file.size))
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
    middle = statistics.median(sides) if sides else LARGEST
    return next((size for size in (32, 48) if middle <= size), LARGEST)


def decode_all(paths: list[Path], size: int) -> tuple[list[Decoded | None], dict[Path, str]]:
    """Decode all, in threads; None for what cannot be read, which the second result names, with the reason."""
    unreadable: dict[Path, str] = {}

    def attempt(path: Path) -> Decoded | None:
        try:
            return decode(path, size)
        except Exception as error:  # whatever a damaged file makes Pillow raise
            unreadable[path] = str(error) or type(error).__name__
            return None

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # of Pillow, about files that it reads nevertheless
        reading = pool.map(attempt, paths)
        return list(tqdm(reading, "Reading images", len(paths), unit="img", leave=False, disable=None)), unreadable


def twins(kept: list[tuple[str, int, Path, Decoded]]) -> list[tuple[int, int, bool]]:
    """Pairs of images (indices, first < second) that are identical (True) or nearly so, by sketch and then by pixels.

    Of several identical ones each is paired with the first. Near-identical ones are looked for where there is something
    to see in an image, until there are MOST_TWINS.
    """
    firsts: dict[bytes, int] = {}
    pairs, near = [], []
    for place, (*_, each) in enumerate(kept):
        if (first := firsts.setdefault(each.digest, place)) != place:
            pairs.append((first, place, True))
    places = [place for place in firsts.values() if 16 < kept[place][3].sketch.sum() < 240]
    bits = np.array([kept[place][3].sketch for place in places], dtype=np.float32).reshape(-1, 256) * 2 - 1
    for start in range(0, len(places), 1000):
        alike = np.triu(bits[start : start + 1000] @ bits[start:].T, 1) >= 256 - 2 * ALIKE
        for row, column in np.argwhere(alike)[:MOST_TWINS].tolist():
            first, second = places[start + row], places[start + column]
            one, other = (kept[place][3].pixels.astype(np.int16) for place in (first, second))
            if np.abs(one - other).mean() < 255 * 0.03:
                near.append((first, second, False))
        if len(near) > MOST_TWINS:
            break
    return sorted(pairs + near)


def used(kept: list[tuple[str, int, Path, Decoded]]) -> list[tuple[str, int, Path, Decoded]]:
    """Those to be split, of identical ones of a class the first, or all, if they are split already."""
    once = {(part, label, each.digest): place for place, (part, label, _, each) in reversed([*enumerate(kept)])}
    return [kept[place] for place in sorted(once.values())] if kept[0][0] == "all" else kept


def describe(
    folder: Path, classes: list[str], size: int, kept: list[tuple[str, int, Path, Decoded]],
    chosen: list[tuple[str, int, Path, Decoded]], unreadable: dict[Path, str], pairs: list[tuple[int, int, bool]],
) -> dict[str, Any]:  # fmt: skip
    """The data report of the images `kept`, of which those `chosen` are used: data_report.json; "words": to print."""
    parts = list(dict.fromkeys(part for part, *_ in kept))
    counts = Counter((part, label) for part, label, *_ in kept)
    table = {part: {name: counts[part, label] for label, name in enumerate(classes)} for part in parts}
    words = [f"Data report of {folder}: {len(kept)} images in {len(classes)} classes"]
    for part in parts:
        listed = ", ".join(f"{name} {count}" for name, count in table[part].items())
        words.append(f"  {part}: {sum(table[part].values())} images ({listed})")
    sides = sorted(min(each.size) for *_, each in kept) or [0]
    words.append(f"  shorter sides from {sides[0]} to {sides[-1]} pixels, half of them up to {sides[len(sides) // 2]}")
    if sides[0] < size / 2:
        words.append(f"  {sum(side < size / 2 for side in sides)} images are less than half as large as {size} pixels")
    counts = Counter((part, label) for part, label, *_ in chosen)
    learned = {name: counts[parts[0], label] for label, name in enumerate(classes)}
    few = {name: count for name, count in learned.items() if count < FEW}
    if few:
        listed = ", ".join(f"{name} ({count})" for name, count in few.items())
        words.append(
            f"  fewer than {FEW} images: {listed}. Of 1 or 2, all are trained on; of 3, one is for testing where"
        )
        words.append("    there is no test/, and none for validation where there is no val/")
    if max(learned.values()) > 5 * max(1, min(learned.values())):
        words.append(
            "  the classes differ much in size: look at each class's accuracy, and try --class-balance weights"
        )
    if unreadable:
        listed = "; ".join(f"{path} ({why})" for path, why in list(unreadable.items())[:5])
        words.append(f"  {len(unreadable)} files cannot be read and are left out: {listed}")
    across = Counter((kept[a][0], kept[b][0]) for a, b, _ in pairs if kept[a][0] != kept[b][0])
    if pairs:
        same = sum(identical for *_, identical in pairs)
        once = "; identical ones of a class are used once" if "all" in table else ""
        words.append(f"  {same} pairs of identical and {len(pairs) - same} of near-identical images{once}")
    for (one, other), count in across.items():
        a, b = next((a, b) for a, b, _ in pairs if (kept[a][0], kept[b][0]) == (one, other))
        names = f"{one} and {other}, such as {kept[a][2]} and {kept[b][2]}"
        better = f"the {'test' if 'test' in (one, other) else 'validation'} accuracy will look better than it is"
        words.append(f"  WARNING: {count} pairs lie across {names}: {better}")
    if crossed := [(a, b) for a, b, _ in pairs if kept[a][1] != kept[b][1]]:
        a, b = crossed[0]
        words.append(f"  {len(crossed)} of these pairs have different classes, such as {kept[a][2]} and {kept[b][2]}")
    return {
        "folder": str(folder), "image_size": size, "images_per_class": table, "words": words,
        "sizes": Counter("x".join(map(str, each.size)) for *_, each in kept).most_common(20),
        "unreadable": {str(path): why for path, why in unreadable.items()}, "classes_with_few_images": few,
        "twins": [[str(kept[a][2]), str(kept[b][2]), "identical" if same else "near-identical"]
                  for a, b, same in pairs],
    }  # fmt: skip
