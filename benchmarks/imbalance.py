"""What --class-balance gives where classes differ in size: CIFAR-10 with ever fewer images of later classes.

    python benchmarks/imbalance.py --share 0.05 --runs 2

Trains with each way to balance, several seeds, alternating, each on as many images in all: so many epochs as that
takes. No validation images; the test images are CIFAR-10's own, as many of each class.
Prints a Markdown table of every class's recall and of the macro-F1; writes results/imbalance.json with every run.
"""

import statistics

import time_to_accuracy
from time_to_accuracy import arguments, grouped, in_turns, markdown, spread

IMAGES = 200_000  # that each run trains on, one after the other
WAYS = ["none", "weights", "oversample", "undersample"]


def run(way: str, seed: int, data_dir: str, share: float) -> dict:
    """Train and test once: accuracy, and recall and F1 of each class."""
    sizes = [5000 * share ** (label / 9) for label in range(10)]
    an_epoch = {"oversample": 10 * max(sizes), "undersample": 10 * min(sizes)}.get(way, sum(sizes))
    epochs = max(1, round(IMAGES / an_epoch))
    options = f"--make-imbalanced {share} --class-balance {way} --val-fraction 0 --epochs {epochs}"
    return {"class_balance": way, **time_to_accuracy.run(f"default {options}", seed, data_dir)}


def main() -> None:
    parser = arguments(__doc__, runs=2)
    parser.add_argument("--share", type=float, default=0.05, help="that the last class keeps of its training images")
    options = parser.parse_args()
    results = in_turns("imbalance", run, WAYS, options.runs, options.data_dir, options.share)
    classes = list(results[0]["recall"])
    rows = []
    for way, own in grouped(results, "class_balance").items():
        recall = [f"{100 * statistics.mean(result['recall'][name] for result in own):.0f}" for name in classes]
        accuracy = spread([result["test_accuracy"] for result in own], 100)
        macro = spread([statistics.mean(result["f1"].values()) for result in own], 100)
        seconds = spread([result["epochs"][-1]["seconds"] for result in own], digits=0)
        rows.append([way, *recall, accuracy, macro, seconds, len(own)])
    print(markdown(f"`--class-balance` | {' | '.join(classes)} | accuracy, % | macro-F1, % | training, s | runs", rows))


if __name__ == "__main__":
    main()
