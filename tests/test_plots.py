"""Pictures: what is in them, and that drawing changes nothing else."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from classifier.plots import (
    draw_confusion_matrix,
    draw_curves,
    draw_images,
    draw_samples,
    draw_worst_mistakes,
    new_figure,
    save_figure,
)

pytestmark = pytest.mark.pictures


def test_figure_has_its_axes_and_size():
    figure = new_figure(2, 3, 1.5, 2)
    assert len(figure.axes) == 6
    assert tuple(figure.get_size_inches()) == (4.5, 4)


def test_saved_picture_has_the_pixels_that_are_returned(folder):
    figure = draw_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["数据"], 1)
    pixels = save_figure(figure, folder / "a.png")
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    with Image.open(folder / "a.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels)
        assert picture.info["dpi"] == pytest.approx((110, 110), abs=0.1)


# ---- images ----


def test_long_titles_get_smaller_letters():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    figure = draw_images(images, ["cat", "x" * 44, ""], 3)
    assert [text.get_fontsize() for text in figure.axes[0].texts] == [7, 3.5, 7]


@pytest.mark.parametrize("size", [2, 3, 8, 32, 100])
@pytest.mark.parametrize("count", [1, 7])
def test_images_are_below_their_titles(folder, size, count):
    """Each black one in its column, with nothing of a title on it, and no other black around."""
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    figure = draw_images(images, ["one\nand two"] * count, 5)
    pixels = save_figure(figure, folder / "a.png")
    is_black = torch.from_numpy(pixels.copy()).float().mean(2) < 128
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        x = round((box.x0 + box.x1) / 2)
        bottom = round(len(is_black) - box.y0)
        assert not is_black[bottom : bottom + 2, x].any()
        assert is_black[bottom + 8 : bottom + 100, x].all()


# ---- samples ----


class Sample(NamedTuple):
    """Images of an epoch, like the script's Batch."""

    order: torch.Tensor
    flips: torch.Tensor
    shifts: torch.Tensor


@pytest.fixture
def sample():
    torch.manual_seed(0)
    flips = torch.tensor([True, False, True])
    return Sample(torch.tensor([4, 0, 2]), flips, torch.tensor([[1, -1], [2, 0], [0, 2]]))


def texts_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_samples_show_each_step_and_all_together(sample):
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    gathered = []

    def gather(sample):
        order, flips, shifts = sample
        gathered.append((order.tolist(), flips.tolist(), shifts.tolist()))
        return images[order]

    labels = torch.tensor([0, 1, 1, 0, 1])
    figure = draw_samples(sample, gather, labels, ["cat", "dog"], "flip, crop=2")
    assert texts_of(figure)[:3] == ["dog", "cat", "dog"]
    assert texts_of(figure)[3:] == ["flip"] * 3 + ["crop"] * 3 + ["augmented"] * 3
    order, flips, shifts = (part.tolist() for part in sample)
    no_shifts = [[0, 0]] * 3
    assert gathered == [
        (order, [False] * 3, no_shifts),
        (order, [True] * 3, no_shifts),
        (order, [False] * 3, shifts),
        (order, flips, shifts),
    ]
    assert (
        texts_of(draw_samples(sample, gather, labels, ["cat", "dog"], None))[3:]
        == ["augmented"] * 3
    )


def test_samples_leave_the_random_state(sample):
    pytest.importorskip("kornia")

    def gather(sample):
        order = sample.order
        torch.rand(7)
        return torch.zeros(len(order), 3, 32, 32, dtype=torch.uint8)

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    figure = draw_samples(sample, gather, torch.zeros(5, dtype=torch.int64), ["cat"], "brightness")
    assert torch.equal(torch.rand(1), expected)
    assert texts_of(figure)[3:] == ["brightness"] * 3 + ["augmented"] * 3


# ---- curves ----


WHOLE = {"image_scale": 1.0, "train_share": 1.0}


