"""The closing lines of a run, and what it leaves behind."""

import csv
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from torch import nn

import classifier
from classifier import reports
from classifier.checkpoints import read_checkpoint, save_checkpoint
from classifier.config import Config
from classifier.datasets import identity
from classifier.datasets.dataset import Dataset, Split
from classifier.metrics import classification_metrics, predict
from classifier.plots import draw_images
from classifier.progress import Progress
from classifier.reports import Report
from classifier.run_log import RunLog
from classifier.runs import Run

CLASSES = ["plane", "car", "a_very_long_class_name_of_30"]


def make_row(epoch, train_accuracy=0.75, valid_accuracy: float | None = 0.7):
    return {
        "epoch": epoch,
        "train_loss": 1.0,
        "valid_loss": None if valid_accuracy is None else 1.5,
        "train_accuracy": train_accuracy,
        "valid_accuracy": valid_accuracy,
        "learning_rate": 0.1,
        "seconds": 31.0,
        "image_scale": 1.0,
        "train_share": 1.0,
    }


def make_data(name="CIFAR10", fallback_reason=""):
    torch.manual_seed(0)
    labels = torch.tensor([0] * 40 + [1] * 20)  # none of the third class
    test = Split(torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8), labels)
    return Dataset(
        name=name,
        classes=CLASSES,
        train=test,
        valid=test,
        load_test=lambda: test,
        num_test_images=60,
        flip_keeps_label=True,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        fallback_reason=fallback_reason,
    )


def make_logits(labels, num_right):
    """Logits for which the first `num_right` of the images are right."""
    targets = labels.clone()
    targets[num_right:] = 2
    return 3 * nn.functional.one_hot(targets, 3).float() + torch.rand(len(labels), 3)


def make_results(data, logits, temperature=None, history=()):
    results = classification_metrics(logits, data.test.labels, data.classes, temperature)
    progress = Progress(total_steps=1, steps_per_epoch=1, seconds=62.0, history=list(history))
    state = types.SimpleNamespace(
        progress=progress, num_images_seen=lambda: 45000, step_stats=torch.zeros(1, 2)
    )
    return results | reports.run_facts(data, state, {"script": "abc"}, "nowhere.py")


def make_report(data, num_right=50, temperature=2.0, row=None, run=Path("run")):
    logits = make_logits(data.test.labels, num_right)
    history = [row or make_row(0)]
    results = make_results(data, logits, temperature, history)
    return Report(results, history, run, run / "best.pth")


# ---- results ----


def test_results_have_the_keys_of_report_json_in_their_order():
    data = make_data("digits", fallback_reason="no network")
    results = make_results(data, make_logits(data.test.labels, 50), history=[make_row(0)])
    reports.add_tta_accuracy(results, 6, 0.9)
    assert list(results)[13:] == [
        "seconds",
        "dataset",
        "train_images",
        "epochs",
        "substituted_for",
        "commit",
        "hardware",
        "versions",
        "test_views",
        "test_views_accuracy",
    ]
    assert results["substituted_for"] == "CIFAR10: no network"
    assert results["epochs"] == 1
    assert json.loads(json.dumps(results)) == results
    assert make_results(make_data(), make_logits(data.test.labels, 50))["substituted_for"] is None


@pytest.mark.parametrize(("num_right", "percent"), [(60, 100), (40, 66), (0, 0)])
def test_accuracy_is_printed_as_in_the_reference(capsys, num_right, percent):
    data = make_data()
    results = make_results(data, make_logits(data.test.labels, num_right))
    reports.print_accuracy(results)
    low, high = results["test_accuracy_interval"]
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    assert capsys.readouterr().out == (
        f"Accuracy of the network on the 60 test images: {percent} % "
        f"({100 * num_right / 60:.2f} %, {interval})\n"
    )


def test_accuracy_of_substituted_data_says_so(capsys):
    data = make_data("digits", fallback_reason="no network")
    reports.print_accuracy(make_results(data, make_logits(data.test.labels, 50)))
    assert re.search(r"60 test images: 83 % .*; digits, .*CIFAR-10", capsys.readouterr().out)


