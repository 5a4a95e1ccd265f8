"""How many micro-batches a batch is computed in."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from classifier import micro_batches
from classifier.config import Config
from classifier.errors import UsageError, UserError

CPU = torch.device("cpu")
PIXELS = 64


class Batch(NamedTuple):
    order: torch.Tensor
    shifts: torch.Tensor

    def take(self, part):
        return Batch(*(tensor[part] for tensor in self))


class Hungry(nn.Sequential):
    """A small network that runs out of memory with more than `limit` images at once."""

    def __init__(self, limit, message="", needs_two=False):
        super().__init__(nn.Linear(PIXELS, 8), nn.ReLU(), nn.Linear(8, 3))
        if needs_two:
            self.insert(1, nn.BatchNorm1d(8))
        self.limit = limit
        self.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if message:
            self.error = RuntimeError(message)

    def forward(self, images):
        if self.training and len(images) > self.limit:
            raise self.error
        return super().forward(images.flatten(1)[:, :PIXELS])


class Step:
    """A stand-in for the trainer's forward_backward; notes with what it is called."""

    def __init__(self, rank=0, world_size=1):
        self.rank, self.world_size = rank, world_size
        self.calls = []  # (number of images, scale, number of micro-batches)
        self.models = []

    def __call__(self, model, batch, scale, count):
        self.calls.append((len(batch.order), scale, count))
        self.models.append(model)
        assert model.training
        length = len(batch.order)
        first = length * self.rank // self.world_size
        last = length * (self.rank + 1) // self.world_size
        for part in batch.order[first:last].tensor_split(count):
            images = torch.rand(len(part), PIXELS)
            model(images).sum().backward()
        return torch.zeros(2)


def batch_of(count):
    return Batch(torch.arange(count), torch.zeros(count, 2))


def fit(
    step, model, num_images, micro_batch=500, device=CPU, is_default_network=False, image_size=32
):
    """The result of the function of that name, for images of one channel."""
    config = Config(model="cnn" if is_default_network else "fcn", micro_batch=micro_batch)
    return micro_batches.fit_into_memory(
        step,
        model,
        batch_of(num_images),
        config,
        image_shape=(1, image_size, image_size),
        device=device,
        world_size=step.world_size,
    )


