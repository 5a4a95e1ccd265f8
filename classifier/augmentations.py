"""The steps of --augment besides the script's own flip and crop, most of them from Kornia.

Each image gets a random draw of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from classifier import auto_augment
from classifier.config import parse_augment
from classifier.errors import UsageError, UserError

Batch = tuple[torch.Tensor, torch.Tensor]  # images and labels

# Of each step: the default strength, and the largest one.
STRENGTHS = {
    "rotate": (20.0, 180.0),  # by up to so many degrees
    "brightness": (0.2, 1.0),  # times 1 ± this; contrast and saturation as well
    "contrast": (0.2, 1.0),
    "saturation": (0.2, 1.0),
    "hue": (0.05, 0.5),  # by up to this share of the colour circle
    "sharpness": (1.0, 10.0),  # in every other image: 1 ± this, from 0 (blurred) to 2 (twice)
    "erase": (0.75, 1.0),  # in this share of the images: 2 to 33 % of the area (Zhong et al., 2017)
    "cutout": (0.5, 0.99),  # side of a grey square, in image widths (DeVries and Taylor, 2017)
    "mixup": (0.4, 0.5),  # up to this share of another image and its label (Zhang et al., 2017)
    "cutmix": (1.0, 100.0),  # a part of another image, its share from Beta(F, F) (Yun et al., 2019)
    "randaugment": (9.0, 30.0),  # magnitude of two operations: see `auto_augment`
}
WITHOUT_STRENGTH = ("trivialaugment",)


def build_augmentation(
    text: str | None, num_classes: int
) -> Callable[[torch.Tensor, torch.Tensor], Batch]:
    """The steps of --augment other than flip and crop, as a function of images and labels.

    They are taken in the order in which they are named, but mixup and cutmix come last. The
    function takes uint8 images (B, C, H, W) and int64 labels (B,), and returns float images in
    [0, 255] and the labels; mixup and cutmix turn these into shares, float (B, num_classes).
    Without such steps it returns what it is given.

    Raises UsageError for an unknown step or a strength out of range, UserError without Kornia.
    """
    kornia_steps: list[nn.Module] = []
    mixing_steps: list[MixingStep] = []
    for name, value in parse_augment(text).others.items():
        strength = _parse_strength(name, value, text)
        if name in MIXING:
            mixing_steps.append(MixingStep(MIXING[name], strength))
        else:
            kornia_steps.append(_build_kornia_step(name, strength, text))
    if not kornia_steps and not mixing_steps:
        return no_augmentation
    return Augmentation(nn.Sequential(*kornia_steps), mixing_steps, num_classes)


def _parse_strength(name: str, value: str, text: str | None) -> float:
    """The strength of a step: `value` as typed, or the default if that is empty.

    Of a step without one it is 0. Raises UsageError.
    """
    if name in WITHOUT_STRENGTH:
        if value:
            raise UsageError(f"--augment {text}: {name} takes no number")
        return 0.0
    if name not in STRENGTHS:
        known = ", ".join([*STRENGTHS, *WITHOUT_STRENGTH])
        raise UsageError(f"--augment {text}: {name!r} is none of flip, crop, {known}")
    default, largest = STRENGTHS[name]
    if not value:
        return default
    try:
        strength = float(value)
    except ValueError:
        strength = math.nan
    if not 0 < strength <= largest:
        limits = f"must be a number above 0 and at most {largest:g}"
        raise UsageError(f"--augment {text}: {name}={value} {limits}")
    return strength


def _build_kornia_step(name: str, strength: float, text: str | None) -> nn.Module:
    """A Kornia module for float images (B, C, H, W) in [0, 1]."""
    try:
        import kornia.augmentation as K
    except ModuleNotFoundError as error:
        install = "pip install -r requirements-extras.txt"
        raise UserError(f"--augment {text} needs the package {error.name}: {install}") from None
    if name == "randaugment":
        return auto_augment.randaugment(strength)
    if name == "trivialaugment":
        return auto_augment.trivialaugment()
    if name == "rotate":
        return K.RandomAffine(strength, padding_mode="reflection", p=1.0)
    if name == "brightness":
        return K.ColorJitter(brightness=strength, p=1.0)
    if name == "contrast":
        return K.ColorJitter(contrast=strength, p=1.0)
    if name == "saturation":
        return K.ColorJitter(saturation=strength, p=1.0)
    if name == "hue":
        return K.ColorJitter(hue=strength, p=1.0)
    if name == "sharpness":
        return K.RandomSharpness((max(0.0, 1 - strength), 1 + strength), p=0.5)
    if name == "erase":
        return K.RandomErasing(value=0.5, p=strength)
    area = strength**2  # cutout: always a square of this share of the image
    return K.RandomErasing(scale=(area, area), ratio=(1.0, 1.0), value=0.5, p=1.0)


def mixup(images: torch.Tensor, others: torch.Tensor, largest: float) -> Batch:
    """Blend each image with up to `largest` of another one.

    images, others: float (B, C, H, W). Returns the images and the share of the other, float (B,).
    """
    shares = largest * torch.rand(len(images), device=images.device)
    return images.lerp(others, shares.view(-1, 1, 1, 1)), shares


def cutmix(images: torch.Tensor, others: torch.Tensor, beta: float) -> Batch:
    """Replace a rectangle in each image by the same part of another one.

    The rectangle has the shape of the image, and its share of the area is drawn from
    Beta(beta, beta). images, others: float (B, C, H, W). Returns the images and the share of the
    other that they hold, float (B,).
    """
    shares = torch.distributions.Beta(beta, beta).sample((len(images),)).to(images.device)
    rows = _draw_interval(images.shape[2], shares.sqrt())
    columns = _draw_interval(images.shape[3], shares.sqrt())
    inside = rows[:, None, :, None] & columns[:, None, None, :]  # (B, 1, H, W)
    # The share in whole pixels, not the one drawn.
    return torch.where(inside, others, images), inside.float().mean((1, 2, 3))


def _draw_interval(length: int, shares: torch.Tensor) -> torch.Tensor:
    """Place an interval at random and return which pixels it holds, bool (B, length).

    length: number of pixels. shares: length of the intervals as a share of it, float (B,).
    """
    sides = length * shares
    starts = (length - sides) * torch.rand_like(sides)
    ends = starts + sides
    centers = torch.arange(length, device=shares.device) + 0.5
    return (centers >= starts[:, None]) & (centers < ends[:, None])


MIXING = {"mixup": mixup, "cutmix": cutmix}


@dataclass
class MixingStep:
    """mixup or cutmix.

    Attributes:
        mix: takes images, other images and the strength; returns the mixed images and the share of
            the others.
        strength: see STRENGTHS.
    """

    mix: Callable[[torch.Tensor, torch.Tensor, float], Batch]
    strength: float


def no_augmentation(images: torch.Tensor, labels: torch.Tensor) -> Batch:
    """Return images and labels as they are."""
    return images, labels


class Augmentation:
    """Kornia's steps, one after another, then one of the mixing steps.

    Attributes:
        kornia_steps: modules for float images in [0, 1].
        mixing_steps: of several, each batch gets one, drawn at random.
        num_classes: length of a label that is mixed.
    """

    def __init__(
        self, kornia_steps: nn.Sequential, mixing_steps: list[MixingStep], num_classes: int
    ):
        self.kornia_steps = kornia_steps
        self.mixing_steps = mixing_steps
        self.num_classes = num_classes

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        """Augment uint8 images (B, C, H, W) and labels (B,): see build_augmentation."""
        images = self.kornia_steps(images / 255)
        if self.mixing_steps:
            images, labels = self._mix(images, labels)
        return images * 255, labels

    def _mix(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        """Mix each image of a batch, and its label, with another one of the same batch."""
        chosen = int(torch.randint(len(self.mixing_steps), ()))
        step = self.mixing_steps[chosen]
        order = torch.randperm(len(images), device=images.device)
        one_hot = F.one_hot(labels, self.num_classes).float()
        images, shares = step.mix(images, images[order], step.strength)
        return images, one_hot.lerp(one_hot[order], shares[:, None])
