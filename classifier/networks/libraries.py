"""The networks of libraries by their names: torchvision:NAME and timm:NAME.

A library is imported only where a name asks for it.
"""

from collections.abc import Callable

from torch import nn

from classifier.networks import timm_models, torchvision_models

LIBRARIES = {"torchvision": torchvision_models, "timm": timm_models}


def check_name(model: str) -> None:
    """Raise UsageError unless the library has that network, UserError if it is not installed."""
    library, _, name = model.partition(":")
    LIBRARIES[library].check_name(name)


def factory(model: str) -> Callable[..., nn.Module]:
    """The factory of a library's network; its errors name the model."""
    library, _, name = model.partition(":")
    return LIBRARIES[library].factory(name)


def full_name(model: str) -> str:
    """The name of a pretrained network, with that of its weights where the library names them.

    A later version may have others, which are for other images.
    """
    library, _, name = model.partition(":")
    if library == "timm":
        return f"timm:{timm_models.full_name(name)}"
    return model


def published_size(model: str) -> int | None:
    """Width and height in pixels of the images that a model's published weights are made for.

    None for models that are in no library. Raises UsageError for an unknown name.
    """
    library, _, name = model.partition(":")
    if library not in LIBRARIES:
        return None
    return LIBRARIES[library].published_weights(name).size


def size_hint(model: str, image_size: int) -> str:
    """The image size a model is made for, in parentheses, or "" if that is not larger."""
    size = published_size(model)
    if size is None or size <= image_size:
        return ""
    return f" (it is made for images of {size} pixels: try a larger --image-size)"
