"""All that a training step changes, and so all that last.pth holds."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from classifier.checkpoints import load_state, load_weights, read_checkpoint
from classifier.config import Config
from classifier.datasets import dataset, pixel_range
from classifier.datasets.dataset import Dataset
from classifier.distributed import Group
from classifier.errors import Diverged
from classifier.networks.pretrained import PretrainedNetwork
from classifier.progress import STEP_COST, Progress, Row
from classifier.seen_images import EARLIER_DIGESTS, digests_for_file


@dataclass
class TrainState:
    """A network in training, its optimisers, and how far they have come.

    Attributes:
        model: the network whose weights are trained.
        optimizers: they share the trained weights among them.
        scaler: loss scaling for fp16; disabled in other precisions.
        ema: moving average of the weights, or None.
        progress: steps, epochs and history.
        batch_slices: which slice of an epoch's images each step takes.
        description: what a model file says of the network besides its weights: see `describe`.
        environment: hardware, precision and torch; if they differ, a resumed run is not
            bit-identical to an unbroken one.
        step_stats: float32 (steps_per_epoch, 2), summed cross-entropy and number of hits of each
            step of this epoch.
        num_micro_batches: in how many micro-batches each process computes a batch, for each image
            scale; the same at every scale, except in runs that version 0.9 began.
        image_losses: float32 (N,), the cross-entropy of each training image in the step that saw it
            last; infinite before. None unless --drop-easiest needs it.
        hardest: int64 (M,), on the CPU, the training images of this epoch; None: all.
        nonfinite_buffers: names of the buffers that hold infinities on purpose, such as masks.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    progress: Progress
    batch_slices: list[slice]
    description: dict[str, Any]
    environment: dict[str, str]
    step_stats: torch.Tensor = field(init=False)
    num_micro_batches: dict[float, int] = field(init=False)
    image_losses: torch.Tensor | None = field(init=False)
    hardest: torch.Tensor | None = None
    nonfinite_buffers: set[str] = field(init=False)

    def __post_init__(self) -> None:
        device = next(self.model.parameters()).device
        self.step_stats = torch.zeros(len(self.batch_slices), 2, device=device)
        self.split_batches(1)
        self.image_losses = None
        if self.description["config"]["drop_easiest"]:
            num_images = self.description["train_images"]
            self.image_losses = torch.full((num_images,), math.inf, device=device)
        for group in self.param_groups():
            group["initial_lr"] = float(group["lr"])  # the peak, of which schedules take a share

        self.nonfinite_buffers = set()
        for name, buffer in self.model.named_buffers():
            if not buffer.isfinite().all():
                self.nonfinite_buffers.add(name)

    def eval_model(self) -> nn.Module:
        """The network to evaluate and to keep: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimisers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def split_batches(self, num_micro_batches: int) -> None:
        """Compute each batch in this many micro-batches from now on."""
        self.num_micro_batches = dict.fromkeys(STEP_COST, num_micro_batches)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that a step changes on the device: weights, buffers, optimiser states."""
        return [*self.model.state_dict().values(), *self._optimizer_tensors()]

    def _optimizer_tensors(self) -> list[torch.Tensor]:
        tensors = []
        for optimizer in self.optimizers:
            for weight_state in optimizer.state.values():
                tensors += [
                    each for each in weight_state.values() if isinstance(each, torch.Tensor)
                ]
        return tensors

    def record_step(self, number: int, stats: torch.Tensor, order: torch.Tensor) -> None:
        """Keep the losses of step `number` of this epoch.

        stats: float32 (2, B), cross-entropy of each image and whether it was classified correctly.
        order: int64 (B,), the images.
        """
        self.step_stats[number] = stats.sum(1)
        if self.image_losses is not None:
            self.image_losses[order] = stats[0]

    def check_finite(self, saving: bool = False, valid_loss: float = 0.0) -> None:
        """Raise Diverged if a loss, or with `saving` anything that is to be saved, is not finite.

        The losses of this epoch's steps are checked in any case.
        """
        steps = self.progress.last_step_in_epoch + 1
        bad_steps = (~self.step_stats[:steps, 0].isfinite()).nonzero()
        kept: list[torch.Tensor] = []
        if saving:
            for name, tensor in self.model.state_dict().items():
                if name not in self.nonfinite_buffers:
                    kept.append(tensor)
            kept += self._optimizer_tensors()
        all_finite = all(tensor.isfinite().all() for tensor in kept)
        if len(bad_steps) == 0 and math.isfinite(valid_loss) and all_finite:
            return

        progress, group = self.progress, self.param_groups()[0]
        step = progress.step - 1
        if len(bad_steps):
            step = progress.step - steps + int(bad_steps[0])
        epoch = step // progress.steps_per_epoch
        lower_lr = self.description["config"]["lr"] / 10
        raise Diverged(
            f"training diverged at step {step} (epoch {epoch}, lr {float(group['lr']):.3g}): the "
            f"loss or a weight is not finite: try --lr {lower_lr:.2g} or --grad-clip 1"
        )

    def end_epoch(self, valid_loss: float | None, valid_accuracy: float | None) -> Row:
        """Append the row of the epoch that is over to the history, and return it."""
        progress = self.progress
        last_step = progress.last_step_in_epoch
        num_images = self.batch_slices[last_step].stop  # fewer than all if a time budget ended it
        step_stats = self.step_stats[: last_step + 1]
        train_loss, train_accuracy = (step_stats.sum(0) / num_images).tolist()
        num_all = self.description["train_images"]
        earlier_seconds = sum(earlier["seconds"] for earlier in progress.history)
        row = {
            "epoch": (progress.step - 1) // progress.steps_per_epoch,
            "train_loss": train_loss,
            "valid_loss": valid_loss,
            "train_accuracy": train_accuracy,
            "valid_accuracy": valid_accuracy,
            "learning_rate": float(self.param_groups()[0]["lr"]),
            "seconds": progress.seconds - earlier_seconds,
            "image_scale": progress.image_scale,
            "train_share": 1.0 if self.hardest is None else len(self.hardest) / num_all,
        }
        progress.history.append(row)
        return row

    # ---- files ----

    def num_images_seen(self) -> int:
        """How many different training images were used so far: all, once an epoch is over.

        Roughly, with --class-balance: an undersampled epoch leaves some out.
        """
        num_images = self.description["train_images"]
        if self.progress.step >= self.progress.steps_per_epoch:
            return num_images
        return min(self.batch_slices[self.progress.step - 1].stop, num_images)

    def model_file(self) -> dict[str, Any]:
        """The content of a model file, with the weights of this moment or their moving average."""
        history = self.progress.history
        return {
            "model": self.eval_model().state_dict(),
            **self.description,
            "train_images": self.num_images_seen(),
            "metrics": dict(history[-1]) if history else {},
        }

    def saved_state(self) -> dict[str, Any]:
        """The content of last.pth: a model file, and everything else that a resumed run needs."""
        device = self.step_stats.device
        random_cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        progress = self.progress
        return {
            **self.model_file(),
            "model": self.model.state_dict(),  # not the moving average
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "step": progress.step,
            "total_steps": progress.total_steps,
            "seconds": progress.seconds,
            "cost": progress.cost,
            "history": progress.history,
            "step_stats": self.step_stats,
            "micro_batches": self.num_micro_batches,
            "image_losses": self.image_losses,
            "hardest": self.hardest,
            "random": torch.get_rng_state(),
            "random_cuda": random_cuda,
            "environment": self.environment,
        }

    def load(self, path: Path, group: Group, keep_total_steps: bool) -> None:
        """Load a last.pth; prints a note if results will not be bit-identical to an unbroken run.

        group: the processes that load it together. keep_total_steps: take over the number of steps
        that a time budget had found. Raises UserError for a file that does not fit.
        """
        saved = read_checkpoint(path, self.description["classes"])
        load_weights(self.model, saved["model"], path)
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            _load_optimizer(optimizer, state)
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            load_state(self.ema, saved["ema"])

        if EARLIER_DIGESTS in saved:
            self.description[EARLIER_DIGESTS] = saved[EARLIER_DIGESTS]
        self.progress.restore(saved, keep_total_steps)
        self.step_stats.copy_(saved["step_stats"])
        self.hardest = saved.get("hardest")  # older versions always took all images
        if self.image_losses is not None and saved.get("image_losses") is not None:
            self.image_losses.copy_(saved["image_losses"])

        torch.set_rng_state(saved["random"])
        device = self.step_stats.device
        if device.type == "cuda" and saved["random_cuda"] is not None:
            torch.cuda.set_rng_state(saved["random_cuda"], device)

        then = saved["environment"]
        changed = [
            name
            for name in self.environment
            if then.get(name) not in (None, self.environment[name])
        ]
        for name in changed:
            print(
                f"note: {name} was {then[name]}, is {self.environment[name]}: "
                "the last digits will differ from those of an unbroken run"
            )
        # in the same environment no fewer micro-batches than before, when memory may have run out;
        # all processes decide alike
        if group.max(len(changed)) == 0:
            for scale, count in saved["micro_batches"].items():
                self.num_micro_batches[scale] = max(count, self.num_micro_batches[scale])


def describe(
    model: nn.Module, config: Config, data: Dataset, versions: dict[str, Any]
) -> dict[str, Any]:
    """What a model file says of a network besides its weights; what does not change in training.

    versions: see reports.versions.
    """
    mean, std = data.mean, data.std
    if isinstance(model, PretrainedNetwork):
        mean, std = model.published.mean, model.published.std
    content: dict[str, Any] = {
        "config": asdict(config),
        "classes": data.classes,
        "mean": mean,
        "std": std,
        "image_size": data.train.images.shape[-1],
        "dataset": data.name,
        "train_images": len(data.train.labels),
        "fingerprint": data.fingerprint(),
        "split_rules": dataset.SPLIT_RULES,
        **digests_for_file(data),
        "versions": versions,
    }
    if data.pixel_ranges:
        content["pixel_ranges"] = pixel_range.to_json(data.pixel_ranges)
    return content


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state, but for the learning rates and what depends on the device."""
    for saved_group, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for name in ("lr", "initial_lr", "capturable"):
            if name in group:
                saved_group[name] = group[name]
    optimizer.load_state_dict(state)
