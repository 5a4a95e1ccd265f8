"""How good a classifier is, and how far its confidence can be trusted.

scikit-learn and SciPy have most of this, but take seconds to import, at the end of every run.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

NUM_BINS = 15  # of confidence, in the expected calibration error
Z = NormalDist().inv_cdf(0.975)  # 95 % of a normal distribution lie within ± Z standard deviations


def predict(
    logits: torch.Tensor, temperature: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence, float32 (N,), in [0, 1], and predicted class, int64 (N,), from logits (N, C)."""
    confidence, prediction = (logits / (temperature or 1)).softmax(1).max(1)
    return confidence, prediction


def expected_calibration_error(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean distance between confidence and accuracy over bins of confidence (Guo et al., 2017).

    Each of the 15 bins counts by the number of its images.

    logits: float (N, classes); labels: int64 (N,); both on the CPU. Returns a share in [0, 1].
    """
    confidence, prediction = predict(logits)
    is_correct = (prediction == labels).float()
    bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    gaps = torch.zeros(NUM_BINS).index_add(0, bins, confidence - is_correct)
    return gaps.abs().sum().item() / len(labels)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Temperature scaling (Guo et al., 2017): what to divide logits by for a calibrated softmax.

    logits: float (N, classes); labels: int64 (N,); of validation images, both on the CPU.
    """
    # As if there were one more image, of each class in equal parts (Laplace). Otherwise confidence
    # would grow without limit where all predictions are right.
    loss = nn.CrossEntropyLoss(label_smoothing=1 / (1 + len(labels)))

    def loss_at(inverse_temperature: float) -> float:
        return loss(logits * inverse_temperature, labels).item()

    return 1 / minimize(loss_at, 0.01, 100)


def minimize(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum between positive bounds has it, to 6 digits.

    Golden-section search on a logarithmic scale.
    """
    golden = (math.sqrt(5) - 1) / 2
    left, right = math.log(low), math.log(high)
    while right - left > 1e-6:
        margin = golden * (right - left)
        inner_left, inner_right = right - margin, left + margin
        if function(math.exp(inner_left)) < function(math.exp(inner_right)):
            right = inner_right
        else:
            left = inner_left
    return math.exp((left + right) / 2)


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, of which `hits` of `count` images are a sample (Wilson, 1927).

    Returns its bounds, in [0, 1].
    """
    share = hits / count
    middle = share + Z**2 / (2 * count)
    margin = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    return max(0.0, (middle - margin) / scale), min(1.0, (middle + margin) / scale)


def confusion_matrix(
    labels: torch.Tensor, predictions: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """How many images of each class (rows) are taken for which class (columns), int64.

    labels, predictions: int64 (N,), on the CPU.
    """
    pairs = labels * num_classes + predictions
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def classification_metrics(
    logits: torch.Tensor, labels: torch.Tensor, classes: list[str], temperature: float | None
) -> dict[str, Any]:
    """The part of report.json that can be computed from the test images; shares are in [0, 1].

    Args:
        logits: float32 (N, classes), on the CPU.
        labels: int64 (N,), on the CPU.
        temperature: of fit_temperature, or None without validation images.

    What cannot be known is None: recall, precision and F1 of a class without test images, and the
    precision of a class that was never predicted. The confusion matrix has a row for each true
    class.
    """
    _, predictions = predict(logits, temperature)
    matrix = confusion_matrix(labels, predictions, len(classes))
    num_tested, num_predicted = matrix.sum(1), matrix.sum(0)
    correct = matrix.diagonal().double()
    recall = correct / num_tested
    precision = correct / num_predicted
    f1 = 2 * correct / (num_tested + num_predicted)
    is_tested, is_predicted = num_tested > 0, num_predicted > 0

    count = len(labels)
    hits = int(matrix.trace())
    recall_of_class = _by_class(classes, recall, is_tested)
    return {
        "test_accuracy": hits / count,
        "test_accuracy_interval": list(wilson_interval(hits, count)),
        "test_loss": F.cross_entropy(logits, labels).item(),
        "class_accuracy": recall_of_class,  # the share of a class that is recognised is its recall
        "precision": _by_class(classes, precision, is_tested & is_predicted),
        "recall": recall_of_class,
        "f1": _by_class(classes, f1, is_tested),
        "confusion_matrix": matrix.tolist(),
        "temperature": temperature,
        "calibration_error": expected_calibration_error(logits / (temperature or 1), labels),
        "calibration_error_before": expected_calibration_error(logits, labels),
    }


def _by_class(
    classes: list[str], values: torch.Tensor, is_known: torch.Tensor
) -> dict[str, float | None]:
    """The value of each class by its name, None where it is not known."""
    by_class: dict[str, float | None] = {}
    for name, value, known in zip(classes, values.tolist(), is_known.tolist(), strict=True):
        by_class[name] = value if known else None
    return by_class
