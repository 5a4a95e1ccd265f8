"""Runs with augmentations, balanced classes and averaged weights."""

import sys

import pytest
import torch
from conftest import QUICK, only_run, report_of, same, state_of, weights, write_images
from PIL import Image

import image_classification as ic

SIXTEEN_PIXELS = ["--dataset", "digits", "--batch-size", "50", "--image-size", "16"]


# ---- augmentations ----


@pytest.mark.slow
def test_run_with_augmentations_learns(inside, folder):
    steps = "crop=2,rotate=10,brightness,contrast,erase=0.3,mixup,cutmix"
    inside(*SIXTEEN_PIXELS, "--width", "0.5", "--epochs", "6", "--augment", steps)
    assert report_of(only_run(folder))["test_accuracy"] > 0.85


@pytest.mark.slow
@pytest.mark.pictures
def test_each_step_has_a_row_in_the_picture_of_samples(inside, folder):
    heights = {}
    for augment in ("crop=2", "crop=2,randaugment=5,mixup"):
        options = ["--fast-dev-run", "--augment", augment, "--run-dir", augment]
        inside(*SIXTEEN_PIXELS, "--width", "0.25", *options)
        heights[augment] = Image.open(folder / augment / "samples.png").height
    plain, augmented = heights.values()
    # the images, each step, and all steps together
    assert augmented == pytest.approx(5 / 3 * plain, rel=0.05)


@pytest.mark.slow
def test_augmented_run_resumes_bit_for_bit(inside, folder):
    options = [*QUICK, "--device", "cpu"]
    options += ["--augment", "crop,rotate,randaugment,trivialaugment,mixup"]
    options += ["--ema", "--class-balance", "oversample"]
    # what follows would depend on the number of epochs to come
    options += ["--scheduler", "none", "--progressive-resizing", "0"]
    inside(*options, "--epochs", "2", "--run-dir", "whole")
    inside(*options, "--epochs", "1", "--run-dir", "parts")
    inside("--resume", "parts", "--epochs", "2")
    whole, parts = state_of(folder / "whole"), state_of(folder / "parts")
    assert same(parts["model"], whole["model"])
    assert same(parts["ema"], whole["ema"])


def test_missing_kornia_is_named(inside, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    error = inside.error(*QUICK, "--augment", "rotate")
    assert "kornia" in error and "pip install -r requirements-extras.txt" in error
    assert list(folder.iterdir()) == []


# ---- balanced classes ----


@pytest.mark.parametrize(
    "class_balance",
    ["oversample", "undersample", pytest.param("weights", marks=pytest.mark.slow)],
)
def test_run_with_balanced_classes(inside, folder, class_balance):
    write_images(folder / "photos", {"red": 60, "green": 30, "blue": 20})
    counts = ic.load_data(ic.Config(dataset="photos")).train.labels.bincount().tolist()
    options = ["--image-size", "16", "--width", "0.25", "--batch-size", "10", "--epochs", "1"]
    out, _ = inside("--dataset", "photos", *options, "--class-balance", class_balance)
    epoch_size = {
        "oversample": 3 * max(counts),
        "undersample": 3 * min(counts),
        "weights": sum(counts),
    }
    steps = -(-epoch_size[class_balance] // 10)
    assert f" {steps} steps an epoch" in out
    assert report_of(only_run(folder))["train_images"] == sum(counts)


# ---- averaged weights ----


def test_average_of_the_weights_is_tested_and_kept(inside, folder):
    options = ["--ema", "--epochs", "1", "--scheduler", "none", "--batch-size", "40"]
    inside(*QUICK, *options)
    last = state_of(only_run(folder))
    kept = weights(folder / "model_cnn_digits.pth")
    assert not torch.equal(last["model"]["classifier.weight"], kept["classifier.weight"])
    assert torch.equal(last["ema"]["module.classifier.weight"], kept["classifier.weight"])

    valid = ic.load_data(ic.Config(dataset="digits", image_size=16)).valid
    model, _ = ic.load_checkpoint(folder / "model_cnn_digits.pth")
    with torch.autocast("cpu", enabled="bfloat16" in last["environment"]["precision"]):
        loss = ic.evaluate(model, *valid).loss
    assert loss == pytest.approx(last["history"][0]["valid_loss"], rel=0.02)
