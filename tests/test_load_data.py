"""Which data set --dataset names, and the digits that take the place of CIFAR-10."""

from pathlib import Path

import pytest
import torch
from conftest import write_images

from classifier.config import Config
from classifier.datasets import download, load, named
from classifier.datasets.load import dataset_available, dataset_settings, load_data
from classifier.errors import DatasetUnavailable, UsageError, UserError

DEAD = "http://127.0.0.1:9/a.tar.gz"  # nobody listens there


@pytest.fixture
def offline(folder, monkeypatch):
    monkeypatch.setattr(download, "SOURCES", [DEAD])


@pytest.fixture
def loaded_folders(monkeypatch):
    """The calls of load_folder, which does nothing."""
    calls = []
    monkeypatch.setattr(load, "load_folder", lambda *arguments: calls.append(arguments))
    return calls


# ---- digits ----


def test_digits():
    data = load_data(Config(dataset="digits"))
    assert data.name == "digits" and data.classes == list("0123456789")
    assert not data.flip_keeps_label and not data.fallback_reason
    sizes = [len(split.labels) for split in (data.train, data.valid, data.test)]
    assert sum(sizes) == 1797 and sizes[2] == data.num_test_images == 359
    assert data.train.images.shape[1:] == (3, 32, 32) and data.train.images.dtype == torch.uint8
    assert data.train.images.max() == 255 and data.train.labels.dtype == torch.int64
    assert data.test.images.shape[1:] == (3, 32, 32)


def test_test_images_do_not_depend_on_the_settings():
    first = load_data(Config(dataset="digits", subset=20, val_fraction=0.0)).test
    second = load_data(Config(dataset="digits", val_fraction=0.5, seed=7)).test
    assert first.images.equal(second.images)


# ---- the fallback ----


@pytest.mark.usefixtures("offline")
def test_digits_take_the_place_of_cifar10(capsys):
    data = load_data(Config(dataset="auto"))
    assert data.name == "digits"
    for part in (DEAD, download.ARCHIVE, download.ARCHIVE_SHA256, "--mirror"):
        assert part in data.fallback_reason
    assert data.fallback_reason in capsys.readouterr().out


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("settings", [{"dataset": "cifar10"}, {"recipe": "default"}])
def test_no_fallback_for_a_named_data_set_or_a_recipe(settings):
    with pytest.raises(DatasetUnavailable, match="--mirror"):
        load_data(Config(**settings))


@pytest.mark.usefixtures("offline")
def test_no_fallback_for_a_damaged_archive(folder):
    (folder / download.ARCHIVE).write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=download.ARCHIVE):
        load_data(Config(data_dir=str(folder)))


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_cifar10(cifar10, dataset):
    data = load_data(Config(dataset=dataset, data_dir=str(cifar10), subset=10))
    assert data.name == "CIFAR10" and not data.fallback_reason


def test_mirror_and_data_dir_are_used(folder, monkeypatch):
    calls = []

    def download_archive(*arguments):
        calls.append(arguments)
        raise DatasetUnavailable("nothing")

    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.setattr(download, "download_archive", download_archive)
    with pytest.raises(DatasetUnavailable):
        load_data(Config(dataset="cifar10", data_dir="~/here", mirror="http://teacher"))
    assert calls == [(folder / "here", "http://teacher")]


# ---- names and folders ----


@pytest.mark.parametrize("name", named.NAMES)
def test_named_data_sets(monkeypatch, name):
    config = Config(dataset=name)
    monkeypatch.setattr(load, "load_named", lambda *arguments: arguments)
    assert load_data(config) == (name, config)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("cifar", "did you mean cifar10"),
        ("CIFAR100", "did you mean cifar100"),
        ("fashion", "did you mean fashion-mnist"),
        ("Digits", "did you mean digits"),
        ("zebra", "choose from auto, cifar10, digits, cifar100, mnist"),
        ("", "choose from auto"),
        ("photos/train", "no such folder"),
        ("./digits", "no such folder"),
    ],
)
def test_unknown_data_set(folder, dataset, words):
    with pytest.raises(UsageError, match=f"--dataset {dataset}.*{words}"):
        load_data(Config(dataset=dataset))


