"""How much faster do two processes train than one, and how much of their time is communication?

    python benchmarks/scaling.py --runs 3

Each variant trains the default network on full-size images for two epochs, alternating, with as
many threads in all as there are cores; the second epoch counts. The share of communication follows
from how much faster the same processes are if each keeps its gradients to itself. Prints a Markdown
table; writes results/scaling.json with every run.
"""

import argparse
import functools
import statistics
from typing import Any

import harness
from harness import markdown_table, mean_and_std

TRAINING = "default --epochs 2 --progressive-resizing 0 --drop-easiest 0 --val-fraction 0"

# Without what processes exchange in a step: the sums of gradients, the losses and requests to stop,
# and on GPUs the statistics of batch norm.
SILENT = """
def wrap(self, model, has_unused_params):
    return model

def all_reduce_and_poll(self, stats, stop, poll):
    return stop

replace(ic.Group, "wrap", wrap)
replace(ic.Group, "all_reduce_and_poll", all_reduce_and_poll)
"""

# Name of a variant: number of processes and snippet.
VARIANTS = {"1": (1, ""), "2": (2, ""), "2, silent": (2, SILENT)}


def train(name: str, seed: int, data_dir: str, subset: int) -> dict[str, Any]:
    """Train once."""
    processes, snippet = VARIANTS[name]
    variant = f"{TRAINING} --subset {subset}"
    result = harness.run(variant, seed, data_dir, snippet, processes=processes)
    return result | {"processes": name}


def images_per_second(result: dict[str, Any]) -> float:
    """Speed of the second epoch."""
    first, second = result["epochs"]
    return result["train_images"] / (second["seconds"] - first["seconds"])


def parse_options() -> argparse.Namespace:
    parser = harness.new_parser(__doc__, runs=2)
    subset = "number of training images to use; 0: all (default: 0)"
    parser.add_argument("--subset", type=int, default=0, metavar="N", help=subset)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    run = functools.partial(train, data_dir=options.data_dir, subset=options.subset)
    results = harness.run_in_turns("scaling", VARIANTS, options.runs, run)
    rates = {}
    for name, runs in harness.group_by(results, "processes").items():
        rates[name] = [images_per_second(result) for result in runs]
    means = {name: statistics.mean(values) for name, values in rates.items()}
    rows = []
    for name, values in rates.items():
        ratio = means[name] / means["1"]
        rows.append([name, mean_and_std(values, digits=0), f"{ratio:.2f}"])
    print(markdown_table("processes | images/s | against one", rows))
    communication = 1 - means["2"] / means["2, silent"]
    print(f"\n{100 * communication:.1f} % of the time of two processes is communication")


if __name__ == "__main__":
    main()
