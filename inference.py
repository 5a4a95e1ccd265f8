"""Classify images with a trained model.

    python inference.py cat.jpg holiday/                      the likeliest classes of each image
    python inference.py holiday/ --format csv > holiday.csv
    python inference.py cat.jpg --save predictions.png        a picture of the images and their classes
    python inference.py --checkpoint model.onnx cat.jpg       where torch is not installed

From Python, too: `predict(load_model("model_cnn.pth"), ["cat.jpg"])`.
"""

import argparse
import csv
import functools
import glob
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import numpy as np
    from tqdm import tqdm

    from alternatives import datasets
except ImportError as problem:
    if __name__ != "__main__":
        raise
    mend = "pip install -r requirements.txt, or for ONNX: pip install onnxruntime pillow tqdm"
    sys.exit(f"error: {problem}: {'copy that folder too' if problem.name == 'alternatives' else mend}")

AT_ONCE = 250  # images in memory
SHOWN = 60  # images in one picture


class InferenceError(Exception):
    """Something that the user can mend; the message says how."""


@dataclass
class Classifier:
    """A trained network, ready to use, and what is known of it."""

    path: Path
    classes: list[str]
    image_size: int  # S, width and height in pixels
    temperature: float | None  # logits are divided by it: confidences are then about as often right as they say
    dataset: str
    test_accuracy: float | None  # [0, 1]
    logits: Callable[[np.ndarray], np.ndarray]  # of uint8 images (N, 3, S, S): float32 (N, classes), computed in fp32
    network: Any = None  # the nn.Module, on its device and in eval mode; an ONNX file has none,
    settings: dict[str, Any] = field(default_factory=dict)  # nor the Config of its training

    def about(self) -> str:
        """What one should know of its answers, in two sentences."""
        right = f" and recognises {100 * self.test_accuracy:.1f} % of its test images" if self.test_accuracy else ""
        sure = "" if self.temperature else " Its confidences are not calibrated."
        known = f"It knows {', '.join(self.classes)}; whatever else an image shows, it gets one of these."
        return f"{self.path.name} was trained on {self.dataset}{right}. {known}{sure}"


def newest_checkpoint(folder: Path | str = ".") -> Path:
    """The model file that was written last in the folder, else in runs/ there; InferenceError where there is none."""
    for pattern in ("model_*.pth", "runs/*/*/model_*.pth"):
        if found := list(Path(folder).glob(pattern)):
            newest = max(found, key=os.path.getmtime)
            if len(found) > 1:
                others = f"the newest of {len(found)} models; --checkpoint names another"
                print(f"note: {newest} is {others}", file=sys.stderr)
            return newest
    raise InferenceError(f"no model_*.pth in {Path(folder).resolve()}: train one, or name it with --checkpoint FILE")


def load_model(path: Path | str, device: Any = "auto", model: str = "") -> Classifier:
    """A model file (.pth or .onnx), or the newest .pth in a folder, loaded without executing anything in it.

    device: auto, cpu, cuda, cuda:N or mps; model: FILE.py:FACTORY, for a network of your own. Raises InferenceError.
    """
    path = newest_checkpoint(path) if Path(path).is_dir() else Path(path)
    if path.suffix.lower() == ".onnx":
        return load_onnx(path, str(device))
    try:
        import torch

        import image_classification as ic
    except ImportError as error:
        raise InferenceError(f"{path} needs PyTorch ({error}): pip install -r requirements.txt") from None
    try:
        network, content = ic.load_checkpoint(path, model)
        made_by, metrics = content["versions"], content["metrics"]
        if made_by.get("image_classification") == ic.__version__ and made_by.get("script") != ic.VERSIONS["script"]:
            remark("made by another image_classification.py: if its network differs, only that one reads it right")
        network.to(ic.choose_device(str(device)))
    except ic.UserError as error:
        raise InferenceError(str(error)) from None

    def logits(images: np.ndarray) -> np.ndarray:
        labels = torch.zeros(len(images), dtype=torch.int64)  # not known, and not used
        return ic.evaluate(network, torch.tensor(images), labels).logits.numpy()

    settings = {name: value for name, value in content["config"].items() if name in ic.KINDS}
    return Classifier(
        path, content["classes"], content["image_size"], metrics.get("temperature"),
        content.get("dataset", "some data"), metrics.get("test_accuracy"), logits, network,
        settings | ({"model": model} if model else {}),
    )  # fmt: skip


@functools.cache
def remark(text: str) -> None:
    """Say it once, however many models of a run are loaded."""
    print(f"note: {text}", file=sys.stderr)


