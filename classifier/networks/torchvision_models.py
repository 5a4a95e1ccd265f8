"""torchvision's classifiers, with new weights or ImageNet's: --model torchvision:NAME.

torchvision is slow to import, so each function that needs it imports it.
"""

import difflib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from classifier.errors import UsageError, UserError
from classifier.networks.pretrained import (
    PretrainedNetwork,
    PublishedWeights,
    raise_batch_norm_momentum,
)

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum


def check_name(name: str) -> None:
    """Raise UsageError unless torchvision has a classifier of that name."""
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        closest = difflib.get_close_matches(name, names, n=3)
        known = ", ".join(closest or names)
        raise UsageError(
            f"unknown model torchvision:{name}: torchvision has no classifier {name}, but {known}"
        )


def imagenet_weights(name: str) -> "WeightsEnum":
    """The entry of the best ImageNet weights that torchvision has for a classifier.

    It holds their URL and the preprocessing of images that they are made for. Nothing is
    downloaded. Raises UsageError for an unknown name.
    """
    from torchvision.models import get_model_weights

    check_name(name)
    return get_model_weights(name).DEFAULT


def published_weights(name: str) -> PublishedWeights:
    """The best ImageNet weights of a classifier. Raises UsageError for an unknown name."""
    weights = imagenet_weights(name)
    preset = weights.transforms()
    return PublishedWeights(
        url=weights.url,
        size=preset.crop_size[0],
        mean=preset.mean,
        std=preset.std,
        cache="TORCH_HOME",
        fetch=functools.partial(_fetch, name),
    )


def _fetch(name: str) -> dict[str, torch.Tensor]:
    """ImageNet weights under torchvision's names, from torch.hub's cache or the network."""
    return imagenet_weights(name).get_state_dict(progress=True, check_hash=True)


def pretrained_network(name: str, classes: int) -> PretrainedNetwork:
    """A classifier that will get ImageNet weights. Raises UsageError for an unknown name."""
    published = published_weights(name)
    return PretrainedNetwork(
        new_network(name, classes, published.size, transform_input=True), published
    )


def new_network(
    name: str, classes: int, image_size: int, transform_input: bool = False
) -> nn.Module:
    """A classifier of torchvision with new weights. Raises UsageError for an unknown name.

    transform_input: let googlenet and inception_v3 convert images from ImageNet's normalisation to
        the one that their ImageNet weights are made for.
    """
    from torchvision.models import get_model

    check_name(name)
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options = {"image_size": image_size}
    if name in ("googlenet", "inception_v3"):  # with aux_logits they have several outputs
        options = {"aux_logits": False, "init_weights": True, "transform_input": transform_input}
    network = get_model(name, num_classes=classes, **options)
    raise_batch_norm_momentum(network)
    return network


def factory(name: str) -> Callable[..., nn.Module]:
    """The factory of torchvision:NAME; its errors name the model."""
    return functools.partial(_build, name)


def _build(
    name: str,
    classes: int = 10,
    channels: int = 3,
    image_size: int = 32,
    pretrained: bool = False,
) -> nn.Module:
    """A classifier of torchvision, as a PretrainedNetwork if it will get pretrained weights."""
    if channels != 3:
        raise UserError(f"--model torchvision:{name} takes images of 3 channels, not {channels}")
    if pretrained:
        return pretrained_network(name, classes)
    return new_network(name, classes, image_size)
