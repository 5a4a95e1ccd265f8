"""Where does the time go before the first training step, and after the last one?

    python benchmarks/startup.py
    python benchmarks/startup.py --runs 5 --dataset digits
    python benchmarks/startup.py --device cuda
    python benchmarks/startup.py --old ../an-older-checkout

Trains on 2,000 images for two epochs, in processes of their own, and notes when the functions of
STAGES begin and end. Prints a Markdown table of the medians, and writes results/startup.json. A
stage within another one is indented below it. From the second run on, the files come from the
system's cache. With --old only the lines that a run prints are timed, of this program and that of
another checkout, in turns.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import harness
from tqdm import tqdm

STEP = "image_classification:Trainer.train_step"
STAGES = [  # module:function
    "image_classification:load_data",
    "image_classification:build_model",
    "image_classification:begin_run",
    "image_classification:Trainer.__init__",
    "image_classification:build_optimizers",
    STEP,
    "classifier.run_log:RunLog.open",
    "classifier.plots:draw_samples",
    "classifier.run_log:RunLog._add_graph",
    "image_classification:validate",
    "classifier.runs:Run.save_epoch",
    "classifier.runs:Run.save_last",
    "image_classification:test",
    "image_classification:evaluate",
    "classifier.metrics:fit_temperature",
    "classifier.metrics:classification_metrics",
    "classifier.reports:write_report",
    "classifier.plots:draw_curves",
    "classifier.plots:draw_confusion_matrix",
    "classifier.plots:draw_worst_mistakes",
    "classifier.plots:save_figure",
    "classifier.run_log:RunLog.report",
    "classifier.reports:print_classes",
    "classifier.reports:export_model",
]
HEAD = "stage | seconds | of all runs"
OLD_HEAD = "part of a run | this | old | ratio"
PRINTED = ["Start Training", "Finished Training", "Done in"]  # how lines begin that both print
PARTS = ["until it trains", "after the training", "after its last line", "whole run"]
INDENT = "&emsp;"
SUBSET = 2000  # images to train on

# The program, but it notes when each stage begins and ends, on time.time(), in spans.json.
WATCHED_PROGRAM = """
import functools, json, pkgutil, sys, time

spans = []

def watch(stage):
    module, _, path = stage.partition(":")
    owner_path, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(f"{module}:{owner_path}" if owner_path else module)
    function = getattr(owner, name)

    @functools.wraps(function)
    def watched(*arguments, **options):
        began = time.time()
        try:
            return function(*arguments, **options)
        finally:
            spans.append([stage, began, time.time()])

    setattr(owner, name, watched)

began = time.time()
import torch
torch_imported = time.time()
import image_classification as ic
spans.append(["import torch", began, torch_imported])
spans.append(["import the script", torch_imported, time.time()])
for stage in json.loads(sys.argv[1]):
    watch(stage)
status = ic.main(sys.argv[2:])
with open("spans.json", "w") as file:
    json.dump(spans, file)
