"""Training from a folder of images, through the whole program."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import (
    epochs_of,
    load_photos,
    only_run,
    report_of,
    same,
    wait_for,
    weights,
    write_images,
)

import image_classification as ic
from classifier.datasets import decode, image_cache
from classifier.datasets import folder as folder_module
from classifier.datasets.memmap_images import MemmapImages

PHOTOS = ["--dataset", "photos", "--width", "0.25"]
BRIEFLY = [*PHOTOS, "--epochs", "1"]


@pytest.fixture(autouse=True)
def home(monkeypatch, folder):
    """Decoded images do not go into the user's cache."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that have been decoded, in this process."""
    names = []
    original = decode.decode

    def decode_and_note(path, *arguments):
        names.append(path.name)
        return original(path, *arguments)

    monkeypatch.setattr(decode, "decode", decode_and_note)
    return names


def count_cached(folder):
    """How many images the cache holds."""
    files = folder.glob("data/.decoded/*/index")
    return sum(path.stat().st_size for path in files) // image_cache.RECORD.itemsize


# ---- What is learned and written -----------------------------------------------------------------


def test_class_folders_are_split_and_learned(inside, folder, photos):
    out, _ = inside(*PHOTOS, "--epochs", "12", "--image-size", "24")
    assert out.count("all: 110 images (blue 30, green 40, red 40)") == 1
    assert "Accuracy for class green is: " in out and "Accuracy for class red   is: " in out
    run = only_run(folder)
    report = report_of(run)
    assert report["test_accuracy"] > 0.8 and 74 <= report["train_images"] <= 86
    num_tested = [sum(row) for row in report["confusion_matrix"]]
    assert all(5 <= count <= 10 for count in num_tested)
    assert out.count(" tested)") == 3 and f", {num_tested[0]} tested)" in out
    assert set(report["recall"]) == {"red", "green", "blue"}
    assert run.parent.name == "photos"
    data_report = json.loads((run / "data_report.json").read_text())
    assert data_report["images_per_class"] == {"all": {"blue": 30, "green": 40, "red": 40}}
    _, content = ic.load_checkpoint(folder / "model_cnn_photos.pth")
    assert content["classes"] == ["blue", "green", "red"]
    out, _ = inside("--resume", "last", "--epochs", "13")
    assert "Epoch 0012" in out and "Epoch 0011" not in out


def test_class_without_test_images_is_not_called_the_worst(inside, folder):
    """Whatever its name: scikit-learn's report has rows called accuracy and macro avg."""
    write_images(folder / "photos" / "train", {"red": 20, "green": 20, "accuracy": 20})
    write_images(folder / "photos" / "test", {"red": 5, "green": 5}, seed=1)
    out, _ = inside(*PHOTOS, "--epochs", "3")
    assert "Accuracy for class accuracy is: -  (not tested)" in out
    report = report_of(only_run(folder))
    for name in ("class_accuracy", "recall", "precision", "f1"):
        assert report[name]["accuracy"] is None and report[name]["red"] is not None, name
    assert "worst class: accuracy" not in out
    assert "Accuracy for class red      is: " in out  # as wide as the longest


def test_class_names_are_shown_as_they_are(inside, folder, recwarn):
    write_images(folder / "photos", {"under_$10": 10, "$10_$20": 10, "\u718a": 10})
    out, _ = inside(*BRIEFLY)
    assert "Accuracy for class under_$10 is: " in out
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


def test_folder_with_the_name_of_a_data_set(inside, folder):
    write_images(folder / "in" / "CIFAR10", {"red": 20, "green": 20})
    (folder / "model_cnn.pth").write_text("precious")
    inside("--dataset", folder / "in" / "CIFAR10", *BRIEFLY[2:])
    assert (folder / "model_cnn.pth").read_text() == "precious"
    assert (folder / "model_cnn_CIFAR10-images.pth").exists()


@pytest.mark.parametrize(("accuracy", "hint"), [(0.8, False), (0.5, True), (0.0, True)])
def test_hint_that_a_run_learned_little_depends_on_the_classes(
    inside, folder, monkeypatch, accuracy, hint
):
    """Of ten classes a half is much; of two it is what guessing gives."""
    write_images(folder / "photos", {"red": 20, "green": 20})
    one_hot = torch.eye(2)

    def evaluate(model, images, labels, *_, **__):
        return ic.Evaluation(0.5, accuracy, one_hot[labels])

    monkeypatch.setattr(ic, "evaluate", evaluate)
    out, _ = inside(*BRIEFLY)
    assert ("guessing" in out) == hint


