"""Does this version train as another one does? The same trainings with both, alternating.

    CIFAR10_DIR=../shared/data python benchmarks/same_as.py ../old
    python benchmarks/same_as.py ../old --only "digits, --ema" folder --rounds 3
    CIFAR10_DIR=../shared/data python benchmarks/same_as.py ../old --start-up 11

OLD_CHECKOUT is a folder with the other version of the repository. Both are copied first, so that
nothing is written to them. Each training is a process in an empty folder. Two versions agree if
every figure in metrics.csv, report.json and test_predictions.csv has the same digits, all but
times, versions and hardware, and what version 0.9 did not write. Prints one row for each training:
whether they agree, medians of the time from the command to its end and of the largest memory, and
their ratios (new / old); below it, which figures differ. --start-up N measures the time from the
command to the end of the first step instead, N times. Exit status 1 if figures differ or a training
fails.
"""

import argparse
import csv
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

NEW_CHECKOUT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
SHOWN_DIFFERENCES = 5  # of each training
NOT_COMPARED = {"seconds", "seconds_total", "commit", "versions", "hardware"}
# not in version 0.9:
NOT_COMPARED |= {"image", "digest", "test_digest", "data_digest", "best_epoch", "image_scale"}
NOT_COMPARED |= {"macro_f1", "top5_accuracy", "unknown_share", "accepted_accuracy", "train_share"}

# Options are in the names of the newest version; these are their names up to version 0.9.
OLD_NAMES = {"--progressive-resizing": "--low-res", "--tta": "--test-views", "linear": "onecycle"}


class Training(NamedTuple):
    """A command to compare.

    options: of the program, as typed; {cifar10} and {photos} stand for folders.
    interrupt_at: the step in which it gets a SIGINT, after which it is resumed; 0: none.
    """

    options: str
    interrupt_at: int = 0


CIFAR10 = "--dataset cifar10 --data-dir {cifar10}"
REFERENCE = f"{CIFAR10} --epochs 1 --subset"
DIGITS = "--dataset digits --epochs 3 --batch-size 50"
TRAININGS = {
    "default, seed 0": Training(f"{CIFAR10} --epochs 2 --seed 0"),
    "default, seed 1": Training(f"{CIFAR10} --epochs 2 --seed 1"),
    "default, seed 2": Training(f"{CIFAR10} --epochs 2 --seed 2"),
    "beginner": Training(f"--recipe beginner {REFERENCE} 1000"),
    "coursework": Training(f"--recipe coursework {REFERENCE} 1000"),
    "resnet-augmented": Training(f"--recipe resnet-augmented {REFERENCE} 300"),
    "resnet-dropout": Training(f"--recipe resnet-dropout {REFERENCE} 300"),
    "notebook": Training(f"--recipe notebook {REFERENCE} 1000"),
    "folder": Training("--dataset {photos} --epochs 3"),
    "folder, --tta 6": Training("--dataset {photos} --epochs 2 --tta 6 --image-size 32"),
    "digits": Training(DIGITS),
    "digits, --ema": Training(f"{DIGITS} --ema"),
    "digits, --grad-clip": Training(f"{DIGITS} --grad-clip 0.5"),
    "digits, weights": Training(f"{DIGITS} --class-balance weights"),
    "digits, oversample": Training(f"{DIGITS} --class-balance oversample"),
    "digits, micro-batches": Training("--dataset digits --epochs 3 --batch-size 400"),
    "digits, --progressive-resizing": Training(f"{DIGITS} --progressive-resizing 0.4"),
    "digits, no time budget": Training(f"{DIGITS} --minutes 0 --scheduler linear"),
    "digits, resumed": Training(DIGITS, interrupt_at=40),
    "digits, --ema, resumed": Training(f"{DIGITS} --ema --optimizer adamw", interrupt_at=40),
    "digits, --repeat 2": Training(f"{DIGITS} --repeat 2"),
}

# Run the program, with a SIGINT in one of its steps.
INTERRUPT = """
import itertools
import signal
import sys
import image_classification as ic

signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes may ignore it
method = "train_step" if hasattr(ic.Trainer, "train_step") else "advance"  # up to version 0.9
train_step = getattr(ic.Trainer, method)
last_step = int(sys.argv[1])
steps = itertools.count(1)

def train_step_then_interrupt(*arguments):
    result = train_step(*arguments)
    if next(steps) == last_step:
        signal.raise_signal(signal.SIGINT)
    return result

setattr(ic.Trainer, method, train_step_then_interrupt)
sys.exit(ic.main(sys.argv[2:]))
"""