def its_data_settings(model: Classifier, data_dir: str | None) -> tuple[dict[str, Any], bool]:
    """What defines its data set, of the settings of its training; whether that is a folder of images, not a name."""
    names = ["dataset", "data_dir", "val_fraction", "subset", "make_imbalanced"]  # a stranger's file decides no more
    own = {name: model.settings[name] for name in names if name in model.settings}
    found = {"dataset": "cifar10"} | own | {"image_size": model.image_size}
    folder = found["dataset"] not in ("cifar10", "digits", *datasets.NAMES)
    if data_dir:
        found["dataset" if folder else "data_dir"] = data_dir
    return found, folder


def at_hand(model: Classifier, data_dir: str | None = None) -> bool:
    """Is its data set on this machine, so that nothing has to be downloaded?"""
    settings, folder = its_data_settings(model, data_dir)
    if folder:
        return Path(settings["dataset"]).is_dir()
    names = {
        "cifar10": ["test_batch", "cifar-10-batches-py/test_batch"], "cifar100": ["cifar-100-python"],
        "mnist": ["MNIST"], "fashion-mnist": ["FashionMNIST"], "svhn": ["test_32x32.mat"], "stl10": ["stl10_binary"],
    }  # fmt: skip
    dataset, place = settings["dataset"], Path(settings.get("data_dir", "data"))
    return dataset == "digits" or any((place / name).exists() for name in names[dataset])


def load_its_data(model: Classifier, data_dir: str | None = None) -> Any:
    """The data set that a .pth was trained on: image_classification.Data. Raises InferenceError, ic.UserError.

    data_dir: where it is now, for a folder of images that folder itself.
    """
    import image_classification as ic

    settings, folder = its_data_settings(model, data_dir)
    dataset = settings["dataset"]
    if folder and not Path(dataset).is_dir():
        raise InferenceError(f"its images are no longer in {dataset}: name their folder with --data-dir DIR")
    data = ic.load_data(ic.Config(**settings))
    if data.classes != model.classes:
        raise InferenceError(f"{model.path} is for other classes than {data.name} has now")
    mean = model.network.get_buffer("pixel_mean").flatten().cpu() / 255
    changed = (mean - mean.new_tensor(data.mean)).abs().max() > 1e-6 and not model.settings.get("pretrained")
    if data.report and changed:
        print(f"note: the images in {dataset} are others than in training: some may have been trained on")
    return data


def load_onnx(path: Path, device: str) -> Classifier:
    """A file of export.py: all that is needed is in its metadata."""
    try:
        import onnxruntime
    except ImportError:
        raise InferenceError(f"{path} needs ONNX Runtime: pip install onnxruntime") from None
    path.stat()  # an OSError that names the file, unlike ONNX Runtime's own
    kind, _, number = device.partition(":")
    providers: list[Any] = ["CPUExecutionProvider"]
    if kind == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers = [("CUDAExecutionProvider", {"use_tf32": 0, "device_id": int(number or 0)})]  # as in load_model
    elif device not in ("auto", "cpu"):
        mend = "choose auto, cpu or, with onnxruntime-gpu, cuda"
        raise InferenceError(f"--device {device} cannot be had for ONNX: {mend}")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=providers)
        metadata = session.get_modelmeta().custom_metadata_map
        names = ["classes", "image_size", "temperature", "dataset", "test_accuracy"]
        about = {name: json.loads(metadata[name]) for name in names}
    except Exception as error:  # whatever a damaged file makes of ONNX Runtime
        raise InferenceError(f"{path} is damaged or was not written by export.py ({type(error).__name__})") from None

    def logits(images: np.ndarray) -> np.ndarray:
        parts = np.split(images, range(50, len(images), 50))
        return np.concatenate([session.run(["logits"], {"images": part.astype(np.float32) / 255})[0] for part in parts])

    return Classifier(path, logits=logits, **about)


def probabilities(model: Classifier, images: np.ndarray) -> np.ndarray:
    """Calibrated: of uint8 images (N, 3, S, S), float64 (N, classes), each row adding up to 1."""
    logits = model.logits(images).astype(np.float64) / (model.temperature or 1)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def ranked(model: Classifier, images: np.ndarray, top_k: int) -> list[list[tuple[str, float]]]:
    """Of each of the uint8 images (N, 3, S, S) the top_k likeliest classes with their probabilities, best first."""
    shares = probabilities(model, images)
    orders = (-shares).argsort(1, kind="stable")[:, :top_k]
    return [[(model.classes[i], float(share[i])) for i in order] for order, share in zip(orders, shares, strict=True)]