def test_accuracy_with_views_is_a_line_of_its_own(capsys):
    results = {}
    reports.add_tta_accuracy(results, 6, 0.91239)
    assert results == {"test_views": 6, "test_views_accuracy": 0.91239}
    views = "6 views of the least certain quarter of the images"
    assert capsys.readouterr().out == f"Accuracy with {views}: 91.24 %\n"


# ---- versions and commit ----


def test_versions_tell_scripts_apart():
    versions = reports.versions("print('é')\n")
    assert versions["script"] == hashlib.sha256("print('é')\n".encode()).hexdigest()[:12]
    assert versions["image_classification"] == classifier.__version__
    assert versions["torch"] == str(torch.__version__)
    assert set(versions) == {"image_classification", "python", "torch", "platform", "script"}
    assert versions["script"] != reports.versions("print()")["script"]
    assert reports.versions(None)["script"] is None


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit_is_that_of_the_script_s_folder(folder):
    script = folder / "image_classification.py"
    assert reports.commit(script) is None
    subprocess.run(["git", "init", "-q"], check=True)
    assert reports.commit(script) is None  # there is none yet
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", *author, "commit", "-q", "--allow-empty", "--no-verify", "-m", "first"]
    subprocess.run(command, check=True)
    commit = reports.commit(script)
    assert commit is not None and re.fullmatch("[0-9a-f]{40}", commit)
    (folder / "below").mkdir()
    assert reports.commit(folder / "below" / "image_classification.py") is None


