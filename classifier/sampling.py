"""Which images an epoch takes, and how much each class counts in the loss."""

import math

import torch

RESAMPLED = ("oversample", "undersample")  # of --class-balance: they draw an epoch's images


def balanced_indices(
    labels: torch.Tensor, class_balance: str, seed: int, epoch: int
) -> torch.Tensor | None:
    """Draw the same number of images of each class, from (seed, epoch) alone.

    Args:
        labels: int64 (N,).
        class_balance: "oversample": as many images as the largest class has; those of the other
            classes are repeated, as evenly as possible. "undersample": as many as the smallest
            class has; another epoch leaves out other images. Otherwise the result is None.

    Returns indices into `labels`, int64, class by class. Classes without an image stay without one.
    """
    if class_balance not in RESAMPLED:
        return None
    labels = labels.cpu()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    classes = [_indices_of(labels, label) for label in labels.unique().tolist()]
    counts = [len(members) for members in classes]
    size = max(counts) if class_balance == "oversample" else min(counts)
    return torch.cat([_draw(members, size, generator) for members in classes])


def repeated_indices(indices: torch.Tensor, size: int, seed: int, epoch: int) -> torch.Tensor:
    """Repeat these indices until there are `size`, in an order drawn from (seed, epoch) alone.

    None comes more than once more than another. indices: int64 (N,). Returns int64 (size,).
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return _draw(indices, size, generator)


def epoch_size(labels: torch.Tensor, class_balance: str) -> int:
    """Number of images in an epoch. labels: int64 (N,)."""
    balanced = balanced_indices(labels, class_balance, seed=0, epoch=0)
    return len(labels) if balanced is None else len(balanced)


def class_weights(
    labels: torch.Tensor, num_classes: int, class_balance: str
) -> torch.Tensor | None:
    """Weights of the classes in the loss, float32 (num_classes,), by which all count the same.

    None unless class_balance is "weights". labels: int64 (N,). The mean weight of an image is 1.
    """
    if class_balance != "weights":
        return None
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1)
    return len(labels) / num_classes / counts


def imbalanced_indices(labels: torch.Tensor, share: float) -> torch.Tensor:
    """Make a data set imbalanced: the later the class, the fewer of its images stay.

    The share that stays falls exponentially, from all of the first class to `share` of the last
    one, as in the long-tailed CIFAR of Cui et al., 2019. No class loses all its images.

    labels: int64 (N,). Returns indices into `labels`, int64, ascending.
    """
    last_label = int(labels.max())
    kept = []
    for label in range(last_label + 1):
        members = _indices_of(labels, label)
        class_share = share ** (label / max(1, last_label))
        count = math.ceil(len(members) * class_share)
        kept.append(members[:count])
    return torch.cat(kept).sort().values


def _draw(members: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """All members in random order, then all in another order, and so on, until there are `size`."""
    num_rounds = math.ceil(size / len(members))
    rounds = [torch.randperm(len(members), generator=generator) for _ in range(num_rounds)]
    return members[torch.cat(rounds)[:size]]


def _indices_of(labels: torch.Tensor, label: int) -> torch.Tensor:
    """Where a label stands, int64, ascending."""
    return (labels == label).nonzero()[:, 0]
