"""Put runs side by side, and say of two whether their difference is real.

    python compare.py runs/CIFAR10/*                                    a table of all that are finished
    python compare.py runs/CIFAR10/* --sort accuracy --format markdown
    python compare.py runs/CIFAR10/a runs/CIFAR10/b                     and which of the two is better, if one is

Two runs are compared image by image: is one network better than the other? Two runs with --repeat are compared by
their seeds: is one way to train better than the other? Of these, accuracy and seconds in the table are means.

From Python, too: `runs, _ = read_runs(["runs/CIFAR10/a", "runs/CIFAR10/b"])`, then `table(runs)`, `verdict(*runs)`.
"""

import argparse
import csv
import json
import math
import re
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

try:
    from inference import InferenceError, expand, run
except ImportError as problem:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {problem}: install what this program needs with: pip install -r requirements.txt")

# Settings that change nothing about the network; `repeat` has a column of its own.
WITHOUT_EFFECT = {"data_dir", "mirror", "device", "run_dir", "out", "resume", "debug", "keep_epochs", "substitution",
                  "repeat"}  # fmt: skip
Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


class Run(NamedTuple):
    """A finished run, of one seed or of several, as its files tell of it."""

    path: Path
    name: str
    settings: dict[str, Any]
    dataset: str
    hardware: str
    trained: int  # training images
    tested: int  # test images
    seconds: float  # of training, the mean over seeds
    seeds: dict[int, float]  # the test accuracy of each, [0, 1]
    interval: tuple[float, float]  # 95 %, [0, 1]; of one seed over test images (Wilson), of several over seeds (t)
    script: str = ""  # digest of the image_classification.py that trained it; older ones did not say

    @property
    def accuracy(self) -> float:
        """On the test images, [0, 1]; the mean over seeds."""
        return statistics.fmean(self.seeds.values())


class Difference(NamedTuple):
    """By how much b's accuracy is above a's, [-1, 1], with its 95 % interval and p value."""

    value: float
    low: float
    high: float
    p: float


