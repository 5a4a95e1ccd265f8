"""What `--augment` takes besides the script's own flip and crop, most by Kornia; each image gets its own draw."""

import math
from collections.abc import Callable
from typing import Any

import kornia.augmentation as K
import torch
import torch.nn.functional as F

STRENGTHS = {  # of each where none is given, and the largest one
    "rotate": (20.0, 180.0),  # by up to so many degrees
    "brightness": (0.2, 1.0),  # times 1 ± so much, as the next two
    "contrast": (0.2, 1.0),
    "saturation": (0.2, 1.0),
    "hue": (0.05, 0.5),  # by up to so much of the colour circle
    "sharpness": (1.0, 10.0),  # in every other image, 1 ± so much, from blurred (0) to twice as sharp (2)
    "erase": (0.75, 1.0),  # in such a share of the images, 2 to 33 % of the area (Zhong et al., 2017)
    "cutout": (0.5, 0.99),  # a grey square, so wide as a share of the image (DeVries and Taylor, 2017)
    "mixup": (0.4, 0.5),  # up to so much of another image, and of its label (Zhang et al., 2017)
    "cutmix": (1.0, 100.0),  # a piece of another image, its share drawn from Beta(F, F) (Yun et al., 2019)
}

Pair = tuple[torch.Tensor, torch.Tensor]


def make(name: str, strength: float) -> torch.nn.Module:
    """One of STRENGTHS but for the last two as a Kornia module, for float images (B, C, H, W) in [0, 1]."""
    if name == "rotate":
        return K.RandomAffine(strength, padding_mode="reflection", p=1.0)
    if name in ("brightness", "contrast", "saturation", "hue"):
        only: dict[str, Any] = {name: strength}
        return K.ColorJitter(**only, p=1.0)
    if name == "sharpness":
        return K.RandomSharpness((max(0.0, 1 - strength), 1 + strength), p=0.5)
    if name == "erase":
        return K.RandomErasing(value=0.5, p=strength)
    return K.RandomErasing((strength**2, strength**2), (1.0, 1.0), value=0.5, p=1.0)  # cutout


def mixup(images: torch.Tensor, others: torch.Tensor, most: float) -> Pair:
    """Each image with up to `most` of the other one; also returns that share, float (B,)."""
    share = most * torch.rand(len(images), device=images.device)
    return images.lerp(others, share.view(-1, 1, 1, 1)), share


def cutmix(images: torch.Tensor, others: torch.Tensor, beta: float) -> Pair:
    """Each image with a piece of the other one, of its shape; also returns the share of its area, float (B,)."""
    drawn = torch.distributions.Beta(beta, beta).sample((len(images),)).to(images.device)
    inside = []
    for length in images.shape[2:]:
        side = length * drawn.sqrt()
        start, pixels = (length - side) * torch.rand_like(side), torch.arange(length, device=images.device) + 0.5
        inside.append((pixels >= start[:, None]) & (pixels < (start + side)[:, None]))
    piece = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(piece, others, images), piece.float().mean((1, 2, 3))


MIXES = {"mixup": mixup, "cutmix": cutmix}


def build(steps: dict[str, str], classes: int) -> Callable[[torch.Tensor, torch.Tensor], Pair]:
    """A function for uint8 images (B, C, H, W) and int64 labels (B,), from names and strengths ("" for the usual one).

    It returns float images in [0, 255] and the labels, which mixing makes shares (B, classes). Of mixup and cutmix
    together, each batch gets one. Raises ValueError for what is no augmentation and for a strength out of range.
    """
    own = torch.nn.Sequential()
    mixing: list[tuple[Callable[..., Any], float]] = []
    for name, text in steps.items():
        if name not in STRENGTHS:
            raise ValueError(f"{name!r} is none of flip, crop, {', '.join(STRENGTHS)}")
        usual, most = STRENGTHS[name]
        try:
            strength = float(text or usual)
        except ValueError:
            strength = math.nan
        if not 0 < strength <= most:
            raise ValueError(f"{name}={text} must be a number above 0 and at most {most:g}")
        if name in MIXES:
            mixing.append((MIXES[name], strength))
        else:
            own.append(make(name, strength))

    def augment(images: torch.Tensor, labels: torch.Tensor) -> Pair:
        images = own(images / 255)
        if mixing:
            mix, strength = mixing[int(torch.randint(len(mixing), ()))]
            order, shares = torch.randperm(len(images), device=images.device), F.one_hot(labels, classes).float()
            images, share = mix(images, images[order], strength)
            labels = shares.lerp(shares[order], share[:, None])
        return images * 255, labels

    return augment
