"""An image file as a square of pixels. Imports no torch, so that a model runs without it, too."""

import contextlib
import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

NEED_ANOTHER_PROGRAM = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # to be read by Pillow


class Decoded(NamedTuple):
    """An image file, decoded.

    Attributes:
        pixels: uint8 (S, S, 3).
        size: width and height in the file, in pixels.
        digest: 64-bit hash of the pixels.
        dhash: difference hash, uint8 (32,): see `difference_hash`.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    digest: int
    dhash: np.ndarray


def decode(path: Path, size: int) -> Decoded:
    """Decode an image file to `size` × `size` pixels.

    The image is turned as its EXIF data say and put on white where it is transparent; then its
    middle square is resized. Whatever Pillow raises for a file that it cannot read is passed on.
    """
    with Image.open(path, formats=formats()) as file:
        size_in_file = file.size  # before draft() changes it
        # A JPEG is decoded at a fraction of its size, which is several times as fast.
        file.draft(None, (2 * size, 2 * size))
        image = _upright_rgb(file)
    pixels = _middle_square(image, size)
    digest = hash64(pixels.tobytes())
    return Decoded(pixels, size_in_file, digest, difference_hash(image))


def square(image: Image.Image, size: int) -> np.ndarray:
    """An image in memory as `decode` makes it from a file: uint8 (size, size, 3).

    Of a JPEG the last digits may differ: a file is decoded at a fraction of its size.
    """
    return _middle_square(_upright_rgb(image), size)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB, turned as its EXIF data say, on white where it is transparent."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = _on_white(image)
    return image.convert("RGB")


def _middle_square(image: Image.Image, size: int) -> np.ndarray:
    """The middle square of an RGB image, resized: uint8 (size, size, 3)."""
    fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(fitted)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16- or 32-bit integers or floats as one of 8 bits; NaN and infinity are 0."""
    values = np.array(image, dtype=np.float32)
    values = np.nan_to_num(values, posinf=0, neginf=0)
    white = _white_level(image.mode, values.max())
    transparent = image.info.get("transparency")  # a grey value
    if transparent is not None:
        values[values == transparent] = white
    values = values * (255 / white)
    values = values.clip(0, 255).round()
    return Image.fromarray(values.astype(np.uint8))


def _white_level(mode: str, maximum: float) -> float:
    """The value that stands for white: the top of the smallest usual range with all values."""
    if mode.startswith("I;"):  # 16 bits
        return 65535
    for white in (1, 255, 65535):
        if maximum <= white:
            return white
    return maximum


def _on_white(image: Image.Image) -> Image.Image:
    """An image that is transparent in parts, on a white background."""
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(background, image)


def difference_hash(image: Image.Image) -> np.ndarray:
    """Difference hash (dHash) of an RGB image: uint8 (32,), which are 256 bits.

    Each bit says whether one of 16 × 16 places is brighter than its neighbour on the left. Similar
    images have similar hashes (N. Krawetz, "Kind of Like That", 2013).
    """
    small = image.convert("L").resize((17, 16), Image.Resampling.BOX)
    brightness = np.asarray(small, dtype=np.int16)
    left, right = brightness[:, :-1], brightness[:, 1:]
    return np.packbits(right > left + 2)


def hash64(content: bytes) -> int:
    """64-bit BLAKE2b hash of some bytes."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little")


@functools.cache
def formats() -> list[str]:
    """Formats that Pillow reads without another program."""
    Image.init()  # fills Image.OPEN
    return [name for name in Image.OPEN if name not in NEED_ANOTHER_PROGRAM]


def extensions() -> set[str]:
    """File extensions of these formats, in lower case and with the dot."""
    readable = formats()
    registered = Image.registered_extensions()
    return {extension for extension, name in registered.items() if name in readable}


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height of an image file, whatever its name; None if Pillow cannot open it."""
    with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError):
        with Image.open(path, formats=formats()) as file:
            return file.size
    return None


def is_image(path: Path) -> bool:
    """True if Pillow opens the file, whatever its name."""
    return image_size(path) is not None
