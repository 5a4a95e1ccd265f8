"""This program against the scripts that hold CIFAR-10's records, on one GPU, in turns.

    python benchmarks/records.py ../cifar10-airbench/airbench94_muon.py
    python benchmarks/records.py ../cifar10-speedrun/cifar10_speedrun.py --runs 5 --name speedrun

The scripts run as they are, in the folders of their own checkouts (KellerJordan/cifar10-airbench
and hiverge/cifar10-speedrun), where they look for the data in cifar10/. Each round starts every
script and every variant of this program once and lets it train --runs times after a first time,
which compiles and does not count. "Training" is what each prints itself: theirs whitens, trains and
tests, ours trains. "With the test" is ours from "Start Training" to the last test, of one view and
of six, in fp32, including files. In both, ours records its CUDA graphs anew in every run; it
whitens before. "First result" is from the command to the first result, of the run that does not
count. Prints a Markdown table, with half of the 95 % interval behind each mean; writes NAME.json
into results/.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
from scipy.stats import sem, t
from tqdm import tqdm

GPU_QUERY = "name,driver_version,clocks.sm,clocks.max.sm,temperature.gpu,power.draw"
HEAD = "| runs | training, s | with the test, s | accuracy, % | first result, s"

# A run: "seconds" of training, "accuracy" in [0, 1], "since": seconds from the command to the first
# result, "with_test": seconds of training and test.
Run = dict[str, float]


def output_lines(command: list[str], folder: Path) -> Iterator[tuple[float, str]]:
    """Run a command; yields its lines, each with the seconds since its start.

    The process is ended when no more lines are wanted.
    """
    began = time.perf_counter()
    last_line = ""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            for line in process.stdout or []:
                last_line = line
                yield time.perf_counter() - began, line
            process.wait()
        finally:
            process.terminate()  # does nothing if it has ended
    if process.returncode:
        status = process.returncode
        sys.exit(f"error: {shlex.join(command)} ended with {status}: {last_line}")


def train_theirs(script: Path, num_runs: int) -> list[Run]:
    """The runs of a record script but the first one, read from the table that it prints."""
    titles: list[str] = []
    runs: list[Run] = []
    for since, line in output_lines([sys.executable, script.name], script.parent):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if "tta_val_acc" in cells:
            titles = [cell.removeprefix("total_") for cell in cells]
        row = dict(zip(titles, cells, strict=False))
        if row.get("epoch") == "eval":
            seconds, accuracy = float(row["time_seconds"]), float(row["tta_val_acc"])
            run = {"seconds": seconds, "accuracy": accuracy, "since": since}
            runs.append(run | {"with_test": seconds})
        if len(runs) > num_runs:  # the script would go on to 200 runs
            return [run | {"since": runs[0]["since"]} for run in runs[1:]]
    sys.exit(f"error: {script} ended after {len(runs)} of {num_runs + 1} runs")


def train_ours(variant: str, num_runs: int, first_seed: int, data_dir: str) -> list[Run]:
    """The runs of this program but the first one, with seeds from `first_seed` on."""
    recipe, *options = shlex.split(variant)
    command = [sys.executable, str(harness.SCRIPT), "--recipe", recipe, *options]
    command += ["--repeat", str(num_runs + 1), "--seed", str(first_seed)]
    command += ["--data-dir", data_dir, "--run-dir", "run"]
    began: list[float] = []  # when each run began to train, and when its last test had ended
    tested: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for since, line in output_lines(command, Path(folder)):
            if line.startswith("Start Training"):
                began.append(since)
                tested.append(since)
            elif line.startswith(("Accuracy of the network", "Accuracy with")):
                tested[-1] = since
        report = json.loads(Path(folder, "run", "report.json").read_text(encoding="utf-8"))

    runs = []
    for number, results in enumerate(report["repeats"]):
        run = {"seconds": results["seconds"]}
        run["accuracy"] = results.get("test_views_accuracy", results["test_accuracy"])
        run["since"] = tested[0]
        run["with_test"] = tested[number] - began[number]
        runs.append(run)
    return runs[1:]


def gpu_state() -> str:
    """Name, driver, clock, largest clock, temperature and power of the GPU; "" without one."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def mean_and_interval(values: list[float], digits: int) -> str:
    """Mean ± half of its 95 % interval (Student's t), as text."""
    half_width = math.nan
    if len(values) > 1:
        half_width = t.ppf(0.975, len(values) - 1) * sem(values)
    return f"{statistics.mean(values):.{digits}f} ± {half_width:.{digits}f}"


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, with a row for each script and each variant."""
    rows = []
    for contender, starts in harness.group_by(results, "contender").items():
        runs = []
        first_results = []
        for each in starts:
            runs += each["runs"]
            first_results.append(each["runs"][0]["since"])
        row = [f"`{contender}`", str(len(runs))]
        row.append(mean_and_interval([run["seconds"] for run in runs], 3))
        row.append(mean_and_interval([run["with_test"] for run in runs], 3))
        row.append(mean_and_interval([100 * run["accuracy"] for run in runs], 2))
        row.append(mean_and_interval(first_results, 1))
        rows.append(row)
    return harness.markdown_table(f" {HEAD}", rows)


def parse_options() -> argparse.Namespace:
    parser = harness.new_parser(__doc__)
    parser.add_argument(
        "scripts",
        nargs="*",
        type=Path,
        metavar="SCRIPT",
        help="of the records, in their checkouts",
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        default=["accuracy94 --compile", "accuracy94"],
        help="our recipe and options (default: accuracy94 with and without --compile)",
    )
    runs = "runs of each in a round that count (default: 10)"
    parser.add_argument("--runs", type=int, default=10, metavar="N", help=runs)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: 5)")
    harness.add_data_dir(parser)
    name = "of the result file (default: records)"
    parser.add_argument("--name", default="records", help=name)
    options = parser.parse_args()
    for script in options.scripts:
        if not script.is_file():
            parser.error(f"{script}: there is no such file")
    path = harness.RESULTS / f"{options.name}.json"
    if path.exists():
        parser.error(f"{path} exists already: choose another --name")
    return options


def main() -> None:
    options = parse_options()
    data_dir = str(Path(options.data_dir).resolve())
    contenders = [*options.scripts, *options.variant]
    jobs = [(number, each) for number in range(options.rounds) for each in contenders]
    results: list[dict[str, Any]] = []
    for number, contender in tqdm(jobs, unit="start", disable=None):
        if isinstance(contender, Path):
            runs = train_theirs(contender.resolve(), options.runs)
        else:
            first_seed = number * (options.runs + 1)
            runs = train_ours(contender, options.runs, first_seed, data_dir)
        result = {"round": number, "contender": str(contender), "runs": runs, "gpu": gpu_state()}
        results.append(result)
        harness.write_results(options.name, results)  # after each: all of them may take hours
    print(table(results))
    states = "; ".join(result["gpu"] for result in results)
    print(f"\nGPU (name, driver, clock, its maximum, °C, power) after each: {states}")


if __name__ == "__main__":
    main()
