"""Find a data set by the name or folder that --dataset gives, and load it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from classifier.config import Config
from classifier.datasets import archive, named
from classifier.datasets.cifar10 import find_cifar10, has_batches, load_cifar10
from classifier.datasets.dataset import Dataset, same_images
from classifier.datasets.digits import load_digits
from classifier.datasets.folder import load_folder
from classifier.datasets.folder_layout import class_folders, find_splits
from classifier.datasets.image_cache import CACHE_FOLDER, identity_of
from classifier.datasets.labels_file import class_names, read_labels
from classifier.datasets.named import load_named
from classifier.errors import DatasetUnavailable, UsageError, UserError, format_error
from classifier.foreign_paths import existing_file, existing_folder
from classifier.text import URL_REFUSED, did_you_mean, is_url

NAMES = ["cifar10", "digits", *named.NAMES]  # and "auto"; everything else is a folder of images


def load_data(
    config: Config,
    published_size: Callable[[str], int | None] | None = None,
    may_download: bool = True,
    order: list[str] | None = None,
) -> Dataset:
    """Find, download if needed, verify and read the data set that `config.dataset` names.

    With "auto" and no recipe, the digits of scikit-learn are used if CIFAR-10 is not available;
    `Dataset.fallback_reason` then says why.

    Args:
        published_size: returns the image size that the published weights of a model are made for.
            With --pretrained and no --image-size, a folder of images is decoded at that size.
        may_download: False: what is not on disk is not available.
        order: the classes of a model in the order of its outputs. A folder that has just these
            classes has them in this order, whichever way names are sorted today.

    Raises DatasetUnavailable if a data set is not on disk and cannot be downloaded, UsageError for
    an unknown name, and UserError for damaged files.
    """
    if config.labels and config.dataset in ("auto", *NAMES):
        raise UsageError(
            f"--labels {config.labels} is for a folder of images: name it with --dataset DIR"
        )
    if config.fit != Config.fit and config.dataset in ("auto", *NAMES):
        raise UsageError(
            f"--fit {config.fit} is for a folder of images: name it with --dataset DIR; those of "
            f"{config.dataset} are squares already"
        )
    if config.dataset in ("auto", "cifar10"):
        return _load_cifar10_or_digits(config, may_download)
    if not may_download and config.dataset in NAMES:
        _check_on_disk(config.dataset, config.data_dir)
    if config.dataset == "digits":
        return load_digits(config)
    if config.dataset in named.NAMES:
        return load_named(config.dataset, config, may_download)
    _check_folder(config.dataset)
    image_size = config.image_size
    if image_size is None and config.pretrained and published_size is not None:
        image_size = published_size(config.model)
    folder = Path(config.dataset)
    if archive.is_archive(folder):
        folder = _unpack(config)
    return load_folder(config, image_size, folder=folder, order=order)


def _load_cifar10_or_digits(config: Config, may_download: bool) -> Dataset:
    try:
        if not may_download:
            _check_on_disk("cifar10", config.data_dir)
        folder = find_cifar10(Path(config.data_dir), config.mirror)
    except DatasetUnavailable as error:
        # A recipe is made for one data set, and who names CIFAR-10 wants nothing else.
        if config.dataset == "cifar10" or config.recipe:
            raise
        print(f"\n*** {error} ***\n*** Training on scikit-learn's handwritten digits instead ***\n")
        return load_digits(config, fallback_reason=str(error))
    return load_cifar10(folder, config)


def _check_on_disk(dataset: str, data_dir: str) -> None:
    """Raises DatasetUnavailable unless one of NAMES is in --data-dir."""
    if not _is_on_disk(dataset, Path(os.path.expanduser(data_dir))):
        raise DatasetUnavailable(f"{dataset} is not in {data_dir}")


def _unpack(config: Config) -> Path:
    """The folder with what is in a ZIP file. Raises UserError."""
    try:
        return archive.unpack(Path(config.dataset), Path(config.data_dir))
    except OSError as error:
        raise UserError(f"--dataset {config.dataset}: {format_error(error)}") from error


def _check_folder(dataset: str) -> None:
    """Raises UsageError if `dataset` is neither a folder nor a ZIP file."""
    path = Path(os.path.expanduser(dataset))
    if dataset and (path.is_dir() or archive.is_archive(path)):
        return
    if path.is_file():
        what = "a file, but neither a folder of images nor a ZIP file of one"
        raise UsageError(f"--dataset {dataset}: this is {what}")
    is_path = Path(dataset).name != dataset
    if is_path:
        raise UsageError(f"--dataset {dataset}: there is no such folder")
    suggestion = did_you_mean(dataset, ["auto", *NAMES], ", or name a folder of images")
    raise UsageError(f"--dataset {dataset}: unknown data set: {suggestion}")


# ---- The data set of a trained model -------------------------------------------------------------


class Source(NamedTuple):
    """Where the data set of a trained model is, and how to load it again.

    Attributes:
        settings: for a Config. Only those that define the data set are the model file's.
        is_folder: whether the data set is a folder of images, or a ZIP file of one.
        is_named_by_file: whether nobody but the model file, perhaps a stranger's, says where it is.
            Then nothing is downloaded there, and the images have to be those of the training.
            The images of a folder are decoded into --data-dir's default, whoever names it.
    """

    settings: dict[str, Any]
    is_folder: bool
    is_named_by_file: bool


def find_source(settings: dict[str, Any], image_size: int, data_dir: str | None = None) -> Source:
    """Where the data set of a trained model is: `data_dir` if that is given, else --data-dir's
    default, else where the model file says, provided that it is there.

    Args:
        settings: the settings of the model's training, or {}, which stands for CIFAR-10.
        image_size: width and height in pixels of the model's images.
        data_dir: what the user typed: where the data set is; of a folder of images, that folder.

    Raises UserError if `data_dir` is a URL.
    """
    if data_dir and is_url(data_dir):
        raise UserError(f"--data-dir {data_dir}: {URL_REFUSED}")
    dataset = settings.get("dataset", "cifar10")
    if dataset == "auto":
        dataset = "cifar10"
    found: dict[str, Any] = {"dataset": dataset, "image_size": image_size}
    for name in ("val_fraction", "subset", "skip_unreadable"):
        if name in settings:
            found[name] = settings[name]
    if dataset not in NAMES:
        found["data_dir"] = Config.data_dir  # images are decoded there, and no file decides where
        if "fit" in settings:
            found["fit"] = settings["fit"]
        if data_dir:  # its full path: "digits" would be the data set of that name
            found["dataset"] = os.path.abspath(os.path.expanduser(data_dir))
        if settings.get("labels"):
            found["labels"] = _find_labels(settings["labels"], dataset, data_dir)
        return Source(found, is_folder=True, is_named_by_file=not data_dir)
    place = data_dir_to_reuse(dataset, settings.get("data_dir", Config.data_dir))
    found["data_dir"] = data_dir or place
    is_named_by_file = found["data_dir"] not in (data_dir, Config.data_dir)
    return Source(found, is_folder=False, is_named_by_file=is_named_by_file)


def _find_labels(labels: str, dataset: str, data_dir: str | None) -> str:
    """The table of labels that a model file names, or what has its place now.

    dataset: the folder of images that the file names. data_dir: where the user says that it is:
    then the table is looked for where it was, seen from that folder.
    """
    if not data_dir:
        return labels
    try:
        way = os.path.relpath(labels, dataset)
    except ValueError:  # another drive of Windows
        return labels
    moved = os.path.normpath(os.path.join(os.path.expanduser(data_dir), way))
    return labels if existing_file(moved) is None else os.path.abspath(moved)


def data_dir_to_reuse(dataset: str, named: str) -> str:
    """The folder for downloads and decoded images, where a file names one: a model or a run folder.

    It is that folder only if it holds what this program would otherwise put there: the data set,
    or for a folder of images its images, decoded. Otherwise, and where the default has it, too, it
    is the default.

    dataset: a name in NAMES, or a folder of images. named: the setting in the file.
    """
    folder = existing_folder(named)
    if folder is None:
        return Config.data_dir
    dataset = "cifar10" if dataset == "auto" else dataset
    if dataset not in NAMES:
        return named if _has_decoded(dataset, folder) else Config.data_dir
    if _is_on_disk(dataset, folder) and not _is_on_disk(dataset, Path(Config.data_dir)):
        return named
    return Config.data_dir


def _has_decoded(dataset: str, data_dir: Path) -> bool:
    """Whether the images of this folder have been decoded into data_dir before, at any size."""
    file = existing_file(dataset)
    if file is not None and archive.is_archive(file):
        return archive.is_unpacked(file, data_dir)
    source = existing_folder(dataset)
    if source is None:
        return False
    caches = (data_dir / CACHE_FOLDER).glob(f"*-{identity_of(source)}")
    return any(path.is_dir() for path in caches)


def dataset_available(
    settings: dict[str, Any], image_size: int, data_dir: str | None = None
) -> bool:
    """Whether the data set of a trained model is on this machine, so that nothing is downloaded.

    The arguments are those of `find_source`.
    """
    source = find_source(settings, image_size, data_dir)
    dataset = source.settings["dataset"]
    if source.is_folder:
        labels = source.settings.get("labels")
        if labels and existing_file(labels) is None:
            return False
        place = existing_folder(dataset) or existing_file(dataset)
        if data_dir:
            place = Path(os.path.expanduser(data_dir))
        return place is not None and (place.is_dir() or archive.is_archive(place))
    return _is_on_disk(dataset, Path(os.path.expanduser(source.settings["data_dir"])))


def may_have_classes(source: Source, classes: list[str]) -> bool:
    """Whether a folder of images, or a ZIP file of one, seems to have these classes, in any order.

    No image is looked at, and nothing is unpacked. Raises UserError as `folder_classes` does.
    """
    dataset = source.settings["dataset"]
    path = Path(os.path.expanduser(dataset))
    if "labels" in source.settings:
        table = Path(os.path.expanduser(source.settings["labels"]))
        return sorted(class_names(table, read_labels(table))) == sorted(classes)
    if archive.is_archive(path):
        try:
            return set(classes) <= archive.folder_names(path)
        except OSError as error:
            raise UserError(f"{dataset} cannot be read: {error}") from error
    return sorted(folder_classes(dataset)) == sorted(classes)


def folder_classes(folder: str) -> list[str]:
    """Names of the classes that a folder of images has, by its folders: no image is looked at.

    Raises UserError for a folder that is no such data set, or that cannot be read.
    """
    try:
        splits = find_splits(Path(os.path.expanduser(folder)))
        learning_folder = next(iter(splits.values()))
        return list(class_folders(learning_folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}") from error


def _is_on_disk(dataset: str, data_dir: Path) -> bool:
    """Whether one of NAMES needs no download into this folder."""
    if dataset == "digits":
        return True
    if dataset == "cifar10":
        return has_batches(data_dir)
    return (data_dir / named.DATASETS[dataset].on_disk).exists()


def is_same(data: Dataset, fingerprint: Any) -> bool:
    """Whether a data set has the training images that a fingerprint describes.

    fingerprint: what `Dataset.fingerprint` returned, as a file holds it, which may be damaged.
    """
    try:
        has_mean = len(fingerprint) > len(data.mean)
        # of the training images alone, as the other parts may change
        return has_mean and same_images(data.fingerprint()[:-2], fingerprint)
    except (TypeError, ValueError, RuntimeError):  # no list of numbers; a tensor of any shape
        return False