def test_no_commit_without_git(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    assert reports.commit(folder / "image_classification.py") is None


IN_ZIPAPP = """
from classifier import reports
print(reports.commit(__file__), reports.versions(__loader__.get_source("__main__"))["script"])
"""


@pytest.mark.slow
def test_zipapp_has_a_version_and_no_commit(folder):
    package = Path(classifier.__file__).parent
    with zipfile.ZipFile(folder / "a.pyz", "w") as bundle:
        for path in package.rglob("*.py"):
            bundle.write(path, path.relative_to(package.parent))
        bundle.writestr("__main__.py", IN_ZIPAPP)
    command = [sys.executable, "a.pyz"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    script = hashlib.sha256(IN_ZIPAPP.encode()).hexdigest()[:12]
    assert out.split() == ["None", script]


# ---- files of a run ----


@pytest.fixture
def written(folder):
    """A finished run: (report, data, logits)."""
    run, data = Run(folder / "run"), make_data("photos")
    run.path.mkdir()
    logits = make_logits(data.test.labels, 50)
    history = [make_row(0), make_row(1)]
    results = make_results(data, logits, 2.0, history)
    checkpoint = {
        "model": {"weight": torch.ones(3)},
        "config": {},
        "classes": CLASSES,
        "mean": [0.5],
        "std": [0.25],
        "image_size": 8,
        "metrics": {"epoch": 1},
        "versions": {},
    }
    save_checkpoint(run.best, checkpoint)

    def draw():
        return draw_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["cat"], 1)

    log = RunLog(run.path, True, 0, draw, nn.Flatten(), (3, 8, 8))
    log.open()
    report = reports.write_report(
        run, log, Config(), results, history, data, logits, read_checkpoint(run.best)
    )
    log.close()
    return report, data, logits


def test_report_has_its_pictures_and_leaves_report_json(written):
    report, _, _ = written
    names = {path.name for path in report.run.iterdir()}
    assert {
        "training_results.png",
        "confusion_matrix.png",
        "worst_mistakes.png",
        "test_predictions.csv",
    } <= names
    assert "report.json" not in names


def test_mistakes_of_an_earlier_test_are_not_left(folder):
    (folder / "worst_mistakes.png").write_bytes(b"of an earlier test")
    data = make_data("photos")
    predictions = data.test.labels.numpy()
    confidences = np.ones(len(predictions))
    matrix = [[2, 0], [0, 2]]
    reports._draw_pictures(
        folder, [make_row(0)], data, predictions, confidences, matrix, data.classes
    )
    assert (folder / "confusion_matrix.png").exists()
    assert not (folder / "worst_mistakes.png").exists()


def test_predictions_have_a_row_for_each_test_image(written):
    report, data, logits = written
    confidences, predictions = predict(logits, 2.0)
    with open(report.run / "test_predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["label", "prediction", "confidence", "image", "digest"]
    assert [row["image"] for row in rows] == [str(i) for i in range(60)]
    assert len({row["digest"] for row in rows}) == 60
    assert [row["label"] for row in rows] == [CLASSES[label] for label in data.test.labels]
    assert [row["prediction"] for row in rows] == [CLASSES[each] for each in predictions]
    assert [float(row["confidence"]) for row in rows] == confidences.tolist()


def test_report_says_which_epoch_and_which_images_were_tested(written):
    report, data, _ = written
    assert report.results["best_epoch"] == 1
    digests = identity.digest_test_images(data)
    labels = [CLASSES[label] for label in data.test.labels]
    test_digest = identity.digest_all(digests, labels)
    assert report.results["test_digest"] == test_digest
    assert report.results["data_digest"] == identity.digest_data(data, test_digest)


def test_best_model_learns_its_test_results(written):
    report, _, _ = written
    assert report.checkpoint == report.run / "best.pth"
    assert read_checkpoint(report.checkpoint)["metrics"] == {
        "epoch": 1,
        "test_accuracy": 50 / 60,
        "test_loss": report.results["test_loss"],
        "temperature": 2.0,
    }


def test_best_model_has_the_report_but_for_what_is_large_or_names_folders(written):
    report, _, _ = written
    saved = read_checkpoint(report.checkpoint)["report"]
    expected = {name: value for name, value in report.results.items() if name != "confusion_matrix"}
    counts = dict(zip(CLASSES, [40, 20, 0], strict=True))
    assert saved == {**expected, "class_images": counts, "valid_images": 60}

    data = make_data("digits", fallback_reason="/home/ann/data is empty")
    results = make_results(data, make_logits(data.test.labels, 50), history=[make_row(0)])
    assert reports._report_for_model_file(results, data)["substituted_for"] == "CIFAR10"


def test_tensorboard_shows_the_report(written):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report, _, _ = written
    events = EventAccumulator(str(report.run), size_guidance={"images": 0}).Reload()
    expected = {"training images", "confusion matrix", "worst mistakes"}
    assert set(events.Tags()["images"]) == expected
    (event,) = events.Scalars("test accuracy")
    assert event.step == 1 and event.value == pytest.approx(50 / 60)


# ---- closing lines ----


def test_classes_are_printed_as_in_the_reference(capsys):
    reports.print_classes(make_report(make_data()), is_trial=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "Accuracy for class plane                is: 100.0 %  (precision 100.0 %, F1 100.0 %)"
    )
    assert lines[1] == (
        "Accuracy for class car                  is: 50.0 %  (precision 100.0 %, F1 66.7 %, "
        "20 tested)"
    )
    assert lines[2] == "Accuracy for class a_very_long_class_name_of_30 is: -  (not tested)"
    assert lines[3] == "Best class: plane; worst class: car"
    assert lines[4].startswith("Macro-F1: 83.3 % ") and "2 of 3 classes" in lines[4]
    assert re.fullmatch(r"Expected calibration error: \d+\.\d % \(\d+\.\d % before .*\)", lines[5])
    assert lines[6:] == ["Trained on 45000 images for 01:02"]


def test_top_5_accuracy_of_many_classes_is_printed(capsys):
    data = make_data()
    results = make_results(data, make_logits(data.test.labels, 50))
    reports.print_accuracy(results)
    assert "Top-5" not in capsys.readouterr().out
    reports.print_accuracy(results | {"top5_accuracy": 0.98765})
    assert capsys.readouterr().out.splitlines()[1] == "Top-5 accuracy: 98.77 %"


def test_class_that_was_never_predicted_has_no_precision(capsys):
    reports.print_classes(make_report(make_data(), num_right=40), is_trial=False)
    line = capsys.readouterr().out.splitlines()[1]
    assert "car " in line and "is: 0.0 %  (never predicted, F1 0.0 %, 20 tested)" in line


def test_short_names_get_five_columns(capsys):
    data = make_data()
    data.classes = ["0", "1", "2"]
    reports.print_classes(make_report(data), is_trial=False)
    assert "Accuracy for class 0     is: 100.0 %  (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "is_trial", "expected"),
    [
        (make_row(0, 0.95, 0.84), False, "Overfitting: 95.0 % in training, 84.0 % in"),
        (make_row(0, 0.95, 0.86), False, ""),
        (make_row(0, 0.95, None), False, ""),
        (make_row(0, 0.9, 0.39), False, "hardly better than guessing"),  # of three classes
        (make_row(0, 0.39, None), False, "hardly better than guessing"),
        (make_row(0, 0.41, 0.41), False, ""),
        (make_row(0, 0.9, 0.39), True, "trial"),
    ],
)
def test_hints(capsys, row, is_trial, expected):
    reports.print_classes(make_report(make_data(), row=row), is_trial)
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert expected in last_line
    assert last_line.startswith("Trained on") == (expected == "")


def test_missing_calibration_is_said(capsys):
    report = make_report(make_data(), temperature=None)
    reports.print_classes(report, is_trial=False)
    assert "not calibrated" in capsys.readouterr().out


# ---- the finished model ----


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("cnn", "cnn"),
        ("torchvision:resnet18", "torchvision-resnet18"),
        ("timm:resnet18.a1_in1k", "timm-resnet18.a1_in1k"),
        ("some/mine.py:small", "small"),
        ("C:\\mine.py:small", "small"),
    ],
)
def test_model_has_a_name_that_is_part_of_a_file_name(model, expected):
    assert reports.model_name(model) == expected


