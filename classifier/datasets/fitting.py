"""How a photograph of any shape becomes a square: --fit. Imports no torch.

`classifier/raw_network.py` does the same within a network, for `export.py --raw`.
"""

import numpy as np
from PIL import Image, ImageOps

# The border of --fit pad, as of YOLO's letterboxes: the mean brightness of ImageNet's photographs.
GREY = 114


def to_square(image: Image.Image, size: int, fit: str) -> np.ndarray:
    """An RGB image as a square, resized bicubically: uint8 (size, size, 3).

    fit: crop takes its middle square, pad all of it with a grey border, and stretch squeezes it.
    """
    if fit == "pad":
        return np.asarray(_padded(image, size))
    if fit == "stretch":
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def _padded(image: Image.Image, size: int) -> Image.Image:
    """The whole image in the middle of a grey square of `size` × `size` pixels."""
    width, height = (_scaled(side, max(image.size), size) for side in image.size)
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    background = Image.new("RGB", (size, size), (GREY, GREY, GREY))
    background.paste(whole, ((size - width) // 2, (size - height) // 2))
    return background


def _scaled(side: int, longer: int, size: int) -> int:
    """A side of an image whose longer one becomes `size`: rounded, half a pixel up, at least 1.

    In whole numbers, so that other programs get the same.
    """
    return max(1, (2 * side * size + longer) // (2 * longer))


def squareness(widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The shorter side over the longer one, float64 (N,) in (0, 1]; 1 for a square.

    This is the share of its area that --fit crop keeps of an image, and also the share of the
    square that an image fills with --fit pad.
    """
    return np.minimum(widths, heights) / np.maximum(widths, heights)
