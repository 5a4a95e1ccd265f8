"""Copies of an image that were mirrored, cropped, brightened or made much smaller.

Each image is compared with each in three stages, of which every one sees fewer pairs more closely.

1. Coarse patterns of all pairs, which a crop changes little: one product of matrices.
2. Fine patterns: of one image as a whole, of the other one of several parts that may be the crop.
3. The part is found exactly, and then the colours are compared, too.

A pattern is made of the first coefficients of the cosine transform of the grey image. They are
weighted by their frequencies, because in photographs low ones are strong and say little, and then
scaled to length 1, so that brightness and contrast do not count.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

SIZE = 32  # pixels, of the images that are compared; smaller ones are not resized
MIN_SIZE = 16  # images of fewer pixels show too little
MIN_CONTRAST = 6.0  # standard deviation in grey levels; less is a plain image
NUM_COARSE = 5  # frequencies of a coarse pattern in each direction
NUM_FINE = 8  # and of a fine one
MIN_COARSE = 0.6  # correlations of two patterns that are to be looked at more closely
MIN_FINE = 0.8
MIN_EXACT = 0.9  # of fine patterns, where the crop is found exactly
MIN_COLOR = 0.95  # correlation of the colours
MAX_GAIN = 2.0  # of the contrast of a copy
SIDES = (0.95, 0.89)  # of parts that may be a crop, as shares of the image's
STEPS = (0.02, 0.01, 0.005)  # in which the place of a crop is found, as shares of the image
MAX_COMPARED = 3 * 10**8  # pairs for the second stage: the search ends after so many, in minutes
MAX_CHECKED = 50_000  # pairs for the third, which takes about a millisecond for each
MAX_ALIKE = 12  # images that another one is like: more are of a kind, such as digits, not copies
MAX_LISTED = 10_000  # pairs; after so many, only those that join two groups are looked for
ROWS = 64  # images that are compared with all others at once
CHUNK = 128  # images, or pairs of the third stage, in memory at once
RGB_TO_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)

FREQUENCIES = np.hypot(*np.mgrid[:NUM_FINE, :NUM_FINE]).astype(np.float32)
# A mirrored image has the same coefficients, but those of odd frequencies change their sign.
MIRRORED = np.where(np.arange(NUM_FINE) % 2, -1, 1).astype(np.float32)


class Parts(NamedTuple):
    """Square parts of an image, in shares of its width and height.

    Attributes:
        sides: float (K,).
        tops, lefts: float (K,), where they begin.
    """

    sides: np.ndarray
    tops: np.ndarray
    lefts: np.ndarray


WHOLE = Parts(np.ones(1), np.zeros(1), np.zeros(1))


def all_parts() -> Parts:
    """The whole image, and of each of SIDES nine parts: in the middle, at the sides and corners."""
    places = [(1.0, 0.0, 0.0)]
    for side in SIDES:
        for top in (0, 0.5, 1):
            places += [(side, top * (1 - side), left * (1 - side)) for left in (0, 0.5, 1)]
    return Parts(*np.array(places).T)


class Candidates(NamedTuple):
    """Pairs of which one image may be a copy of the other.

    Attributes:
        wholes: int (P,), the images that are taken as a whole.
        sources: int (P,), the images of which a part is taken.
        parts: int (P,), which of the parts.
        scores: float32 (P,), correlation of their patterns.
        is_mirrored: bool (P,).
    """

    wholes: np.ndarray
    sources: np.ndarray
    parts: np.ndarray
    scores: np.ndarray
    is_mirrored: np.ndarray

    def take(self, pairs: np.ndarray | slice) -> "Candidates":
        """Some of the pairs. pairs: their indices, a bool for each, or a slice."""
        return Candidates(*(values[pairs] for values in self))


def altered_copies(
    pixels: np.ndarray, rows: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Find images that are altered copies of each other.

    Args:
        pixels: uint8 (M, S, S, 3), perhaps a memory map.
        rows: int64 (N,), the places of the images among them.
        groups: int64 (N,), the same number for images that are known to belong together. They are
            not compared.

    Returns pairs of places in `rows`, int64 (P, 2), and whether all were compared that had to be.
    """
    if pixels.shape[1] < MIN_SIZE or len(rows) < 2:
        return np.empty((0, 2), dtype=np.int64), True
    patterns = np.concatenate(
        [_patterns(_grey(pixels[chunk])) for chunk in _chunks(rows, CHUNK)]
    )  # (N, F, F)
    candidates, has_all = _alike_pairs(pixels, rows, patterns, groups)
    has_all = has_all and len(candidates.scores) <= MAX_CHECKED
    return _exact_pairs(pixels, rows, patterns, groups, candidates), has_all


