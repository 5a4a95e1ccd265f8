"""What the steps of --augment do to images and labels, and which are refused."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from classifier.augmentations import (
    MIXING,
    STRENGTHS,
    WITHOUT_STRENGTH,
    build_augmentation,
    cutmix,
)
from classifier.errors import UsageError, UserError


def augment(text, images, labels=None):
    """The augmented images, as float in [0, 255]."""
    if labels is None:
        labels = torch.zeros(len(images), dtype=torch.int64)
    return build_augmentation(text, 10)(images, labels)[0]


@pytest.mark.parametrize("text", [None, "none", "flip", "crop=2", "flip,crop"])
def test_without_other_steps_nothing_changes(text):
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    changed, targets = build_augmentation(text, 10)(images, labels)
    assert changed is images
    assert targets is labels


@pytest.mark.parametrize("name", [*STRENGTHS, *WITHOUT_STRENGTH])
def test_each_image_gets_its_own_draw(name):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    images = torch.cat([image, image, 255 - image, 255 - image] * 16)
    changed = augment(name, images, torch.arange(64) % 10)
    assert changed.shape == images.shape
    assert changed.min() >= 0 and changed.max() <= 255.01
    different = {tuple(one.flatten().tolist()) for one in changed[::4]}
    assert len(different) > 5  # of 16 equal ones
    unchanged = (changed[::4] == image).flatten(1).all(1).float().mean()
    assert unchanged < 0.9
    if name in ("sharpness", "erase"):  # they leave out some of the images
        assert unchanged > 0


@pytest.mark.parametrize("name", STRENGTHS)
@given(share=st.floats(0.05, 1), size=st.integers(8, 40), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=8, derandomize=True, database=None)
def test_augmented_images_stay_images(name, share, size, seed):
    torch.manual_seed(seed)
    labels = torch.arange(12) % 5
    mixes = name in MIXING
    num_different = 12 if mixes else 1
    images = torch.randint(0, 256, (num_different, 3, size, size), dtype=torch.uint8)
    images = images.expand(12, -1, -1, -1)
    strength = max(0.3, share) * STRENGTHS[name][1]
    changed, targets = build_augmentation(f"{name}={strength}", 5)(images, labels)
    assert changed.shape == images.shape and changed.dtype == torch.float32
    assert float(changed.min()) >= -0.01 and float(changed.max()) <= 255.01
    if mixes:
        assert targets.shape == (12, 5)
        torch.testing.assert_close(targets.sum(1), torch.ones(12))
        assert (targets >= 0).all()
        return
    assert torch.equal(targets, labels)
    leaves_one_place = name == "cutout" and size * strength >= size - 1
    if not leaves_one_place:
        assert len({tuple(image.flatten().tolist()) for image in changed}) > 1


def test_strength_of_an_augmentation_counts():
    torch.manual_seed(0)
    grey = torch.full((50, 3, 8, 8), 100, dtype=torch.uint8)
    weak = augment("brightness=0.1", grey).std()
    strong = augment("brightness=0.4", grey).std()
    assert strong > 2 * weak > 0


def test_default_strength_is_the_one_in_the_table():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    for name, (default, _) in STRENGTHS.items():
        results = []
        for text in (name, f"{name}={default}", f"{name}="):
            torch.manual_seed(1)
            results.append(augment(text, images))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), name


def spread(values):
    """The largest standard deviation over the images of a batch."""
    return values.std(0).max()


def test_brightness_and_contrast_change_what_their_names_say():
    torch.manual_seed(0)
    grey = torch.full((50, 3, 8, 8), 120, dtype=torch.uint8)
    two_greys = grey.clone()
    two_greys[..., :4] = 60
    assert spread(augment("brightness=0.4", grey)) > 15
    assert spread(augment("contrast=0.4", grey)) < 1
    steps = augment("contrast=0.4", two_greys).diff(dim=3)[..., 3]
    assert spread(steps) > 5


def test_saturation_and_hue_change_what_their_names_say():
    torch.manual_seed(0)
    grey = torch.full((50, 3, 8, 8), 120, dtype=torch.uint8)
    red = torch.tensor([200, 99, 99]).view(1, 3, 1, 1).expand(50, 3, 8, 8).byte()
    assert spread(augment("saturation=0.4", grey)) < 1
    assert spread(augment("hue=0.4", grey)) < 1
    less_red = augment("saturation=0.4", red)
    assert spread(less_red.amin(1)) > 5
    assert torch.allclose(less_red[:, 1], less_red[:, 2], atol=1)  # still red
    turned = augment("hue=0.4", red)
    assert spread(turned.amin(1)) < 1 and spread(turned.amax(1)) < 1
    assert spread(turned.median(1).values) > 15


@pytest.mark.parametrize("most", [20, 60])
def test_images_are_rotated_by_up_to_so_many_degrees(most):
    torch.manual_seed(0)
    images = torch.zeros(200, 3, 33, 33, dtype=torch.uint8)
    images[:, :, 14:19, 24:29] = 255  # a spot right of the middle
    rotated = augment(f"rotate={most}", images).mean(1)
    shares = rotated / rotated.sum((1, 2), keepdim=True)
    positions = torch.arange(33.0) - 16
    down = (shares.sum(2) * positions).sum(1)
    right = (shares.sum(1) * positions).sum(1)
    angles = torch.atan2(down, right).rad2deg()
    assert -most - 1 < angles.min() < -0.9 * most
    assert 0.9 * most < angles.max() < most + 1


def grey_areas(text):
    """The share of each of 300 white images that a step makes grey."""
    white = torch.full((300, 3, 32, 32), 255, dtype=torch.uint8)
    is_grey = augment(text, white)[:, 0] < 200
    return is_grey.float().mean((1, 2))


def test_pieces_are_erased_as_often_and_as_widely_as_asked():
    torch.manual_seed(0)
    areas = grey_areas("erase=0.3")
    assert (areas > 0).float().mean() == pytest.approx(0.3, abs=0.1)
    assert 0.01 < areas[areas > 0].min() < 0.1
    assert 0.2 < areas.max() < 0.36
    for side in (0.5, 0.25):
        assert grey_areas(f"cutout={side}").max() == pytest.approx(side**2, abs=0.02)


def test_sharpness_varies_both_ways():
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(1, 3, 6, 6), 32, mode="bicubic").clamp(0.2, 0.8)
    images = (smooth * 255).byte().expand(64, -1, -1, -1)
    changed = augment("sharpness", images)
    edges = changed.diff(dim=3).abs().mean((1, 2, 3))
    edges_before = images.float().diff(dim=3).abs().mean((1, 2, 3))
    assert (edges > 1.01 * edges_before).sum() > 5
    assert (edges < 0.99 * edges_before).sum() > 5


# ---- mixing ----


@pytest.mark.parametrize("name", MIXING)
def test_mixed_labels_are_the_shares_of_the_images(name):
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(20)
    brightness = 20 * labels  # an image is as bright as its label says
    images = brightness.view(-1, 1, 1, 1).expand(-1, 3, 32, 32).byte()
    mixed, shares = build_augmentation(name, 10)(images, labels)
    expected = shares @ torch.arange(10.0)
    torch.testing.assert_close(mixed.mean((1, 2, 3)) / 20, expected, atol=1e-3, rtol=0)
    assert 0.05 < 1 - shares.max(1).values.mean() < 0.4


def test_mixup_keeps_at_least_its_own_share():
    torch.manual_seed(0)
    labels = torch.arange(200) % 10
    images = torch.zeros(200, 3, 4, 4, dtype=torch.uint8)
    _, shares = build_augmentation("mixup=0.1", 10)(images, labels)
    own = shares[torch.arange(200), labels]
    assert own.min() >= 0.9 - 1e-6


def test_cutmix_takes_one_rectangle_of_the_shape_of_the_image():
    torch.manual_seed(0)
    images, others = torch.zeros(100, 3, 16, 24), torch.ones(100, 3, 16, 24)
    mixed, shares = cutmix(images, others, 1.0)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), shares)
    inside = mixed[:, 0]
    rows, columns = inside.amax(2), inside.amax(1)
    assert torch.equal(inside, rows[:, :, None] * columns[:, None, :])  # a rectangle, or nothing
    heights, widths = rows.sum(1), columns.sum(1)
    assert ((heights / 16 - widths / 24).abs() <= 1 / 16 + 1 / 24)[shares > 0].all()
    assert (rows.diff().abs().sum(1) <= 2).all()  # in one piece
    assert shares.std() > 0.2


def test_each_batch_gets_one_of_several_mixing_steps():
    torch.manual_seed(0)
    images = torch.arange(16, dtype=torch.uint8).mul(16).view(16, 1, 1, 1).expand(16, 3, 8, 8)
    labels = torch.arange(16) % 10
    mix = build_augmentation("mixup,cutmix", 10)
    has_edges = []
    for _ in range(20):
        mixed, _ = mix(images, labels)
        has_edges.append(bool((mixed.std((2, 3)) > 1e-2).any()))  # mixup leaves each image plain
    assert set(has_edges) == {True, False}


def test_same_seed_gives_the_same_images():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(8)
    step = build_augmentation("rotate,brightness,erase,mixup,cutmix", 10)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(step(images, labels))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("turn", "'turn'"),
        ("flip,", "''"),
        ("rotate=400", "180"),
        ("rotate=0", "rotate=0"),
        ("rotate=-5", "rotate=-5"),
        ("hue=x", "hue=x"),
        ("hue=nan", "hue=nan"),
        ("cutmix=inf", "cutmix=inf"),
        ("erase=75%", "erase=75%"),
        ("randaugment=31", "30"),
        ("randaugment=0", "randaugment=0"),
        ("trivialaugment=3", "trivialaugment"),
        ("crop,randaug", "trivialaugment"),
    ],
)
def test_wrong_step_is_refused(text, named):
    with pytest.raises(UsageError) as caught:
        build_augmentation(text, 10)
    assert f"--augment {text}" in str(caught.value)
    assert named in str(caught.value)


def test_missing_kornia_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.delitem(sys.modules, "kornia.augmentation", raising=False)
    with pytest.raises(UserError, match="--augment rotate .*kornia.*requirements-extras.txt"):
        build_augmentation("rotate", 10)
    build_augmentation("mixup", 10)  # does without it
    for name in ("randaugment", "trivialaugment"):
        monkeypatch.setitem(sys.modules, "kornia", None)
        with pytest.raises(UserError, match=f"--augment {name} .*kornia.*requirements-extras.txt"):
            build_augmentation(name, 10)


def test_infinity_is_no_default():
    for default, largest in STRENGTHS.values():
        assert 0 < default <= largest < math.inf
