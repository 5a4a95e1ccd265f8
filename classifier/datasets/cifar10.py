"""CIFAR-10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009).

60,000 color photographs of 32 × 32 pixels in ten classes, 10,000 of them for testing.
"""

import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from classifier.config import Config
from classifier.datasets import download
from classifier.datasets.dataset import Dataset, Split, build_dataset
from classifier.errors import UserError
from classifier.files import write_atomically

# In the order of the labels, with the names of the reference output.
CLASSES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

BATCHES = "cifar-10-batches-py"  # the folder in the archive
MD5 = {  # of the batch files, as torchvision has them
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
MEMBERS = [*MD5, "batches.meta", "readme.html"]  # what is unpacked from the archive


def find_cifar10(data_dir: Path, mirror: str = "") -> Path:
    """Return the folder with the batch files; download and unpack them into `data_dir` if needed.

    They may lie in `data_dir` itself, in its folder BATCHES, or in the archive that somebody put
    there. Of several processes one downloads and the others wait.

    Raises DatasetUnavailable if no source can be reached, UserError for a damaged archive.
    """
    batches = data_dir / BATCHES
    for folder in (data_dir, batches):
        if _is_complete(folder):
            return folder
    if data_dir.is_file():
        raise UserError(f"--data-dir {data_dir} is a file: name the folder that it is in")
    if not data_dir.exists() and data_dir != Path(Config.data_dir):
        print(f"note: --data-dir {data_dir} does not exist and is created")
    data_dir.mkdir(parents=True, exist_ok=True)

    lock = FileLock(data_dir / ".cifar-10.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is downloading CIFAR-10 into {data_dir}: waiting for it")
        held = lock.acquire()
    with held:
        if not _is_complete(batches):  # the other process may have unpacked it meanwhile
            _unpack_or_download(data_dir, mirror)
    return batches


def has_batches(data_dir: Path) -> bool:
    """Whether all batch files lie in `data_dir` or in its folder BATCHES."""
    return _is_complete(data_dir) or _is_complete(data_dir / BATCHES)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MD5)


def _unpack_or_download(data_dir: Path, mirror: str) -> None:
    """Unpack the archive in `data_dir`, which is downloaded first if it is not there."""
    archive = data_dir / download.ARCHIVE
    if archive.exists():
        # It stays: a teacher may serve it to a class.
        _verify(archive)
        _unpack(archive, data_dir / BATCHES)
    else:
        download.download_archive(data_dir, mirror)
        _unpack(archive, data_dir / BATCHES)
        archive.unlink()


def _verify(archive: Path) -> None:
    """Raises UserError for an archive with another SHA-256."""
    if hashlib.sha256(archive.read_bytes()).hexdigest() == download.ARCHIVE_SHA256:
        return
    raise UserError(
        f"{archive} ({archive.stat().st_size} bytes) is damaged or not the CIFAR-10 archive "
        f"({download.ARCHIVE_BYTES} bytes, SHA-256 {download.ARCHIVE_SHA256}): delete it and run "
        "again to download it"
    )


def _unpack(archive: Path, folder: Path) -> None:
    """Write the files in MEMBERS to `folder`, and nothing else that the archive holds."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(f"{BATCHES}/")
            if name not in MEMBERS or not member.isfile():
                continue
            content = tar.extractfile(member)
            if content is not None:
                write_atomically(folder / name, content.read())


def load_cifar10(folder: Path, config: Config) -> Dataset:
    """CIFAR-10 from its batch files in `folder`. Raises UserError for a damaged or missing file."""
    training_files = [name for name in MD5 if name.startswith("data_batch")]
    train = _read_split(folder, training_files)
    _read_verified(folder / "test_batch")  # a damaged one is better found before the training
    return build_dataset(
        config,
        train,
        name="CIFAR10",
        classes=CLASSES,
        load_test=lambda: _read_split(folder, ["test_batch"]),
        num_test_images=10_000,
        flip_keeps_label=True,
    )


def _read_split(folder: Path, names: list[str]) -> Split:
    """The images of these batch files: uint8 (N, 3, 32, 32).

    torchvision.datasets.CIFAR10 reads the same, but takes seconds to import.
    """
    pixels, labels = [], []
    for name in names:
        # a dictionary: "data", uint8 (10000, 3072), and "labels", a list
        batch = pickle.loads(_read_verified(folder / name), encoding="latin1")
        pixels.append(batch["data"])
        labels.extend(batch["labels"])
    images = torch.from_numpy(np.concatenate(pixels))
    return Split(images.view(-1, 3, 32, 32), torch.tensor(labels))


def _read_verified(file: Path) -> bytes:
    """The content of a batch file. Raises UserError for one that differs from the published one.

    It is a pickle, which could run any code.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file} is no longer there: put it back and run again") from None
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[file.name]:
        raise UserError(f"{file} is damaged: delete it and run again")
    return content
