"""Predictions as they are drawn and printed. Imports no torch: an ONNX file runs without it."""

import csv
import io
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from classifier.errors import UsageError
from classifier.files import write_atomically
from classifier.rejection import UNKNOWN
from classifier.text import escape_control_characters, percent, printable

if TYPE_CHECKING:  # matplotlib is slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNSURE = "unsure"  # the answer where the confidence is below --threshold
SAVE_FORMATS = ["png", "jpg", "jpeg", "webp", "tif", "tiff", "pdf", "svg"]  # of --save


class TopClasses(list[tuple[str, float]]):
    """Classes with their confidence in [0, 1], the likeliest first.

    Attributes:
        unlikeness: the share of validation images that are less unlike the training images than
            this one, in [0, 1]; None where the model file does not tell.
        is_unknown: whether that is so high that the image is called unknown.
    """

    unlikeness: float | None = None
    is_unknown: bool = False

    def describe_unlikeness(self) -> str:
        """How unlike the training images an unknown image is."""
        assert self.unlikeness is not None  # nothing else makes an image unknown
        return f"less usual than {percent(self.unlikeness)} of ordinary images"

    def list_confidences(self, count: int | None = None) -> str:
        """The first classes, by default all, with their confidence: cat 99.6 %, car 0.3 %."""
        return ", ".join(f"{name} {percent(confidence)}" for name, confidence in self[:count])


# ---- Pictures ------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """An image to draw.

    Attributes:
        title: its name.
        pixels: uint8 (3, S, S).
        classes: its likeliest classes.
    """

    title: str
    pixels: np.ndarray
    classes: TopClasses


def draw_predictions(pictures: Sequence[Picture]) -> "Figure":
    """A figure of images below their titles, each with a bar for each of its likeliest classes."""
    from matplotlib.figure import Figure

    columns = min(3, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(3.6 * columns, 1.8 * rows), layout="constrained")
    all_axes = figure.subplots(rows, 2 * columns, squeeze=False).ravel()
    for axes in all_axes:
        axes.axis("off")
    for i, picture in enumerate(pictures):
        image_axes, bar_axes = all_axes[2 * i : 2 * i + 2]
        image_axes.imshow(picture.pixels.transpose(1, 2, 0))
        image_axes.set_title(printable(picture.title)[-28:], fontsize=8, parse_math=False)
        _draw_bars(bar_axes, picture.classes)
    return figure


def _draw_bars(axes: "Axes", classes: TopClasses) -> None:
    """Draw a bar for the confidence of each class; that of the answer in blue."""
    confidences = [confidence for _, confidence in classes]
    colors = ["#d5d5d5"] * len(classes)
    if not classes.is_unknown:
        colors[0] = "#8fc1ea"
    axes.barh(range(len(classes)), confidences, color=colors)
    for row, (name, confidence) in enumerate(classes):
        text = f"{name} {percent(confidence)}"
        axes.text(0.02, row, text, va="center", fontsize=8, parse_math=False)
    axes.set(xlim=(0, 1), ylim=(max(2, len(classes)) - 0.4, -0.6))


def save_pictures(pictures: Sequence[Picture], path: Path) -> None:
    """Draw images and their classes into a file, in the format that its extension names."""
    buffer = io.BytesIO()
    figure = draw_predictions(pictures)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names in Chinese are drawn as boxes
        figure.savefig(buffer, format=save_format(path), dpi=110)
    write_atomically(path, buffer.getvalue())


def save_format(path: Path) -> str:
    """The format of --save, one of SAVE_FORMATS; UsageError for another extension."""
    extension = path.suffix.lower().removeprefix(".")
    if extension not in SAVE_FORMATS:
        listed = ", ".join(f".{name}" for name in SAVE_FORMATS)
        raise UsageError(f"--save {path}: the name has to end in one of {listed}")
    return extension


# ---- Tables --------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What is printed of an image.

    Attributes:
        file: its path.
        answer: the likeliest class, UNSURE, or UNKNOWN.
        classes: the likeliest classes.
    """

    file: str
    answer: str
    classes: TopClasses


def print_predictions(format: str, predictions: Sequence[Prediction]) -> None:
    """Print file, answer and likeliest classes of each image as table, csv or json."""
    if format == "json":
        print_json(predictions)
    elif format == "csv":
        print_csv(predictions)
    else:
        print_table(predictions)


def print_json(predictions: Sequence[Prediction]) -> None:
    entries = []
    for file, answer, classes in predictions:
        listed = [{"class": name, "confidence": confidence} for name, confidence in classes]
        entry: dict[str, Any] = {"file": file, "answer": answer, "classes": listed}
        if classes.unlikeness is not None:
            entry["unlikeness"] = classes.unlikeness
        entries.append(entry)
    print(json.dumps(entries, indent=1))


def print_csv(predictions: Sequence[Prediction]) -> None:
    num_classes = max((len(prediction.classes) for prediction in predictions), default=0)
    header = ["file", "answer"]
    for number in range(1, num_classes + 1):
        header += [f"class_{number}", f"confidence_{number}"]
    is_scored = any(classes.unlikeness is not None for _, _, classes in predictions)
    if is_scored:
        header.append("unlikeness")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(header)
    for file, answer, classes in predictions:
        row = [file, answer]
        for name, confidence in classes:
            row += [name, f"{confidence:.6f}"]
        if is_scored and classes.unlikeness is not None:
            row += [""] * (len(header) - 1 - len(row))
            row.append(f"{classes.unlikeness:.6f}")
        writer.writerow(row)


def print_table(predictions: Sequence[Prediction]) -> None:
    names = [escape_control_characters(prediction.file) for prediction in predictions]
    width = max(map(len, names), default=0)
    for name, (_, answer, classes) in zip(names, predictions, strict=True):
        listed = classes.list_confidences()
        if answer == UNSURE:
            listed = f"{UNSURE}: {listed}"
        if classes.is_unknown:
            listed = f"{UNKNOWN} ({classes.describe_unlikeness()}): {listed}"
        print(f"{name:{width}}  {listed}")