@pytest.mark.slow
def test_few_photographs_are_enough_to_tune_a_pretrained_network(inside, folder, imagenet):
    write_images(folder / "photos", {"red": 12, "green": 12})
    options = ["--recipe", "finetune", "--model", "torchvision:squeezenet1_1"]
    out, _ = inside("--dataset", "photos", *options, "--image-size", "32", "--epochs", "1")
    assert ", 2 steps an epoch" in out
    assert (folder / "model_torchvision-squeezenet1_1_photos.pth").exists()


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({}, "no class folders"),
        ({"red": 3, "green": 3, "yellow": 0}, "yellow"),
        ({"red": 3, "green": 3, ".": 1}, "0.png"),
    ],
)
def test_folder_that_is_no_data_set_leaves_no_run(inside, folder, layout, words):
    (folder / "photos").mkdir()
    write_images(folder / "photos", layout)
    assert words in inside.error(*BRIEFLY)
    assert not (folder / "runs").exists()


# ---- Resuming ------------------------------------------------------------------------------------


def test_folder_is_found_again_from_elsewhere(inside, folder, photos, monkeypatch):
    inside(*BRIEFLY, "--image-size", "32")
    run = only_run(folder)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    inside("--resume", run, "--epochs", "2", "--data-dir", "unused", "--debug")
    assert epochs_of(run) == [0, 1]


def test_changed_folder_is_not_resumed(inside, folder, photos):
    inside(*BRIEFLY)
    run = only_run(folder)
    inside("--resume", "last", "--dataset", "photos", "--epochs", "2")
    assert epochs_of(run) == [0, 1]
    write_images(folder / "other", {"red": 5, "green": 1}, seed=9)
    for path in (folder / "other" / "red").iterdir():
        shutil.copy(path, photos / "red")  # as many as before, five of them others
    report = (run / "report.json").read_bytes()
    assert str(run.relative_to(folder)) in inside.error("--resume", "last", "--epochs", "3")
    assert (run / "report.json").read_bytes() == report


# ---- The image cache -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--val-fraction 0 --subset 50 --class-balance oversample",
        "--augment flip,crop=2,erase --tta 6",
    ],
)
def test_images_left_on_disk_train_the_same(inside, photos, monkeypatch, options):
    settings = [*PHOTOS, "--precision", "fp32", "--epochs", "2", "--image-size", "24"]
    settings += options.split()
    printed = []
    for name, most in (("memory", folder_module.MAX_BYTES_IN_MEMORY), ("disk", 0)):
        monkeypatch.setattr(folder_module, "MAX_BYTES_IN_MEMORY", most)
        out, _ = inside(*settings, "--run-dir", name)
        lines = [line for line in out.splitlines() if line.startswith(("Epoch", "Accuracy"))]
        printed.append([line.partition(", train acc")[0] for line in lines])
    assert printed[0] == printed[1] and len(printed[0]) >= 6
    memory, disk = (weights(f"{name}/model_cnn_photos.pth") for name in ("memory", "disk"))
    assert same(memory, disk)
    assert isinstance(load_photos().train.images, MemmapImages)
    out, _ = inside("--resume", "disk", "--epochs", "3")
    assert "Epoch 0002" in out


def test_images_are_decoded_once_for_several_runs(inside, photos, decoded):
    inside(*BRIEFLY, "--run-dir", "first")
    assert len(decoded) == 110
    decoded.clear()
    inside(*BRIEFLY, "--run-dir", "second", "--seed", "1")
    assert not decoded


DECODE_SLOWLY = """
import time
from classifier.datasets import decode, image_cache

original = decode.decode

def decode_slowly(*arguments):
    time.sleep(0.05)
    return original(*arguments)

decode.decode = decode_slowly
image_cache.WRITE_BYTES = 0
image_cache.THREADS = 2
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_decoding_that_was_killed_goes_on(program, inside, folder, photos, decoded):
    process = program.start(*BRIEFLY, patch=DECODE_SLOWLY)
    wait_for(lambda: count_cached(folder) >= 40 or process.poll() is not None)
    process.kill()
    process.communicate()
    kept = count_cached(folder)
    inside(*BRIEFLY)
    assert 40 <= kept < 110 and len(decoded) == 110 - kept


def test_cache_that_cannot_be_written_is_put_into_the_home_folder(
    inside, folder, photos, unwritable
):
    (folder / "data").mkdir()
    unwritable(folder / "data")
    out, _ = inside(*BRIEFLY)
    assert re.search("^note: data.*home", out, re.MULTILINE)
    cache = folder / "home" / ".cache" / "image_classification" / ".decoded"
    assert list(cache.glob("photos-*/images"))


def test_full_disk_while_decoding_is_named(inside, folder, photos, small_disk, monkeypatch):
    small_disk(600)
    monkeypatch.setattr(image_cache, "WRITE_BYTES", 0)
    monkeypatch.setattr(image_cache, "THREADS", 2)
    error = inside.error(*BRIEFLY, "--data-dir", "disk")
    assert "No space left on device" in error and ".decoded" in error
    assert not (folder / "runs").exists()


def test_damaged_cache_is_named(inside, folder, photos):
    load_photos()
    (path,) = folder.glob("data/.decoded/*/images")
    path.write_bytes(bytes(path.stat().st_size))
    assert path.parent.name in inside.error(*BRIEFLY)
