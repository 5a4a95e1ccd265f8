"""Which data set --dataset names, and the digits that take the place of CIFAR-10."""

import os
from pathlib import Path, PurePosixPath

import pytest
import torch
from conftest import write_images

from classifier.config import Config
from classifier.datasets import download, load, named
from classifier.datasets.cifar10 import MD5
from classifier.datasets.load import (
    data_dir_to_reuse,
    dataset_available,
    find_source,
    is_same,
    load_data,
)
from classifier.errors import DatasetUnavailable, UsageError, UserError
from classifier.foreign_paths import (
    existing_folder,
    full_path,
    is_network_path,
    refuse_network_path,
)

DEAD = "http://127.0.0.1:9/a.tar.gz"  # nobody listens there


@pytest.fixture
def offline(folder, monkeypatch):
    monkeypatch.setattr(download, "SOURCES", [DEAD])


@pytest.fixture
def loaded_folders(monkeypatch):
    """The calls of load_folder, which does nothing."""
    calls = []
    monkeypatch.setattr(load, "load_folder", lambda *arguments, **others: calls.append(arguments))
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
    assert load_data(config) == (name, config, True)


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
    load_data(config, published_size={"torchvision:resnet18": 224}.get)
    assert loaded_folders == [(config, image_size)]


def test_image_size_without_sizes_of_networks(folder, loaded_folders):
    (folder / "photos").mkdir()
    config = Config(dataset="photos", model="torchvision:resnet18", pretrained=True)
    load_data(config)
    assert loaded_folders == [(config, None)]


# ---- the data set of a trained model ----


def put(dataset, data_dir):
    """Files that look like this data set, as if it had been downloaded; returns the folder."""
    names = [f"cifar-10-batches-py/{name}" for name in MD5]
    if dataset != "cifar10":
        names = [named.DATASETS[dataset].on_disk]
    for name in names:
        Path(data_dir, name).parent.mkdir(parents=True, exist_ok=True)
        Path(data_dir, name).touch()
    return data_dir


def test_only_settings_of_the_data_are_taken_over(folder):
    put("mnist", "there")
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
    source = find_source(settings, 28)
    expected = {"dataset": "mnist", "data_dir": "there", "val_fraction": 0.2, "subset": 5}
    assert source.settings == expected | {"image_size": 28}
    assert not source.is_folder and source.is_named_by_file
    Config(**source.settings)


def test_model_without_settings_is_one_for_cifar10(folder):
    source = find_source({}, 32)
    assert source.settings == {"dataset": "cifar10", "data_dir": "data", "image_size": 32}
    assert not source.is_folder and not source.is_named_by_file
    assert find_source({"dataset": "auto"}, 32) == source
    assert not dataset_available({}, 32)
    (folder / "data").mkdir()
    (folder / "data" / "test_batch").touch()
    assert not dataset_available({}, 32)  # a download that was not finished
    put("cifar10", "data")
    assert dataset_available({}, 32)


def test_data_dir_of_a_folder_is_the_folder(folder):
    settings = {"dataset": "photos", "data_dir": "cache"}
    source = find_source(settings, 48, "elsewhere")
    there = str(folder / "elsewhere")
    assert source.settings == {"dataset": there, "data_dir": "data", "image_size": 48}
    assert source.is_folder and not source.is_named_by_file
    assert find_source(settings, 48).is_named_by_file
    assert not dataset_available(settings, 48)
    assert not dataset_available(settings, 48, "elsewhere")
    (folder / "elsewhere").mkdir()
    assert dataset_available(settings, 48, "elsewhere")


def test_folder_that_is_called_like_a_data_set_is_that_folder(folder):
    write_images(folder / "digits", {"red": 12, "green": 12})
    for typed in ("digits", "digits/", str(folder / "digits")):
        source = find_source({"dataset": "photos"}, 16, typed)
        assert load_data(Config(**source.settings)).classes == ["green", "red"]


def test_url_is_no_folder(folder):
    with pytest.raises(UserError, match="--data-dir https://a.b.*URL"):
        find_source({"dataset": "photos"}, 16, "https://a.b/photos")


@pytest.mark.parametrize("typed", [None, "mine"])
def test_no_file_decides_where_images_are_decoded(folder, typed):
    """Not on a folder either in which this program has decoded images before."""
    (folder / "victim" / ".decoded").mkdir(parents=True)
    source = find_source({"dataset": "photos", "data_dir": "victim"}, 16, typed)
    assert source.settings["data_dir"] == "data"


def test_data_dir_of_a_named_data_set_is_where_it_is(folder):
    put("svhn", "old")
    source = find_source({"dataset": "svhn", "data_dir": "old"}, 32, "new")
    assert source.settings == {"dataset": "svhn", "data_dir": "new", "image_size": 32}
    assert not source.is_folder and not source.is_named_by_file


