"""--minutes: as many steps as fit into the time, replanned as the run shows its speed."""

import bisect
import collections
import math
import time
from collections.abc import Callable

from classifier import ood_score
from classifier.config import Config
from classifier.datasets.dataset import Dataset
from classifier.distributed import Group
from classifier.progress import Progress, cost_until
from classifier.tta import UNCERTAIN_SHARE

PROBE_STEPS = 12  # steps that are timed at once,
PROBE_EVERY = 5.0  # or fewer of them if they take so long, in s
REPORT_SECONDS = 4.5  # for the report, without testing

# Steps of a size that are not timed: the first sets up its convolutions, the second may be recorded
# as a CUDA graph.
WARM_UP_STEPS = 2

# Evaluation computes the forward pass only. Time per image as a share of a training step's:
# measured for fp32, in which the test runs, and for bf16, in which validation may run.
TEST_COST = 1 / 2
VALIDATION_COST = 1 / 3
EPOCH_END_SECONDS = 0.3  # to write the files at the end of an epoch, until one has been timed

MOST_STEPS = 10**9
# Steps on full-size images that a run gets in any case: the network is tested on these, and batch
# norm has seen only smaller ones before.
FULL_SIZE_STEPS = 5


class NoBudget:
    """No time limit: the number of steps stays as it is."""

    def begin_epoch(self, progress: Progress) -> None:
        pass

    def epoch_end_took(self, seconds: float) -> None:
        pass

    def total_steps(self, progress: Progress, scale: float, wait: Callable[[], None]) -> int:
        return progress.total_steps