@pytest.mark.parametrize(
    ("images", "micro_batch", "expected"),
    [(500, 500, 1), (500, 250, 2), (500, 170, 3), (8, 2, 4), (7, 1, 7)],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_micro_batches_have_at_most_so_many_images(images, micro_batch, expected, device):
    found = fit(Step(), Hungry(1000), images, micro_batch, device=torch.device(device))
    assert found.num_micro_batches == expected


def test_default_network_is_not_tried_on_a_cpu():
    step = Step()
    found = fit(step, Hungry(0), 100, 34, is_default_network=True)
    assert found == (3, False) and not step.calls
    fit(step, Hungry(1000), 100, device=torch.device("cuda"), is_default_network=True)
    assert step.calls


@pytest.mark.parametrize(("limit", "expected"), [(1000, 1), (99, 2), (30, 4), (1, 100)])
def test_batch_is_divided_until_it_fits(capsys, limit, expected):
    """By doubling, to one image at most."""
    step = Step()
    found = fit(step, Hungry(limit), 100, device=torch.device("cuda"))
    assert found.num_micro_batches == expected
    counts = [count for _, _, count in step.calls]
    assert counts == [min(2**i, 100) for i in range(len(counts))] and counts[-1] == expected
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == len(counts) - 1
    assert all("out of memory" in note and "batch norm" in note for note in notes)
    images = math.ceil(100 / expected)
    assert expected == 1 or f" {expected} micro-batches of {images} images" in notes[-1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_not_even_one_image_fits(device):
    remedy = {"cpu": "--image-size", "cuda": "--device cpu"}[device]
    with pytest.raises(UserError, match=remedy):
        fit(Step(), Hungry(0), 20, device=torch.device(device))


def test_error_of_mps_is_recognised():
    network = Hungry(5, message="MPS backend out of memory (MPS allocated: 3 GB)")
    assert fit(Step(), network, 20, device=torch.device("mps")).num_micro_batches == 4


@pytest.mark.parametrize(("images", "micro_batch"), [(3, 2), (5, 2), (7, 2), (9, 4), (7, 6)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_no_image_is_computed_alone(images, micro_batch, world_size):
    """Micro-batches of two become micro-batches of two and three."""
    images *= world_size
    for rank in range(world_size):
        for extra in range(world_size):  # which some processes do not get
            step = Step(rank, world_size)
            fit(step, Hungry(1000, needs_two=True), images + extra, micro_batch)
            assert step.calls  # the step worked


def test_memory_for_one_image_is_too_little_where_two_are_needed():
    """Where batch norm gets a single value of each channel from an image."""

    def fit_on_gpu(limit, images, needs_two=True):
        network = Hungry(limit, needs_two=needs_two)
        return fit(Step(), network, images, device=torch.device("cuda"))

    assert fit_on_gpu(2, 8).num_micro_batches == 4
    assert fit_on_gpu(3, 9).num_micro_batches == 4
    with pytest.raises(UserError, match="2 images"):
        fit_on_gpu(1, 8)
    assert fit_on_gpu(1, 8, needs_two=False).num_micro_batches == 8


# ---- images that come one at a time ----


@pytest.mark.parametrize(
    ("settings", "shape", "named"),
    [
        ({"batch_size": 1}, (9, 3, 4, 4), "--batch-size 1 "),
        ({"batch_size": 500}, (1, 3, 4, 4), "one training image"),
        ({"batch_size": 8, "micro_batch": 1}, (9, 3, 4, 4), "--micro-batch 1 "),
        ({"batch_size": 1, "progressive_resizing": 0.5}, (9, 3, 8, 8), "--batch-size 1 "),
        ({"batch_size": 1, "progressive_resizing": 0.0}, (9, 3, 8, 8), ""),
        ({"batch_size": 2}, (9, 3, 4, 4), ""),
        ({"batch_size": 1, "freeze": True, "init_from": "a.pth"}, (9, 3, 4, 4), ""),
    ],
)
def test_single_images_are_refused_where_batch_norm_needs_two(settings, shape, named):
    """Which gets one value of each channel from an image of 4 by 4 pixels."""
    layers = [nn.Conv2d(3, 4, 1), nn.AvgPool2d(4), nn.BatchNorm2d(4), nn.Dropout(0.5)]
    network = nn.Sequential(*layers).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    config = Config(model="fcn", **settings)
    if named:
        with pytest.raises(UsageError, match=named):
            micro_batches.check_single_images(network, config, shape)
    else:
        micro_batches.check_single_images(network, config, shape)
    assert torch.equal(torch.get_rng_state(), state) and not network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_network_that_takes_no_images_at_all_is_not_blamed_on_their_number():
    config = Config(model="fcn", batch_size=1)
    micro_batches.check_single_images(nn.Linear(7, 2), config, (9, 3, 4, 4))


# ---- other errors ----


def test_other_errors_are_not_swallowed():
    with pytest.raises(RuntimeError, match="shapes"):
        fit(Step(), Hungry(0, message="the shapes do not match"), 20)
    with pytest.raises(RuntimeError, match="shapes"):
        fit(Step(), Hungry(0, message="the shapes do not match"), 100)  # of which bytes are counted


def test_count_that_is_asked_for_is_the_least():
    step = Step()
    assert fit(step, Hungry(1000), 100, 15, device=torch.device("cuda")).num_micro_batches == 7
    assert step.calls == [(100, 1.0, 7)]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_tries_its_share(rank):
    """51 images of two processes: the one with 26 needs two micro-batches of at most 25."""
    step = Step(rank, world_size=2)
    found = fit(step, Hungry(25), 51, device=torch.device("cuda"))
    assert found.num_micro_batches == 1 + rank
    # as many micro-batches as images, where one process has fewer images
    step = Step(rank, world_size=2)
    fit(step, Hungry(1000), 51, 1, device=torch.device("cuda"))
    assert step.calls[0][2] == 25


@pytest.mark.parametrize("frozen", [False, True])
def test_unused_params_are_found(frozen):
    network = Hungry(1000)
    assert not fit(Step(), network, 20).has_unused_params
    network.unused = nn.Parameter(torch.ones(2), requires_grad=not frozen)
    assert fit(Step(), network, 20).has_unused_params == (not frozen)


def test_trial_leaves_the_network_alone():
    network = Hungry(30).eval()
    step = Step()
    fit(step, network, 100)
    assert not network.training
    assert all(weight.grad is None for weight in network.parameters())
    assert all(model is not network for model in step.models)


def test_only_the_trial_step_draws_random_numbers():
    """What a run draws depends on it: counting bytes draws nothing, a trial what a step draws."""
    network = Hungry(1000)
    torch.manual_seed(0)
    fit(Step(), network, 100)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.rand(100, PIXELS)
    assert torch.equal(torch.get_rng_state(), after)


class Wide(nn.Module):
    """Keeps about 1 MiB of each image for the backward pass."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2**18 // PIXELS))

    def forward(self, images):
        return (images[:, :, None] * self.scale).exp()


@pytest.mark.parametrize(
    ("mib", "images", "world_size", "expected"),
    [(1000, 100, 1, 1), (40, 100, 1, 3), (1, 100, 1, 6), (1, 31, 1, 1), (1, 64, 2, 2)],
)
def test_large_network_is_divided_on_a_cpu(monkeypatch, capsys, mib, images, world_size, expected):
    """By the bytes that are kept, to 16 images at least; few images are not counted at all."""
    monkeypatch.setattr(micro_batches, "CPU_BYTES", mib * 2**20)
    step = Step(world_size=world_size)
    assert fit(step, Wide(), images).num_micro_batches == expected
    out = capsys.readouterr().out
    assert ("an image takes 1 MiB" in out) == (expected > 1)
    assert step.calls[-1] == (images, 1.0, expected)
    if images > 31:
        assert step.calls[:2] == [(8 * world_size, 1.0, 1), (4 * world_size, 1.0, 1)]


def test_bytes_are_not_counted_where_more_micro_batches_are_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(micro_batches, "CPU_BYTES", 40 * 2**20)
    assert fit(Step(), Wide(), 100, 20).num_micro_batches == 5
    assert capsys.readouterr().out == ""


def test_memory_too_short_to_count_bytes(capsys):
    """Counting fails with 8 images, so the trial steps find the number."""
    assert fit(Step(), Hungry(7), 64).num_micro_batches == 16
    assert "an image takes" not in capsys.readouterr().out


@pytest.mark.parametrize(("image_size", "expected"), [(32, 1), (48, 3)])
def test_memory_of_the_default_network_is_measured_for_larger_images(
    monkeypatch, image_size, expected
):
    monkeypatch.setattr(micro_batches, "CPU_BYTES", 40 * 2**20)
    step = Step()
    found = fit(step, Wide(), 100, is_default_network=True, image_size=image_size)
    assert found == (expected, False)
    assert len(step.calls) == (0 if expected == 1 else 2)  # measured, not tried
