"""What a caller has of images, as a network takes them: uint8 (N, 3, S, S).

Imports no torch, so that an ONNX file runs without it, too.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from classifier.datasets import decode
from classifier.datasets.pixel_range import Ranges
from classifier.text import FROM_FLOATS

ACCEPTED = (
    "a path, a PIL image, a uint8 array (H, W, 3) or (H, W), a uint8 tensor (3, H, W), or a list "
    "of these; or a batch in uint8: (N, 3, H, W), or as an array (N, H, W, 3)"
)

ReadFile = Callable[[Path | str], np.ndarray]  # a path to uint8 (3, S, S)


def to_batch(
    images: Any,
    size: int,
    read_file: ReadFile,
    ranges: Ranges | None = None,
    fit: str = "crop",
) -> np.ndarray:
    """Images as a network takes them: each as a square, resized as in training.

    Args:
        images: ACCEPTED says what they may be.
        size: width and height, S, that the network takes.
        read_file: reads the file of this path: uint8 (3, S, S).
        ranges: of the values of PIL images with more than 8 bits a pixel, see `pixel_range`.
        fit: how images become squares: see `fitting.to_square`.

    Returns uint8 (N, 3, S, S). Raises TypeError and ValueError for anything else, and what
    `read_file` raises.
    """
    pixels = _to_array(images)
    if pixels is not None and pixels.ndim == 4:
        _check_dtype(pixels)
        channels_last = _channels_last(pixels, is_tensor=not isinstance(images, np.ndarray))
        if channels_last.shape[1:] == (size, size, 3):
            return np.ascontiguousarray(channels_last.transpose(0, 3, 1, 2))
        images = list(channels_last)
    squares = [_to_square(image, size, read_file, ranges, fit) for image in _to_list(images)]
    if not squares:
        return np.empty((0, 3, size, size), np.uint8)
    return np.stack(squares)


def check_batch(images: Any, size: int) -> None:
    """Raise TypeError or ValueError unless these are images of that size, uint8 (N, 3, S, S)."""
    if not isinstance(images, np.ndarray):
        raise TypeError(f"images have to be a numpy array, not {_kind(images)}")
    _check_dtype(images)
    if images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise ValueError(f"images have to be (N, 3, {size}, {size}), not {images.shape}")


def check_photographs(images: list[Any]) -> None:
    """Raise TypeError or ValueError unless each of these is an image, uint8 (3, H, W)."""
    for image in images:
        if not isinstance(image, np.ndarray):
            raise TypeError(f"a photograph has to be a numpy array, not {_kind(image)}")
        _check_dtype(image)
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"a photograph has to be (3, H, W), not {image.shape}")


def _to_list(images: Any) -> list[Any]:
    """The images one by one, where they are not a single one already."""
    if isinstance(images, (str, os.PathLike, Image.Image)) or _to_array(images) is not None:
        is_list_of_paths = isinstance(images, np.ndarray) and images.dtype.kind in "OU"
        return list(images) if is_list_of_paths else [images]
    if isinstance(images, Iterable) and not isinstance(images, (bytes, dict)):
        return list(images)
    raise TypeError(f"{_kind(images)} is no image: give {ACCEPTED}")


def _to_square(
    image: Any, size: int, read_file: ReadFile, ranges: Ranges | None, fit: str
) -> np.ndarray:
    """A single image: uint8 (3, size, size)."""
    if isinstance(image, (str, os.PathLike)):
        return read_file(Path(image))
    if not isinstance(image, Image.Image):
        image = _to_pil(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about images that it converts nevertheless
        return decode.square(image, size, ranges, fit).transpose(2, 0, 1)


def _to_pil(image: Any) -> Image.Image:
    """An array, (H, W, 3) or (H, W), or a tensor, (3, H, W), as a PIL image."""
    pixels = _to_array(image)
    if pixels is None:
        raise TypeError(f"{_kind(image)} is no image: give {ACCEPTED}")
    _check_dtype(pixels)
    shape = pixels.shape
    if isinstance(image, np.ndarray):
        is_image = pixels.ndim == 2 or (pixels.ndim == 3 and shape[2] == 3)
    else:  # a tensor
        is_image = pixels.ndim == 3 and shape[0] == 3
        pixels = np.moveaxis(pixels, 0, -1)
    if not is_image or 0 in shape:
        raise ValueError(f"{_kind(image)} of shape {shape} is no image: give {ACCEPTED}")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _channels_last(batch: np.ndarray, is_tensor: bool) -> np.ndarray:
    """A batch, (N, 3, H, W) or (N, H, W, 3), as (N, H, W, 3).

    is_tensor: of a tensor, channels are always the second dimension.
    """
    first, last = batch.shape[1] == 3, batch.shape[3] == 3 and not is_tensor
    if first == last or 0 in batch.shape[1:]:  # neither, or it cannot be told
        raise ValueError(f"a batch of shape {batch.shape} holds no images: give {ACCEPTED}")
    return batch if last else batch.transpose(0, 2, 3, 1)


def _to_array(image: Any) -> np.ndarray | None:
    """An array, or a tensor of uint8 as an array; None for anything else."""
    if isinstance(image, np.ndarray):
        return image
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is None or not isinstance(image, torch.Tensor):
        return None
    _check_dtype(image)  # numpy lacks some of torch's types
    return image.cpu().numpy()


def _check_dtype(pixels: Any) -> None:
    """Raise TypeError unless an array or a tensor is of type uint8."""
    name = str(pixels.dtype).removeprefix("torch.")
    if name != "uint8":
        raise TypeError(f"pixels have to be uint8 in [0, 255], not {name} ({FROM_FLOATS})")


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
