"""What a search for better settings draws: which settings, and from which ranges."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from optuna import Trial

from classifier import finetuning
from classifier.config import Config
from classifier.datasets.dataset import Dataset
from classifier.recipes import Settings

SEARCHED = ["optimizer", "lr", "weight_decay", "batch_size", "width", "dropout", "augment"]
OPTIMIZERS = ["muon", "sgd", "adamw"]
BATCH_SIZES = (8, 128)  # reference 002's, and so are these learning rates, for Adam and its like
LEARNING_RATES = (0.0001, 0.01)
# Muon's are relative steps, SGD's multiply bare gradients.
OTHER_LEARNING_RATES = {"muon": (0.02, 0.5), "sgd": (0.01, 1.0)}


@dataclass
class SearchSpace:
    """The settings to draw: those in SEARCHED that are not fixed and that the network has.

    Attributes:
        fixed: the settings that no trial changes.
        start: the settings that the search starts with, complete.
        network_options: names of the options that the network has.
        data: the data set.
        learning_rates, batch_sizes: [lowest, highest]; None: the ranges above.
    """

    fixed: Settings
    start: Config
    network_options: Collection[str]
    data: Dataset
    learning_rates: list[float] | None = None
    batch_sizes: list[int] | None = None

    def draw(self, trial: Trial) -> Settings:
        """Draw settings for a trial; numbers are rounded to what is printed."""
        fixed = self.fixed
        drawn: Settings = {}
        if "optimizer" not in fixed:
            names = list(OPTIMIZERS)
            if self.start.pretrained or finetuning.has_groups(self.start):
                names.remove("muon")  # ImageNet weights would not survive it
            drawn["optimizer"] = trial.suggest_categorical("optimizer", names)
        if "lr" not in fixed:
            optimizer = str(drawn.get("optimizer", self.start.optimizer))
            drawn["lr"] = self._draw_lr(trial, optimizer)
        if "weight_decay" not in fixed:
            weight_decay = trial.suggest_float("weight_decay", 1e-5, 0.1, log=True)
            drawn["weight_decay"] = float(f"{weight_decay:.3g}")
        if "batch_size" not in fixed:
            drawn["batch_size"] = self._draw_batch_size(trial)
        has_width = self.start.model == "cnn" and not self.start.init_from  # that of its weights
        if "width" not in fixed and has_width:
            drawn["width"] = float(trial.suggest_float("width", 0.5, 2.0, step=0.25))
        if "dropout" not in fixed and "dropout" in self.network_options:
            dropout = trial.suggest_float("dropout", 0.0, 0.5, step=0.05)
            drawn["dropout"] = round(float(dropout), 2)
        if "augment" not in fixed:
            drawn["augment"] = trial.suggest_categorical("augment", self._augment_choices())
        return drawn

    def _draw_lr(self, trial: Trial, optimizer: str) -> float:
        low, high = self.learning_rates or OTHER_LEARNING_RATES.get(optimizer, LEARNING_RATES)
        # a parameter for each optimiser: a good rate of one tells nothing about another
        lr = trial.suggest_float(f"lr of {optimizer}", low, high, log=True)
        return float(f"{lr:.3g}")

    def _draw_batch_size(self, trial: Trial) -> int:
        """A power of 2, or an end of the range."""
        num_images = len(self.data.train.labels)
        low, high = self.batch_sizes or BATCH_SIZES
        low = min(low, num_images)
        high = min(high, num_images)
        drawn = trial.suggest_int("batch_size", low, high, log=True)
        power_of_2 = 2 ** round(math.log2(drawn))
        return min(max(low, power_of_2), high)

    def _augment_choices(self) -> list[str]:
        """None, and shifts by up to 1/16 or 1/8 of the image, without flips and with them."""
        image_size = self.data.train.images.shape[-1]
        shifts = sorted({max(1, image_size // 16), max(1, image_size // 8)})
        crops = [f"crop={shift}" for shift in shifts]
        choices = ["none", *crops]
        if self.data.flip_keeps_label:
            choices += [f"flip,{crop}" for crop in crops]
        return choices
