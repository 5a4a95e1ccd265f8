"""What `--class-balance` takes besides weights: as many images of each class in every epoch."""

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
