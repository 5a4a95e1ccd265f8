"""Batches that do not fit into a GPU's memory, or with a large network into any: computed in parts."""

import contextlib
import copy
import math
from typing import Any

import torch

CPU_BYTES = 2 * 2**30  # that a CPU may keep for the backward pass: laptops have 8 GiB


def kept_bytes(trainer: Any, count: int) -> int:
    """How much a process keeps for the backward pass: of the weights, and of so many images, computed at once."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    few = [drawn[: count * trainer.world] for drawn in trainer.plan(0)]
    with torch.random.fork_rng([]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.backward(copy.deepcopy(trainer.model).train(), few, 1.0)
    return sum(sizes.values())


def split(trainer: Any, parts: int, why: str) -> None:
    """Compute a trainer's batches in so many parts from now on, and say so."""
    trainer.parts = parts
    words = f"{parts} parts of {math.ceil(trainer.share / parts)} images whose gradients add up"
    print(f"note: {why}: a batch is now computed as {words}; batch norm sees the smaller batch")


def fit_cpu(trainer: Any) -> None:
    """Split batches by CPU_BYTES, to 16 images at least: too much memory is no error there, but swaps or is killed."""
    usual, trainer.parts, image = trainer.parts, 1, 0.0
    with contextlib.suppress(RuntimeError):  # the trial step will meet it as well
        image = (kept_bytes(trainer, 8) - kept_bytes(trainer, 4)) / 4  # the weights are in both
    trainer.parts = usual
    if (parts := min(math.ceil(trainer.share * image / CPU_BYTES), trainer.share // 16)) > usual:
        split(trainer, parts, f"an image takes {image / 2**20:.0f} MiB")


def settle_batch(trainer: Any) -> bool:
    """Split a trainer's batches into more `parts` until a trial step, on a copy of the network, fits into memory.

    Also notes whether the network has weights that get no gradient. False if not even a single image fits.
    """
    if trainer.device.type == "cpu" and trainer.share >= 32:
        fit_cpu(trainer)
    first = [drawn[trainer.places[0]] for drawn in trainer.plan(0)]
    while True:
        try:
            trial = copy.deepcopy(trainer.model).train()
            trainer.backward(trial, first, 1.0)
            trainer.unused = any(each.grad is None for each in trial.parameters() if each.requires_grad)
            return True
        except RuntimeError as error:  # torch.OutOfMemoryError is one; MPS raises the plain kind
            if "out of memory" not in str(error) and "allocate memory" not in str(error):
                raise
        if trainer.parts >= trainer.share:
            return False
        split(trainer, min(2 * trainer.parts, trainer.share), "out of memory")
