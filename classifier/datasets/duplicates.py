"""Images that are identical or nearly so: finding them, and which ones belong together."""

import contextlib
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from classifier.datasets.altered_copies import altered_copies
from classifier.datasets.decode import hash64
from classifier.datasets.fitting import squareness
from classifier.datasets.image_cache import DecodedCache
from classifier.files import write_atomically

HASH_BITS = 256
MAX_DIFFERENT_BITS = 20  # of the difference hashes of two images that are near-identical
MAX_DIFFERENCE = 255 * 0.03  # mean difference of their pixels' values
# Plain images have hashes of almost only zeros or ones, which say little, or are noise.
MIN_ONES = 16  # and zeros: images with more of both in their hashes are compared by these
MAX_PLAIN = 40  # ones or zeros: those with at most so many are compared by thumbnails, too
THUMBNAIL_SIZE = 8  # pixels, of the thumbnails by which plain images are compared
# Largest difference of the thumbnails' values. Not the mean: a small drawing that differs changes a
# few places much, and noise all places a little.
MAX_THUMBNAIL_DIFFERENCE = 255 * 0.015
FEW_VALUES = 24  # of thumbnails, which are compared before the others
MAX_PAIRS = 10_000  # after so many, only pairs that join two groups are looked for
MAX_COMPARED = 100_000  # images: among more, near-identical ones are not looked for
MAX_VALUES = 10**11  # of pixels: the search ends when so many were compared, after a minute or two
CHUNK = 1000  # images whose hashes are compared with all others at once, if memory allows
MAX_PRODUCTS = 2**23  # of hashes at once: 32 MiB
PIXELS_AT_ONCE = 64  # images whose pixels are compared with one other at once
# Part of what `near.npz` is of. Raise it, and dataset.SPLIT_RULES, when other pairs would be found.
SEARCHED_AS = 2


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
    first = first_occurrence(images["record"]["pixel_digest"])
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
    content = records["pixel_digest"].tobytes() + records["dhash"].tobytes()
    fingerprint = hash64(bytes([SEARCHED_AS]) + content)
    path = cache.path / "near.npz"
    found = _read_pairs(path, fingerprint)
    if found is None:
        found = search_near_identical(images, indices, cache.pixels, cache.fit)
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


def search_near_identical(
    images: np.ndarray, indices: np.ndarray, pixels: np.ndarray, fit: str = "crop"
) -> tuple[np.ndarray, bool]:
    """Compare each image with each: those with structure by hash, plain ones by thumbnail.

    What is alike by these is compared by pixels. Hashes are of whole images, thumbnails and pixels
    of what the network sees of them. Then mirrored, cropped, brightened and much smaller copies of
    images with structure are looked for.

    pixels: of the cache's images, uint8 (M, S, S, 3). fit: how they became squares. Returns int64
    (P, 2), and False if there were too many similar images to compare all.
    """
    bits = np.unpackbits(images["record"]["dhash"][indices], axis=1)  # (N, 256), 0 or 1
    ones = bits.sum(axis=1)
    ones = np.minimum(ones, HASH_BITS - ones)
    filled = np.ones(len(indices))
    if fit == "pad":
        records = images["record"][indices]
        filled = squareness(records["width"], records["height"])
    search = _Search(indices, images["row"][indices], pixels, filled)
    is_complete = _search_by_hash(search, np.flatnonzero(ones > MIN_ONES), bits)
    is_complete = is_complete and _search_by_thumbnail(search, np.flatnonzero(ones <= MAX_PLAIN))
    pairs = np.array(search.pairs, dtype=np.int64).reshape(-1, 2)
    if is_complete:
        places = np.flatnonzero(ones > MIN_ONES)  # plain images may be alike by chance
        copies, is_complete = altered_copies(pixels, search.rows[places], search.groups[places])
        pairs = np.concatenate([pairs, indices[places[copies]]])
    pairs.sort(axis=1)
    return pairs, is_complete


class _Search:
    """What is compared, and what was found so far.

    Attributes:
        indices: int64 (N,), of the images that are compared; other arrays here are in this order.
        rows: int64 (N,), places of the images among the pixels.
        pixels: of the cache's images, uint8 (M, S, S, 3).
        filled: float64 (N,), the share of an image's pixels that are not border. Borders are all
            alike, and must not make images alike.
        pairs: of near-identical images, by their `indices`.
        groups: int64 (N,), the same number for images that pairs link.
        num_values: how many values of pixels and thumbnails were compared.
    """

    def __init__(
        self, indices: np.ndarray, rows: np.ndarray, pixels: np.ndarray, filled: np.ndarray
    ):
        self.indices = indices
        self.rows = rows
        self.pixels = pixels
        self.filled = filled
        self.pairs: list[tuple[int, int]] = []
        self.groups = np.arange(len(indices))
        self.num_values = 0

    @property
    def has_time(self) -> bool:
        """False if so much was compared that the search is to end."""
        return self.num_values <= MAX_VALUES

    def is_unlinked(self, first: int, others: np.ndarray) -> np.ndarray:
        """Whether an image is to be compared with others: bool, one for each of these.

        After MAX_PAIRS pairs, images that are linked by some already are not compared any more. So
        a thousand images that are all alike are a thousand comparisons more, not half a million.
        """
        if len(self.pairs) < MAX_PAIRS:
            return np.ones(len(others), dtype=bool)
        return self.groups[others] != self.groups[first]

    def compare(self, first: int, others: np.ndarray) -> bool:
        """Compare the pixels of an image and of others, and note the pairs.

        Returns False, and notes nothing, if this is too much work.
        """
        self.num_values += len(others) * self.pixels[0].size
        if not self.has_time:
            return False
        limit = MAX_DIFFERENCE * self.filled[first]
        similar = others[_similar(self.pixels, self.rows[first], self.rows[others], limit)]
        if len(similar):
            index = int(self.indices[first])
            self.pairs += [(index, int(other)) for other in self.indices[similar]]
            joined = np.isin(self.groups, self.groups[similar])
            self.groups[joined] = self.groups[first]
        return True


