"""Where a run is: its steps, its epochs, and what they cost so far."""

from dataclasses import dataclass, field
from typing import Any

COLUMNS = [
    "epoch",
    "train_loss",
    "valid_loss",
    "train_accuracy",
    "valid_accuracy",
    "learning_rate",
    "seconds",
    "image_scale",
    "train_share",
]
Row = dict[str, Any]  # one epoch: COLUMNS, with None where there are no validation images

# Cost of a step on images of that scale; measured: 0.3 to 0.4 at half the size, 0.5 to 0.75 at 3/4.
STEP_COST = {0.5: 0.38, 0.75: 0.67, 1.0: 1.0}


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        total_steps: optimiser steps of the whole run; a time budget may still change it.
        steps_per_epoch: steps of an epoch.
        step: steps done.
        seconds: time spent in training and validation, in s.
        cost: cost of the steps done, in steps at full resolution.
        image_scale: scale of the images in the latest step.
        history: one row for each epoch that is over.
    """

    total_steps: int
    steps_per_epoch: int
    step: int = 0
    seconds: float = 0.0
    cost: float = 0.0
    image_scale: float = 1.0
    history: list[Row] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next step belongs to, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        """Steps of that epoch that are done."""
        return self.step % self.steps_per_epoch

    @property
    def last_step_in_epoch(self) -> int:
        """Index within its epoch of the latest step."""
        return (self.step - 1) % self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return self.step / self.total_steps

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps

    def advance(self, scale: float) -> None:
        """Count one step on images of this scale."""
        self.cost += STEP_COST[scale]
        self.image_scale = scale
        self.step += 1

    def add_time(self, seconds: float) -> None:
        """Count time that was spent in training or validation."""
        self.seconds += seconds

    def restore(self, saved: dict[str, Any], keep_total_steps: bool) -> None:
        """Go on where a saved run was.

        saved: content of last.pth. keep_total_steps: take over the number of steps that a time
        budget had found.
        """
        self.step = saved["step"]
        self.seconds = saved["seconds"]
        self.cost = saved["cost"]
        # older versions validated on full-size images, trained on all, and recorded neither
        unrecorded = {"image_scale": 1.0, "train_share": 1.0}
        self.history = [{**unrecorded, **row} for row in saved["history"]]
        if keep_total_steps:
            self.total_steps = saved["total_steps"]
        if not self.done:  # an epoch that ended early and now continues gets a new row
            del self.history[self.epoch :]

    def losses(self) -> list[float]:
        """Losses that can be compared: those of the epochs so far that ended on full-size images.

        It is the validation loss, or without validation images the training loss.
        """
        return [_loss(row) for row in comparable_rows(self.history)]

    def best_epoch(self) -> int:
        """The epoch whose weights to keep.

        It has the lowest validation loss of those that ended on full-size images. While there is
        none, and without validation images, it is the latest epoch.
        """
        rows = comparable_rows(self.history)
        if not rows or rows[0]["valid_loss"] is None:
            return len(self.history) - 1
        return min(rows, key=_loss)["epoch"]

    def stalled(self, patience: int) -> bool:
        """True if none of the last `patience` losses is the lowest; never with a patience of 0."""
        losses = self.losses()
        if not patience or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= patience

    def remaining_seconds(self, progressive_resizing: float) -> float:
        """Time that the remaining steps will take, judging by the cost and the time so far."""
        remaining_share = cost_until(1.0, progressive_resizing)
        remaining_share -= cost_until(self.fraction, progressive_resizing)
        return self.seconds / self.cost * self.total_steps * remaining_share


def comparable_rows(history: list[Row]) -> list[Row]:
    """The epochs that ended on full-size images.

    On smaller images (progressive resizing) the loss is another quantity, which says nothing about
    full-size images: the network has not seen any yet.

    Without validation images the training loss counts. It is another quantity, too, once easy
    images are left out (--drop-easiest), so only epochs with the same share are compared.
    """
    rows = [row for row in history if row["image_scale"] == 1]
    if rows and rows[-1]["valid_loss"] is None:
        rows = [row for row in rows if row["train_share"] == rows[-1]["train_share"]]
    return rows


def _loss(row: Row) -> float:
    """The validation loss of an epoch, or without validation images the training loss."""
    return row["train_loss"] if row["valid_loss"] is None else row["valid_loss"]


def cost_until(fraction: float, progressive_resizing: float) -> float:
    """Cost of a run up to `fraction` of its steps, as a share of a run at full resolution.

    progressive_resizing: share of the steps on smaller images: the first half of them at half the
    size, the second at 3/4, as the script's `scale_schedule` has it.
    """
    half = progressive_resizing / 2
    steps_at_half_size = min(fraction, half)
    steps_at_three_quarters = min(max(fraction - half, 0), half)
    saved = (1 - STEP_COST[0.5]) * steps_at_half_size
    saved += (1 - STEP_COST[0.75]) * steps_at_three_quarters
    return fraction - saved