def read(model: Classifier, paths: Sequence[Path | str]) -> Iterator[list[tuple[Path | str, np.ndarray | str]]]:
    """In batches, each path with its image as the network wants it, uint8 (3, S, S), or with what is wrong with it."""

    def attempt(path: Path | str) -> np.ndarray | str:
        try:
            return datasets.decode(Path(path), model.image_size).pixels.transpose(2, 0, 1)
        except Exception as error:  # whatever a damaged file makes of Pillow
            known: dict[type, str] = {FileNotFoundError: "there is no such file", IsADirectoryError: "it is a folder"}
            return known.get(type(error), str(error) or type(error).__name__)

    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # each may be large
        warnings.simplefilter("ignore")  # of Pillow, about files that it reads nevertheless
        for start in range(0, len(paths), AT_ONCE):
            some = paths[start : start + AT_ONCE]
            yield list(zip(some, pool.map(attempt, some), strict=True))


def read_one(model: Classifier, path: Path | str) -> np.ndarray:
    """The image in a file as the network wants it, uint8 (3, S, S); InferenceError for a file that is none."""
    (((_, found),),) = read(model, [path])
    if isinstance(found, str):
        raise InferenceError(f"{path}: {found}")
    return found.copy()  # that can be written to, as torch asks for; Pillow's cannot


def predict(model: Classifier, images: Any, top_k: int = 3) -> list[list[tuple[str, float]]]:
    """Of each image the likeliest classes with their probabilities in [0, 1], best first.

    images: paths of image files, or uint8 (N, 3, S, S), S being model.image_size. Raises InferenceError for a file that
    is no image.
    """
    if isinstance(images, (str, Path)):
        images = [images]
    if not len(images):
        return []
    if isinstance(images[0], (str, Path)):
        images = np.stack([read_one(model, path) for path in images])
    return ranked(model, np.asarray(images), top_k)


def visualize_predictions(model: Classifier, path: Path | str, device: Any = None, top_k: int = 3) -> Any:
    """A matplotlib figure of an image as the network sees it and its likeliest classes; moves to `device` if given."""
    if device is not None and model.network:
        model.network.to(device)
    pixels = read_one(model, path)
    return draw([(str(path), pixels, ranked(model, pixels[None], top_k)[0])])


def draw(shown: list[tuple[str, np.ndarray, list[tuple[str, float]]]]) -> Any:
    """A figure of images, uint8 (3, S, S), under their names, each beside bars of its classes' probabilities."""
    from matplotlib.figure import Figure

    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.6 * columns, 1.8 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, squeeze=False).ravel()
    for each in axes:
        each.axis("off")
    for place, (name, pixels, classes) in enumerate(shown):
        image, bars = axes[2 * place : 2 * place + 2]
        image.imshow(pixels.transpose(1, 2, 0))
        image.set_title(Path(name).name[-28:], fontsize=8, parse_math=False)
        bars.barh(range(len(classes)), [share for _, share in classes], color=["#8fc1ea"] + ["#d5d5d5"] * len(classes))
        for row, (label, share) in enumerate(classes):
            bars.text(0.02, row, f"{label} {100 * share:.1f} %", va="center", fontsize=8, parse_math=False)
        bars.set(xlim=(0, 1), ylim=(max(2, len(classes)) - 0.4, -0.6))
    return figure


def expand(name: str | Path) -> list[Path]:
    """What a name or a pattern like *.jpg, which Windows leaves to the program, stands for; empty if nothing."""
    path = Path(os.path.expanduser(name))
    return [path] if path.exists() else [Path(each) for each in sorted(glob.glob(str(path)))]


def find(names: list[str]) -> tuple[list[Path], list[str]]:
    """All files that are meant, folders walked, and a line for each folder without images."""
    found: list[Path] = []
    problems, known = [], datasets.extensions()
    for name in names:
        path = Path(os.path.expanduser(name))
        if not path.is_dir():
            found += expand(name) or [path]
            continue
        # unlike a data set, a folder within that cannot be read is passed over: the others are still to be had
        inside = [each for each in sorted(path.rglob("*")) if each.is_file()]
        inside = [each for each in inside if not any(part[0] == "." for part in each.relative_to(path).parts)]
        images = [each for each in inside if each.suffix.lower() in known or datasets.is_image(each)]
        problems += [] if images else [f"{name}: no image in this folder"]
        found += images
    return found, problems


def parser(description: str | None, device: bool = True) -> argparse.ArgumentParser:
    """A parser with what all tools that use a trained model take."""
    common = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    newest = "the model file, or a folder with it (default: the newest model_*.pth)"
    common.add_argument("--checkpoint", default=".", metavar="FILE", help=newest)
    common.add_argument("--model", default="", metavar="FILE.py:FACTORY", help="the network, if it is one of your own")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if device:
        common.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    return common


