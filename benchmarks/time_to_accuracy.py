"""How long until which accuracy: whole runs of the training program, repeated, alternating, as a user starts them.

    python benchmarks/time_to_accuracy.py default --runs 5
    python benchmarks/time_to_accuracy.py default "default --epochs 5" --runs 3 --name shorter

A variant is a recipe's name and options that go with it. Prints a Markdown table; writes NAME.json (every run's
figures) and, where there are validation images, NAME.png (their accuracy over time) into benchmarks/results/. Times
to an accuracy count training and validation, from the first step to the end of the epoch that reaches it on
validation images; "whole run" is the process from start to exit. The test images are used once, at the end of each.
"""

import argparse
import csv
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

SCRIPT = Path(__file__).resolve().parent.parent / "image_classification.py"
RESULTS = Path(__file__).resolve().parent / "results"

# ==== What other benchmarks use as well ===============================================================================


def arguments(about: str | None, runs: int) -> argparse.ArgumentParser:
    """A parser that shows `about` and knows --runs, with this default, and --data-dir."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=runs, help=f"runs of each, with seeds 0, 1, … (default: {runs})")
    parser.add_argument("--data-dir", default=os.environ.get("CIFAR10_DIR", "data"), help="as the program's")
    return parser


def changed(name: str, replacements: list[tuple[str, str]]) -> str:
    """The script's text for the variant `name`: with these (old, new)."""
    text = SCRIPT.read_text(encoding="utf-8")
    for old, new in replacements:
        if old not in text:
            sys.exit(f"error: {name}: the script no longer has {old!r}")
        text = text.replace(old, new)
    return text


def start(command: list[str], folder: Path, out: Any = subprocess.PIPE) -> subprocess.Popen:
    """A process in `folder` that finds the script, and alternatives/; what it prints is one text."""
    beside = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.Popen(command, cwd=folder, env=beside, stdout=out, stderr=subprocess.STDOUT, text=True)


def run(variant: str, seed: int, data_dir: str, text: str = "", processes: int = 1) -> dict:
    """One run in a process and a folder of its own: seconds, MiB, accuracies and one row an epoch.

    variant: a recipe and options; text: that of another image_classification.py to run; processes: that share the work.
    """
    recipe, *options = shlex.split(variant)
    with tempfile.TemporaryDirectory() as name:
        folder, script = Path(name), SCRIPT
        if text:
            script = folder / SCRIPT.name
            script.write_text(text, encoding="utf-8")
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *several * (processes > 1), str(script), "--recipe", recipe, "--seed", str(seed)]
        command += [*options, "--data-dir", str(Path(data_dir).resolve()), "--run-dir", "run"]
        began, start_up, lines = time.perf_counter(), 0.0, []
        process = start(command, folder)
        for line in process.stdout or []:
            lines.append(line)
            if line.startswith("Start Training"):
                start_up = time.perf_counter() - began
        usage = os.wait4(process.pid, 0)[2] if hasattr(os, "wait4") else None  # Windows does not tell
        process.wait()
        seconds = time.perf_counter() - began
        if not (folder / "run" / "report.json").exists():
            sys.exit(f"error: {shlex.join(command)} failed:\n{''.join(lines)}")
        rows = list(csv.DictReader((folder / "run" / "metrics.csv").open()))
        report = json.loads((folder / "run" / "report.json").read_text())
    peak = usage and usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    elapsed, epochs = 0.0, []
    for row in rows:
        elapsed += float(row["seconds"])
        figures = {name: float(row[name] or "nan") for name in ("train_loss", "valid_loss", "valid_accuracy")}
        epochs.append({"seconds": elapsed, **figures})
    names = ["test_accuracy", "test_views", "test_views_accuracy", "recall", "f1"]
    kept = {name: report.get(name) for name in [*names, "train_images", "hardware", "versions", "commit"]}
    times = {"whole_run": seconds, "start_up": start_up}
    return {"variant": variant, "seed": seed, **times, "peak_mib": peak, "epochs": epochs, **kept}


