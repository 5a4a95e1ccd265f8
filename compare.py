"""Compare finished runs, and test whether the difference between two of them is significant.

    python compare.py runs/CIFAR10/*                          a table of all finished runs
    python compare.py runs/CIFAR10/* --sort accuracy --format markdown
    python compare.py runs/CIFAR10/a runs/CIFAR10/b           and which of the two is better

Two runs are compared image by image, over the test images that both have: is one network better
than the other? Two runs with --repeat are compared by their seeds: is one way to train better than
the other? The table then gives the means of accuracy and seconds.

From Python: `runs, _ = read_runs(["runs/CIFAR10/a", "runs/CIFAR10/b"])`, then `table(runs)` and
`verdict(*runs)`.
"""

import argparse
import csv
import json
import math
import os
import re
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

if __name__ == "__main__":  # PYTHONSAFEPATH and python -P leave out the folder of this file
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

try:
    from classifier.cli import end_process, prepare_data_output, run_tool
    from classifier.config import Config
    from classifier.errors import UserError
    from classifier.legacy import REMOVED_OPTIONS, translate_settings
    from classifier.markup import escape_markdown
    from classifier.text import escape_control_characters
    from inference import expand
except (ImportError, OSError) as error:  # OSError: a library that cannot be loaded
    if __name__ != "__main__":
        raise
    sys.exit(
        f"error: {error}: pip install -r requirements.txt, and keep classifier/ and inference.py "
        "beside this file"
    )
except KeyboardInterrupt:
    sys.exit(130)

# Settings that do not change the network; `repeat` has a separate column.
WITHOUT_EFFECT = {
    "data_dir",
    "mirror",
    "device",
    "run_dir",
    "out",
    "resume",
    "debug",
    "keep_epochs",
    "substitution",
    "repeat",
}
# Names that --dataset takes for data sets that are the same everywhere; classifier/datasets/load.py
# has them too, but needs torch.
FIXED_DATASETS = {
    "auto",
    "cifar10",
    "digits",
    "cifar100",
    "mnist",
    "fashion-mnist",
    "svhn",
    "stl10",
}
# Two runs are compared if they share so many test images, and this share of the smaller test.
MIN_SHARED = 10
MIN_SHARE = 0.5
Z = 1.959964  # 95 % of a normal distribution are within so many standard deviations of its mean
ALPHA = 0.05  # significance level
NO_VERDICT = "Cannot tell which is better"

# ---- Reading runs --------------------------------------------------------------------------------


class Run(NamedTuple):
    """A finished run, of one seed or of several.

    Attributes:
        path: its folder.
        name: a short name that no other run of the comparison has.
        settings: content of config.json, in the names of this version.
        dataset: name of the data set.
        hardware: what it was trained on.
        num_train: number of training images.
        num_test: number of test images.
        seconds: time of training; the mean over seeds.
        seeds: test accuracy in [0, 1] of each seed.
        interval: 95 % interval of the accuracy, in [0, 1]: of one seed over test images (Wilson),
            of several over seeds (Student's t).
        is_fixed: whether the data set is the same everywhere, unlike a folder of images.
        script: digest of the image_classification.py that trained it; empty for old versions.
        test_digest: digest of the test images and their labels; empty for old versions.
    """

    path: Path
    name: str
    settings: dict[str, Any]
    dataset: str
    hardware: str
    num_train: int
    num_test: int
    seconds: float
    seeds: dict[int, float]
    interval: tuple[float, float]
    is_fixed: bool
    script: str
    test_digest: str

    @property
    def accuracy(self) -> float:
        """Test accuracy in [0, 1]; the mean over seeds."""
        return statistics.fmean(self.seeds.values())


