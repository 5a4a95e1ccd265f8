"""Five more data sets by their names, which torchvision reads and downloads."""

import contextlib
import http.client
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from classifier.config import Config
from classifier.datasets.dataset import Dataset, Split, build_dataset
from classifier.errors import NO_SPACE, DatasetUnavailable, UserError
from classifier.files import NOT_WRITABLE


class NamedDataset(NamedTuple):
    """What has to be known of a data set in torchvision.

    Attributes:
        class_name: name of its class in torchvision.datasets, and of the Dataset.
        archives: the files to download by hand if torchvision cannot.
        folder: where they have to be, below --data-dir.
        on_disk: a file below --data-dir that is there once all of it was downloaded.
        flip_keeps_label: see Dataset.
    """

    class_name: str
    archives: str
    folder: str
    on_disk: str
    flip_keeps_label: bool


MNIST_ARCHIVES = (
    "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
    "t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz"
)
# By the names that --dataset takes.
DATASETS = {
    "cifar100": NamedDataset(
        class_name="CIFAR100",
        archives="cifar-100-python.tar.gz",
        folder="",
        on_disk="cifar-100-python/test",
        flip_keeps_label=True,
    ),
    "mnist": NamedDataset(
        class_name="MNIST",
        archives=MNIST_ARCHIVES,
        folder="MNIST/raw",
        on_disk="MNIST/raw/t10k-labels-idx1-ubyte",
        flip_keeps_label=False,
    ),
    "fashion-mnist": NamedDataset(
        class_name="FashionMNIST",
        archives=MNIST_ARCHIVES,
        folder="FashionMNIST/raw",
        on_disk="FashionMNIST/raw/t10k-labels-idx1-ubyte",
        flip_keeps_label=True,
    ),
    "svhn": NamedDataset(
        class_name="SVHN",
        archives="train_32x32.mat, test_32x32.mat",
        folder="",
        on_disk="test_32x32.mat",
        flip_keeps_label=False,
    ),
    "stl10": NamedDataset(
        class_name="STL10",
        archives="stl10_binary.tar.gz",
        folder="",
        on_disk="stl10_binary/test_X.bin",
        flip_keeps_label=True,
    ),
}
NAMES = list(DATASETS)

DOWNLOAD_ERRORS = (OSError, RuntimeError, http.client.HTTPException)
# What torchvision raises when it reads files that were cut off.
DAMAGED_FILE_ERRORS = (AssertionError, EOFError, LookupError, TypeError, ValueError)


def load_named(name: str, config: Config, may_download: bool = True) -> Dataset:
    """One of NAMES, downloaded into --data-dir if it is not there and `may_download` is True.

    Raises DatasetUnavailable if that fails, and UserError if its files are damaged or cannot be
    written.
    """
    from torchvision import datasets  # fails for other reasons than those below

    data_dir = Path(config.data_dir)
    dataset_class = getattr(datasets, DATASETS[name].class_name)
    is_there = (data_dir / DATASETS[name].on_disk).exists()
    try:
        with contextlib.nullcontext() if is_there or not may_download else _lock(name, data_dir):
            train, test = _open(name, dataset_class, str(data_dir), may_download)
    except (*DOWNLOAD_ERRORS, *DAMAGED_FILE_ERRORS) as error:
        raise _to_user_error(error, name, data_dir) from error

    test_split = _to_split(test)
    return build_dataset(
        config,
        _to_split(train),
        name=DATASETS[name].class_name,
        classes=[str(each) for each in getattr(train, "classes", range(10))],
        load_test=lambda: test_split,
        num_test_images=len(test_split.labels),
        flip_keeps_label=DATASETS[name].flip_keeps_label,
    )


def _lock(name: str, data_dir: Path) -> AbstractContextManager[object]:
    """Keep other processes from downloading the same; waits for one that does.

    torchvision writes each file under its final name. Raises OSError for a folder that cannot be
    written.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(data_dir / f".{name}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is downloading {name} into {data_dir}: waiting for it")
        return lock.acquire()


def _open(
    name: str, dataset_class: Callable[..., Any], root: str, may_download: bool
) -> tuple[Any, Any]:
    """The training and the test images as objects of torchvision, from files in the folder root."""
    if name in ("svhn", "stl10"):
        train = dataset_class(root, split="train", download=may_download)
        test = dataset_class(root, split="test", download=may_download)
    else:
        train = dataset_class(root, train=True, download=may_download)
        test = dataset_class(root, train=False, download=may_download)
    return train, test


def _to_user_error(error: Exception, name: str, data_dir: Path) -> UserError:
    """The error that says what to do about one that torchvision raised."""
    folder = data_dir / DATASETS[name].folder
    is_write_error = getattr(error, "errno", None) in NOT_WRITABLE | NO_SPACE
    if is_write_error:
        return UserError(f"--dataset {name}: {error}")
    reason = " ".join(str(error).split())
    # in torchvision's classes, a method of this name finds and fetches the files
    frames = traceback.extract_tb(error.__traceback__)
    in_download = any(frame.name == "download" for frame in frames)
    if not in_download or not isinstance(error, DOWNLOAD_ERRORS):
        return UserError(
            f"--dataset {name}: its files in {folder} are damaged: delete them and run again"
        )
    return DatasetUnavailable(
        f"--dataset {name}: it is not in {data_dir} and could not be downloaded ({reason}): "
        f"put {DATASETS[name].archives} into {folder}"
    )


def _to_split(dataset: Any) -> Split:
    """The images and labels of an object of torchvision, which come in several layouts."""
    images = torch.as_tensor(dataset.data)
    is_gray = images.ndim == 3
    if is_gray:
        images = images[:, None].expand(-1, 3, -1, -1)
    elif images.shape[-1] == 3:  # (N, H, W, C)
        images = images.permute(0, 3, 1, 2)
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
    return Split(images, torch.as_tensor(labels).long())
