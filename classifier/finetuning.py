"""Fine-tuning: the last layer learns first, and layers near the input learn more slowly.

The last layer starts from random weights, and the gradients that it sends back at first would spoil
the others (Howard and Ruder, 2018, https://arxiv.org/abs/1801.06146).

weights = layer_groups(model, config)                       with their own learning rates
set_trained_layers(model, optimizers, head_only)            before each step
fraction = phase_fraction(fraction, head_first)
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from classifier.config import Config
from classifier.errors import UsageError
from classifier.networks.pretrained import last_layers, layers_with_weights

# Number of parameter groups for the layers before the last one. An optimiser computes one group at
# a time, so many of them are slow.
BODY_GROUPS = 7


def has_groups(config: Config) -> bool:
    """Whether some layers are trained differently from others."""
    return config.head_first > 0 or config.first_layer_lr != 1


def check(config: Config) -> None:
    """Raise UsageError if layers are to be trained differently where that makes no sense.

    config: with all defaults.
    """
    if not has_groups(config):
        return
    option = "--head-first" if config.head_first else "--first-layer-lr"
    if not config.init_from and not config.pretrained:
        raise UsageError(f"{option} is for trained weights: it needs --init-from or --pretrained")
    if config.optimizer == "muon":  # its steps set the norm of each weight, whatever their rate
        raise UsageError(f"{option} does not work with muon: add --optimizer adamw")


def layer_groups(
    model: nn.Module, config: Config
) -> Sequence[torch.Tensor] | Sequence[dict[str, Any]]:
    """The weights that are trained, as an optimiser takes them.

    By default a list of them. Where layers are trained differently, parameter groups with their
    peak learning rates: first the last layer, then the layers before it, back to the input. The
    rates fall in geometric steps down to --first-layer-lr times --lr.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not has_groups(config):
        return trained

    head = last_layers(model)
    body = [layer for name, layer in layers_with_weights(model).items() if name not in head]
    members: dict[int, list[torch.Tensor]] = {number: [] for number in range(BODY_GROUPS + 1)}
    for layer in head.values():
        members[0] += layer.parameters(recurse=False)
    for position, layer in enumerate(reversed(body)):
        number = 1 + position * BODY_GROUPS // len(body)
        members[number] += layer.parameters(recurse=False)

    groups = []
    left = {id(weight) for weight in trained}
    for number, weights in members.items():
        own = [weight for weight in weights if id(weight) in left]
        left -= {id(weight) for weight in own}  # two layers may share a weight
        if own:
            lr = config.lr * config.first_layer_lr ** (number / BODY_GROUPS)
            groups.append({"params": own, "lr": lr, "is_last_layer": number == 0})
    return groups


def set_trained_layers(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], head_only: bool
) -> None:
    """Train only the last layer from now on, or all layers again.

    While the others wait, batch norm keeps the statistics of the weights that were loaded, as with
    --freeze. The optimisers must have been built from layer_groups.
    """
    model.train(not head_only)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not group["is_last_layer"]:
                for weight in group["params"]:
                    weight.requires_grad_(not head_only)


def phase_fraction(fraction: float, head_first: float) -> float:
    """How far a run is in its phase, in [0, 1): each has its own warm-up and decay.

    fraction: share of the run that is done. head_first: share of the run that the first phase
    takes; with 0 there is only one phase.
    """
    if fraction < head_first:
        return fraction / head_first
    return (fraction - head_first) / (1 - head_first)
