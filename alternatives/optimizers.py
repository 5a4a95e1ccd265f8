"""What `--optimizer` takes besides `muon`: torch's, with customary settings. And `--ema` and `--grad-clip`."""

import math
from typing import Any

import torch

DEFAULTS: dict[str, dict[str, float]] = {  # adam's rate was chosen on validation images, the others are customary
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "adam": {"lr": 0.005, "momentum": 0.9, "weight_decay": 0.0},
    "adamw": {"lr": 0.005, "momentum": 0.9, "weight_decay": 0.05},
    "rmsprop": {"lr": 0.0005, "momentum": 0.9, "weight_decay": 0.0},
}


def build(name: str, weights: list[torch.Tensor], lr: float, momentum: float, decay: float) -> torch.optim.Optimizer:
    """The optimiser of that name; Adam and AdamW keep torch's own betas instead of `momentum`."""
    if name == "sgd":
        return torch.optim.SGD(weights, lr, momentum, weight_decay=decay, nesterov=momentum > 0)
    if name == "rmsprop":
        return torch.optim.RMSprop(weights, lr, momentum=momentum, weight_decay=decay)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](weights, lr, weight_decay=decay)


def average(model: torch.nn.Module, steps: int) -> torch.optim.swa_utils.AveragedModel:
    """What keeps a moving average of the weights that reaches back over about so many steps."""
    return torch.optim.swa_utils.AveragedModel(
        model, next(model.parameters()).device, use_buffers=True,
        avg_fn=lambda mean, new, n: mean + (new - mean) / torch.as_tensor(n + 1).clamp(max=steps),
    )  # fmt: skip


def clip(trainer: Any) -> None:
    """Scale a trainer's gradients down to the norm of --grad-clip, where theirs is larger."""
    for optimizer in trainer.optimizers:
        trainer.scaler.unscale_(optimizer)
    gradients = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
    # the scaler skips the optimiser that overflowed: its NaN must not spread to the other
    norm = torch.nn.utils.get_total_norm(gradients).nan_to_num(nan=math.inf, posinf=math.inf)
    torch.nn.utils.clip_grads_with_norm_(trainer.model.parameters(), trainer.config.grad_clip, norm)
