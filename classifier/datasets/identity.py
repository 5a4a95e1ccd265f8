"""Which image is which: digests of content, which stay the same whatever a file is called."""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from classifier.datasets.dataset import Dataset

DIGEST_BYTES = 8  # 16 hexadecimal digits
THREADS = 8  # to read files
CHUNK_BYTES = 2**20  # of a file, read at once
CHUNK_IMAGES = 1000


def name_test_images(data: Dataset) -> list[str]:
    """A name for each test image: its path in the folder, or its index where there are no files."""
    if data.test_files is None:
        return [str(index) for index in range(len(data.test.labels))]
    return [Path(path).as_posix() for path in data.test_files]


def digest_test_images(data: Dataset) -> list[str]:
    """A digest for each test image, which does not depend on --image-size.

    It is that of the file or, where there are no files, of the pixels before they are resized.
    Empty for a file that cannot be read any more.
    """
    if data.test_files is None or data.report is None:
        return digest_pixels(data.unresized_test.images)
    return digest_files(Path(data.report["folder"]), data.test_files)


def digest_files(folder: Path, paths: Sequence[str]) -> list[str]:
    """A digest of the content of each of these files in a folder; empty if it cannot be read."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_digest_file, [folder / path for path in paths]))


def _digest_file(path: Path) -> str:
    hashed = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                hashed.update(chunk)
    except OSError:
        return ""
    return hashed.hexdigest()


def digest_pixels(images: Any) -> list[str]:
    """A digest of each of these images, uint8 (N, C, H, W), as a Split holds them."""
    digests = []
    for chunk in images.split(CHUNK_IMAGES):
        for image in chunk.numpy():
            digests.append(_digest(image.tobytes()))
    return digests


def digest_all(digests: Iterable[str], labels: Iterable[str]) -> str:
    """A digest of labelled images, in whatever order, from those of each."""
    lines = [f"{digest} {label}" for digest, label in zip(digests, labels, strict=True)]
    return _digest("\n".join(sorted(lines)).encode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()