def in_turns(name: str, train: Callable[..., dict], variants: Iterable[str], runs: int, *more: Any) -> list[dict]:
    """What `train(variant, seed, *more)` gives for each variant and seed, alternating; also in results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    results: list[dict] = []
    for variant, seed in tqdm([(each, seed) for seed in range(runs) for each in variants], unit="run", disable=None):
        results.append(train(variant, seed, *more))
        (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1))  # hours of it are not to be lost
    return results


def grouped(results: list[dict], key: str) -> dict[str, list[dict]]:
    """The results with each value of `key`, in the order in which they came."""
    return {name: [each for each in results if each[key] == name] for name in dict.fromkeys(r[key] for r in results)}


def spread(values: list[float], unit: float = 1, digits: int = 1) -> str:
    """Mean ± standard deviation, as text."""
    text = f"{unit * statistics.mean(values):.{digits}f}"
    return text + (f" ± {unit * statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(head: str, rows: Iterable[Sequence[Any]]) -> str:
    """A table; head: titles with " | " between them."""
    lines = [head.split(" | "), ["---"] * (head.count(" | ") + 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ==== Time to accuracy ================================================================================================


def validated(results: list[dict]) -> list[dict]:
    """The runs that had validation images."""
    return [result for result in results if math.isfinite(result["epochs"][-1]["valid_accuracy"])]


def reached(results: list[dict], target: float) -> str:
    """When the validation accuracy of a variant's runs was at least `target`: a time only where every run got there."""
    if not validated(results):
        return ""
    times = []
    for result in results:
        epochs = enumerate(result["epochs"], 1)
        times += [(epoch["seconds"], number) for number, epoch in epochs if epoch["valid_accuracy"] >= target][:1]
    if not times:
        return "no run"
    if len(times) < len(results):
        return f"{len(times)} of {len(results)} runs"
    seconds, epochs = map(statistics.mean, zip(*times, strict=True))
    return f"{seconds:.0f} s, {epochs:.1f} epochs"


def table(results: list[dict], targets: list[float]) -> str:
    """A Markdown table, a row a variant."""
    valid = " | ".join(f"{100 * target:g} % valid" for target in targets)
    head = f"variant | {valid} | start-up, s | whole run, s | test accuracy, % | with views, % | peak, MiB | runs"
    rows = []
    for variant, own in grouped(results, "variant").items():
        row: list[Any] = [f"`{variant}`", *(reached(own, target) for target in targets)]
        row += [spread([result[key] for result in own]) for key in ("start_up", "whole_run")]
        row.append(spread([result["test_accuracy"] for result in own], 100, 2))
        views = [result["test_views_accuracy"] for result in own if result["test_views_accuracy"]]
        peaks = [result["peak_mib"] for result in own if result["peak_mib"]]
        row += [spread(views, 100, 2) if views else "", f"{max(peaks):.0f}" if peaks else "?", len(own)]
        rows.append(row)
    return markdown(head, rows)


def main() -> None:
    parser = arguments(__doc__, runs=3)
    parser.add_argument("variants", nargs="*", default=["default"], help="recipe and options (default: default)")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.85, 0.9], help="shares in [0, 1]")
    parser.add_argument("--name", default="time_to_accuracy", help="of the result files")
    options = parser.parse_args()
    results = in_turns(options.name, run, options.variants, options.runs, options.data_dir)
    print(table(results, options.targets))
    if not validated(results):
        return  # nothing to draw
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (variant, own) in enumerate(grouped(results, "variant").items()):
        for result in validated(own):
            times = [epoch["seconds"] for epoch in result["epochs"]]
            values = [100 * epoch["valid_accuracy"] for epoch in result["epochs"]]
            axes.plot(times, values, f"C{number}.-", alpha=0.7, label=variant if result["seed"] == 0 else None)
    axes.set(xlabel="seconds of training", ylabel="validation accuracy, %", title=results[0]["hardware"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / f"{options.name}.png", dpi=110)


if __name__ == "__main__":
    main()
