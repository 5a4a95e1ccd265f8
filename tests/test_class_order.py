"""Class names with numbers: how they are sorted, and models that were made with another order."""

import json

import pytest
import torch
from conftest import report_of, same, state_of, weights, write_images

import image_classification as ic
import inference
from classifier.datasets import folder_layout
from classifier.text import natural_key

TINY = ["--dataset", "photos", "--width", "0.25", "--image-size", "16", "--val-fraction", "0.2"]
BRIEF = [*TINY, "--epochs", "2"]
CLASSES = ["1", "2", "10"]
OLD_ORDER = ["1", "10", "2"]


@pytest.mark.parametrize(
    "names",
    [
        ["1", "2", "10"],
        ["img2", "img10"],
        ["a", "a1", "a1b", "a1b2", "a1b10", "b"],
        ["01", "1", "002", "2", "3"],
        ["Zebra", "cat", "dog"],
        ["0", "-1", "x"],
        ["7", "9" * 5000],
        ["²", "Ü", "Ü 2", "数据 3", "数据 20"],
    ],
)
def test_numbers_come_by_their_size(names):
    shuffled = names[1:] + names[:1]
    assert sorted(shuffled, key=natural_key) == names


@pytest.fixture
def numbered(folder):
    """A folder photos/ with the classes 1, 2 and 10."""
    write_images(folder / "photos", {"10": 30, "2": 24, "1": 20})
    return folder / "photos"


@pytest.fixture
def old_version(monkeypatch):
    """The program as it was when it sorted names by their characters; call it to update it."""
    monkeypatch.setattr(folder_layout, "natural_key", lambda name: ([], name))
    return lambda: monkeypatch.setattr(folder_layout, "natural_key", natural_key)


def test_classes_of_a_folder(numbered):
    assert ic.load_data(ic.Config(dataset="photos")).classes == CLASSES


@pytest.mark.slow
def test_run_with_the_old_order_goes_on_bit_for_bit(inside, folder, numbered, old_version):
    inside(*BRIEF, "--run-dir", "unbroken")
    inside(*TINY, "--epochs", "1", "--run-dir", "short")
    unbroken = state_of(folder / "unbroken")
    assert unbroken["classes"] == OLD_ORDER
    inside(*BRIEF, "--run-dir", "whole")
    (folder / "whole" / "report.json").unlink()
    old_version()
    inside("--resume", "short", "--epochs", "2")
    inside("--resume", "whole")
    for run in ("short", "whole"):
        resumed = state_of(folder / run)
        assert resumed["classes"] == OLD_ORDER
        assert resumed["fingerprint"] == unbroken["fingerprint"]
    assert same(resumed["model"], unbroken["model"])
    assert report_of(folder / "whole")["class_accuracy"].keys() == set(CLASSES)


@pytest.mark.slow
def test_tools_go_by_the_names_in_a_model(inside, tool_inside, folder, numbered, old_version):
    inside(*TINY, "--epochs", "15", "--run-dir", "run")
    accuracy = report_of(folder / "run")["test_accuracy"]
    old_version()
    (path,) = folder.glob("model_*.pth")
    model = inference.load_model(path, "cpu")
    assert model.classes == OLD_ORDER
    data = inference.load_dataset_of(model)
    assert data.classes == OLD_ORDER
    tested = ic.evaluate(model.require_network(), data.test.images, data.test.labels)
    assert tested.accuracy == pytest.approx(accuracy)
    assert accuracy > 0.9

    out, _ = tool_inside("explain")("--checkpoint", path)
    assert "gallery_correct" in out
    images = [str(numbered / name / "0.png") for name in CLASSES]
    out, _ = tool_inside("inference")(*images, "--checkpoint", path, "--format", "json")
    assert [each["answer"] for each in json.loads(out)] == CLASSES


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cnn", "torchvision:squeezenet1_1"])
def test_starting_weights_are_taken_by_the_names_of_their_classes(
    inside, folder, numbered, old_version, model, imagenet
):
    settings = ["--model", model, "--image-size", "32"]
    if model != "cnn":
        settings = [*settings, "--pretrained"]
    inside(*TINY[:2], *settings, "--epochs", "1", "--out", "old.pth")
    old_version()
    options = {"dataset": "photos", "model": model, "image_size": 32, "init_from": "old.pth"}
    config = ic.configure(**options, pretrained=model != "cnn")
    data = ic.load_data(config)
    assert data.classes == CLASSES
    old, content = ic.load_checkpoint("old.pth")
    assert content["classes"] == OLD_ORDER
    config = ic.resolve.resolve_defaults(config, data, ic.DEFAULT_RECIPE)
    new = ic.build_model(config, data).eval()
    rows = [OLD_ORDER.index(name) for name in CLASSES]
    images = ic.normalise(data.test.images, old)
    with torch.no_grad():
        assert torch.equal(new(images), old(images)[:, rows])


def test_weights_for_other_classes_keep_no_last_layer(inside, folder, numbered, capsys):
    inside(*TINY, "--epochs", "1", "--out", "numbers.pth")
    (numbered / "10").rename(numbered / "11")
    capsys.readouterr()
    out, _ = inside(*TINY, "--epochs", "1", "--out", "other.pth", "--init-from", "numbers.pth")
    assert "last layer is reinitialised" in out
    assert weights("other.pth").keys() == weights("numbers.pth").keys()
