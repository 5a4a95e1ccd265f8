"""Are a million images read from disk as quickly as from memory, and in how much memory?

    python benchmarks/large.py --images 1000000

Draws a folder of PNG files of 32×32 pixels, if it is not there already, and trains one epoch on it:
first while the images are decoded, then from the decoded images, then with all of them in memory,
then with less memory left than they take. A million images take 4 GB, and 3 GB decoded. Memory is
that of the process itself (RssAnon, on Linux only), without the files that the system caches.
Prints a Markdown table; writes results/large.json.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness
import numpy as np
from PIL import Image
from tqdm import tqdm

NUM_CLASSES = 10
IMAGES_PER_PIECE = 1000  # drawn in one piece of work
ALL_ON_DISK = 0  # bytes of images that the program may hold in memory
ALL_IN_MEMORY = 2**62
POLL_SECONDS = 0.05

MAX_BYTES = """
from classifier.datasets import folder

replace(folder, "MAX_BYTES_IN_MEMORY", {max_bytes})
"""


# ---- Images --------------------------------------------------------------------------------------


def make_images(folder: Path, count: int) -> None:
    """Draw a folder of images, under another name until it is complete."""
    unfinished = folder.with_name("images-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for label in range(NUM_CLASSES):
        (unfinished / f"class {label}").mkdir(parents=True)
    pieces = range(count // IMAGES_PER_PIECE)
    folders = [unfinished] * len(pieces)
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(write_piece, folders, pieces)
        for _ in tqdm(drawn, "Drawing", len(pieces), disable=None):
            pass
    unfinished.rename(folder)


def write_piece(folder: Path, number: int) -> None:
    """Draw a piece of the images: blurred noise in a colour of the class."""
    random = np.random.default_rng(number)
    label = number % NUM_CLASSES
    tint = 40 * np.array([label % 3, label // 3 % 3, label // 9])
    for i in range(IMAGES_PER_PIECE):
        pixels = random.integers(0, 150, (8, 8, 3)) + tint
        image = Image.fromarray(pixels.astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        path = folder / f"class {label}" / f"{number * IMAGES_PER_PIECE + i:08d}.png"
        image.save(path, compress_level=1)


# ---- Memory --------------------------------------------------------------------------------------


def occupy_memory(gibibytes_left: float) -> np.ndarray:
    """Take memory until only so much is left; it is free again when the result is deleted."""
    available = 1024 * harness.read_kilobytes("/proc/meminfo", "MemAvailable")
    surplus = available - int(gibibytes_left * 2**30)
    return np.ones(max(0, surplus), np.uint8)


# ---- Training ------------------------------------------------------------------------------------


def train(folder: Path, data_dir: Path, max_bytes: int) -> dict[str, Any]:
    """Train an epoch on these images: seconds until it starts, images/s, peak memory in MiB.

    data_dir: for the decoded images. max_bytes: of images that may be held in memory.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        snippet = MAX_BYTES.format(max_bytes=max_bytes)
        command = [sys.executable, "-c", harness.variant_program(snippet)]
        command += ["--dataset", str(folder), "--data-dir", str(data_dir)]
        command += ["--epochs", "1", "--run-dir", "run"]
        began = time.perf_counter()
        with (scratch / "log").open("w") as log:
            process = harness.start(command, scratch, log)
            until_training, peak_mib = watch(process, scratch / "log")
        whole_run = time.perf_counter() - began
        if process.returncode:
            sys.exit("\n".join((scratch / "log").read_text().splitlines()[-5:]))
        report = json.loads((scratch / "run" / "report.json").read_text())
    return {
        "until_training": until_training,
        "images_per_second": report["train_images"] / report["seconds"],
        "peak_mib": peak_mib,
        "whole_run": whole_run,
        "test_accuracy": report["test_accuracy"],
        "hardware": report["hardware"],
        "commit": report["commit"],
    }


def watch(process: subprocess.Popen[str], log: Path) -> tuple[float, float]:
    """Wait for the end of a training.

    Returns the seconds until it started to train, and its peak memory in MiB.
    """
    began = time.perf_counter()
    until_training = 0.0
    peak_kilobytes = 0
    while process.poll() is None:
        kilobytes = harness.read_kilobytes(f"/proc/{process.pid}/status", "RssAnon")
        peak_kilobytes = max(peak_kilobytes, kilobytes)
        if not until_training and "Start Training" in log.read_text():
            until_training = time.perf_counter() - began
        time.sleep(POLL_SECONDS)
    return until_training, peak_kilobytes / 1024


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, with a row for each way to hold the images."""
    rows = []
    for name, runs in harness.group_by(results, "name").items():
        row = [name]
        for key in ("until_training", "images_per_second", "peak_mib"):
            row.append(f"{statistics.mean(run[key] for run in runs):.0f}")
        rows.append(row)
    return harness.markdown_table("images | until it trains, s | images/s | peak memory, MiB", rows)


def parse_options() -> argparse.Namespace:
    parser = harness.new_parser(__doc__)
    images = "(default: 1000000)"
    parser.add_argument("--images", type=int, default=1_000_000, metavar="N", help=images)
    runs = "of the second and third training, alternating (default: 1)"
    parser.add_argument("--runs", type=int, default=1, metavar="N", help=runs)
    leave = "memory that is left for the last training (default: 2)"
    parser.add_argument("--leave", type=float, default=2.0, metavar="GIB", help=leave)
    folder = "for all files (default: data/large)"
    parser.add_argument("--folder", default="data/large", metavar="DIR", help=folder)
    options = parser.parse_args()
    minimum = NUM_CLASSES * IMAGES_PER_PIECE
    if options.images < minimum:
        parser.error(f"--images {options.images}: at least {minimum}")
    return options


def main() -> None:
    options = parse_options()
    base = Path(options.folder).resolve()
    folder = base / f"images-{options.images}"
    data_dir = base / "decoded"
    shutil.rmtree(data_dir, ignore_errors=True)
    if not folder.exists():
        make_images(folder, options.images)

    results: list[dict[str, Any]] = []

    def measure(name: str, max_bytes: int) -> None:
        result = {"name": name, "images": options.images} | train(folder, data_dir, max_bytes)
        print(json.dumps(result), file=sys.stderr)
        results.append(result)
        harness.write_results("large", results)

    measure("decoded first", ALL_ON_DISK)
    for _ in range(options.runs):
        measure("from the map", ALL_ON_DISK)
        measure("held in memory", ALL_IN_MEMORY)
    occupied = occupy_memory(options.leave)
    measure(f"from the map, {options.leave:g} GiB left for all", ALL_ON_DISK)
    del occupied
    print(table(results))


if __name__ == "__main__":
    main()
