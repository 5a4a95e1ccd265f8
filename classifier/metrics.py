"""How good a classifier is, and how far its confidence can be trusted."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    import numpy as np

NUM_BINS = 15  # of confidence, in the expected calibration error


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
    from scipy.optimize import minimize_scalar

    # As if there were one more image, of each class in equal parts (Laplace). Otherwise confidence
    # would grow without limit where all predictions are right.
    loss = nn.CrossEntropyLoss(label_smoothing=1 / (1 + len(labels)))

    def loss_at(inverse_temperature: float) -> float:
        return loss(logits * inverse_temperature, labels).item()

    fit = minimize_scalar(loss_at, bounds=(0.01, 100))
    return 1 / float(fit.x)


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
    from scipy.stats import binomtest
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    _, predictions = predict(logits, temperature)
    class_indices = range(len(classes))
    matrix = confusion_matrix(labels, predictions, labels=class_indices)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, labels=class_indices, zero_division=0
    )
    is_tested = matrix.sum(1) > 0
    is_predicted = matrix.sum(0) > 0

    count = len(labels)
    hits = int(matrix.trace())
    low, high = binomtest(hits, count).proportion_ci(method="wilson")
    recall_of_class = _by_class(classes, recall, is_tested)
    return {
        "test_accuracy": hits / count,
        "test_accuracy_interval": [float(low), float(high)],
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
    classes: list[str], values: "np.ndarray", is_known: "np.ndarray"
) -> dict[str, float | None]:
    """The value of each class by its name, None where it is not known."""
    by_class: dict[str, float | None] = {}
    for name, value, known in zip(classes, values.tolist(), is_known.tolist(), strict=True):
        by_class[name] = value if known else None
    return by_class
