"""timm's networks, with new weights or those of its hub: --model timm:NAME.

NAME may name the weights, too: resnet18.a1_in1k. timm (https://github.com/huggingface/
pytorch-image-models) is optional and slow to import, so each function that needs it imports it.
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
    from timm.models import PretrainedCfg

HUB = "https://huggingface.co"


def check_installed(name: str) -> None:
    """Raise UserError unless timm is installed."""
    try:
        import timm  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--model timm:{name} needs the package {error.name}: "
            "pip install -r requirements-extras.txt"
        ) from None


def check_name(name: str) -> None:
    """Raise UsageError unless timm has a network of that name, with or without those weights."""
    check_installed(name)
    import timm

    with_weights = timm.list_models(include_tags=True)
    names = [*timm.list_models(), *with_weights]
    if name in names:
        return
    architecture = name.partition(".")[0]
    same_architecture = [each for each in with_weights if each.startswith(f"{architecture}.")]
    closest = same_architecture or difflib.get_close_matches(name, names, n=3)
    known = f"but {', '.join(closest)}" if closest else "timm.list_models() in Python lists them"
    raise UsageError(f"unknown model timm:{name}: timm has no network {name}, {known}")


def full_name(name: str) -> str:
    """The name with that of its weights: resnet18 is resnet18.a1_in1k, in this version of timm."""
    config = _pretrained_config(name)
    if "." in name or not config.tag:
        return name
    return f"{name}.{config.tag}"


def _pretrained_config(name: str) -> "PretrainedCfg":
    """What timm knows of a network's weights. Raises UsageError for an unknown name."""
    check_name(name)
    from timm.models import PretrainedCfg, get_pretrained_cfg

    return get_pretrained_cfg(name) or PretrainedCfg()


def published_weights(name: str) -> PublishedWeights:
    """The weights that timm has for a network. Raises UsageError for an unknown name."""
    config = _pretrained_config(name)
    return PublishedWeights(
        url=f"{HUB}/{config.hf_hub_id}" if config.hf_hub_id else str(config.url),
        size=config.input_size[-1],
        mean=list(config.mean),
        std=list(config.std),
        cache="HF_HOME" if config.hf_hub_id else "TORCH_HOME",
        fetch=functools.partial(_fetch, name),
    )


def _fetch(name: str) -> dict[str, torch.Tensor]:
    """Weights under timm's names, from the cache or the network.

    timm reads some of them from files of other programs: it renames them while it loads them.
    """
    import timm

    if not _pretrained_config(name).has_weights:
        raise UsageError(f"--pretrained: timm has no weights for {name}")
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name, pretrained=True).state_dict()


def new_network(
    name: str, classes: int, channels: int, image_size: int, dropout: float | None = None
) -> nn.Module:
    """A network of timm with new weights. Raises UsageError for an unknown name."""
    config = _pretrained_config(name)
    import timm

    options: dict[str, Any] = {}
    if config.fixed_input_size:  # others take images of any size, and no such option
        options["img_size"] = image_size
    network = timm.create_model(
        name, num_classes=classes, in_chans=channels, drop_rate=dropout, **options
    )
    raise_batch_norm_momentum(network)
    return network


def factory(name: str) -> Callable[..., nn.Module]:
    """The factory of timm:NAME; its errors name the model."""
    return functools.partial(_build, name)


def _build(
    name: str,
    classes: int = 10,
    channels: int = 3,
    image_size: int = 32,
    dropout: float | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """A network of timm, as a PretrainedNetwork if it will get pretrained weights."""
    if not pretrained:
        return new_network(name, classes, channels, image_size, dropout)
    published = published_weights(name)
    if channels != len(published.mean):
        raise UserError(
            f"--pretrained: the weights of timm:{name} are for images of "
            f"{len(published.mean)} channels, not {channels}"
        )
    body = new_network(name, classes, channels, published.size, dropout)
    return PretrainedNetwork(body, published)
