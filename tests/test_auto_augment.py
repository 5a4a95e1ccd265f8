"""RandAugment and TrivialAugment: what is drawn for each image, and what the operations do."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional

from classifier import auto_augment
from classifier.augmentations import build_augmentation

pytest.importorskip("kornia")

POLICIES = {
    "randaugment": lambda: auto_augment.randaugment(9),
    "trivialaugment": auto_augment.trivialaugment,
}
NAMES = [operation.name for operation in auto_augment.trivialaugment().operations]


def draw_images(count, channels=3, size=32):
    """Smooth random images, uint8 (count, channels, size, size), whose values are all possible."""
    torch.manual_seed(0)
    coarse = torch.rand(count, channels, 5, 5)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic", antialias=True)
    return (smooth * 300 - 20).clamp(0, 255).byte()


def only(policy, name):
    """A policy that gives each image this operation, once."""
    operations = [operation for operation in policy.operations if operation.name == name]
    assert len(operations) == 1
    return auto_augment.AutoAugment(operations, 1, policy.magnitude)


def shear(image, x, y):
    """About the middle of the first pixel, where torchvision's policies shear about its corner."""
    degrees = [-math.degrees(math.atan(x)), -math.degrees(math.atan(y))]
    return functional.affine(image, 0, [0, 0], 1, degrees, center=[0.5, 0.5])


def move(image, right, down):
    return functional.affine(image, 0, [int(right), int(down)], 1, [0, 0])


# What torchvision does to an 8-bit image, at the strength that it calls magnitude.
TORCHVISION = {
    "ShearX": lambda image, strength: shear(image, strength, 0),
    "ShearY": lambda image, strength: shear(image, 0, strength),
    "Rotate": functional.rotate,
    "TranslateX": lambda image, strength: move(image, strength, 0),
    "TranslateY": lambda image, strength: move(image, 0, strength),
    "Brightness": lambda image, strength: functional.adjust_brightness(image, 1 + strength),
    "Color": lambda image, strength: functional.adjust_saturation(image, 1 + strength),
    "Contrast": lambda image, strength: functional.adjust_contrast(image, 1 + strength),
    "Sharpness": lambda image, strength: functional.adjust_sharpness(image, 1 + strength),
    "Posterize": lambda image, strength: functional.posterize(image, round(8 - strength)),
    "Solarize": lambda image, strength: functional.solarize(image, 255 * (1 - strength)),
    "AutoContrast": lambda image, strength: functional.autocontrast(image),
    "Equalize": lambda image, strength: functional.equalize(image),
    "Identity": lambda image, strength: image,
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_operations_do_what_those_of_torchvision_do(name, channels):
    """To each image at a strength of its own, on floats as on 8 bits."""
    images = draw_images(7, channels)
    shares = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    policy = only(auto_augment.trivialaugment(), name)
    operation = policy.operations[0]
    for sign in [1, -1] if operation.is_signed else [1]:
        strengths = sign * shares * operation.largest
        changed = operation.change(images / 255, strengths) * 255
        if name.startswith("Translate"):
            strengths = strengths * 32
        for image, strength, got in zip(images, strengths.tolist(), changed, strict=True):
            expected = TORCHVISION[name](image, strength).float()
            differences = (got - expected).abs()
            # where a pixel lies between two others, either may be taken
            assert (differences > 2).float().mean() < 0.02, (strength, differences.max())


def test_plain_images_stay_as_they_are():
    images = torch.full((4, 3, 8, 8), 90, dtype=torch.uint8) / 255
    for name in ("AutoContrast", "Equalize", "Contrast", "Sharpness", "Color"):
        changed = only(auto_augment.trivialaugment(), name)(images)
        torch.testing.assert_close(changed, images)


@pytest.mark.parametrize("name", POLICIES)
def test_operations_are_drawn_equally_often_with_both_signs(name):
    policy = POLICIES[name]()
    calls = {operation.name: [] for operation in policy.operations}

    def record(operation):
        def change(images, strengths):
            calls[operation.name] += strengths.tolist()
            return images

        return operation._replace(change=change, largest=1.0)

    policy.operations = [record(operation) for operation in policy.operations]
    torch.manual_seed(0)
    policy(torch.zeros(2800, 1, 1, 1))
    assert sorted(calls) == sorted(TORCHVISION)
    expected = 2800 * policy.num_operations / 14
    for operation in policy.operations:
        shares = torch.tensor(calls[operation.name])
        assert len(shares) == pytest.approx(expected, rel=0.25)
        if operation.is_signed:
            assert (shares > 0).float().mean() == pytest.approx(0.5, abs=0.12)
        else:
            assert (shares >= 0).all()
        if policy.magnitude is None:
            assert shares.abs().max() == 1 and len(shares.abs().unique()) > 25
        else:
            torch.testing.assert_close(shares.abs(), torch.full_like(shares, 0.3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", POLICIES)
def test_labels_stay_and_values_stay_in_range(name, channels):
    images = draw_images(200, channels, size=20)
    labels = torch.arange(200) % 10
    changed, targets = build_augmentation(name, 10)(images, labels)
    assert targets is labels
    assert changed.shape == images.shape and changed.dtype == torch.float32
    assert changed.isfinite().all() and changed.min() >= 0 and changed.max() <= 255.01
    is_changed = ((changed - images).abs() > 1).flatten(1).any(1)
    assert 0.6 < is_changed.float().mean() < 1


@pytest.mark.parametrize("name", POLICIES)
def test_draws_follow_the_random_state(name):
    images, labels = draw_images(20), torch.zeros(20, dtype=torch.int64)
    augment = build_augmentation(name, 10)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(augment(images, labels)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_higher_magnitude_changes_more():
    images, labels = draw_images(300), torch.zeros(300, dtype=torch.int64)
    changes = []
    for magnitude in (2, 9, 30):
        torch.manual_seed(0)
        changed, _ = build_augmentation(f"randaugment={magnitude}", 10)(images, labels)
        changes.append((changed - images).abs().mean())
    assert changes[0] < 0.8 * changes[1] and changes[1] < 0.8 * changes[2]


def test_other_steps_come_in_the_order_in_which_they_are_named():
    """Erased parts are grey where they come last, and mixing follows all."""
    images, labels = draw_images(60), torch.arange(60) % 10
    torch.manual_seed(1)
    changed, targets = build_augmentation("mixup,randaugment=20,cutout", 10)(images, labels)
    assert targets.shape == (60, 10)
    steps = build_augmentation("mixup,randaugment=20,cutout", 10).kornia_steps
    assert isinstance(steps[0], auto_augment.AutoAugment) and len(steps) == 2
    torch.manual_seed(1)
    last = build_augmentation("randaugment=20,cutout", 10)(images, labels)[0]
    is_grey = (last - 127.5).abs() < 1e-3
    assert (is_grey.flatten(1).float().mean(1) > 0.1).all()
