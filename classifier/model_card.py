"""A model card: what somebody who gets a model file should know about it.

Markdown, with the front matter in YAML that the Hugging Face Hub reads. All that it says is in the
model file. What the file does not say is left out, and what only the publisher can know is left to
be filled in. The file may be a stranger's: each value is checked, and each text escaped.
"""

import json
import math
from pathlib import Path
from typing import Any

from classifier import model_usage
from classifier.config import PATHS
from classifier.foreign_paths import without_folders
from classifier.markup import code_block, escape_markdown, table, yaml_lines
from classifier.result_output import FEW_TEST_IMAGES
from classifier.text import escape_control_characters, percent, pluralize, printable, shorten

CARD_FILE = "MODEL_CARD.md"
MAX_TEXT = 200  # characters of a text from the file
# Ids on the Hub of the data sets that come with the program, by the names that --dataset takes.
HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "svhn": "ufldl-stanford/svhn",
}
NOT_ON_HUB = ("digits", "stl10")
FOLDER_DATASET = "imagefolder"  # what the Hub calls a data set that is any folder of images
LIBRARIES = {".onnx": "onnx"}  # for other files: pytorch


def model_card(content: dict[str, Any], file: Path, raw: bool = False) -> str:
    """The text of a model card.

    Args:
        content: of the model file, as `read_checkpoint` returns it.
        file: what the model was exported to; only its name is used.
        raw: whether that takes photographs of any size.
    """
    results = _results(content)
    parts = [
        _front_matter(content, results, file),
        f"# {_text(file.stem)}",
        _introduction(content),
        _data_section(content, results),
        _results_section(results),
        _limits_section(content, results),
        _licence_section(content),
        model_usage.usage_section(content, file, raw),
        _training_section(content, results),
    ]
    return printable("\n\n".join(part for part in parts if part) + "\n")


# ---- Values from the file ------------------------------------------------------------------------


def _results(content: dict[str, Any]) -> dict[str, Any]:
    """What the file says of its test and training; of an older file that is little."""
    main_results = {"dataset": content.get("dataset")}
    for name in ("test_accuracy", "test_loss", "temperature"):
        main_results[name] = content["metrics"].get(name)
    report = content.get("report")
    return {**main_results, **report} if isinstance(report, dict) else main_results


def _number(value: Any) -> float | None:
    """A finite number of at least 0, or None for anything else."""
    is_number = type(value) in (int, float) and 0 <= value < math.inf
    return float(value) if is_number else None


def _share(value: Any) -> float | None:
    """A number in [0, 1], or None for anything else."""
    number = _number(value)
    return None if number is None or number > 1 else number


def _count(value: Any) -> int | None:
    """A whole number of at least 0, or None for anything else."""
    return value if type(value) is int and value >= 0 else None


def _interval(value: Any) -> tuple[float, float] | None:
    """Two numbers in [0, 1], or None for anything else."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = _share(value[0]), _share(value[1])
    return None if low is None or high is None else (low, high)


def _dictionary(value: Any) -> dict[Any, Any]:
    """A dictionary; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """A text in one line, escaped for Markdown; empty for anything that is no text."""
    if not isinstance(value, str):
        return ""
    one_line = escape_control_characters(" ".join(value.split()))
    return escape_markdown(shorten(one_line, MAX_TEXT))


def _test_images(results: dict[str, Any]) -> int | None:
    """The number of test images, if it is known."""
    counts = [_count(value) for value in _dictionary(results.get("class_images")).values()]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


# ---- The parts of the card -----------------------------------------------------------------------


def _front_matter(content: dict[str, Any], results: dict[str, Any], file: Path) -> str:
    """The metadata that the Hub reads; figures only if the file has any."""
    dataset = results["dataset"] if isinstance(results["dataset"], str) else ""
    hub_dataset = _hub_dataset(content["config"].get("dataset"), dataset)
    suffix = file.suffix.lower()
    metadata: dict[str, Any] = {
        "license": "unknown",
        "library_name": LIBRARIES.get(suffix, "pytorch"),
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", suffix.removeprefix(".")],
    }
    if hub_dataset in HUB_DATASETS.values():
        metadata["datasets"] = [hub_dataset]
    metrics = []
    known = [("accuracy", "Accuracy", "test_accuracy"), ("f1", "Macro-F1", "macro_f1")]
    for kind, name, key in known:
        value = _share(results.get(key))
        if value is not None:
            metrics.append({"type": kind, "value": value, "name": name})
    if metrics and dataset:
        metadata["metrics"] = [metric["type"] for metric in metrics]
        result = {
            "task": {"type": "image-classification", "name": "Image classification"},
            "dataset": {"type": hub_dataset, "name": dataset, "split": "test"},
            "metrics": metrics,
        }
        metadata["model-index"] = [{"name": file.stem, "results": [result]}]
    return "\n".join(["---", *yaml_lines(metadata), "---"])


