"""Which images of a folder are held out: decided by their content, and by whole groups.

A position in a list says nothing of an image: one file more, and every image behind it has another
one. So each group of identical and near-identical images gets a random number from its content, and
is held out if that is below the fraction. A folder that grows keeps its split: a group changes
sides only if a near-identical image joins it (of k images, with a probability of about 1 / (k + 1),
it then gets another number), or where its class would otherwise have far too many or too few images
held out.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from classifier.datasets.decode import hash64

Counts = list[tuple[int, int]]  # of a group: its classes, and how many images it has of each
MIN_GROUPS = 3  # of so many groups in a class at least one is held out


class ImageIds(NamedTuple):
    """What the images of a folder are known by, wherever they are in a list.

    Attributes:
        digests: int64 (N,), a hash of the content of each image's file.
        groups: int64 (N,), the smallest digest among the image itself and all images of the folder
            that are identical or nearly so: the same number for each of them.
    """

    digests: torch.Tensor
    groups: torch.Tensor

    def select(self, indices: Any) -> "ImageIds":
        """Those at these indices: an int64 or bool tensor, or a slice."""
        return ImageIds(self.digests[indices], self.groups[indices])


def random_numbers(digests: np.ndarray, salt: str) -> np.ndarray:
    """A number in [0, 1) for each digest, float64 (N,): evenly distributed, and always the same.

    salt: what they are drawn for; numbers for one purpose say nothing of those for another.
    """
    hashes = [hash64(f"{salt} {digest}".encode()) for digest in digests.tolist()]
    return np.array(hashes, dtype=np.uint64) / 2.0**64


def hold_out(labels: np.ndarray, groups: np.ndarray, fraction: float, salt: str) -> np.ndarray:
    """Choose about `fraction` of each class, by whole groups: bool (N,), True for those held out.

    A class has between three and five quarters of its share held out, as far as its groups allow,
    but at least one image if its share is more than half an image, and never all.

    Args:
        labels: int64 (N,).
        groups: int64 (N,), see ImageIds.
        fraction: in [0, 1).
        salt: see `random_numbers`.
    """
    names, members = np.unique(groups, return_inverse=True)
    numbers = random_numbers(names, salt)
    counts = _count_classes(labels, members)
    class_sizes = np.bincount(labels)
    least, most = _bounds(class_sizes, fraction)
    num_held_out = np.zeros_like(class_sizes)
    is_held_out = np.zeros(len(names), dtype=bool)

    def hold(group: int) -> None:
        is_held_out[group] = True
        for label, count in counts[group]:
            num_held_out[label] += count

    for group in np.argsort(numbers).tolist():
        is_drawn = numbers[group] < fraction
        if not is_drawn and (num_held_out >= least).all():
            break  # the groups that follow are not drawn either
        too_few = any(num_held_out[label] < least[label] for label, _ in counts[group])
        fits = all(num_held_out[label] + count <= most[label] for label, count in counts[group])
        if (is_drawn or too_few) and fits:
            hold(group)

    # Each group of a class may be larger than the number that is to be held out.
    for label in np.flatnonzero((least > 0) & (num_held_out == 0)).tolist():
        smallest = _smallest_group(label, counts, numbers, class_sizes - num_held_out)
        if smallest is not None:
            hold(smallest)
    return is_held_out[members]


def _count_classes(labels: np.ndarray, members: np.ndarray) -> list[Counts]:
    """Which classes the images of each group are of. members: number of each image's group."""
    num_classes = labels.max(initial=0) + 1
    keys, sizes = np.unique(members * num_classes + labels, return_counts=True)
    counts: list[Counts] = [[] for _ in range(members.max(initial=-1) + 1)]
    for key, size in zip(keys.tolist(), sizes.tolist(), strict=True):
        group, label = divmod(key, int(num_classes))
        counts[group].append((label, size))
    return counts


def _bounds(class_sizes: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """How many images of each class are to be held out, at least and at most."""
    share = np.round(class_sizes * fraction).astype(np.int64)
    tolerance = np.where(share >= 3, np.maximum(share // 4, 1), 0)
    most = np.minimum(share + tolerance, class_sizes - 1)
    return np.minimum(share - tolerance, most), most


def _smallest_group(
    label: int, counts: list[Counts], numbers: np.ndarray, remaining: np.ndarray
) -> int | None:
    """The smallest group of a class; of several the one with the lowest number.

    remaining: how many images of each class are not held out yet. None if the class has fewer than
    MIN_GROUPS groups, or if some class would have no other image left.
    """
    own = [group for group, each in enumerate(counts) if label in dict(each)]
    if len(own) < MIN_GROUPS:
        return None
    spare = [group for group in own if all(size < remaining[each] for each, size in counts[group])]
    return min(
        spare,
        key=lambda group: (sum(size for _, size in counts[group]), numbers[group]),
        default=None,
    )


def folds(labels: np.ndarray, groups: np.ndarray, num_folds: int) -> np.ndarray:
    """Divide the images, by whole groups, into folds with about as many images of each class.

    labels, groups: int64 (N,), as for `hold_out`. Returns the number of each image's fold, int64
    (N,). A class with as many groups as folds is in each of them, unless groups have images of
    several classes.
    """
    names, members = np.unique(groups, return_inverse=True)
    numbers = random_numbers(names, "fold")
    counts = _count_classes(labels, members)
    group_sizes = np.bincount(members)
    shares = np.zeros((num_folds, labels.max(initial=0) + 1))  # of each class that a fold has
    class_sizes = np.bincount(labels)
    fold = np.zeros(len(names), dtype=np.int64)
    for group in np.lexsort((numbers, -group_sizes)).tolist():  # the large ones first
        own = [label for label, _ in counts[group]]
        fold[group] = shares[:, own].sum(axis=1).argmin()
        for label, count in counts[group]:
            shares[fold[group], label] += count / class_sizes[label]
    return fold[members]
