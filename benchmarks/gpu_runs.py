"""How the parts of gpu_session.py run programs: in processes that end when their time is over."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import harness

QUICK = ["--dataset", "digits", "--subset", "300", "--epochs", "2", "--width", "0.25"]
GRACE_SECONDS = 5.0  # for a process to end by itself: torchrun ends those that it has started
POLL_SECONDS = 0.01
MAX_OUTPUT = 3000  # characters of a failed command that are kept

T = TypeVar("T")


class Result(NamedTuple):
    """What a part found.

    Attributes:
        figure: in a few words.
        reached: whether that is what was to be reached; None: there is no such thing.
        raw: the same in numbers, for the result file.
    """

    figure: str
    reached: bool | None = None
    raw: Any = None


class Session(NamedTuple):
    """What a part is told.

    Attributes:
        device: as the program's --device.
        data_dir: the folder with CIFAR-10.
        scripts: of the records, in their checkouts.
        quick: whether to try with a few digits.
        folder: a temporary one of the part.
        deadline: when its time is over, on time.monotonic().
        earlier: the results of the parts that were done before it, by name.
    """

    device: str
    data_dir: Path
    scripts: Sequence[Path]
    quick: bool
    folder: Path
    deadline: float
    earlier: dict[str, Result]

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def data_options(self) -> list[str]:
        """Options that end a command line, so that those of --quick replace the ones before."""
        if self.quick:
            return QUICK
        return ["--dataset", "cifar10", "--data-dir", str(self.data_dir)]


# ---- Programs that end in time -------------------------------------------------------------------


class Ended(NamedTuple):
    """A process that has ended: its lines, each with the seconds since its start, and its time."""

    lines: list[tuple[float, str]]
    seconds: float

    def times_of(self, beginning: str) -> list[float]:
        """When the lines that begin like this were printed."""
        return [since for since, line in self.lines if line.startswith(beginning)]


def run(
    session: Session,
    command: list[str],
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
    kill_after: str = "",
) -> Ended:
    """Run a command to its end, in this folder (default: that of the part).

    kill_after: how the line begins after which the process is killed. Raises TimeoutError when the
    time of the part is over, RuntimeError if the command fails.
    """
    variables = {"PYTHONUNBUFFERED": "1", **(environment or {})}
    lines: list[tuple[float, str]] = []
    unfinished = ""  # the beginning of a line
    # not a pipe: a process left behind would keep it open
    log = session.folder / "output.txt"
    with log.open("w") as output, log.open(encoding="utf-8", errors="replace") as reader:
        began = time.monotonic()
        process = harness.start(
            command, folder or session.folder, output, variables, new_session=True
        )
        ended = False
        try:
            while not ended:
                time.sleep(POLL_SECONDS)
                ended = process.poll() is not None  # asked before the last lines are read
                since = time.monotonic() - began
                *complete, unfinished = (unfinished + reader.read()).split("\n")
                lines += [(since, line) for line in complete]
                if kill_after and any(line.startswith(kill_after) for line in complete):
                    process.kill()
                    return Ended(lines, since)
                if session.seconds_left() <= 0:
                    raise TimeoutError(f"out of time: {shlex.join(command[1:])}")
        finally:
            end_group(process)
    if process.returncode:
        end = "\n".join(line for _, line in lines)[-MAX_OUTPUT:]
        raise RuntimeError(f"{shlex.join(command[1:])} ended with {process.returncode}:\n{end}")
    return Ended(lines, since)


def end_group(process: subprocess.Popen[str]) -> None:
    """End a process that leads a group, and the group; does nothing if it has ended."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)


class Trained(NamedTuple):
    """A training of the program: its process, report.json, and the rows of its epochs."""

    ended: Ended
    report: dict[str, Any]
    epochs: list[dict[str, float]]

    def figures(self) -> dict[str, Any]:
        """Seconds of the whole run and of its training, and test accuracies in [0, 1]."""
        kept = ["seconds", "test_accuracy", "test_views_accuracy"]
        found = {name: self.report[name] for name in kept if name in self.report}
        return {"whole_run": self.ended.seconds, **found}

    def accuracy(self) -> float:
        """With test-time augmentation, if there was any."""
        return self.report.get("test_views_accuracy", self.report["test_accuracy"])


def train(
    session: Session, *options: str, snippet: str = "", launcher: Sequence[str] = ()
) -> Trained:
    """Train in a folder of its own.

    snippet: as that of `harness.variant_program`. launcher: what stands before the script.
    """
    folder = Path(tempfile.mkdtemp(dir=session.folder))
    interpreter, *script = harness.training_command(folder, snippet, processes=1)
    command = [interpreter, *launcher, *script, "--device", session.device, *options]
    ended = run(session, [*command, *session.data_options(), "--run-dir", "run"], folder)
    report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    metrics_file = folder / "run" / "metrics.csv"
    epochs = harness.read_epochs(metrics_file) if metrics_file.exists() else []  # not of --repeat
    return Trained(ended, report, epochs)


def benchmark(session: Session, name: str, *options: str) -> Any:
    """Run another benchmark and print its table; returns what it has written.

    Of one that the time did not suffice for, what it had written by then, if anything.
    """
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *options]
    result_file = session.folder / f"{name}.json"
    try:
        environment = {"BENCHMARK_RESULTS": str(session.folder)}
        ended = run(session, command, environment=environment)
        print(*(line for _, line in ended.lines if line.startswith("|")), sep="\n")
    except TimeoutError:
        if not result_file.exists():
            raise
        print(f"note: {name}.py was ended before it was done")
    return json.loads(result_file.read_text(encoding="utf-8"))


def as_many_as_fit(
    session: Session, values: Iterable[T], do: Callable[[T], Trained]
) -> dict[T, Trained]:
    """What `do` returns for these values, until the next one would not fit into the time."""
    found: dict[T, Trained] = {}
    for value in values:
        slowest = max((trained.ended.seconds for trained in found.values()), default=0.0)
        if session.seconds_left() < slowest:
            break
        found[value] = do(value)
    return found