def _hub_dataset(source: Any, dataset: str) -> str:
    """What the Hub calls a data set: one of its ids, or a word for any other.

    source: the setting --dataset: only that tells a folder that is called CIFAR10 from CIFAR-10.
    dataset: its name.
    """
    if source == "auto":
        source = "cifar10" if dataset == "CIFAR10" else "digits"
    if source in HUB_DATASETS:
        return HUB_DATASETS[source]
    return source if source in NOT_ON_HUB else FOLDER_DATASET


def _introduction(content: dict[str, Any]) -> str:
    classes = [escape_markdown(name) for name in content["classes"]]
    network = _text(without_folders(content["config"]).get("model"))
    parts = [f"An image classifier. Its network is {network}." if network else ""]
    parts += [f"## {len(classes)} classes", ", ".join(classes)]
    return "\n\n".join(part for part in parts if part)


def _data_section(content: dict[str, Any], results: dict[str, Any]) -> str:
    """What the network was trained, validated and tested on, and what its images look like."""
    lines = []
    dataset = _text(results["dataset"])
    if dataset:
        lines.append(f"Data set: {dataset}.")
    if _text(results.get("data_digest")):
        lines.append(
            f"Digest of its images, their labels and their split: {_text(results['data_digest'])}."
        )
    if _text(results.get("substituted_for")):
        lines.append(f"It was used because {_text(results['substituted_for'])} was not available.")
    size = content["image_size"]
    square, _ = model_usage.FITS[model_usage.fit_of(content)]
    mean = ", ".join(f"{value:.4f}" for value in content["mean"])
    std = ", ".join(f"{value:.4f}" for value in content["std"])
    images = (
        f"Of each image the network sees {square.format(size=size)}. It takes values in [0, 1] and "
        f"normalises them itself, with mean ({mean}) and "
        f"standard deviation ({std}) of the channels."
    )
    counts = {
        "training": _count(content.get("train_images")),
        "validation": _count(results.get("valid_images")),
        "test": _test_images(results),
    }
    rows = [[name, str(count)] for name, count in counts.items() if count is not None]
    counted = table(["part", "images"], rows) if rows else ""
    parts = ["## Data", " ".join(lines), counted, images]
    return "\n\n".join(part for part in parts if part)


def _results_section(results: dict[str, Any]) -> str:
    """The figures of the test; empty if none is known."""
    rows = _figures(results)
    if not rows:
        return ""
    count = _test_images(results)
    tested = "the test images" if count is None else pluralize(count, "test image")
    parts = [
        "## Results",
        f"On {tested}, which were used once, after training:",
        table(["figure", "value"], rows),
        _class_table(results),
    ]
    return "\n\n".join(part for part in parts if part)


def _figures(results: dict[str, Any]) -> list[list[str]]:
    """A row for each figure that is known."""
    rows = []
    accuracy = _share(results.get("test_accuracy"))
    if accuracy is not None:
        value = f"{100 * accuracy:.2f} %"
        interval = _interval(results.get("test_accuracy_interval"))
        if interval is not None:
            value += f" (95 % interval {100 * interval[0]:.1f} to {percent(interval[1])}, Wilson)"
        rows.append(["accuracy", value])
    views = _count(results.get("test_views"))
    with_views = _share(results.get("test_views_accuracy"))
    if views is not None and with_views is not None:
        name = f"accuracy with {views} views of the least certain images"
        rows.append([name, f"{100 * with_views:.2f} %"])
    shares = {
        "top-5 accuracy": "top5_accuracy",
        "macro-F1": "macro_f1",
        "expected calibration error": "calibration_error",
        "the same before temperature scaling": "calibration_error_before",
    }
    for name, key in shares.items():
        share = _share(results.get(key))
        if share is not None:
            rows.append([name, percent(share)])
    loss = _number(results.get("test_loss"))
    if loss is not None:
        rows.append(["cross-entropy", f"{loss:.4f}"])
    return rows


