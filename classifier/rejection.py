"""Which images a model refuses to classify, because they are too unlike its training images.

A model file has quantiles of the score of `classifier/ood_score.py` on the validation images. They
give a new image's score a meaning: the share of the validation images whose score is lower, here
called its unlikeness. An image is unknown if too few ordinary images are as unlike. Imports no
torch: `inference.py` runs an ONNX file without it.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from classifier.metrics import predict

UNKNOWN = "unknown"  # the answer for an image that is refused
DEFAULT_REJECT = 0.05  # share of ordinary images that may be refused
NUM_QUANTILES = 201  # in steps of 0.5 %


def check_reject(reject: float) -> float:
    """Return the share of images to refuse; raises ValueError unless it is in [0, 1)."""
    if not 0 <= reject < 1:
        raise ValueError(f"reject has to be from 0 to below 1, not {reject:g}")
    return reject


def parse_reject(text: str) -> float:
    """The value of --reject. Raises argparse.ArgumentTypeError."""
    try:
        return check_reject(float(text))
    except ValueError:
        message = f"{text} must be a number from 0 to below 1, such as 0.05"
        raise argparse.ArgumentTypeError(message) from None


def quantiles_of(scores: ArrayLike) -> list[float]:
    """Quantiles of scores, float (N,), in equal steps from the lowest to the highest."""
    shares = np.linspace(0, 1, NUM_QUANTILES)
    return np.quantile(np.asarray(scores, np.float64), shares).tolist()


def read_quantiles(content: Any) -> list[float]:
    """Quantiles in a file, which may hold anything there. Raises ValueError if they are invalid."""
    is_list = isinstance(content, list) and len(content) > 1
    if not is_list or any(type(value) not in (int, float) for value in content):
        raise ValueError("no list of numbers")
    quantiles = np.array(content, np.float64)
    if not np.isfinite(quantiles).all() or (np.diff(quantiles) < 0).any():
        raise ValueError("quantiles have to be finite and in order")
    return quantiles.tolist()


def unlikeness(scores: ArrayLike, quantiles: Sequence[float]) -> np.ndarray:
    """The share of the validation images with a lower score, float64 (N,), in [0, 1].

    scores: float (N,); one that is no number counts as the highest.
    """
    scores = np.nan_to_num(np.asarray(scores, np.float64), nan=np.inf)
    return np.interp(scores, quantiles, np.linspace(0, 1, len(quantiles)))


def threshold(quantiles: Sequence[float], reject: float) -> float:
    """The score that this share of the validation images exceeds; reject: in [0, 1)."""
    return float(np.interp(1 - reject, np.linspace(0, 1, len(quantiles)), quantiles))


def is_unknown(unlikeness: ArrayLike, reject: float) -> np.ndarray:
    """Which images are refused if that may happen to this share of ordinary images: bool (N,).

    reject: in [0, 1); 0: none is refused.
    """
    return (np.asarray(unlikeness) > 1 - reject) & (reject > 0)


def rejection_metrics(
    logits: ArrayLike, labels: ArrayLike, unlikeness: ArrayLike | None, reject: float
) -> dict[str, float | None]:
    """The share of test images that are refused, and the accuracy on the others; in [0, 1].

    Both are None without scores and where nothing is refused by setting; the accuracy is None, too,
    if all images are refused.

    logits: float (N, classes); labels: int64 (N,); unlikeness: float (N,).
    """
    if unlikeness is None or reject == 0:
        return {"unknown_share": None, "accepted_accuracy": None}
    refused = is_unknown(unlikeness, reject)
    _, predictions = predict(logits)
    is_right = (predictions == np.asarray(labels))[~refused]
    accuracy = float(is_right.mean()) if len(is_right) else None
    return {"unknown_share": float(refused.mean()), "accepted_accuracy": accuracy}
