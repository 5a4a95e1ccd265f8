"""The program as a library: usable in ten lines, also by a file that it runs itself."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import QUICK, REPOSITORY, SCRIPT, SMALL

import image_classification as ic
from classifier.errors import Stopped, UserError

NAMES = [
    "Config",
    "load_data",
    "build_model",
    "train",
    "evaluate",
    "save_checkpoint",
    "load_checkpoint",
]

TEN_LINES = """
from image_classification import Config, load_checkpoint, load_data, train, evaluate

config = Config(dataset="digits", subset=200, width=0.25, epochs=1)
report = train(config)
print(report.results["test_accuracy"])

model, content = load_checkpoint(report.checkpoint)
images, labels = load_data(config).test
print(evaluate(model, images, labels).accuracy)
"""

# A user's network that uses the program which runs it.
FILE_THAT_IMPORTS = """
import sys
import image_classification as ic

assert sys.modules["__main__"].__file__.endswith("image_classification.py")

def network(classes=10, channels=3, image_size=32):
    model = ic.CNN(classes, channels, image_size, width=0.25)
    config = ic.Config(dataset="digits")
    assert isinstance(config, ic.Config)
    return model
"""


@pytest.mark.parametrize("name", NAMES)
def test_name_is_importable_and_documented(name):
    assert getattr(ic, name).__doc__


def test_ten_lines_are_enough(folder, capsys):
    assert len([line for line in TEN_LINES.splitlines() if line]) <= 10
    variables = {}
    exec(compile(TEN_LINES, "ten_lines.py", "exec"), variables)
    *_, printed = capsys.readouterr().out.splitlines()
    assert float(printed) == pytest.approx(variables["report"].results["test_accuracy"])


def test_report_tells_what_the_run_folder_holds(folder):
    """A data set that is given is trained on, whatever the settings say."""
    config = ic.Config(dataset="digits", subset=200, width=0.25, epochs=2)
    data = ic.load_data(config)
    data.name = "mine"
    report = ic.train(config, data)
    assert [row["epoch"] for row in report.history] == [0, 1]
    assert report.run.parent.name == "mine"
    assert report.checkpoint.name == "model_cnn_mine.pth" and report.checkpoint.is_file()
    assert report.results == json.loads((report.run / "report.json").read_text())


def test_own_loop_over_batches(folder):
    """What the README shows: build a model, train it otherwise, keep it as a model file."""
    config = ic.Config(dataset="digits", width=0.25)
    data = ic.load_data(config)
    model = ic.build_model(config, data)
    before = ic.evaluate(model, *data.valid)
    assert before.logits.shape == (len(data.valid.labels), 10)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for indices in torch.randperm(len(data.train.labels)).split(100):
        logits = model(ic.normalise(data.train.images[indices], model))
        torch.nn.functional.cross_entropy(logits, data.train.labels[indices]).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = ic.evaluate(model, *data.valid)
    assert after.accuracy > before.accuracy and after.loss < before.loss

    content = {"model": model.state_dict(), "config": {"width": 0.25}, "classes": data.classes}
    content |= {"mean": data.mean, "std": data.std, "image_size": 32, "metrics": {}, "versions": {}}
    ic.save_checkpoint("mine.pth", content)
    loaded, _ = ic.load_checkpoint("mine.pth")
    assert ic.evaluate(loaded, *data.valid).accuracy == after.accuracy


def test_errors_are_of_one_kind(folder):
    with pytest.raises(UserError, match="--epochs"):
        ic.Config(epochs=0)
    with pytest.raises(UserError, match="nowhere"):
        ic.load_data(ic.Config(dataset="nowhere"))
    with pytest.raises(UserError, match="--device"):
        ic.train(ic.Config(dataset="digits", device="gpu"))
    assert not issubclass(Stopped, UserError)


def test_main_takes_arguments_and_returns_a_status(folder, capsys):
    assert ic.main([*QUICK, "--fast-dev-run"]) == 0
    assert ic.main(["--dataset", "nowhere"]) == 2
    assert ic.main(["--init-from", "nothere.pth"]) == 1


def test_names_of_the_package_have_docstrings():
    for path in [SCRIPT, *(REPOSITORY / "classifier").rglob("*.py")]:
        if path.stat().st_size:
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.slow
def test_users_file_may_import_the_program_that_runs_it(program, folder):
    (folder / "mine.py").write_text(FILE_THAT_IMPORTS)
    program(*SMALL, "--epochs", "1", "--model", "mine.py:network")
    (path,) = folder.glob("model_*.pth")
    content = torch.load(path, weights_only=True)
    assert "stages.0.conv1.weight" in content["model"]


@pytest.mark.slow
def test_importing_prints_and_writes_nothing_and_keeps_the_process_as_it_was(folder):
    code = """
import os, signal, sys
before = dict(os.environ), signal.getsignal(signal.SIGINT), sys.stdout
import torch
threads = torch.get_num_threads()
import image_classification
assert (dict(os.environ), signal.getsignal(signal.SIGINT), sys.stdout) == before
assert torch.get_num_threads() == threads
slow = {"sklearn", "matplotlib", "tensorboard", "kornia", "torchvision", "optuna"}
assert not slow & sys.modules.keys(), slow & sys.modules.keys()
"""
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == process.stderr == ""
    assert list(folder.iterdir()) == []