def test_file_is_no_folder(folder):
    (folder / "photos").touch()
    with pytest.raises(UsageError, match="--dataset photos"):
        load_data(Config(dataset="photos"))


def test_name_of_a_data_set_is_not_a_folder(folder):
    write_images(folder / "digits", {"red": 20, "green": 20})
    assert load_data(Config(dataset="digits")).classes == list("0123456789")
    assert load_data(Config(dataset="./digits")).classes == ["green", "red"]


def test_folder_in_the_home_folder(folder, loaded_folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    (folder / "photos").mkdir()
    config = Config(dataset="~/photos")
    load_data(config)
    assert loaded_folders == [(config, None)]


@pytest.mark.parametrize(
    ("settings", "image_size"),
    [
        ({}, None),
        ({"image_size": 48}, 48),
        ({"pretrained": True}, 224),
        ({"pretrained": True, "image_size": 48}, 48),
    ],
)
def test_image_size_of_a_folder(folder, loaded_folders, settings, image_size):
    (folder / "photos").mkdir()
    config = Config(dataset="photos", model="torchvision:resnet18", **settings)
    load_data(config, imagenet_size={"torchvision:resnet18": 224}.get)
    assert loaded_folders == [(config, image_size)]


def test_image_size_without_imagenet_sizes(folder, loaded_folders):
    (folder / "photos").mkdir()
    config = Config(dataset="photos", model="torchvision:resnet18", pretrained=True)
    load_data(config)
    assert loaded_folders == [(config, None)]


# ---- the data set of a trained model ----


def test_only_settings_of_the_data_are_taken_over():
    settings = {
        "dataset": "mnist",
        "data_dir": "there",
        "val_fraction": 0.2,
        "subset": 5,
        "out": "somewhere",
        "mirror": "http://stranger",
        "image_size": 99,
        "run_dir": "anywhere",
    }
    expected = {"dataset": "mnist", "data_dir": "there", "val_fraction": 0.2, "subset": 5}
    assert dataset_settings(settings, 28) == (expected | {"image_size": 28}, False)
    Config(**dataset_settings(settings, 28)[0])


def test_model_without_settings_is_one_for_cifar10(folder):
    assert dataset_settings({}, 32) == ({"dataset": "cifar10", "image_size": 32}, False)
    assert not dataset_available({}, 32)
    (folder / "data").mkdir()
    (folder / "data" / "test_batch").touch()
    assert dataset_available({}, 32)


def test_data_dir_of_a_folder_is_the_folder(folder):
    settings = {"dataset": "photos", "data_dir": "cache"}
    assert dataset_settings(settings, 48, "elsewhere") == (
        {"dataset": "elsewhere", "data_dir": "cache", "image_size": 48},
        True,
    )
    assert not dataset_available(settings, 48)
    assert not dataset_available(settings, 48, "elsewhere")
    (folder / "elsewhere").mkdir()
    assert dataset_available(settings, 48, "elsewhere")


def test_data_dir_of_a_named_data_set_is_where_it_is():
    settings, is_folder = dataset_settings({"dataset": "svhn", "data_dir": "old"}, 32, "new")
    assert settings == {"dataset": "svhn", "data_dir": "new", "image_size": 32}
    assert not is_folder


@pytest.mark.parametrize(
    ("dataset", "path"),
    [
        ("cifar10", "test_batch"),
        ("cifar10", "cifar-10-batches-py/test_batch"),
        ("cifar100", "cifar-100-python"),
        ("mnist", "MNIST"),
        ("fashion-mnist", "FashionMNIST"),
        ("svhn", "test_32x32.mat"),
        ("stl10", "stl10_binary"),
    ],
)
def test_data_set_on_disk_is_available(folder, dataset, path):
    settings = {"dataset": dataset, "data_dir": "there"}
    assert not dataset_available(settings, 32)
    Path("there", path).mkdir(parents=True)
    assert dataset_available(settings, 32)
    assert not dataset_available(settings, 32, "elsewhere")
    assert dataset_available({"dataset": dataset}, 32, "there")


def test_digits_are_always_available(folder):
    assert dataset_available({"dataset": "digits"}, 32)
    assert dataset_available({"dataset": "digits", "data_dir": "nowhere"}, 32, "elsewhere")