def read_runs(names: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """The finished runs in these folders, each once, patterns like runs/* expanded, and the names of the others.

    Raises InferenceError for a folder that does not exist and for a damaged file, OSError for a missing config.json.
    """
    found: dict[Path, Path] = {}  # by where they are, so that each counts once
    for name in names:
        if not (several := expand(name)):
            raise InferenceError(f"{name}: there is no such folder")
        found |= {path.resolve(): path for path in several}
    finished = [path for path in found.values() if (path / "report.json").exists()]
    runs = [read_run(path, name) for path, name in zip(finished, shortest_names(finished), strict=True)]
    return runs, [str(path) for path in found.values() if path not in finished]


def read_run(path: Path, name: str) -> Run:
    """The run in a folder, or the one seed in a seed-<k> of it. Raises InferenceError, OSError for a missing file."""
    inner = None if (path / "config.json").exists() else re.fullmatch(r"seed-(\d+)", path.resolve().name)
    report = read_json(path / "report.json")
    settings = read_json((path.resolve().parent if inner else path) / "config.json")
    try:
        seed = int(inner[1] if inner else settings["seed"])
        parts = report.get("repeats") or [report]
        low, high = map(float, report["test_accuracy_interval"])
        return Run(
            path, name, settings | {"seed": seed, "dataset": report["dataset"]},
            dataset=str(report["dataset"]), hardware=str(report["hardware"]), trained=int(report["train_images"]),
            tested=sum(map(sum, report["confusion_matrix"])), interval=(low, high),
            seconds=statistics.fmean(float(part["seconds"]) for part in parts),
            seeds={seed + i: float(part["test_accuracy"]) for i, part in enumerate(parts)},
            script=str(report.get("versions", {}).get("script", "")),
        )  # fmt: skip
    except (LookupError, TypeError, ValueError, AttributeError):
        raise damaged(path / "report.json", " or config.json beside it") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InferenceError for a damaged one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (ValueError, AttributeError):
        raise damaged(path) from None


def damaged(path: Path, more: str = "") -> InferenceError:
    return InferenceError(f"{path}{more} is damaged: leave this run out")


def shortest_names(paths: Sequence[Path]) -> list[str]:
    """Of each of these different paths the fewest last parts in which no other ends."""
    names, parts = [], [path.resolve().parts for path in paths]
    for own in parts:
        enough = (i for i in range(1, len(own) + 1) if sum(other[-i:] == own[-i:] for other in parts) == 1)
        names.append(Path(*own[-next(enough) :]).as_posix())
    return names


def read_predictions(of: Run) -> tuple[list[str], list[bool]]:
    """Of each test image the class, and whether the run recognised it; InferenceError for a damaged file."""
    path = of.path / "test_predictions.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(row["label"], row["prediction"]) for row in csv.DictReader(file)]
    except (LookupError, ValueError, csv.Error):
        raise damaged(path) from None
    right = [label == prediction for label, prediction in rows]
    if len(right) != of.tested or abs(sum(right) - of.accuracy * of.tested) > 0.01:
        raise damaged(path, ", which does not fit report.json,")
    return [label for label, _ in rows], right


def paired_difference(only_a: int, only_b: int, tested: int) -> Difference:
    """Between two networks, from how many of the images that both were tested on only a, and only b recognises.

    p is that of the exact McNemar test. The interval is the adjusted Wald interval of Agresti and Min ("Simple improved
    confidence intervals for comparing matched proportions", 2005), which adds half an image to each of the four cells.
    """
    from scipy.stats import binomtest

    count = tested + 2
    shift = (only_b - only_a) / count
    half = Z * math.sqrt((only_a + only_b + 1) / count - shift**2) / math.sqrt(count)
    p = float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return Difference((only_b - only_a) / tested, max(-1.0, shift - half), min(1.0, shift + half), p)


def seed_difference(seeds_a: dict[int, float], seeds_b: dict[int, float]) -> Difference:
    """Between two ways to train, from the accuracy [0, 1] with each of two or more seeds.

    Student's t test for pairs where both have the same seeds, else Welch's (1947). Interval and p are NaN where nothing
    varies from seed to seed, which leaves nothing to tell chance by.
    """
    from scipy.stats import ttest_ind, ttest_rel

    a, b = ([each[seed] for seed in sorted(each)] for each in (seeds_a, seeds_b))
    paired, value = seeds_a.keys() == seeds_b.keys(), statistics.fmean(b) - statistics.fmean(a)
    varying = [[y - x for x, y in zip(a, b, strict=True)]] if paired else [a, b]
    if max(map(statistics.stdev, varying)) < 1e-9:
        return Difference(value, math.nan, math.nan, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of two that hardly varies does not hurt
        result = ttest_rel(b, a) if paired else ttest_ind(b, a, equal_var=False)
        low, high = result.confidence_interval(0.95)
    return Difference(value, float(low), float(high), float(result.pvalue))


def verdict(a: Run, b: Run) -> list[str]:
    """Lines that say whether one of two runs, or sets of repeats, is better; InferenceError for a damaged file."""
    unknown = "Which is better cannot be said"
    if (a.dataset, a.tested) != (b.dataset, b.tested):
        return [f"{unknown}: they were tested on different images"]
    one, many = sorted((a, b), key=lambda each: len(each.seeds))
    if len(one.seeds) == 1 < len(many.seeds):
        mend = f"train {one.name} with --repeat {len(many.seeds)} too"
        return [f"{unknown}: {many.name} is of {len(many.seeds)} seeds, {one.name} of one: {mend}"]
    if len(one.seeds) > 1:
        difference = seed_difference(a.seeds, b.seeds)
        if math.isnan(difference.p):
            alike = f"{b.name} minus {a.name} is {points(difference.value)} points with every seed"
            return [f"{unknown}: {alike}, which tells nothing of chance: take more seeds, --repeat"]
        same = a.seeds.keys() == b.seeds.keys()
        other = f"Welch's test over {len(a.seeds)} and {len(b.seeds)} seeds, not the same ones"
        return [sentence(a.name, b.name, difference, f"paired over {len(a.seeds)} seeds" if same else other)]
    for each in (a, b):
        if not (each.path / "test_predictions.csv").exists():
            return [f"{unknown}: {each.name} has no test_predictions.csv, as runs of older versions: train it again"]
    (labels_a, right_a), (labels_b, right_b) = read_predictions(a), read_predictions(b)
    if labels_a != labels_b:
        return [f"{unknown}: they were tested on different images, by the labels in test_predictions.csv"]
    pairs = list(zip(right_a, right_b, strict=True))
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    tested = f"paired over {a.tested:,} test images: {only_a} only {a.name} recognises, {only_b} only {b.name}"
    return [
        sentence(a.name, b.name, paired_difference(only_a, only_b, a.tested), tested),
        "That is about these two networks: with other seeds they would be others. Whether one way to train is better: "
        "train both with --repeat 5",
    ]


def sentence(a: str, b: str, difference: Difference, tested: str) -> str:
    """The difference in words, seen from the one that is ahead."""
    value, low, high, p = difference
    if value < 0:
        a, b, value, low, high = b, a, -value, -high, -low
    chance = "p < 0.001" if p < 0.001 else f"p = {p:.3g}"
    figures = f"{points(value)} points (95 % interval {points(low)} to {points(high)}, {chance}; {tested})"
    if p < 0.05 and low > 0:
        return f"{b} is better than {a} by {figures}"
    begin = "Too close to call" if p < 0.05 or low > 0 else "No difference that these runs can show"
    return f"{begin}: {b} is ahead of {a} by {figures}" if value else f"{begin}: {figures}"


def points(share: float) -> str:
    return f"{round(100 * share, 2) + 0.0:.2f}"  # + 0.0: not -0.00


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings in which runs differ; a version that lacked one did as if it was off."""
    names = []
    for name in dict.fromkeys(name for each in runs for name in each.settings if name not in WITHOUT_EFFECT):
        values = [each.settings[name] for each in runs if name in each.settings]
        if len(set(map(repr, values))) > 1 or (len(values) < len(runs) and any(values)):
            names.append(name)
    return names


def table(runs: Sequence[Run]) -> list[list[str]]:
    """A head and a row a run: name, settings that differ, training images, accuracy in % with its interval, seconds.

    Where there are runs of several seeds: how many, and the standard deviation of accuracy over them, in points.
    """
    names, repeats = differing(runs), any(len(each.seeds) > 1 for each in runs)
    spread = ["seeds", "std"] if repeats else []
    rows = [["run", *names, "training images", "accuracy %", "95 % low", "95 % high", *spread, "seconds", "hardware"]]
    for each in runs:
        values = ("" if (value := each.settings.get(name)) is None else str(value) for name in names)
        accuracy = [points(share) for share in (each.accuracy, *each.interval)]
        if repeats:
            count = len(each.seeds)
            spread = [str(count), points(statistics.stdev(each.seeds.values())) if count > 1 else ""]
        rows.append([each.name, *values, str(each.trained), *accuracy, *spread, f"{each.seconds:.1f}", each.hardware])
    return rows


def notes(runs: Sequence[Run]) -> list[str]:
    """What to know before comparing the accuracies in a table of these runs."""
    lines = []
    if len(tested := dict.fromkeys(f"{each.dataset}: {each.tested:,}" for each in runs)) > 1:
        lines.append(f"accuracies on different test images cannot be compared ({', '.join(tested)})")
    if len({len(each.seeds) > 1 for each in runs}) > 1:
        lines.append("an interval is over the seeds where there are several, else over the test images")
    if len({each.script for each in runs if each.script}) > 1:
        lines.append("image_classification.py was changed between these runs")
    return lines


def write(kind: str, rows: list[list[str]]) -> None:
    """Print a table as text, CSV or Markdown."""
    if kind == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    elif kind == "markdown":
        for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
            print("|", " | ".join(cell.replace("|", r"\|") for cell in row), "|")
    else:
        columns = list(zip(*rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        number = [all(re.fullmatch(r"[-+.e\d]*", cell) for cell in column[1:]) for column in columns]
        for row in rows:
            cells = zip(row, widths, number, strict=True)
            print("  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip())


def main() -> int:
    """Run as from the command line; returns the exit status."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    arguments.add_argument("--format", default="text", choices=["text", "csv", "markdown"], help="(default: text)")
    arguments.add_argument("--sort", default="given", choices=["given", "accuracy"], help="(default: given)")
    options = arguments.parse_args()
    runs, others = read_runs(options.runs)
    if others:
        alone = "; that leaves nothing to compare the other with" if len(runs) == 1 else ""
        print(f"note: without report.json, so unfinished or no run: {', '.join(others)}{alone}", file=sys.stderr)
    if not runs:
        raise InferenceError("no finished run among these: name folders that hold a report.json, like runs/CIFAR10/*")
    for note in notes(runs):
        print(f"note: {note}", file=sys.stderr)
    ranked = sorted(runs, key=lambda each: -each.accuracy) if options.sort == "accuracy" else runs
    write(options.format, table(ranked))
    if len(runs) == 2:
        if options.format == "text":
            print("", *verdict(*runs), sep="\n")
        else:
            print(*verdict(*runs), sep="\n", file=sys.stderr)  # what is piped on is to be the table only
    return int(bool(others) and len(runs) == 1)  # then the question has no answer


if __name__ == "__main__":
    sys.exit(run(main))
