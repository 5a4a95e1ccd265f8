"""Which images an epoch takes where the classes are of unequal size."""

import math

import torch


def balanced_indices(
    labels: torch.Tensor, class_balance: str, generator: torch.Generator
) -> torch.Tensor:
    """Draw the same number of images of each class, for one epoch.

    Args:
        labels: int64 (N,).
        class_balance: "oversample": as many images as the largest class has; those of the other
            classes are repeated, as evenly as possible. "undersample": as many as the smallest
            class has; a generator of another seed leaves out other images.
        generator: on the CPU.

    Returns indices into `labels`, int64, class by class. Classes without an image stay without one.
    """
    classes = [_indices_of(labels, label) for label in labels.unique().tolist()]
    counts = [len(members) for members in classes]
    size = max(counts) if class_balance == "oversample" else min(counts)

    chosen = []
    for members in classes:
        num_rounds = math.ceil(size / len(members))
        rounds = [torch.randperm(len(members), generator=generator) for _ in range(num_rounds)]
        order = torch.cat(rounds)[:size]
        chosen.append(members[order])
    return torch.cat(chosen)


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


def _indices_of(labels: torch.Tensor, label: int) -> torch.Tensor:
    """Where a label stands, int64, ascending."""
    return (labels == label).nonzero()[:, 0]
