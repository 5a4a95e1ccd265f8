"""How much faster do two processes train than one, and how much of their time goes into talking to each other?

    python benchmarks/scaling.py --runs 3

Each trains the default network on whole images for two epochs, alternating, with as many threads in all as there are
cores; the second epoch counts. The share of communication is by how much faster the same processes are when each keeps
its gradients to itself. Prints a Markdown table; writes results/scaling.json with every run.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

from time_to_accuracy import SCRIPT, run, spread
from tqdm import tqdm

EPOCHS = "default --epochs 2 --low-res 0 --val-fraction 0"
SILENT = [  # what makes the processes talk in a step, on GPUs by batch norm too, and what takes its place
    ('alternative("torchrun", "torchrun").parallelise(self)', "pass"),
    ("agree(result, asked, look) if self.world > 1", "agree(result, asked, look) if False"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2, help="runs of each, with seeds 0, 1, … (default: 2)")
    parser.add_argument("--data-dir", default=os.environ.get("CIFAR10_DIR", "data"), help="as the program's")
    parser.add_argument("--subset", type=int, default=0, help="train on N images only; 0: all (default)")
    options = parser.parse_args()

    silent = SCRIPT.read_text(encoding="utf-8")
    for old, new in SILENT:
        if old not in silent:
            raise SystemExit(f"error: the script no longer has {old!r}")
        silent = silent.replace(old, new)
    variants = {"1": ("", 1), "2": ("", 2), "2, silent": (silent, 2)}
    data_dir, variant = str(Path(options.data_dir).resolve()), f"{EPOCHS} --subset {options.subset}"
    rates: dict[str, list[float]] = {name: [] for name in variants}
    results = []
    for seed in tqdm(range(options.runs), unit="round", disable=None):
        for name, (text, processes) in variants.items():
            result = run(variant, seed, data_dir, text, processes)
            first, second = (epoch["seconds"] for epoch in result["epochs"])
            rates[name].append(result["train_images"] / (second - first))
            results.append(result | {"processes": name})
    path = Path(__file__).resolve().parent / "results" / "scaling.json"
    path.write_text(json.dumps(results, indent=1))
    print("| processes | images/s | against one |\n| --- | --- | --- |")
    for name, found in rates.items():
        print(f"| {name} | {spread(found, 1, 0)} | {statistics.mean(found) / statistics.mean(rates['1']):.2f} |")
    share = 1 - statistics.mean(rates["2"]) / statistics.mean(rates["2, silent"])
    print(f"\n{100 * share:.1f} % of the time of two processes is communication")


if __name__ == "__main__":
    main()
