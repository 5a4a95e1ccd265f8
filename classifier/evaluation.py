"""How well a model recognises new images, in folders named after their classes.

This is `inference.py --evaluate`. Imports no torch: an ONNX file is tested without it.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from classifier import metrics, plots, rejection, result_output
from classifier.datasets import decode, identity, unreadable
from classifier.datasets.folder_layout import class_name, images_and_others, loose_images
from classifier.datasets.walk import fail, subfolders
from classifier.errors import UserError
from classifier.files import write_csv, write_json
from classifier.text import closest_name, escape_control_characters, pluralize, printable

if TYPE_CHECKING:  # torch may not be installed
    import torch

MAX_NAMES = 50  # of classes that a message lists


class Model(Protocol):
    """What is needed of a model: see `Classifier` in inference.py."""

    path: Path
    classes: list[str]
    temperature: float | None
    reject: float
    seen_digests: "torch.Tensor | None"

    def score(
        self, images: np.ndarray | list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray | None]: ...


class ImageFile(Protocol):
    """An image file, decoded: see the class of that name in inference.py."""

    @property
    def path(self) -> Path | str: ...

    @property
    def pixels(self) -> np.ndarray | None: ...

    @property
    def problem(self) -> str: ...

    @property
    def note(self) -> str: ...

    @property
    def whole(self) -> np.ndarray | None: ...


Read = Callable[[Sequence[Path]], Iterator[Sequence[ImageFile]]]  # paths to batches of images


class LabelledFiles(NamedTuple):
    """The images in a folder of class folders.

    Attributes:
        folder: the folder.
        paths: of the images of classes that the model knows.
        labels: int64 (N,), of these images.
        unknown: number of images in each folder that has not the name of a class of the model.
        missing: classes of the model without an image in the folder.
        loose: names of images that lie in the folder itself, and so have no label.
        problems: a line for each image of a known class whose format is not read.
    """

    folder: Path
    paths: list[Path]
    labels: np.ndarray
    unknown: dict[str, int]
    missing: list[str]
    loose: list[str]
    problems: list[str]


class Tested(NamedTuple):
    """The images that could be read, and what the network answers.

    Attributes:
        paths: of the images.
        labels: int64 (N,).
        logits: float32 (N, classes).
        unlikeness: float64 (N,), how unlike the training images each image is, see `rejection`;
            None where the model file does not tell.
        digests: of the content of the files, int64 (N,), as in `seen_images`.
        unreadable: path and reason of each image that could not be read.
        notes: a line for each image whose values are not in the range of the training images.
    """

    paths: list[Path]
    labels: np.ndarray
    logits: np.ndarray
    unlikeness: np.ndarray | None
    digests: np.ndarray
    unreadable: dict[str, str]
    notes: list[str]


class DecodedFiles:
    """Image files that are decoded when they are asked for."""

    def __init__(self, paths: Sequence[Path], read: Read):
        self.paths = paths
        self.read = read

    def __getitem__(self, indices: Sequence[int]) -> np.ndarray:
        """The images at these indices, uint8 (N, 3, S, S)."""
        pixels = []
        for batch in self.read([self.paths[index] for index in indices]):
            for file in batch:
                if file.pixels is None:
                    raise UserError(f"{file.path}: {file.problem}, but it could be read before")
                pixels.append(file.pixels)
        return np.stack(pixels)


# ---- The images ----------------------------------------------------------------------------------


def find_files(folder: Path, classes: list[str]) -> LabelledFiles:
    """The images in the folders within a folder, labelled by the names of these.

    classes: of the model. Raises UserError if no folder has the name of a class, or no such folder
    has an image, and OSError for a folder that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"--evaluate {folder}: there is no such folder")
    images: dict[str, list[Path]] = {}  # of each class, by the names of the folders
    others: list[Path] = []  # files in folders of known classes that are no images
    for class_folder in subfolders(folder):
        name = class_name(class_folder)
        found, no_images = images_and_others(class_folder, folder, on_error=fail)
        images.setdefault(name, []).extend(found)
        if name in classes:
            others += no_images

    if not any(name in classes for name in images):
        raise _no_known_class(folder, list(images), classes)
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        of_class = images.get(name, [])
        paths += of_class
        labels += [label] * len(of_class)
    problems = unreadable.describe_images(others)
    if not paths:
        raise UserError("; ".join([f"{folder}: no image of a class of the model", *problems[:3]]))
    return LabelledFiles(
        folder=folder,
        paths=paths,
        labels=np.array(labels, np.int64),
        unknown={name: len(found) for name, found in images.items() if name not in classes},
        missing=[name for name in classes if not images.get(name)],
        loose=loose_images(folder),
        problems=problems,
    )


