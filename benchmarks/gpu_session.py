"""Everything that needs a GPU, in one sitting of ten minutes on Linux.

    python benchmarks/gpu_session.py ../cifar10-airbench/airbench94_muon.py
    python benchmarks/gpu_session.py --only out-of-memory resume --name again
    python benchmarks/gpu_session.py --device cpu --quick

Does the PARTS in their order, the most important ones first: the tests that need CUDA, the times of
whole runs, `accuracy94` beside the record scripts (see records.py for where they look for their
data), lack of memory, and so on. Each part has a time limit of its own. One that fails or takes too
long does not end the others; those for which no time is left are skipped. Prints a Markdown table
with a row for each part; writes results/gpu_session.json after each of them. Exit status 1 if a
part failed. --quick tries it with a few digits, whose figures mean nothing.
"""

import argparse
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gpu_parts
import harness
import records
import torch
from gpu_runs import Result, Session

sys.path.insert(0, str(harness.SCRIPT.parent))
import image_classification as ic
from classifier import devices, reports

SPARE_SECONDS = 20.0  # of --minutes: for imports, and for the end of a part that takes too long
MIN_SECONDS = 5.0  # no part is begun with less time than this
MAX_WORDS = 200  # characters of a failure that are in the table
HEAD = "part | figure | to reach | reached | s"


class Part(NamedTuple):
    """A row of the table: what is done, for at most how many seconds, and what it is to reach."""

    name: str
    seconds: float
    do: Callable[[Session], Result]
    target: str = ""
    needs_cuda: bool = False


RECORDS_TARGET = "94.0 %, in at most 0.9 × the fastest script's time"
COMPILER_TARGET = "command to saved model in a third of the scripts' time"
FP32_TARGET = f"differ by at most {100 * gpu_parts.LOSS_TOLERANCE:g} %"
PARTS = [  # in the order of their importance
    Part("cuda-tests", 100, gpu_parts.cuda_tests, "no test fails", needs_cuda=True),
    Part("default-run", 80, gpu_parts.default_run, "command to prompt in 8 s"),
    Part("accuracy94", 240, gpu_parts.accuracy94, RECORDS_TARGET),
    Part("without-compiler", 40, gpu_parts.without_compiler, COMPILER_TARGET),
    Part("out-of-memory", 40, gpu_parts.out_of_memory, "the batch is divided", needs_cuda=True),
    Part("nccl", 40, gpu_parts.nccl, "the run ends well", needs_cuda=True),
    Part("resume", 60, gpu_parts.resume, "bit for bit"),
    Part("cpu-and-gpu", 60, gpu_parts.cpu_and_gpu, FP32_TARGET),
    Part("repeat", 60, gpu_parts.repeat),
    Part("start-up", 60, gpu_parts.start_up),
    Part("precisions", 60, gpu_parts.precisions),
    Part("utilisation", 60, gpu_parts.utilisation),
    Part("batch-sizes", 90, gpu_parts.batch_sizes),
]


# ---- The session ---------------------------------------------------------------------------------

# What became of a part; the content of the result file.
Row = dict[str, Any]


def do_parts(
    parts: Iterable[Part], session: Session, seconds: float, note: Callable[[Row], None]
) -> None:
    """Do the parts in their order within so many seconds; `note` gets a row as each part ends."""
    ends = time.monotonic() + seconds
    for part in parts:
        began = time.monotonic()
        if part.needs_cuda and session.device == "cpu":
            status, result = "skipped", Result("skipped: needs CUDA")
        elif ends - began < MIN_SECONDS:
            status, result = "skipped", Result("skipped: no time left")
        else:
            deadline = min(began + part.seconds, ends)
            status, result = attempt(part, session._replace(deadline=deadline))
        if status == "done":
            session.earlier[part.name] = result
        took = time.monotonic() - began
        facts = {"part": part.name, "status": status, "seconds": took, "to_reach": part.target}
        note(facts | result._asdict())


def attempt(part: Part, session: Session) -> tuple[str, Result]:
    """Do a part in a folder of its own; returns whether it is "done" or has "failed"."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            return "done", part.do(session._replace(folder=Path(folder)))
        except Exception as error:  # whatever it is, the other parts are worth having
            reason = f"{type(error).__name__}: {error}"
            words = re.sub(r"[\s|]+", " ", reason)  # in one cell of the table
            return "failed", Result(f"failed: {words[:MAX_WORDS]}", raw=reason)


def table_row(row: Row) -> list[str]:
    reached = {True: "yes", False: "no", None: ""}[row["reached"]]
    return [row["part"], row["figure"], row["to_reach"], reached, f"{row['seconds']:.0f}"]


def parse_options() -> argparse.Namespace:
    parser = harness.new_parser(__doc__)
    scripts = "of the records, in their checkouts"
    parser.add_argument("scripts", nargs="*", type=Path, metavar="SCRIPT", help=scripts)
    minutes = "for all parts together (default: 10)"
    parser.add_argument("--minutes", type=float, default=10, metavar="MINUTES", help=minutes)
    names = [part.name for part in PARTS]
    only = f"the parts to do: {', '.join(names)} (default: all)"
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="PART", help=only
    )
    device = "cuda, cuda:N or cpu (default: cuda)"
    parser.add_argument("--device", default="cuda", metavar="NAME", help=device)
    parser.add_argument("--quick", action="store_true", help="try it with a few digits")
    harness.add_data_dir(parser)
    parser.add_argument("--name", default="gpu_session", help="of the result file")
    options = parser.parse_args()
    for script in options.scripts:
        if not script.is_file():
            parser.error(f"{script}: there is no such file")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: there is no GPU: try --device cpu --quick")
    if options.quick:
        options.name += "_quick"
    elif (harness.RESULTS / f"{options.name}.json").exists():
        parser.error(f"results/{options.name}.json exists already: choose another --name")
    return options


def main() -> int:
    options = parse_options()
    parts = [part for part in PARTS if part.name in options.only]
    scripts = [script.resolve() for script in options.scripts]
    data_dir = Path(options.data_dir).resolve()
    session = Session(
        options.device, data_dir, scripts, options.quick, folder=Path(), deadline=0, earlier={}
    )
    facts: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "commit": reports.commit(harness.SCRIPT),
    }
    facts |= {"gpu": records.gpu_state(), "cpu": devices.hardware_name(torch.device("cpu"))}
    facts |= {"versions": ic.VERSIONS}
    rows: list[Row] = []

    def note(row: Row) -> None:
        rows.append(row)
        harness.write_results(options.name, {**facts, "parts": rows})
        print(f"{row['part']}: {row['figure']}", flush=True)
        if row["status"] == "failed":
            print(row["raw"], flush=True)

    do_parts(parts, session, 60 * options.minutes - SPARE_SECONDS, note)
    print(f"\n{facts['gpu'] or facts['cpu']}; torch {torch.__version__}; {facts['commit']}\n")
    print(harness.markdown_table(HEAD, map(table_row, rows)))
    return 1 if any(row["status"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
