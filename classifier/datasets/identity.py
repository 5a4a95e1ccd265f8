"""Which image is which: digests of content, which stay the same whatever a file is called."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classifier.datasets.decode import hash64

if TYPE_CHECKING:  # it needs torch
    from classifier.datasets.dataset import Dataset

CHUNK_IMAGES = 1000


def name_test_images(data: "Dataset") -> list[str]:
    """A name for each test image: its path in the folder, or its index where there are no files."""
    if data.test_files is None:
        return [str(index) for index in range(len(data.test.labels))]
    return [Path(path).as_posix() for path in data.test_files]


def digest_test_images(data: "Dataset") -> list[str]:
    """A digest for each test image, of 16 hexadecimal digits, which does not depend on its size.

    It is that of the file or, where there are no files, of the pixels before they are resized.
    """
    if data.test_ids is None:
        return digest_pixels(data.unresized_test.images)
    return digest_files(data.test_ids.digests.tolist())


def digest_files(digests: Iterable[int]) -> list[str]:
    """Digests of 64 bits of the content of files as text, of 16 hexadecimal digits each."""
    return [_to_text(digest) for digest in digests]


def digest_pixels(images: Any) -> list[str]:
    """A digest of each of these images, uint8 (N, C, H, W), as a Split holds them."""
    digests = []
    for chunk in images.split(CHUNK_IMAGES):
        for image in chunk.numpy():
            digests.append(_to_text(hash64(image.tobytes())))
    return digests


def digest_all(digests: Iterable[str], labels: Iterable[str]) -> str:
    """A digest of labelled images, in whatever order, from those of each."""
    lines = [f"{digest} {label}" for digest, label in zip(digests, labels, strict=True)]
    return _to_text(hash64("\n".join(sorted(lines)).encode()))


def digest_data(data: "Dataset", test_digest: str) -> str:
    """A digest of a data set: which images, with which labels, are in which of the three parts.

    Of a folder it depends on the content of the files alone, not on their names, their order and
    --image-size. Of other data sets it is that of the pixels that are trained on, in their order.

    test_digest: `digest_all` of the test images.
    """
    if data.train_ids is None or data.valid_ids is None:
        train, valid, _ = data.checksums or data.compute_checksums()
        described = f"{train} {valid} {test_digest} {data.classes}"
        return _to_text(hash64(described.encode()))
    digests = [test_digest]
    labels = ["test"]
    parts = {"train": (data.train, data.train_ids), "valid": (data.valid, data.valid_ids)}
    for name, (split, ids) in parts.items():
        digests += [_to_text(digest) for digest in ids.digests.tolist()]
        labels += [f"{name} {data.classes[label]}" for label in split.labels.tolist()]
    return digest_all(digests, labels)


def _to_text(digest: int) -> str:
    """A digest of 64 bits, with or without a sign, as 16 hexadecimal digits."""
    return f"{digest % 2**64:016x}"