ic.cli.end_process(status)
"""


class Span(NamedTuple):
    """One call of a function; times in seconds since the process was started."""

    stage: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def contains(self, other: "Span") -> bool:
        return self.began <= other.began and other.ended <= self.ended and self != other


class Row(NamedTuple):
    """A row of the table; its fields are those of the result file.

    Attributes:
        stage: its name, indented below the one that it is part of.
        seconds: that it takes in each run.
    """

    stage: str
    seconds: list[float]


def training_options(options: argparse.Namespace) -> list[str]:
    """What the program is called with."""
    arguments = ["--dataset", options.dataset, "--device", options.device]
    arguments += ["--data-dir", str(Path(options.data_dir).resolve())]
    return [*arguments, "--subset", str(SUBSET), "--epochs", "2"]


def run_once(options: argparse.Namespace) -> tuple[list[Span], float]:
    """Train in a process of its own; returns its spans, and after how many seconds it ended."""
    arguments = training_options(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-c", WATCHED_PROGRAM, json.dumps(STAGES), *arguments]
        launched = time.time()
        with harness.start(command, folder) as process:
            output, _ = process.communicate()
        ended = time.time() - launched
        if process.returncode:
            sys.exit(f"error: the run failed:\n{output}")
        found = json.loads((folder / "spans.json").read_text(encoding="utf-8"))
    spans = [Span(stage, began - launched, end - launched) for stage, began, end in found]
    return sorted(spans, key=lambda span: span.began), ended


def rows_of_run(spans: list[Span], ended: float) -> list[Row]:
    """The table of one run: what is before its first step, and what is after its last one."""
    steps = [span for span in spans if span.stage == STEP]
    first, last = steps[0].began, steps[-1].ended
    before = [span for span in spans if span.ended <= first]
    after = [span for span in spans if span.began >= last]
    exit_began = max(span.ended for span in after)

    rows = [Row("until the first step", [first])]
    rows += [_row(span, before) for span in before]
    longer = steps[0].seconds - steps[1].seconds
    rows += [Row("the first step, longer than the second by", [longer])]
    rows += [Row("after the last step", [ended - last])]
    rows += [_row(span, after) for span in after]
    return [*rows, Row(f"{INDENT}until the process is gone", [ended - exit_began])]


def _row(span: Span, spans: list[Span]) -> Row:
    depth = 1 + sum(other.contains(span) for other in spans)
    name = span.stage.partition(":")[2] or span.stage
    return Row(INDENT * depth + name, [span.seconds])


def table_row(row: Row) -> list[str]:
    low, high = min(row.seconds), max(row.seconds)
    return [row.stage, f"{statistics.median(row.seconds):.2f}", f"{low:.2f} to {high:.2f}"]


def time_parts(script: Path, options: argparse.Namespace) -> list[float]:
    """Train in a process of its own; returns the seconds of the PARTS of the run."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, str(script), *training_options(options)]
        launched = time.perf_counter()
        printed = {}
        with harness.start(command, Path(name)) as process:
            for line in process.stdout or []:
                for beginning in PRINTED:
                    if line.startswith(beginning):
                        printed[beginning] = time.perf_counter() - launched
        ended = time.perf_counter() - launched
        if process.returncode:
            sys.exit(f"error: {script} failed")
    began, finished, done = (printed[beginning] for beginning in PRINTED)
    return [began, ended - finished, ended - done, ended]


def compare_with(old: Path, options: argparse.Namespace) -> list[list[str]]:
    """Time both programs in turns; returns the rows of the table, medians of the runs."""
    runs: dict[str, list[list[float]]] = {"this": [], "old": []}
    for _ in tqdm(range(options.runs), unit="run", disable=None):
        runs["this"].append(time_parts(harness.SCRIPT, options))
        runs["old"].append(time_parts(old / harness.SCRIPT.name, options))
    harness.write_results(options.name, runs)
    rows = []
    for index, part in enumerate(PARTS):
        this = statistics.median(run[index] for run in runs["this"])
        before = statistics.median(run[index] for run in runs["old"])
        rows.append([part, f"{this:.2f}", f"{before:.2f}", f"{this / before:.2f}"])
    return rows


def parse_options() -> argparse.Namespace:
    parser = harness.new_parser(__doc__)
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="(default: 3)")
    for flag, default in (("--dataset", "cifar10"), ("--device", "auto")):
        help_text = f"as the program's (default: {default})"
        parser.add_argument(flag, default=default, metavar="NAME", help=help_text)
    harness.add_data_dir(parser)
    parser.add_argument("--old", type=Path, metavar="DIR", help="another checkout of this program")
    name = "of the result file (default: startup)"
    parser.add_argument("--name", default="startup", help=name)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.old:
        comparison = compare_with(options.old.resolve(), options)
        print(harness.markdown_table(OLD_HEAD, comparison))
        return
    tables = []
    for _ in tqdm(range(options.runs), unit="run", disable=None):
        tables.append(rows_of_run(*run_once(options)))
    rows = []
    for same_row in zip(*tables, strict=True):  # each run goes through the same stages
        rows.append(Row(same_row[0].stage, [each.seconds[0] for each in same_row]))
    print(harness.markdown_table(HEAD, map(table_row, rows)))
    harness.write_results(options.name, [row._asdict() for row in rows])


if __name__ == "__main__":
    main()
