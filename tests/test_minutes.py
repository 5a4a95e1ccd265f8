"""Runs with --minutes. How many steps are planned is tested in test_time_budget.py."""

import re
import time

import pytest
from conftest import QUICK, beforehand, epochs_of, only_run, report_of, state_of, trainer_of
from tqdm import tqdm

import image_classification as ic
from classifier import time_budget
from classifier.heartbeat import Heartbeat
from classifier.progress import cost_until
from classifier.time_budget import TimeBudget

SLOW_NETWORK = """
import time
from torch import nn

class Slow(nn.Sequential):
    def forward(self, images):
        if self.training:
            time.sleep(0.05)
        return super().forward(images)

def slow(classes=10, channels=3, image_size=32):
    inputs = channels * image_size**2 // 16
    return Slow(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(inputs, classes))
"""


@pytest.mark.slow
def test_minutes_are_kept(program, folder):
    began = time.monotonic()
    # the epochs would take far longer
    process = program.start(*QUICK, "--image-size", "32", "--epochs", "10000", "--minutes", "0.3")
    seconds = {}
    for line in process.stdout:
        seconds[line.partition(" ")[0]] = time.monotonic() - began
    assert process.wait() == 0
    assert len(epochs_of(only_run(folder))) > 1
    assert seconds["Finished"] < 24
    assert 11 < seconds["Done"] < 50  # a busy machine reports slowly


@pytest.mark.slow
def test_minutes_are_used_where_few_epochs_end_before_a_step_was_timed(folder, monkeypatch):
    monkeypatch.setattr(time_budget, "REPORT_SECONDS", 1)
    config = ic.Config(dataset="digits", subset=400, width=0.25, epochs=1, minutes=0.2)
    assert len(ic.train(config).history) > 1


def test_run_that_is_late_says_so(inside):
    out, _ = inside(*QUICK, "--minutes", "0.001")
    assert re.search(r"^Done in \d\d:\d\d, later than --minutes 0.001$", out, re.MULTILINE)


@pytest.mark.slow
def test_minutes_shorter_than_an_epoch(inside, folder, monkeypatch):
    monkeypatch.setattr(time_budget, "REPORT_SECONDS", 3)
    monkeypatch.setattr(ic, "START", time.perf_counter())
    options = ["--dataset", "digits", "--width", "0.25", "--batch-size", "1", "--minutes", "0.2"]
    with beforehand(ic.Trainer, "train_step", lambda *_: time.sleep(0.02)):
        out, _ = inside(*options)
    run = only_run(folder)
    assert epochs_of(run) == [0]
    assert re.search(r"^Epoch 0000: .* s for \d+ of 1295 steps, ", out, re.MULTILINE)
    assert report_of(run)["train_images"] == state_of(run)["step"] < 1295  # of one image each
    (run / "report.json").unlink()  # as if killed before the report
    inside("--resume", "last")
    assert epochs_of(run) == [0]


@pytest.mark.slow
def test_slow_network_is_looked_at_before_the_minutes_are_over(folder, monkeypatch):
    (folder / "mine.py").write_text(SLOW_NETWORK)
    monkeypatch.setattr(time_budget, "PROBE_EVERY", 0.3)
    monkeypatch.setattr(time_budget, "PROBE_STEPS", 1000)
    monkeypatch.setattr(time_budget, "REPORT_SECONDS", 1)
    settings = {"batch_size": 10, "model": "mine.py:slow", "minutes": 0.1}
    ic.train(ic.Config(dataset="digits", **settings))
    # it looks at the end of an epoch in any case, after 130 steps
    assert 3 < state_of(only_run(folder))["step"] < 6 / 0.05 < 130


def test_steps_on_smaller_images_cost_less():
    trainer = trainer_of(width=0.25, progressive_resizing=0.7, epochs=1)
    progress = trainer.state.progress
    plan = trainer.plan(0)
    for batch_slice in trainer.batch_slices:
        trainer.train_step(plan.take(batch_slice))
    whole_run = progress.total_steps * cost_until(1.0, 0.7)
    assert progress.done and progress.cost == pytest.approx(whole_run, abs=1.0)


def test_time_left_counts_smaller_images_less():
    trainer = trainer_of(width=0.25, progressive_resizing=0.7, epochs=1)
    progress = trainer.state.progress
    heartbeat = Heartbeat(trainer.state, trainer.group, 0.7)
    progress.step = progress.total_steps // 2
    progress.seconds = 60.0
    done = cost_until(progress.fraction, 0.7)
    progress.cost = progress.total_steps * done
    left = 60 * (cost_until(1.0, 0.7) / done - 1)
    assert heartbeat.eta() == f"{tqdm.format_interval(left)} left"
    assert left > 70  # of equal steps, 60 would be left


def test_seeds_share_the_minutes(folder, monkeypatch):
    seconds_left = []

    def note_deadline(budget, deadline, *rest):
        seconds_left.append(deadline - time.perf_counter())

    # or this would take all that time
    monkeypatch.setattr(
        TimeBudget, "total_steps", lambda budget, progress, *_: progress.total_steps
    )
    settings = {"subset": 200, "width": 0.25, "epochs": 1, "minutes": 10.0, "repeat": 2}
    with beforehand(TimeBudget, "__init__", note_deadline):
        ic.train(ic.Config(dataset="digits", **settings))
    first, second = seconds_left
    assert 280 < first < 300 and 500 < second < 600
