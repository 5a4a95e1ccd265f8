"""What `--augment` takes besides the script's own flip and crop, by Kornia: each image of a batch gets its own draw."""

import math
from collections.abc import Callable
from typing import Any

import kornia.augmentation as K
import torch

Augmentation = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
STRENGTHS = {  # of each where none is given, and the largest one
    "rotate": (20.0, 180.0),  # by up to so many degrees
    "brightness": (0.2, 1.0),  # times 1 ± so much, as the next two
    "contrast": (0.2, 1.0),
    "saturation": (0.2, 1.0),
    "hue": (0.05, 0.5),  # by up to so much of the colour circle
    "sharpness": (1.0, 10.0),  # in every other image, sharper by up to so much
    "erase": (0.75, 1.0),  # in such a share of the images, 2 to 33 % of the area (Zhong et al., 2017)
    "cutout": (0.5, 0.99),  # a grey square, so wide as a share of the image (DeVries and Taylor, 2017)
    "mixup": (0.4, 0.5),  # with up to so much of another image, and of its label (Zhang et al., 2017)
    "cutmix": (1.0, 100.0),  # a piece of another image, its area drawn from Beta(F, F) (Yun et al., 2019)
}


def make(name: str, strength: float) -> torch.nn.Module:
    """One of STRENGTHS as a Kornia module for float images (B, C, H, W) in [0, 1]."""
    if name == "rotate":
        return K.RandomAffine(strength, padding_mode="reflection", p=1.0)
    if name in ("brightness", "contrast", "saturation", "hue"):
        only: dict[str, Any] = {name: strength}
        return K.ColorJitter(**only, p=1.0)
    if name == "sharpness":
        return K.RandomSharpness(strength, p=0.5)
    if name == "erase":
        return K.RandomErasing(value=0.5, p=strength)
    if name == "cutout":
        return K.RandomErasing((strength**2, strength**2), (1.0, 1.0), value=0.5, p=1.0)
    mixed: list[Any] = ["input", "class"]
    if name == "mixup":
        return K.RandomMixUpV2((0.0, strength), p=1.0, data_keys=mixed)
    return K.RandomCutMixV2(beta=strength, p=1.0, data_keys=mixed, use_correct_lambda=True)


def build(steps: dict[str, str], classes: int) -> Augmentation:
    """A function for uint8 images (B, C, H, W) and int64 labels (B,), from names and strengths ("" for the usual one).

    It returns float images in [0, 255] and the labels, which mixing makes shares (B, classes). Of mixup and cutmix
    together, each batch gets one. Raises ValueError for what is no augmentation and for a strength out of range.
    """
    own: list[torch.nn.Module] = []
    mixing: list[torch.nn.Module] = []
    for name, text in steps.items():
        if name not in STRENGTHS:
            raise ValueError(f"{name} is none of flip, crop, {', '.join(STRENGTHS)}")
        usual, most = STRENGTHS[name]
        try:
            strength = float(text or usual)
        except ValueError:
            strength = math.nan
        if not 0 < strength <= most:
            raise ValueError(f"{name}={text} must be above 0 and at most {most:g}")
        (mixing if name in ("mixup", "cutmix") else own).append(make(name, strength))

    def augment(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = images / 255
        for step in own:
            images = step(images)
        if mixing:
            step = mixing[int(torch.randint(len(mixing), ()))]
            images, mixed = step(images, labels)
            first, second, share = mixed.reshape(-1, 3).unbind(1)
            share = share if isinstance(step, K.RandomMixUpV2) else 1 - share  # cutmix names the other one's
            shares = torch.stack([1 - share, share], 1)
            labels = torch.zeros(len(labels), classes, device=labels.device)
            labels.scatter_add_(1, torch.stack([first, second], 1).long(), shares)
        return images * 255, labels

    return augment
