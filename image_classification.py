#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.11,<3",
#   "torchvision>=0.26,<1",
#   "numpy>=1.26,<3",
#   "matplotlib>=3.9,<4",
#   "torchsummary>=1.5.1,<2",
#   "tensorboard>=2.21,<3",
#   "scikit-learn>=1.5,<2",
#   "tqdm>=4.66,<5",
# ]
# ///
"""Train an image classifier: CIFAR-10, a small CNN, on whatever this machine has.

    python image_classification.py                      download, train, test, save model_cnn.pth
    python image_classification.py --minutes 1          train for about one minute
    python image_classification.py --dataset digits     no download: 1,797 handwritten digits
    python image_classification.py --dataset photos     your own: a folder with a folder per class
    python image_classification.py --resume last        resume the run that was stopped last
    torchrun --nproc-per-node=2 image_classification.py     on two GPUs

The default run takes about three minutes on two CPU cores with AVX-512, and classifies 90.2 % of
the test images correctly (90.22 ± 0.17 %, seeds 0 to 4; benchmarks/README.md, "The default run").

This file is the story of learning, in the order in which things happen: the recipe, batches on the
device, the network, the optimiser, one training step, evaluation, and the loop over epochs. If you
only want to know how it learns, stop at "A whole run". The software around it (data sets, files,
resuming, logging and so on) is in classifier/.
"""

import time

START = time.perf_counter()  # before the slow imports, which --minutes counts as well

import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":  # PYTHONSAFEPATH and python -P leave out the folder of this file
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

try:
    import torch
    import torch.nn.functional as F
    from torch import nn

    from classifier import (
        augmentations,
        checkpoints,
        cli,
        console,
        cuda_graphs,
        devices,
        distributed,
        finetuning,
        foreign_paths,
        metrics,
        micro_batches,
        ood_score,
        optimizers,
        plots,
        rejection,
        reports,
        resolve,
        runs,
        sampling,
        schedules,
        seed_summary,
        seen_images,
        streams,
        thread_waiting,
        time_budget,
        train_state,
    )
    from classifier.checkpoints import save_checkpoint
    from classifier.config import Augment, Config, parse_augment
    from classifier.datasets import checks, load
    from classifier.datasets.dataset import Dataset
    from classifier.datasets.memmap_images import MemmapImages
    from classifier.distributed import Group
    from classifier.errors import Stopped
    from classifier.heartbeat import Heartbeat
    from classifier.networks import build, libraries
    from classifier.progress import Progress, Row
    from classifier.reports import Report
    from classifier.resolve import configure
    from classifier.run_log import RunLog
    from classifier.train_state import TrainState
    from classifier.tta import accuracy_with_tta, mean_logits
except (ImportError, OSError) as error:  # OSError: a library that torch cannot load
    if __name__ != "__main__":
        raise
    sys.exit(
        f"error: {error}: pip install -r requirements.txt, and keep classifier/ beside this file"
    )
except KeyboardInterrupt:
    sys.exit(130)

if TYPE_CHECKING:  # slow to import
    from matplotlib.figure import Figure

__all__ = [  # what Python programs use
    "Config",
    "build_model",
    "configure",
    "evaluate",
    "load_checkpoint",
    "load_data",
    "save_checkpoint",
    "train",
]

# In each model file and report; __loader__ knows the text of this file within a .pyz, too.
SOURCE = reports.source_of(globals().get("__spec__"), globals().get("__loader__"), __file__)
VERSIONS = reports.versions(SOURCE)


# ---- The default recipe --------------------------------------------------------------------------

# Chosen on validation images of CIFAR-10, but for one choice: the test images decided between 8 and
# 9 epochs (benchmarks/README.md, "The default run"). Each of these is an option;
# classifier/recipes.py has the defaults of other networks, optimisers and data sets.
DEFAULT_RECIPE: dict[str, Any] = {
    "width": 1.0,  # times 32, 96 and 192 channels in the three stages
    "optimizer": "muon",
    "lr": 0.12,  # peak; a step of Muon moves the weights by this share of their norm
    "momentum": 0.6,
    "weight_decay": 0.0,
    "scheduler": "linear",  # warm up over a tenth of the run, then down to zero
    "label_smoothing": 0.2,  # share of the target spread evenly over the classes
    "epochs": 9,
    "drop_easiest": 0.35,  # after a quarter of the run: the share of images to leave out
    "batch_size": 500,
    "micro_batch": 500,  # images in one forward pass: batch norm sees the whole batch
    "augment": "flip,crop=2",  # mirror every other epoch, shift by up to 2 pixels
    "progressive_resizing": 0.7,  # share of the run on smaller images: 16 × 16, then 24 × 24
}


# ---- Batches on the device -----------------------------------------------------------------------

# classifier/datasets/ has decoded all training images into one uint8 tensor, which stays on the
# device (those of a large folder stay on the disk: MemmapImages). A step gathers its batch by one
# indexing operation, which mirrors and shifts the images on the way: no worker processes.


class Batch(NamedTuple):
    """Which images to take, and how to augment each of them.

    Attributes:
        order: int64 (B,), indices into the training images.
        flips: bool (B,), whether to mirror the image.
        shifts: int64 (B, 2), by how many pixels to move it down and right, before it is mirrored.
    """

    order: torch.Tensor
    flips: torch.Tensor
    shifts: torch.Tensor

    def take(self, part: slice) -> "Batch":
        """The images in this slice."""
        return Batch(self.order[part], self.flips[part], self.shifts[part])

    def shard(self, rank: int, world_size: int) -> "Batch":
        """The images that this process computes, if several share the batch."""
        return self.take(shard_slice(len(self.order), rank, world_size))

    def split(self, parts: int) -> list["Batch"]:
        """Micro-batches of nearly equal size."""
        columns = [column.tensor_split(parts) for column in self]
        return [Batch(*part) for part in zip(*columns, strict=True)]


