"""Images that are identical or nearly so: finding them, and which ones belong together."""

import contextlib
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from classifier.datasets.decode import hash64
from classifier.datasets.image_cache import DecodedCache
from classifier.files import write_atomically

HASH_BITS = 256
MAX_DIFFERENT_BITS = 20  # of the difference hashes of two images that are near-identical
MAX_DIFFERENCE = 255 * 0.03  # mean difference of their pixels' values
MAX_PAIRS = 10_000  # after so many, only pairs that join two groups are looked for
MAX_COMPARED = 100_000  # images: among more, near-identical ones are not looked for
MAX_VALUES = 10**11  # of pixels: the search ends when so many were compared, after a minute or two
CHUNK = 1000  # images whose hashes are compared with all others at once
PIXELS_AT_ONCE = 64  # images whose pixels are compared with one other at once


class Duplicates(NamedTuple):
    """The images of a folder that are identical or nearly so.

    Attributes:
        pairs: int64 (P, 3), sorted: the indices of two images, in ascending order, and 1 for
            identical or 0 for near-identical ones. Of several identical images each is paired with
            the first. Images that belong together are linked by pairs, directly or by others.
        is_complete: False if the search for near-identical images ended before all were found.
    """

    pairs: np.ndarray
    is_complete: bool


def near_duplicates(images: np.ndarray, cache: DecodedCache) -> Duplicates:
    """Find the images that are identical or nearly so. images: FILE (N,), all in the cache."""
    indices = np.arange(len(images))
    first = first_occurrence(images["record"]["digest"])
    copies = indices[first != indices]
    identical = np.stack([first[copies], copies, np.ones_like(copies)], axis=1)
    originals = indices[first == indices]
    similar, is_complete = near_identical(images, originals, cache)
    similar = np.pad(similar, ((0, 0), (0, 1)))  # a column of zeros
    pairs = np.concatenate([identical, similar])
    return Duplicates(np.unique(pairs, axis=0), is_complete)


def group_images(digests: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The group of each image, int64 (N,): the smallest digest among all that pairs link.

    digests: int64 (N,), of the images' content. pairs: see Duplicates.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_images = len(digests)
    links = np.ones(len(pairs))
    graph = coo_array((links, (pairs[:, 0], pairs[:, 1])), (num_images, num_images))
    num_groups, members = connected_components(graph, directed=False)
    smallest = np.full(num_groups, np.iinfo(np.int64).max)
    np.minimum.at(smallest, members, digests)
    return smallest[members]


def first_occurrence(values: np.ndarray) -> np.ndarray:
    """For each value, the index of the first one that equals it: int64 (N,)."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse]


def near_identical(
    images: np.ndarray, indices: np.ndarray, cache: DecodedCache
) -> tuple[np.ndarray, bool]:
    """Pairs of nearly identical images among those at these indices: int64 (P, 2), indices.

    Among more than MAX_COMPARED images none are looked for, because each is compared with each. The
    result is kept beside the cache. Returns also whether the search was complete.
    """
    if len(indices) > MAX_COMPARED:
        return np.empty((0, 2), dtype=np.int64), False
    records = images["record"]
    fingerprint = hash64(records["digest"].tobytes() + records["dhash"].tobytes())
    path = cache.path / "near.npz"
    found = _read_pairs(path, fingerprint)
    if found is None:
        found = _search(images, indices, cache.pixels)
        _write_pairs(path, fingerprint, *found)
    return found


def _read_pairs(path: Path, fingerprint: int) -> tuple[np.ndarray, bool] | None:
    """What an earlier run found among the same images, or None."""
    damaged = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)
    with contextlib.suppress(*damaged), np.load(path) as content:
        if content["of"] == fingerprint:
            return np.asarray(content["pairs"]), bool(content["is_complete"])
    return None


def _write_pairs(path: Path, fingerprint: int, pairs: np.ndarray, is_complete: bool) -> None:
    content = io.BytesIO()
    np.savez(content, of=np.uint64(fingerprint), pairs=pairs, is_complete=is_complete)
    with contextlib.suppress(OSError):  # the search is then repeated in the next run
        write_atomically(path, content.getvalue())


def _search(images: np.ndarray, indices: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Compare each image with each, by difference hash and then by pixels.

    After MAX_PAIRS pairs, images that are linked by some already are not compared any more. So a
    thousand images that are all alike are a thousand comparisons more, not half a million.

    pixels: of the cache's images, uint8 (M, S, S, 3). Returns int64 (P, 2), and False if there were
    too many images with similar hashes to compare the pixels of all.
    """
    bits = np.unpackbits(images["record"]["dhash"][indices], axis=1)  # (N, 256), 0 or 1
    # Plain images have hashes of almost only zeros or ones, which say nothing.
    ones = bits.sum(axis=1)
    has_structure = (ones > 16) & (ones < HASH_BITS - 16)
    indices = indices[has_structure]
    rows = images["row"][indices]
    # With -1 and 1 for the bits, the product of two hashes is 256 - 2 × the bits that differ.
    signs = bits[has_structure].astype(np.float32) * 2 - 1
    min_product = HASH_BITS - 2 * MAX_DIFFERENT_BITS

    pairs: list[tuple[int, int]] = []
    groups = np.arange(len(indices))
    num_values = 0
    starts = range(0, len(indices), CHUNK)
    for start in tqdm(starts, "Comparing images", unit="kimg", leave=False, disable=None):
        products = signs[start : start + CHUNK] @ signs[start:].T
        is_candidate = np.triu(products >= min_product, 1)  # each pair once, none with itself
        for row in np.flatnonzero(is_candidate.any(axis=1)).tolist():
            first = start + row
            others = start + np.flatnonzero(is_candidate[row])
            if len(pairs) >= MAX_PAIRS:
                others = others[groups[others] != groups[first]]
            num_values += len(others) * pixels[0].size
            if num_values > MAX_VALUES:
                return _to_array(pairs), False
            similar = others[_similar(pixels, rows[first], rows[others])]
            pairs += [(int(indices[first]), int(other)) for other in indices[similar]]
            for group in np.unique(groups[similar]):
                groups[groups == group] = groups[first]
    return _to_array(pairs), True


def _to_array(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _similar(pixels: np.ndarray, row: int, others: np.ndarray) -> np.ndarray:
    """Whether the values of an image's pixels differ by less than 3 % on average from others'.

    row, others: places of the image and of the others among the pixels. Returns bool, one for each
    of the others.
    """
    image = pixels[row].astype(np.int16)
    found = []
    for start in range(0, len(others), PIXELS_AT_ONCE):
        differences = pixels[others[start : start + PIXELS_AT_ONCE]] - image
        mean_differences = np.abs(differences).mean(axis=(1, 2, 3))
        found.append(mean_differences < MAX_DIFFERENCE)
    return np.concatenate(found) if found else np.zeros(0, dtype=bool)
