"""How unlike its training images an image is: out-of-distribution detection.

A classifier gives each image one of its classes, often with high confidence, whatever the image
shows. So a second number says how far what the network computes for an image is from what it
computes for training images.

score = fit(network, evaluate, data, num_seen)    after training; None where it is not possible
with recorded(network, score) as scores:          scores of all images that the network classifies
    evaluate(network, images, labels)
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from classifier import checkpoints, rejection
from classifier.datasets.dataset import Dataset, Split
from classifier.networks.features import Features, find_stages, tapped

# More of either found no more unknown images (benchmarks/README.md), and made each run longer.
NUM_TRAIN = 1500  # training images that a score is fitted to
NUM_VALID = 1000  # validation images that quantiles are taken from
MIN_IMAGES = 20  # of each; with fewer, 5 % of them is less than an image
MAX_AXES = 128
SHRINKAGE = 0.01  # share of each variance that is added, so that none is zero
SHARPNESS = 2.0  # of the smooth maximum over the parts of a score

Evaluate = Callable[[nn.Module, Any, torch.Tensor], Any]  # the function of that name in the script


# ---- The score -----------------------------------------------------------------------------------


class Gaussian(nn.Module):
    """How far features are from those of the training images: squared Mahalanobis distance.

    The distribution of the features is a Gaussian with MAX_AXES directions of its own and the same
    variance in all others (probabilistic PCA, Tipping and Bishop, 1999), which takes little room
    also where there are many features.

    Attributes:
        centre, scale: float32 (D,), what is subtracted from the features and multiplied with them.
        axes: float32 (D, K), orthonormal directions, rounded to float16, in which files keep them.
        precisions: float32 (K,), the inverse variances along these.
        rest: float32 (), the inverse variance along all others; 0 if there are none.
    """

    centre: torch.Tensor
    scale: torch.Tensor
    axes: torch.Tensor
    precisions: torch.Tensor
    rest: torch.Tensor

    def __init__(self, **tensors: torch.Tensor):
        super().__init__()
        for name in GAUSSIAN:
            self.register_buffer(name, tensors[name])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Squared distance by number of dimensions, (N,), of features (N, D)."""
        x = (features - self.centre) * self.scale
        along = x @ self.axes
        outside = (x.square().sum(1) - along.square().sum(1)).clamp(min=0)
        distance = along.square() @ self.precisions + self.rest * outside
        return distance / x.shape[1]


GAUSSIAN = ("centre", "scale", "axes", "precisions", "rest")


def fit_gaussian(features: torch.Tensor) -> Gaussian:
    """The Gaussian of features, float (N, D)."""
    x = features.double()
    centre = x.mean(0)
    deviation = x.std(0)
    scale = 1 / (deviation + 0.1 * deviation.mean() + 1e-6)
    x = (x - centre) * scale
    covariance = x.T @ x / len(x)
    variances, axes = torch.linalg.eigh(covariance + SHRINKAGE * torch.eye(x.shape[1]))
    num_axes = min(MAX_AXES, x.shape[1])
    others = variances[:-num_axes]
    rest = 1 / others.mean() if len(others) else torch.zeros((), dtype=torch.float64)
    tensors = {
        "centre": centre,
        "scale": scale,
        "axes": axes[:, -num_axes:].half(),
        "precisions": 1 / variances[-num_axes:],
        "rest": rest,
    }
    return Gaussian(**{name: tensor.float() for name, tensor in tensors.items()})


class OodScore(nn.Module):
    """How unlike its training images an image is, from what a network computes for it.

    Attributes:
        stages: names of the parts of the network that it looks at; see Tap.
        gaussians: one for the features of each of these, and one for the input of the last layer.
        middle, spread: float32 (M,), of the parts of the score, on validation images.
        quantiles: of the score on validation images; see `rejection`.
    """

    middle: torch.Tensor
    spread: torch.Tensor

    def __init__(
        self,
        stages: list[str],
        gaussians: list[Gaussian],
        middle: torch.Tensor,
        spread: torch.Tensor,
        quantiles: list[float],
    ):
        super().__init__()
        self.stages = stages
        self.gaussians = nn.ModuleList(gaussians)
        self.register_buffer("middle", middle)
        self.register_buffer("spread", spread)
        self.quantiles = quantiles

    def parts(self, features: Features, logits: torch.Tensor) -> torch.Tensor:
        """What the score is made of, (N, M), each larger for images that are less usual."""
        found = []
        for gaussian, each in zip(self.gaussians, features, strict=True):
            found.append((gaussian(each) + 1e-6).log())
        found.append(-logits.logsumexp(1))  # energy (Liu et al., 2020)
        return torch.stack(found, 1)

    def forward(self, features: Features, logits: torch.Tensor) -> torch.Tensor:
        """The score, float32 (N,): higher for images that are less like those of the training.

        It is a smooth maximum: an image is unlike the others if one part of the score says so.
        """
        z = (self.parts(features, logits) - self.middle) / self.spread
        return (SHARPNESS * z).logsumexp(1)


class Recorded:
    """Scores of the images that a network has classified.

    Attributes:
        score: what computes them, or None.
        values: of each batch: float32 (N,), on the CPU.
    """

    def __init__(self, score: OodScore | None):
        self.score = score
        self.values: list[torch.Tensor] = []

    def unlikeness(self) -> np.ndarray | None:
        """The share of validation images that are less unusual: float64 (N,), or None."""
        if self.score is None:
            return None
        return rejection.unlikeness(torch.cat(self.values), self.score.quantiles)


