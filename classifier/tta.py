"""Test-time augmentation: the mean prediction over several views of an image."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from classifier.datasets.dataset import Split

# Of the test images, the share that is seen in several views. Hardly any of the others would change
# its class: the accuracy was within 0.1 points of that with views of all (benchmarks/README.md).
UNCERTAIN_SHARE = 0.25


def mean_logits(model: nn.Module, images: torch.Tensor, tta: int) -> torch.Tensor:
    """Mean logits over `tta` views of each image: float32 (N, classes).

    tta: 1: the image itself; 2: also its mirror image; 6: also both shifted by (-1, -1) and by
    (1, 1) pixels, where the unshifted views have a weight of 1/4 and the shifted ones of 1/8, as
    in cifar10-airbench (Jordan, 2024). images: normalised, float (N, C, H, W).

    Raises ValueError for another number of views.
    """
    if tta not in (1, 2, 6):
        raise ValueError(f"tta has to be 1, 2 or 6, not {tta}")
    if tta == 1:
        return model(images).float()
    if tta == 2:
        views = [(0.5, images)]
    else:
        padded = F.pad(images, (1, 1, 1, 1), "reflect")
        up_left, down_right = padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]
        views = [(0.25, images), (0.125, up_left), (0.125, down_right)]

    weighted = []
    for weight, view in views:
        weighted.append(weight * model(view).float())
        weighted.append(weight * model(view.flip(3)).float())
    return torch.stack(weighted).sum(0)


def accuracy_with_tta(
    model: nn.Module, evaluate: Callable[..., Any], images: Split, logits: torch.Tensor, tta: int
) -> float:
    """Accuracy, in [0, 1], if the least certain quarter of the images is seen in `tta` views.

    evaluate: the function of image_classification.py. logits: of single views of the images,
    float32 (N, classes).
    """
    confidence = logits.softmax(1).amax(1)
    num_uncertain = math.ceil(UNCERTAIN_SHARE * len(logits))
    uncertain = confidence.argsort()[:num_uncertain]
    of_views = evaluate(model, *images.select(uncertain), tta=tta).logits
    predictions = logits.argmax(1)
    predictions[uncertain] = of_views.argmax(1)
    return (predictions == images.labels.cpu()).float().mean().item()
