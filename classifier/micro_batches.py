"""Gradient accumulation: a batch is computed in several micro-batches to save memory."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from classifier.config import Config
from classifier.errors import UsageError, UserError, is_out_of_memory
from classifier.progress import STEP_COST
from classifier.text import pluralize

MIN_MICRO_BATCH = 16  # images, on a CPU: batch norm needs some
# Up to these, memory is not measured for the default network on a CPU.
SMALL_IMAGE = 32  # pixels
SMALL_MICRO_BATCH = 500  # images
CPU_BYTES = 2 * 2**30  # that a CPU may keep for the backward pass: laptops have 8 GiB


BatchT = TypeVar("BatchT", bound="Batch")


class Batch(Protocol):
    """The images of a batch, as the script plans them."""

    @property
    def order(self) -> torch.Tensor:
        """Indices of the images, int64 (N,)."""

    def take(self: BatchT, part: slice) -> BatchT:
        """These images of the batch only."""


# Computes the gradients of a network for this process's share of a batch, at an image scale, in a
# number of micro-batches; returns statistics, which are not used here.
ForwardBackward = Callable[[nn.Module, BatchT, float, int], torch.Tensor]


class Fit(NamedTuple):
    """What a trial step found.

    Attributes:
        num_micro_batches: in how many micro-batches a batch is computed.
        has_unused_params: True if the network has weights that get no gradient.
    """

    num_micro_batches: int
    has_unused_params: bool


def check_single_images(model: nn.Module, config: Config, shape: tuple[int, ...]) -> None:
    """Raise UsageError if the network would get images one at a time, and needs two to be trained.

    shape: of the training images, (N, C, H, W).
    """
    num_images = shape[0]
    batch_size = min(config.batch_size or 2, num_images)
    is_single = batch_size == 1 or config.micro_batch == 1
    if config.freeze or not is_single:  # with --freeze, layers keep their statistics
        return
    if not _needs_two_images(model, shape[1:], config.progressive_resizing or 0.0):
        return
    needs_two = f"the network {config.model} can be trained on two at a time, but not on one"
    if num_images == 1:
        raise UsageError(f"one training image is too few: {needs_two}")
    option = "--batch-size" if batch_size == 1 else "--micro-batch"
    raise UsageError(f"{option} 1 is too small for these images: {needs_two}")


def _needs_two_images(
    model: nn.Module, image_shape: tuple[int, ...], progressive_resizing: float
) -> bool:
    """Whether a network can be trained on two images at a time, but not on one.

    Batch norm cannot where it gets one value per channel, as from an image of one pixel: the last
    layers of a network may see such images, above all where --progressive-resizing makes them
    small. image_shape: (C, H, W).
    """
    scales = list(STEP_COST) if progressive_resizing else [1.0]
    trial = copy.deepcopy(model).train()
    device = next(model.parameters()).device
    for scale in scales:
        height, width = (int(scale * side) for side in image_shape[1:])
        images = torch.zeros(2, image_shape[0], height, width, device=device)
        if _accepts(trial, images) and not _accepts(trial, images[:1]):
            return True
    return False


def _accepts(model: nn.Module, images: torch.Tensor) -> bool:
    """Whether a network's forward pass of these images works, or would with more memory."""
    devices = [images.device] if images.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            model(images)
    except Exception as error:  # a user's network may raise anything
        return is_out_of_memory(error)
    return True


