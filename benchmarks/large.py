"""Are a million images read from disk as quickly as from memory, and in how much memory?

    python benchmarks/large.py --images 1000000

Draws a folder of PNG files of 32 by 32 pixels (a million take 4 GB, and 3 GB in the map), if it is not there already,
and trains one epoch on it: first the images are decoded, then they are there, then they are all held in memory, then
the map is larger than the memory that something else leaves free. Memory is the process's own (RssAnon: Linux only),
without the files that the system keeps at hand. Prints a Markdown table; writes results/large.json.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from time_to_accuracy import RESULTS, grouped, markdown, start
from tqdm import tqdm

CLASSES, TOGETHER = 10, 1000  # images that are drawn in one piece of work
HOLD = """
import sys, image_classification as ic
from alternatives import datasets
datasets.HELD = {}
sys.exit(ic.main())"""


def write_images(folder: Path, number: int) -> None:
    """Piece `number` of the images: blurred noise in a colour of the class."""
    random = np.random.default_rng(number)
    label = number % CLASSES
    for i in range(TOGETHER):
        tint = 40 * np.array([label % 3, label // 3 % 3, label // 9])
        small = (random.integers(0, 150, (8, 8, 3)) + tint).astype(np.uint8)
        path = folder / f"class {label}" / f"{number * TOGETHER + i:08d}.png"
        Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(path, compress_level=1)


def train(held: float, folder: Path, data_dir: Path) -> dict:
    """A run of the program on these images: seconds until it trains, images/s, peak memory."""
    with tempfile.TemporaryDirectory() as scratch:
        begun, peak, ready = time.perf_counter(), 0.0, 0.0
        log, run = Path(scratch, "log"), Path(scratch, "run")
        command = [sys.executable, "-c", HOLD.format(held), "--dataset", str(folder)]
        command += ["--data-dir", str(data_dir), "--epochs", "1", "--run-dir", "run"]
        with log.open("w") as output:
            process = start(command, Path(scratch), output)
            while process.poll() is None:
                if found := re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()):
                    peak = max(peak, int(found[1]) / 1024)
                if not ready and "Start Training" in log.read_text():
                    ready = time.perf_counter() - begun
                time.sleep(0.05)
        if process.returncode:
            sys.exit("\n".join(log.read_text().splitlines()[-5:]))
        report = json.loads((run / "report.json").read_text())
        return {
            "until_training": ready, "images_per_second": report["train_images"] / report["seconds"],
            "peak_mib": peak, "whole_run": time.perf_counter() - begun, "test_accuracy": report["test_accuracy"],
            "hardware": report["hardware"], "commit": report["commit"],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, metavar="N", help="(default: 1000000)")
    turns = "of the second and third, in turns (default: 1)"
    parser.add_argument("--runs", type=int, default=1, metavar="N", help=turns)
    parser.add_argument("--leave", type=float, default=2.0, metavar="GIB", help="for the last run (default: 2)")
    parser.add_argument("--folder", default="data/large", metavar="DIR", help="for it all (default: data/large)")
    options = parser.parse_args()
    if options.images < CLASSES * TOGETHER:
        parser.error(f"--images {options.images}: at least {CLASSES * TOGETHER}")
    base = Path(options.folder).resolve()
    folder, data_dir = base / f"images-{options.images}", base / "map-of-large"
    shutil.rmtree(data_dir, ignore_errors=True)
    if not folder.exists():
        shutil.rmtree(new := base / "images-unfinished", ignore_errors=True)
        for label in range(CLASSES):
            (new / f"class {label}").mkdir(parents=True, exist_ok=True)
        pieces = range(options.images // TOGETHER)
        with ProcessPoolExecutor() as pool:
            list(tqdm(pool.map(write_images, [new] * len(pieces), pieces), "Drawing", len(pieces), disable=None))
        new.rename(folder)
    results = []
    scarce = f"from the map, {options.leave:g} GiB left for all"
    in_turns = [("from the map", 0), ("held in memory", 2**62)] * options.runs
    for name, held in [("decoded first", 0), *in_turns, (scarce, 0)]:
        free = int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) * 1024
        taken = np.ones(max(0, free - int(options.leave * 2**30)) if name == scarce else 0, np.uint8)
        results.append({"name": name, "images": options.images} | train(held, folder, data_dir))
        print(json.dumps(results[-1]), file=sys.stderr)
        del taken
    (RESULTS / "large.json").write_text(json.dumps(results, indent=1))
    rows = []
    keys = ("until_training", "images_per_second", "peak_mib")
    for name, own in grouped(results, "name").items():
        rows.append([name, *(f"{np.mean([result[key] for result in own]):.0f}" for key in keys)])
    print(markdown("images | until it trains, s | images/s | peak memory, MiB", rows))


if __name__ == "__main__":
    main()
