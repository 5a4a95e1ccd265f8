"""What a run reports: the closing lines, report.json, its pictures, and the finished model."""

import contextlib
import glob
import hashlib
import pkgutil
import platform
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from classifier import __version__, metrics, plots, result_output, runs
from classifier.checkpoints import save_checkpoint
from classifier.cli import command_line, program
from classifier.config import Config, is_custom_model, is_library_model
from classifier.datasets import identity
from classifier.datasets.dataset import Dataset
from classifier.devices import hardware_name
from classifier.files import write_atomically, write_csv, write_into_new_folder
from classifier.progress import Row
from classifier.run_log import RunLog
from classifier.runs import Run
from classifier.text import percent
from classifier.train_state import TrainState

COMMIT_FILE = "COMMIT"  # in the package within a .pyz: see bundle.py
OVERFITTING_GAP = 0.1  # between training and validation accuracy, from which a hint is printed


@dataclass
class Report:
    """The results of a run.

    Attributes:
        results: content of report.json; shares are in [0, 1].
        history: a row for each epoch.
        run: the run folder.
        checkpoint: the model file.
    """

    results: dict[str, Any]
    history: list[Row]
    run: Path
    checkpoint: Path


def source_of(spec: Any, loader: Any, path: str) -> str | None:
    """The text of a module, also within a .pyz; None if there is none.

    spec, loader, path: its __spec__ (None for a main program), __loader__ and __file__.
    """
    if hasattr(loader, "get_source"):
        return loader.get_source(spec.name if spec else "__main__")
    with contextlib.suppress(OSError):  # a profiler or debugger runs it, without a loader
        return Path(path).read_text(encoding="utf-8")
    return None


def versions(script_source: str | None) -> dict[str, Any]:
    """Versions of the program, the script and the software it runs on, for files and --version.

    script_source: text of the script, of whose SHA-256 the first 12 digits are kept.
    """
    script_hash = None
    if script_source is not None:
        script_hash = hashlib.sha256(script_source.encode()).hexdigest()[:12]
    return {
        "image_classification": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "script": script_hash,
    }


def commit(script_path: Path | str) -> str | None:
    """The commit of the repository in the script's folder; None without a repository or git.

    In a .pyz it is the commit that this was made from.
    """
    with contextlib.suppress(OSError):
        bundled = pkgutil.get_data("classifier", COMMIT_FILE) or b""
        return bundled.decode() or None
    with contextlib.suppress(OSError):
        repository = Path(script_path).resolve().with_name(".git")
        command = ["git", f"--git-dir={repository}", "rev-parse", "--verify", "HEAD"]
        output = subprocess.run(command, capture_output=True, text=True).stdout
        return output.strip() or None
    return None


def run_facts(
    data: Dataset, state: TrainState, versions: dict[str, Any], script_path: str
) -> dict[str, Any]:
    """The part of report.json that tells how the result came about.

    versions: see the function of that name.
    """
    substituted_for = f"CIFAR10: {data.fallback_reason}" if data.fallback_reason else None
    return {
        "seconds": state.progress.seconds,
        "dataset": data.name,
        "train_images": state.num_images_seen(),
        "epochs": len(state.progress.history),
        "substituted_for": substituted_for,
        "commit": commit(script_path),
        "hardware": hardware_name(state.step_stats.device),
        "versions": versions,
    }


def print_accuracy(results: dict[str, Any]) -> None:
    """Print the accuracy on the test images and its 95 % interval."""
    note = ""
    if results["substituted_for"]:
        note = f"; {results['dataset']}, because CIFAR-10 was not available"
    result_output.print_accuracy(results, "test images", note)


def add_tta_accuracy(results: dict[str, Any], num_views: int, accuracy: float) -> None:
    """Add the accuracy with test-time augmentation to the results, and print it."""
    results["test_views"] = num_views
    results["test_views_accuracy"] = accuracy
    views = f"{num_views} views of the least certain quarter of the images"
    print(f"Accuracy with {views}: {100 * accuracy:.2f} %")


