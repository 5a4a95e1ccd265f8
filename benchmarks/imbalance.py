"""What --class-balance gives if classes differ in size: CIFAR-10 with fewer of the later classes.

    python benchmarks/imbalance.py --share 0.05 --runs 2

Trains with each --class-balance, several seeds, alternating, each on the same number of images in
all: epochs are as many as that takes. There are no validation images; the test images are those of
CIFAR-10, with the same number in each class. Prints a Markdown table of each class's recall and of
the macro-F1; writes results/imbalance.json with every run.
"""

import functools
import statistics
from typing import Any

import harness
from harness import mean_and_std

TOTAL_IMAGES = 200_000  # that each run trains on, one after the other
CLASS_BALANCE = ["none", "weights", "oversample", "undersample"]

# Loads CIFAR-10 as the program does and leaves out most images of the later classes; mean and
# standard deviation are measured anew. build_dataset holds out nothing, as --val-fraction is 0.
LOAD_IMBALANCED = """
from classifier.datasets.dataset import build_dataset
from classifier.sampling import imbalanced_indices

load_data = ic.load_data

def load_imbalanced(config):
    data = load_data(config)
    kept = imbalanced_indices(data.train.labels, share={share})
    return build_dataset(
        config,
        data.train.select(kept),
        name=data.name,
        classes=data.classes,
        load_test=data.load_test,
        num_test_images=data.num_test_images,
        flip_keeps_label=data.flip_keeps_label,
    )

replace(ic, "load_data", load_imbalanced)
"""


def num_epochs(class_balance: str, share: float) -> int:
    """The epochs in which a run sees about TOTAL_IMAGES."""
    class_sizes = [5000 * share ** (label / 9) for label in range(10)]
    epoch_size = sum(class_sizes)
    if class_balance == "oversample":
        epoch_size = 10 * max(class_sizes)
    elif class_balance == "undersample":
        epoch_size = 10 * min(class_sizes)
    return max(1, round(TOTAL_IMAGES / epoch_size))


def train(class_balance: str, seed: int, data_dir: str, share: float) -> dict[str, Any]:
    """Train and test once: accuracy, and recall and F1 of each class."""
    epochs = num_epochs(class_balance, share)
    variant = f"default --class-balance {class_balance} --val-fraction 0 --epochs {epochs}"
    variant += " --drop-easiest 0"  # not possible with all of them
    snippet = LOAD_IMBALANCED.format(share=share)
    result = harness.run(variant, seed, data_dir, snippet)
    return {"class_balance": class_balance, "share": share, **result}


def macro_mean(of_classes: dict[str, float | None]) -> float:
    """Mean over the classes, without those that were not tested."""
    return statistics.mean(value for value in of_classes.values() if value is not None)


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, with a row for each --class-balance."""
    classes = list(results[0]["recall"])
    rows = []
    for class_balance, runs in harness.group_by(results, "class_balance").items():
        row = [class_balance]
        for name in classes:
            row.append(f"{100 * statistics.mean(run['recall'][name] for run in runs):.0f}")
        row.append(mean_and_std([run["test_accuracy"] for run in runs], 100))
        macro_f1 = [macro_mean(run["f1"]) for run in runs]
        row.append(mean_and_std(macro_f1, 100))
        row.append(mean_and_std([run["epochs"][-1]["seconds"] for run in runs], digits=0))
        row.append(str(len(runs)))
        rows.append(row)
    head = ["`--class-balance`", *classes, "accuracy, %", "macro-F1, %", "training, s", "runs"]
    return harness.markdown_table(" | ".join(head), rows)


def main() -> None:
    parser = harness.new_parser(__doc__, runs=2)
    parser.add_argument(
        "--share",
        type=float,
        default=0.05,
        metavar="F",
        help="of its training images that the last class keeps (default: 0.05)",
    )
    options = parser.parse_args()
    run = functools.partial(train, data_dir=options.data_dir, share=options.share)
    print(table(harness.run_in_turns("imbalance", CLASS_BALANCE, options.runs, run)))


if __name__ == "__main__":
    main()