@pytest.fixture
def export(folder, capsys):
    """A function that exports the model of a run and returns (its path, what was printed)."""

    def run_export(data=None, run="run", **settings):
        data = data or make_data()
        path = folder / run
        path.mkdir(parents=True, exist_ok=True)
        (path / "best.pth").write_text(f"weights of {run}")
        report = reports.export_model(make_report(data, run=path), Config(**settings), data)
        return report.checkpoint, capsys.readouterr().out

    return run_export


def test_model_is_put_where_the_user_finds_it(export, folder):
    out, printed = export()
    assert out == Path("model_cnn.pth") and out.read_text() == "weights of run"
    assert (folder / "run" / "model_cnn.pth").read_text() == "weights of run"
    assert printed.splitlines()[0] == "Model: model_cnn.pth"
    assert str(folder / "run") in printed.splitlines()[1]
    assert printed.splitlines()[2].endswith("tensorboard --logdir runs")
    *command, checkpoint, image = shlex.split(printed.rpartition("Use it: ")[2])
    assert Path(command[1]).samefile(REPOSITORY / "inference.py")
    assert [command[2], checkpoint, image] == ["--checkpoint", "model_cnn.pth", "IMAGE"]


def test_custom_network_is_named_in_the_command_that_uses_it(export):
    _, printed = export(model="mine.py:small")
    assert shlex.split(printed)[-3:] == ["--model", "mine.py:small", "IMAGE"]


def test_other_data_sets_are_part_of_the_name(export, folder):
    assert export(make_data("photos"), model="mine.py:small")[0].name == "model_small_photos.pth"
    out, printed = export(make_data(), out="mine.pth", run_dir="run")
    assert out == Path("mine.pth") and out.exists()
    assert (folder / "run" / "model_cnn.pth").exists()
    assert f"--logdir {shlex.quote(str(folder / 'run'))}\n" in printed


def test_replacing_a_model_is_said(export, folder):
    (folder / "mine.pth").write_text("old")
    assert "mine.pth (replaced)\n" in export(out="mine.pth")[1]
    assert (folder / "mine.pth").read_text() == "weights of run"
    export(run="runs/CIFAR10/first")
    printed = export(run="runs/CIFAR10/second")[1]
    copy = Path("runs", "CIFAR10", "first", "model_cnn.pth")
    assert f"(replaced; {copy} is a copy of the old one)" in printed
    again = export(run="runs/CIFAR10/second")[1]  # its own copy is replaced, too
    assert "(replaced)\n" in again


def test_trial_run_replaces_no_model(export, folder):
    (folder / "model_cnn.pth").write_text("precious")
    out, _ = export(fast_dev_run=True)
    assert (folder / "model_cnn.pth").read_text() == "precious"
    assert out == folder / "run" / "model_cnn.pth" and out.exists()


def test_model_of_substituted_data_is_marked(export):
    _, printed = export(make_data("digits", fallback_reason="no network"))
    assert printed.startswith("*** This model knows digits, not CIFAR-10")
