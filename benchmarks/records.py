"""This program against the scripts that hold CIFAR-10's records, on one GPU, in turns.

    python benchmarks/records.py ../cifar10-airbench/airbench94_muon.py ../cifar10-speedrun/cifar10_speedrun.py
    python benchmarks/records.py ../cifar10-airbench/airbench96_faster.py --variant accuracy96 --runs 5 --name records96

The scripts are run as they are, in the folders of their own checkouts (KellerJordan/cifar10-airbench and
hiverge/cifar10-speedrun), where they look for the data in cifar10/. Each round starts every script and variant once and
lets it train RUNS times after a first time, which compiles and is not counted. "Training" is what each prints itself:
theirs whitens, trains and tests, ours trains. "With the test" is ours from "Start Training" to the last test, of one
view and of six, in fp32, files included. In both, ours records its CUDA graphs anew in every run; it whitens before.
"First result" is from the command to the first result, of a run that is not counted. Prints a Markdown table, with half
of the 95 % interval behind each mean; writes NAME.json into results/.
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

from scipy.stats import sem, t
from time_to_accuracy import RESULTS, SCRIPT, grouped
from tqdm import tqdm

ASK = ["nvidia-smi", "--id=0", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,temperature.gpu,power.draw"]


def output(command: list[str], folder: Path) -> Iterator[tuple[float, str]]:
    """(s since the start, line) for each line that a process prints; it is ended when nobody wants more."""
    begun = time.perf_counter()
    with subprocess.Popen(
        command, cwd=folder, env=os.environ | {"PYTHONUNBUFFERED": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        last = ""
        try:
            for last in process.stdout or []:
                yield time.perf_counter() - begun, last
        finally:
            process.terminate()
    if process.returncode:
        sys.exit(f"error: {shlex.join(command)} ended with {process.returncode}: {last}")


def theirs(script: Path, runs: int) -> list[dict[str, float]]:
    """Seconds and accuracy of each run of a record script but its first, and when after the start that one was over."""
    head, found = list[str](), list[dict[str, float]]()
    for since, line in output([sys.executable, script.name], script.parent):  # it would go on to 200 runs
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if "tta_val_acc" in cells:
            head = [cell.removeprefix("total_") for cell in cells]
        row = dict(zip(head, cells, strict=False))
        if row.get("epoch") == "eval":
            result = {"seconds": float(row["time_seconds"]), "accuracy": float(row["tta_val_acc"]), "since": since}
            found.append(result | {"with_test": result["seconds"]})
        if len(found) > runs:
            return [one | {"since": found[0]["since"]} for one in found[1:]]
    sys.exit(f"error: {script} ended after {len(found)} of {runs + 1} runs")


def ours(variant: str, runs: int, seed: int, data_dir: str) -> list[dict[str, float]]:
    """The same of this program, with seeds from `seed` on."""
    recipe, *options = shlex.split(variant)
    times: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT), "--recipe", recipe, *options, "--repeat", str(runs + 1)]
        command += ["--seed", str(seed), "--data-dir", data_dir, "--run-dir", "run"]
        for since, line in output(command, Path(folder)):
            if line.startswith("Start Training"):
                times.append((since, since))
            elif line.startswith(("Accuracy of the network", "Accuracy with")):
                times[-1] = times[-1][0], since
        report = json.loads(Path(folder, "run", "report.json").read_text(encoding="utf-8"))
    counted = list(zip(report["repeats"], times, strict=False))[1:]
    return [{"seconds": one["seconds"], "accuracy": one.get("test_views_accuracy", one["test_accuracy"]),
             "since": times[0][1], "with_test": tested - begun} for one, (begun, tested) in counted]  # fmt: skip


def spread(values: list[float], digits: int) -> str:
    """Mean ± half of its 95 % interval (Student's t), as text."""
    half = t.ppf(0.975, len(values) - 1) * sem(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", type=Path, metavar="SCRIPT", help="of the records, in their checkouts")
    parser.add_argument("--variant", nargs="+", default=["accuracy94 --compile", "accuracy94"],
                        help="our recipe and options (default: accuracy94 with and without --compile)")  # fmt: skip
    parser.add_argument("--runs", type=int, default=10, help="counted runs of each in a round (default: 10)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--data-dir", default=os.environ.get("CIFAR10_DIR", "data"), help="as the program's")
    parser.add_argument("--name", default="records", help="of the result file")
    options = parser.parse_args()
    if missing := [script for script in options.scripts if not script.is_file()]:
        parser.error(f"{missing[0]}: there is no such file")
    path = RESULTS / f"{options.name}.json"
    if path.exists():
        parser.error(f"{path} is there already: another --name")
    results: list[dict] = []
    data_dir = str(Path(options.data_dir).resolve())
    order = [(number, each) for number in range(options.rounds) for each in [*options.scripts, *options.variant]]
    for number, contender in tqdm(order, unit="start", disable=None):
        if isinstance(contender, Path):
            found = theirs(contender.resolve(), options.runs)
        else:
            found = ours(contender, options.runs, number * (options.runs + 1), data_dir)
        try:
            gpu = subprocess.run([*ASK, "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
        except OSError:
            gpu = ""
        results.append({"round": number, "contender": str(contender), "runs": found, "gpu": gpu})
        path.write_text(json.dumps(results, indent=1))  # hours of it are not to be lost
    print("| | runs | training, s | with the test, s | accuracy, % | first result, s |\n" + "| --- " * 6 + "|")
    for contender, starts in grouped(results, "contender").items():
        rounds = [each["runs"] for each in starts]
        runs = [run for one in rounds for run in one]
        cells = [spread([run[key] for run in runs], 3) for key in ("seconds", "with_test")]
        cells += [spread([100 * run["accuracy"] for run in runs], 2), spread([one[0]["since"] for one in rounds], 1)]
        print(f"| `{contender}` | {len(runs)} | {' | '.join(cells)} |")
    print(f"\nGPU (name, driver, clock, its maximum, °C, power) after each: {'; '.join(r['gpu'] for r in results)}")


if __name__ == "__main__":
    main()
