"""--minutes: how many steps are planned. Time is simulated: a clock that the test sets."""

import types

import pytest

from classifier import time_budget
from classifier.config import Config
from classifier.distributed import Group
from classifier.progress import STEP_COST, Progress

NUM_TRAIN, NUM_VALID, NUM_TEST = 1295, 143, 359


class Clock:
    """Seconds since the start of the run."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    fake_time = types.SimpleNamespace(perf_counter=clock.perf_counter)
    monkeypatch.setattr(time_budget, "time", fake_time)
    return clock


def budget_for(
    seconds, batch_size=50, tta=1, progressive_resizing=0.7, group=None, num_test=NUM_TEST
):
    return time_budget.TimeBudget(
        deadline=seconds,
        batch_size=batch_size,
        num_valid=NUM_VALID,
        num_test=num_test,
        tta=tta,
        progressive_resizing=progressive_resizing,
        group=group or Group(),
    )


def scale_at(fraction, progressive_resizing):
    if fraction < progressive_resizing / 2:
        return 0.5
    return 0.75 if fraction < progressive_resizing else 1.0


class Run:
    """A simulated run: steps that take their cost, and the ends of epochs."""

    def __init__(self, clock, budget, steps_per_epoch, seconds_per_step, epoch_end=0.5, epochs=1):
        self.clock = clock
        self.budget = budget
        self.seconds_per_step = seconds_per_step
        self.epoch_end = epoch_end
        self.progress = Progress(epochs * steps_per_epoch, steps_per_epoch)
        self.planned = []  # total_steps after each step
        self.waits = []  # steps after which the device was waited for

    def step(self, seconds=None):
        progress, resizing = self.progress, self.budget.progressive_resizing
        scale = scale_at(progress.fraction, resizing)
        self.clock.now += seconds or self.seconds_per_step * STEP_COST[scale]
        progress.advance(scale)

        def wait():
            self.waits.append(progress.step)

        progress.total_steps = self.budget.total_steps(progress, scale, wait)
        self.planned.append(progress.total_steps)

    def train(self):
        progress = self.progress
        while not progress.done:
            self.budget.begin_epoch(progress)
            epoch = progress.epoch
            while progress.epoch == epoch and not progress.done:
                self.step()
            self.clock.now += self.epoch_end
            self.budget.epoch_end_took(self.epoch_end)


@pytest.mark.parametrize("tta", [1, 6])
@pytest.mark.parametrize("steps_per_epoch", [81, 13])
@pytest.mark.parametrize("seconds_per_step", [0.001, 0.05, 0.5])
def test_planned_to_the_step(clock, seconds_per_step, steps_per_epoch, tta):
    """The longest run that fits, counting the test and the ends of epochs, few or many of them."""
    batch_size = NUM_TRAIN // steps_per_epoch
    budget = budget_for(60, batch_size=batch_size, tta=tta)
    progress = Progress(steps_per_epoch, steps_per_epoch, step=12)
    budget.epoch_end_took(0.9)
    budget._note_speed(seconds_per_step)
    total = budget._plan(progress)

    cost = sum(STEP_COST[scale_at(step / total, 0.7)] for step in range(12, total))
    tested = NUM_TEST * (1 + 6 / 4 if tta == 6 else 1) + 2.5 * NUM_VALID  # a quarter in views
    epoch_ends = -(-total // steps_per_epoch)
    taken = seconds_per_step * (cost + tested / batch_size / 2)
    taken += 0.9 * epoch_ends + time_budget.REPORT_SECONDS
    assert taken == pytest.approx(60, abs=0.9 + 2 * seconds_per_step + 0.5)


def test_many_validation_images_do_not_lengthen_the_test(clock):
    """The score of unlike images is fitted to no more than 1,000 of them."""
    seconds = []
    for num_valid in (1000, 50_000):
        budget = budget_for(60)
        budget.num_valid = num_valid
        budget._note_speed(0.05)
        seconds.append(budget._test_seconds())
    assert seconds[0] == seconds[1] > 0


@pytest.mark.parametrize("progressive_resizing", [0.0, 0.7])
@pytest.mark.parametrize(
    ("steps_per_epoch", "seconds_per_step"), [(100, 0.02), (10, 0.02), (5, 1.0)]
)
def test_whole_run_ends_in_time(clock, steps_per_epoch, seconds_per_step, progressive_resizing):
    budget = budget_for(60, progressive_resizing=progressive_resizing)
    run = Run(clock, budget, steps_per_epoch, seconds_per_step)
    run.train()
    test = (NUM_TEST + 2.5 * NUM_VALID) / 50 * seconds_per_step / 2
    end = clock.now + test + time_budget.REPORT_SECONDS
    assert 60 - 3 * seconds_per_step - 0.6 - 0.05 * 60 < end < 60 + seconds_per_step + 0.6


def test_total_never_falls_below_the_steps_done(clock):
    run = Run(clock, budget_for(1), 40, 1.0)  # no step fits
    run.train()
    assert all(total >= step for step, total in enumerate(run.planned, 1))
    # the first look would end the run, but the network has seen only small images
    assert run.progress.step == time_budget.PROBE_STEPS + time_budget.FULL_SIZE_STEPS
    assert run.progress.image_scale == 1


def test_one_slow_probe_does_not_end_a_run(clock):
    budget = budget_for(60, batch_size=16)
    progress = Progress(81, 81, step=12)
    budget._note_speed(0.05)
    assert budget._plan(progress) > 100
    budget._note_speed(3.0)  # the test alone would take longer than there is time
    assert budget._plan(progress) > progress.step


def test_all_processes_take_the_plan_of_rank_0(clock):
    class Others(Group):
        def broadcast_from_rank0(self, make):
            assert make() > 100
            return 77

    budget = budget_for(60, group=Others(world_size=2))
    budget._note_speed(0.05)
    assert budget._plan(Progress(81, 81, step=12)) == 77


def test_rank_0_tests_alone(clock):
    """So it takes as long as there are processes, compared with steps that they share."""
    seconds = []
    for world_size in (1, 4):
        budget = budget_for(60, group=Group(world_size=world_size))
        budget._note_speed(0.05)
        seconds.append(budget._test_seconds())
    assert seconds[1] == pytest.approx(4 * seconds[0])


def test_short_epochs_are_used_before_a_step_was_timed(clock):
    """An epoch of two steps ends before the warm-up is over: its last step counts."""
    run = Run(clock, budget_for(30), 2, 0.1)
    run.budget.begin_epoch(run.progress)
    run.step()
    assert run.progress.total_steps == 2
    run.step()
    assert run.progress.total_steps > 2


def test_last_step_does_not_change_a_plan_that_was_measured(clock):
    run = Run(clock, budget_for(30), 15, 0.1)
    run.train()
    assert run.planned[-1] == run.planned[-2] == run.progress.step


def test_slow_steps_are_looked_at_before_the_time_is_over(clock, monkeypatch):
    monkeypatch.setattr(time_budget, "PROBE_EVERY", 0.3)
    monkeypatch.setattr(time_budget, "PROBE_STEPS", 1000)
    monkeypatch.setattr(time_budget, "REPORT_SECONDS", 1)
    budget = budget_for(6, progressive_resizing=0.0)
    run = Run(clock, budget, 130, 0.05, epoch_end=0.1)
    run.train()
    assert 3 < run.progress.step < 130
    assert run.waits and run.waits[0] < 20


def test_several_processes_look_at_the_same_steps(clock):
    """Their clocks differ, so no time decides when they plan."""

    class Two(Group):
        def broadcast_from_rank0(self, make):
            return make()

    run = Run(clock, budget_for(6000, group=Two(world_size=2)), 1000, 30.0)
    run.budget.begin_epoch(run.progress)
    for _ in range(30):
        run.step()
    assert run.waits == [12, 24]


def test_device_is_waited_for_only_at_the_end_of_a_probe(clock):
    run = Run(clock, budget_for(100, progressive_resizing=0.0), 30, 0.001)
    run.budget.begin_epoch(run.progress)
    for _ in range(30):
        run.step()
    assert run.waits == [12, 24, 30]
    assert len(set(run.planned[11:23])) == 1  # and nothing is planned in between


def test_first_steps_of_a_size_are_not_timed(clock):
    """They set up convolutions and recordings, and may be a hundred times as slow."""
    run = Run(clock, budget_for(1000, progressive_resizing=0.0), 30, 0.1)
    run.budget.begin_epoch(run.progress)
    run.step(seconds=10.0)
    run.step(seconds=10.0)
    for _ in range(10):
        run.step()
    assert run.waits == [12]
    assert run.budget.seconds_per_step == pytest.approx(0.1)


def test_smaller_images_are_timed_by_their_cost(clock):
    run = Run(clock, budget_for(1000), 30, 0.1, epochs=100)  # the first steps are at half the size
    run.budget.begin_epoch(run.progress)
    for _ in range(12):
        run.step()
    assert run.budget.seconds_per_step == pytest.approx(0.1)


def test_no_budget_changes_nothing():
    progress = Progress(30, 10, step=7)
    budget = time_budget.NoBudget()
    budget.begin_epoch(progress)
    budget.epoch_end_took(3.0)

    def wait():
        raise AssertionError("nothing to wait for")

    assert budget.total_steps(progress, 1.0, wait) == 30


@pytest.mark.parametrize(
    ("minutes", "kind"), [(0.0, time_budget.NoBudget), (1.0, time_budget.TimeBudget)]
)
def test_new_budget(minutes, kind):
    config = Config(minutes=minutes, tta=6, progressive_resizing=0.7)
    valid = types.SimpleNamespace(labels=[0] * NUM_VALID)
    data = types.SimpleNamespace(valid=valid, num_test_images=NUM_TEST)
    budget = time_budget.new_budget(config, 60.0, data, 50, Group())
    assert type(budget) is kind
    if minutes:
        assert (budget.tta, budget.progressive_resizing) == (6, 0.7)
        assert (budget.num_valid, budget.num_test) == (NUM_VALID, NUM_TEST)
