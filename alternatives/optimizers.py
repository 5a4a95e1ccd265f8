"""What `--optimizer` takes besides the script's own `muon`: torch's, with customary settings."""

from collections.abc import Iterable

import torch

DEFAULTS: dict[str, dict[str, float]] = {  # adam's rate was chosen on validation images, the others are customary
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "adam": {"lr": 0.005, "momentum": 0.9, "weight_decay": 0.0},
    "adamw": {"lr": 0.005, "momentum": 0.9, "weight_decay": 0.05},
    "rmsprop": {"lr": 0.0005, "momentum": 0.9, "weight_decay": 0.0},
}


def build(
    name: str, weights: Iterable[torch.Tensor], lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser of that name; Adam and AdamW keep torch's own betas instead of `momentum`."""
    if name == "sgd":
        return torch.optim.SGD(weights, lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    if name == "rmsprop":
        return torch.optim.RMSprop(weights, lr, momentum=momentum, weight_decay=weight_decay)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](weights, lr, weight_decay=weight_decay)