def write_report(
    run: Run,
    log: RunLog,
    config: Config,
    results: dict[str, Any],
    history: list[Row],
    data: Dataset,
    logits: torch.Tensor,
    checkpoint: dict[str, Any],
) -> Report:
    """Draw the pictures, write test_predictions.csv, and add the results to best.pth.

    Run.finish writes report.json, because that file marks a run as finished.

    Args:
        log: open.
        results: content of report.json, but for what says which epoch and which images were tested.
        logits: float32 (N, classes), of the test images, on the CPU.
        checkpoint: content of best.pth; its metrics get the main results of the test, and all of
            them are in it under "report".
    """
    classes = list(results["class_accuracy"])
    temperature = results["temperature"]
    confidences, predictions = metrics.predict(logits, temperature)
    matrix = results["confusion_matrix"]
    pictures = _draw_pictures(run.path, history, data, predictions, confidences, matrix, classes)

    labels = [classes[label] for label in data.test.labels.tolist()]
    digests = identity.digest_test_images(data)
    columns = {
        "label": labels,
        "prediction": [classes[prediction] for prediction in predictions.tolist()],
        "confidence": confidences.tolist(),
        "image": identity.name_test_images(data),
        "digest": digests,
    }
    rows = zip(*columns.values(), strict=True)
    write_csv(run.path / "test_predictions.csv", [list(columns), *rows])
    test_digest = identity.digest_all(digests, labels)
    results = {
        **results,
        "best_epoch": checkpoint["metrics"]["epoch"],
        "test_digest": test_digest,
        "data_digest": identity.digest_data(data, test_digest),
    }

    accuracy, loss = results["test_accuracy"], results["test_loss"]
    last_epoch = len(history) - 1
    log.report(config, last_epoch, {"test accuracy": accuracy, "test loss": loss}, pictures)

    checkpoint["metrics"]["test_accuracy"] = accuracy
    checkpoint["metrics"]["test_loss"] = loss
    checkpoint["metrics"]["temperature"] = temperature
    checkpoint["report"] = _report_for_model_file(results, data)
    save_checkpoint(run.best, checkpoint)
    return Report(results, history, run.path, run.best)