def run(tool: Callable[[], int]) -> int:
    """Run a tool from the command line: its exit status, or one line about what is wrong."""
    for console in (sys.stdout, sys.stderr):
        if isinstance(console, io.TextIOWrapper):
            console.reconfigure(errors="replace", line_buffering=True)  # what it cannot show becomes a ?
    try:
        return tool()
    except KeyboardInterrupt:
        print("\nStopped", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        script = sys.modules.get("image_classification")
        text = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            text = f"no module named {error.name!r}: pip install -r requirements-extras.txt"
        elif isinstance(error, OSError):
            text = ": ".join(filter(None, [error.filename, error.strerror or text]))
        elif not isinstance(error, (InferenceError, *([script.UserError] if script else []))):
            text = f"{text[:500] or error!r} ({type(error).__name__}; --debug shows where)"
        print(f"error: {text}", file=sys.stderr)
        return 2 if script and isinstance(error, script.UsageError) else 1


def main() -> int:
    """Run as from the command line; returns the exit status: 1 if one of the images could not be classified."""
    arguments = parser(__doc__)
    arguments.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    arguments.add_argument("--top-k", type=int, default=3, metavar="N", help="classes to name (default: 3)")
    arguments.add_argument("--threshold", type=float, default=0.0, metavar="F", help="below it say unsure, [0, 1]")
    arguments.add_argument("--format", default="table", choices=["table", "csv", "json"], help="(default: table)")
    arguments.add_argument("--save", metavar="FILE.png", help=f"draw the first {SHOWN} images and their classes")
    options = arguments.parse_args()
    if options.top_k < 1:
        arguments.error(f"--top-k {options.top_k}: must be at least 1")
    if not 0 <= options.threshold <= 1:
        arguments.error(f"--threshold {options.threshold:g}: must be from 0 to 1, such as 0.9")
    model = load_model(options.checkpoint, options.device, options.model)
    to = sys.stdout if options.format == "table" else sys.stderr  # what is piped on is to be data only
    if options.format != "table" and isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # Windows would write what its console can show
    print(model.about(), file=to)
    paths, problems = find(options.images)
    rows: list[tuple[str, str, list[tuple[str, float]]]] = []
    shown: list[tuple[str, np.ndarray, list[tuple[str, float]]]] = []
    stopped = False
    try:
        with tqdm(desc="Classifying", total=len(paths), unit="img", leave=False, disable=None) as bar:
            for batch in read(model, paths):
                problems += [f"{path}: {image}" for path, image in batch if isinstance(image, str)]
                images = [(str(path), image) for path, image in batch if not isinstance(image, str)]
                found = ranked(model, np.stack([image for _, image in images]), options.top_k) if images else []
                for (name, image), classes in zip(images, found, strict=True):
                    sure = classes[0][1] >= options.threshold
                    rows.append((name, classes[0][0] if sure else "unsure", classes))
                    if len(shown) < SHOWN:
                        shown.append((name if sure else f"{name}: unsure", image, classes))
                bar.update(len(batch))
    except KeyboardInterrupt:
        stopped = True
    write(options.format, rows)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if options.save and shown:
        temporary = Path(f"{options.save}.{os.getpid()}.tmp")
        draw(shown).savefig(temporary, format="png", dpi=110)
        temporary.replace(options.save)
        print(f"Picture of {len(shown)} of {len(rows)} images: {options.save}", file=to)
    return 130 if stopped else int(bool(problems))


def write(kind: str, rows: list[tuple[str, str, list[tuple[str, float]]]]) -> None:
    """Print name, answer and classes of each image as a table, CSV or JSON."""
    if kind == "json":
        listed = []
        for name, answer, classes in rows:
            found = [{"class": label, "confidence": sure} for label, sure in classes]
            listed.append({"file": name, "answer": answer, "classes": found})
        print(json.dumps(listed, indent=1))
    elif kind == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        numbers = range(1, 1 + max([len(classes) for *_, classes in rows], default=0))
        writer.writerow(["file", "answer", *(f"{key}_{i}" for i in numbers for key in ("class", "confidence"))])
        for name, answer, classes in rows:
            writer.writerow([name, answer, *(value for label, sure in classes for value in (label, f"{sure:.6f}"))])
    else:
        width = max([len(name) for name, *_ in rows], default=0)
        for name, answer, classes in rows:
            cells = ", ".join(f"{label} {100 * sure:.1f} %" for label, sure in classes)
            print(f"{name:{width}}  {'unsure: ' if answer == 'unsure' else ''}{cells}")


if __name__ == "__main__":
    sys.exit(run(main))
