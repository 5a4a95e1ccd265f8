"""Batches: what is random in an epoch, its slices, and images flipped, shifted and normalised."""

import itertools
import math

import pytest
import torch

import image_classification as ic
from classifier.config import Augment

CPU = torch.device("cpu")
COUNT = 200


def plan(seed=0, epoch=0, flip=True, max_shift=2, sample_indices=None):
    augment = Augment(flip, max_shift, {})
    return ic.plan_epoch(COUNT, seed, epoch, augment, CPU, sample_indices)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def flips_by_image(batch):
    """Whether each image is flipped, in the order of the images."""
    return batch.flips[batch.order.argsort()]


# ---- the plan of an epoch ----


def test_plan_holds_every_image_once_with_a_flip_and_a_shift():
    batch = plan()
    assert batch.order.sort().values.equal(torch.arange(COUNT))
    assert batch.order.dtype == torch.int64
    assert batch.flips.dtype == torch.bool
    assert batch.flips.shape == (COUNT,)
    assert batch.shifts.dtype == torch.int64
    assert batch.shifts.shape == (COUNT, 2)
    for direction in batch.shifts.unbind(1):
        assert set(direction.tolist()) == {-2, -1, 0, 1, 2}


def test_plan_follows_from_seed_and_epoch_alone():
    expected = plan(seed=3, epoch=4)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert same(plan(seed=3, epoch=4), expected)
    assert torch.equal(torch.get_rng_state(), state)  # nor does it draw from the global generator


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"epoch": 2}])
def test_other_seeds_and_epochs_have_another_plan(other):
    first, second = plan(), plan(**other)
    assert not torch.equal(first.order, second.order)
    assert not torch.equal(first.shifts, second.shifts)


def test_each_image_is_flipped_in_every_other_epoch():
    flips = [flips_by_image(plan(epoch=epoch)) for epoch in range(4)]
    assert torch.equal(flips[1], ~flips[0])
    assert torch.equal(flips[2], flips[0])
    assert torch.equal(flips[3], flips[1])
    assert 0.3 < flips[0].float().mean() < 0.7


def test_first_flips_depend_on_the_seed():
    assert not torch.equal(flips_by_image(plan(seed=0)), flips_by_image(plan(seed=1)))


def test_augmentation_that_is_off_leaves_images_as_they_are():
    assert not plan(flip=False).flips.any()
    assert not plan(max_shift=0).shifts.any()


def test_order_and_flips_do_not_depend_on_the_shifts():
    first, second = plan(max_shift=0), plan(max_shift=4)
    assert torch.equal(first.order, second.order)
    assert torch.equal(first.flips, second.flips)


def test_sampled_images_are_shuffled_and_keep_their_flips():
    sample_indices = torch.tensor([5, 5, 5, 7, 9, 9, *range(100, 160)])
    batch = plan(sample_indices=sample_indices)
    assert batch.order.sort().values.equal(sample_indices)
    assert not torch.equal(batch.order, sample_indices)
    assert batch.shifts.shape == (len(sample_indices), 2)
    everything = flips_by_image(plan())
    assert torch.equal(batch.flips, everything[batch.order])


# ---- slices of it ----


def join(batches):
    """One batch of several."""
    return ic.Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def test_take_slices_order_flips_and_shifts():
    whole = plan()
    batch = whole.take(slice(20, 50))
    assert isinstance(batch, ic.Batch)
    assert torch.equal(batch.order, whole.order[20:50])
    assert torch.equal(batch.flips, whole.flips[20:50])
    assert torch.equal(batch.shifts, whole.shifts[20:50])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shards_share_a_batch_among_processes(world_size):
    batch = plan().take(slice(0, 50))
    shards = [batch.shard(rank, world_size) for rank in range(world_size)]
    assert same(join(shards), batch)
    sizes = [len(shard.order) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("count", [1, 3, 7])
def test_split_makes_micro_batches(count):
    batch = plan().take(slice(0, 50))
    parts = list(batch.split(count))
    assert len(parts) == count
    assert all(isinstance(part, ic.Batch) for part in parts)
    assert same(join(parts), batch)
    sizes = [len(part.order) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 50, 500])
def test_steps_take_all_images_in_batches_of_nearly_equal_size(batch_size):
    for epoch_size in (1, 2, 3, 4, 5, 8, 49, 50, 51, 100, 101, 1000):
        slices = ic.slice_epoch(epoch_size, batch_size)
        assert slices[0].start == 0 and slices[-1].stop == epoch_size
        assert all(one.stop == other.start for one, other in itertools.pairwise(slices))
        sizes = [each.stop - each.start for each in slices]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) == sizes[0]
        if batch_size == 1 or epoch_size == 1:
            assert set(sizes) == {1}
        else:
            assert min(sizes) >= 2, "an image is left alone"
            assert max(sizes) <= max(batch_size, 3)
        if batch_size != 2:
            assert len(slices) == math.ceil(epoch_size / batch_size)


# ---- images ----


def reflect(position, size):
    """The position inside an image that a position up to size - 1 pixels outside stands for."""
    if position < 0:
        return -position
    if position >= size:
        return 2 * (size - 1) - position
    return position


def augment_pixel_by_pixel(image, flip, down, right):
    """An image moved down and to the right, then mirrored."""
    _, height, width = image.shape
    result = torch.empty_like(image)
    for row in range(height):
        for column in range(width):
            source_row = reflect(row - down, height)
            source_column = reflect(column - right, width)
            target_column = width - 1 - column if flip else column
            result[:, row, target_column] = image[:, source_row, source_column]
    return result


@pytest.mark.parametrize("max_shift", [0, 2, 4])
def test_images_are_those_of_a_plain_loop(max_shift):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 5, 6), dtype=torch.uint8, generator=generator)
    augment = Augment(True, max_shift, {})
    batch = ic.plan_epoch(20, 0, 0, augment, CPU)
    assert batch.flips.any() and not batch.flips.all()
    got = ic.gather_augmented(images, batch)
    assert got.dtype == torch.uint8
    assert got.shape == images.shape
    for i, index in enumerate(batch.order):
        down, right = batch.shifts[i].tolist()
        expected = augment_pixel_by_pixel(images[index], batch.flips[i], down, right)
        assert torch.equal(got[i], expected), (batch.flips[i], down, right)


def test_shift_of_one_pixel_down_moves_the_first_row_to_the_second():
    image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    batch = ic.Batch(torch.tensor([0]), torch.tensor([False]), torch.tensor([[1, 0]]))
    moved = ic.gather_augmented(image, batch)
    assert torch.equal(moved[0, 0, 1], image[0, 0, 0])
    assert torch.equal(moved[0, 0, 0], image[0, 0, 1])  # reflected


# ---- normalisation ----


def test_normalised_training_images_have_mean_0_and_standard_deviation_1():
    config = ic.Config(dataset="digits", model="cnn", width=0.25)
    data = ic.load_data(config)
    model = ic.build_model(config, data)
    images = ic.normalise(data.train.images, model)
    assert images.dtype == torch.float32
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (images.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-4


def test_normalise_uses_the_statistics_of_each_channel():
    model = torch.nn.Module()
    mean, std = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.1, 0.2, 0.4])
    model.register_buffer("pixel_mean", 255 * mean.view(1, 3, 1, 1))
    model.register_buffer("pixel_scale", 1 / (255 * std.view(1, 3, 1, 1)))
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    expected = (images / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    torch.testing.assert_close(ic.normalise(images, model), expected, rtol=1e-5, atol=1e-5)
