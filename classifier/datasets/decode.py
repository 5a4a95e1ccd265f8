"""An image file as a square of pixels. Imports no torch, so that a model runs without it, too."""

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from classifier.datasets import pixel_range
from classifier.datasets.fitting import to_square
from classifier.datasets.image_metadata import has_signature, without_metadata
from classifier.datasets.pixel_range import Extrema, PixelRange, Ranges

T = TypeVar("T")

ORIENTATION = 0x0112  # tag of the EXIF data
TURNS = {  # orientations, and what brings the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NEED_ANOTHER_PROGRAM = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # to be read by Pillow


class Decoded(NamedTuple):
    """An image file, decoded.

    Attributes:
        pixels: uint8 (S, S, 3).
        size: width and height in the file, in pixels.
        pixel_digest: 64-bit hash of the pixels.
        dhash: difference hash, uint8 (32,): see `difference_hash`.
        extrema: of an image with more than 8 bits a pixel, its values; None for one of 8 bits.
        used_range: the range of values that was used for it.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    pixel_digest: int
    dhash: np.ndarray
    extrema: Extrema | None = None
    used_range: PixelRange | None = None


def decode(path: Path, size: int, ranges: Ranges | None = None, fit: str = "crop") -> Decoded:
    """Decode an image file to `size` × `size` pixels.

    The image is turned as its EXIF data say and put on white where it is transparent; then it is
    resized. Whatever Pillow raises for a file that it cannot read is passed on.

    ranges: of the values of images with more than 8 bits a pixel, in the data set that this one
        belongs to. Where there is none of its kind, its own values decide.
    fit: crop, pad or stretch: see `fitting.to_square`. Neither the difference hash nor the extrema
        depend on it.
    """
    image, size_in_file = _despite_metadata(lambda source: _read(source, size), path)
    rgb, extrema, used_range = _to_rgb(image, ranges)
    pixels = to_square(rgb, size, fit)
    pixel_digest = hash64(pixels.tobytes())
    return Decoded(pixels, size_in_file, pixel_digest, difference_hash(rgb), extrema, used_range)


def decode_rgb(path: Path, size: int, ranges: Ranges | None = None) -> np.ndarray:
    """The upright image in a file before it becomes a square: uint8 (H, W, 3).

    The arguments are those of `decode`. A JPEG is decoded at a fraction of its size, as there.
    """
    image, _ = _despite_metadata(lambda source: _read(source, size), path)
    rgb, _, _ = _to_rgb(image, ranges)
    return np.asarray(rgb)


def square(
    image: Image.Image, size: int, ranges: Ranges | None = None, fit: str = "crop"
) -> np.ndarray:
    """An image in memory as `decode` makes it from a file: uint8 (size, size, 3).

    Of a JPEG the last digits may differ: a file is decoded at a fraction of its size.
    """
    rgb, _, _ = _to_rgb(_upright(image), ranges)
    return to_square(rgb, size, fit)


def _read(source: Path | io.BytesIO, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """The upright image in a file, perhaps smaller but not below `size`; width and height there."""
    with Image.open(source, formats=formats()) as file:
        size_in_file = file.size  # before draft() changes it
        # A JPEG is decoded at a fraction of its size, which is several times as fast.
        file.draft(None, (2 * size, 2 * size))
        file.load()
        return _upright(file), size_in_file


def _read_size(source: Path | io.BytesIO) -> tuple[int, int]:
    with Image.open(source, formats=formats()) as file:
        return file.size


def _despite_metadata(read: Callable[[Path | io.BytesIO], T], path: Path) -> T:
    """Read a file, and if that fails because its metadata are damaged, read it without them."""
    try:
        return read(path)
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        if getattr(error, "errno", None) or isinstance(error, MemoryError):
            raise
        with path.open("rb") as file:
            if not has_signature(file.read(8)):  # perhaps an archive of many gigabytes
                raise
        content = without_metadata(path.read_bytes())
        if content is None:
            raise
        try:
            return read(io.BytesIO(content))
        except Exception:  # more than the metadata is damaged
            raise error from None


def _upright(image: Image.Image) -> Image.Image:
    """An image as its EXIF data say it is to be seen; as it lies if they cannot be read."""
    orientation = None
    with contextlib.suppress(Exception):  # damaged EXIF data make Pillow raise almost anything
        orientation = image.getexif().get(ORIENTATION)
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return image.copy() if turn is None else image.transpose(turn)


def _to_rgb(
    image: Image.Image, ranges: Ranges | None
) -> tuple[Image.Image, Extrema | None, PixelRange | None]:
    """An image in RGB, on white where it is transparent.

    Returns also its extrema and the range that was used, if it has more than 8 bits a pixel.
    """
    extrema = used_range = None
    if image.mode.startswith(("I", "F")):
        values = np.array(image, dtype=np.float32)
        kind = pixel_range.FLOATS if image.mode == "F" else pixel_range.INTEGERS
        extrema = pixel_range.extrema_of(values, kind)
        used_range = (ranges or {}).get(kind)
        if used_range is None:
            used_range = pixel_range.usual_range(extrema.low, extrema.high)
        transparent = image.info.get("transparency")  # a grey value
        if transparent is not None:
            values[values == transparent] = used_range.white
        image = Image.fromarray(pixel_range.to_8_bits(values, used_range))
    if "A" in image.getbands() or "transparency" in image.info:
        image = _on_white(image)
    return image.convert("RGB"), extrema, used_range


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
    """Formats that Pillow reads without another program; HEIC if pillow-heif is installed."""
    if importlib.util.find_spec("pillow_heif") is not None:
        with contextlib.suppress(ImportError, OSError):  # its library cannot be loaded
            import pillow_heif

            pillow_heif.register_heif_opener()
    Image.init()  # fills Image.OPEN
    return [name for name in Image.OPEN if name not in NEED_ANOTHER_PROGRAM]


@functools.cache
def extensions() -> set[str]:
    """File extensions of these formats, in lower case and with the dot."""
    readable = formats()
    registered = Image.registered_extensions()
    return {extension for extension, name in registered.items() if name in readable}


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height of an image file, whatever its name; None if Pillow cannot open it."""
    with contextlib.suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return _despite_metadata(_read_size, path)
    return None


def is_image(path: Path) -> bool:
    """True if Pillow opens the file, whatever its name."""
    return image_size(path) is not None


def counts_as_image(path: Path) -> bool:
    """Whether a file is taken for an image until it is decoded: by its name or its content."""
    extension = os.path.splitext(path)[1].lower()
    return extension in extensions() or is_image(path)
