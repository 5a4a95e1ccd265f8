"""What evaluate() and Grad-CAM refuse, before they compute anything."""

import numpy as np
import pytest
import torch
from torch import nn

import image_classification as ic
from classifier.datasets.memmap_images import MemmapImages


class Means(nn.Module):
    """Its logits are the means of the channels."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))
        self.register_buffer("pixel_mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("pixel_scale", torch.ones(1, 3, 1, 1))
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return images.mean((2, 3)) * self.factor


IMAGES = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 0])


def test_images_and_labels_as_they_should_be():
    rows = torch.arange(4)
    for images in (IMAGES, MemmapImages(IMAGES, rows, None)):
        assert ic.evaluate(Means(), images, LABELS).accuracy == 0.5


@pytest.mark.parametrize(
    ("images", "labels", "kind", "named"),
    [
        (IMAGES / 255, LABELS, TypeError, "uint8"),
        (IMAGES.long(), LABELS, TypeError, "uint8"),
        (IMAGES.numpy(), LABELS, TypeError, "tensor"),
        (list(IMAGES), LABELS, TypeError, "tensor"),
        (IMAGES[0], LABELS[:1], ValueError, "3, H, W"),
        (IMAGES[:, :1], LABELS, ValueError, "3, H, W"),
        (IMAGES.permute(0, 2, 3, 1), LABELS, ValueError, "3, H, W"),
        (IMAGES[:0], LABELS[:0], ValueError, "3, H, W"),
        (IMAGES, LABELS[:3], ValueError, "labels"),
        (IMAGES, LABELS[:, None], ValueError, "labels"),
        (IMAGES, LABELS.int(), TypeError, "int64"),
        (IMAGES, LABELS.float(), TypeError, "int64"),
        (IMAGES, LABELS.numpy(), TypeError, "int64"),
        (IMAGES, [0, 1, 2, 0], TypeError, "int64"),
        (IMAGES, LABELS - 1, ValueError, "-1"),
        (IMAGES, torch.tensor([0, 1, 2, -100]), ValueError, "-100"),  # F.cross_entropy ignores it
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else type(value).__name__,
)
def test_others_are_refused_before_anything_is_computed(images, labels, kind, named):
    model = Means()
    with pytest.raises(kind, match=named):
        ic.evaluate(model, images, labels)
    assert model.calls == 0


def test_label_without_a_class_is_refused():
    with pytest.raises(ValueError, match="label 3"):
        ic.evaluate(Means(), IMAGES, LABELS + 1)


def test_number_of_views_is_checked():
    for tta in (0, 3, 7):
        with pytest.raises(ValueError, match="tta"):
            ic.evaluate(Means(), IMAGES, LABELS, tta=tta)


def test_mode_of_the_model_is_kept_after_an_error():
    model = Means().train()
    with pytest.raises(ValueError, match="tta"):
        ic.evaluate(model, IMAGES, LABELS, tta=3)
    assert model.training


def test_grad_cam_checks_its_images():
    import explain

    for images in (IMAGES / 255, IMAGES.numpy()):
        with pytest.raises(TypeError, match="images"):
            explain.grad_cam(Means(), images, LABELS)
    with pytest.raises(ValueError, match="labels"):
        explain.grad_cam(Means(), IMAGES, LABELS[:2])


def test_arrays_are_no_tensors_here():
    with pytest.raises(TypeError, match="from_numpy"):
        ic.evaluate(Means(), np.zeros((4, 3, 8, 8), np.uint8), LABELS)
