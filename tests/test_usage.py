"""The command line from end to end: wrong usage, files and packages that are missing, recipes."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK, SCRIPT, SMALL, Program, only_run, report_of
from PIL import Image

import image_classification as ic
from classifier.config import flag
from classifier.errors import INSTALL, REINSTALL_TORCH
from classifier.recipes import DATASET_DEFAULTS

DIGITS = ["--dataset", "digits"]

# Wrong arguments, and what the error has to name.
WRONG_USAGE = {
    "--epochs 0": "--epochs 0",
    "--epochs ten": "--epochs",
    "--batch-size 0": "--batch-size 0",
    "--lr nan": "--lr nan",
    "--lr inf": "--lr inf",
    "--lr -1": "--lr",
    "--minutes -1": "--minutes",
    "--val-fraction 1": "--val-fraction 1",
    "--early-stopping 2 --val-fraction 0": "--val-fraction",
    "--mirror teacher:8000": "http://",
    "--optimizer lion": "lion",
    "--tta 3": "--tta",
    "--recipe defualt": "did you mean default?",
    "--model cnnn": "did you mean cnn?",
    "--model cn": "did you mean cnn?",  # not fcn
    "--model torchvision:resnet19": "resnet18",
    "--model nowhere.py:small": "nowhere.py",
    "--model resnet18 --recipe finetune": "--pretrained",
    "--model fcn --width 2": "--width",
    "--model resnet18 --dropout 0.5": "--dropout",
    "--pretrained": "--pretrained",
    "--freeze": "--init-from",
    "--dataset ../nowhere": "--dataset ../nowhere",
    "--dataset nowhere": "--dataset nowhere",
    "--dataset=": "folder of images",
    "--dataset cifar-100": "did you mean cifar100?",
    "--dataset CIFAR10": "did you mean cifar10?",
    "--dataset digits --val-fraction 0.001": "--val-fraction",
    "--augment none,flip": "--augment none,flip",
    "--augment rotate,flip,rotate=10": "--augment",
    "--augment turn": "turn",
    "--augment flip,": "--augment flip,",
    "--augment flip=2": "flip",
    "--augment crop=1.5": "crop",
    "--augment crop=32": "--augment crop=32",
    "--augment flip,rotate=400": "rotate=400",
    "--epoch 3": "did you mean --epochs?",
    "--learning-rate=3": "did you mean --lr?",
    # names that changed after version 0.9.1
    "--low-res 0.5": "--progressive-resizing",
    "--low-res=0.5": "--progressive-resizing",
    "--test-views 6": "--tta",
    "--scheduler onecycle": "linear",
    "--depth 3": "0.9.1",
    "--make-imbalanced 0.1": "0.9.1",
    "--recipe accuracy96": "accuracy94",
}


# ---- wrong usage ----


@pytest.mark.parametrize("arguments", WRONG_USAGE)
def test_wrong_usage_is_status_2_and_one_line(arguments, inside, folder):
    given = arguments.split()
    if not arguments.startswith("--dataset"):
        given += DIGITS
    line = inside.error(*given, status=2)
    assert line.startswith("image_classification.py: error: ")
    assert WRONG_USAGE[arguments] in line
    assert list(folder.iterdir()) == []


def test_infinity_is_mentioned_only_where_it_was_given(inside):
    assert "inf" in inside.error("--lr", "inf", status=2)
    assert "inf" not in inside.error("--lr", "-1", status=2)


def test_suggestion_comes_last(inside):
    for arguments, named in WRONG_USAGE.items():
        if named.startswith("did you mean"):
            assert inside.error(*arguments.split(), status=2).endswith("?"), arguments


def test_wrong_usage_is_found_before_the_data_are_read(inside, monkeypatch):
    monkeypatch.setattr(ic, "load_data", lambda config: pytest.fail("the data were read"))
    for arguments in ("--model cnnn", "--augment turn", "--augment erase=2", "--recipe defualt"):
        inside.error(*arguments.split(), status=2)
    inside.error("--init-from", "nothere.pth", status=1)


def test_help_names_every_option_and_is_status_0(inside):
    text, _ = inside("--help")
    for field in dataclasses.fields(ic.Config):
        assert re.search(rf"^  {flag(field.name)}\b", text, re.MULTILINE), field.name
    for name, value in ic.DEFAULT_RECIPE.items():
        if isinstance(value, float) and value:
            assert f"{value:g}" in text, name


# ---- files and devices that are missing ----


@pytest.mark.parametrize("others", [QUICK, ["--dataset", "nowhere"]], ids=["digits", "no data"])
def test_missing_file_of_weights_is_named_before_the_data_are_looked_for(inside, others, folder):
    assert "nothere.pth" in inside.error(*others, "--init-from", "nothere.pth")
    assert list(folder.iterdir()) == []


def test_folder_as_a_file_of_weights(inside):
    error = inside.error(*QUICK, "--init-from", ".")
    assert "room" not in error and "permissions" not in error  # the disk is not to blame


def test_debug_shows_the_traceback(inside):
    with pytest.raises(FileNotFoundError):
        inside(*QUICK, "--init-from", "nothere.pth", "--debug")


@pytest.mark.parametrize(("resume", "place"), [("last", "runs"), ("nothere", "nothere")])
def test_missing_run_is_named(inside, resume, place):
    error = inside.error("--resume", resume)
    assert f"--resume {resume}" in error and error.endswith(place)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_missing_device_is_named(inside, folder, device):
    assert f"--device {device}" in inside.error(*QUICK, "--device", device)
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cpu_only_torch_beside_an_nvidia_driver_is_named(inside, folder, monkeypatch):
    tool = folder / ("nvidia-smi.bat" if sys.platform == "win32" else "nvidia-smi")
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    remedy = "pip install --force-reinstall torch torchvision --index-url"
    error = inside.error(*QUICK, "--device", "cuda")
    assert remedy in error
    assert REINSTALL_TORCH not in error  # they fit each other
    out, _ = inside(*QUICK, "--fast-dev-run")
    assert remedy in out


# ---- packages that are missing ----


@pytest.mark.parametrize("package", ["sklearn", "torchvision", "torchsummary", "tensorboard"])
def test_missing_package_is_named_before_anything_is_done(inside, folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    error = inside.error(*QUICK)
    assert package in error and INSTALL in error
    assert REINSTALL_TORCH not in error
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_missing_torch_is_named(program, folder):
    (folder / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    error = program.error(env={"PYTHONPATH": str(folder)})
    assert "'torch'" in error and "pip install -r requirements.txt" in error


@pytest.mark.slow
def test_script_without_its_package_says_so(folder):
    alone = Program(folder, shutil.copy(SCRIPT, folder / SCRIPT.name))
    error = alone.error(*DIGITS)
    assert "classifier" in error
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_torchvision_that_does_not_fit_is_named(program, folder):
    (folder / "torchvision").mkdir()
    misfit = "raise RuntimeError('operator torchvision::nms does not exist')"
    (folder / "torchvision" / "__init__.py").write_text(misfit)
    paths = os.pathsep.join([str(folder), str(SCRIPT.parent)])
    error = program.error(*DIGITS, "--model", "torchvision:resnet18", env={"PYTHONPATH": paths})
    assert "torchvision::nms" in error and REINSTALL_TORCH in error


# ---- recipes and other settings that reach a run ----


def test_recipe_in_a_file(inside, folder):
    recipe = '{"dataset": "digits", "subset": 200, "epochs": 1, "width": 0.25}'
    (folder / "mine.json").write_text(recipe)
    out, _ = inside("--recipe", "mine.json", "--epochs", "2")
    assert "Epoch 0001" in out and "Epoch 0002" not in out
    assert report_of(only_run(folder))["train_images"] == 200


@pytest.mark.parametrize(
    ("text", "named", "status"),
    [
        ('{"learning_rate": 1}', "learning_rate", 1),
        ("{", "mine.json", 1),
        ("[1]", "mine.json", 1),
        ('{"lr": 0.1,}', "line 1 column", 1),
        ('{"epochs": "many"}', "--epochs", 2),
        ('{"depth": 3, "model": "convnet"}', "0.9.1", 1),
    ],
)
def test_wrong_recipe_file_is_one_line(inside, folder, text, named, status):
    (folder / "mine.json").write_text(text)
    assert named in inside.error("--recipe", "mine.json", status=status)


def test_missing_recipe_file_is_named(inside):
    assert "nowhere.json" in inside.error("--recipe", "nowhere.json")


def test_digits_are_not_mirrored(inside):
    assert "flip" not in DATASET_DEFAULTS["digits"]["augment"]
    out, _ = inside(*QUICK, "--epochs", "1", "--tta", "6", "--augment", "flip")
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert any("test-time augmentation" in note for note in notes)
    assert any("--augment" in note for note in notes)
    assert "6 views" not in out


@pytest.mark.slow
@pytest.mark.parametrize("subset", ["4", "5", "7"])
def test_batches_of_two_leave_no_image_alone(inside, folder, subset):
    """ResNet-18 has batch norm over a single value of each channel, from images of 16 pixels."""
    options = ["--model", "torchvision:resnet18", "--image-size", "16", "--val-fraction", "0"]
    options += ["--precision", "fp32"]  # in bf16 the loss of such batches may overflow
    inside(*DIGITS, *options, "--subset", subset, "--batch-size", "2", "--epochs", "1")
    assert report_of(only_run(folder))["train_images"] == int(subset)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--batch-size", "1"], "--batch-size 1 "),
        (["--micro-batch", "1"], "--micro-batch 1 "),
        (["--subset", "1"], "one training image"),
    ],
)
@pytest.mark.parametrize("size", [["32"], ["48", "--progressive-resizing", "0.5"]])
def test_images_one_at_a_time_are_refused_before_a_run_begins(inside, folder, options, named, size):
    network = ["--model", "torchvision:resnet18", "--image-size", *size]
    error = inside.error(*DIGITS, *network, "--val-fraction", "0", *options, status=2)
    assert named in error and "torchvision:resnet18" in error
    assert list(folder.iterdir()) == []


def test_batches_of_one_image(inside):
    out, _ = inside(*DIGITS, "--fast-dev-run", "--batch-size", "1", "--width", "0.25")
    assert "Accuracy of the network on the 1 test images" in out


TINY_NETWORK = """
from torch import nn

def tiny(classes, channels, image_size):
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, classes))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the command is run by a POSIX shell")
@pytest.mark.parametrize(("called", "model"), [("absolute", "cnn"), ("relative", "my net.py:tiny")])
def test_last_command_works_from_any_folder(folder, called, model):
    """From a folder that is not the program's, with names that a shell has to have quoted."""
    (folder / "my net.py").write_text(TINY_NETWORK)
    script = SCRIPT if called == "absolute" else Path(os.path.relpath(SCRIPT))
    options = [*SMALL, "--epochs", "1", "--out", "it's R&D.pth", "--model", model]
    out, _ = Program(folder, script)(*options)
    (line,) = [line for line in out.splitlines() if line.startswith("Use it: ")]
    Image.new("RGB", (32, 32)).save(folder / "a b.png")
    command = line.removeprefix("Use it: ").replace("IMAGE", "'a b.png'")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "a b.png" in done.stdout, done.stderr
