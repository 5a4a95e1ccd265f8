"""torchvision's classifiers, with new weights or ImageNet's, and training only the last layer.

torchvision is slow to import, so each function that needs it imports it.
"""

import difflib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from classifier.errors import NO_SPACE, UsageError, UserError
from classifier.files import NOT_WRITABLE

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum


def check_torchvision_name(name: str) -> None:
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

    check_torchvision_name(name)
    return get_model_weights(name).DEFAULT


def imagenet_size(model: str) -> int | None:
    """Width and height in pixels of the images that the weights of torchvision:NAME are made for.

    None for other models.
    """
    kind, _, name = model.partition(":")
    if kind != "torchvision":
        return None
    return imagenet_weights(name).transforms().crop_size[0]


class ImageNetClassifier(nn.Module):
    """A torchvision classifier that resizes images to the size its ImageNet weights are made for.

    The weights themselves are new, until load_pretrained loads others.

    Attributes:
        weights: which ImageNet weights these are (torchvision's WeightsEnum).
        size: width and height of the images, in pixels.
        normalisation: mean and standard deviation per channel, in [0, 1], of the images.
        body: the classifier.
    """

    def __init__(self, name: str, classes: int):
        super().__init__()
        self.weights = imagenet_weights(name)
        preset = self.weights.transforms()
        self.size: int = preset.crop_size[0]
        self.normalisation: tuple[list[float], list[float]] = (preset.mean, preset.std)
        self.body = torchvision_network(name, classes, self.size, transform_input=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images normalised as ImageNet's, float (N, 3, H, W), to logits (N, classes)."""
        if images.shape[-1] != self.size:
            size = (self.size, self.size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.body(images)


def torchvision_network(
    name: str, classes: int, image_size: int, transform_input: bool = False
) -> nn.Module:
    """A classifier of torchvision with new weights. Raises UsageError for an unknown name.

    transform_input: let googlenet and inception_v3 convert images from ImageNet's normalisation to
        the one that their ImageNet weights are made for.
    """
    from torchvision.models import get_model

    check_torchvision_name(name)
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options = {"image_size": image_size}
    if name in ("googlenet", "inception_v3"):  # with aux_logits they have several outputs
        options = {"aux_logits": False, "init_weights": True, "transform_input": transform_input}
    network = get_model(name, num_classes=classes, **options)

    # Some have a momentum of 0.0003 to 0.01: a short run would end before batch norm has averaged.
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = max(layer.momentum or 0.0, 0.1)
    return network


def torchvision_factory(name: str) -> Callable[..., nn.Module]:
    """The factory of torchvision:NAME; its errors name the model."""
    return functools.partial(_build_torchvision, name)


def _build_torchvision(
    name: str,
    classes: int = 10,
    channels: int = 3,
    image_size: int = 32,
    pretrained: bool = False,
) -> nn.Module:
    """A classifier of torchvision, as an ImageNetClassifier if it will get pretrained weights."""
    if channels != 3:
        raise UserError(f"--model torchvision:{name} takes images of 3 channels, not {channels}")
    if pretrained:
        return ImageNetClassifier(name, classes)
    return torchvision_network(name, classes, image_size)


def size_hint(model: str, image_size: int) -> str:
    """The image size torchvision:NAME is made for, in parentheses, or "" if it is not larger."""
    size = imagenet_size(model)
    if size is None or size <= image_size:
        return ""
    return f" (it is made for images of {size} pixels: try a larger --image-size)"


def download_imagenet_weights(network: ImageNetClassifier) -> dict[str, torch.Tensor]:
    """ImageNet weights, from torch.hub's cache or the network, under the names of `network`.

    Raises UserError if they cannot be downloaded or written, or are damaged.
    """
    url = network.weights.url
    try:
        weights = network.weights.get_state_dict(progress=True, check_hash=True)
    except OSError as error:
        if error.errno in NOT_WRITABLE | NO_SPACE:
            raise UserError(
                f"--pretrained: the ImageNet weights cannot be written to {torch.hub.get_dir()} "
                f"({error.strerror}): name another folder in the variable TORCH_HOME"
            ) from None
        # The cause that URLError wraps. HTTPError has a `reason` too, which is part of its message.
        reason = getattr(error, "reason", None)
        cause = reason if isinstance(reason, Exception) else error
        raise UserError(
            f"--pretrained: the ImageNet weights could not be downloaded ({cause}): "
            f"download {url} elsewhere and name the file with --init-from"
        ) from None
    except Exception as error:
        raise damaged_weights(url) from error
    return rename_torchvision_weights(weights)


def damaged_weights(source: str) -> UserError:
    """The error for a file, or the URL of one, that holds no weights."""
    return UserError(f"--pretrained: {source} is damaged or not a file of weights")


def rename_torchvision_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torchvision's own weights under the names that they have in an ImageNetClassifier."""
    return {f"body.{name}": value for name, value in weights.items()}


def load_pretrained(
    network: ImageNetClassifier,
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
        loaded.update(last_layer_weights(network))
    for name, value in needed.items():
        if name not in loaded or loaded[name].shape != value.shape:
            raise UserError(
                f"--pretrained: {source} holds another network: "
                f"{name} is missing or of another shape"
            )
    network.load_state_dict(loaded)


def last_layer(network: nn.Module) -> tuple[str, nn.Module]:
    """The name of the last layer that has weights, the classifier, and that layer."""
    layers = []
    for name, layer in network.named_modules():
        if list(layer.parameters(recurse=False)):
            layers.append((name, layer))
    return layers[-1]


def last_layer_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The part of a network's state dict that belongs to its last layer."""
    name, layer = last_layer(network)
    return layer.state_dict(prefix=f"{name}.")


def freeze_all_but_last_layer(network: nn.Module) -> None:
    """Train nothing but the last layer."""
    network.requires_grad_(False)
    _, layer = last_layer(network)
    layer.requires_grad_(True)
