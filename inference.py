"""Classify images with a trained model.

    python inference.py cat.jpg holiday/                     the likeliest classes of each image
    python inference.py holiday/ --format csv > holiday.csv
    python inference.py cat.jpg --save predictions.png       draw the images and their classes
    python inference.py --checkpoint model.onnx cat.jpg      where torch is not installed
    python inference.py labelled/ --evaluate                 test it on a folder of class folders

The answer is unknown for an image that is too unlike the training images: see --reject.

From Python: `predict(load_model("model_cnn.pth"), ["cat.jpg"])`.
"""

import argparse
import contextlib
import functools
import glob
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if __name__ == "__main__":  # PYTHONSAFEPATH and python -P leave out the folder of this file
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

try:
    import numpy as np
    from tqdm import tqdm

    from classifier import evaluation, rejection
    from classifier.cli import (
        command_line,
        end_process,
        prepare_data_output,
        run_tool,
        tool_parser,
    )
    from classifier.config import FITS, Config
    from classifier.datasets import decode, pixel_range, unreadable
    from classifier.datasets.folder_layout import images_and_others
    from classifier.errors import UsageError, UserError
    from classifier.files import prepare_file, prepare_folder
    from classifier.image_input import check_batch, check_photographs, to_batch
    from classifier.metrics import softmax
    from classifier.prediction_output import (
        UNSURE,
        Picture,
        Prediction,
        TopClasses,
        draw_predictions,
        print_predictions,
        save_format,
        save_pictures,
    )
    from classifier.text import (
        URL_REFUSED,
        escape_control_characters,
        has_control_characters,
        is_url,
        percent,
        pluralize,
        shorten,
    )
except (ImportError, OSError) as error:  # OSError: a library that cannot be loaded
    if __name__ != "__main__":
        raise
    sys.exit(
        f"error: {error}: pip install -r requirements.txt (for ONNX files alone: pip install "
        "onnxruntime pillow tqdm), and keep classifier/ beside this file"
    )
except KeyboardInterrupt:
    sys.exit(130)

if TYPE_CHECKING:  # torch and matplotlib may not be installed
    import torch
    from matplotlib.figure import Figure
    from torch import nn

    from classifier.datasets.dataset import Dataset
    from classifier.ood_score import OodScore

BATCH_SIZE = 250  # images in memory at once
ONNX_BATCH_SIZE = 50
RAW_BATCH_SIZE = 8  # photographs in memory at once, where a model takes them whole
OUT = Path("evaluated")  # default of --out
MAX_PICTURES = 60  # images that --save draws
ONNX_METADATA = ["classes", "image_size", "temperature", "dataset", "test_accuracy"]


# ---- Models --------------------------------------------------------------------------------------


