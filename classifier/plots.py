"""The pictures that a run and the tools draw. Each function returns a matplotlib Figure.

Only `draw_samples` needs torch: `inference.py` tests an ONNX file where torch is not installed.
"""

import io
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from classifier.config import parse_augment
from classifier.files import write_atomically
from classifier.progress import Row
from classifier.text import percent, printable, shorten

if TYPE_CHECKING:  # matplotlib is slow to import
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIN_PIXELS = 32  # smaller images are enlarged for display
MAX_MISTAKES = 20
LETTERS = 22  # of a title's line that fit above an image
FILE_LETTERS = 18  # of a file name, whose capitals and digits are wider
MAX_CLASSES_WITH_NUMBERS = 30  # of a confusion matrix, whose numbers are readable up to here


class Sample(Protocol):
    """Some training images as the first epoch sees them: a NamedTuple of tensors."""

    @property
    def order(self) -> "torch.Tensor":
        """Indices of the images, int64 (N,)."""

    @property
    def flips(self) -> "torch.Tensor":
        """Whether each is mirrored, bool (N,)."""

    @property
    def shifts(self) -> "torch.Tensor":
        """By how many pixels each moves down and right, int64 (N, 2)."""

    def _replace(self, *args: Any, **fields: Any) -> Any: ...


def new_figure(rows: int, columns: int, width: float, height: float) -> "Figure":
    """An empty figure of rows × columns axes, each of width × height inches.

    It is made without pyplot, which would choose a window system.
    """
    from matplotlib.figure import Figure

    figure = Figure((width * columns, height * rows), dpi=110, layout="constrained")
    figure.subplots(rows, columns)
    return figure


def save_figure(figure: "Figure", path: Path) -> np.ndarray:
    """Write a figure as PNG and return its pixels, uint8 (H, W, 3).

    It is drawn only once; Figure.savefig would draw it again.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # class names in Chinese are drawn as boxes
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", dpi=(figure.dpi, figure.dpi))
    write_atomically(path, buffer.getvalue())
    return pixels


def draw_images(images: ArrayLike, titles: list[str], columns: int) -> "Figure":
    """Draw images in a grid, each below its title, of two lines or more.

    images: uint8 (N, 3, S, S), an array or a tensor on the CPU. They are put together into one
    image first, because matplotlib takes long to draw many.
    """
    images = np.asarray(images)
    # Enlarge small images: gaps and titles are placed to the pixel, which would be too coarse.
    factor = math.ceil(MIN_PIXELS / images.shape[-1])
    images = images.repeat(factor, 2).repeat(factor, 3)
    size = images.shape[-1]
    rows = math.ceil(len(images) / columns)

    # Put them into white cells, which leave space for a title above and a gap on the right.
    lines = max([2] + [title.count("\n") + 1 for title in titles])
    gap = round(0.09 * size)
    title_height = round(0.195 * lines * size)
    cell_width, cell_height = size + gap, title_height + size
    cells = np.full((rows, columns, 3, cell_height, cell_width), 255, np.uint8)
    for i, image in enumerate(images):
        cells[i // columns, i % columns, :, title_height:, :size] = image
    # to rows × pixels of a cell × columns × pixels of a cell × channels
    grid = cells.transpose(0, 3, 1, 4, 2).reshape(rows * cell_height, columns * cell_width, 3)

    figure = new_figure(1, 1, 1.25 * columns, (1.6 + 0.22 * (lines - 2)) * rows)
    (axes,) = figure.axes
    axes.imshow(grid)
    for i, title in enumerate(titles):
        row, column = divmod(i, columns)
        x = column * cell_width + size / 2 - 0.5
        y = row * cell_height + (1 - 0.24 / lines) * title_height - 0.5
        text = printable(title)
        axes.text(x, y, text, fontsize=_title_size(text), ha="center", parse_math=False)
    axes.axis("off")
    return figure


def _title_size(title: str) -> float:
    """Font size in points: 7, and less where a line has more letters than fit."""
    longest_line = max(len(line) for line in title.split("\n"))
    return 7 * LETTERS / max(LETTERS, longest_line)


def file_title(path: str) -> str:
    """The name of an image's file as a line of its title, shortened in the middle to fit."""
    return shorten(printable(Path(path).name), FILE_LETTERS)


