"""How good a classifier is, and how far its confidence can be trusted.

scikit-learn and SciPy have most of this, but take seconds to import, at the end of every run. Only
`fit_temperature` needs torch: `inference.py` tests an ONNX file where torch is not installed. What
the other functions take may be arrays or tensors on the CPU.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    import torch

NUM_BINS = 15  # of confidence, in the expected calibration error
TOP = 5  # of top-5 accuracy
MANY_CLASSES = 20  # with more of them, the top-5 accuracy is computed
Z = NormalDist().inv_cdf(0.975)  # 95 % of a normal distribution lie within ± Z standard deviations


def softmax(logits: ArrayLike, temperature: float | None = None) -> np.ndarray:
    """Probabilities of the classes, float64 (N, classes), whose rows add up to 1.

    logits: float (N, classes), which are divided by the temperature if there is one.
    """
    powers = np.exp(_shift(logits, temperature))
    return powers / powers.sum(1, keepdims=True)


def _shift(logits: ArrayLike, temperature: float | None = None) -> np.ndarray:
    """Logits over the temperature, float64, moved so that the largest of each row is 0."""
    scaled = np.asarray(logits).astype(np.float64) / (temperature or 1)
    return scaled - scaled.max(1, keepdims=True)


def predict(logits: ArrayLike, temperature: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Confidence, float64 (N,), in [0, 1], and predicted class, int64 (N,), from logits (N, C)."""
    shifted = _shift(logits, temperature)
    return 1 / np.exp(shifted).sum(1), shifted.argmax(1)


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean negative logarithm of the probability of the true class.

    logits: float (N, classes); labels: int64 (N,).
    """
    shifted = _shift(logits)
    of_label = np.take_along_axis(shifted, np.asarray(labels)[:, None], 1)[:, 0]
    return float((np.log(np.exp(shifted).sum(1)) - of_label).mean())


def top_accuracy(logits: ArrayLike, labels: ArrayLike, count: int = TOP) -> float:
    """Share of the images whose true class is among the `count` likeliest, in [0, 1].

    Of equal logits that of the first class counts as the largest, as in `predict`.

    logits: float (N, classes); labels: int64 (N,).
    """
    logits = np.asarray(logits)
    label_column = np.asarray(labels)[:, None]
    of_label = np.take_along_axis(logits, label_column, 1)
    is_earlier = np.arange(logits.shape[1]) < label_column
    is_likelier = (logits > of_label) | ((logits == of_label) & is_earlier)
    return float((is_likelier.sum(1) < count).mean())


def expected_calibration_error(
    logits: ArrayLike, labels: ArrayLike, temperature: float | None = None
) -> float:
    """Mean distance between confidence and accuracy over bins of confidence (Guo et al., 2017).

    Each of the 15 bins counts by the number of its images.

    logits: float (N, classes); labels: int64 (N,). Returns a share in [0, 1].
    """
    confidence, prediction = predict(logits, temperature)
    gaps = confidence - (prediction == np.asarray(labels))
    bins = (confidence * NUM_BINS).astype(np.int64).clip(max=NUM_BINS - 1)
    gap_of_bin = np.bincount(bins, weights=gaps)
    return float(np.abs(gap_of_bin).sum() / len(gaps))


def fit_temperature(logits: "torch.Tensor", labels: "torch.Tensor") -> float:
    """Temperature scaling (Guo et al., 2017): what to divide logits by for a calibrated softmax.

    logits: float (N, classes); labels: int64 (N,); of validation images, both on the CPU.
    """
    from torch import nn

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


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images of each class (rows) are taken for which class (columns), int64.

    labels, predictions: int64 (N,).
    """
    pairs = labels * num_classes + predictions
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def classification_metrics(
    logits: ArrayLike, labels: ArrayLike, classes: list[str], temperature: float | None
) -> dict[str, Any]:
    """The part of report.json that can be computed from the test images; shares are in [0, 1].

    Args:
        logits: float32 (N, classes).
        labels: int64 (N,).
        temperature: of fit_temperature, or None without validation images.

    What cannot be known is None: recall, precision and F1 of a class without test images, and the
    precision of a class that was never predicted; so is the top-5 accuracy of few classes. The
    confusion matrix has a row for each true class. macro_f1 is the mean over the classes that have
    test images.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    _, predictions = predict(logits, temperature)
    matrix = confusion_matrix(labels, predictions, len(classes))
    num_tested, num_predicted = matrix.sum(1), matrix.sum(0)
    correct = matrix.diagonal()
    is_tested, is_predicted = num_tested > 0, num_predicted > 0
    with np.errstate(invalid="ignore"):  # 0 / 0, which becomes None
        recall = correct / num_tested
        precision = correct / num_predicted
        f1 = 2 * correct / (num_tested + num_predicted)

    count = len(labels)
    hits = int(matrix.trace())
    recall_of_class = _by_class(classes, recall, is_tested)
    has_many_classes = len(classes) > MANY_CLASSES
    return {
        "test_accuracy": hits / count,
        "test_accuracy_interval": list(wilson_interval(hits, count)),
        "top5_accuracy": top_accuracy(logits, labels) if has_many_classes else None,
        "test_loss": cross_entropy(logits, labels),
        "class_accuracy": recall_of_class,  # the share of a class that is recognised is its recall
        "precision": _by_class(classes, precision, is_tested & is_predicted),
        "recall": recall_of_class,
        "f1": _by_class(classes, f1, is_tested),
        "macro_f1": float(f1[is_tested].mean()),
        "confusion_matrix": matrix.tolist(),
        "temperature": temperature,
        "calibration_error": expected_calibration_error(logits, labels, temperature),
        "calibration_error_before": expected_calibration_error(logits, labels),
    }


def _by_class(
    classes: list[str], values: np.ndarray, is_known: np.ndarray
) -> dict[str, float | None]:
    """The value of each class by its name, None where it is not known."""
    by_class: dict[str, float | None] = {}
    for name, value, known in zip(classes, values.tolist(), is_known.tolist(), strict=True):
        by_class[name] = value if known else None
    return by_class
