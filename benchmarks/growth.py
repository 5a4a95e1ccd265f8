"""Does time grow in a straight line with the images, and memory stay flat over the epochs?

    python benchmarks/growth.py --runs 2

Whole runs of the default recipe, as a user starts them, on 10,000 to 50,000 training images for three epochs, and on
5,000 images for more and more epochs. Prints two Markdown tables; writes results/growth.json with every run.
Start-up is until the first step. The last column is stricter: what the line says of no images at all is taken off too.
"""

import argparse
import json
import math
import os
import statistics
from pathlib import Path

import numpy as np
from time_to_accuracy import run
from tqdm import tqdm

IMAGES = [10_000, 20_000, 30_000, 40_000, 50_000]
EPOCHS = [4, 8, 16, 32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2, help="runs of each, with seeds 0, 1, … (default: 2)")
    parser.add_argument("--data-dir", default=os.environ.get("CIFAR10_DIR", "data"), help="as the program's")
    options = parser.parse_args()

    data_dir = str(Path(options.data_dir).resolve())
    images = {count: f"default --val-fraction 0 --epochs 3 --subset {count}" for count in IMAGES}
    epochs = {count: f"default --val-fraction 0 --subset 5000 --epochs {count}" for count in EPOCHS}
    variants = [*images.values(), *epochs.values()]
    order = [(variant, seed) for seed in range(options.runs) for variant in variants]
    results = [run(variant, seed, data_dir) for variant, seed in tqdm(order, unit="run", disable=None)]
    path = Path(__file__).resolve().parent / "results" / "growth.json"
    path.write_text(json.dumps(results, indent=1))

    def mean(variant: str, key: str) -> float:
        return statistics.mean(result[key] or math.nan for result in results if result["variant"] == variant)

    whole = [mean(images[count], "whole_run") for count in IMAGES]
    start_up = [mean(images[count], "start_up") for count in IMAGES]
    after = [total - start for total, start in zip(whole, start_up, strict=True)]
    slope, rest = np.polyfit(IMAGES, after, 1)
    print(f"The straight line: {rest:.1f} s, the test among them, and {1000 * slope:.2f} s for every 1,000 images\n")
    print("| training images | whole run, s | start-up, s | after it, s | the line, s | off by | without its rest |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for count, *took in zip(IMAGES, whole, start_up, after, strict=True):
        line = rest + slope * count
        seconds = " | ".join(f"{each:.1f}" for each in [*took, line])
        off = [100 * (took[2] / line - 1), 100 * ((took[2] - rest) / (line - rest) - 1)]
        print(f"| {count} | {seconds} | {off[0]:+.1f} % | {off[1]:+.1f} % |")
    print("\n| epochs | peak memory, MiB |\n| --- | --- |")
    for count in EPOCHS:
        print(f"| {count} | {mean(epochs[count], 'peak_mib'):.0f} |")


if __name__ == "__main__":
    main()
