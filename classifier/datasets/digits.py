"""The handwritten digits that come with scikit-learn: the data set that needs no download."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from classifier.config import Config
from classifier.datasets.dataset import Dataset, Split, build_dataset, stratified_split

TEST_FRACTION = 0.2  # of each class


def load_digits(config: Config, fallback_reason: str = "") -> Dataset:
    """The 1,797 digits of 8 × 8 pixels (UCI, "Optical Recognition of Handwritten Digits").

    The images are enlarged to 3 × 32 × 32, so that the networks for CIFAR-10 take them.
    fallback_reason: why CIFAR-10 is not there, if the digits take its place.
    """
    table = torch.from_numpy(_read_table())
    gray = table[:, :64].reshape(-1, 1, 8, 8).float()  # [0, 16]
    gray = gray * (255 / 16)
    images = F.interpolate(gray, size=32, mode="bilinear").round().byte().repeat(1, 3, 1, 1)
    labels = table[:, 64]

    everything = Split(images, labels)
    train_indices, test_indices = stratified_split(labels, TEST_FRACTION)
    return build_dataset(
        config,
        everything.select(train_indices),
        name="digits",
        classes=[str(digit) for digit in range(10)],
        load_test=lambda: everything.select(test_indices),
        num_test_images=len(test_indices),
        flip_keeps_label=False,
        fallback_reason=fallback_reason,
    )


def _read_table() -> np.ndarray:
    """A row for each digit: 64 pixels from 0 to 16, and the label; int64 (1797, 65).

    The file is read without importing scikit-learn, which takes seconds.
    """
    package = importlib.util.find_spec("sklearn")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if path.exists():
            return np.loadtxt(path, dtype=np.int64, delimiter=",")

    from sklearn.datasets import load_digits  # a version that keeps it elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.int64)