def _chunks(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[start : start + size] for start in range(0, len(values), size)]


# ---- patterns ----


def _grey(images: np.ndarray) -> np.ndarray:
    """Images, uint8 (B, S, S, 3), in grey and at most SIZE × SIZE pixels: float32 (B, s, s)."""
    return _shrink(images @ RGB_TO_GREY)


def _shrink(images: np.ndarray) -> np.ndarray:
    """The last two axes at no more than SIZE pixels each; each pixel is the mean of its area."""
    size = images.shape[-1]
    if size <= SIZE:
        return images
    edges = np.arange(SIZE + 1) / SIZE * size
    covered = np.clip(edges[1:, None] - np.arange(size), 0, 1)
    covered -= np.clip(edges[:-1, None] - np.arange(size), 0, 1)
    means = (covered * SIZE / size).astype(np.float32)  # (SIZE, size)
    return means @ images @ means.T


def _cosines(starts: np.ndarray, sides: np.ndarray, size: int) -> np.ndarray:
    """Matrices from the pixels of a row to the cosine coefficients of a part of it.

    starts, sides: float (...), the parts, as shares of the row. size: pixels of the row. Returns
    float32 (..., F, size). A pixel that lies in the part by half counts half.
    """
    edges = np.arange(size + 1) / size
    places = np.clip((edges - starts[..., None]) / sides[..., None], 0, 1)  # (..., size + 1)
    places = places.astype(np.float32)
    frequencies = np.pi * np.arange(1, NUM_FINE, dtype=np.float32)[:, None]
    waves = np.sin(places[..., None, :] * frequencies) * (np.sqrt(2) / frequencies)
    integrals = np.concatenate([places[..., None, :], waves], axis=-2)
    return np.diff(integrals).astype(np.float32)


def _patterns(greys: np.ndarray) -> np.ndarray:
    """The patterns of images, float32 (B, s, s): float32 (B, F, F), see _normalise."""
    return _patterns_of_parts(greys, WHOLE)[:, 0]


def _patterns_of_parts(greys: np.ndarray, parts: Parts) -> np.ndarray:
    """The patterns of several parts of each image: float32 (B, K, F, F)."""
    size = greys.shape[-1]
    # each part of a row is computed once, and not for every part of an image that it belongs to
    tops, at_top = np.unique(np.stack([parts.tops, parts.sides]), axis=1, return_inverse=True)
    lefts, at_left = np.unique(np.stack([parts.lefts, parts.sides]), axis=1, return_inverse=True)
    down = _cosines(tops[0], tops[1], size).reshape(-1, size)
    right = _cosines(lefts[0], lefts[1], size).reshape(-1, size)
    coefficients = (down @ greys @ right.T).reshape(
        len(greys), tops.shape[1], NUM_FINE, lefts.shape[1], NUM_FINE
    )
    of_parts = coefficients[:, at_top.ravel(), :, at_left.ravel()]  # (K, B, F, F)
    return _normalise(of_parts.transpose(1, 0, 2, 3))


def _normalise(coefficients: np.ndarray) -> np.ndarray:
    """Patterns of cosine coefficients, float32 (…, F, F): of length 1, or 0 for plain images."""
    coefficients[..., 0, 0] = 0
    contrasts = np.linalg.norm(coefficients, axis=(-2, -1), keepdims=True)
    weighted = coefficients * FREQUENCIES
    lengths = np.linalg.norm(weighted, axis=(-2, -1), keepdims=True)
    return np.where(contrasts < MIN_CONTRAST, 0, weighted / np.maximum(lengths, 1e-6))


# ---- the three stages ----


def _alike_pairs(
    pixels: np.ndarray, rows: np.ndarray, patterns: np.ndarray, groups: np.ndarray
) -> tuple[Candidates, bool]:
    """The pairs whose coarse and fine patterns are alike, the most alike first, each once.

    Those of an image that is like more than MAX_ALIKE others are left out. Returns also False if
    the search ended early, because too many coarse patterns were alike.
    """
    count = len(patterns)
    coarse = _Coarse(patterns)
    wholes = patterns.reshape(count, -1)
    parts = all_parts()
    crowds = _Crowds(count)
    num_compared = 0
    found: list[Candidates] = []
    for start in tqdm(range(0, count, ROWS), "Looking for copies", leave=False, disable=None):
        chunk = slice(start, start + ROWS)
        is_alike = coarse.likeness(chunk) >= MIN_COARSE
        of_parts = _patterns_of_parts(_grey(pixels[rows[chunk]]), parts)
        for source, own_parts in enumerate(of_parts, start):
            others = np.flatnonzero(is_alike[source - start])
            others = others[groups[others] != groups[source]]
            if crowds.has(source):  # how many others these are like is not known yet
                others = others[~crowds.has(others)]
            num_compared += len(others)
            if num_compared > MAX_COMPARED:
                return _best_of_each(found, crowds), False
            if not len(others):
                continue
            pairs = _compare_parts(own_parts, source, wholes[others], others)
            crowds.add(source, pairs.wholes)
            found.append(pairs.take(~crowds.has(pairs.wholes) & ~crowds.has(source)))
    return _best_of_each(found, crowds), True


