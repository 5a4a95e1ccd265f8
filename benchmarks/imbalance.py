"""What --class-balance gives where classes differ in size: CIFAR-10 with ever fewer images of later classes.

    python benchmarks/imbalance.py --share 0.05 --runs 2

Trains with each way to balance, several seeds, alternating, each on as many images in all: so many epochs as that
takes. No validation images; the test images are CIFAR-10's own, as many of each class.
Prints a Markdown table of every class's recall and of the macro-F1; writes results/imbalance.json with every run.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import time_to_accuracy
from time_to_accuracy import spread
from tqdm import tqdm

IMAGES = 200_000  # that each run trains on, one after the other
WAYS = ["none", "weights", "oversample", "undersample"]


def run(way: str, seed: int, share: float, data_dir: str) -> dict:
    """Train and test once: accuracy, and recall and F1 of each class."""
    sizes = [5000 * share ** (label / 9) for label in range(10)]
    an_epoch = {"oversample": 10 * max(sizes), "undersample": 10 * min(sizes)}.get(way, sum(sizes))
    epochs = max(1, round(IMAGES / an_epoch))
    options = f"--make-imbalanced {share} --class-balance {way} --val-fraction 0 --epochs {epochs}"
    return {"class_balance": way, **time_to_accuracy.run(f"default {options}", seed, data_dir)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.05, help="that the last class keeps of its training images")
    parser.add_argument("--runs", type=int, default=2, help="runs of each way, with seeds 0, 1, … (default: 2)")
    parser.add_argument("--data-dir", default=os.environ.get("CIFAR10_DIR", "data"), help="as the program's")
    options = parser.parse_args()

    path = Path(__file__).resolve().parent / "results" / "imbalance.json"
    order = [(way, seed) for seed in range(options.runs) for way in WAYS]
    results: list[dict] = []
    for way, seed in tqdm(order, unit="run", disable=None):
        results.append(run(way, seed, options.share, str(Path(options.data_dir).resolve())))
        path.write_text(json.dumps(results, indent=1))
    classes = list(results[0]["recall"])
    print("| `--class-balance` | " + " | ".join(classes) + " | accuracy, % | macro-F1, % | training, s | runs |")
    print("| --- " * (len(classes) + 5) + "|")
    for way in WAYS:
        own = [result for result in results if result["class_balance"] == way]
        recall = [f"{100 * statistics.mean(result['recall'][name] for result in own):.0f}" for name in classes]
        macro = [statistics.mean(result["f1"].values()) for result in own]
        cells = [spread([result["test_accuracy"] for result in own], 100), spread(macro, 100)]
        cells += [spread([result["epochs"][-1]["seconds"] for result in own], digits=0), str(len(own))]
        print(f"| {way} | " + " | ".join([*recall, *cells]) + " |")


if __name__ == "__main__":
    main()
