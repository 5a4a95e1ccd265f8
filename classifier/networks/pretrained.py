"""Networks with published weights, and training only the last layer.

Which weights a library publishes is known to torchvision_models and timm_models.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from classifier.checkpoints import load_state
from classifier.errors import NO_SPACE, UserError
from classifier.files import NOT_WRITABLE

# ---- Published weights ---------------------------------------------------------------------------


class PublishedWeights(NamedTuple):
    """What a library tells of the weights that it publishes for a network.

    Attributes:
        url: where they are, for errors.
        size: width and height in pixels of the images that they are made for.
        mean, std: normalisation of these images, per channel, in [0, 1].
        cache: the environment variable that names another folder for downloads.
        fetch: returns them under the names of the library's own network, from the folder for
            downloads or from the network.
    """

    url: str
    size: int
    mean: list[float]
    std: list[float]
    cache: str
    fetch: Callable[[], dict[str, torch.Tensor]]


class PretrainedNetwork(nn.Module):
    """A library's network that resizes images to the size its published weights are made for.

    The weights themselves are new, until load_pretrained loads others.

    Attributes:
        body: the network.
        published: the weights that are published for it.
        size: width and height in pixels of the images that these are made for.
    """

    def __init__(self, body: nn.Module, published: PublishedWeights):
        super().__init__()
        self.body = body
        self.published = published
        self.size = published.size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images normalised for the published weights, float (N, 3, H, W), to logits."""
        if images.shape[-1] != self.size:
            size = (self.size, self.size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.body(images)


def raise_batch_norm_momentum(network: nn.Module) -> None:
    """Set the momentum of batch norm to 0.1 where it is lower.

    Some networks have 0.0003 to 0.01: a short run would end before batch norm has averaged.
    """
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = max(layer.momentum or 0.0, 0.1)


def download_weights(network: PretrainedNetwork) -> dict[str, torch.Tensor]:
    """The published weights, from the disk or the network, under the names of `network`.

    Raises UserError if they cannot be downloaded or written, or are damaged.
    """
    published = network.published
    try:
        weights = published.fetch()
    except UserError:
        raise
    except OSError as error:
        if error.errno in NOT_WRITABLE | NO_SPACE:
            place = f" to {error.filename}" if error.filename else ""
            raise UserError(
                f"--pretrained: the weights cannot be written{place} ({error.strerror}): "
                f"name another folder in the variable {published.cache}"
            ) from None
        # The cause that URLError wraps. HTTPError has a `reason` too, which is part of its message.
        reason = getattr(error, "reason", None)
        cause = reason if isinstance(reason, Exception) else error
        raise UserError(
            f"--pretrained: the weights could not be downloaded ({cause}): "
            f"download {published.url} elsewhere and name the file with --init-from"
        ) from None
    except Exception as error:
        raise damaged_weights(published.url) from error
    return rename_published_weights(weights)


def damaged_weights(source: str) -> UserError:
    """The error for a file, or the URL of one, that holds no weights."""
    return UserError(f"--pretrained: {source} is damaged or not a file of weights")


def rename_published_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A library's own weights under the names that they have in a PretrainedNetwork."""
    return {f"body.{name}": value for name, value in weights.items()}


def load_pretrained(
    network: PretrainedNetwork,
    weights: dict[str, torch.Tensor],
    source: str,
    keep_last_layer: bool,
) -> None:
    """Load weights into a network; weights that it does not have are left out.

    Args:
        weights: under the names of `network`.
        source: their file or URL, for errors.
        keep_last_layer: load the last layer, too; False if it is for other classes.

    Raises UserError if weights are missing or of another shape.
    """
    needed = network.state_dict()
    loaded = {}
    for name, value in weights.items():
        if name in needed and isinstance(value, torch.Tensor):
            loaded[name] = value
    if not keep_last_layer:
        loaded.update(new_last_layer_weights(network))
    for name, value in needed.items():
        if name not in loaded or loaded[name].shape != value.shape:
            raise UserError(
                f"--pretrained: {source} holds another network: "
                f"{name} is missing or of another shape"
            )
    load_state(network, loaded)


# ---- The last layer ------------------------------------------------------------------------------


def layers_with_weights(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that hold weights themselves, by their names, from input to output."""
    layers = {}
    for name, layer in network.named_modules():
        if list(layer.parameters(recurse=False)):
            layers[name] = layer
    return layers


def last_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The last layer that has weights, the classifier, by its name.

    timm's networks tell which one it is; a few have two, whose logits are averaged.
    """
    layers = layers_with_weights(network)
    body = network.body if isinstance(network, PretrainedNetwork) else network
    if type(body).__module__.startswith("timm."):
        told = body.get_classifier()  # type: ignore[operator]
        classifiers = told if isinstance(told, tuple) else (told,)
        parts = {part for classifier in classifiers for part in classifier.modules()}
        found = {name: layer for name, layer in layers.items() if layer in parts}
        if found:
            return found
    return dict([layers.popitem()])


def last_layer_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The part of a network's state dict that belongs to its last layer."""
    weights: dict[str, torch.Tensor] = {}
    for name, layer in last_layers(network).items():
        weights.update(layer.state_dict(prefix=f"{name}."))
    return weights


def new_last_layer_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """Initial weights of the last layer for new classes, as in its state dict: small, no biases.

    Libraries initialise it for a training of all layers. In EfficientNet its weights are of the
    order of 1/√classes, so that a few classes begin with logits of ten and more, and a short run
    does little but unlearn these. A standard deviation of 0.01 is that of torchvision's MobileNet.
    Zeros would keep a last layer that a ReLU follows from learning at all.

    What is no Linear or Conv2d with a weight of its own keeps its values, and so does a hidden
    layer where the classifier has several. Random states stay as they are.
    """
    weights = last_layer_weights(network)
    *_, last = weights.values()  # its first dimension is the number of classes
    with torch.random.fork_rng(devices=[]):
        for name, layer in last_layers(network).items():
            weight = weights.get(f"{name}.weight")  # None where it is computed (weight_norm)
            if weight is None or not isinstance(layer, (nn.Linear, nn.Conv2d)):
                continue
            if weight.shape[:1] == last.shape[:1]:
                weights[f"{name}.weight"] = torch.randn_like(weight) * 0.01
                if layer.bias is not None:
                    weights[f"{name}.bias"] = torch.zeros_like(layer.bias)
    return weights


def freeze_all_but_last_layer(network: nn.Module) -> None:
    """Train nothing but the last layer."""
    network.requires_grad_(False)
    for layer in last_layers(network).values():
        layer.requires_grad_(True)