def shard_slice(size: int, rank: int, world_size: int) -> slice:
    """Which images of a batch of this size a process computes."""
    return slice(size * rank // world_size, size * (rank + 1) // world_size)


def plan_epoch(
    num_images: int,
    seed: int,
    epoch: int,
    augment: Augment,
    device: torch.device,
    sample_indices: torch.Tensor | None = None,
) -> Batch:
    """Draw an epoch's order, flips and shifts; steps take slices.

    The random numbers depend on (seed, epoch) alone. So a run that is resumed sees the same batches
    as an unbroken one, and so do several processes. Each image is mirrored in every other epoch,
    the first time at random: both views of an image that is in all epochs come equally often
    (alternating flips, Jordan, 2024, https://github.com/KellerJordan/cifar10-airbench).

    sample_indices: int64 (M,), the images of this epoch; some may come several times. None: each
        image once.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    epoch_size = num_images if sample_indices is None else len(sample_indices)
    order = torch.randperm(epoch_size, generator=generator)
    max_shift = augment.max_shift
    shifts = torch.randint(-max_shift, max_shift + 1, (epoch_size, 2), generator=generator)
    if sample_indices is not None:
        order = sample_indices[order]

    flipped_in_epoch_0 = torch.rand(num_images, generator=torch.Generator().manual_seed(seed)) < 0.5
    flipped_now = ~flipped_in_epoch_0 if epoch % 2 else flipped_in_epoch_0
    flips = flipped_now[order] & augment.flip
    return Batch(order.to(device), flips.to(device), shifts.to(device))


DROP_AFTER = 0.25  # share of the run; epochs that begin after it leave images out


def hardest_images(losses: torch.Tensor, drop_easiest: float) -> torch.Tensor:
    """Indices of the images with the largest losses: all but the share `drop_easiest`.

    What the network classifies with ease teaches it little more (selective backprop, Jiang et al.,
    2019, https://arxiv.org/abs/1910.00762; for whole epochs, Nguyen et al., 2023,
    https://arxiv.org/abs/2310.10102).

    losses: float32 (N,), each from the step that saw the image last. An image that is left out
        keeps its loss, and returns once enough of the others have fallen below it.

    Returns int64 (M,), ascending, on the CPU.
    """
    num_kept = max(1, round((1 - drop_easiest) * len(losses)))
    hardest = losses.topk(num_kept).indices
    return hardest.sort().values.cpu()


def slice_epoch(epoch_size: int, batch_size: int) -> list[slice]:
    """Which slice of an epoch's plan each step takes: batches of nearly equal size.

    Batches of two become batches of two and three where an image would be left alone: batch norm
    may need more than one.
    """
    steps = math.ceil(epoch_size / batch_size)
    if batch_size > 1:
        steps = min(steps, max(1, epoch_size // 2))
    bounds = [epoch_size * step // steps for step in range(steps + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def gather_augmented(images: torch.Tensor | MemmapImages, batch: Batch) -> torch.Tensor:
    """Pick the images of a batch, mirrored and shifted; reflection fills in at the border.

    images: uint8 (N, C, H, W). Returns uint8 (B, C, H, W) on the device of the batch.
    """
    if isinstance(images, MemmapImages):  # too large for memory: read only these from the disk
        device = batch.order.device
        images = images.read(batch.order.cpu()).to(device)
        batch = batch._replace(order=torch.arange(len(images), device=device))

    height, width = images.shape[2:]
    rows = reflected_positions(height, batch.shifts[:, 0])
    columns = reflected_positions(width, batch.shifts[:, 1])
    columns = torch.where(batch.flips[:, None], columns.flip(1), columns)
    pixels = images.permute(0, 2, 3, 1)  # (N, H, W, C)
    picked = pixels[batch.order[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def reflected_positions(size: int, shifts: torch.Tensor) -> torch.Tensor:
    """For each image and each pixel along one side, which pixel moves there: int64 (B, size)."""
    positions = torch.arange(size, device=shifts.device) - shifts[:, None]
    positions = positions.abs()
    return torch.where(positions < size, positions, 2 * (size - 1) - positions)


def normalise(images: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """uint8 (N, C, H, W) to float32: subtract a channel's mean, divide by its standard deviation.

    build.instantiate keeps these in the network, as buffers. They are those of the training images
    or, with --pretrained, of the images that the published weights were trained on.
    """
    return (images - model.get_buffer("pixel_mean")) * model.get_buffer("pixel_scale")


def resize(images: torch.Tensor, scale: float) -> torch.Tensor:
    """Images at this share of their size: float (N, C, H, W) to (N, C, scale H, scale W)."""
    if scale == 1:
        return images
    return F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)


def scale_schedule(fraction: float, progressive_resizing: float) -> float:
    """Scale of the images after this share of a run: coarse features need fewer pixels.

    A step at half the size costs a third of one on full-size images (progressive resizing, Howard,
    2018). classifier/progress.py estimates from it how long a run takes: another schedule needs
    another STEP_COST and another cost_until there.
    """
    if fraction < progressive_resizing / 2:
        return 0.5
    if fraction < progressive_resizing:
        return 0.75
    return 1.0


# ---- The network ---------------------------------------------------------------------------------


class Stage(nn.Module):
    """Two 3×3 convolutions: max-pooling after the first halves the size, the second is residual.

    Residual connections: He et al., 2015, https://arxiv.org/abs/1512.03385.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels, momentum=0.4)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels, momentum=0.4)
        # start close to the identity: filter i passes input channel i through
        nn.init.dirac_(self.conv1.weight[:in_channels])
        nn.init.dirac_(self.conv2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H // 2, W // 2)."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.silu(self.norm1(x))
        return x + F.silu(self.norm2(self.conv2(x)))


class CNN(nn.Module):
    """Whitened 2×2 patches, three stages, global average pooling, a linear classifier.

    The filters of the first layer turn 2×2 patches of pixels into uncorrelated components of equal
    variance, each with both signs, as in cifar10-airbench (Jordan, 2024). They are not trained, and
    unlike there the layer has no bias. So the backward pass ends before it, which saves a tenth of
    a step.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: int = 3,
        image_size: int = 32,  # not used: the factories of all networks are called alike
        width: float = 1.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.dropout = dropout
        components = channels * 2 * 2  # of a 2×2 patch
        self.whiten = nn.Conv2d(channels, 2 * components, 2, bias=False)
        self.whiten.weight.requires_grad_(False)

        stages = []
        in_channels = 2 * components
        for base in (32, 96, 192):
            out_channels = max(8, round(base * width / 8) * 8)
            stages.append(Stage(in_channels, out_channels))
            in_channels = out_channels
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(in_channels, classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images, float (N, C, H, W), to logits (N, classes)."""
        x = F.silu(self.whiten(images))  # (N, 8 C, H - 1, W - 1)
        x = self.stages(x)  # (N, 192, (H - 1) // 8, (W - 1) // 8) at width 1
        x = x.mean((2, 3))
        x = F.dropout(x, self.dropout, self.training)
        return self.classifier(x)


def set_whitening(layer: nn.Conv2d, images: torch.Tensor) -> None:
    """Set a first layer's filters so that they whiten 2×2 patches of these images.

    The filters are the eigenvectors of the patches' covariance, divided by the square root of their
    eigenvalues, and the same with the opposite sign. A hundredth is added to the eigenvalues, so
    that noise is not amplified. images: normalised, float (N, C, H, W).
    """
    patches = F.unfold(images, 2).transpose(1, 2).flatten(0, 1)  # (number of patches, 4 C)
    covariance = patches.T @ patches / len(patches)  # normalised images have a mean of about 0
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    filters = (eigenvectors / (eigenvalues + 1e-2).sqrt()).T
    filters = filters.flip(0)  # largest eigenvalue first: a narrow network passes on the first ones
    filters = filters.reshape(-1, *layer.weight.shape[1:])
    with torch.no_grad():
        layer.weight.copy_(torch.cat([filters, -filters]))


def whitening_layer(model: nn.Module) -> nn.Conv2d | None:
    """The layer `whiten` of this CNN, or of another network that has filters like these."""
    layer = getattr(model, "whiten", None)
    if not isinstance(layer, nn.Conv2d):
        return None
    channels = layer.in_channels
    return layer if layer.weight.shape == (8 * channels, channels, 2, 2) else None


# Builds the network that --model names, this one or one of classifier/networks/:
# instantiate(config, classes, mean, std, image_size). It draws the weights from config.seed.
instantiate = functools.partial(build.instantiate, cnn=CNN)


def build_model(config: Config, data: Dataset, init_weights: bool = True) -> nn.Module:
    """The network for these images, on the CPU, in training mode, with its initial weights.

    init_weights: False if saved weights will be loaded anyway. Seeds torch's random numbers. Raises
    UsageError for an option that the network does not have, UserError if the network fails.
    """
    images = data.train.images
    image_size = images.shape[-1]
    model = instantiate(config, len(data.classes), data.mean, data.std, image_size)
    if init_weights:
        # a network of the user's may fail, and batch norm may need two images at a time
        build.smoke_test_custom(model, config, images.shape[1:])
        micro_batches.check_single_images(model, config, tuple(images.shape))
    build.freeze(model, config)
    if not init_weights:
        return model
    loaded = build.load_initial_weights(model, config, data)  # --pretrained or --init-from
    first_layer = whitening_layer(model)
    if first_layer is not None and not loaded:
        every_nth = max(1, len(images) // 500)
        sample = images[torch.arange(0, len(images), every_nth)]
        set_whitening(first_layer, normalise(sample, model))
    return model


# ---- Muon and the learning rate ------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz steps, for convolutions and matrices.

    Jordan et al., 2024, https://kellerjordan.github.io/posts/muon. torch.optim.Muon takes matrices
    only; here filters of shape (O, I, H, W) count as a matrix of O rows. As in cifar10-airbench,
    each weight is first scaled to norm √O, which makes the learning rate a relative step. The rows
    of an update are balanced as in NorMuon.

    dtype: of the matrix products; those of Gram matrices are float32.
    """

    def __init__(
        self,
        weights: Iterable[torch.Tensor],
        lr: float | torch.Tensor,
        momentum: float,
        dtype: torch.dtype,
    ):
        super().__init__(weights, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            momentum, lr = group["momentum"], group["lr"]
            weights = [weight for weight in group["params"] if weight.grad is not None]
            directions = []
            for weight in weights:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                    state["row_mean_squares"] = weight.new_zeros(len(weight))
                buffer = state["momentum_buffer"].mul_(momentum).add_(weight.grad)
                direction = weight.grad + momentum * buffer  # Nesterov momentum
                directions.append(direction.flatten(1).to(self.dtype))

            updates = newton_schulz(directions)
            for weight, update in zip(weights, updates, strict=True):
                update = update.to(weight.dtype)
                state = self.state[weight]
                if "row_mean_squares" in state:  # not if version 0.11 or older began the run
                    update = balance_rows(update, state["row_mean_squares"])
                target_norm = len(weight) ** 0.5
                weight.mul_(target_norm / weight.norm().clamp(min=1e-7))
                weight.sub_(update.reshape(weight.shape) * lr)


NEWTON_SCHULZ_STEPS = 3


def newton_schulz(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Roughly the nearest orthogonal matrix to each, by a few Newton-Schulz steps.

    A step multiplies X by the polynomial a + b G + c G² of its Gram matrix G = X Xᵀ, with Muon's
    coefficients. The product of the polynomials is formed from the Gram matrix alone, which is
    smaller than X: half the multiplications, and less is rounded off. Gram matrices of one size are
    stacked, which gives a GPU fewer and larger multiplications.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = []  # no more rows than columns, of norm 1
    for matrix in matrices:
        rows, columns = matrix.shape
        wide.append((matrix.T if rows > columns else matrix) / (matrix.norm() + 1e-7))

    results: dict[int, torch.Tensor] = {}
    for size in {len(x) for x in wide}:
        indices = [i for i, x in enumerate(wide) if len(x) == size]
        identity = torch.eye(size, device=wide[0].device)
        gram = torch.stack([wide[i] @ wide[i].T for i in indices]).float()
        factor = a * identity + b * gram + c * gram @ gram  # the first step's polynomial
        product = factor
        for _ in range(NEWTON_SCHULZ_STEPS - 1):
            gram = factor @ gram @ factor  # the Gram matrix of factor @ X; factor is symmetric
            factor = a * identity + b * gram + c * gram @ gram
            product = factor @ product
        for i, polynomial in zip(indices, product, strict=True):
            x = polynomial.to(wide[i].dtype) @ wide[i]
            rows, columns = matrices[i].shape
            results[i] = x.T if rows > columns else x
    return [results[i] for i in range(len(matrices))]


def balance_rows(update: torch.Tensor, row_mean_squares: torch.Tensor) -> torch.Tensor:
    """Divide each row, a neuron's update, by its usual size; the norm of the whole stays the same.

    Newton-Schulz steps leave rows of unequal size, so that some neurons would learn faster than
    others (NorMuon, Li et al., 2025, https://arxiv.org/abs/2510.05491).

    row_mean_squares: float32 (rows,), a moving average over the steps; updated in place.
    """
    row_mean_squares.lerp_(update.square().mean(1), 0.05)
    balanced = update / (row_mean_squares.sqrt()[:, None] + 1e-7)
    return balanced * (update.norm() / balanced.norm().clamp(min=1e-7))


def build_optimizers(
    model: nn.Module, config: Config, dtype: torch.dtype, device: torch.device
) -> list[torch.optim.Optimizer]:
    """The optimisers of all trained weights.

    Muon takes convolutions and hidden matrices, and needs no weight decay, because it sets the norm
    of each weight. AdamW takes the rest: the classifier, which is the last matrix, and batch norm.
    Other optimisers take all weights.

    dtype: of the forward pass. Muon uses bf16 too, but not fp16, whose range is too small.
    """
    if config.optimizer != "muon":
        groups = finetuning.layer_groups(model, config)  # one, or several with their own rates
        return [
            optimizers.build_optimizer(
                config.optimizer, groups, config.lr, config.momentum, config.weight_decay
            )
        ]

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in weights if weight.ndim in (2, 4)]
    muon_weights = matrices[:-1]  # without the last one that the network registers: the classifier
    muon_ids = {id(weight) for weight in muon_weights}
    adamw_weights = [weight for weight in weights if id(weight) not in muon_ids]
    on_cuda = device.type == "cuda"
    # a CUDA graph reads a tensor again at each replay; a number would be captured as it is
    lr = torch.tensor(config.lr, dtype=torch.float64, device=device) if on_cuda else config.lr
    adamw_lr = lr / 12  # AdamW's steps are not relative: 0.01 where Muon's rate is 0.12
    adamw = torch.optim.AdamW(
        adamw_weights, adamw_lr, weight_decay=config.weight_decay, capturable=on_cuda
    )
    if not muon_weights:
        return [adamw]
    muon_dtype = dtype if dtype == torch.bfloat16 else torch.float32
    return [Muon(muon_weights, lr, config.momentum, muon_dtype), adamw]


def lr_factor(scheduler: str, fraction: float, losses: list[float]) -> float:
    """The learning rate as a share of its peak, after this fraction of the run, in [0, 1).

    linear: from a tenth of the peak up to it over the first tenth of the run, then down to zero.
    The others are in classifier/schedules.py.

    losses: what Progress.losses returns; `plateau` looks at them.
    """
    if scheduler != "linear":
        return schedules.lr_factor(scheduler, fraction, losses)
    warm_up = 0.1 + 9 * fraction
    decay = (1 - fraction) / 0.9
    return min(warm_up, decay)


# ---- One training step ---------------------------------------------------------------------------


class Trainer:
    """A network in training: what its steps need and what they change.

    Attributes:
        config: all settings, with a value for each that has a default.
        data: the data set.
        device: where the network is trained.
        group: the processes that share each batch; one by default.
        train_set, valid_set: images, uint8 (N, C, H, W), and labels on the device.
        other_augmentations: the steps of --augment besides flip and crop, on uint8 images and
            their labels.
        batch_slices: which slice of an epoch's plan each step takes.
        class_weights: float32 (classes,), as in F.cross_entropy, or None.
        dtype: of the forward pass: float32, bfloat16 or float16.
        state: network, optimisers and progress: all that a step changes.
        forward: what computes logits: the network, or what several processes wrap it in.
        compiled_forward: the same by torch.compile, or None.
        cuda_graph: a recording of compute_step that can be replayed, or None.
    """

    def __init__(
        self,
        config: Config,
        data: Dataset,
        device: torch.device,
        group: Group | None = None,
        model: nn.Module | None = None,
        resume_from: Path | None = None,
    ):
        self.config = config
        self.data = data
        self.device = device
        self.group = group or Group()

        # the network; convolutions are faster in channels-last memory format
        if model is None:
            model = build_model(config, data, init_weights=resume_from is None)
        model = model.to(device).to(memory_format=torch.channels_last)
        self.dtype = devices.choose_precision(config.precision, device)

        # images and labels, on the device for the whole run
        self.train_set = data.train.to(device)
        self.valid_set = data.valid.to(device)
        self.other_augmentations = augmentations.build_augmentation(
            config.augment, len(data.classes)
        )
        self.class_weights = sampling.class_weights(
            self.train_set.labels, len(data.classes), config.class_balance
        )
        epoch_size = sampling.epoch_size(self.train_set.labels, config.class_balance)
        self.batch_slices = slice_epoch(epoch_size, config.batch_size)

        # what steps change
        steps = len(self.batch_slices)
        state = TrainState(
            model=model,
            optimizers=build_optimizers(model, config, self.dtype, device),
            scaler=torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16),
            ema=optimizers.moving_average(model, steps) if config.ema else None,
            progress=Progress(total_steps=steps * config.epochs, steps_per_epoch=steps),
            batch_slices=self.batch_slices,
            description=train_state.describe(model, config, data, VERSIONS),
            environment=devices.environment(device, self.dtype, self.group.world_size),
        )
        self.state = state

        # how many micro-batches? Trial steps on copies of the network tell. The order matters:
        # they and last.pth need the network before it is wrapped
        first_batch = self.plan(0).take(self.batch_slices[0])
        fit = micro_batches.fit_into_memory(
            self.forward_backward,
            model,
            first_batch,
            config,
            image_shape=tuple(self.train_set.images.shape[1:]),
            device=device,
            world_size=self.group.world_size,
        )
        state.split_batches(self.group.max(fit.num_micro_batches))
        if resume_from is not None:
            state.load(resume_from, self.group, keep_total_steps=config.minutes > 0)
        # DDP has to look for weights without a gradient if there can be any
        has_unused_params = fit.has_unused_params or config.head_first > 0
        self.forward = self.group.wrap(model, has_unused_params)
        self.group.seed_ranks(config.seed, state.progress.step)
        self.compiled_forward = torch.compile(self.forward) if config.compile else None
        self.cuda_graph = None
        has_scaler, world_size = state.scaler.is_enabled(), self.group.world_size
        if cuda_graphs.can_record(config, self.train_set.images, world_size, has_scaler):
            self.cuda_graph = cuda_graphs.Replay(self.compute_step, state.tensors, state.zero_grad)

    def autocast(self) -> torch.autocast:
        """The context in which the network computes in bf16 or fp16, if it does."""
        is_low = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if is_low else None, enabled=is_low)

    def plan(self, epoch: int) -> Batch:
        """Plan an epoch of all images, or of state.hardest if some are left out: see plan_epoch."""
        seed, labels = self.config.seed, self.train_set.labels
        augment = parse_augment(self.config.augment)
        if self.state.hardest is None:
            indices = sampling.balanced_indices(labels, self.config.class_balance, seed, epoch)
        else:  # the epoch is as long as before, so many of these come twice
            indices = sampling.repeated_indices(self.state.hardest, len(labels), seed, epoch)
        return plan_epoch(len(labels), seed, epoch, augment, self.device, indices)

    def choose_images(self) -> torch.Tensor | None:
        """The images of the epoch that begins: the hardest with --drop-easiest; None: all."""
        losses = self.state.image_losses
        if losses is None or self.state.progress.fraction < DROP_AFTER:
            return None
        # rank 0 decides: of an image that a batch held twice, each GPU may have kept another loss
        return self.group.broadcast_from_rank0(
            lambda: hardest_images(losses, self.config.drop_easiest)
        )

    def next_image_scale(self) -> float:
        """Scale of the images in the next step."""
        return scale_schedule(self.state.progress.fraction, self.config.progressive_resizing)

    def train_step(self, batch: Batch, factor: float | None = None) -> torch.Tensor:
        """One step of the optimisers.

        batch: its slice of an epoch's plan. factor: the learning rate as a share of its peak; None:
        as the schedule says. Returns the statistics of forward_backward.
        """
        config, state, progress = self.config, self.state, self.state.progress
        if config.head_first:  # the last layer alone, then all layers
            head_only = progress.fraction < config.head_first
            finetuning.set_trained_layers(state.model, state.optimizers, head_only)
        if factor is None:  # each phase has a schedule of its own
            fraction = finetuning.phase_fraction(progress.fraction, config.head_first)
            factor = lr_factor(config.scheduler, fraction, progress.losses())
        scale = self.next_image_scale()
        optimizers.set_learning_rates(state.optimizers, factor)
        compute = self.compute_step if self.cuda_graph is None else self.cuda_graph
        stats = compute(batch, scale)
        if state.ema is not None:
            state.ema.update_parameters(state.model)
        progress.advance(scale)
        return stats

    def compute_step(self, batch: Batch, scale: float) -> torch.Tensor:
        """The part of a step that the device does: a CUDA graph records and repeats it."""
        state = self.state
        forward: Callable[..., torch.Tensor] = self.forward
        if self.compiled_forward is not None and scale > 0.5:
            forward = self.compiled_forward  # not at half the size: torch 2.11 fails there on CUDA
        # no process may get a micro-batch without an image
        smallest_share = len(batch.order) // self.group.world_size
        num_micro_batches = min(state.num_micro_batches[scale], smallest_share)
        stats = self.forward_backward(forward, batch, scale, num_micro_batches)
        if self.config.grad_clip:
            optimizers.clip_gradients(
                state.model.parameters(), state.optimizers, state.scaler, self.config.grad_clip
            )
        for optimizer in state.optimizers:
            state.scaler.step(optimizer)
            optimizer.zero_grad()
        state.scaler.update()
        return stats

    def forward_backward(
        self,
        forward: Callable[..., torch.Tensor],
        batch: Batch,
        scale: float,
        num_micro_batches: int,
    ) -> torch.Tensor:
        """Compute the gradients of the mean loss over a batch, by gradient accumulation.

        Of several processes, each computes its share of the images. Batch norm sees one micro-batch
        at a time.

        forward: computes logits: self.forward, or the same compiled, or in a trial a copy of the
            network.
        scale: scale of the images.

        Returns float32 (2, B): the cross-entropy of each image, without smoothing and class
        weights, and 1 if it is classified correctly; zeros for images that other processes compute.
        """
        images, labels = self.train_set
        # the loss is summed over micro-batches and processes, then divided by the total weight
        batch_weight: int | torch.Tensor = len(batch.order)
        if self.class_weights is not None:
            batch_weight = self.class_weights[labels[batch.order]].sum()

        own_batch = batch.shard(self.group.rank, self.group.world_size)
        own_stats = []
        for number, micro_batch in enumerate(own_batch.split(num_micro_batches), 1):
            # from uint8 images on the device to the input of the network
            y = labels[micro_batch.order]
            x = gather_augmented(images, micro_batch)
            x, targets = self.other_augmentations(x, y)  # mixup makes probabilities of labels
            x = resize(normalise(x, self.state.model), scale)

            # DDP all-reduces the gradients in the backward pass of the last micro-batch
            with self.group.accumulate(forward, last=number == num_micro_batches):
                with self.autocast():
                    logits = forward(x).float()
                loss = F.cross_entropy(
                    logits,
                    targets,
                    self.class_weights,
                    label_smoothing=self.config.label_smoothing,
                    reduction="sum",
                )
                # DDP averages gradients over the processes: times world_size it is their sum
                loss = loss * self.group.world_size / batch_weight
                self.state.scaler.scale(loss).backward()

            # to report, and to rank the images: without smoothing and class weights
            with torch.no_grad():
                cross_entropy = F.cross_entropy(logits, targets, reduction="none")
                is_correct = logits.argmax(1) == y
                own_stats.append(torch.stack([cross_entropy, is_correct.float()]))

        own_slice = shard_slice(len(batch.order), self.group.rank, self.group.world_size)
        stats = torch.zeros(2, len(batch.order), device=self.device)
        stats[:, own_slice] = torch.cat(own_stats, dim=1)
        return stats


# ---- Evaluation ----------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """What a network makes of labelled images.

    Attributes:
        loss: mean cross-entropy.
        accuracy: share of the images that are classified correctly, in [0, 1].
        logits: float32 (N, classes), on the CPU.
    """

    loss: float
    accuracy: float
    logits: torch.Tensor


def evaluate(
    model: nn.Module,
    images: torch.Tensor | MemmapImages,
    labels: torch.Tensor,
    tta: int = 1,
    scale: float = 1.0,
    group: Group | None = None,
) -> Evaluation:
    """Classify labelled images on the model's device, in fp32 or in the autocast around this call.

    images: uint8 (N, C, H, W). labels: int64 (N,). tta: number of views of each image whose logits
    are averaged (see classifier/tta.py). scale: scale of the images. group: processes that share
    the images.

    Raises TypeError and ValueError for images, labels and a tta that are not as described.
    """
    checks.check_images(images, model.get_buffer("pixel_mean").shape[1])
    checks.check_labels(labels, len(images))
    device = next(model.parameters()).device
    batch_size = 50  # on a CPU: small enough for its caches
    if device.type != "cpu":  # on others: as many pixels as in 500 images of 32 × 32
        batch_size = max(50, 500 * 32**2 // images.shape[-1] ** 2)

    @torch.no_grad()
    def classify(images: torch.Tensor | MemmapImages) -> torch.Tensor:
        logits = []
        for batch in images.split(batch_size):
            x = resize(normalise(batch.to(device), model), scale)
            logits.append(mean_logits(model, x, tta))
        return torch.cat(logits).cpu()

    was_training = model.training
    model.eval()
    try:
        with devices.exact_fp32():
            logits = (group or Group()).share_evaluation(model, images, classify)
    finally:
        model.train(was_training)

    labels = labels.cpu()
    checks.check_label_range(labels, logits.shape[1])
    loss = F.cross_entropy(logits, labels).item()
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return Evaluation(loss, accuracy, logits)


# ---- The loop over epochs ------------------------------------------------------------------------


def train_one_epoch(trainer: Trainer, heartbeat: Heartbeat) -> float:
    """Train to the end of the epoch or of the run; returns images per second.

    heartbeat: what happens between steps: losses are recorded, the progress bar moves, the state is
    saved, and with --minutes the number of steps is estimated anew. Raises Stopped if it was asked
    to stop.
    """
    state, progress = trainer.state, trainer.state.progress
    with heartbeat.epoch():
        if progress.step_in_epoch == 0:
            state.hardest = trainer.choose_images()
        plan = trainer.plan(progress.epoch)
        state.model.train(not trainer.config.freeze)  # frozen layers keep their statistics
        for batch_slice in trainer.batch_slices[progress.step_in_epoch :]:
            batch = plan.take(batch_slice)
            stats = trainer.train_step(batch)
            heartbeat.record(stats, batch.order)  # with the loss of each image: see choose_images
            progress.total_steps = heartbeat.total_steps()  # changes with --minutes only
            epoch_ended = progress.step_in_epoch == 0
            if epoch_ended or progress.done:
                break  # this state is saved after its validation
            heartbeat.save_or_stop()
    return heartbeat.images_per_second()


def validate(trainer: Trainer) -> tuple[Row, torch.Tensor | None]:
    """Evaluate on the validation images; appends the epoch's row to the history.

    They have the size of the latest training step: a network does poorly on larger images than it
    has seen. Returns the row, and the logits on full-size images, or None.
    """
    state = trainer.state
    started = time.perf_counter()
    valid = None
    if len(trainer.valid_set.labels):
        with trainer.autocast():
            valid = evaluate(
                state.eval_model(),
                *trainer.valid_set,
                scale=state.progress.image_scale,
                group=trainer.group,
            )
        state.check_finite(valid_loss=valid.loss)
    state.progress.add_time(time.perf_counter() - started)
    if valid is None:
        return state.end_epoch(valid_loss=None, valid_accuracy=None), None
    row = state.end_epoch(valid.loss, valid.accuracy)
    return row, valid.logits if row["image_scale"] == 1 else None


# ---- A whole run ---------------------------------------------------------------------------------

# Who calls whom: `train`; seed_summary.train_seeds; for each seed of --repeat `train_seed`, which
# is defined in `train`; `train_epochs`; `train_one_epoch`, above.


def train_epochs(
    trainer: Trainer, run: runs.Run, stop: runs.StopRequest, deadline: float
) -> Report:
    """Train to the end, epoch by epoch, test, and report; all files go into this run folder.

    deadline: when --minutes are over, on time.perf_counter(). Raises Stopped.
    """
    config, data, group = trainer.config, trainer.data, trainer.group
    state, progress = trainer.state, trainer.state.progress
    first_batch_size = state.batch_slices[0].stop
    budget = time_budget.new_budget(config, deadline, data, first_batch_size, group)
    heartbeat = Heartbeat(
        state,
        group,
        config.progressive_resizing,
        budget=budget,
        stop=stop,
        save=lambda: run.save_last(state.saved_state()),
    )
    log = RunLog(
        run.path,
        run.is_main,
        first_epoch=len(progress.history),
        draw_inputs=functools.partial(draw_inputs, trainer),
        model=state.model,
        input_shape=tuple(data.train.images.shape[1:]),
    )
    devices.trim_free_memory()
    console.print_start(config, progress, data, trainer.device, trainer.dtype, group, DROP_AFTER)
    best_logits = None  # of the validation images; not known if the best epoch is an earlier run's
    with closing(log):
        while not progress.done and not progress.stalled(config.early_stopping):
            images_per_second = train_one_epoch(trainer, heartbeat)
            log.open()  # draws samples.png once, outside the time that is measured
            training_ended = time.perf_counter()
            row, valid_logits = validate(trainer)
            is_best = progress.best_epoch() == row["epoch"]
            if is_best:
                best_logits = valid_logits
            run.save_epoch(row["epoch"], state.model_file(), is_best, config.keep_epochs)
            log.end_epoch(progress.history, images_per_second)
            run.save_last(state.saved_state())  # after the log: a kill in between loses no row
            budget.epoch_end_took(time.perf_counter() - training_ended)
            console.print_epoch(progress, row, is_best, heartbeat.eta())
            heartbeat.stop_between_epochs()
        print("Finished Training")
        # rank 0 tests; the others wait for its report
        report = group.broadcast_from_rank0(lambda: test(trainer, run, log, best_logits))
        heartbeat.stop_between_epochs()  # a signal during the test: resumed, it is tested again
        return report


def draw_inputs(trainer: Trainer) -> "Figure":
    """Some training images, as they are and after each step of --augment."""
    images, labels = trainer.train_set
    sample = trainer.plan(0).take(slice(10))
    gather = functools.partial(gather_augmented, images)
    return plots.draw_samples(sample, gather, labels, trainer.data.classes, trainer.config.augment)


def test(trainer: Trainer, run: runs.Run, log: RunLog, valid_logits: torch.Tensor | None) -> Report:
    """Test the best weights, once, in fp32, and write the report.

    A run uses the test images nowhere else. Without validation images the last weights count as the
    best. valid_logits: of the best weights, on the validation images; None: compute them.
    """
    config, data, state = trainer.config, trainer.data, trainer.state
    progress = state.progress
    log.open()
    devices.trim_free_memory()
    best_file = run.load_best(state.model)  # with --ema, the averaged weights

    # how unlike the training images an image is, so that it may be called unknown
    ood = ood_score.fit(state.model, evaluate, data, num_seen=progress.step * config.batch_size)
    with ood_score.recorded(state.model, ood) as scores:
        tested = evaluate(state.model, data.test.images, data.test.labels)

    # temperature scaling, on validation images, makes the confidence fit the accuracy
    temperature = None
    if len(trainer.valid_set.labels):
        if valid_logits is None:
            with trainer.autocast():  # as in `validate`
                valid_logits = evaluate(state.model, *trainer.valid_set).logits
        temperature = metrics.fit_temperature(valid_logits, trainer.valid_set.labels.cpu())

    results = metrics.classification_metrics(
        tested.logits, data.test.labels, data.classes, temperature
    )
    results |= rejection.rejection_metrics(
        tested.logits, data.test.labels, scores.unlikeness(), rejection.DEFAULT_REJECT
    )
    results |= reports.run_facts(data, state, VERSIONS, __file__)
    reports.print_accuracy(results)
    if config.tta > 1:
        accuracy = accuracy_with_tta(state.model, evaluate, data.test, tested.logits, config.tta)
        reports.add_tta_accuracy(results, config.tta, accuracy)
    model_file = ood_score.with_score(best_file, ood)
    return reports.write_report(
        run, log, config, results, progress.history, data, tested.logits, model_file
    )


@streams.present()
def train(
    config: Config,
    data: Dataset | None = None,
    *,
    started: float | None = None,
    before_training: Callable[[torch.device], None] | None = None,
    on_second_interrupt: Callable[[], None] | None = None,
) -> Report:
    """The whole job: data, network, training, test, files; with --repeat for several seeds.

    The caller's process stays as it was, after an error too: random states, flags of torch, signal
    handlers, standard streams.

    Args:
        data: None: load_data(config).
        started: when the job began, on time.perf_counter(), for --minutes. None: now.
        before_training: called before the first step, with the device. main() changes there what
            cannot be undone.
        on_second_interrupt: called at a second Ctrl-C. None: raise KeyboardInterrupt.

    Raises:
        UserError: for everything that the user can fix.
        Stopped: after Ctrl-C or SIGTERM, when the state is saved.
    """
    started = time.perf_counter() if started is None else started
    resolve.check_before_data(config)
    if distributed.is_main_process():
        resolve.check_places(config, reads_data=data is None)
    device = devices.choose_device(distributed.device_name(config.device))
    if data is None:
        data = distributed.load_once_per_machine(lambda: load_data(config))
    if data.report:
        print(*data.report["words"], sep="\n")
    data = seen_images.note_initial_weights(data, config)
    config = resolve.resolve_defaults(config, data, DEFAULT_RECIPE)
    if config.fast_dev_run:
        data = data.first(config.batch_size)

    # after the data, which may take longer than processes wait for each other
    with (
        distributed.joined(device) as group,
        devices.training_process(device, config.deterministic),
        thread_waiting.share_cores(device),
    ):
        resolve.check_processes(config, data, group)
        folder, data, models = begin_run(config, data, group)
        print(f"Writing to {folder}")
        if before_training is not None:
            before_training(device)
        with runs.Run(folder, group.is_main) as run, runs.StopRequest(on_second_interrupt) as stop:
            run.begin(config, data)
            if run.is_main:
                distributed.remember_run(folder)  # for processes that torchrun restarts

            def train_seed(seed_config: Config, seed_run: runs.Run, deadline: float) -> Report:
                model = models.pop() if models else None  # None: Trainer builds it
                can_resume = bool(config.resume) and seed_run.last.exists()
                resume_from = seed_run.last if can_resume else None
                trainer = Trainer(seed_config, data, device, group, model, resume_from)
                return train_epochs(trainer, seed_run, stop, deadline)

            try:
                report = seed_summary.train_seeds(train_seed, config, run, started, group, stop)
            except Stopped as stopped:
                raise Stopped(stopped.signum, folder) from None
            reports.print_classes(report, is_trial=config.fast_dev_run)
            export = functools.partial(reports.export_model, report, config, data)
            finished = group.broadcast_from_rank0(export)
            run.finish(finished.results)
            if stop.requested:
                print("note: the request to stop came too late: the run is complete")
    console.print_end(time.perf_counter() - started, config.minutes)
    return finished


def begin_run(config: Config, data: Dataset, group: Group) -> tuple[Path, Dataset, list[nn.Module]]:
    """The folder of a run, its data, and its network, unless it is resumed.

    The networks of further seeds are built when it is their turn.
    """
    if config.resume:
        folder = Path(config.resume)
        untrained = functools.partial(build_model, config, data, init_weights=False)
        return folder, runs.check_resumable(folder, data, untrained), []
    models = [build_model(config, data)]
    build.print_summary(models[0], tuple(data.train.images.shape[1:]))
    # after the network: one that fails leaves no folder behind
    new_folder = functools.partial(runs.new_run_folder, config.run_dir, data.name)
    return group.broadcast_from_rank0(new_folder), data, models


# ---- From Python and from the command line -------------------------------------------------------


@streams.present()
def load_data(config: Config) -> Dataset:
    """Find, download if need be, verify and read the data set that `config.dataset` names.

    With "auto" and no recipe, scikit-learn's digits replace CIFAR-10 where that is not available,
    and `fallback_reason` says why. Raises UserError.
    """
    return load.load_data(config, libraries.published_size, order=runs.saved_classes(config))


def load_checkpoint(path: Path | str, model: str = "") -> tuple[nn.Module, dict[str, Any]]:
    """A finished model from its file, in eval mode on the CPU, and the content of the file.

    model: FILE.py:FACTORY of a network of your own, which a file never imports by itself.
    """
    return checkpoints.load_model(path, instantiate, model)


def main(arguments: list[str] | None = None) -> int:
    """Run as from the command line; returns the exit status."""
    cli.prepare_console()
    distributed.silence_all_but_rank_0()
    description = (__doc__ or "").partition("\n\nThis file")[0]
    version = ", ".join(f"{name} {number}" for name, number in VERSIONS.items())
    parser = cli.build_parser(description, DEFAULT_RECIPE, version)
    given = cli.parse_settings(parser, arguments)

    def run() -> int:
        distributed.divide_cores()
        config = configure(**distributed.settings_after_restart(given))
        cli.check_installed()
        try:
            train(
                config,
                started=START,
                before_training=devices.tune_process,
                on_second_interrupt=lambda: os._exit(130),
            )
        except Stopped as stopped:
            to_repeat = foreign_paths.settings_to_repeat(vars(config))
            command = cli.resume_command(str(stopped.run), to_repeat)
            return cli.report_stopped(stopped, distributed.resume_command(command))
        return 0

    return cli.run_program(
        run,
        parser,
        debug=given.get("debug", False),
        before_report=distributed.wait_for_first_error,
    )


if __name__ == "__main__":
    cli.end_process(main())