def draw_samples(
    sample: Sample,
    gather: Callable[[Any], "torch.Tensor"],
    labels: "torch.Tensor",
    classes: list[str],
    augment: str | None,
) -> "Figure":
    """Draw training images in rows: as they are, after each step of --augment, and after all.

    Args:
        gather: picks, mirrors and shifts the images of a sample: uint8 (N, C, H, W).
        labels: int64, of all training images.
        augment: the setting of that name.

    The random state is left as it was, so that training goes on as if nothing had been drawn.
    """
    import torch

    from classifier.augmentations import build_augmentation

    sample_labels = labels[sample.order]
    augment = augment or "none"
    cuda_devices = [labels.device] if labels.device.type == "cuda" else []
    rows: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(cuda_devices):
        for step in ["none", *augment.split(",")]:
            name = step.partition("=")[0].strip()
            flip, max_shift, _ = parse_augment(step)
            flips = torch.full_like(sample.flips, flip)
            shifts = sample.shifts if max_shift else torch.zeros_like(sample.shifts)
            images = gather(sample._replace(flips=flips, shifts=shifts))
            augment_batch = build_augmentation(step, len(classes))
            rows[name], _ = augment_batch(images, sample_labels)
        images = gather(sample)
        augment_batch = build_augmentation(augment, len(classes))
        rows["augmented"], _ = augment_batch(images, sample_labels)

    titles = []
    for name in rows:
        for label in sample_labels.tolist():
            titles.append(classes[label] if name == "none" else name)
    all_images = torch.cat([images.clamp(0, 255).byte() for images in rows.values()])
    return draw_images(all_images.cpu(), titles, len(sample.order))


def draw_curves(history: list[Row]) -> "Figure":
    """Draw loss (left) and accuracy (right) of training and validation over the epochs."""
    figure = new_figure(1, 2, 5, 4)
    loss_axes, accuracy_axes = figure.axes
    _draw_curve(loss_axes, history, "loss", "cross-entropy", factor=1)
    _draw_curve(accuracy_axes, history, "accuracy", "%", factor=100)
    for axes in figure.axes:
        _mark_other_images(axes, history)
    return figure


def _mark_other_images(axes: "Axes", history: list[Row]) -> None:
    """Draw a line where the losses are of other images from there on: larger or harder ones."""
    images = [(row["image_scale"], row["train_share"]) for row in history]
    for epoch in range(1, len(images)):
        if images[epoch] != images[epoch - 1]:
            axes.axvline(epoch - 0.5, color="gray", linestyle=":", linewidth=1)


def _draw_curve(axes: "Axes", history: list[Row], metric: str, unit: str, factor: int) -> None:
    """Draw one metric of training and validation, times `factor`, over the epochs."""
    for name, prefix in (("training", "train"), ("validation", "valid")):
        values = []
        for row in history:
            value = row[f"{prefix}_{metric}"]
            values.append(math.nan if value is None else factor * value)
        axes.plot(values, marker=".", label=name)
    axes.set(title=metric.capitalize(), xlabel="epoch", ylabel=unit)
    axes.locator_params(axis="x", integer=True)
    if axes.dataLim.ymax > 100:  # a deep network's first validation losses may be in the millions
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_confusion_matrix(matrix: list[list[int]], classes: list[str]) -> "Figure":
    """Draw how many images of each class (rows) are recognised as which class (columns).

    matrix: a row for each class. From 31 classes on no numbers are written: they would be too small
    to read, and take long to draw.
    """
    has_numbers = len(classes) <= MAX_CLASSES_WITH_NUMBERS
    figure = new_figure(1, 1, max(6.5, 0.2 * len(classes)), max(6, 0.2 * len(classes)))
    (axes,) = figure.axes
    axes.imshow(matrix, cmap="Blues")
    axes.set(xlabel="Predicted label", ylabel="True label")
    names = [printable(name) for name in classes]
    rotation = 45 if has_numbers else "vertical"
    # a class may be called under_$10
    axes.set_xticks(range(len(classes)), names, rotation=rotation, parse_math=False)
    axes.set_yticks(range(len(classes)), names, parse_math=False)
    if has_numbers:
        half = max(map(max, matrix)) / 2
        for row, counts in enumerate(matrix):
            for column, count in enumerate(counts):
                color = "white" if count > half else "black"
                # not in the layout: to measure so many texts takes as long as to draw them
                axes.text(
                    column,
                    row,
                    str(count),
                    color=color,
                    ha="center",
                    va="center",
                    in_layout=False,
                )
    return figure


def draw_worst_mistakes(
    images: Any,
    labels: ArrayLike,
    predictions: ArrayLike,
    confidences: ArrayLike,
    classes: list[str],
    files: Sequence[str] | None = None,
) -> "Figure | None":
    """Draw up to 20 misclassified images, the most confident first; None if there is no mistake.

    Args:
        images: uint8 (N, 3, S, S): an array, a tensor, or what else gives such for a list of
            indices: the MemmapImages of a large folder, the DecodedFiles of --evaluate.
        labels, predictions: int64 (N,).
        confidences: float (N,), of the predictions.
        files: paths of the images, if they are files; their names are then in the picture.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    confidences = np.asarray(confidences)
    wrong = np.flatnonzero(predictions != labels)
    if not len(wrong):
        return None
    most_confident = (-confidences[wrong]).argsort(kind="stable")[:MAX_MISTAKES]
    worst = wrong[most_confident].tolist()
    titles = []
    for i in worst:
        label, prediction = classes[labels[i]], classes[predictions[i]]
        title = f"{label}, taken for\n{prediction} ({percent(confidences[i])})"
        titles.append(f"{file_title(files[i])}\n{title}" if files else title)
    return draw_images(images[worst], titles, 5)