def read_runs(names: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """The finished runs in these folders, and the names of all other folders.

    Patterns such as runs/* are expanded, and a folder that is named twice counts once. Raises
    UserError for a folder that does not exist and for a damaged file, OSError for a missing
    config.json.
    """
    found: dict[Path, Path] = {}  # by the full path
    for name in names:
        paths = expand(name)
        if not paths:
            raise UserError(f"{name}: there is no such folder")
        for path in paths:
            found[path.resolve()] = path

    finished, others = [], []
    for path in found.values():
        if (path / "report.json").exists():
            finished.append(path)
        else:
            others.append(str(path))
    short_names = shortest_names(finished)
    runs = [read_run(path, name) for path, name in zip(finished, short_names, strict=True)]
    return runs, others


def read_run(path: Path, name: str) -> Run:
    """The run in a folder, or the run of one seed in a folder seed-<k> of it.

    Raises UserError for a damaged file, OSError for a missing one.
    """
    report = read_json(path / "report.json")
    config_file = path / "config.json"
    seed_folder = None
    if not config_file.exists():
        seed_folder = re.fullmatch(r"seed-(\d+)", path.resolve().name)
    if seed_folder:
        config_file = path.resolve().parent / "config.json"
    settings = current_settings(read_json(config_file))
    try:
        first_seed = int(seed_folder[1] if seed_folder else settings["seed"])
        seed_reports = report.get("repeats") or [report]
        seeds = {}
        for seed, seed_report in enumerate(seed_reports, first_seed):
            seeds[seed] = float(seed_report["test_accuracy"])
        low, high = report[_interval_key(report)]
        return Run(
            path,
            name,
            settings={**settings, "seed": first_seed, "dataset": report["dataset"]},
            dataset=str(report["dataset"]),
            hardware=str(report["hardware"]),
            num_train=int(report["train_images"]),
            num_test=sum(sum(row) for row in report["confusion_matrix"]),
            seconds=statistics.fmean(float(each["seconds"]) for each in seed_reports),
            seeds=seeds,
            interval=(float(low), float(high)),
            is_fixed=settings.get("dataset") in FIXED_DATASETS,
            script=str(report.get("versions", {}).get("script") or ""),
            test_digest=str(report.get("test_digest") or ""),
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        raise damaged(path / "report.json", " or config.json beside it") from None


def _interval_key(report: dict[str, Any]) -> str:
    """The key of the accuracy's interval: over test images, or with --repeat over the seeds.

    In version 0.9 both had the name that is now of the first only.
    """
    mean_interval = "test_accuracy_mean_interval"
    return mean_interval if mean_interval in report else "test_accuracy_interval"


def current_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run in the names of this version.

    Settings that were not there yet get the value that has the same effect. Settings of version 0.9
    that have been removed stay where they had an effect.
    """
    settings = {"fit": Config.fit, "first_layer_lr": Config.first_layer_lr, **settings}
    if settings.get("micro_batch") is None:  # version 0.9
        settings["micro_batch"] = settings.get("batch_size")
    try:
        return translate_settings(settings)
    except UserError:
        removed = {name: settings[name] for name in REMOVED_OPTIONS if name in settings}
        others = {name: settings[name] for name in settings if name not in removed}
        return {**translate_settings(others), **removed}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise damaged(path) from None
    if not isinstance(content, dict):
        raise damaged(path)
    return content


def damaged(path: Path, more: str = "") -> UserError:
    return UserError(f"{path}{more} is damaged: leave this run out")


def shortest_names(paths: Sequence[Path]) -> list[str]:
    """For each of these different paths its last parts, as few as make it unique."""
    all_parts = [path.resolve().parts for path in paths]
    names = []
    for parts in all_parts:
        for count in range(1, len(parts) + 1):
            ending = parts[-count:]
            if sum(other[-count:] == ending for other in all_parts) == 1:
                names.append(Path(*ending).as_posix())
                break
    return names


class Tested(NamedTuple):
    """What a network made of its test images, in their order.

    Attributes:
        labels: the class of each image.
        hits: whether it was predicted.
        digests: of each image, empty where not known; version 0.9 recorded none.
    """

    labels: list[str]
    hits: list[bool]
    digests: list[str]

    @property
    def is_identified(self) -> bool:
        """Whether it is known which images these are."""
        return any(self.digests)

    def positions(self) -> dict[tuple[str, str, int], int]:
        """Where each image stands, by digest, label and how often both came before."""
        counts: Counter[tuple[str, str]] = Counter()
        positions = {}
        for position, (digest, label) in enumerate(zip(self.digests, self.labels, strict=True)):
            if digest:
                positions[digest, label, counts[digest, label]] = position
                counts[digest, label] += 1
        return positions

    def accuracy(self, positions: Sequence[int]) -> float:
        """Share of the images at these positions that were predicted correctly."""
        return statistics.fmean(self.hits[position] for position in positions)


def read_predictions(run: Run) -> list[Tested]:
    """What each seed of a run made of its test images; empty if a test_predictions.csv is missing.

    Raises UserError if one is damaged.
    """
    tested = []
    for seed, accuracy in run.seeds.items():
        folder = run.path if len(run.seeds) == 1 else run.path / f"seed-{seed}"
        path = folder / "test_predictions.csv"
        if not path.exists():
            return []
        tested.append(_read_tested(path, run.num_test, accuracy))
    identified = [each.digests for each in tested if each.is_identified]
    if any(digests != identified[0] for digests in identified):
        raise damaged(run.path, ", whose seeds were tested on different images,")
    return tested


def _read_tested(path: Path, num_test: int, accuracy: float) -> Tested:
    """Read a test_predictions.csv. num_test, accuracy: as report.json has them."""
    tested = Tested([], [], [])
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                tested.labels.append(row["label"])
                tested.hits.append(row["label"] == row["prediction"])
                tested.digests.append(row.get("digest") or "")
    except (LookupError, ValueError, csv.Error):
        raise damaged(path) from None
    num_hits = sum(tested.hits)
    if len(tested.hits) != num_test or abs(num_hits - accuracy * num_test) > 0.01:
        raise damaged(path, ", which does not fit report.json,")
    return tested


# ---- Statistics ----------------------------------------------------------------------------------


class Difference(NamedTuple):
    """How much higher the accuracy of b is than that of a.

    Attributes:
        value: the difference, in [-1, 1].
        low, high: its 95 % interval.
        p: p value of the test that there is no difference.
    """

    value: float
    low: float
    high: float
    p: float


def paired_difference(only_a: int, only_b: int, num_test: int) -> Difference:
    """Compare two networks that were tested on the same images.

    p is that of the exact McNemar test. The interval is the adjusted Wald interval of Agresti and
    Min ("Simple improved confidence intervals for comparing matched proportions", 2005), which adds
    half an image to each of the four cells.

    only_a, only_b: how many images only a, and only b, classifies correctly.
    """
    from scipy.stats import binomtest

    p = 1.0
    if only_a + only_b > 0:
        p = float(binomtest(only_b, only_a + only_b).pvalue)

    count = num_test + 2
    center = (only_b - only_a) / count
    variance = (only_a + only_b + 1) / count - center**2
    half_width = Z * math.sqrt(variance) / math.sqrt(count)
    low = max(-1.0, center - half_width)
    high = min(1.0, center + half_width)
    return Difference((only_b - only_a) / num_test, low, high, p)


def seed_difference(seeds_a: dict[int, float], seeds_b: dict[int, float]) -> Difference:
    """Compare two ways to train by the accuracy, in [0, 1], of two or more seeds each.

    By Student's t test for pairs if both have the same seeds, otherwise by Welch's (1947). Interval
    and p are NaN if the accuracies do not vary, so that chance cannot be estimated.
    """
    from scipy.stats import ttest_ind, ttest_rel

    a = [seeds_a[seed] for seed in sorted(seeds_a)]
    b = [seeds_b[seed] for seed in sorted(seeds_b)]
    value = statistics.fmean(b) - statistics.fmean(a)
    is_paired = seeds_a.keys() == seeds_b.keys()
    if is_paired:
        gains = [after - before for before, after in zip(a, b, strict=True)]
        spread = statistics.stdev(gains)
    else:
        spread = max(statistics.stdev(a), statistics.stdev(b))
    if spread < 1e-9:
        return Difference(value, math.nan, math.nan, math.nan)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it does no harm if one of the two hardly varies
        result = ttest_rel(b, a) if is_paired else ttest_ind(b, a, equal_var=False)
        low, high = result.confidence_interval(0.95)
    return Difference(value, float(low), float(high), float(result.pvalue))


# ---- Which of two runs is better -----------------------------------------------------------------


def verdict(a: Run, b: Run) -> list[str]:
    """Lines that say whether one of two runs, of one seed or of several, is better.

    Raises UserError for a damaged test_predictions.csv.
    """
    fewer, more = sorted((a, b), key=lambda run: len(run.seeds))
    if len(fewer.seeds) == 1 < len(more.seeds):
        count = len(more.seeds)
        return [
            f"{NO_VERDICT}: {more.name} is of {count} seeds, {fewer.name} of one: "
            f"train {fewer.name} with --repeat {count} too"
        ]
    tested_a, tested_b = read_predictions(a), read_predictions(b)
    is_identified = are_identified(tested_a) and are_identified(tested_b)
    if is_identified:
        positions = shared_images(tested_a[0], tested_b[0])
        problem = problem_of_shared(a, b, len(positions[0]))
    else:
        positions = [*range(a.num_test)], [*range(b.num_test)]
        problem = problem_of_unidentified(a, b, tested_a, tested_b)
    if problem:
        return [f"{NO_VERDICT}: {problem}"]

    num_shared = len(positions[0])
    images = f"{num_shared:,} test images"
    all_are_shared = num_shared == a.num_test == b.num_test
    if not all_are_shared:
        images += f" that both have, of {a.num_test:,} and {b.num_test:,}"
    if len(fewer.seeds) == 1:
        return compare_predictions(a, b, tested_a[0], tested_b[0], positions, images)
    if is_identified:
        a = on_images(a, tested_a, positions[0])
        b = on_images(b, tested_b, positions[1])
    return [compare_seeds(a, b, "" if all_are_shared else f", on {images}")]


def are_identified(tested: list[Tested]) -> bool:
    """Whether each seed of a run has recorded which images it was tested on."""
    return len(tested) > 0 and all(each.is_identified for each in tested)


def shared_images(a: Tested, b: Tested) -> tuple[list[int], list[int]]:
    """Positions in a and in b of the images that both have with the same label.

    Where several are identical, each is paired once.
    """
    positions_a, positions_b = a.positions(), b.positions()
    shared = [key for key in positions_a if key in positions_b]
    return [positions_a[key] for key in shared], [positions_b[key] for key in shared]


def problem_of_shared(a: Run, b: Run, num_shared: int) -> str:
    """Why two runs cannot be compared that share so many test images; empty if they can."""
    if num_shared >= max(MIN_SHARED, MIN_SHARE * min(a.num_test, b.num_test)):
        return ""
    return (
        f"of the {a.num_test:,} test images of {a.name} and the {b.num_test:,} of {b.name} only "
        f"{num_shared:,} are the same, with the same label: train both on the same images"
    )


def problem_of_unidentified(a: Run, b: Run, tested_a: list[Tested], tested_b: list[Tested]) -> str:
    """Why two runs cannot be compared of which one did not record its test images.

    Empty if they can: those of a data set that is the same everywhere are known nevertheless.
    """
    runs = ((a, tested_a), (b, tested_b))
    for run, tested in runs:
        if not tested and len(run.seeds) == 1:
            return f"{run.name} has no test_predictions.csv: train it again"
    if not (a.is_fixed and b.is_fixed):
        for run, tested in runs:
            if not are_identified(tested):
                return f"{run.name} has no record of which images it was tested on: train it again"
    if (a.dataset, a.num_test) != (b.dataset, b.num_test):
        return "they were tested on different images"
    if tested_a and tested_b and tested_a[0].labels != tested_b[0].labels:
        return "they were tested on different images, by the labels in test_predictions.csv"
    return ""


def on_images(run: Run, tested: list[Tested], positions: Sequence[int]) -> Run:
    """The run, with the accuracy of each seed on the test images at these positions only."""
    seeds = {}
    for seed, of_seed in zip(run.seeds, tested, strict=True):
        seeds[seed] = of_seed.accuracy(positions)
    return run._replace(seeds=seeds)


def compare_seeds(a: Run, b: Run, images: str) -> str:
    """Whether one of two ways to train is better, in one line.

    images: which test images the accuracies are of, in words; empty if of all.
    """
    difference = seed_difference(a.seeds, b.seeds)
    if math.isnan(difference.p):
        return (
            f"{NO_VERDICT}: {b.name} minus {a.name} is {points(difference.value)} points with "
            "every seed, which says nothing about chance: take more seeds, --repeat"
        )
    if a.seeds.keys() == b.seeds.keys():
        test = f"paired over {len(a.seeds)} seeds"
    else:
        test = f"Welch's test over {len(a.seeds)} and {len(b.seeds)} seeds, not the same ones"
    return describe_difference(a.name, b.name, difference, test + images)


def compare_predictions(
    a: Run,
    b: Run,
    tested_a: Tested,
    tested_b: Tested,
    positions: tuple[list[int], list[int]],
    images: str,
) -> list[str]:
    """Whether one of two networks is better, in two lines.

    positions: of the images to compare, in tested_a and in tested_b. images: in words, how many.
    """
    pairs = []
    for position_a, position_b in zip(*positions, strict=True):
        pairs.append((tested_a.hits[position_a], tested_b.hits[position_b]))
    only_a = pairs.count((True, False))
    only_b = pairs.count((False, True))
    test = f"paired over {images}: {only_a} only {a.name} recognises, {only_b} only {b.name}"
    difference = paired_difference(only_a, only_b, len(pairs))
    return [
        describe_difference(a.name, b.name, difference, test),
        "This is about these two networks; other seeds would give others. To find out whether one "
        "way to train is better, train both with --repeat 5",
    ]


def describe_difference(a: str, b: str, difference: Difference, test: str) -> str:
    """The difference in words, seen from the run that is ahead."""
    value, low, high, p = difference
    if value < 0:
        a, b = b, a
        value = -value
        low, high = -high, -low
    chance = "p < 0.001" if p < 0.001 else f"p = {p:.3g}"
    interval = f"95 % interval {points(low)} to {points(high)}"
    figures = f"{points(value)} points ({interval}, {chance}; {test})"

    is_significant = p < ALPHA
    if is_significant and low > 0:
        return f"{b} is better than {a} by {figures}"
    conclusion = "No difference that these runs can show"
    if is_significant or low > 0:  # test and interval disagree
        conclusion = "Too close to call"
    if value == 0:
        return f"{conclusion}: {figures}"
    return f"{conclusion}: {b} is ahead of {a} by {figures}"


def points(share: float) -> str:
    """A share as percentage points with two digits."""
    return f"{round(100 * share, 2) + 0.0:.2f}"  # + 0.0: not -0.00


# ---- The table -----------------------------------------------------------------------------------


def table(runs: Sequence[Run]) -> list[list[str]]:
    """A header and a row for each run.

    The columns: name, settings that differ, training images, accuracy in % with its interval,
    seconds, hardware. If a run has several seeds: also how many, and the standard deviation of the
    accuracy over them, in percentage points.
    """
    names = differing_settings(runs)
    has_repeats = any(len(run.seeds) > 1 for run in runs)
    header = ["run", *names, "training images", "accuracy %", "95 % low", "95 % high"]
    if has_repeats:
        header += ["seeds", "std"]
    header += ["seconds", "hardware"]

    rows = [header]
    for run in runs:
        row = [run.name]
        for name in names:
            value = run.settings.get(name)
            row.append("" if value is None else str(value))
        row.append(str(run.num_train))
        row += [points(share) for share in (run.accuracy, *run.interval)]
        if has_repeats:
            accuracies = list(run.seeds.values())
            std = points(statistics.stdev(accuracies)) if len(accuracies) > 1 else ""
            row += [str(len(accuracies)), std]
        row += [f"{run.seconds:.1f}", run.hardware]
        rows.append(row)
    return rows


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings in which runs differ.

    A setting that a run does not know counts as switched off there.
    """
    names: dict[str, None] = {}  # a set that keeps their order
    for run in runs:
        names.update(dict.fromkeys(run.settings))
    differing = []
    for name in names:
        values = [run.settings[name] for run in runs if name in run.settings]
        has_several_values = len({repr(value) for value in values}) > 1
        is_new = len(values) < len(runs) and any(values)
        if name not in WITHOUT_EFFECT and (has_several_values or is_new):
            differing.append(name)
    return differing


def notes(runs: Sequence[Run]) -> list[str]:
    """What to know before comparing the accuracies in a table of these runs."""
    lines = []
    if have_different_tests(runs):
        test_sets = dict.fromkeys(f"{run.dataset}: {run.num_test:,}" for run in runs)
        listed = ", ".join(test_sets)
        lines.append(f"accuracies on different test images cannot be compared ({listed})")
    if len({len(run.seeds) > 1 for run in runs}) > 1:
        lines.append("an interval is over the seeds if a run has several, else over test images")
    if len({run.script for run in runs if run.script}) > 1:
        lines.append("image_classification.py was changed between these runs")
    return lines


def have_different_tests(runs: Sequence[Run]) -> bool:
    """Whether not all of these runs were tested on the same images, as far as that is known."""
    digests = {run.test_digest for run in runs}
    if "" not in digests:
        return len(digests) > 1
    named = {(run.dataset, run.num_test) for run in runs}
    return len(named) > 1 or len(digests - {""}) > 1


def print_table(rows: list[list[str]], format: str) -> None:
    """Print a table as text, CSV or Markdown."""
    if format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    elif format == "markdown":
        rule = ["---"] * len(rows[0])
        safe_rows = [
            [escape_markdown(escape_control_characters(cell)) for cell in row] for row in rows
        ]
        for row in [safe_rows[0], rule, *safe_rows[1:]]:
            print("|", " | ".join(row), "|")
    else:
        print_aligned([[escape_control_characters(cell) for cell in row] for row in rows])


def print_lines(lines: Sequence[str], file: TextIO | None = None) -> None:
    """Print lines with names from the files of runs, which may be a stranger's."""
    for line in lines:
        print(escape_control_characters(line), file=file)


def print_aligned(rows: list[list[str]]) -> None:
    """Print a table in columns, with numbers on the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    is_number = [all(re.fullmatch(r"[-+.e\d]*", cell) for cell in column[1:]) for column in columns]
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            cells.append(cell.rjust(widths[i]) if is_number[i] else cell.ljust(widths[i]))
        print("  ".join(cells).rstrip())


# ---- From the command line -----------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument(
        "--format", default="text", choices=["text", "csv", "markdown"], help="(default: text)"
    )
    parser.add_argument(
        "--sort", default="given", choices=["given", "accuracy"], help="(default: given)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def main() -> int:
    """Run as from the command line; returns the exit status."""
    options = parse_options()
    runs, others = read_runs(options.runs)
    nothing_to_compare = bool(others) and len(runs) == 1
    if others:
        consequence = "; only one run is left, which is nothing to compare"
        note = f"note: without report.json, so unfinished or no run: {', '.join(others)}"
        print_lines([f"{note}{consequence if nothing_to_compare else ''}"], sys.stderr)
    if not runs:
        raise UserError(
            "no finished run among these: name folders that hold a report.json, like runs/CIFAR10/*"
        )
    print_lines([f"note: {note}" for note in notes(runs)], sys.stderr)

    in_order = runs
    if options.sort == "accuracy":
        in_order = sorted(runs, key=lambda run: -run.accuracy)
    if options.format != "text":
        prepare_data_output()
    print_table(table(in_order), options.format)
    if len(runs) == 2:
        lines = verdict(*runs)
        if options.format == "text":
            print_lines(["", *lines])
        else:
            print_lines(lines, sys.stderr)  # a pipe or file gets only the table
    return 1 if nothing_to_compare else 0


if __name__ == "__main__":
    end_process(run_tool(main))