def fit_into_memory(
    forward_backward: ForwardBackward[BatchT],
    model: nn.Module,
    batch: BatchT,
    config: Config,
    *,
    image_shape: tuple[int, ...],
    device: torch.device,
    world_size: int,
) -> Fit:
    """Find how many micro-batches of --micro-batch images, or of fewer, fit into memory.

    Tries steps on copies of the network, which draw random numbers as a step does, and prints a
    note if the micro-batches have to be smaller than asked for. There is no trial step for the
    default network on a CPU: at its default size it fits any machine that runs PyTorch, and at
    larger sizes its memory is measured. Raises UserError if not even one image fits (two, if batch
    norm needs two).

    batch: the first batch of the run, for all processes; no later one is smaller. image_shape:
    (C, H, W).
    """
    local_batch_size = math.ceil(len(batch.order) / world_size)
    micro_batch = config.micro_batch or local_batch_size
    num_micro_batches = math.ceil(local_batch_size / micro_batch)
    smallest_share = len(batch.order) // world_size  # of the process with the fewest images
    if micro_batch > 1:  # leave no image alone: three instead
        num_micro_batches = min(num_micro_batches, max(1, smallest_share // 2))
    image_size = image_shape[-1]
    on_cpu = device.type == "cpu"
    is_default_network = config.model == "cnn"
    is_small = (config.width or 1.0) <= 1 and image_size <= SMALL_IMAGE
    if on_cpu and is_default_network and is_small and micro_batch <= SMALL_MICRO_BATCH:
        return Fit(num_micro_batches, has_unused_params=False)
    if on_cpu and local_batch_size >= 2 * MIN_MICRO_BATCH:
        num_micro_batches = _fit_cpu(forward_backward, model, batch, num_micro_batches, world_size)
    if on_cpu and is_default_network:
        return Fit(num_micro_batches, has_unused_params=False)
    while True:
        try:
            tried = min(num_micro_batches, smallest_share)
            has_unused_params = _trial_step(forward_backward, model, batch, tried)
            return Fit(num_micro_batches, has_unused_params)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        most = local_batch_size
        if _needs_two_images(model, image_shape, config.progressive_resizing or 0.0):
            most = max(1, smallest_share // 2)
        if num_micro_batches >= most:
            images = math.ceil(local_batch_size / most)
            remedy = "--image-size or a smaller network" if on_cpu else "--device cpu"
            raise UserError(f"memory is too small for {pluralize(images, 'image')}: try {remedy}")
        num_micro_batches = min(2 * num_micro_batches, most)
        _print_note("out of memory", num_micro_batches, local_batch_size)


def _trial_step(
    forward_backward: ForwardBackward[BatchT],
    model: nn.Module,
    batch: BatchT,
    num_micro_batches: int,
) -> bool:
    """Compute gradients on a copy of the network; True if some trained weights got none."""
    trial = copy.deepcopy(model).train()
    forward_backward(trial, batch, 1.0, num_micro_batches)
    trained = [weight for weight in trial.parameters() if weight.requires_grad]
    return any(weight.grad is None for weight in trained)


def _fit_cpu(
    forward_backward: ForwardBackward[BatchT],
    model: nn.Module,
    batch: BatchT,
    num_micro_batches: int,
    world_size: int,
) -> int:
    """The number of micro-batches by CPU_BYTES, with MIN_MICRO_BATCH images at least in each.

    A CPU that has too little memory raises no error: it swaps, or the process is killed.
    """
    try:
        bytes_of_8 = _bytes_kept(forward_backward, model, batch.take(slice(8 * world_size)))
        bytes_of_4 = _bytes_kept(forward_backward, model, batch.take(slice(4 * world_size)))
    except RuntimeError:
        return num_micro_batches  # the trial step raises it again
    bytes_per_image = (bytes_of_8 - bytes_of_4) / 4  # both include the weights
    local_batch_size = math.ceil(len(batch.order) / world_size)
    needed = math.ceil(local_batch_size * bytes_per_image / CPU_BYTES)
    needed = min(needed, local_batch_size // MIN_MICRO_BATCH)
    if needed <= num_micro_batches:
        return num_micro_batches
    _print_note(f"an image takes {bytes_per_image / 2**20:.0f} MiB", needed, local_batch_size)
    return needed


def _bytes_kept(forward_backward: ForwardBackward[BatchT], model: nn.Module, batch: BatchT) -> int:
    """Bytes that autograd keeps for the backward pass of this batch, computed at once."""
    storages: dict[int, int] = {}  # bytes by address: several tensors may share a storage

    def note_storage(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unchanged(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    trial = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[]):
        with torch.autograd.graph.saved_tensors_hooks(note_storage, unchanged):
            forward_backward(trial, batch, 1.0, 1)
    return sum(storages.values())


def _print_note(reason: str, num_micro_batches: int, local_batch_size: int) -> None:
    images = math.ceil(local_batch_size / num_micro_batches)
    print(
        f"note: {reason}: gradients are accumulated over {num_micro_batches} micro-batches of "
        f"{images} images, and batch norm sees one micro-batch at a time"
    )