def _search_by_hash(search: _Search, places: np.ndarray, bits: np.ndarray) -> bool:
    """Find near-identical images among those at these places; False if the search ended early.

    bits: of the hashes of all images, uint8 (N, 256).
    """
    # With -1 and 1 for the bits, the product of two hashes is 256 - 2 × the bits that differ.
    signs = bits[places].astype(np.float32) * 2 - 1
    min_product = HASH_BITS - 2 * MAX_DIFFERENT_BITS
    rows = max(1, min(CHUNK, MAX_PRODUCTS // max(1, len(places))))
    starts = range(0, len(places), rows)
    for start in tqdm(starts, "Comparing images", leave=False, disable=None):
        products = signs[start : start + rows] @ signs[start:].T
        is_candidate = np.triu(products >= min_product, 1)  # each pair once, none with itself
        for row in np.flatnonzero(is_candidate.any(axis=1)).tolist():
            first = places[start + row]
            others = places[start + np.flatnonzero(is_candidate[row])]
            others = others[search.is_unlinked(first, others)]
            if not search.compare(first, others):
                return False
    return True


def _search_by_thumbnail(search: _Search, places: np.ndarray) -> bool:
    """Find near-identical images among those at these places; False if the search ended early.

    Two images differ in their means by no more than thumbnails may differ anywhere. So in the
    order of the means, each image is compared with few others, and no near-identical one is missed.
    """
    if not len(places):
        return True
    thumbnails, means = _thumbnails(search.pixels, search.rows[places])
    order = np.argsort(means, kind="stable")
    places, thumbnails, means = places[order], thumbnails[order], means[order]
    # Where the images differ most; of most pairs nothing else need be compared.
    telling = np.argsort(-thumbnails.std(axis=0))[:FEW_VALUES]
    few_values = np.ascontiguousarray(thumbnails[:, telling].T)
    ends = np.searchsorted(means, means + MAX_THUMBNAIL_DIFFERENCE)
    for i in tqdm(range(len(places)), "Comparing images", leave=False, disable=None):
        values = few_values[:, i + 1 : ends[i]]
        search.num_values += values.size
        if not search.has_time:
            return False
        differences = np.abs(values - few_values[:, i, None]).max(axis=0, initial=0)
        others = i + 1 + np.flatnonzero(differences < MAX_THUMBNAIL_DIFFERENCE)
        others = others[search.is_unlinked(places[i], places[others])]
        differences = np.abs(thumbnails[others] - thumbnails[i]).max(axis=1, initial=0)
        others = others[differences < MAX_THUMBNAIL_DIFFERENCE]
        if not search.compare(places[i], places[others]):
            return False
    return True


def _thumbnails(pixels: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images at about 8 × 8 pixels, float32 (N, 192), and the means of their values, (N,)."""
    size = pixels.shape[1]
    num_places = min(size, THUMBNAIL_SIZE)
    starts = np.arange(num_places) * size // num_places
    widths = np.diff(starts, append=size)
    areas = np.repeat(np.outer(widths, widths).ravel(), 3)
    thumbnails = np.empty((len(rows), len(areas)), dtype=np.float32)
    means = np.empty(len(rows))
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        sums = np.add.reduceat(pixels[rows[chunk]], starts, axis=1, dtype=np.float32)
        sums = np.add.reduceat(sums, starts, axis=2).reshape(-1, len(areas))
        thumbnails[chunk] = sums / areas
        means[chunk] = sums.sum(axis=1) / pixels[0].size
    return thumbnails, means


def _similar(pixels: np.ndarray, row: int, others: np.ndarray, limit: float) -> np.ndarray:
    """Whether the values of an image's pixels differ by less than `limit` on average from others'.

    row, others: places of the image and of the others among the pixels. Returns bool, one for each
    of the others.
    """
    image = pixels[row].astype(np.int16)
    found = []
    for start in range(0, len(others), PIXELS_AT_ONCE):
        differences = pixels[others[start : start + PIXELS_AT_ONCE]] - image
        mean_differences = np.abs(differences).mean(axis=(1, 2, 3))
        found.append(mean_differences < limit)
    return np.concatenate(found) if found else np.zeros(0, dtype=bool)
