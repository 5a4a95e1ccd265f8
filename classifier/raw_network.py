"""A network that takes a photograph of any size, for `export.py --raw`.

It computes what `fitting.to_square` does. Pillow resizes in two passes, across and down. In each of
them an output pixel is a weighted mean of the input pixels around it, rounded to 8 bits. So a pass
is the product of the image and a matrix of weights, which is computed here from the image's shape.
What remains are single values that differ by one where a mean is halfway between two whole numbers,
and images over a hundred times as tall as wide, which Pillow resizes down first.
ONNX's own Resize rounds elsewhere, does not see what is just outside the square that is cropped,
and is lacking in some runtimes.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from classifier.datasets.fitting import GREY

FIXED_POINT = 2.0**22  # Pillow's weights are multiples of 1 / FIXED_POINT
# Widths and heights of generated photographs: tiny, thin, and with half a pixel at each side.
ODD_SIZES = [(1, 1), (1, 500), (500, 1), (33, 31), (31, 33), (640, 427), (427, 640), (1201, 900)]


class RawNetwork(nn.Module):
    """A network with all that comes before it.

    Attributes:
        network: turns float32 (1, 3, S, S) in [0, 1] into what the whole returns.
        size: S, in pixels.
        fit: how a photograph becomes a square: crop, pad or stretch.
    """

    def __init__(self, network: nn.Module, size: int, fit: str):
        super().__init__()
        self.network = network
        self.size = size
        self.fit = fit

    def forward(self, image: Tensor) -> Tensor:
        """image: uint8 (H, W, 3), upright, RGB. Returns logits (1, classes)."""
        return self.network(self.to_square(image)[None] / 255)

    def to_square(self, image: Tensor) -> Tensor:
        """A photograph, uint8 (H, W, 3), as float32 (3, S, S), whole numbers in [0, 255]."""
        rows = torch.arange(image.shape[0], dtype=torch.float64, device=image.device)
        columns = torch.arange(image.shape[1], dtype=torch.float64, device=image.device)
        height, width = rows[-1] + 1, columns[-1] + 1
        shorter, longer = torch.minimum(height, width), torch.maximum(height, width)
        down, is_row = self.weights(rows, height, shorter, longer)
        across, is_column = self.weights(columns, width, shorter, longer)

        planes = image.permute(2, 0, 1).float()
        narrow = to_8_bits(planes @ across.T)  # (3, H, S)
        square = to_8_bits(down @ narrow)  # (3, S, S)
        if self.fit != "pad":
            return square
        is_image = is_row[:, None] & is_column
        return torch.where(is_image, square, float(GREY))

    def weights(
        self, places: Tensor, length: Tensor, shorter: Tensor, longer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weights of one pass.

        places: float64 (L,), 0 to L - 1. length: L, the width or the height. shorter, longer: the
        smaller and the larger one of these two.

        Returns float32 (S, L), and which of the S pixels show the image, bool (S,): the others are
        border.
        """
        pixels = torch.arange(self.size, dtype=torch.float64, device=places.device)
        start = torch.zeros_like(length)
        shown = torch.full_like(length, self.size)  # how many of the S pixels show the image
        if self.fit == "crop":
            start = (length - shorter) / 2
            length = shorter
        if self.fit == "pad":
            shown = torch.floor((2 * length * self.size + longer) / (2 * longer)).clamp(min=1)
            pixels = pixels - torch.floor((self.size - shown) / 2)
        scale = length / shown
        centers = start + (pixels + 0.5) * scale
        # Where an image becomes smaller, the filter becomes as much wider.
        distances = (places + 0.5 - centers[:, None]).abs() / scale.clamp(min=1)
        weights = bicubic(distances)
        weights = weights / weights.sum(1, keepdim=True)
        weights = torch.round(weights * FIXED_POINT) / FIXED_POINT
        is_image = (pixels >= 0) & (pixels < shown)
        return weights.float(), is_image


def bicubic(distances: Tensor) -> Tensor:
    """Pillow's bicubic filter, with a = -0.5 (Keys, 1981). distances: at least 0, in pixels."""
    near = (1.5 * distances - 2.5) * distances * distances + 1
    far = ((2.5 - 0.5 * distances) * distances - 4) * distances + 2
    zero = torch.zeros_like(distances)
    return torch.where(distances < 1, near, torch.where(distances < 2, far, zero))


def to_8_bits(values: Tensor) -> Tensor:
    """Rounded, halves up, to whole numbers in [0, 255]."""
    return torch.floor(values + 0.5).clamp(0, 255)


def odd_photographs(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Generated photographs, uint8 (H, W, 3): those of ODD_SIZES, then others of any shape."""
    random = np.random.default_rng(seed)
    for number in range(count):
        width, height = random.integers(1, 400, 2).tolist()
        if number < len(ODD_SIZES):
            width, height = ODD_SIZES[number]
        coarse = random.integers(0, 256, (6, 8, 3)).astype(np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = random.integers(-20, 21, (height, width, 3))
        yield (np.asarray(picture) + noise).clip(0, 255).astype(np.uint8)
