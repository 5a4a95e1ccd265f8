"""--minutes: as many steps as fit into the time that there is, counted anew as the run shows how long they take."""

import bisect
import collections
import math
import time
import weakref
from collections.abc import Callable
from typing import Any

PROBE_STEPS, PROBE_EVERY = 12, 5.0  # s: so many steps are timed at once, or fewer that take so long
REPORT_SECONDS = 4.5  # but for the test images


class Pace:
    """Fixes a trainer's `total_steps`, and with them its schedule, so that all is done at `deadline`.

    deadline: on time.perf_counter(). agreed: gives all processes what the first one finds.
    """

    def __init__(self, trainer: Any, deadline: float, agreed: Callable[[Callable[[], int]], int]):
        self.trainer: Any = weakref.proxy(trainer)  # or its memory would be kept after it
        self.deadline, self.agreed = deadline, agreed
        self.pause = 0.0  # s that the end of an epoch takes; each shows it anew
        self.per_step = 0.0  # s for a step on whole images, by the latest probes
        self.steps = collections.Counter[float]()  # that this process has done with images of each scale

    def begin(self) -> None:
        """A probe begins: with an epoch, and where the one before has ended."""
        self.probed, self.cost = time.perf_counter(), self.trainer.cost

    def step(self, done: int, scale: float) -> None:
        """This epoch's step number `done`, on images of that scale, is over."""
        trainer, since = self.trainer, time.perf_counter() - self.probed
        self.steps[scale] += 1
        last = trainer.step == trainer.total_steps
        # the first of a size sets up its convolutions, the second may be recorded
        if self.steps[scale] < 3 and not last:
            self.begin()
        elif done % PROBE_STEPS == 0 or done == len(trainer.places) or trainer.world == 1 and since > PROBE_EVERY:
            float(trainer.sums[done - 1, 0])  # wait for the device
            if not last or not self.per_step:  # few epochs may be over before anything was timed
                self.fit((time.perf_counter() - self.probed) / (trainer.cost - self.cost))
            self.begin()

    def fit(self, per_step: float) -> None:
        """Find the number of steps that leaves time for the ends of epochs, the test and the report.

        per_step: s for whole images. From small ones it is an estimate; the last part of a run, on whole images, knows.
        """
        # a single probe is not to end a run: the machine may have been busy for as long as it took
        per_step = self.per_step = (per_step + (self.per_step or per_step)) / 2
        trainer, views = self.trainer, self.trainer.config.test_views
        batch, validation = trainer.places[0].stop, len(trainer.valid.labels)
        # forward only: half of a step in fp32, measured; a third in bf16, and 0.3 s for files, until an epoch has ended
        test = per_step * trainer.data.test_images / batch / 2 * trainer.world  # the first process tests alone
        pause = self.pause or 0.3 + per_step * validation / batch / 3
        test *= 1 + views * (views > 1) + validation / trainer.data.test_images  # these calibrate confidence
        left = self.deadline - time.perf_counter() - REPORT_SECONDS - test
        ended = (trainer.step - 1) // len(trainer.places)  # epochs

        def seconds(total: int) -> float:
            steps = total * (trainer.work(1.0) - trainer.work(trainer.step / total))
            return per_step * steps + pause * (math.ceil(total / len(trainer.places)) - ended)

        fitting = self.agreed(lambda: bisect.bisect(range(10**9), left, lo=trainer.step, key=seconds) - 1)
        trainer.total_steps = max(trainer.step, fitting)
