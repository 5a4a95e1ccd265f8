"""On Linux: torch's threads spin while they wait only as long as they have the cores to themselves.

There torch computes with GNU's OpenMP, whose threads spin for some milliseconds while they wait for
each other. That is fastest as long as nothing else runs. Beside another program they spin while the
one that they wait for does not run, and a step takes three times as long.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

CHECK_EVERY = 0.5  # seconds between two looks at how long threads wait for a core
CROWDED = 0.2  # seconds in a second that they wait, together; beside one busy program it is 0.7
QUIET = 0.05
MAX_TEAMS = 8  # if it takes more of them, many cores are left for other programs
USER_CHOSE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # environment variables
BIG = 2**18  # elements of a tensor that several threads share


@contextlib.contextmanager
def share_cores(device: torch.device) -> Iterator[None]:
    """Within it, threads that wait sleep at once while other programs need the cores.

    Nothing that is computed changes. A thread looks twice a second at how long this process's
    threads waited for a core.
    """
    num_teams = _teams_needed()
    is_possible = device.type == "cpu" and 0 < num_teams <= MAX_TEAMS
    if not is_possible or any(name in os.environ for name in USER_CHOSE):
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(IdleTeams(num_teams), ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


class IdleTeams:
    """OpenMP threads that only sleep, and thereby make all others sleep instead of spin.

    libgomp spins hardly at all while a process has more OpenMP threads than there are cores. Each
    thread of Python has a team of its own, which lasts as long as that thread.

    number: of teams, so many that there are more threads than cores.
    """

    def __init__(self, number: int):
        self.number = number
        self.end: threading.Event | None = None
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start them, unless they are there."""
        if self.end is not None:
            return
        self.end = threading.Event()
        for _ in range(self.number):
            thread = threading.Thread(target=_hold_team, args=(self.end,), daemon=True)
            thread.start()
            self.threads.append(thread)

    def stop(self) -> None:
        """End them, if they are there."""
        if self.end is None:
            return
        self.end.set()
        for thread in self.threads:
            thread.join()
        self.end = None
        self.threads = []


def _hold_team(end: threading.Event) -> None:
    torch.ones(BIG).add_(1)  # makes the team of this thread
    end.wait()


def _watch(teams: IdleTeams, ended: threading.Event) -> None:
    """Start and stop the teams as other programs come and go, until the event is set."""
    waited, looked_at = seconds_waited(), time.perf_counter()
    while not ended.wait(CHECK_EVERY):
        waited_before, looked_before = waited, looked_at
        waited, looked_at = seconds_waited(), time.perf_counter()
        share = (waited - waited_before) / (looked_at - looked_before)
        if share > CROWDED:
            teams.start()
        elif share < QUIET:
            teams.stop()
    teams.stop()


def seconds_waited() -> float:
    """For how long the threads of this process, taken together, could have run, but had no core."""
    nanoseconds = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has just ended
            nanoseconds += int(file.read_text().split()[1])
    return nanoseconds / 1e9


def _teams_needed() -> int:
    """How many teams more make more OpenMP threads than cores; 0 if that is not possible here."""
    if sys.platform != "linux" or not Path("/proc/self/schedstat").exists():
        return 0
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        return 0
    spare_cores = len(os.sched_getaffinity(0)) - num_threads
    # a team of n threads consists of the thread that makes it, and n - 1 more
    return max(1, math.ceil((spare_cores + 1) / (num_threads - 1)))
