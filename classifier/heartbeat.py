"""What happens between steps: losses are recorded, the bar moves, the state is saved."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from tqdm import tqdm

from classifier import runs
from classifier.distributed import Group
from classifier.errors import Stopped
from classifier.progress import Progress
from classifier.time_budget import NoBudget, TimeBudget
from classifier.train_state import TrainState

# How often the loss is read on accelerators, where reading it waits for the device.
BAR_SECONDS = 0.5


class Stop(Protocol):
    """Anything that knows whether the run was asked to stop: see runs.StopRequest."""

    @property
    def requested(self) -> bool: ...

    @property
    def signum(self) -> int: ...


class Heartbeat:
    """What surrounds the steps of a run.

    It records the losses, shows the progress bar, saves the state, stops the run when asked to, and
    with --minutes plans anew how many steps the run has.

    state: what is trained.
    group: the processes that share each batch.
    progressive_resizing: see Config; for the time that is left.
    budget: --minutes, or NoBudget.
    stop: the request to stop, if one can come.
    save: writes last.pth; without it nothing is saved and a stop loses the epoch.
    """

    def __init__(
        self,
        state: TrainState,
        group: Group,
        progressive_resizing: float = 0.0,
        budget: TimeBudget | NoBudget | None = None,
        stop: Stop | None = None,
        save: Callable[[], None] | None = None,
    ):
        self.state = state
        self.group = group
        self.progressive_resizing = progressive_resizing
        self.budget = NoBudget() if budget is None else budget
        self.stop = stop
        self.save = save
        # to read a loss on an accelerator means to wait for the steps that are queued
        self.is_cpu = state.step_stats.device.type == "cpu"

        # of the current epoch
        self.bar = tqdm(disable=True)
        self.started = 0.0
        self.saved_at = 0.0
        self.loss_read_at = 0.0
        self.timed_until = 0.0
        self.first_image = 0
        self.steps_done = 0
        self.stopping = False

    @property
    def progress(self) -> Progress:
        return self.state.progress

    @property
    def stop_requested(self) -> bool:
        return self.stop is not None and self.stop.requested

    @contextlib.contextmanager
    def epoch(self) -> Iterator["Heartbeat"]:
        """Time an epoch and show its bar; at its end, check that all is finite."""
        self.started = time.perf_counter()
        self.loss_read_at = self.started
        self.saved_at = self.started  # the end of an epoch saves, too
        self.timed_until = self.started
        self.steps_done = self.progress.step_in_epoch
        self.first_image = self.state.batch_slices[self.steps_done].start
        self.budget.begin_epoch(self.progress)
        with tqdm(
            desc=f"Epoch {self.progress.epoch:04d}",
            total=self.state.batch_slices[-1].stop,
            initial=self.first_image,
            unit="img",
            unit_scale=True,
            leave=False,
            disable=None if self.group.is_main else True,
        ) as self.bar:
            yield self
        self.state.check_finite(saving=True)
        self.add_time()

    def add_time(self) -> None:
        """Count the time since the last call."""
        now = time.perf_counter()
        self.progress.add_time(now - self.timed_until)
        self.timed_until = now

    def images_per_second(self) -> float:
        """Speed of the epoch that has just ended, all processes together."""
        num_images = self.state.batch_slices[self.steps_done - 1].stop - self.first_image
        return num_images / (self.timed_until - self.started)

    def record(self, stats: torch.Tensor, order: torch.Tensor) -> None:
        """Sum a step's statistics over all processes, store them, and update the bar.

        stats: float32 (2, B), cross-entropy of each image and whether it was classified correctly,
        with zeros for those of other processes; becomes the sum over all processes.
        order: int64 (B,), the images.
        """
        self.steps_done += 1
        poll = self.is_cpu or self.steps_done % runs.STOP_POLL_STEPS == 0
        self.stopping = self.group.all_reduce_and_poll(stats, self.stop_requested, poll)
        self.state.record_step(self.steps_done - 1, stats, order)

        self.add_time()
        batch_slice = self.state.batch_slices[self.steps_done - 1]
        batch_size = batch_slice.stop - batch_slice.start
        self.bar.update(batch_size)
        if self.is_cpu or self.timed_until - self.loss_read_at > BAR_SECONDS:
            self.loss_read_at = self.timed_until
            self.state.check_finite()
            loss = self.last_loss_sum() / batch_size
            self.bar.set_postfix_str(f"loss {loss:.3f}, run {self.eta()}", refresh=False)

    def last_loss_sum(self) -> float:
        """Summed cross-entropy of the latest step; waits for the device."""
        return float(self.state.step_stats[self.steps_done - 1, 0])

    def wait_for_device(self) -> None:
        """Wait until the latest step is computed."""
        self.last_loss_sum()

    def total_steps(self) -> int:
        """Steps of the whole run, which a time budget recomputes after a step."""
        scale = self.progress.image_scale  # of the latest step
        return self.budget.total_steps(self.progress, scale, self.wait_for_device)

    def save_or_stop(self) -> None:
        """Save every few minutes, and when asked to stop, after which Stopped is raised."""
        overdue = time.perf_counter() - self.saved_at > runs.SAVE_EVERY
        if self.save is not None and (self.stopping or overdue):
            self.state.check_finite(saving=True)
            self.save()
            self.saved_at = time.perf_counter()
        if self.stopping:
            self.group.barrier()  # rank 0 has saved: now all may go
            self.raise_stopped()

    def stop_between_epochs(self) -> None:
        """Raise Stopped if any process was asked to stop; the epoch is saved already."""
        nothing = torch.zeros(0, device=self.state.step_stats.device)
        if self.group.all_reduce_and_poll(nothing, self.stop_requested, True):
            self.raise_stopped()

    def raise_stopped(self) -> None:
        assert self.stop is not None
        raise Stopped(self.stop.signum)

    def eta(self) -> str:
        """The time that is left, as 01:23 left."""
        seconds = self.progress.remaining_seconds(self.progressive_resizing)
        return f"{tqdm.format_interval(seconds)} left"
