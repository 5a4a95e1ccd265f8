"""RandAugment and TrivialAugment: operations that are drawn at random, for each image anew.

Kornia and torchvision have both as a whole, but draw one operation for a batch. Here each image has
its own, and those with the same operation are computed together.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

LARGEST_MAGNITUDE = 30  # of RandAugment, and of the 31 steps from 0 that TrivialAugment draws from

# Images, float (B, C, H, W) in [0, 1], and the strength for each, float (B,), to changed images.
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Operation(NamedTuple):
    """One of the operations that an image may get.

    Attributes:
        name: as in torchvision.
        change: takes images and strengths, and returns the changed images.
        largest: the strength at the largest magnitude; 0 where there is nothing to choose.
        is_signed: whether the strength of half of the images is negative.
    """

    name: str
    change: Change
    largest: float
    is_signed: bool


class AutoAugment(nn.Module):
    """Give each image some operations, each drawn from all and with a sign of its own.

    All is drawn on the CPU, from torch's random state: so it is the same on each device.

    Attributes:
        operations: to draw from, each with the same probability.
        num_operations: how many each image gets, one after another; the same may come twice.
        magnitude: from 0 to 30, of all operations; None: each image draws one.
    """

    def __init__(
        self, operations: list[Operation], num_operations: int, magnitude: float | None
    ) -> None:
        super().__init__()
        self.operations = operations
        self.num_operations = num_operations
        self.magnitude = magnitude

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Augment images, float (B, C, H, W) in [0, 1], of 1 or 3 channels."""
        for _ in range(self.num_operations):
            chosen = torch.randint(len(self.operations), (len(images),))
            images = self._change_each(images, chosen, self._draw_shares(len(images)))
        return images

    def _draw_shares(self, count: int) -> torch.Tensor:
        """The strength for each image as a share of the largest, with a random sign."""
        if self.magnitude is None:
            magnitudes = torch.randint(LARGEST_MAGNITUDE + 1, (count,)).float()
        else:
            magnitudes = torch.full((count,), float(self.magnitude))
        signs = torch.randint(2, (count,)) * 2 - 1
        return signs * magnitudes / LARGEST_MAGNITUDE

    def _change_each(
        self, images: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """Change each image by the operation chosen for it.

        chosen: int64 (B,), indices of operations. shares: float (B,), see _draw_shares.
        """
        # images with the same operation side by side; the CPU knows where each group ends
        order = chosen.argsort(stable=True)
        sizes = chosen.bincount(minlength=len(self.operations)).tolist()
        places = order.to(images.device)
        image_groups = images[places].split(sizes)
        share_groups = shares[order].to(images.device).split(sizes)
        changed = []
        for operation, group, own_shares in zip(
            self.operations, image_groups, share_groups, strict=True
        ):
            if len(group):
                used_shares = own_shares if operation.is_signed else own_shares.abs()
                changed.append(operation.change(group, operation.largest * used_shares))
        results = torch.empty_like(images)
        results[places] = torch.cat(changed)
        return results


def randaugment(magnitude: float) -> AutoAugment:
    """RandAugment (Cubuk et al., 2020, https://arxiv.org/abs/1909.13719): two operations an image.

    magnitude: from 0 to 30. The ranges are those of torchvision. Raises ModuleNotFoundError without
    Kornia.
    """
    moves = _moves(shear=0.3, degrees=30, largest_shift=lambda size: size * 150 / 331)
    return AutoAugment([*moves, *_tones(0.9, bits=4)], num_operations=2, magnitude=magnitude)


def trivialaugment() -> AutoAugment:
    """TrivialAugment Wide (Müller and Hutter, 2021, https://arxiv.org/abs/2103.10158).

    One operation an image, of a magnitude that is drawn as well. Raises ModuleNotFoundError without
    Kornia.
    """
    moves = _moves(shear=0.99, degrees=135, largest_shift=lambda size: 32)
    return AutoAugment([*moves, *_tones(0.99, bits=6)], num_operations=1, magnitude=None)


# Kornia takes a strength for each image, where torchvision's functions take one for all. Those
# without a strength are torchvision's: Kornia's autocontrast makes a plain image black, and its
# equalize goes channel by channel before version 0.9.


def _moves(shear: float, degrees: float, largest_shift: Callable[[int], float]) -> list[Operation]:
    """Shears, rotation and shifts; black fills in, as in the papers.

    shear: largest shift in pixels of one row or column against the next. degrees: to rotate by.
    largest_shift: of an image of so many pixels, in pixels.
    """
    import kornia.geometry.transform as geometry

    def shear_x(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        shears = torch.stack([strengths, torch.zeros_like(strengths)], dim=1)
        return geometry.shear(images, shears, mode="nearest", align_corners=True)

    def shear_y(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        shears = torch.stack([torch.zeros_like(strengths), strengths], dim=1)
        return geometry.shear(images, shears, mode="nearest", align_corners=True)

    def rotate(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        return geometry.rotate(images, strengths, mode="nearest")

    def translate_x(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        pixels = (strengths * largest_shift(images.shape[3])).trunc()
        shifts = torch.stack([pixels, torch.zeros_like(pixels)], dim=1)
        return geometry.translate(images, shifts, mode="nearest")

    def translate_y(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        pixels = (strengths * largest_shift(images.shape[2])).trunc()
        shifts = torch.stack([torch.zeros_like(pixels), pixels], dim=1)
        return geometry.translate(images, shifts, mode="nearest")

    return [
        Operation("ShearX", shear_x, shear, is_signed=True),
        Operation("ShearY", shear_y, shear, is_signed=True),
        Operation("Rotate", rotate, degrees, is_signed=True),
        Operation("TranslateX", translate_x, 1, is_signed=True),
        Operation("TranslateY", translate_y, 1, is_signed=True),
    ]


def _tones(factor: float, bits: float) -> list[Operation]:
    """Changes of brightness and colours, and none.

    factor: brightness, colours, contrast and sharpness become up to 1 ± this times as strong. bits:
    by how many the 8 bits of a value are reduced.
    """
    import kornia.enhance as enhance
    from torchvision.transforms.v2 import functional

    def brightness(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        return enhance.adjust_brightness_accumulative(images, 1 + strengths)

    def color(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        return enhance.adjust_saturation_with_gray_subtraction(images, 1 + strengths)

    def contrast(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        return enhance.adjust_contrast_with_mean_subtraction(images, 1 + strengths)

    def sharpness(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        return enhance.sharpness(images, 1 + strengths)

    def posterize(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        return enhance.posterize(images, 8 - strengths.round().int())

    def solarize(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        return enhance.solarize(images, 1 - strengths)

    def auto_contrast(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return functional.autocontrast(images)

    def equalize(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return functional.equalize(images)

    return [
        Operation("Brightness", brightness, factor, is_signed=True),
        Operation("Color", color, factor, is_signed=True),
        Operation("Contrast", contrast, factor, is_signed=True),
        Operation("Sharpness", sharpness, factor, is_signed=True),
        Operation("Posterize", posterize, bits, is_signed=False),
        Operation("Solarize", solarize, 1, is_signed=False),
        Operation("AutoContrast", auto_contrast, 0, is_signed=False),
        Operation("Equalize", equalize, 0, is_signed=False),
        Operation("Identity", lambda images, _: images, 0, is_signed=False),
    ]
