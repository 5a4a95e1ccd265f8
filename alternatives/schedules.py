"""What `--scheduler` takes besides the script's own `onecycle`.

Each gives the learning rate as a share of its highest, from the run's progress in [0, 1) and its validation losses so
far. A function of these alone: resuming needs no other state.
"""

import math

import torch


def none(progress: float, losses: list[float]) -> float:
    """The same rate throughout."""
    return 1.0


def cosine(progress: float, losses: list[float]) -> float:
    """Down along half a cosine (Loshchilov and Hutter, 2016)."""
    return (1 + math.cos(math.pi * progress)) / 2


def step(progress: float, losses: list[float]) -> float:
    """A tenth from 50 % of the run on, a hundredth from 75 %."""
    return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))


def plateau(progress: float, losses: list[float]) -> float:
    """A tenth whenever three epochs in a row bring no lower loss: torch's ReduceLROnPlateau."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2, threshold=0.0)
    for loss in losses:
        scheduler.step(loss)
    return optimizer.param_groups[0]["lr"]
