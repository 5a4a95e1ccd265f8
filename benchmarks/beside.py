"""How long does an epoch take beside another program that computes?

    python benchmarks/beside.py
    python benchmarks/beside.py --old ../an-older-checkout --options "--dataset digits --epochs 4"

Trains in turns alone and beside `python -c "while 1: pass"`, and reads from metrics.csv how long
the last epoch took. Prints a Markdown table; writes results/beside.json. With --old the program of
another checkout takes its turn as well.
"""

import argparse
import contextlib
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness

OTHER_PROGRAM = "while 1: pass"
HEAD = "program | alone, s | beside the other, s | ratio"


def last_epoch_seconds(script: Path, options: list[str], seed: int) -> float:
    """Train in a folder of its own; returns the seconds of the last epoch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, str(script), *options, "--seed", str(seed), "--run-dir", "run"]
        with harness.start(command, folder) as process:
            output, _ = process.communicate()
        if process.returncode:
            sys.exit(f"error: {shlex.join(command)} failed:\n{output}")
        epochs = harness.read_epochs(folder / "run" / "metrics.csv")
    return epochs[-1]["seconds"] - epochs[-2]["seconds"]


@contextlib.contextmanager
def busy_machine(is_busy: bool) -> Iterator[None]:
    """Within it the other program runs, if it is to."""
    if not is_busy:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", OTHER_PROGRAM])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def table_row(name: str, results: list[dict[str, Any]]) -> list[str]:
    """The medians of a program."""
    alone = [result["seconds"] for result in results if not result["beside"]]
    beside = [result["seconds"] for result in results if result["beside"]]
    ratio = statistics.median(beside) / statistics.median(alone)
    texts = [", ".join(f"{seconds:.2f}" for seconds in times) for times in (alone, beside)]
    return [name, *texts, f"{ratio:.2f}"]


def parse_options() -> argparse.Namespace:
    parser = harness.new_parser(__doc__)
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each (default: 3)")
    parser.add_argument("--old", metavar="DIR", help="another checkout of this program")
    help_text = "of the program, at least two epochs (default: %(default)s)"
    options = "--dataset digits --epochs 4"
    parser.add_argument("--options", default=options, metavar="TEXT", help=help_text)
    name = "of the result file (default: beside)"
    parser.add_argument("--name", default="beside", help=name)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    scripts = {"this": harness.SCRIPT}
    if options.old:
        scripts["old"] = Path(options.old).resolve() / harness.SCRIPT.name

    def train(variant: str, seed: int) -> dict[str, Any]:
        program, place = variant.split()
        with busy_machine(place == "beside"):
            seconds = last_epoch_seconds(scripts[program], shlex.split(options.options), seed)
        return {"program": program, "beside": place == "beside", "seed": seed, "seconds": seconds}

    variants = [f"{name} {place}" for place in ("alone", "beside") for name in scripts]
    results = harness.run_in_turns(options.name, variants, options.runs, train)
    programs = harness.group_by(results, "program")
    print(harness.markdown_table(HEAD, [table_row(*item) for item in programs.items()]))


if __name__ == "__main__":
    main()
