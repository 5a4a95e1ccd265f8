"""The handwritten digits that come with scikit-learn: the data set that needs no download."""

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
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    gray = torch.from_numpy(digits.images)[:, None].float()  # (N, 1, 8, 8), [0, 16]
    gray = gray * (255 / 16)
    images = F.interpolate(gray, size=32, mode="bilinear").round().byte().repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target)

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
