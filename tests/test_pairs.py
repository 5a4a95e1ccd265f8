"""Every two options together: a covering set of small runs, each of which is judged.

Most faults that gave wrong answers without a word were two features that are right alone.
"""

import csv
import itertools
import os
import random
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Program, only_run, report_of, shared_folder, without_time
from PIL import Image

import image_classification as ic
from classifier import runs
from classifier.datasets.load import find_source

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("ALL_PAIRS" not in os.environ, reason="takes 20 minutes: set ALL_PAIRS=1"),
    pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals"),
]

CHOICES = {
    "data": ["digits", "photos", "divided"],  # divided: a folder with train/, val/ and test/
    "model": ["cnn", "network.py:small", "torchvision:resnet18"],
    "start": ["scratch", "trained", "frozen"],
    "break": ["none", "kill", "ctrl-c"],
    "class_balance": ["none", "weights", "oversample", "undersample"],
    "augment": ["flip,crop=2", "mixup"],
    "scheduler": ["linear", "plateau"],
    "progressive_resizing": ["0", "0.6"],
    "early_stopping": ["0", "2"],
    "image_size": ["20", "28"],
    "precision": ["fp32", "bf16"],
    "minutes": ["0", "0.2"],
    "repeat": ["1", "2"],
    "processes": ["1", "2"],
    "tta": ["1", "2"],
    "subset": ["0", "150"],
    "grad_clip": ["0", "1"],
    "ema": ["", "yes"],
    "more_epochs": ["", "yes"],  # when it has ended
}
OPTIONS = [  # those that are passed on as they are
    *["model", "class_balance", "augment", "scheduler", "progressive_resizing", "early_stopping"],
    *["image_size", "precision", "minutes", "repeat", "tta", "subset", "grad_clip"],
]
EPOCHS = 5
CLASSES = {"red": 90, "green": 70, "blue": 50}

NETWORK = """
from torch import nn

def small(classes=10, channels=3, image_size=32):
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(128, classes),
    )
"""

# The program, in which something happens in a step. Processes of torchrun each run this file.
DRIVER = """
import os, sys
import image_classification as ic
from classifier import runs
from test_pairs import break_off

if __name__ == "__main__":
    break_off(ic.Progress, runs, int(os.environ["BREAK_AT"]), os.environ["BREAK"])
    sys.exit(ic.main())
"""


def break_off(progress, runs, break_at, how):
    """Let the process be killed, or get Ctrl-C, in this step; the step before it is saved.

    progress, runs: the class and the module, which are changed.
    """
    if not break_at:
        return
    advance = progress.advance

    def advance_and_break(self, scale):
        advance(self, scale)
        if self.step == break_at - 1:
            runs.SAVE_EVERY = 0
        if self.step == break_at:
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGINT)

    progress.advance = advance_and_break


def covering_runs():
    """Few combinations of CHOICES in which each two values of different options occur together."""
    generator = random.Random(0)
    names = list(CHOICES)
    missing = set()
    for first, second in itertools.combinations(names, 2):
        for pair in itertools.product(CHOICES[first], CHOICES[second]):
            missing.add((first, pair[0], second, pair[1]))

    def pairs_of(run):
        for first, second in itertools.combinations(names, 2):
            yield first, run[first], second, run[second]

    combinations = []
    while missing:
        best, most = None, 0
        for _ in range(300):
            run = {name: generator.choice(values) for name, values in CHOICES.items()}
            if len(combinations) + len(missing) % 3:  # start from a pair that is still missing
                first, value, second, other = generator.choice(sorted(missing))
                run[first], run[second] = value, other
            covered = sum(pair in missing for pair in pairs_of(run))
            if covered > most:
                best, most = run, covered
        combinations.append(best)
        missing -= set(pairs_of(best))
    return combinations


RUNS = covering_runs()


def test_each_two_values_occur_together():
    for first, second in itertools.combinations(CHOICES, 2):
        wanted = set(itertools.product(CHOICES[first], CHOICES[second]))
        assert {(run[first], run[second]) for run in RUNS} == wanted
    assert len(RUNS) < 25


