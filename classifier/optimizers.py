"""Optimisers besides the script's own Muon, learning rates, the moving average, clipping."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def build_optimizer(
    name: str,
    weights: Sequence[torch.Tensor] | Sequence[dict[str, Any]],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """One of torch's optimisers: sgd (with Nesterov's momentum), adam, adamw or rmsprop.

    Adam and AdamW do not take `momentum`: they keep torch's own betas.

    weights: these, or parameter groups, whose own learning rates take precedence over `lr`.
    """
    if name == "sgd":
        nesterov = momentum > 0  # torch refuses it without momentum
        return torch.optim.SGD(weights, lr, momentum, weight_decay=weight_decay, nesterov=nesterov)
    if name == "adam":
        return torch.optim.Adam(weights, lr, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(weights, lr, weight_decay=weight_decay)
    if name == "rmsprop":
        return torch.optim.RMSprop(weights, lr, momentum=momentum, weight_decay=weight_decay)
    raise ValueError(f"no optimiser {name!r}")


def moving_average(model: nn.Module, steps: int) -> AveragedModel:
    """A moving average of a model's weights and buffers that reaches back over about `steps` steps.

    Over the first `steps` updates it is their plain mean. After that it is exponential, and each
    update counts for 1 / steps.
    """

    def update_average(
        average: torch.Tensor, current: torch.Tensor, num_averaged: torch.Tensor | int
    ) -> torch.Tensor:
        count = torch.as_tensor(num_averaged + 1).clamp(max=steps)
        return average + (current - average) / count

    device = next(model.parameters()).device
    return AveragedModel(model, device, avg_fn=update_average, use_buffers=True)


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    optimizers: Iterable[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    max_norm: float,
) -> None:
    """Scale all gradients down so that their norm, taken together, is at most `max_norm`.

    scaler: undoes its scaling first; one that is disabled does nothing.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    # The scaler skips an optimiser whose gradients overflowed. NaN would spread from them to the
    # gradients of the other optimiser; an infinite norm makes those 0.
    norm = norm.nan_to_num(nan=math.inf, posinf=math.inf)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set each learning rate to this share of its peak, which is kept as "initial_lr"."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            lr = group["initial_lr"] * factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
