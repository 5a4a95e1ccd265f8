"""Batches that are computed in several micro-batches, whose gradients add up, to save memory."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from classifier.config import Config
from classifier.errors import UserError

MIN_MICRO_BATCH = 16  # images: batch norm needs some
SMALL_IMAGE, SMALL_MICRO_BATCH = 32, 500  # pixels and images for which memory is not measured
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
        count: number of micro-batches in a batch.
        has_unused_params: True if the network has weights that get no gradient.
    """

    count: int  # type: ignore[assignment]  # hides the method of tuples
    has_unused_params: bool


def fit(
    forward_backward: ForwardBackward[BatchT],
    model: nn.Module,
    batch: BatchT,
    config: Config,
    *,
    image_size: int,
    device: torch.device,
    world_size: int,
) -> Fit:
    """Find how many micro-batches of --micro-batch images, or of fewer, fit into memory.

    Tries steps on copies of the network, which draw random numbers as a step does, and prints a
    note if the micro-batches have to be smaller than asked for. On a CPU the default network is not
    tried: as it is by default it fits every machine that torch fits, and larger it is measured.
    Raises UserError if not even one image fits.

    batch: the first batch of the run, for all processes. image_size: width of the images, in
    pixels.
    """
    local_batch_size = math.ceil(len(batch.order) / world_size)
    micro_batch = config.micro_batch or local_batch_size
    count = math.ceil(local_batch_size / micro_batch)
    on_cpu = device.type == "cpu"
    is_default_network = config.model == "cnn"
    is_small = (config.width or 1.0) <= 1 and image_size <= SMALL_IMAGE
    if on_cpu and is_default_network and is_small and micro_batch <= SMALL_MICRO_BATCH:
        return Fit(count, has_unused_params=False)
    if on_cpu and local_batch_size >= 2 * MIN_MICRO_BATCH:
        count = _fit_cpu(forward_backward, model, batch, count, world_size)
    if on_cpu and is_default_network:
        return Fit(count, has_unused_params=False)
    while True:
        try:
            micro_batches = min(count, len(batch.order) // world_size)
            has_unused_params = _trial_step(forward_backward, model, batch, micro_batches)
            return Fit(count, has_unused_params)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        if count >= local_batch_size:
            remedy = "--image-size or a smaller network" if on_cpu else "--device cpu"
            raise UserError(f"memory is too small for even a single image: try {remedy}")
        count = min(2 * count, local_batch_size)
        _print_note("out of memory", count, local_batch_size)


def _trial_step(
    forward_backward: ForwardBackward[BatchT], model: nn.Module, batch: BatchT, micro_batches: int
) -> bool:
    """Compute gradients on a copy of the network; True if some trained weights got none."""
    trial = copy.deepcopy(model).train()
    forward_backward(trial, batch, 1.0, micro_batches)
    trained = [weight for weight in trial.parameters() if weight.requires_grad]
    return any(weight.grad is None for weight in trained)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """True for torch.OutOfMemoryError, and for the plain RuntimeError that MPS and CPUs raise."""
    text = str(error)
    return "out of memory" in text or "allocate memory" in text


def _fit_cpu(
    forward_backward: ForwardBackward[BatchT],
    model: nn.Module,
    batch: BatchT,
    count: int,
    world_size: int,
) -> int:
    """The number of micro-batches by CPU_BYTES, with MIN_MICRO_BATCH images at least in each.

    A CPU that has too little memory raises no error: it swaps, or the process is killed.
    """
    try:
        bytes_of_8 = _bytes_kept(forward_backward, model, batch.take(slice(8 * world_size)))
        bytes_of_4 = _bytes_kept(forward_backward, model, batch.take(slice(4 * world_size)))
    except RuntimeError:
        return count  # the trial step raises it again
    bytes_per_image = (bytes_of_8 - bytes_of_4) / 4  # both include the weights
    local_batch_size = math.ceil(len(batch.order) / world_size)
    needed = math.ceil(local_batch_size * bytes_per_image / CPU_BYTES)
    needed = min(needed, local_batch_size // MIN_MICRO_BATCH)
    if needed <= count:
        return count
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


def _print_note(reason: str, count: int, local_batch_size: int) -> None:
    images = math.ceil(local_batch_size / count)
    print(
        f"note: {reason}: each batch is now computed as {count} micro-batches of {images} images "
        "whose gradients add up; batch norm sees the micro-batch"
    )
