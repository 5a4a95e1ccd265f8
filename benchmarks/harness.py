"""What the benchmarks share: runs of the program in processes of their own, and Markdown tables.

A variant of the program is a snippet of Python that replaces some of its functions before it
starts. Its only way to do so is `replace`, which fails if the program has no such name any more.
"""

import argparse
import csv
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

SCRIPT = Path(__file__).resolve().parent.parent / "image_classification.py"
# gpu_session.py sets this variable for the benchmarks that it starts
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).resolve().parent / "results"))

# A variant of the program: its snippet stands between these two.
BEFORE_SNIPPET = """
import sys
import torch
import torch.nn.functional as F
import image_classification as ic

def replace(owner, name, value):
    getattr(owner, name)  # raises AttributeError if there is nothing to replace
    setattr(owner, name, value)
"""
AFTER_SNIPPET = """
if __name__ == "__main__":
    sys.exit(ic.main(sys.argv[1:]))
"""


# ---- Runs ----------------------------------------------------------------------------------------


def variant_program(snippet: str) -> str:
    """The text of a program that executes a snippet and then trains.

    snippet: Python that knows `ic` (the script), `torch`, `F` and `replace(owner, name, value)`.
    """
    return BEFORE_SNIPPET + snippet + AFTER_SNIPPET


def start(
    command: list[str],
    folder: Path,
    output: Any = subprocess.PIPE,
    environment: dict[str, str] | None = None,
    new_session: bool = False,
) -> subprocess.Popen[str]:
    """Start a process in `folder` that can import the script and its package.

    output: where standard output and standard error go, as one text. environment: variables to add.
    new_session: whether it leads a group of processes, which can be ended together.
    """
    paths = [str(SCRIPT.parent)]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (environment or {})
    return subprocess.Popen(
        command,
        cwd=folder,
        env=variables,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=new_session,
    )


def run(
    variant: str,
    seed: int,
    data_dir: str,
    snippet: str = "",
    environment: dict[str, str] | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Train once, in a process and a folder of its own.

    Args:
        variant: a recipe and options, as typed.
        snippet: changes the program: see `variant_program`.
        environment: environment variables to add.
        processes: number of processes that share the work.

    Returns times in s, memory in MiB, accuracies in [0, 1] and a row for each epoch. Ends this
    program if the run fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = training_command(folder, snippet, processes)
        recipe, *options = shlex.split(variant)
        command += ["--recipe", recipe, "--seed", str(seed), *options]
        command += ["--data-dir", str(Path(data_dir).resolve()), "--run-dir", "run"]
        began = time.perf_counter()
        start_up = 0.0
        lines = []
        with start(command, folder, environment=environment) as process:
            for line in process.stdout or []:
                lines.append(line)
                if line.startswith("Start Training"):
                    start_up = time.perf_counter() - began
            peak_mib = wait(process)
        whole_run = time.perf_counter() - began
        if process.returncode:
            sys.exit(f"error: {shlex.join(command)} failed:\n{''.join(lines)}")
        epochs = read_epochs(folder / "run" / "metrics.csv")
        report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))

    result = {"variant": variant, "seed": seed, "whole_run": whole_run, "start_up": start_up}
    result |= {"peak_mib": peak_mib, "epochs": epochs}
    kept = ["test_accuracy", "test_views", "test_views_accuracy", "recall", "f1"]
    kept += ["train_images", "hardware", "versions", "commit"]
    return result | {key: report.get(key) for key in kept}


def training_command(folder: Path, snippet: str, processes: int) -> list[str]:
    """The command that starts the program, without options.

    folder: receives the program that a snippet needs. processes: with more than one, by torchrun.
    """
    script = SCRIPT
    if snippet:
        script = folder / "variant.py"
        script.write_text(variant_program(snippet), encoding="utf-8")
    if processes == 1:
        return [sys.executable, str(script)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, str(script)]


def wait(process: subprocess.Popen[str]) -> float | None:
    """Wait for a process to end; returns its largest memory in MiB, None on Windows.

    Linux counts what this program held when it started the process, if that was more.
    """
    if not hasattr(os, "wait4"):
        process.wait()
        return None
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    units_per_mib = 2**20 if sys.platform == "darwin" else 2**10
    return usage.ru_maxrss / units_per_mib


def read_kilobytes(path: str, name: str) -> int:
    """A number in a file of Linux with lines such as "VmHWM:   1024 kB"; 0 if it is not there."""
    try:
        text = Path(path).read_text()
    except OSError:  # another system, or a process that has ended
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) if found else 0


def read_epochs(metrics_file: Path) -> list[dict[str, float]]:
    """A row for each epoch of a run: losses, validation accuracy, seconds since training began.

    The validation figures are NaN without validation images, and on images that progressive
    resizing has made smaller.
    """
    with metrics_file.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    elapsed = 0.0
    epochs = []
    for row in rows:
        elapsed += float(row["seconds"])
        epoch = {"seconds": elapsed}
        for name in ("train_loss", "valid_loss", "valid_accuracy"):
            epoch[name] = float(row[name] or "nan")
        if float(row.get("image_scale", 1)) < 1:  # version 0.9 validated on full-size images
            epoch["valid_loss"] = epoch["valid_accuracy"] = math.nan
        epochs.append(epoch)
    return epochs


def run_in_turns(
    name: str,
    variants: Iterable[str],
    runs: int,
    train: Callable[[str, int], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Call `train(variant, seed)` for each variant, with seed 0, then for each with seed 1, ...

    Returns the results, which are in results/NAME.json as well.
    """
    jobs = [(variant, seed) for seed in range(runs) for variant in variants]
    results = []
    for variant, seed in tqdm(jobs, unit="run", disable=None):
        results.append(train(variant, seed))
        write_results(name, results)  # after each run: all of them may take hours
    return results


def write_results(name: str, results: Any) -> None:
    """Write results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


# ---- Options and tables --------------------------------------------------------------------------


def new_parser(description: str | None, runs: int | None = None) -> argparse.ArgumentParser:
    """A parser that shows the description as it is.

    runs: the default of --runs; with it the parser has --runs and --data-dir.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if runs is not None:
        help_text = f"runs of each variant, with seeds 0, 1, ... (default: {runs})"
        parser.add_argument("--runs", type=int, default=runs, metavar="N", help=help_text)
        add_data_dir(parser)
    return parser


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Add --data-dir, by default the folder that CIFAR10_DIR names."""
    default = os.environ.get("CIFAR10_DIR", "data")
    parser.add_argument("--data-dir", default=default, metavar="DIR", help="as the program's")


def group_by(results: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """The results with each value of `key`, in the order in which the values came."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result[key], []).append(result)
    return groups


def mean_and_std(values: Sequence[float], unit: float = 1, digits: int = 1) -> str:
    """Mean ± standard deviation, as text; of a single value, the value.

    unit: what to multiply by: 100 for per cent.
    """
    text = f"{unit * statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ± {unit * statistics.stdev(values):.{digits}f}"


def markdown_table(head: str, rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table. head: its titles with " | " between them."""
    titles = head.split(" | ")
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
