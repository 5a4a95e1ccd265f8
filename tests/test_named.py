"""The data sets of torchvision, from files in their own formats."""

import errno
import functools
import gzip
import os
import pickle
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.io import savemat

from classifier.config import Config
from classifier.datasets import named
from classifier.datasets.named import NAMES, load_named
from classifier.errors import DatasetUnavailable, UserError


def draw_images(count, size, seed=0):
    """Images (N, 3, size, size), lighter above, and labels: the brighter, the later the class."""
    labels = np.arange(count) % 10
    noise = np.random.default_rng(seed).integers(0, 10, (count, 3, size, size))
    noise[:, :, : size // 2] += 10
    images = noise + 23 * labels[:, None, None, None]
    return images.astype(np.uint8), labels.astype(np.uint8)


def write_cifar100(folder):
    base = folder / "cifar-100-python"
    base.mkdir()
    for name, count in (("train", 200), ("test", 50)):
        images, labels = draw_images(count, 32)
        content = {"data": images.reshape(count, -1), "fine_labels": labels.tolist()}
        (base / name).write_bytes(pickle.dumps(content))
    names = [f"class {i}" for i in range(100)]
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))


def write_mnist(folder, name="MNIST"):
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 200), ("t10k", 50)):
        images, labels = draw_images(count, 28)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images[:, 0].tobytes())
        header = struct.pack(">II", 0x801, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def write_svhn(folder):
    for part, count in (("train", 200), ("test", 50)):
        images, labels = draw_images(count, 32)
        labels = np.where(labels == 0, 10, labels)  # as there
        content = {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]}
        savemat(folder / f"{part}_32x32.mat", content)


def write_stl10(folder):
    base = folder / "stl10_binary"
    base.mkdir()
    (base / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    (base / "fold_indices.txt").write_text("0 1 2\n")
    (base / "unlabeled_X.bin").touch()
    for part, count in (("train", 60), ("test", 20)):
        images, labels = draw_images(count, 96)
        (base / f"{part}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        (base / f"{part}_y.bin").write_bytes((labels + 1).tobytes())


WRITERS = {
    "cifar100": write_cifar100,
    "mnist": write_mnist,
    "fashion-mnist": functools.partial(write_mnist, name="FashionMNIST"),
    "svhn": write_svhn,
    "stl10": write_stl10,
}


@pytest.fixture(params=NAMES)
def name(request, folder, monkeypatch):
    """The name of a data set whose files are in data/."""
    (folder / "data").mkdir()
    WRITERS[request.param](folder / "data")
    # They are not the published files.
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_: True)
    return request.param


def test_data_set_is_read(name):
    data = load_named(name, Config(val_fraction=0.0))
    assert data.name == {"fashion-mnist": "FashionMNIST"}.get(name, name.upper())
    assert len(data.classes) == (100 if name == "cifar100" else 10)
    assert all(type(each) is str for each in data.classes)
    assert data.flip_keeps_label == (name not in ("mnist", "svhn"))
    size = {"mnist": 28, "fashion-mnist": 28, "stl10": 96}.get(name, 32)
    num_train, num_test = (60, 20) if name == "stl10" else (200, 50)
    assert data.train.images.shape == (num_train, 3, size, size)
    assert data.test.images.shape == (num_test, 3, size, size)
    assert data.num_test_images == num_test
    for split in (data.train, data.test):
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64


def test_images_are_upright_and_belong_to_their_labels(name):
    data = load_named(name, Config())
    for split in (data.train, data.valid, data.test):
        of_class = [split.images[split.labels == label].float().mean() for label in range(10)]
        assert (torch.stack(of_class).diff() > 15).all()
        above, below = split.images.float().chunk(2, dim=2)
        assert above.mean() > below.mean() + 8


def test_options_apply(name):
    data = load_named(name, Config(image_size=16, subset=20, val_fraction=0.5))
    assert data.train.images.shape == (20, 3, 16, 16)
    assert data.test.images.shape[2:] == (16, 16)
    assert len(data.valid.labels) == (30 if name == "stl10" else 100)


def test_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    write_mnist(folder)
    assert load_named("mnist", Config(data_dir="~")).name == "MNIST"


@pytest.mark.parametrize("name", NAMES)
def test_data_set_that_cannot_be_downloaded(folder, monkeypatch, name):
    """The error names the files that torchvision would have downloaded, and their place."""
    monkeypatch.setattr("urllib.request._opener", None)  # it remembers the first proxies it saw
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with pytest.raises(DatasetUnavailable) as caught:
        load_named(name, Config())
    text = str(caught.value)
    assert text.startswith(f"--dataset {name}: ") and "\n" not in text
    entry = named.DATASETS[name]
    assert text.endswith(f"put {entry.archives} into {folder_of(entry)}")


def folder_of(entry):
    return os.path.join("data", *filter(None, entry.folder.split("/")))


def test_archives_are_those_of_torchvision():
    from torchvision import datasets

    assert named.DATASETS["cifar100"].archives == datasets.CIFAR100.filename
    assert named.DATASETS["stl10"].archives == datasets.STL10.filename
    assert named.DATASETS["mnist"].archives == ", ".join(n for n, _ in datasets.MNIST.resources)
    svhn = [datasets.SVHN.split_list[part][1] for part in ("train", "test")]
    assert named.DATASETS["svhn"].archives == ", ".join(svhn)


@pytest.mark.parametrize("length", [0, 10, 1000])
def test_files_that_are_cut_off(folder, length):
    write_mnist(folder / "data")
    path = folder / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="--dataset mnist: .*delete them") as caught:
        load_named("mnist", Config())
    assert os.path.join("data", "MNIST", "raw") in str(caught.value)
    assert not isinstance(caught.value, DatasetUnavailable)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_disk_that_cannot_be_written_is_not_a_failed_download(folder, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "data")

    monkeypatch.setattr("torchvision.datasets.STL10", fail)
    with pytest.raises(UserError, match="--dataset stl10: ") as caught:
        load_named("stl10", Config())
    assert os.strerror(number) in str(caught.value)
    assert not isinstance(caught.value, DatasetUnavailable)


def test_one_download_at_a_time(folder, monkeypatch):
    """torchvision writes files under their final names: a second download would cut them off."""
    active, most = [], []

    def download(name, dataset_class, root, may_download):
        active.append(name)
        time.sleep(0.3)
        most.append(len(active))
        active.pop()
        raise EOFError

    monkeypatch.setattr(named, "_open", download)

    def load(_):
        with pytest.raises(UserError):
            load_named("cifar100", Config())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(load, range(2)))
    assert most == [1, 1]


def test_paths_that_show_what_is_on_disk(name, folder):
    assert (folder / "data" / named.DATASETS[name].on_disk).exists()


def test_errors_are_told_apart_by_where_they_arise(folder, monkeypatch):
    """While files are fetched, or while they are read, whatever their words."""

    class Fetching:
        def __init__(self, *_, **__):
            self.download()

        def download(self):
            raise RuntimeError("shape is invalid for input of size 3")

    def read(*_, **__):
        raise gzip.BadGzipFile("could not be downloaded")

    monkeypatch.setattr("torchvision.datasets.MNIST", Fetching)
    with pytest.raises(DatasetUnavailable):
        load_named("mnist", Config())
    monkeypatch.setattr("torchvision.datasets.MNIST", read)
    with pytest.raises(UserError, match="damaged") as caught:
        load_named("mnist", Config())
    assert not isinstance(caught.value, DatasetUnavailable)
