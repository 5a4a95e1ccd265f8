"""How long until which accuracy: whole runs of the program, as a user starts them.

    python benchmarks/time_to_accuracy.py default --runs 5
    python benchmarks/time_to_accuracy.py default "default --epochs 5" --runs 3 --name shorter

A variant is the name of a recipe and options. Each is run several times, alternating. Prints a
Markdown table; writes NAME.json (the figures of every run) and, if there are validation images,
NAME.png (their accuracy over time) into benchmarks/results/. The time to an accuracy is the time
from the first step to the end of the first epoch with that accuracy on the validation images; it
includes training and validation. "Whole run" is from the start of the process to its end. The test
images are used once, at the end of each run.
"""

import functools
import math
import statistics
from typing import Any

import harness
from harness import group_by, markdown_table, mean_and_std
from matplotlib.figure import Figure

Results = list[dict[str, Any]]


def with_validation(results: Results) -> Results:
    """The runs that had validation images."""
    return [each for each in results if math.isfinite(each["epochs"][-1]["valid_accuracy"])]


def time_to(results: Results, target: float) -> str:
    """When the runs of a variant had reached a validation accuracy; a time only if all of them did.

    target: in [0, 1].
    """
    if not with_validation(results):
        return ""
    seconds = []
    epochs = []
    for result in results:
        for number, epoch in enumerate(result["epochs"], 1):
            if epoch["valid_accuracy"] >= target:
                seconds.append(epoch["seconds"])
                epochs.append(number)
                break
    if not seconds:
        return "no run"
    if len(seconds) < len(results):
        return f"{len(seconds)} of {len(results)} runs"
    return f"{statistics.mean(seconds):.0f} s, {statistics.mean(epochs):.1f} epochs"


def table(results: Results, targets: list[float]) -> str:
    """A Markdown table, with a row for each variant."""
    head = ["variant", *(f"{100 * target:g} % valid" for target in targets)]
    head += ["start-up, s", "whole run, s", "test accuracy, %", "with views, %"]
    head += ["peak, MiB", "runs"]
    rows = []
    for variant, runs in group_by(results, "variant").items():
        row = [f"`{variant}`", *(time_to(runs, target) for target in targets)]
        for key in ("start_up", "whole_run"):
            row.append(mean_and_std([run[key] for run in runs]))
        row.append(mean_and_std([run["test_accuracy"] for run in runs], 100, 2))
        with_views = [run["test_views_accuracy"] for run in runs]
        with_views = [accuracy for accuracy in with_views if accuracy is not None]
        row.append(mean_and_std(with_views, 100, 2) if with_views else "")
        peaks = [run["peak_mib"] for run in runs if run["peak_mib"]]
        row.append(f"{max(peaks):.0f}" if peaks else "?")
        row.append(str(len(runs)))
        rows.append(row)
    return markdown_table(" | ".join(head), rows)


def draw(results: Results) -> Figure:
    """Validation accuracy over time: a line for each run, a colour for each variant."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (variant, runs) in enumerate(group_by(results, "variant").items()):
        for run in with_validation(runs):
            seconds = [epoch["seconds"] for epoch in run["epochs"]]
            accuracies = [100 * epoch["valid_accuracy"] for epoch in run["epochs"]]
            label = variant if run["seed"] == 0 else None
            axes.plot(seconds, accuracies, f"C{number}.-", alpha=0.7, label=label)
    axes.set(xlabel="seconds of training", ylabel="validation accuracy, %")
    axes.set_title(results[0]["hardware"])
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    parser = harness.new_parser(__doc__, runs=3)
    parser.add_argument(
        "variants",
        nargs="*",
        default=["default"],
        metavar="VARIANT",
        help="recipe and options (default: default)",
    )
    parser.add_argument(
        "--targets",
        type=float,
        nargs="+",
        default=[0.6, 0.7, 0.8, 0.85, 0.9],
        metavar="F",
        help="validation accuracies, in [0, 1] (default: 0.6 0.7 0.8 0.85 0.9)",
    )
    parser.add_argument("--name", default="time_to_accuracy", help="of the result files")
    options = parser.parse_args()
    train = functools.partial(harness.run, data_dir=options.data_dir)
    results = harness.run_in_turns(options.name, options.variants, options.runs, train)
    print(table(results, options.targets))
    if with_validation(results):
        draw(results).savefig(harness.RESULTS / f"{options.name}.png", dpi=110)


if __name__ == "__main__":
    main()