@dataclass
class Classifier:
    """A trained network, ready to use, and what is known about it.

    Attributes:
        path: the model file.
        classes: names of the classes, in the order of the logits.
        image_size: S, width and height of its images in pixels.
        temperature: logits are divided by it, so that the confidence fits the accuracy; None if it
            was not fitted.
        dataset: name of the data set that it was trained on.
        test_accuracy: in [0, 1]; None if it was not tested.
        compute_logits: what `logits` calls.
        network: on its device and in eval mode; None for an ONNX file.
        ood_score: of its file, see `classifier/ood_score.py`; None for an ONNX file.
        settings: the Config of its training; empty for an ONNX file.
        compute_scores: what `score` calls: logits and float (N,), how unlike the training images
            each image is; None for a model without that.
        quantiles: of these scores on validation images, see `rejection`; None without scores.
        reject: the share of ordinary images whose answer may be unknown; 0: there is always one.
        pixel_ranges: of the values of images with more than 8 bits a pixel, as in training.
        seen_digests: int64, of the images that it was trained on, see `seen_images`; None if that
            is not known.
        fingerprint: of the training images, see `Dataset.fingerprint`; None if it is not known.
        split_rules: by which the training images were chosen: see `dataset.SPLIT_RULES`.
        fit: how images become squares: see `fitting.to_square`.
        is_raw: whether it is an ONNX file that takes photographs of any size.

    Raises UserError for values that no model can have.
    """

    path: Path
    classes: list[str]
    image_size: int
    temperature: float | None
    dataset: str
    test_accuracy: float | None
    compute_logits: Callable[[Any], np.ndarray]
    network: "nn.Module | None" = None
    ood_score: "OodScore | None" = None
    settings: dict[str, Any] = field(default_factory=dict)
    compute_scores: Callable[[Any], tuple[np.ndarray, np.ndarray]] | None = None
    quantiles: list[float] | None = None
    reject: float = rejection.DEFAULT_REJECT
    pixel_ranges: pixel_range.Ranges = field(default_factory=dict)
    seen_digests: "torch.Tensor | None" = None
    fingerprint: Any = None
    split_rules: int = 1
    fit: str = Config.fit
    is_raw: bool = False

    def __post_init__(self) -> None:
        names = [self.dataset, *self.classes] if isinstance(self.classes, list) else []
        is_sound = (
            len(names) > 1
            and all(isinstance(name, str) and not has_control_characters(name) for name in names)
            and type(self.image_size) is int
            and self.image_size > 0
            and (self.temperature is None or _is_number(self.temperature, above=0))
            and (self.test_accuracy is None or _is_number(self.test_accuracy, above=-1e-9))
            and self.fit in FITS
        )
        if not is_sound:
            raise UserError(f"{self.path} is damaged or was not written by this program")

    def logits(self, images: np.ndarray | list[np.ndarray]) -> np.ndarray:
        """Logits of images, float32 (N, classes), computed in fp32.

        images: uint8 (N, 3, S, S), or where `is_raw` a list of uint8 (3, H, W) of any size. Raises
        TypeError or ValueError for anything else.
        """
        self._check_images(images)
        return self.compute_logits(images)

    def _check_images(self, images: np.ndarray | list[np.ndarray]) -> None:
        """Raise TypeError or ValueError for images that `logits` does not take."""
        if self.is_raw and isinstance(images, list):
            check_photographs(images)
        else:
            check_batch(images, self.image_size)

    def score(self, images: np.ndarray | list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits, as `logits` gives them, and how unlike the training images each image is.

        The latter is the share of validation images that are less unlike them, float64 (N,), or
        None where the model file does not tell. images: see `logits`.
        """
        self._check_images(images)
        if self.compute_scores is None or self.quantiles is None:
            return self.compute_logits(images), None
        logits, scores = self.compute_scores(images)
        return logits, rejection.unlikeness(scores, self.quantiles)

    def describe(self) -> str:
        """What to know about its predictions, in two or three sentences."""
        file_name = escape_control_characters(self.path.name)
        text = f"{file_name} was trained on {self.dataset}"
        if self.test_accuracy is not None:
            text += f" and recognises {percent(self.test_accuracy)} of its test images"
        classes = ", ".join(self.classes)
        text += f". It knows {classes}; "
        if self.quantiles is None or self.reject == 0:
            text += "whatever else an image shows, it gets one of these."
        else:
            text += (
                "an image that is very unlike its training images is called unknown, as are "
                f"{percent(self.reject)} of ordinary ones."
            )
        if self.temperature is None:
            text += " Its confidences are not calibrated."
        return text

    def require_network(self) -> "nn.Module":
        """The network; raises UserError for an ONNX file."""
        if self.network is None:
            raise UserError(f"{self.path}: an ONNX file is not enough here, name the .pth file")
        return self.network


def _is_number(value: Any, above: float) -> bool:
    """Whether this is a finite number above `above`."""
    return type(value) in (int, float) and above < value < math.inf


def newest_checkpoint(folder: Path | str = ".") -> Path:
    """The newest model file in the folder, else in runs/ there; those of trial runs do not count.

    Raises UserError if there is none.
    """
    trials: list[Path] = []
    for pattern in ("model_*.pth", "runs/*/*/model_*.pth"):
        found = sorted(Path(folder).glob(pattern), key=os.path.getmtime, reverse=True)
        for path in found:
            if is_of_trial_run(path):
                trials.append(path)
                continue
            if trials:
                print_note(f"{trials[0]} is of a trial run, and so left out")
            if path != found[-1]:
                print_note(f"{path} is the newest of several models; --checkpoint names another")
            return path
    where = Path(folder).resolve()
    others = f" but {pluralize(len(trials), 'model')} of trial runs" if trials else ""
    raise UserError(f"no model_*.pth in {where}{others}: train one, or name it: --checkpoint FILE")


def is_of_trial_run(path: Path) -> bool:
    """Whether a model file was written by --fast-dev-run, after a step or two.

    False for a file that cannot be read: load_model says why.
    """
    try:
        from classifier.checkpoints import read_checkpoint

        return bool(read_checkpoint(path)["config"].get("fast_dev_run"))
    except (ImportError, OSError, UserError):
        return False


def print_note(text: str) -> None:
    """Print a note on standard error. A name in it may be a stranger's."""
    print(f"note: {escape_control_characters(text)}", file=sys.stderr)


def print_problems(problems: Sequence[str]) -> None:
    """Print a line on standard error for each file that could not be used."""
    for problem in problems:
        print(f"error: {escape_control_characters(problem)}", file=sys.stderr)


def load_model(
    path: Path | str,
    device: "torch.device | str" = "auto",
    model: str = "",
    reject: float | None = None,
) -> Classifier:
    """Load a model file, executing nothing in it.

    Args:
        path: a .pth, .safetensors or .onnx file, or a folder, whose newest .pth is taken.
        device: auto, cpu, cuda, cuda:N or mps.
        model: FILE.py:FACTORY of a custom network.
        reject: the share of ordinary images whose answer may be unknown, in [0, 1); 0: there is
            always an answer. None: 0.05 where the model file tells how unlike its training images
            an image is.

    Raises UserError, and OSError for a file that cannot be opened; ValueError for another `reject`.
    """
    if is_url(str(path)):
        raise UserError(f"{path}: {URL_REFUSED}")
    if reject is not None:
        rejection.check_reject(reject)
    path = Path(path)
    if path.is_dir():
        path = newest_checkpoint(path)
    if path.suffix.lower() == ".pt2":
        raise UserError(f"{path} is for torch.export.load: name the .pth that it was made from")
    if path.suffix.lower() == ".onnx":
        loaded = load_onnx(path, str(device))
    else:
        loaded = load_pth(path, str(device), model)
    if reject is None:
        return loaded
    if reject > 0 and loaded.quantiles is None:
        raise UserError(
            f"--reject {reject:g}: {path} does not tell how unlike its training images an image "
            "is, as older and 8-bit files do not: train it anew, or leave out --reject"
        )
    return replace(loaded, reject=reject)


def load_pth(path: Path, device: str, model: str) -> Classifier:
    """Load a .pth or .safetensors file: see load_model."""
    try:
        import torch

        import image_classification as ic
        from classifier import ood_score
        from classifier.config import FIELD_TYPES
        from classifier.devices import choose_device
        from classifier.seen_images import digests_in_file
    except ImportError as error:
        message = f"{path} needs PyTorch ({error}): pip install -r requirements.txt"
        raise UserError(message) from None
    try:
        network, content = ic.load_checkpoint(path, model)
    except UsageError as error:  # a setting in the file, not the usage of this tool
        raise UserError(str(error)) from None
    num_channels = len(content["mean"])
    if num_channels != 3:
        raise UserError(f"{path} is for images of {num_channels} channels, not for RGB")
    network.to(choose_device(device))
    warn_about_changed_script(content["versions"], ic.VERSIONS)

    try:
        score = ood_score.in_file(content, network)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {shorten(str(error), 80)}") from None

    def compute_logits(images: np.ndarray) -> np.ndarray:
        no_labels = torch.zeros(len(images), dtype=torch.int64)
        return ic.evaluate(network, torch.tensor(images), no_labels).logits.numpy()

    def compute_scores(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with ood_score.recorded(network, score) as scores:
            logits = compute_logits(images)
        return logits, torch.cat(scores.values).cpu().numpy()

    settings = {name: value for name, value in content["config"].items() if name in FIELD_TYPES}
    if model:
        settings["model"] = model
    metrics = content["metrics"]
    split_rules = content.get("split_rules")  # version 0.9 names none
    return Classifier(
        path=path,
        classes=content["classes"],
        image_size=content["image_size"],
        temperature=metrics.get("temperature"),
        dataset=content.get("dataset", "some data"),
        test_accuracy=metrics.get("test_accuracy"),
        compute_logits=compute_logits,
        network=network,
        settings=settings,
        compute_scores=None if score is None else compute_scores,
        quantiles=None if score is None else score.quantiles,
        ood_score=score,
        pixel_ranges=read_pixel_ranges(content.get("pixel_ranges"), path),
        seen_digests=digests_in_file(content),
        fingerprint=content.get("fingerprint"),
        split_rules=split_rules if type(split_rules) is int else 1,
        fit=settings.get("fit", Config.fit),
    )


def read_pixel_ranges(content: Any, path: Path) -> pixel_range.Ranges:
    """The ranges of pixel values in a model file. Raises UserError if they are none.

    content: what the file says of them; None: nothing.
    """
    try:
        return pixel_range.from_json(content)
    except (TypeError, ValueError, OverflowError):
        shown = shorten(repr(content), 80)
        raise UserError(f"{path} is damaged: {shown} are no ranges of pixel values") from None


def warn_about_changed_script(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Print a note if a model was made by this version of the program, but by a changed script.

    saved, current: versions as in a model file.
    """
    same_version = saved.get("image_classification") == current["image_classification"]
    if same_version and saved.get("script") != current["script"]:
        print_note_once(
            "this model was made by another image_classification.py: if the networks differ, its "
            "predictions are right only there"
        )


@functools.cache
def print_note_once(text: str) -> None:
    """Print a note, however many models of a run are loaded."""
    print_note(text)


def load_onnx(path: Path, device: str) -> Classifier:
    """Load a file that export.py wrote, with what its metadata tell about it: see load_model."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path} needs ONNX Runtime: pip install onnxruntime") from None
    providers = onnx_providers(device, onnxruntime.get_available_providers())
    # not the path: ONNX Runtime takes none that is not UTF-8, and without it reads no other files
    content = path.read_bytes()
    try:
        session = onnxruntime.InferenceSession(content, providers=providers)
        metadata = session.get_modelmeta().custom_metadata_map
        known = {name: json.loads(metadata[name]) for name in ONNX_METADATA}
        ranges = json.loads(metadata.get("pixel_ranges", "null"))
        fit = json.loads(metadata.get("fit", json.dumps(Config.fit)))
        is_raw = json.loads(metadata.get("raw", "false")) is True
        quantiles = json.loads(metadata.get("ood_quantiles", "null"))
        input_name = "image" if is_raw else "images"
        outputs = {"logits"}
        if quantiles is not None:
            quantiles = rejection.read_quantiles(quantiles)
            outputs.add("ood_score")
        check_onnx_names(session, input_name, outputs)
        num_classes = len(known["classes"])
    except MemoryError:
        raise
    except Exception as error:  # ONNX Runtime may raise anything for a damaged file
        kind = type(error).__name__
        raise UserError(f"{path} is damaged or was not written by export.py ({kind})") from None

    def inputs(images: Any) -> Iterator[dict[str, np.ndarray]]:
        if is_raw:  # one by one
            for image in images:
                yield {input_name: np.ascontiguousarray(image.transpose(1, 2, 0))}
            return
        for start in range(0, len(images), ONNX_BATCH_SIZE):
            yield {input_name: images[start : start + ONNX_BATCH_SIZE].astype(np.float32) / 255}

    def compute(images: Any, names: list[str]) -> list[np.ndarray]:
        outputs = [session.run(names, batch) for batch in inputs(images)]
        return [np.concatenate(output) for output in zip(*outputs, strict=True)]

    def compute_logits(images: Any) -> np.ndarray:
        (logits,) = compute(images, ["logits"])
        check_shape(logits, (len(images), num_classes))
        return logits

    def compute_scores(images: Any) -> tuple[np.ndarray, np.ndarray]:
        logits, scores = compute(images, ["logits", "ood_score"])
        check_shape(logits, (len(images), num_classes))
        check_shape(scores, (len(images),))
        return logits, scores

    def check_shape(output: np.ndarray, expected: tuple[int, ...]) -> None:
        if output.shape != expected:
            raise UserError(
                f"{path} is damaged: its network has an output of shape {output.shape}, where "
                f"{expected[0]} images of {num_classes} classes have {expected}"
            )

    return Classifier(
        path=path,
        compute_logits=compute_logits,
        compute_scores=None if quantiles is None else compute_scores,
        quantiles=quantiles,
        pixel_ranges=read_pixel_ranges(ranges, path),
        fit=fit,
        is_raw=is_raw,
        **known,
    )


def check_onnx_names(session: Any, input_name: str, outputs: set[str]) -> None:
    """Raise ValueError unless a network has this input, no other one, and these outputs."""
    found_inputs = [found.name for found in session.get_inputs()]
    found_outputs = {found.name for found in session.get_outputs()}
    if found_inputs != [input_name] or not outputs <= found_outputs:
        raise ValueError("another network's inputs or outputs")


def onnx_providers(device: str, available: list[str]) -> list[Any]:
    """What ONNX Runtime computes with on a device.

    available: the providers that it has here. Raises UserError for a device that it lacks.
    """
    kind, _, index = device.partition(":")
    is_number = index.isdecimal() or device == "cuda"
    if kind == "cuda" and is_number and "CUDAExecutionProvider" in available:
        options = {"use_tf32": 0, "device_id": int(index or 0)}  # fp32, as with torch
        return [("CUDAExecutionProvider", options)]
    if device in ("auto", "cpu"):
        return ["CPUExecutionProvider"]
    raise UserError(
        f"--device {device} is not available for ONNX files: choose auto, cpu or, with "
        "onnxruntime-gpu, cuda"
    )


# ---- The data set of a model ---------------------------------------------------------------------


def dataset_available(model: Classifier, data_dir: str | None = None) -> bool:
    """True if the model's data set is on this machine, so that nothing has to be downloaded.

    data_dir: see load_dataset_of.
    """
    from classifier.datasets import load

    return load.dataset_available(model.settings, model.image_size, data_dir)


def load_dataset_of(
    model: Classifier, data_dir: str | None = None, may_download: bool = True
) -> "Dataset":
    """Load the data set that a .pth was trained on.

    A folder that only the model file names, perhaps a stranger's, is used if it exists and holds
    the images of the training; nothing is downloaded there, and nothing is read from it that has
    other classes. Prints a note if images of a folder that are now for testing or validation were
    trained on. Raises UserError.

    data_dir: where the data set is now; of a folder of images, that folder itself.
    """
    from classifier.datasets import load

    source = load.find_source(model.settings, model.image_size, data_dir)
    dataset = source.settings["dataset"]
    if source.is_folder and not load.dataset_available(model.settings, model.image_size, data_dir):
        place = dataset
        if "labels" in source.settings:
            place = f"{dataset}, or their labels not in {source.settings['labels']},"
        raise UserError(
            f"the images that {model.path} was trained on are not in {place} on this machine: name "
            "their folder with --data-dir DIR"
        )
    if source.is_named_by_file:
        may_download = False
    other_classes = UserError(f"{model.path} is for other classes than {dataset} has now")
    # reading a whole folder takes long, and only its classes tell before whether that is in vain
    if source.is_folder and not load.may_have_classes(source, model.classes):
        raise other_classes
    try:
        data = load.load_data(
            Config(**source.settings), may_download=may_download, order=model.classes
        )
    except UsageError as error:  # a setting in the file, not the usage of this tool
        raise UserError(str(error)) from None
    if data.classes != model.classes:
        raise other_classes
    if source.is_named_by_file and not has_images_of_training(model, data):
        place = dataset if source.is_folder else source.settings["data_dir"]
        advice = command_line(["--data-dir", place])
        raise UserError(f"{describe_doubt(model, data, place)}: add {advice} to use them")
    if source.is_folder:
        note_seen_images(model, data)
        note_other_ranges(model, data)
    return data


def describe_doubt(model: Classifier, data: "Dataset", place: str) -> str:
    """Why the images in a place are not known to be those that the model was trained on.

    A trial run has seen the first of them only, and other versions may have chosen others of the
    same images to train on: then they may well be the same.
    """
    from classifier.datasets import dataset

    unknown = f"whether {model.path} was trained on the images in {place} is not known"
    if model.settings.get("fast_dev_run"):
        return f"{unknown}, because a trial run sees only the first of them"
    if data.drawn and model.split_rules != dataset.SPLIT_RULES:
        drawn = " and ".join(data.drawn)
        return f"{unknown}, because that version chose the images for {drawn} in another way"
    if has_images_of_training(model, data) is None:
        return f"{unknown}, because the file does not say"
    return f"the images in {place} are not those that {model.path} was trained on"


def note_other_ranges(model: Classifier, data: "Dataset") -> None:
    """Print a note if the images' range of values is not that of the training any more."""
    if data.pixel_ranges != model.pixel_ranges:
        now = pixel_range.describe_ranges(data.pixel_ranges)
        then = pixel_range.describe_ranges(model.pixel_ranges)
        print(
            f"note: values of pixels are taken as {now}, because of the images in the folder now, "
            f"but {model.path} gives {then}: results for them will differ"
        )


def note_seen_images(model: Classifier, data: "Dataset") -> None:
    """Print a note if the model was, or may have been, trained on images that are now held out."""
    from classifier import seen_images

    if model.seen_digests is not None:
        seen_images.note_seen(model.path, data, model.seen_digests)
    elif has_images_of_training(model, data) is False:
        print(
            f"note: {model.path} does not say what it was trained on, and the images to train on "
            "are others now: it may have been trained on some that are now for testing"
        )


def has_images_of_training(model: Classifier, data: "Dataset") -> bool | None:
    """Whether a data set has the images that the model was trained on.

    None if that is not known: version 0.9 kept only the images' mean, and not for a network with
    ImageNet's.
    """
    from classifier.datasets import load

    if model.fingerprint is not None:
        return load.is_same(data, model.fingerprint)
    if model.settings.get("pretrained"):
        return None
    mean = model.require_network().get_buffer("pixel_mean").flatten().cpu() / 255
    distances = (mean - mean.new_tensor(data.mean)).abs()
    return bool(distances.max() <= 1e-6)


# ---- Predictions ---------------------------------------------------------------------------------


def predict(model: Classifier, images: Any, top_k: int = 3) -> list[TopClasses]:
    """The top_k likeliest classes of each image with their confidence in [0, 1], the best first.

    Each list has two attributes: `unlikeness`, the share of validation images that are less unlike
    the training images, in [0, 1], or None where the model file does not tell; and `is_unknown`,
    whether it is so high that the answer is unknown (see `load_model`).

    Args:
        images: a path, a PIL image, a uint8 array (H, W, 3) or (H, W), a uint8 tensor (3, H, W),
            or a list of these. Also a batch in uint8: (N, 3, H, W), or an array (N, H, W, 3). Each
            image becomes a square as in training.
        top_k: at least 1.

    Returns a list for each image, also where there is only one. Raises UserError for a file that is
    not an image, TypeError and ValueError for anything else that is none.
    """
    if not isinstance(model, Classifier):
        raise TypeError(f"predict needs what load_model returns, not a {type(model).__name__}")
    if top_k < 1:
        raise ValueError(f"top_k has to be at least 1, not {top_k}")
    batch = to_batch(
        images,
        model.image_size,
        lambda path: read_image(model, path),
        model.pixel_ranges,
        model.fit,
    )
    return top_classes(model, batch, top_k) if len(batch) else []


def top_classes(
    model: Classifier, images: np.ndarray | list[np.ndarray], top_k: int
) -> list[TopClasses]:
    """As predict, for images in memory: see `Classifier.logits`."""
    logits, unlikeness = model.score(images)
    result = []
    for i, confidences in enumerate(softmax(logits, model.temperature)):
        best_first = (-confidences).argsort(kind="stable")[:top_k]
        top = TopClasses((model.classes[label], float(confidences[label])) for label in best_first)
        if unlikeness is not None:
            top.unlikeness = float(unlikeness[i])
            top.is_unknown = bool(rejection.is_unknown(unlikeness[i], model.reject))
        result.append(top)
    return result


# ---- Image files ---------------------------------------------------------------------------------


class ImageFile(NamedTuple):
    """An image file, decoded for a network.

    Attributes:
        path: the file.
        pixels: uint8 (3, S, S), or None if the file cannot be read.
        problem: why it cannot be read; empty if it can.
        note: what its values have that those of the training images had not; may be empty.
        whole: for a model that takes photographs of any size, uint8 (3, H, W); otherwise None.
    """

    path: Path | str
    pixels: np.ndarray | None
    problem: str = ""
    note: str = ""
    whole: np.ndarray | None = None


def read_file(
    path: Path | str,
    image_size: int,
    ranges: pixel_range.Ranges | None = None,
    fit: str = Config.fit,
    keep_whole: bool = False,
) -> ImageFile:
    """Decode a file to a square of image_size × image_size pixels.

    ranges: of the values of images with more than 8 bits a pixel. fit: how it becomes a square.
    keep_whole: whether the image is wanted as it was before that, too.
    """
    whole = None
    try:
        decoded = decode.decode(Path(path), image_size, ranges, fit)
        if keep_whole:
            whole = decode.decode_rgb(Path(path), image_size, ranges).transpose(2, 0, 1)
    except FileNotFoundError:
        return ImageFile(path, None, "there is no such file")
    except IsADirectoryError:
        return ImageFile(path, None, "it is a folder")
    except Exception as error:  # Pillow may raise anything for a damaged file
        return ImageFile(path, None, unreadable.reason(Path(path), error))
    note = ""
    if decoded.extrema is not None and decoded.used_range is not None:
        is_known = decoded.extrema.kind in (ranges or {})
        note = pixel_range.describe_misfit(decoded.extrema, decoded.used_range, is_known)
    return ImageFile(path, decoded.pixels.transpose(2, 0, 1), note=note, whole=whole)


def read_image(model: Classifier, path: Path | str) -> np.ndarray:
    """The image in a file, uint8 (3, S, S). Raises UserError for a file that is not an image."""
    if is_url(str(path)):
        raise UserError(f"{path}: {URL_REFUSED}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about files that it reads nevertheless
        file = read_file(path, model.image_size, model.pixel_ranges, model.fit)
    if file.pixels is None:
        raise UserError(f"{path}: {file.problem}")
    if file.note:
        print_note(f"{path}: {file.note}")
    return file.pixels.copy()  # Pillow's array is read-only, which torch warns about


def read_in_batches(paths: Sequence[Path], model: Classifier) -> Iterator[list[ImageFile]]:
    """Decode files for a model, in several threads, a batch at a time."""
    num_threads = min(8, os.cpu_count() or 1)  # few, as each image may be large
    batch_size = RAW_BATCH_SIZE if model.is_raw else BATCH_SIZE
    read = functools.partial(
        read_file,
        image_size=model.image_size,
        ranges=model.pixel_ranges,
        fit=model.fit,
        keep_whole=model.is_raw,
    )
    with warnings.catch_warnings(), ThreadPoolExecutor(num_threads) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about files that it reads nevertheless
        for start in range(0, len(paths), batch_size):
            yield list(pool.map(read, paths[start : start + batch_size]))


def find_images(names: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files that names, patterns and folders stand for.

    Returns their paths, and a line for each URL, each folder without images and each image in a
    folder whose format is not read. A file that does not exist is among the paths.
    """
    found: list[Path] = []
    problems = []
    for name in names:
        if is_url(name):
            problems.append(f"{name}: {URL_REFUSED}")
            continue
        for path in expand(name) or [Path(os.path.expanduser(name))]:
            if not os.path.isdir(path):
                found.append(path)
                continue
            images, others = images_and_others(path, path)  # what cannot be read is skipped
            problems += unreadable.describe_images(others)
            if not images:
                problems.append(f"{path}: no image in this folder")
            found += images
    return found, problems


def expand(name: str | Path) -> list[Path]:
    """The paths that a name or a pattern like *.jpg stands for; none if there is no such file.

    Windows leaves patterns to the program.
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # False for a name that no file can have, where Path.exists may raise
        return [path]
    return [Path(match) for match in sorted(glob.glob(str(path)))]


# ---- Pictures ------------------------------------------------------------------------------------


def visualize_predictions(
    model: Classifier,
    path: Path | str,
    device: "torch.device | str | None" = None,
    top_k: int = 3,
) -> "Figure":
    """A matplotlib figure of an image, as the network sees it, and its likeliest classes.

    device: if given, the network is moved there.
    """
    if device is not None and model.network is not None:
        model.network.to(device)
    pixels = read_image(model, path)
    (classes,) = top_classes(model, pixels[None], top_k)
    return draw_predictions([Picture(Path(path).name, pixels, classes)])


# ---- The command line ----------------------------------------------------------------------------


@dataclass
class Results:
    """What became of the files so far.

    Attributes:
        predictions: of the images that could be read.
        pictures: the first MAX_PICTURES of these images.
        problems: a line for each name that stands for no readable image.
        notes: a line for each image whose values are not in the range of the training images.
    """

    predictions: list[Prediction] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def classify_files(
    model: Classifier, paths: Sequence[Path], top_k: int, threshold: float, results: Results
) -> None:
    """Classify files and add what becomes of them to the results."""
    batches = read_in_batches(paths, model)
    with tqdm(
        desc="Classifying", total=len(paths), unit="img", leave=False, disable=None
    ) as progress_bar:
        for batch in batches:
            classify_batch(model, batch, top_k, threshold, results)
            progress_bar.update(len(batch))


def classify_batch(
    model: Classifier, batch: list[ImageFile], top_k: int, threshold: float, results: Results
) -> None:
    """Classify the files of a batch together: see classify_files."""
    names, images, readable = [], [], []
    for file in batch:
        if file.pixels is None:
            results.problems.append(f"{file.path}: {file.problem}")
        else:
            names.append(str(file.path))
            images.append(file.pixels)
            readable.append(file)
            if file.note:
                results.notes.append(f"{file.path}: {file.note}")
    if not images:
        return
    predicted = top_classes(model, evaluation.network_input(readable), top_k)
    for name, pixels, classes in zip(names, images, predicted, strict=True):
        prediction, confidence = classes[0]
        answer, title = prediction, Path(name).name
        if classes.is_unknown:
            answer = rejection.UNKNOWN
        elif confidence < threshold:
            answer = UNSURE
        if answer != prediction:
            title += f": {answer}"
        results.predictions.append(Prediction(name, answer, classes))
        if len(results.pictures) < MAX_PICTURES:
            results.pictures.append(Picture(title, pixels, classes))


def evaluate_folder(model: Classifier, folder: Path, out: Path) -> int:
    """Test a model on a folder of class folders; returns the exit status, as `main` does.

    Prints the results and writes them into the folder `out`.
    """
    files = evaluation.find_files(folder, model.classes)
    prepare_folder(out)
    print(model.describe())
    evaluation.note_left_out(files, model)
    read = functools.partial(read_in_batches, model=model)
    tested = evaluation.run_model(files, read, model)
    evaluation.report(files, tested, read, model, out)
    for note in tested.notes:
        print_note(note)
    problems = [f"{path}: {reason}" for path, reason in tested.unreadable.items()]
    problems += files.problems
    print_problems(problems)
    return 1 if problems else 0


def parse_options() -> argparse.Namespace:
    """The options of this process; ends it with status 2 if they are wrong."""
    parser = tool_parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders")
    parser.add_argument(
        "--top-k", type=int, default=3, metavar="N", help="number of classes (default: 3)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        metavar="F",
        help="confidence below which the answer is unsure, in [0, 1] (default: 0)",
    )
    parser.add_argument(
        "--reject",
        type=rejection.parse_reject,
        metavar="F",
        help="share of ordinary images that may be called unknown, in [0, 1), so that images that "
        "show none of the classes are; 0: none is (default: 0.05, if the model file tells how "
        "unlike its training images an image is)",
    )
    parser.add_argument(
        "--format", default="table", choices=["table", "csv", "json"], help="(default: table)"
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help=f"draw the first {MAX_PICTURES} images and their classes, as .png, .jpg, .pdf or .svg",
    )
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="test the model on a folder of class folders, named after the classes of the model",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder for the results of --evaluate (default: {OUT})",
    )
    options = parser.parse_args()
    check_evaluation(parser, options)
    if options.save:
        save_format(options.save)
    if options.top_k < 1:
        parser.error(f"--top-k {options.top_k}: must be at least 1")
    if not 0 <= options.threshold <= 1:
        parser.error(f"--threshold {options.threshold:g}: must be from 0 to 1, such as 0.9")
    return options


def check_evaluation(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End this process with status 2 if an option is given that --evaluate excludes or needs."""
    if not options.evaluate:
        if options.out is not None:
            parser.error("--out: only with --evaluate")
        return
    if len(options.images) != 1:
        parser.error("--evaluate: name one folder, with a folder for each class in it")
    if is_url(options.images[0]):
        parser.error(f"--evaluate {options.images[0]}: {URL_REFUSED}")
    for name in ("top_k", "threshold", "format", "save"):
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')}: not with --evaluate")


def prepare_output(format: str) -> TextIO:
    """Prepare standard output for this format; returns the stream for everything but the data."""
    if format == "table":
        return sys.stdout
    prepare_data_output()
    return sys.stderr


def main() -> int:
    """Run as from the command line; returns the exit status, 1 if a file could not be read."""
    options = parse_options()
    messages = prepare_output(options.format)
    with contextlib.redirect_stdout(messages):  # which device it is, for example
        model = load_model(options.checkpoint, options.device, options.model, options.reject)
    if options.evaluate:
        folder = Path(os.path.expanduser(options.images[0]))
        return evaluate_folder(model, folder, options.out or OUT)
    if options.save:
        prepare_file(options.save)
    print(model.describe(), file=messages)

    paths, problems = find_images(options.images)
    results = Results(problems=problems)
    stopped = False
    try:
        classify_files(model, paths, options.top_k, options.threshold, results)
    except KeyboardInterrupt:  # print what was classified so far
        stopped = True

    print_predictions(options.format, results.predictions)
    for note in results.notes:
        print_note(note)
    print_problems(results.problems)
    if options.save and results.pictures:
        save_pictures(results.pictures, options.save)
        num_drawn, num_images = len(results.pictures), len(results.predictions)
        print(f"Picture of {num_drawn} of {num_images} images: {options.save}", file=messages)
    if stopped:
        return 130
    return 1 if results.problems else 0


if __name__ == "__main__":
    end_process(run_tool(main))
