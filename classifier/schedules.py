"""The learning-rate schedules of --scheduler besides the script's own `linear`.

Each gives the learning rate as a share of its peak. It depends on nothing but how far the run is
and on its losses, so that a resumed run needs no other state.
"""

import math

import torch


def lr_factor(name: str, fraction: float, losses: list[float]) -> float:
    """The learning rate as a share of its peak, in [0, 1].

    Args:
        name: cosine, step, plateau or none.
        fraction: share of the run that is done, in [0, 1).
        losses: validation loss of each epoch on full-size images so far.
    """
    if name == "cosine":
        return _cosine(fraction)
    if name == "step":
        return _step(fraction)
    if name == "plateau":
        return _plateau(losses)
    if name == "none":
        return 1.0
    raise ValueError(f"no learning-rate schedule {name!r}")


def _cosine(fraction: float) -> float:
    """Half a cosine, from 1 down to 0 (Loshchilov and Hutter, 2016)."""
    return (1 + math.cos(math.pi * fraction)) / 2


def _step(fraction: float) -> float:
    """A tenth from half of the run on, a hundredth from three quarters on."""
    if fraction < 0.5:
        return 1.0
    if fraction < 0.75:
        return 0.1
    return 0.1**2


def _plateau(losses: list[float]) -> float:
    """A tenth whenever three epochs in a row bring no lower loss: torch's ReduceLROnPlateau."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2, threshold=0.0)
    for loss in losses:
        scheduler.step(loss)
    return optimizer.param_groups[0]["lr"]
