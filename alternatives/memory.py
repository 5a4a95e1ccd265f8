"""Batches that do not fit into a GPU's memory, or with a large network into any: computed in parts."""

import copy
import math
from typing import Any


def settle_batch(trainer: Any) -> bool:
    """Split a trainer's batches into more `parts` until a trial step, on a copy of the network, fits into memory.

    Also notes whether the network has weights that get no gradient. False if not even a single image fits.
    """
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
        trainer.parts = min(2 * trainer.parts, trainer.share)
        parts = f"{trainer.parts} parts of {math.ceil(trainer.share / trainer.parts)} images whose gradients add up"
        print(f"note: out of memory: a batch is now computed as {parts}; batch norm sees the smaller batch")
