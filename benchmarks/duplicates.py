"""Which copies of an image are found in a folder, how many pairs are none, and how long it takes.

    python benchmarks/duplicates.py --data-dir data

Three parts, each a Markdown table; writes results/duplicates.json. Copies: --originals CIFAR-10
images and altered copies of all, one kind after another, with the pairs that are none. False pairs:
among --cifar CIFAR-10 images as they are. Some are copies indeed; a pair of two classes hardly ever
is one. Time: among generated images, as many as --generated says; memory is what the search adds to
the process, without the images (Linux only).
"""

import argparse
import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import markdown_table
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from classifier.config import Config
from classifier.datasets.cifar10 import find_cifar10, load_cifar10
from classifier.datasets.decode import difference_hash, square
from classifier.datasets.duplicates import search_near_identical
from classifier.datasets.image_records import FILE

SIZE = 32


# ---- Copies --------------------------------------------------------------------------------------


def crop(image: Image.Image, area: float, horizontal: float, vertical: float) -> Image.Image:
    """A part with this share of the area; 0 is left or top, 1 right or bottom."""
    width, height = image.size
    side = area**0.5
    left = horizontal * (1 - side) * width
    top = vertical * (1 - side) * height
    box = (left, top, left + side * width, top + side * height)
    size = (round(side * width), round(side * height))
    return image.resize(size, Image.Resampling.BICUBIC, box)


def smaller(image: Image.Image, factor: float) -> Image.Image:
    width, height = image.size
    return image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 40": lambda image: as_jpeg(image, 40),
    "mirrored": mirror,
    "20 % brighter": lambda image: image.point(lambda value: value * 1.2),
    "20 % darker": lambda image: image.point(lambda value: value * 0.8),
    "half the width": lambda image: smaller(image, 1 / 2),
    "a quarter of the width": lambda image: smaller(image, 1 / 4),
    "90 % of the area, from the middle": lambda image: crop(image, 0.9, 0.5, 0.5),
    "90 % of the area, from a corner": lambda image: crop(image, 0.9, 0, 1),
    "80 % of the area, from the middle": lambda image: crop(image, 0.8, 0.5, 0.5),
    "80 % of the area, from one side": lambda image: crop(image, 0.8, 1, 0.5),
    "80 % of the area, from a corner": lambda image: crop(image, 0.8, 0, 0),
    "mirrored, 90 % of the area, JPEG": lambda image: as_jpeg(crop(mirror(image), 0.9, 0, 0), 80),
}


# ---- Searching -----------------------------------------------------------------------------------


def decode_all(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Images as they are in a cache: their pixels, uint8 (N, 32, 32, 3), and FILE (N,)."""
    pixels = np.stack([square(image, SIZE) for image in images])
    files = np.zeros(len(images), FILE)
    files["row"] = np.arange(len(images))
    files["record"]["dhash"] = np.stack([difference_hash(image) for image in images])
    return pixels, files


def search(pixels: np.ndarray, files: np.ndarray) -> np.ndarray:
    """The pairs that the program finds, int64 (P, 2)."""
    pairs, is_complete = search_near_identical(files, np.arange(len(files)), pixels)
    if not is_complete:
        print("note: not all were compared")
    return pairs


def count_found(
    originals: list[Image.Image], change: Callable[[Image.Image], Image.Image]
) -> dict[str, int]:
    """How many pairs of original and copy are found among all of these, and how many others."""
    count = len(originals)
    pairs = search(*decode_all([*originals, *map(change, originals)]))
    is_copy = pairs[:, 1] == pairs[:, 0] + count
    return {"found": int(is_copy.sum()), "others": int((~is_copy).sum())}


def count_pairs(images: list[Image.Image], labels: np.ndarray) -> dict[str, int]:
    """How many pairs are found among different images, and how many of these in two classes."""
    pairs = search(*decode_all(images))
    in_two_classes = labels[pairs[:, 0]] != labels[pairs[:, 1]]
    return {"images": len(images), "pairs": len(pairs), "two_classes": int(in_two_classes.sum())}


# ---- Time ----------------------------------------------------------------------------------------


def draw_image(number: int) -> Image.Image:
    """A picture with large shapes, unlike all others."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def time_search(count: int) -> None:
    """Search among generated images, and print pairs, CPU seconds and MiB of memory."""
    pixels = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    files = np.zeros(count, FILE)
    for start in range(0, count, 1000):
        chunk = slice(start, min(start + 1000, count))
        drawn = [draw_image(number) for number in range(start, chunk.stop)]
        pixels[chunk], some_files = decode_all(drawn)
        files["record"]["dhash"][chunk] = some_files["record"]["dhash"]
    files["row"] = np.arange(count)
    search(pixels[:100], files[:100])  # what is imported at the first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
    before = harness.read_kilobytes("/proc/self/status", "VmRSS")
    begun = time.process_time()
    pairs = search(pixels, files)
    seconds = time.process_time() - begun
    mebibytes = (harness.read_kilobytes("/proc/self/status", "VmHWM") - before) / 1024
    print(len(pairs), f"{seconds:.1f}", f"{mebibytes:.0f}")


def measure_time(count: int) -> dict[str, Any]:
    """Search in a process of its own: its peak memory is that of this search."""
    command = [sys.executable, __file__, "--time-search", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    pairs, seconds, mebibytes = done.stdout.split()[-3:]
    return {
        "images": count,
        "pairs": int(pairs),
        "seconds": float(seconds),
        "mebibytes": int(mebibytes),
    }


def main() -> None:
    options = parse_options()
    if options.time_search:
        time_search(options.time_search)
        return
    data = load_cifar10(find_cifar10(Path(options.data_dir)), Config(val_fraction=0))
    pixels = torch.cat([data.train.images, data.test.images]).permute(0, 2, 3, 1).numpy()
    labels = torch.cat([data.train.labels, data.test.labels]).numpy()
    images = [Image.fromarray(each) for each in pixels[: options.cifar]]

    originals = images[: options.originals]
    found = {name: count_found(originals, change) for name, change in COPIES.items()}
    rows = []
    for name, counts in found.items():
        rows.append([name, f"{100 * counts['found'] / len(originals):.1f} %", counts["others"]])
    print(markdown_table("copy | found | other pairs", rows), end="\n\n")
    different = count_pairs(images, labels)
    print(markdown_table("images | pairs | in two classes", [list(different.values())]), end="\n\n")
    times = [measure_time(count) for count in options.generated]
    rows_of_times = [list(each.values()) for each in times]
    print(markdown_table("images | pairs | CPU seconds | MiB", rows_of_times))
    results = {"found": found, "originals": options.originals, "cifar": different, "times": times}
    harness.write_results("duplicates", results)


def parse_options() -> argparse.Namespace:
    parser = harness.new_parser(__doc__)
    harness.add_data_dir(parser)
    add = parser.add_argument
    add("--originals", type=int, default=300, metavar="N", help="images to copy (default: 300)")
    add("--cifar", type=int, default=60_000, metavar="N", help="images (default: 60000)")
    add(
        "--generated",
        type=int,
        nargs="*",
        default=[10_000, 100_000],
        metavar="N",
        help="generated images (default: 10000 100000)",
    )
    add("--time-search", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