def _class_table(results: dict[str, Any]) -> str:
    """A table of the classes; empty if their figures are not known."""
    by_class = _dictionary(results.get("class_accuracy"))
    counts = _dictionary(results.get("class_images"))
    rows = []
    for name, accuracy in by_class.items():
        count = _count(counts.get(name))
        values = [accuracy]
        values += [_dictionary(results.get(key)).get(name) for key in ("precision", "f1")]
        shares = [_share(value) for value in values]
        cells = ["-" if share is None else percent(share) for share in shares]
        rows.append([_text(name), "-" if count is None else str(count), *cells])
    header = ["class", "test images", "accuracy (recall)", "precision", "F1"]
    return table(header, rows) if rows else ""


def _limits_section(content: dict[str, Any], results: dict[str, Any]) -> str:
    """What follows from the file about what the model is good for."""
    lines = [
        "*Who should use this model for what, and who should not: to be filled in by its "
        "publisher.* What holds in any case:",
        "",
    ]
    if content.get("ood_score"):
        lines.append(
            "- An image that is very unlike the training images is called unknown by the program "
            "that trained it, and so are some ordinary ones; other programs have to compare the "
            "output `ood_score` of the ONNX file with `ood_threshold` in its metadata. An image of "
            "something else may still get one of the classes."
        )
    else:
        lines.append("- It answers with one of its classes, whatever an image shows.")
    if _share(results.get("test_accuracy")) is None:
        lines.append("- The model file names no results of a test.")
    else:
        lines.append("- The figures above are for images like those of the data set.")
    if _interval(results.get("test_accuracy_interval")) is not None:
        lines.append(
            "- The interval covers chance in the choice of the test images, not in the training."
        )
    temperature = _number(results.get("temperature"))
    if temperature:
        lines.append(
            f"- Confidences are calibrated, on the validation images, if the logits are divided by "
            f"the temperature {temperature:.4f}."
        )
    else:
        lines.append("- Its confidences are not calibrated.")
    few = []
    for name, value in _dictionary(results.get("class_images")).items():
        count = _count(value)
        if count is not None and count < FEW_TEST_IMAGES:
            few.append(_text(name))
    if few:
        lines.append(
            f"- Of these classes there were fewer than {FEW_TEST_IMAGES} test images, so that "
            f"their figures say little: {', '.join(few)}."
        )
    if content.get("pixel_ranges"):
        lines.append(
            "- Images with more than 8 bits a pixel are scaled as `pixel_ranges` in the file's "
            "metadata says. The example for ONNX Runtime below does not do that."
        )
    if content["config"].get("fast_dev_run"):
        lines.append("- It is of a trial run on one batch, and of no use.")
    return "\n".join(["## Intended use and limits", "", *lines])


def _licence_section(content: dict[str, Any]) -> str:
    settings = content["config"]
    started_from = "the data set"
    if settings.get("pretrained") or settings.get("init_from"):
        started_from += " and of the weights that the training started from"
    return (
        "## Licence\n\nThe licence of the weights is their publisher's to choose: replace "
        "`unknown` in the line `license` at the top of this file. The licences of "
        f"{started_from} may limit that choice."
    )


def _training_section(content: dict[str, Any], results: dict[str, Any]) -> str:
    """How long it was trained, on what, with which settings and which versions."""
    rows = []
    epochs, seconds = _count(results.get("epochs")), _number(results.get("seconds"))
    best = _count(content["metrics"].get("epoch"))
    if epochs is not None:
        weights = "" if best is None else f", of which number {best} was kept, counted from 0"
        rows.append(["epochs", f"{epochs}{weights}"])
    if seconds is not None:
        rows.append(["time", f"{seconds / 60:.1f} minutes"])
    rows.append(["device", _text(results.get("hardware"))])
    rows.append(["commit of the program", _text(results.get("commit"))])
    names = {"image_classification": "version of the program", "python": "Python", "torch": "torch"}
    for key, name in names.items():
        rows.append([name, _text(content["versions"].get(key))])
    rows.append(["platform", _text(content["versions"].get("platform"))])
    rows = [row for row in rows if row[1]]

    settings = without_folders(content["config"])
    parts = ["## Training"]
    if settings.get("init_from"):
        parts.append(f"It started from the weights in {_text(settings['init_from'])}.")
    elif settings.get("pretrained"):
        parts.append("It started from pretrained weights that others have published.")
    if rows:
        parts.append(table(["", ""], rows))
    shown = {}
    for name, value in settings.items():
        if name not in PATHS and value not in (None, ""):
            shown[name] = value
    parts += ["Settings:", code_block(json.dumps(shown, indent=2), "json")]
    return "\n\n".join(parts)
