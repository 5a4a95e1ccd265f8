"""Threads that wait sleep while other programs need the cores, and spin otherwise."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import REPOSITORY

from classifier import thread_waiting

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only for Linux")

# How much processor time is used by threads that have hardly anything to do.
IDLE_WORK = """
import time
import torch
from classifier import thread_waiting

def cores_used():
    values = torch.ones(thread_waiting.BIG)
    began, began_processor = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < 0.5:
        values.add_(1)
        time.sleep(0.002)
    return (time.process_time() - began_processor) / (time.perf_counter() - began)
"""
TEAMS = """
teams = thread_waiting.IdleTeams(thread_waiting._teams_needed())
before = cores_used()
teams.start()
teams.start()
during = cores_used()
teams.stop()
teams.stop()
print([before, during, cores_used()])
"""
# Other programs come, or none.
WATCHED = """
import os, subprocess, sys
others = []
with thread_waiting.share_cores(torch.device("cpu")):
    for _ in range(int(sys.argv[1])):
        others.append(subprocess.Popen([sys.executable, "-c", "while 1: pass"]))
    values = torch.ones(thread_waiting.BIG)
    ends = time.perf_counter() + 2.5
    while time.perf_counter() < ends:
        values.add_(1)
    for other in others:
        other.kill()
    used = cores_used()
print([used, cores_used()])
"""


def run(code, *arguments, **variables):
    """What the code prints, as JSON, on two cores with two threads."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"} | variables
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    pin = f"import os; os.sched_setaffinity(0, [{cores}])"
    command = [sys.executable, "-c", "\n".join([pin, IDLE_WORK, code]), *arguments]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(result.stdout)


needs_two_cores = pytest.mark.skipif(os.cpu_count() == 1, reason="one core")


@pytest.mark.slow
@needs_two_cores
def test_threads_that_wait_sleep_while_there_are_idle_teams():
    before, during, after = run(TEAMS)
    assert during < 0.6 * before and during < 0.6 * after


@pytest.mark.slow
@needs_two_cores
def test_threads_sleep_beside_other_programs():
    """The watcher looks twice a second: what it did stands for a moment after the others ended."""
    beside, after = run(WATCHED, "2")
    assert beside < 0.6 * after


@pytest.mark.slow
@needs_two_cores
def test_user_may_choose_how_threads_wait():
    beside, after = run(WATCHED, "2", GOMP_SPINCOUNT="300000")
    assert beside > 0.6 * after


def watch(monkeypatch, waited):
    """Let share_cores see these times, in seconds, that threads waited; returns what it did."""
    steps = []
    seen = iter([0.0, *waited])
    all_seen = threading.Event()

    def next_time():
        try:
            return next(seen)
        except StopIteration:
            all_seen.set()
            return waited[-1]

    monkeypatch.setattr(thread_waiting, "CHECK_EVERY", 0.05)
    monkeypatch.setattr(thread_waiting, "seconds_waited", next_time)
    monkeypatch.setattr(thread_waiting, "_teams_needed", lambda: 1)
    for name in ("start", "stop"):
        monkeypatch.setattr(thread_waiting.IdleTeams, name, lambda _, name=name: steps.append(name))
    with thread_waiting.share_cores(torch.device("cpu")):
        assert all_seen.wait(30)
    return steps


def test_teams_come_and_go_with_the_other_programs(monkeypatch):
    assert watch(monkeypatch, [0.0, 100.0, 200.0, 200.0])[:4] == ["stop", "start", "start", "stop"]


def test_teams_end_with_the_training(monkeypatch):
    before = threading.active_count()
    monkeypatch.setattr(thread_waiting, "_teams_needed", lambda: 2)
    monkeypatch.setattr(thread_waiting, "CROWDED", -1.0)
    monkeypatch.setattr(thread_waiting, "CHECK_EVERY", 0.05)
    started = threading.Event()
    start = thread_waiting.IdleTeams.start

    def note_start(teams):
        start(teams)
        started.set()

    monkeypatch.setattr(thread_waiting.IdleTeams, "start", note_start)
    with pytest.raises(ZeroDivisionError), thread_waiting.share_cores(torch.device("cpu")):
        assert started.wait(30)
        assert threading.active_count() == before + 3  # the watcher, and one for each team
        _ = 1 / 0
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("cores", "threads", "teams"), [(2, 2, 1), (8, 4, 2), (16, 16, 1), (8, 1, 0), (64, 2, 63)]
)
def test_teams_make_more_threads_than_cores(monkeypatch, cores, threads, teams):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert thread_waiting._teams_needed() == teams
    if teams:
        assert threads + teams * (threads - 1) > cores


def test_nothing_is_watched_where_it_would_not_help(monkeypatch):
    monkeypatch.setattr(thread_waiting, "_watch", lambda *_: pytest.fail("watched"))
    monkeypatch.setattr(thread_waiting, "_teams_needed", lambda: 1)
    with thread_waiting.share_cores(torch.device("cuda")):
        pass
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    with thread_waiting.share_cores(torch.device("cpu")):
        pass


def test_time_that_threads_wait_for_a_core_is_never_negative():
    assert thread_waiting.seconds_waited() >= 0
