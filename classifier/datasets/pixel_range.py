"""The range of values of images with more than 8 bits a pixel. Imports no torch.

A file of 16-bit integers may hold values of 12 bits, and one of floats values in [0, 1] or degrees.
What stands for black and for white is a property of a data set: it is found from all its images,
kept in the model file, and used for every image that the model sees. Integers and floats have a
range each. Images of 8 bits need none.
"""

import math
from typing import Any, NamedTuple

import numpy as np

INTEGERS = "integers"  # of 16 or 32 bits
FLOATS = "floats"
# What white usually is: 1, or the largest value of so many bits: 8, 10, 12, 14, 16.
USUAL_WHITES = (1, 255, 1023, 4095, 16383, 65535)
OUTLIER = 4  # an image that exceeds almost all others by this factor does not decide on the range
MAX_OUTLIERS = 0.01  # share of the images, but one of ten or more
DARK = 1 / 16  # of the range: a median image below says that the images have several ranges


class PixelRange(NamedTuple):
    """The values that become 0 and 255."""

    black: float
    white: float


class Extrema(NamedTuple):
    """The values of an image that has more than 8 bits a pixel.

    Attributes:
        kind: INTEGERS or FLOATS.
        low: the least value that is a number.
        high: the largest one.
    """

    kind: str
    low: float
    high: float


Ranges = dict[str, PixelRange]  # of INTEGERS, of FLOATS, of both, or none


def extrema_of(values: np.ndarray, kind: str) -> Extrema:
    """The extrema of an image's values, NaN and infinity aside."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Extrema(kind, 0.0, 0.0)
    return Extrema(kind, float(finite.min()), float(finite.max()))


def usual_range(low: float, high: float) -> PixelRange:
    """The range for values from low to high.

    White is the smallest usual one, if at least half of it is reached, and otherwise the largest
    value. Black is 0, or the least value if that is negative: but not one that is larger than the
    others in size, such as -9999, which stands for a missing value.
    """
    if high <= 0:
        return PixelRange(low, high) if low < high else PixelRange(low, low + 1)
    white = high
    for usual in USUAL_WHITES:
        if usual / 2 <= high <= usual:
            white = usual
    black = low if -high <= low < 0 else 0
    return PixelRange(float(black), float(white))


def find_range(low: np.ndarray, high: np.ndarray) -> PixelRange:
    """The range of several images.

    low, high: least and largest value of each image, float64 (N,), N > 0. A few images whose values
    are far larger than those of all others are left out: one damaged image would make the others
    black.
    """
    num_outliers = int(len(high) * MAX_OUTLIERS)
    if len(high) >= 10:
        num_outliers = max(1, num_outliers)
    most = np.sort(high)[-1 - num_outliers]
    if most > 0:
        counts = high <= OUTLIER * most
        low = low[counts]
        high = high[counts]
    return usual_range(float(low.min()), float(high.max()))


def describe_misfit(extrema: Extrema, used_range: PixelRange, is_known: bool) -> str:
    """What to know about an image whose values are not as those of a model's training images.

    used_range: the range that was used for it; is_known: whether the model file gives one for
    images of its kind. Returns "" if it gives one and no value is outside.
    """
    found = f"values from {extrema.low:g} to {extrema.high:g}"
    used = f"{used_range.black:g} (black) to {used_range.white:g} (white)"
    if not is_known:
        return f"{found}, and the model file gives no range for {extrema.kind}: taken as {used}"
    if extrema.low < used_range.black or extrema.high > used_range.white:
        return f"{found} are cut off to the range of the training images, {used}"
    return ""


def describe_ranges(ranges: Ranges) -> str:
    """The ranges in words."""
    parts = [f"{kind} from {black:g} to {white:g}" for kind, (black, white) in ranges.items()]
    return " and ".join(parts) or "no range"


def is_mostly_dark(high: np.ndarray, pixel_range: PixelRange) -> bool:
    """Whether most images are nearly black in this range, which only a few then fill.

    high: the largest value of each image, float64 (N,).
    """
    black, white = pixel_range
    return bool((np.median(high) - black) < DARK * (white - black))


def to_8_bits(values: np.ndarray, pixel_range: PixelRange) -> np.ndarray:
    """Values of any type as uint8, by a range; NaN and infinity are black."""
    black, white = pixel_range
    values = np.nan_to_num(values, nan=black, posinf=black, neginf=black)
    values = (values - black) * (255 / (white - black))
    return values.clip(0, 255).round().astype(np.uint8)


def to_json(ranges: Ranges) -> dict[str, list[float]]:
    """The ranges as a model file and data_report.json hold them."""
    return {kind: list(pixel_range) for kind, pixel_range in ranges.items()}


def from_json(content: Any) -> Ranges:
    """The ranges in a model file; ValueError for what is none. None stands for no ranges."""
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError("no ranges of pixel values")
    ranges = {}
    for kind, values in content.items():
        black, white = (float(value) for value in values)
        if kind not in (INTEGERS, FLOATS) or not -math.inf < black < white < math.inf:
            raise ValueError(f"no range of pixel values: {kind} {values}")
        ranges[kind] = PixelRange(black, white)
    return ranges