def _no_known_class(folder: Path, names: list[str], classes: list[str]) -> UserError:
    """The error that no folder has the name of a class.

    It names the folder that was perhaps meant: test/ within this one, for example.
    """
    found = f"its folders are {_list_names(names)}" if names else "it has no folders"
    message = (
        f"no folder in {folder} has the name of a class: {found}; the model knows "
        f"{_list_names(classes)}"
    )
    for inner in subfolders(folder):
        if any(class_name(path) in classes for path in subfolders(inner)):
            return UserError(f"{message}: did you mean {inner}?")
    return UserError(message)


def _list_names(names: Sequence[str]) -> str:
    """Names of classes in a line; of many the first ones, and how many there are more."""
    listed = ", ".join(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        listed += f" and {len(names) - MAX_NAMES} more"
    return escape_control_characters(listed)


def note_left_out(files: LabelledFiles, model: Model) -> None:
    """Print which images are not tested, and which classes have none."""
    if files.unknown:
        names = []
        for name, count in files.unknown.items():
            similar = closest_name(name, model.classes)
            question = "" if similar is None else f", is it {similar}?"
            names.append(f"{name} ({pluralize(count, 'image')}{question})")
        _note(f"left out, because {model.path} does not know the class: {_list_names(names)}")
    if files.missing:
        _note(f"no image in {files.folder} of the class: {_list_names(files.missing)}")
    if files.loose:
        images = f"{pluralize(len(files.loose), 'image')}, such as {files.loose[0]}"
        _note(f"left out, because in {files.folder} itself, and so without a class: {images}")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


# ---- The test ------------------------------------------------------------------------------------


def run_model(files: LabelledFiles, read: Read, model: Model) -> Tested:
    """Decode the images and compute their logits. Raises UserError if none can be read."""
    label_of = dict(zip(files.paths, files.labels.tolist(), strict=True))
    paths: list[Path] = []
    digests: list[int] = []
    logits: list[np.ndarray] = []
    unlikeness: list[np.ndarray] = []
    reasons: dict[str, str] = {}
    notes: list[str] = []
    with tqdm(
        desc="Testing", total=len(files.paths), unit="img", leave=False, disable=None
    ) as progress_bar:
        for batch in read(files.paths):
            readable = []
            for file in batch:
                path = Path(file.path)
                if file.pixels is None:
                    reasons[str(path)] = file.problem
                    continue
                readable.append(file)
                paths.append(path)
                digests.append(decode.hash64(path.read_bytes()))
                if file.note:
                    notes.append(f"{path}: {file.note}")
            if readable:
                of_batch, unlikeness_of_batch = model.score(network_input(readable))
                logits.append(of_batch)
                if unlikeness_of_batch is not None:
                    unlikeness.append(unlikeness_of_batch)
            progress_bar.update(len(batch))
    if not paths:
        summary = unreadable.summarize(reasons.values())
        raise UserError(f"{files.folder}: no image of a class can be read: {summary}")
    return Tested(
        paths=paths,
        labels=np.array([label_of[path] for path in paths], np.int64),
        logits=np.concatenate(logits),
        unlikeness=np.concatenate(unlikeness) if unlikeness else None,
        digests=np.array(digests, np.uint64).astype(np.int64),
        unreadable=reasons,
        notes=notes,
    )


def network_input(files: Sequence[ImageFile]) -> np.ndarray | list[np.ndarray]:
    """What a model takes of decoded files: the squares, uint8 (N, 3, S, S), or whole images."""
    whole = [file.whole for file in files if file.whole is not None]
    if whole:
        return whole
    return np.stack([file.pixels for file in files if file.pixels is not None])


def find_seen(tested: Tested, model: Model) -> np.ndarray | None:
    """Whether the model was trained on the same file, bool (N,); None if that is not known."""
    if model.seen_digests is None:
        return None
    return np.isin(tested.digests, model.seen_digests.numpy())


# ---- The results ---------------------------------------------------------------------------------


def report(files: LabelledFiles, tested: Tested, read: Read, model: Model, out: Path) -> None:
    """Print the results, and write them into the folder `out`, which exists."""
    results = metrics.classification_metrics(
        tested.logits, tested.labels, model.classes, model.temperature
    )
    results |= rejection.rejection_metrics(
        tested.logits, tested.labels, tested.unlikeness, model.reject
    )
    result_output.print_accuracy(results, f"images in {files.folder}")
    result_output.print_classes(results)
    seen = find_seen(tested, model)
    _note_seen(seen, model)

    names = [path.relative_to(files.folder).as_posix() for path in tested.paths]
    digests = identity.digest_files(tested.digests.tolist())
    labels = [model.classes[label] for label in tested.labels]
    results |= {
        "test_digest": identity.digest_all(digests, labels),
        "model": printable(str(model.path)),
        "folder": printable(str(files.folder)),
        "images": len(names),
        "seen_images": None if seen is None else int(seen.sum()),
        "unknown_classes": files.unknown,
        "missing_classes": files.missing,
        "unreadable": tested.unreadable,
    }
    _write_predictions(out / "predictions.csv", tested, names, digests, seen, model)
    try:
        _draw_pictures(out, tested, names, read, results["confusion_matrix"], model)
    except ModuleNotFoundError as error:
        _note(f"no pictures are drawn, because {error.name} is not installed")
    write_json(out / "evaluation.json", results)
    print(f"Everything else: {out}")


def _note_seen(seen: np.ndarray | None, model: Model) -> None:
    """Print how many of the images the model was trained on, or that this is not known."""
    if seen is None:
        _note(f"{model.path} does not say whether it was trained on any of these images")
    elif seen.any():
        _note(
            f"{model.path} was trained on {int(seen.sum())} of these {len(seen)} images: "
            "the accuracy on these looks better than it is"
        )


def _write_predictions(
    path: Path,
    tested: Tested,
    names: list[str],
    digests: list[str],
    seen: np.ndarray | None,
    model: Model,
) -> None:
    """Write a row for each image, with the columns of test_predictions.csv and `seen`.

    seen: see find_seen; the column is empty where that is not known.
    """
    confidences, predictions = metrics.predict(tested.logits, model.temperature)
    seen_words = [""] * len(names)
    if seen is not None:
        seen_words = ["yes" if each else "no" for each in seen]
    columns: dict[str, Sequence[Any]] = {
        "label": [model.classes[label] for label in tested.labels],
        "prediction": [model.classes[prediction] for prediction in predictions],
        "confidence": confidences.tolist(),
        "image": names,
        "digest": digests,
        "seen": seen_words,
    }
    if tested.unlikeness is not None:
        columns["unlikeness"] = tested.unlikeness.tolist()
    write_csv(path, [list(columns), *zip(*columns.values(), strict=True)])


def _draw_pictures(
    out: Path,
    tested: Tested,
    names: list[str],
    read: Read,
    matrix: list[list[int]],
    model: Model,
) -> None:
    """Draw the confusion matrix and the worst mistakes, if there are any, into a folder."""
    mistakes_file = out / "worst_mistakes.png"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(mistakes_file)  # of an earlier evaluation
    figure = plots.draw_confusion_matrix(matrix, model.classes)
    plots.save_figure(figure, out / "confusion_matrix.png")
    confidences, predictions = metrics.predict(tested.logits, model.temperature)
    images = DecodedFiles(tested.paths, read)
    mistakes = plots.draw_worst_mistakes(
        images, tested.labels, predictions, confidences, model.classes, names
    )
    if mistakes is not None:
        plots.save_figure(mistakes, mistakes_file)
