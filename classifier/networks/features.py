"""What a network computes on its way from an image to the logits, pooled to a few numbers.

stages = find_stages(network, run)                names of parts of the network
with tapped(network, stages, compute) as found:   what `compute` makes of the features of each batch
    network(images)
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from classifier.networks.pretrained import last_layers

MAX_STAGES = 5
MAX_CHANNELS = 256  # of a stage

Features = list[torch.Tensor]  # of each stage float32 (N, D)


def _parts(network: nn.Module) -> dict[str, nn.Module]:
    """The parts that a network computes one after the other, by name, containers opened."""
    prefix, root = "", network
    children = dict(root.named_children())
    while len(children) == 1:  # a wrapper around the network proper
        ((name, root),) = children.items()
        prefix += f"{name}."
        children = dict(root.named_children())
    parts: dict[str, nn.Module] = {}

    def add(name: str, module: nn.Module) -> None:
        if not isinstance(module, nn.Sequential):
            parts[name] = module
            return
        for child_name, child in module.named_children():
            add(f"{name}.{child_name}", child)

    for name, child in children.items():
        add(prefix + name, child)
    return parts


def find_stages(network: nn.Module, run: Callable[[], object]) -> list[str]:
    """The last part of a network that gives feature maps of a size, for each size.

    At most MAX_STAGES, the last ones. run: sends images through the network.
    """
    stages: dict[tuple[int, ...], str] = {}
    parts = _parts(network)
    for name in last_layers(network):
        parts.pop(name, None)

    def record(name: str, output: Any) -> None:
        if not isinstance(output, torch.Tensor) or output.ndim not in (3, 4):
            return
        size = tuple(output.shape[2:]) if output.ndim == 4 else (output.shape[1],)
        if min(size) > 1:
            stages.pop(size, None)  # a later part moves the size to the end of the order
            stages[size] = name

    with contextlib.ExitStack() as hooks:
        for name, part in parts.items():
            handle = part.register_forward_hook(
                lambda part, inputs, output, name=name: record(name, output)
            )
            hooks.callback(handle.remove)
        run()
    return list(stages.values())[-MAX_STAGES:]


def pool(output: torch.Tensor) -> torch.Tensor:
    """Mean and logarithm of the standard deviation of each channel over an image: float (N, 2 C).

    The logarithm, because contrast differs by factors: so a blank image is far from all others.

    output: feature maps, float (N, C, H, W), or tokens, float (N, T, C); float (N, C) stays as it
    is. Of many channels, MAX_CHANNELS are taken, evenly spaced.
    """
    if output.ndim > 2:
        dims = (2, 3) if output.ndim == 4 else (1,)
        mean = output.mean(dims, keepdim=True)
        variance = (output - mean).square().mean(dims)
        pooled = [mean.squeeze(dims), (variance + 1e-4).log() / 2]
    else:
        pooled = [output]
    channels = pooled[0].shape[1]
    step = -(-channels // MAX_CHANNELS)
    return torch.cat([each[:, ::step] for each in pooled], 1).float()


class Tap:
    """Reads, while it is open, what a network computes on the way.

    Attributes:
        stages: names of parts of the network, whose outputs are read. The input of the last layer
            is read as well.
    """

    def __init__(self, network: nn.Module, stages: list[str]):
        self.stages = stages
        self._network = network
        self._pooled: dict[str, torch.Tensor] = {}
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> "Tap":
        modules = dict(self._network.named_modules())
        for name in self.stages:
            handle = modules[name].register_forward_hook(
                lambda module, inputs, output, name=name: self._keep(name, output)
            )
            self._hooks.callback(handle.remove)
        layer = next(iter(last_layers(self._network).values()))
        handle = layer.register_forward_pre_hook(lambda module, inputs: self._keep("", inputs[0]))
        self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def _keep(self, name: str, output: torch.Tensor) -> None:
        self._pooled[name] = pool(output)

    def take(self) -> Features:
        """The features of the latest images. Raises KeyError for a stage that was not computed."""
        features = [self._pooled[name] for name in (*self.stages, "")]
        self._pooled = {}
        return features


@contextlib.contextmanager
def tapped(
    network: nn.Module, stages: list[str], compute: Callable[[Features, torch.Tensor], Any]
) -> Iterator[list[Any]]:
    """A list that gets what is computed of each batch that the network classifies.

    compute: called with the features and logits of a batch.
    """
    results: list[Any] = []

    def record(module: nn.Module, inputs: Any, logits: torch.Tensor) -> None:
        results.append(compute(tap.take(), logits.float()))

    with Tap(network, stages) as tap:
        handle = network.register_forward_hook(record)
        try:
            yield results
        finally:
            handle.remove()