@pytest.mark.parametrize("dataset", ["cifar10", *named.NAMES])
def test_data_set_on_disk_is_available(folder, dataset):
    settings = {"dataset": dataset, "data_dir": "there"}
    assert not dataset_available(settings, 32)
    put(dataset, "there")
    assert dataset_available(settings, 32)
    assert not dataset_available(settings, 32, "elsewhere")
    assert dataset_available({"dataset": dataset}, 32, "there")


def test_digits_are_always_available(folder):
    assert dataset_available({"dataset": "digits"}, 32)
    assert dataset_available({"dataset": "digits", "data_dir": "nowhere"}, 32, "elsewhere")


# ---- folders that a file names ----


def test_folder_for_data_sets_is_used_only_if_it_holds_what_is_wanted(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    Path("empty").mkdir()
    put("mnist", "there")
    for data_dir in ("nowhere", "empty", "~/empty", "~nobody/x", "\0", "//server/share"):
        assert data_dir_to_reuse("cifar10", data_dir) == "data", data_dir
        assert data_dir_to_reuse("photos", data_dir) == "data", data_dir
    assert data_dir_to_reuse("cifar10", "there") == "data"
    assert data_dir_to_reuse("mnist", "~/there") == "~/there"
    for name in ("photos", "others"):
        write_images(folder / name, {"red": 12, "green": 12})
    load_data(Config(dataset="others", data_dir="empty", image_size=16))
    assert data_dir_to_reuse("others", "empty") == "empty"
    assert data_dir_to_reuse("photos", "empty") == "data"  # nothing of it has been decoded there
    put("mnist", "data")
    assert data_dir_to_reuse("mnist", "there") == "data"
    made = {"empty", "there", "data", "photos", "others"}
    assert {path.name for path in folder.iterdir()} == made


@pytest.mark.parametrize("path", [r"\\server\share", "//server/share", r"\/server/share"])
def test_network_paths_are_not_looked_at(folder, monkeypatch, path):
    asked = []
    monkeypatch.setattr(Path, "is_dir", lambda self: asked.append(self))
    assert is_network_path(path)
    assert existing_folder(path) is None
    assert not dataset_available({"dataset": path, "data_dir": path}, 32)
    with pytest.raises(UserError, match="--dataset"):
        refuse_network_path(path, "run", "dataset")
    assert not asked
    for local in ("photos", "/photos", r"C:\photos", r"\photos", ""):
        assert not is_network_path(local)


def test_mapped_drive_stays_what_it_is(folder, monkeypatch):
    """On Windows, H:\\photos resolves to the share that it stands for."""
    (folder / "photos").mkdir()
    assert full_path("photos") == str((folder / "photos").resolve())
    monkeypatch.setattr(Path, "resolve", lambda self: PurePosixPath("//server/share/photos"))
    assert full_path("photos") == os.path.abspath("photos")


@pytest.mark.parametrize("dataset", ["cifar10", *named.NAMES])
def test_nothing_is_downloaded_where_that_is_not_allowed(folder, dataset):
    for data_dir in ("nowhere", put(dataset, "damaged")):
        before = sorted(folder.rglob("*"))
        with pytest.raises(UserError, match=dataset if data_dir == "nowhere" else "damaged"):
            load_data(Config(dataset=dataset, data_dir=data_dir), may_download=False)
        assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("dataset", "path"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("cifar100", "cifar-100-python"),
        ("stl10", "stl10_binary"),
    ],
)
def test_empty_folder_of_a_data_set_is_none(folder, dataset, path):
    """An interrupted download may leave it."""
    (folder / "data" / path).mkdir(parents=True)
    assert not dataset_available({"dataset": dataset}, 32)
    with pytest.raises(DatasetUnavailable, match=f"{dataset} is not in data"):
        load_data(Config(dataset=dataset), may_download=False)


def test_cifar10_is_not_downloaded_in_the_place_of_digits_where_that_is_not_allowed(
    folder, monkeypatch
):
    monkeypatch.setattr(download, "download_archive", lambda *_: pytest.fail("it downloads"))
    data = load_data(Config(dataset="auto"), may_download=False)
    assert data.name == "digits" and "cifar10 is not in data" in data.fallback_reason
    for settings in ({"dataset": "cifar10"}, {"dataset": "auto", "recipe": "notebook"}):
        with pytest.raises(DatasetUnavailable, match="cifar10"):
            load_data(Config(**settings), may_download=False)


def test_damaged_fingerprint_is_that_of_other_images():
    data = load_data(Config(dataset="digits", subset=50))
    assert is_same(data, data.fingerprint())
    other = load_data(Config(dataset="digits", subset=51))
    tables = (torch.zeros(9, 5), [[1.0, 2.0]] * 5, [torch.zeros(2)] * 5)
    others = (other.fingerprint(), [], [1.0], "x", 3, None, ["a", "b", "c", "d"])
    for fingerprint in (*others, *tables):
        assert not is_same(data, fingerprint)