@contextlib.contextmanager
def recorded(network: nn.Module, score: OodScore | None) -> Iterator[Recorded]:
    """Within this context, the scores of all images that the network classifies are recorded."""
    scores = Recorded(score)
    if score is None:
        yield scores
        return
    score.to(next(network.parameters()).device)
    with tapped(network, score.stages, score) as scores.values:
        yield scores


# ---- Fitting -------------------------------------------------------------------------------------


def fit(network: nn.Module, evaluate: Evaluate, data: Dataset, num_seen: int) -> OodScore | None:
    """The score of a trained network, or None where it is not possible.

    The training images say what is usual. Validation images, which the network has not learned,
    say how high the scores of ordinary images are; without them there is no score. Prints a note if
    there are too few images, or the network has no features to be read. Uses no global random
    generator, and leaves the network as it was.

    Args:
        evaluate: the function of that name in the script.
        num_seen: number of training images processed, counting repeats: after a short run the
            score is fitted to fewer images.
    """
    num_train = min(NUM_TRAIN, max(num_seen // 10, MIN_IMAGES))
    train, valid = _sample(data.train, num_train), _sample(data.valid, NUM_VALID)
    if len(valid.labels) == 0:
        return None
    if min(len(train.labels), len(valid.labels)) < MIN_IMAGES:
        print(
            f"note: no image will be called unknown: that takes {MIN_IMAGES} training and "
            f"{MIN_IMAGES} validation images"
        )
        return None
    try:
        return _fit(network, evaluate, train, valid)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = type(error).__name__
        print(f"note: no image will be called unknown: no score could be fitted ({reason})")
        return None


def _sample(split: Split, count: int) -> Split:
    """Some of the images, evenly drawn, always the same."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(split.labels), generator=generator)[:count]
    return split.select(chosen.sort().values)


def _fit(network: nn.Module, evaluate: Evaluate, train: Split, valid: Split) -> OodScore:
    """See fit. Raises one of several errors for a network that has no features to be read."""
    few = train.first(2)
    stages = find_stages(network, lambda: evaluate(network, few.images, few.labels))

    def read(split: Split) -> tuple[Features, torch.Tensor]:
        def to_cpu(features: Features, logits: torch.Tensor) -> Features:
            return [each.cpu() for each in (*features, logits)]

        with tapped(network, stages, to_cpu) as batches:
            evaluate(network, split.images, split.labels)
        *features, logits = [torch.cat(column) for column in zip(*batches, strict=True)]
        return features, logits

    features, _ = read(train)
    valid_features, valid_logits = read(valid)
    gaussians = [fit_gaussian(each) for each in features]
    neutral = torch.zeros(len(gaussians) + 1)
    score = OodScore(stages, gaussians, neutral, neutral + 1, [0.0, 1.0])
    parts = score.parts(valid_features, valid_logits)
    low, middle, high = parts.quantile(torch.tensor([0.05, 0.5, 0.95]), 0)
    score = OodScore(stages, gaussians, middle, (high - low) / 2 + 1e-3, [0.0, 1.0])
    scores = score(valid_features, valid_logits)
    if not scores.isfinite().all():
        raise ValueError("not finite")
    score.quantiles = rejection.quantiles_of(scores)
    return score


# ---- Model files ---------------------------------------------------------------------------------


def with_score(content: dict[str, Any], score: OodScore | None) -> dict[str, Any]:
    """The content of a model file with this score, in place of one that it may have had."""
    content = {name: value for name, value in content.items() if name != checkpoints.SCORE}
    if score is not None:
        tensors = {}
        for name, tensor in score.state_dict().items():
            tensors[name] = tensor.cpu().half() if name.endswith(".axes") else tensor.cpu()
        content[checkpoints.SCORE] = {
            "stages": score.stages,
            "quantiles": score.quantiles,
            "tensors": tensors,
        }
    return content


def in_file(content: dict[str, Any], network: nn.Module) -> OodScore | None:
    """The score in a model file, on the network's device, or None if it holds none.

    content: of the file. network: in eval mode. Raises ValueError if it does not fit this network.
    """
    saved = content.get(checkpoints.SCORE)
    if saved is None:
        return None
    try:
        score = _from_file(saved)
        size = content["image_size"]
        images = torch.zeros(2, len(content["mean"]), size, size)
        device = next(network.parameters()).device
        with torch.no_grad(), recorded(network, score) as scores:
            network(images.to(device))
        (values,) = scores.values
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"no score: {error}") from None
    if values.shape != (2,):
        raise ValueError("no score for each image")
    return score


def _from_file(saved: Any) -> OodScore:
    """The score that a file holds. Raises one of several errors if it is invalid."""
    stages = saved["stages"]
    if not isinstance(stages, list) or not all(isinstance(name, str) for name in stages):
        raise ValueError("no names of stages")
    tensors = {}
    for name, tensor in saved["tensors"].items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
        tensors[name] = tensor.float()
    gaussians = []
    for number in range(len(stages) + 1):
        prefix = f"gaussians.{number}."
        gaussians.append(Gaussian(**{name: tensors[prefix + name] for name in GAUSSIAN}))
    quantiles = rejection.read_quantiles(saved["quantiles"])
    return OodScore(stages, gaussians, tensors["middle"], tensors["spread"], quantiles)
