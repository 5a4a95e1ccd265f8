"""Images that are identical or nearly so: finding them, and keeping them on one side of a split."""

import contextlib
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from classifier.datasets.dataset import stratified_split
from classifier.datasets.decode import hash64
from classifier.datasets.image_cache import DecodedCache
from classifier.files import write_atomically

TEST_FRACTION = 0.2  # of each class, where there is no test/
HASH_BITS = 256
MAX_DIFFERENT_BITS = 20  # of the difference hashes of two images that are near-identical
MAX_DIFFERENCE = 255 * 0.03  # mean difference of their pixels' values
MAX_PAIRS = 10_000  # the search ends when so many were found: more say no more
MAX_COMPARED = 100_000  # images: among more, near-identical ones are not looked for
CHUNK = 1000  # images that are compared with all others at once


def near_duplicates(images: np.ndarray, cache: DecodedCache) -> np.ndarray:
    """Pairs of images that are identical or nearly so.

    images: FILE (N,), all of them in the cache. Returns int64 (P, 3), sorted: the indices of the
    two images, in ascending order, and 1 for identical or 0 for near-identical ones. Of several
    identical images each is paired with the first.
    """
    indices = np.arange(len(images))
    first = first_occurrence(images["record"]["digest"])
    copies = indices[first != indices]
    identical = np.stack([first[copies], copies, np.ones_like(copies)], axis=1)
    originals = indices[first == indices]
    similar = near_identical(images, originals, cache)
    similar = np.pad(similar, ((0, 0), (0, 1)))  # a column of zeros
    pairs = np.concatenate([identical, similar])
    return np.unique(pairs, axis=0)


def first_occurrence(values: np.ndarray) -> np.ndarray:
    """For each value, the index of the first one that equals it: int64 (N,)."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse]


def near_identical(images: np.ndarray, indices: np.ndarray, cache: DecodedCache) -> np.ndarray:
    """Pairs of nearly identical images among those at these indices: int64 (P, 2), indices.

    Among more than MAX_COMPARED images none are looked for, because each is compared with each. The
    result is kept beside the cache.
    """
    if len(indices) > MAX_COMPARED:
        return np.empty((0, 2), dtype=np.int64)
    records = images["record"]
    fingerprint = hash64(records["digest"].tobytes() + records["dhash"].tobytes())
    path = cache.path / "near.npz"
    pairs = _read_pairs(path, fingerprint)
    if pairs is None:
        pairs = _search(images, indices, cache.pixels)
        _write_pairs(path, fingerprint, pairs)
    return pairs


def _read_pairs(path: Path, fingerprint: int) -> np.ndarray | None:
    """The pairs that an earlier run found among the same images, or None."""
    damaged = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)
    with contextlib.suppress(*damaged), np.load(path) as content:
        if content["of"] == fingerprint:
            return np.asarray(content["pairs"])
    return None


def _write_pairs(path: Path, fingerprint: int, pairs: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez(content, of=np.uint64(fingerprint), pairs=pairs)
    with contextlib.suppress(OSError):  # the search is then repeated in the next run
        write_atomically(path, content.getvalue())


def _search(images: np.ndarray, indices: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Compare each image with each, by difference hash and then by pixels: int64 (P, 2).

    pixels: of the cache's images, uint8 (M, S, S, 3).
    """
    bits = np.unpackbits(images["record"]["dhash"][indices], axis=1)  # (N, 256), 0 or 1
    # Plain images have hashes of almost only zeros or ones, which say nothing.
    ones = bits.sum(axis=1)
    has_structure = (ones > 16) & (ones < HASH_BITS - 16)
    indices = indices[has_structure]
    # With -1 and 1 for the bits, the product of two hashes is 256 - 2 × the bits that differ.
    signs = bits[has_structure].astype(np.float32) * 2 - 1
    min_product = HASH_BITS - 2 * MAX_DIFFERENT_BITS

    pairs: list[tuple[int, int]] = []
    starts = range(0, len(indices), CHUNK)
    for start in tqdm(starts, "Comparing images", unit="kimg", leave=False, disable=None):
        products = signs[start : start + CHUNK] @ signs[start:].T
        is_candidate = np.triu(products >= min_product, 1)  # each pair once, none with itself
        candidates = np.argwhere(is_candidate)[:MAX_PAIRS]
        for row, column in candidates.tolist():
            first = int(indices[start + row])
            second = int(indices[start + column])
            first_pixels = pixels[images["row"][first]]
            second_pixels = pixels[images["row"][second]]
            if _similar(first_pixels, second_pixels):
                pairs.append((first, second))
        if len(pairs) > MAX_PAIRS:
            break
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _similar(first: np.ndarray, second: np.ndarray) -> bool:
    """True if the values of two images' pixels differ by less than 3 % on average."""
    difference = first.astype(np.int16) - second.astype(np.int16)
    mean_difference = np.abs(difference).mean()
    return bool(mean_difference < MAX_DIFFERENCE)


def draw_test(labels: np.ndarray, indices: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Draw the images to test with: bool, one for each of the indices.

    They are a random TEST_FRACTION of each class, except that images that are alike are on the same
    side: training would know the test's answers otherwise. A class that would be all test is only
    trained on.

    labels: int64 (N,), of all images; indices: int64 (M,), the images to draw from; pairs: see
    `near_duplicates`.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    own_labels = labels[indices]
    _, drawn = stratified_split(torch.from_numpy(own_labels), TEST_FRACTION)
    is_test = np.zeros(len(indices), dtype=bool)
    is_test[drawn.numpy()] = True
    # Images that are linked by pairs, directly or by others, form a group and follow its first one.
    num_images = len(labels)
    first, second = pairs[:, 0], pairs[:, 1]
    links = np.ones(len(pairs))
    graph = coo_array((links, (first, second)), (num_images, num_images))
    _, groups = connected_components(graph, directed=False)
    is_test = is_test[first_occurrence(groups[indices])]
    for label in np.unique(own_labels):
        of_class = own_labels == label
        if is_test[of_class].all():
            is_test[of_class] = False
    return is_test