def test_lines_where_the_images_change():
    row = {"train_loss": 2.0, "train_accuracy": 1.0, "valid_accuracy": 0.5, "valid_loss": 2.0}
    images = [(0.5, 1.0), (0.5, 1.0), (0.5, 0.65), (1.0, 0.65), (1.0, 0.65)]
    history = [row | {"image_scale": scale, "train_share": share} for scale, share in images]
    for axes in draw_curves(history).axes:
        lines = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
        assert lines == [1.5, 2.5]


@pytest.mark.parametrize(("first", "scale"), [(3.0, "linear"), (1e6, "log")])
def test_losses_can_be_read_whatever_the_first_one_was(first, scale):
    row = {"train_loss": 2.0, "train_accuracy": 1.0, "valid_accuracy": 0.5, **WHOLE}
    figure = draw_curves([row | {"valid_loss": loss} for loss in (first, 1)])
    assert [axes.get_yscale() for axes in figure.axes] == [scale, "linear"]
    accuracies = [line.get_ydata().tolist() for line in figure.axes[1].lines]
    assert accuracies == [[100, 100], [50, 50]]


def test_curves_without_validation_images():
    row = {"train_loss": 2.0, "train_accuracy": 1.0, "valid_accuracy": None, "valid_loss": None}
    figure = draw_curves([row | WHOLE, row | WHOLE])
    training, validation = figure.axes[0].lines
    assert training.get_ydata().tolist() == [2, 2]
    assert np.isnan(validation.get_ydata()).all()


# ---- confusion matrix and mistakes ----


@pytest.mark.parametrize(("count", "has_numbers"), [(30, True), (31, False)])
def test_confusion_matrix_of_many_classes_has_no_numbers(folder, count, has_numbers):
    matrix = torch.eye(count, dtype=torch.int64).tolist()
    figure = draw_confusion_matrix(matrix, [f"{i}_under_$10_over_$5" for i in range(count)])
    (axes,) = figure.axes
    assert bool(axes.texts) == has_numbers
    assert [label.get_text() for label in axes.get_yticklabels()][0] == "0_under_$10_over_$5"
    save_figure(figure, folder / "matrix.png")  # a dollar sign starts no formula


def test_worst_mistakes_are_the_most_confident_ones():
    images = torch.zeros(30, 3, 32, 32, dtype=torch.uint8)
    labels = torch.zeros(30, dtype=torch.int64)
    predictions = labels.clone()
    predictions[:25] = 1
    confidences = torch.linspace(0.4, 0.99, 30)
    figure = draw_worst_mistakes(images, labels, predictions, confidences, ["cat", "dog"])
    titles = texts_of(figure)
    assert len(titles) == 20
    assert titles[0] == "cat, taken for\ndog (88.8 %)"  # number 24; 25 to 29 are right
    shown = [float(title.partition("(")[2].partition(" ")[0]) for title in titles]
    assert shown == sorted(shown, reverse=True)
    assert draw_worst_mistakes(images, labels, labels, confidences, ["cat", "dog"]) is None


def test_worst_mistakes_name_their_files(folder):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    labels, predictions = torch.tensor([0, 0]), torch.tensor([1, 1])
    files = ["cat/a_very_long_name_of_a_photograph_0123.jpg", "cat/\udcff.jpg"]
    arguments = (images, labels, predictions, torch.tensor([0.5, 0.4]), ["cat", "dog"])
    figure = draw_worst_mistakes(*arguments, files)
    first, second = texts_of(figure)
    assert first == "a_very_l…_0123.jpg\ncat, taken for\ndog (50.0 %)"
    assert len(first.split("\n")[0]) == 18 and second.startswith("\\udcff.jpg\n")
    named = save_figure(figure, folder / "named.png")
    unnamed = save_figure(draw_worst_mistakes(*arguments), folder / "unnamed.png")
    assert named.shape[0] > unnamed.shape[0] and named.shape[1] == unnamed.shape[1]
