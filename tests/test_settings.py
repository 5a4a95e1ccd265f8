"""Settings, command line and packaging."""

import dataclasses
import os
import re
import shutil
import sys

import ablations
import pytest
import scaling
import torch
from conftest import QUICK, REPOSITORY, SCRIPT, Program

import image_classification as ic


def test_script_metadata_equals_requirements():
    block = re.search(r"# /// script\n(.*?)# ///", SCRIPT.read_text(encoding="utf-8"), re.S).group(1)
    inline = re.findall(r'"(\S+)",', block)
    lines = (REPOSITORY / "requirements.txt").read_text().split()
    assert inline == lines and len(lines) == 8
    assert '# requires-python = ">=3.10"' in block
    assert "-r requirements.txt" in (REPOSITORY / "requirements-extras.txt").read_text()
    assert "-r requirements-extras.txt" in (REPOSITORY / "requirements-dev.txt").read_text()


def test_every_setting_is_in_help_and_readme(inside):
    text = inside("--help")[0]
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(ic.Config):
        assert re.search(rf"^  {ic.option(field.name)}\b", text, re.M), field.name
        assert f"`{ic.option(field.name)}" in readme, field.name


@pytest.mark.parametrize(("arguments", "words"), [
    ("--epochs 0", "--epochs 0: must be at least 1"), ("--epochs -3", "at least 1"),
    ("--epochs ten", "invalid int value: 'ten'"), ("--batch-size 0", "at least 1"), ("--lr -1", "at least 0"),
    ("--lr nan", "at least 0"), ("--lr inf", "below inf"), ("--minutes -1", "at least 0"),
    ("--val-fraction 1", "below 1"), ("--val-fraction -0.1", "at least 0"),
    ("--early-stopping 2 --val-fraction 0", "needs validation images"),
    ("--recipe defualt", "did you mean default?"), ("--model cnnn", "did you mean cnn?"),
    ("--model cn", "did you mean cnn?"),  # not fcn
    ("--dataset ../nowhere", "there is no folder ../nowhere"), ("--dataset=", "or name a folder of images"),
    ("--model torchvision:resnet19", "no classifier resnet19, but resnet18"),
    ("--pretrained", "--pretrained is no option of the network cnn"),
    ("--dataset cifar-100", "unknown data set cifar-100: did you mean cifar100?"),
    ("--dataset CIFAR10", "did you mean cifar10?"), ("--dataset nowhere", "or name a folder of images"),
    ("--optimizer lion", "invalid choice: 'lion'"),
    ("--model nowhere.py:small", "there is no Python file nowhere.py"),
    ("--model resnet18 --recipe finetune", "no option of the network resnet18, but of torchvision:NAME"),
    ("--dataset digits --val-fraction 0.001", "leaves none to train or validate on: with 0, all are trained on"),
    ("--augment rotate,flip,rotate=10", "each step once"), ("--augment none,flip", "or none alone"),
    ("--augment none=3", "none take no number"),
    ("--augment flip,", "'' is none of flip"), ("--augment erase=75%", "must be a number above 0"),
    ("--augment turn", "'turn' is none of flip, crop, rotate"), ("--augment flip=2", "flip and none take no number"),
    ("--augment crop=1.5", "crop=PIXELS a whole one"),
    ("--augment flip,rotate=400", "rotate=400 must be a number above 0 and at most 180"),
    ("--augment hue=x", "hue=x must be a number above 0"), ("--make-imbalanced 1", "below 1"),
    ("--depth 3", "--depth is no option of the network cnn"),
    ("--model fcn --width 2", "--width is no option of the network fcn"),
    ("--freeze", "needs --init-from FILE or --pretrained"), ("--augment crop=32", "out of sight"),
    ("--test-views 3", "invalid choice"), ("--mirror teacher:8000", "has to begin with http://"),
    ("--epoch 3", "unrecognized arguments: --epoch 3: did you mean --epochs?"),
    ("--learning-rate 3", "did you mean --lr?"), ("--learning-rate=3", "did you mean --lr?"),
])  # fmt: skip
def test_wrong_usage_is_status_2_and_one_line(arguments, words, inside, folder):
    digits = [] if "--dataset" in arguments else ["--dataset", "digits"]
    line = inside.error(*arguments.split(), *digits, status=2)
    assert line.startswith("image_classification.py: error: ") and words in line and not list(folder.rglob("*.pth"))
    assert "did you mean" not in line or line.endswith("?")
    assert "below inf" not in line or "inf" in arguments


def test_missing_files_are_named(inside):
    for first in (QUICK, ["--dataset", "nowhere"]):  # before the data are looked for
        assert "nothere.pth: there is no such file" in inside.error(*first, "--init-from", "nothere.pth")
    with pytest.raises(FileNotFoundError):
        inside(*QUICK, "--init-from", "nothere.pth", "--debug")
    error = inside.error(*QUICK, "--init-from", ".")
    assert "space" not in error and len(error) < 80
    for named, where in (("last", "runs"), ("nothere", "nothere")):
        assert inside.error("--resume", named).endswith(f"--resume {named}: there is no run in {where}")


def test_digits_are_not_mirrored(inside):
    out, _ = inside(*QUICK, "--test-views", "6", "--augment", "flip", "--epochs", "1")
    assert "note: tested on one view of each image: mirroring changes what digits show" in out and "6 views" not in out
    assert "better without flip in --augment" in out and "flip" not in ic.FOR_DATASET["digits"]["augment"]