class _Crowds:
    """Which images are like more than MAX_ALIKE others.

    Of each image it keeps only as many others as it takes to know: where all are alike, as in a
    folder of handwritten digits, there are too many pairs for the memory.
    """

    def __init__(self, count: int):
        self._is_crowded = np.zeros(count, dtype=bool)
        self._alike: defaultdict[int, set[int]] = defaultdict(set)

    def has(self, images: int | np.ndarray) -> Any:
        """Whether an image is like too many others, or of several images, bool (P,), which are."""
        return self._is_crowded[images]

    def add(self, source: int, wholes: np.ndarray) -> None:
        """Note that an image is like these others, int64 (P,), all different."""
        for whole in wholes[: MAX_ALIKE + 1].tolist():
            self._add_one(source, whole)
        for whole in wholes[~self._is_crowded[wholes]].tolist():
            self._add_one(whole, source)

    def _add_one(self, image: int, other: int) -> None:
        if self._is_crowded[image]:
            return
        self._alike[image].add(other)
        if len(self._alike[image]) > MAX_ALIKE:
            self._is_crowded[image] = True
            del self._alike[image]


class _Coarse:
    """The coarse patterns of all images, in two parts.

    A mirrored image differs in the sign of the odd frequencies only: so of a product of two
    patterns the part of these is added or, if one image is mirrored, subtracted.

    Attributes:
        even, odd: float32 (N, D).
    """

    def __init__(self, patterns: np.ndarray):
        coarse = patterns[:, :NUM_COARSE, :NUM_COARSE]
        lengths = np.linalg.norm(coarse, axis=(1, 2), keepdims=True)
        coarse = coarse / np.maximum(lengths, 1e-6)
        self.even = np.ascontiguousarray(coarse[:, :, ::2].reshape(len(coarse), -1))
        self.odd = np.ascontiguousarray(coarse[:, :, 1::2].reshape(len(coarse), -1))

    def likeness(self, chunk: slice) -> np.ndarray:
        """Correlations of some patterns with all, or with their mirror images if that is more."""
        products = self.odd[chunk] @ self.odd.T
        np.abs(products, out=products)
        products += self.even[chunk] @ self.even.T
        return products


def _compare_parts(
    of_parts: np.ndarray, source: int, wholes: np.ndarray, images: np.ndarray
) -> Candidates:
    """Of some images those that are like a part of another one.

    Args:
        of_parts: float32 (K, F, F), the patterns of its parts.
        source: the other image.
        wholes: float32 (P, F * F), the patterns of the images as a whole.
        images: int64 (P,), which ones these are.
    """
    plain = of_parts.reshape(len(of_parts), -1) @ wholes.T  # (K, P)
    mirrored = (of_parts * MIRRORED).reshape(len(of_parts), -1) @ wholes.T
    is_mirrored = mirrored.max(axis=0) > plain.max(axis=0)
    likeness = np.where(is_mirrored, mirrored, plain)
    scores = likeness.max(axis=0)
    chosen = scores >= MIN_FINE
    parts = likeness[:, chosen].argmax(axis=0)
    sources = np.full(len(parts), source)
    return Candidates(images[chosen], sources, parts, scores[chosen], is_mirrored[chosen])


def _best_of_each(found: list[Candidates], crowds: _Crowds) -> Candidates:
    """The pairs without crowds, the most alike first; of the same two images only the first."""
    if not found:
        nothing = np.empty(0, dtype=np.int64)
        return Candidates(nothing, nothing, nothing, nothing.astype(np.float32), nothing > 0)
    every = Candidates(*(np.concatenate(values) for values in zip(*found, strict=True)))
    every = every.take(~crowds.has(every.wholes) & ~crowds.has(every.sources))
    every = every.take(np.argsort(-every.scores, kind="stable"))
    two = np.sort(np.stack([every.wholes, every.sources]), axis=0)
    _, first = np.unique(two, axis=1, return_index=True)
    return every.take(np.sort(first))