def _report_for_model_file(results: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """What a model file says about its test and its training: report.json, made shorter.

    The confusion matrix, which is large with many classes, becomes the number of test images of
    each class. Why CIFAR-10 was not available is left out: that names folders of this machine. The
    number of validation images is added.
    """
    facts = {name: value for name, value in results.items() if name != "confusion_matrix"}
    counts = [sum(row) for row in results["confusion_matrix"]]
    facts["class_images"] = dict(zip(results["class_accuracy"], counts, strict=True))
    facts["valid_images"] = len(data.valid.labels)
    facts["substituted_for"] = "CIFAR10" if results["substituted_for"] else None
    return facts


def _draw_pictures(
    run: Path,
    history: list[Row],
    data: Dataset,
    predictions: np.ndarray,
    confidences: np.ndarray,
    matrix: list[list[int]],
    classes: list[str],
) -> dict[str, Any]:
    """Draw curves, confusion matrix and worst mistakes into the run folder.

    Returns the pixels of those that TensorBoard shows, by their tags.
    """
    test = data.test
    plots.save_figure(plots.draw_curves(history), run / "training_results.png")
    pictures = {}
    figure = plots.draw_confusion_matrix(matrix, classes)
    pictures["confusion matrix"] = plots.save_figure(figure, run / "confusion_matrix.png")
    (run / "worst_mistakes.png").unlink(missing_ok=True)  # of a test before the run was resumed
    mistakes = plots.draw_worst_mistakes(
        test.images, test.labels, predictions, confidences, classes, data.test_files
    )
    if mistakes is not None:
        pictures["worst mistakes"] = plots.save_figure(mistakes, run / "worst_mistakes.png")
    return pictures


def print_classes(report: Report, is_trial: bool) -> None:
    """Print what a report says besides the accuracy: classes, calibration, and what to try next.

    is_trial: whether this was a --fast-dev-run.
    """
    results = report.results
    result_output.print_classes(results)
    duration = tqdm.format_interval(results["seconds"])
    print(f"Trained on {results['train_images']} images for {duration}")
    if is_trial:
        print("This was a trial run on one batch: its results mean nothing")
    else:
        _print_hint(report.history[-1], num_classes=len(results["recall"]))


def _print_hint(row: Row, num_classes: int) -> None:
    """Print what to try if the last epoch shows that little was learned, or overfitting."""
    train_accuracy, valid_accuracy = row["train_accuracy"], row["valid_accuracy"]
    if valid_accuracy is None and row["train_share"] < 1:
        return  # the accuracy on the hardest images alone says too little
    accuracy = train_accuracy if valid_accuracy is None else valid_accuracy
    if accuracy < min(2 / num_classes, 0.1 + 0.9 / num_classes):
        print(
            "This is hardly better than guessing: look at samples.png, try a tenth of --lr, or "
            "more --epochs"
        )
    elif train_accuracy - accuracy > OVERFITTING_GAP:
        share = "" if row["train_share"] == 1 else ", on the hardest images"
        print(
            f"Overfitting: {percent(train_accuracy)} in training{share}, {percent(accuracy)} in "
            "validation: try more images, more --augment, or --init-from a trained model"
        )


def model_name(model: str) -> str:
    """The setting --model as part of a file name: timm-resnet18, or FACTORY of a file."""
    if is_library_model(model):
        return model.replace(":", "-")
    return model.rpartition(":")[2]


def _other_copy(model: Path, folder: Path, run_copy: Path) -> Path | None:
    """A copy of a model that another run keeps, if there is one.

    folder: that holds the runs. run_copy: the file of this run, whose name the others have, too.
    """
    size = model.stat().st_size
    for path in folder.glob(f"*/{glob.escape(run_copy.name)}"):
        is_own = run_copy.exists() and path.samefile(run_copy)
        if is_own or path.stat().st_size != size:
            continue
        if path.read_bytes() == model.read_bytes():
            return path
    return None


def export_model(report: Report, config: Config, data: Dataset) -> Report:
    """Copy the finished model to where the user finds it, and print what to do next.

    A copy stays in the run folder; for a trial run that is the only one, so that it never replaces
    a real model.

    Returns the report with the path of the model.
    """
    file_name = f"model_{model_name(config.model)}.pth"
    if data.name != "CIFAR10":
        file_name = f"model_{model_name(config.model)}_{data.name}.pth"
    run_copy = report.run / file_name
    out = run_copy if config.fast_dev_run else Path(config.out or file_name)

    replaced = ""
    if out.exists():
        copy = _other_copy(out, runs.RUNS / data.name, run_copy)
        replaced = f" (replaced; {copy} is a copy of the old one)" if copy else " (replaced)"
    content = report.checkpoint.read_bytes()
    write_atomically(run_copy, content)
    if out != run_copy:
        write_into_new_folder(out, content)

    if data.fallback_reason:
        print(
            f"*** This model knows {data.name}, not CIFAR-10, which was not available: report.json "
            "says why ***"
        )
    print(f"Model: {out}{replaced}")
    print(f"Everything else: {report.run}")
    log_folder = str(report.run) if config.run_dir else "runs"
    print(f"View it: {command_line(['tensorboard', '--logdir', log_folder])}")
    inference = program("inference.py")
    if inference is not None:  # it is not in a .pyz
        command = [*inference, "--checkpoint", str(out)]
        if is_custom_model(config.model):  # a model file imports no code by itself
            command += ["--model", config.model]
        print(f"Use it: {command_line([*command, 'IMAGE'])}")
    return replace(report, checkpoint=out)