@pytest.mark.parametrize("package", ["sklearn", "torchvision", "torchsummary", "tensorboard", "matplotlib"])
def test_missing_package_is_named_before_anything_is_done(inside, folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    error = inside.error(*QUICK)
    assert f"No module named '{package}'" in error and "pip install -r requirements.txt" in error
    assert ic.PAIR not in error and not list(folder.iterdir())


def test_torchvision_that_does_not_fit_is_named(program, folder, cifar10):
    (folder / "torchvision").mkdir()
    misfit = "raise RuntimeError('operator torchvision::nms does not exist')"
    (folder / "torchvision" / "__init__.py").write_text(misfit)
    error = program.error("--data-dir", cifar10, env={"PYTHONPATH": str(folder)})
    assert "torchvision::nms" in error and "--force-reinstall torch torchvision" in error


def test_cpu_only_torch_beside_an_nvidia_driver_is_named(inside, folder, monkeypatch):
    tool = folder / ("nvidia-smi.bat" if sys.platform == "win32" else "nvidia-smi")
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    mend = "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/"
    if not torch.cuda.is_available():
        assert mend in inside.error(*QUICK, "--device", "cuda")
        assert ic.PAIR not in inside.error(*QUICK, "--device", "cuda")
    assert mend in inside(*QUICK, "--fast-dev-run")[0]


@pytest.mark.parametrize("device", ["gpu", "cuda"])
def test_device_that_is_not_there(inside, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    assert f"--device {device} is not to be had" in inside.error(*QUICK, "--device", device)


def test_precision_follows_the_hardware(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for feature, expected in [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda feature=feature: {feature: True}, raising=False)
        assert ic.choose_precision("auto", cpu) == expected
    for native, expected in [(True, torch.bfloat16), (False, torch.float16)]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert ic.choose_precision("auto", cuda) == expected
    assert ic.choose_precision("fp16", cpu) == torch.float16
    assert ic.choose_precision("auto", torch.device("mps")) == torch.float32


def test_config_and_recipe_from_python():
    assert ic.Config(lr=1).lr == 1.0
    for wrong in ({"epochs": 2.5}, {"optimizer": "lion"}, {"minutes": float("nan")}, {"debug": 1}):
        with pytest.raises(ic.UsageError):
            ic.Config(**wrong)
    config = ic.configure(recipe="accuracy94", epochs=3)
    assert (config.width, config.epochs, config.val_fraction) == (2.0, 3, 0.0)
    for name in ic.RECIPES:
        ic.configure(recipe=name)


def test_recipe_in_a_file(inside, folder):
    recipe = folder / "mine.json"
    recipe.write_text('{"dataset": "digits", "subset": 200, "epochs": 1, "width": 0.25}')
    out, _ = inside("--recipe", "mine.json", "--epochs", "2")
    assert "Epoch 0001" in out and "Epoch 0002" not in out
    for text, words, status in (
        ('{"learning_rate": 1}', "learning_rate", 1), ("{", '{"epochs": 5}', 1), ("[1]", '{"epochs": 5}', 1),
        ('"lr"', '{"epochs": 5}', 1), ('{"lr": 0.1,}', "line 1 column", 1), ('{"epochs": "many"}', "--epochs", 2),
    ):  # fmt: skip
        recipe.write_text(text)
        assert words in inside.error("--recipe", "mine.json", status=status)
    assert "nowhere.json: there is no such file" in inside.error("--recipe", "nowhere.json")


def test_batches_of_one_image(inside, cifar10):
    inside("--data-dir", cifar10, "--fast-dev-run", "--batch-size", "1", "--epochs", "1", "--width", "0.25")


@pytest.mark.parametrize("option", ["--recipe beginner", "--minutes 1", "--repeat 2", "--ema", "--grad-clip 1"])
def test_script_alone_says_what_an_alternative_needs(folder, option):
    alone = Program(folder, shutil.copy(SCRIPT, folder / SCRIPT.name))
    error = alone.error("--dataset", "digits", *option.split())
    assert f"{option.split()[0]} " in error and "needs the folder alternatives/" in error
    assert not (folder / "runs").exists()


def test_what_benchmarks_change_in_the_script_is_there():
    for name, (options, replacements) in ablations.VARIANTS.items():
        text = SCRIPT.read_text(encoding="utf-8")
        for old, new in replacements:
            assert old in text, name
            text = text.replace(old, new)
        compile(text, name, "exec")
        ic.parse([*options])
    assert all(SCRIPT.read_text(encoding="utf-8").count(old) == 1 for old, _ in scaling.SILENT)


def test_an_ablation_runs_beside_alternatives(monkeypatch, cifar10):
    monkeypatch.setitem(ablations.VARIANTS, "AdamW", (["--optimizer", "adamw", "--fast-dev-run"], []))
    result = ablations.run("AdamW", 0, str(cifar10), 1)
    assert result["seconds"] > 0 and 0 <= result["valid_accuracy"] <= 1


def test_version_is_the_same_everywhere(inside):
    version = inside("--version")[0].split()[1].rstrip(",")
    newest = re.search(r"^## (\S+),", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    cited = re.search(r"^version: (\S+)", (REPOSITORY / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert version == newest == cited == ic.__version__


def test_examples_of_additions_are_the_real_ones():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```diff\n\+\+\+ (\S+)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    for path, block in blocks:
        there = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()
        assert all(line[1:] in there for line in block.splitlines()), path