def _exact_pairs(
    pixels: np.ndarray,
    rows: np.ndarray,
    patterns: np.ndarray,
    groups: np.ndarray,
    candidates: Candidates,
) -> np.ndarray:
    """The pairs that are copies indeed: int64 (P, 2)."""
    groups = groups.copy()
    candidates = candidates.take(slice(MAX_CHECKED))
    pairs: list[tuple[int, int]] = []
    starts = range(0, len(candidates.scores), CHUNK)
    for start in tqdm(starts, "Checking copies", leave=False, disable=None):
        some = candidates.take(slice(start, start + CHUNK))
        sought = patterns[some.wholes] * np.where(some.is_mirrored[:, None, None], MIRRORED, 1)
        near = Parts(*(values[some.parts] for values in all_parts()))
        places, scores = _find_places(_grey(pixels[rows[some.sources]]), sought, near)
        for number in np.flatnonzero(scores >= MIN_EXACT).tolist():
            whole, source = int(some.wholes[number]), int(some.sources[number])
            if len(pairs) >= MAX_LISTED and groups[whole] == groups[source]:
                continue
            image = pixels[rows[whole]]
            if some.is_mirrored[number]:
                image = image[:, ::-1]
            place = Parts(*(values[number : number + 1] for values in places))
            if _has_same_colors(image, pixels[rows[source]], place):
                pairs.append((whole, source))
                groups[groups == groups[source]] = groups[whole]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _find_places(
    greys: np.ndarray, patterns: np.ndarray, places: Parts
) -> tuple[Parts, np.ndarray]:
    """Find the part of each image that is most like a pattern, near a given one.

    greys: float32 (P, s, s). patterns: (P, F, F). places: one part of each image. Returns the parts
    and their correlations with the patterns, (P,).
    """
    count, size = greys.shape[:2]
    scores = np.zeros(count, dtype=np.float32)
    every = np.arange(count)
    for step in STEPS:
        # all 27 of three sides, tops and lefts, but within the image
        moves = np.array([-step, 0, step])
        sides = np.clip(places.sides[:, None] + moves, 0.5, 1)[..., None]  # (P, 3, 1)
        tops = np.clip(places.tops[:, None, None] + moves, 0, 1 - sides)  # (P, 3, 3)
        lefts = np.clip(places.lefts[:, None, None] + moves, 0, 1 - sides)
        down = _cosines(tops, sides, size).reshape(count, 3, -1, size)
        right = _cosines(lefts, sides, size).reshape(count, 3, -1, size)
        coefficients = down @ greys[:, None] @ right.transpose(0, 1, 3, 2)  # (P, 3, 3 F, 3 F)
        coefficients = coefficients.reshape(count, 3, 3, NUM_FINE, 3, NUM_FINE)
        found = _normalise(coefficients.transpose(0, 1, 2, 4, 3, 5).copy())
        likeness = np.einsum("pstlij,pij->pstl", found, patterns).reshape(count, -1)
        best = likeness.argmax(axis=1)
        scores = likeness[every, best]
        side, top, left = np.unravel_index(best, (3, 3, 3))
        places = Parts(sides[every, side, 0], tops[every, side, top], lefts[every, side, left])
    return places, scores


def _has_same_colors(image: np.ndarray, source: np.ndarray, place: Parts) -> bool:
    """Whether an image has the colours of a part of another one, perhaps brighter or darker.

    image, source: uint8 (S, S, 3). place: one part.
    """
    colors, source_colors = _colors(image, WHOLE), _colors(source, place)
    contrast, source_contrast = np.linalg.norm(colors), np.linalg.norm(source_colors)
    if not 1 / MAX_GAIN <= contrast / source_contrast <= MAX_GAIN:
        return False
    return float(colors @ source_colors / (contrast * source_contrast)) >= MIN_COLOR


def _colors(image: np.ndarray, part: Parts) -> np.ndarray:
    """The colours of a part of an image, without details and mean brightness: float32 (3 · F · F,).

    They are its cosine coefficients: so they can be compared without resizing the image.
    """
    channels = _shrink(image.transpose(2, 0, 1).astype(np.float32))
    down = _cosines(part.tops, part.sides, channels.shape[-1])
    right = _cosines(part.lefts, part.sides, channels.shape[-1])
    coefficients = down @ channels @ right.transpose(0, 2, 1)
    coefficients[:, 0, 0] -= coefficients[:, 0, 0].mean()
    return coefficients.ravel()
