"""Which images an epoch takes: what `--class-balance` knows besides weights, and `--make-imbalanced`."""

import math

import torch


def balanced(labels: torch.Tensor, how: str, generator: torch.Generator) -> torch.Tensor:
    """Indices into labels, int64 (N,), of as many images of each class that there is.

    how: "oversample": as many as the largest class has, those of the others several times, as evenly as possible;
    "undersample": as many as the smallest has, in each epoch other ones of the others.
    """
    classes = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    size = (max if how == "oversample" else min)(map(len, classes))
    chosen = []
    for members in classes:
        rounds = [torch.randperm(len(members), generator=generator) for _ in range(math.ceil(size / len(members)))]
        chosen.append(members[torch.cat(rounds)[:size]])
    return torch.cat(chosen)


def imbalanced(labels: torch.Tensor, share: float) -> torch.Tensor:
    """Indices into labels, int64, ascending: the later the class, the fewer, exponentially; of the last, `share`."""
    last = max(1, int(labels.max()))
    classes = [(label, (labels == label).nonzero()[:, 0]) for label in range(last + 1)]
    kept = [members[: math.ceil(len(members) * share ** (label / last))] for label, members in classes]
    return torch.cat(kept).sort().values