class TimeBudget:
    """Plans the number of steps of a run, and with it the schedule, so that all is done in time.

    Times are in s. A cost is in steps at full resolution, as in `Progress`.
    """

    def __init__(
        self,
        deadline: float,
        batch_size: int,
        num_valid: int,
        num_test: int,
        tta: int,
        progressive_resizing: float,
        group: Group,
    ) -> None:
        """Plan for a deadline.

        deadline: when all has to be done, report included, on the clock of time.perf_counter().
        batch_size: images of a step, over all processes.
        num_valid, num_test: numbers of images.
        tta: how many views of uncertain test images are classified in addition, 1 for none.
        progressive_resizing: share of the steps on smaller images.
        """
        self.deadline = deadline
        self.batch_size = batch_size
        self.num_valid = num_valid
        self.num_test = num_test
        self.tta = tta
        self.progressive_resizing = progressive_resizing
        self.group = group
        self.epoch_end_seconds = 0.0  # of the latest epoch
        self.seconds_per_step = 0.0  # at full resolution, by the latest probes
        self.steps_at_scale: collections.Counter[float] = collections.Counter()
        self.probe_start = 0.0  # time.perf_counter() at the start of the probe
        self.probe_cost = 0.0  # cost of the run at the start of the probe

    def begin_epoch(self, progress: Progress) -> None:
        """Start to time steps."""
        self._start_probe(progress)

    def epoch_end_took(self, seconds: float) -> None:
        """Note how long validation and writing files took at the end of an epoch."""
        self.epoch_end_seconds = seconds

    def total_steps(self, progress: Progress, scale: float, wait: Callable[[], None]) -> int:
        """Return the number of steps of the whole run; call it after each step.

        progress: with the step counted.
        scale: image scale of the step.
        wait: waits until the device has finished the step.
        """
        probe_seconds = time.perf_counter() - self.probe_start
        self.steps_at_scale[scale] += 1
        if self.steps_at_scale[scale] <= WARM_UP_STEPS and not progress.done:
            self._start_probe(progress)
            return progress.total_steps
        if not self._probe_is_over(progress, probe_seconds):
            return progress.total_steps
        wait()
        total_steps = progress.total_steps
        # a short run may end before anything was timed: then its last step decides
        if not progress.done or not self.seconds_per_step:
            probe_seconds = time.perf_counter() - self.probe_start
            self._note_speed(probe_seconds / (progress.cost - self.probe_cost))
            total_steps = self._plan(progress)
        self._start_probe(progress)
        return total_steps

    def _start_probe(self, progress: Progress) -> None:
        self.probe_start = time.perf_counter()
        self.probe_cost = progress.cost

    def _probe_is_over(self, progress: Progress, probe_seconds: float) -> bool:
        done_in_epoch = (progress.step - 1) % progress.steps_per_epoch + 1
        if done_in_epoch % PROBE_STEPS == 0 or done_in_epoch == progress.steps_per_epoch:
            return True
        # clocks differ between processes, which have to plan at the same step
        return self.group.world_size == 1 and probe_seconds > PROBE_EVERY

    def _note_speed(self, seconds_per_step: float) -> None:
        """Take the mean of this probe and those before: the machine may have been busy meanwhile.

        seconds_per_step: at full resolution. From smaller images it is an estimate; the last part
            of a run, on full-size images, shows it.
        """
        before = self.seconds_per_step or seconds_per_step
        self.seconds_per_step = (seconds_per_step + before) / 2

    def _plan(self, progress: Progress) -> int:
        """The largest number of steps that leaves time for epoch ends, testing and the report."""
        remaining = self.deadline - time.perf_counter() - REPORT_SECONDS - self._test_seconds()
        per_epoch_end = self.epoch_end_seconds or self._estimated_epoch_end()
        epochs_over = (progress.step - 1) // progress.steps_per_epoch
        whole_run = cost_until(1.0, self.progressive_resizing)

        def seconds_until_tested(total_steps: int) -> float:
            done = cost_until(progress.step / total_steps, self.progressive_resizing)
            steps_at_full_resolution = total_steps * (whole_run - done)
            epoch_ends = math.ceil(total_steps / progress.steps_per_epoch) - epochs_over
            return self.seconds_per_step * steps_at_full_resolution + per_epoch_end * epoch_ends

        def find_most_steps() -> int:
            totals = range(MOST_STEPS)
            fitting = bisect.bisect(totals, remaining, lo=progress.step, key=seconds_until_tested)
            return fitting - 1

        most_steps = self.group.broadcast_from_rank0(find_most_steps)
        return max(progress.step + self._missing_full_size_steps(), most_steps)

    def _missing_full_size_steps(self) -> int:
        """How many more steps on full-size images the run needs, even if it will be late."""
        if not self.progressive_resizing:
            return 0
        return max(0, FULL_SIZE_STEPS - self.steps_at_scale[1.0])

    def _test_seconds(self) -> float:
        """Time for the test; rank 0 tests alone, where all processes share a training step."""
        batches = self.num_test / self.batch_size
        one_pass = self.seconds_per_step * batches * TEST_COST * self.group.world_size
        # the OOD score is fitted to validation images and half again as many training images
        train_per_valid = ood_score.NUM_TRAIN / ood_score.NUM_VALID
        num_scored = (1 + train_per_valid) * min(self.num_valid, ood_score.NUM_VALID)
        passes = 1 + num_scored / self.num_test
        if self.tta > 1:
            passes += self.tta * UNCERTAIN_SHARE
        return one_pass * passes

    def _estimated_epoch_end(self) -> float:
        """Time for validation and files, before the end of an epoch has been timed."""
        batches = self.num_valid / self.batch_size
        return EPOCH_END_SECONDS + self.seconds_per_step * batches * VALIDATION_COST


def new_budget(
    config: Config, deadline: float, data: Dataset, batch_size: int, group: Group
) -> TimeBudget | NoBudget:
    """The time budget of a run: see TimeBudget for the arguments."""
    if not config.minutes:
        return NoBudget()
    return TimeBudget(
        deadline,
        batch_size,
        len(data.valid.labels),
        data.num_test_images,
        config.tta,
        config.progressive_resizing,
        group,
    )
