"""Find a data set by the name or folder that --dataset gives, and load it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from classifier.config import Config
from classifier.datasets import named
from classifier.datasets.cifar10 import BATCHES, find_cifar10, load_cifar10
from classifier.datasets.dataset import Dataset
from classifier.datasets.digits import load_digits
from classifier.datasets.folder import load_folder
from classifier.datasets.named import load_named
from classifier.errors import DatasetUnavailable, UsageError
from classifier.text import did_you_mean

NAMES = ["cifar10", "digits", *named.NAMES]  # and "auto"; everything else is a folder of images


def load_data(config: Config, imagenet_size: Callable[[str], int | None] | None = None) -> Dataset:
    """Find, download if needed, verify and read the data set that `config.dataset` names.

    With "auto" and no recipe, the digits of scikit-learn are used if CIFAR-10 is not available;
    `Dataset.fallback_reason` then says why.

    imagenet_size: returns the image size that the ImageNet weights of a model are made for. With
        --pretrained and no --image-size, a folder of images is decoded at that size.

    Raises DatasetUnavailable if a data set is not on disk and cannot be downloaded, UsageError for
    an unknown name, and UserError for damaged files.
    """
    if config.dataset in ("auto", "cifar10"):
        return _load_cifar10_or_digits(config)
    if config.dataset == "digits":
        return load_digits(config)
    if config.dataset in named.NAMES:
        return load_named(config.dataset, config)
    _check_folder(config.dataset)
    image_size = config.image_size
    if image_size is None and config.pretrained and imagenet_size is not None:
        image_size = imagenet_size(config.model)
    return load_folder(config, image_size)


def _load_cifar10_or_digits(config: Config) -> Dataset:
    try:
        folder = find_cifar10(Path(config.data_dir).expanduser(), config.mirror)
    except DatasetUnavailable as error:
        # A recipe is made for one data set, and who names CIFAR-10 wants nothing else.
        if config.dataset == "cifar10" or config.recipe:
            raise
        print(f"\n*** {error} ***\n*** Training on scikit-learn's handwritten digits instead ***\n")
        return load_digits(config, fallback_reason=str(error))
    return load_cifar10(folder, config)


def _check_folder(dataset: str) -> None:
    """Raises UsageError if `dataset` is not a folder."""
    if dataset and Path(dataset).expanduser().is_dir():
        return
    is_path = Path(dataset).name != dataset
    if is_path:
        raise UsageError(f"--dataset {dataset}: there is no such folder")
    suggestion = did_you_mean(dataset, ["auto", *NAMES], ", or name a folder of images")
    raise UsageError(f"--dataset {dataset}: unknown data set: {suggestion}")


def dataset_settings(
    settings: dict[str, Any], image_size: int, data_dir: str | None = None
) -> tuple[dict[str, Any], bool]:
    """The settings that load the data set of a trained model again.

    Only those that define the data set are taken over: a model file from somebody else decides
    nothing more.

    Args:
        settings: the settings of the model's training, or {}, which stands for CIFAR-10.
        image_size: width and height in pixels of the model's images.
        data_dir: where the data set is now; of a folder of images, that folder itself.

    Returns the settings for a Config, and whether the data set is a folder of images.
    """
    result: dict[str, Any] = {"dataset": "cifar10"}
    for name in ("dataset", "data_dir", "val_fraction", "subset", "skip_unreadable"):
        if name in settings:
            result[name] = settings[name]
    result["image_size"] = image_size
    is_folder = result["dataset"] not in NAMES
    if data_dir:
        result["dataset" if is_folder else "data_dir"] = data_dir
    return result, is_folder


def dataset_available(
    settings: dict[str, Any], image_size: int, data_dir: str | None = None
) -> bool:
    """Whether the data set of a trained model is on this machine, so that nothing is downloaded.

    The arguments are those of `dataset_settings`.
    """
    wanted, is_folder = dataset_settings(settings, image_size, data_dir)
    dataset = wanted["dataset"]
    if is_folder:
        return Path(dataset).expanduser().is_dir()
    if dataset == "digits":
        return True
    folder = Path(wanted.get("data_dir", Config.data_dir)).expanduser()
    if dataset == "cifar10":
        return (folder / "test_batch").exists() or (folder / BATCHES / "test_batch").exists()
    return (folder / named.DATASETS[dataset].on_disk).exists()