# Run the script as a user does, and exit at the end of the first step: when AdamW, the second of
# the default recipe's optimisers, has made its step.
FIRST_STEP = """
import os
import sys
from importlib.machinery import SourceFileLoader
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

def exit_after_last_optimizer(optimizer, arguments, options):
    if isinstance(optimizer, torch.optim.AdamW):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        os._exit(0)

register_optimizer_step_post_hook(exit_after_last_optimizer)
sys.argv = sys.argv[1:]
script = sys.argv[0]
sys.path[0] = os.path.dirname(script)
loader = SourceFileLoader("__main__", script)
__main__ = sys.modules["__main__"]
__main__.__file__ = script
__main__.__loader__ = loader
exec(loader.source_to_code(loader.get_data(script), script), vars(__main__))
"""


class Failed(Exception):
    """A training ended with another exit status than it should; the text is its last output."""


class Process(NamedTuple):
    """What a process took.

    seconds: from its start to its end.
    mebibytes: largest memory of the process; NaN on Windows, which does not tell.
    """

    seconds: float
    mebibytes: float


class Result(NamedTuple):
    """What a training took and found: a figure by file, row and column, each as text."""

    seconds: float
    mebibytes: float
    figures: dict[str, str]


def run_process(command: list[str], folder: Path, checkout: Path, status: int = 0) -> Process:
    """Run a command in `folder`, in which Python finds the program; Failed for another status."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        mebibytes = math.nan
        if hasattr(os, "wait4"):
            _, wait_status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(wait_status)
            units_per_mebibyte = 2**20 if sys.platform == "darwin" else 2**10
            mebibytes = usage.ru_maxrss / units_per_mebibyte
        else:
            process.wait()
        seconds = time.perf_counter() - began
        if process.returncode != status:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise Failed(f"exit status {process.returncode} of {shlex.join(command)}\n{text}")
    return Process(seconds, mebibytes)


class Version:
    """One of the two versions.

    Attributes:
        checkout: the copy of its repository.
        names: its names of options and values, by the newest ones, where they differ.
    """

    def __init__(self, checkout: Path, copy: Path):
        ignored = (".*", "data", "runs", "tests", "results", "__pycache__", "*.pth")
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(*ignored))
        self.checkout = copy
        self.script = str(copy / "image_classification.py")
        help_text = subprocess.check_output([sys.executable, self.script, "--help"], text=True)
        self.names = OLD_NAMES if "--low-res" in help_text else {}
        with tempfile.TemporaryDirectory() as folder:  # compiles its modules
            trial = ["--dataset", "digits", "--fast-dev-run"]
            run_process([sys.executable, self.script, *trial], Path(folder), self.checkout)

    def arguments(self, options: str, folders: dict[str, str]) -> list[str]:
        """The options as this version calls them, with folders in place of {NAME}."""
        words = shlex.split(options)
        return [self.names.get(word, word).format(**folders) for word in words]

    def train(self, training: Training, folders: dict[str, str]) -> Result:
        """Run a training in an empty folder."""
        options = [*self.arguments(training.options, folders), "--run-dir", "run"]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if training.interrupt_at:
                interrupt = [sys.executable, "-c", INTERRUPT, str(training.interrupt_at)]
                resume = [sys.executable, self.script, "--resume", "run"]
                processes = [
                    run_process([*interrupt, *options], folder, self.checkout, status=130),
                    run_process(resume, folder, self.checkout),
                ]
            else:
                command = [sys.executable, self.script, *options]
                processes = [run_process(command, folder, self.checkout)]
            figures = read_figures(folder / "run")
        seconds = sum(process.seconds for process in processes)
        mebibytes = max(process.mebibytes for process in processes)
        return Result(seconds, mebibytes, figures)

    def start_up(self, folders: dict[str, str]) -> float:
        """Seconds from the command to the end of the first step of the default recipe."""
        options = self.arguments(CIFAR10, folders)
        command = [sys.executable, "-c", FIRST_STEP, self.script, *options]
        with tempfile.TemporaryDirectory() as folder:
            return run_process(command, Path(folder), self.checkout).seconds


def read_figures(run: Path) -> dict[str, str]:
    """All figures of a run folder, and of those of its seeds, that have to agree."""
    figures: dict[str, str] = {}
    for path in sorted(run.rglob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        add_figures(figures, str(path.relative_to(run)), rows)
    for path in sorted(run.rglob("report.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        add_figures(figures, str(path.relative_to(run)), in_todays_terms(report))
    return figures


def in_todays_terms(report: dict[str, Any]) -> dict[str, Any]:
    """A report.json as this version would write it; version 0.9 may have written it.

    There what is not known was 0, and with --repeat the mean over the seeds had the names of the
    kept seed's results.
    """
    names = list(report["recall"])
    matrix = report["confusion_matrix"]
    unknown: dict[str, list[str]] = {"precision": [], "recall": [], "f1": [], "class_accuracy": []}
    for i, name in enumerate(names):
        if sum(matrix[i]) == 0:  # not tested
            for each in unknown.values():
                each.append(name)
        elif sum(row[i] for row in matrix) == 0:  # never predicted
            unknown["precision"].append(name)
    translated = dict(report)
    for key, classes in unknown.items():
        translated[key] = {**report[key], **dict.fromkeys(classes)}

    if "repeats" in report:
        repeats = [in_todays_terms(each) for each in report["repeats"]]
        translated["repeats"] = repeats
    if "repeats" in report and "test_accuracy_mean" not in report:
        kept = next(each for each in repeats if each["test_loss"] == report["test_loss"])
        for key in ("test_accuracy", "test_views_accuracy"):
            if key in report:
                translated[f"{key}_mean"] = report[key]
                translated[f"{key}_mean_interval"] = report[f"{key}_interval"]
                translated.pop(f"{key}_interval")
        translated = {**translated, **kept}
    return translated


def add_figures(figures: dict[str, str], name: str, value: Any) -> None:
    """Add what `value` holds, lists and dictionaries entry by entry: "report.json recall cat"."""
    if isinstance(value, dict):
        for key in value.keys() - NOT_COMPARED:
            add_figures(figures, f"{name} {key}", value[key])
    elif isinstance(value, list):
        for number, item in enumerate(value):
            add_figures(figures, f"{name} {number}", item)
    else:
        figures[name] = str(value)


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """A line for each figure that differs or that only one version has."""
    lines = []
    for name in sorted(old | new):
        if old.get(name) != new.get(name):
            lines.append(f"{name}: {old.get(name, 'missing')} became {new.get(name, 'missing')}")
    return lines


def alternate(
    versions: list[Version], rounds: int, run: Callable[[Version], T]
) -> tuple[list[T], list[T]]:
    """What `run` gives for the old and the new version, in turns; the old one begins."""
    old, new = [], []
    for _ in range(rounds):
        old.append(run(versions[0]))
        new.append(run(versions[1]))
    return old, new


def medians(old: list[float], new: list[float], digits: int) -> str:
    """Both medians and their ratio, as three cells of a Markdown table."""
    before = statistics.median(old)
    after = statistics.median(new)
    return f"{before:.{digits}f} | {after:.{digits}f} | {after / before:.3f}"


def compare(name: str, versions: list[Version], rounds: int, folders: dict[str, str]) -> bool:
    """Run a training with both versions and print its row of the table; True if they agree."""
    training = TRAININGS[name]
    try:
        old, new = alternate(versions, rounds, lambda version: version.train(training, folders))
    except Failed as error:
        print(f"| {name} | failed | | | | | | |\n\n{error}\n", flush=True)
        return False

    found = []
    for before, after in zip(old, new, strict=True):
        found += differences(before.figures, after.figures)
    agreement = f"{len(found)} differ" if found else f"all {len(old[0].figures)}"
    seconds = medians([each.seconds for each in old], [each.seconds for each in new], 1)
    memory = medians([each.mebibytes for each in old], [each.mebibytes for each in new], 0)
    print(f"| {name} | {agreement} | {seconds} | {memory} |", flush=True)
    for line in found[:SHOWN_DIFFERENCES]:
        print(f"    {line}", flush=True)
    return not found


def compare_start_up(versions: list[Version], rounds: int, folders: dict[str, str]) -> int:
    """Time both versions to the end of their first step and print the table; the exit status."""
    try:
        old, new = alternate(versions, rounds, lambda version: version.start_up(folders))
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("| runs of each | old, s | new, s | ratio |\n| --- | --- | --- | --- |")
    print(f"| {rounds} | {medians(old, new, 2)} |")
    return 0


def make_photos(folder: Path) -> None:
    """Three classes of images of two sizes, each class of another colour."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for channel, label in enumerate(["red", "green", "blue"]):
        (folder / label).mkdir(parents=True)
        for number in range(60):
            pixels = random.integers(0, 140, (6, 8, 3))
            pixels[:, :, channel] += 60
            size = (64, 48) if number % 2 else (50, 50)
            image = Image.fromarray(pixels.astype(np.uint8)).resize(size)
            image.save(folder / label / f"{number}.png")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old_checkout", type=Path, help="folder of the other version")
    only = f"names of the trainings to run, of: {'; '.join(TRAININGS)} (default: all)"
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=TRAININGS, help=only)
    parser.add_argument("--rounds", type=int, default=1, help="times to run each (default: 1)")
    parser.add_argument("--start-up", type=int, default=0, metavar="N", help="see above")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        cifar10 = Path(os.environ.get("CIFAR10_DIR", NEW_CHECKOUT / "data")).resolve()
        folders = {"cifar10": str(cifar10), "photos": str(temporary / "photos")}
        make_photos(temporary / "photos")
        versions = [
            Version(options.old_checkout.resolve(), temporary / "old"),
            Version(NEW_CHECKOUT, temporary / "new"),
        ]
        if options.start_up:
            return compare_start_up(versions, options.start_up, folders)

        print("| training | figures that agree | old, s | new, s | ratio ", end="")
        print("| old, MiB | new, MiB | ratio |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        all_agree = True
        for name in options.only or TRAININGS:
            agrees = compare(name, versions, options.rounds, folders)
            all_agree = all_agree and agrees
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