# ---- Data and networks to start from -------------------------------------------------------------


def write_class_folders(folder, counts, seed):
    """Pictures of noise, of which one channel or none is brighter."""
    generator = np.random.default_rng(seed)
    for channel, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 120, (40, 40, 3))
            pixels[:, :, channel] += 110
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with the data sets, the own network, and a trained model of each network."""
    with shared_folder(tmp_path_factory, "pairs") as folder:
        if not (folder / "done").exists():
            write_class_folders(folder / "photos", CLASSES, seed=0)
            for part, share in {"train": 1.0, "val": 0.3, "test": 0.3}.items():
                counts = {name: int(share * count) for name, count in CLASSES.items()}
                write_class_folders(folder / "divided" / part, counts, seed=len(part))
            (folder / "network.py").write_text(NETWORK)
            (folder / "driver.py").write_text(DRIVER)
            for number, model in enumerate(CHOICES["model"]):
                Program(folder)(
                    *["--dataset", "digits", "--model", model, "--epochs", 4, "--subset", 400],
                    *["--image-size", 28, "--out", f"start-{number}.pth", "--batch-size", 40],
                    timeout=400,
                )
            (folder / "done").touch()
    return folder


# ---- The runs ------------------------------------------------------------------------------------


def arguments_of(run, prepared):
    """The command line of a run, but for what happens when it is broken off."""
    dataset = run["data"] if run["data"] == "digits" else prepared / run["data"]
    arguments = ["--dataset", dataset, "--epochs", EPOCHS, "--batch-size", 30]
    arguments += ["--device", "cpu", "--data-dir", prepared / "data"]
    for name in OPTIONS:
        arguments += ["--" + name.replace("_", "-"), run[name]]
    if run["data"] == "digits" and run["subset"] == "0":
        arguments[arguments.index("--subset") + 1] = 400
    if run["start"] != "scratch":
        number = CHOICES["model"].index(run["model"])
        arguments += ["--init-from", prepared / f"start-{number}.pth"]
    if run["start"] == "frozen":
        arguments.append("--freeze")
    if run["ema"]:
        arguments.append("--ema")
    return arguments


class Runner:
    """Runs the program in a folder, in as many processes as the run has."""

    def __init__(self, run, prepared, folder, inside, monkeypatch):
        self.run = run
        self.driver = prepared / "driver.py"
        self.folder = folder
        self.inside = inside
        self.monkeypatch = monkeypatch
        folder.mkdir()
        shutil.copy(prepared / "network.py", folder)

    def __call__(self, *arguments, break_at=0):
        """Run it to its end, or until it is broken off in step number `break_at`."""
        how = self.run["break"]
        if self.run["processes"] == "1" and not (break_at and how == "kill"):
            with self.monkeypatch.context() as patch:
                patch.chdir(self.folder)
                patch.setattr(runs, "SAVE_EVERY", runs.SAVE_EVERY)
                patch.setattr(ic.Progress, "advance", ic.Progress.advance)
                break_off(ic.Progress, runs, break_at, how)
                self.inside(*arguments, status=130 if break_at else 0)
            return
        launcher = ()
        if self.run["processes"] == "2":
            launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        program = Program(self.folder, self.driver, launcher)
        paths = [str(REPOSITORY), str(REPOSITORY / "tests")]
        environment = {
            "BREAK_AT": str(break_at),
            "BREAK": how,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        process = program.start(*arguments, env=environment)
        out, err = process.communicate(timeout=400)
        was_broken_off = process.returncode != 0
        assert was_broken_off == (break_at > 0), f"status {process.returncode}\n{out}\n{err}"
        if break_at and how == "ctrl-c":
            assert "--resume" in out, f"status {process.returncode}\n{out}\n{err}"


def results_of(folder):
    """All that must be the same in two runs: rows of all seeds, report, predictions."""
    run = only_run(folder)
    rows = [without_time(csv.DictReader(path.open())) for path in sorted(run.rglob("metrics.csv"))]
    report = report_of(run)
    figures = {name: report[name] for name in ("test_accuracy", "test_loss", "confusion_matrix")}
    predictions = [path.read_text() for path in sorted(run.rglob("test_predictions.csv"))]
    return rows, figures, predictions


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_options_work_together(number, prepared, tmp_path, inside, monkeypatch):
    run = RUNS[number]
    folder = tmp_path / "run"
    program = Runner(run, prepared, folder, inside, monkeypatch)
    arguments = arguments_of(run, prepared)
    resume = ["--resume", "last", "--data-dir", prepared / "data"]
    if run["model"].startswith("network.py"):
        resume += ["--model", run["model"]]

    if run["break"] == "none":
        program(*arguments)
    else:
        # a time budget may leave few steps
        program(*arguments, break_at=2 if run["minutes"] != "0" else 3 + number)
        program(*resume)
        # other processes than the first draw new random numbers when they are resumed
        draws_elsewhere = run["processes"] == "2" and run["augment"] == "mixup"
        if run["minutes"] == "0" and not draws_elsewhere:
            unbroken = tmp_path / "unbroken"
            Runner(run, prepared, unbroken, inside, monkeypatch)(*arguments)
            assert results_of(folder) == results_of(unbroken)
    judge(run, folder, prepared, monkeypatch)
    if run["more_epochs"]:
        trained = report_of(only_run(folder))["epochs"]
        program(*resume, "--epochs", trained + 2)
        judge(run, folder, prepared, monkeypatch)


def judge(run, folder, prepared, monkeypatch):
    """It has learned, its report agrees with itself, and its model does what the report says."""
    path = only_run(folder)
    report = report_of(path)
    matrix = np.array(report["confusion_matrix"])
    num_classes = len(matrix)
    share_of_largest = matrix.sum(1).max() / matrix.sum()
    accuracy = matrix.trace() / matrix.sum()
    if run["minutes"] == "0":  # on a busy machine there may be time for a few steps only
        assert accuracy > share_of_largest + 0.3 * (1 - share_of_largest), run
    assert report["test_accuracy"] == pytest.approx(accuracy)
    kept = path / report["kept"] if "kept" in report else path
    for name, right, count in zip(report["recall"], matrix.diagonal(), matrix.sum(1), strict=True):
        assert report["recall"][name] == pytest.approx(right / count)
    assert len(report["recall"]) == num_classes

    table = list(csv.DictReader((kept / "test_predictions.csv").open()))
    assert np.mean([row["label"] == row["prediction"] for row in table]) == pytest.approx(accuracy)

    # the finished model, as somebody else gets it
    monkeypatch.chdir(folder)
    (model_file,) = folder.glob("model_*.pth")
    model = run["model"] if run["model"].startswith("network.py") else ""
    checkpoint = torch.load(model_file, weights_only=True)
    assert checkpoint["metrics"]["test_accuracy"] == pytest.approx(accuracy)
    predict_test_images(model_file, model, checkpoint, table, prepared)


def predict_test_images(model_file, model, checkpoint, table, prepared):
    """inference.py predicts of each test image what test_predictions.csv says."""
    settings = find_source(checkpoint["config"], checkpoint["image_size"]).settings
    data = ic.load_data(ic.Config(**{**settings, "data_dir": str(prepared / "data")}))
    network, _ = ic.load_checkpoint(model_file, model)
    tested = ic.evaluate(network, data.test.images, data.test.labels)
    temperature = checkpoint["metrics"]["temperature"] or 1.0
    confidence, prediction = (tested.logits / temperature).softmax(1).max(1)
    assert [data.classes[index] for index in prediction] == [row["prediction"] for row in table]
    stored = torch.tensor([float(row["confidence"]) for row in table])
    torch.testing.assert_close(confidence, stored, rtol=0, atol=1e-4)
