"""Are these labelled images, as a caller of evaluate() should give them?"""

from typing import Any

import torch

from classifier.datasets.memmap_images import MemmapImages
from classifier.text import FROM_FLOATS


def check_images(images: Any, channels: int) -> None:
    """Raise TypeError or ValueError unless these are images, uint8 (N, channels, H, W), N > 0.

    images: a tensor, or the MemmapImages of a large folder.
    """
    if not isinstance(images, (torch.Tensor, MemmapImages)):
        kind = type(images).__name__
        raise TypeError(f"images have to be a tensor, not a {kind}: see torch.from_numpy")
    if isinstance(images, torch.Tensor) and images.dtype != torch.uint8:
        raise TypeError(
            f"images have to be uint8 in [0, 255], not {images.dtype} ({FROM_FLOATS}): they are "
            "normalised here"
        )
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != channels or 0 in shape:
        raise ValueError(f"images have to be (N, {channels}, H, W), not {shape}")


def check_labels(labels: Any, num_images: int) -> None:
    """Raise TypeError or ValueError unless these are as many labels, int64 (N,), from 0 on."""
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        kind = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(f"labels have to be a tensor of int64, not {kind}")
    if labels.shape != (num_images,):
        raise ValueError(f"{num_images} images have labels of shape {tuple(labels.shape)}")
    if labels.min() < 0:
        raise ValueError(f"labels are numbers of classes, from 0 on: {int(labels.min())} is none")


def check_label_range(labels: torch.Tensor, num_classes: int) -> None:
    """Raise ValueError for a label that the network has no class for."""
    highest = int(labels.max())
    if highest >= num_classes:
        raise ValueError(f"the label {highest} is none of the network's {num_classes} classes")
