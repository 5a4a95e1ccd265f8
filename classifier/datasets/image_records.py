"""What is known of an image file: in a list of files, and in a cache of decoded images."""

import contextlib
import os
from pathlib import Path

import numpy as np

from classifier.datasets import decode
from classifier.datasets.pixel_range import PixelRange

# What `index` holds of an image, in the order of `images`. Its bytes are the format on disk.
RECORD = np.dtype(
    [
        ("key", "<u8"),  # of the file: see `file_key` and `key_with_range`
        ("content_digest", "<u8"),  # hash of the file's bytes, whatever the size of images here
        ("pixel_digest", "<u8"),  # hash of the decoded pixels: equal for identical images
        ("width", "<u4"),  # in the file, in pixels
        ("height", "<u4"),
        ("dhash", "u1", 32),  # difference hash: similar for near-identical images
    ]
)
# What `measured` holds of a file with more than 8 bits a pixel. Its bytes are the format on disk.
EXTREMA = np.dtype(
    [
        ("key", "<u8"),  # of the file: see `file_key`
        ("kind", "S8"),  # pixel_range.INTEGERS or FLOATS
        ("low", "<f8"),  # the least value
        ("high", "<f8"),  # the largest one
    ]
)
# An image file of a data set. An array of them is sorted by split, class and path.
FILE = np.dtype(
    [
        ("path", object),  # str, relative to the data set's folder
        ("split", "U5"),  # train, valid, test, or all: still to be split
        ("label", np.int64),
        ("key", np.uint64),  # see `file_key`
        ("row", np.int64),  # of the cache's images, or -1: not in there, or not looked up yet
        ("record", RECORD),  # its RECORD in the cache; meaningless where the row is -1
        ("kind", "U8"),  # of its values, if it has more than 8 bits a pixel: see `pixel_range`
        ("low", np.float64),  # its least and largest value in that case
        ("high", np.float64),
    ]
)
# Part of a cache's name. Raise it when `decode`, `file_key`, RECORD or the search for similar
# images changes, so that caches of older versions are not used.
DECODED_AS = 3
PAGE = 4096  # bytes of a file at its beginning, middle and end that tell it from others
HAS_CHANGE_TIME = os.name == "posix"  # st_ctime is the time of creation on Windows


def file_key(path: str, status: os.stat_result | OSError, file: Path) -> int:
    """Key of a file in a cache: a hash of all that is known of it without reading it.

    Size and modification time do not tell a file from another that took its place, because both
    may be set. Its number (inode) and the time of its last change (ctime) do: a program can set
    neither. Windows tells no such time, so there a few pages of the file are hashed as well.

    path: in the data set; file: the same file as it is opened here. status: if that cannot be read,
    nothing is known of the file, and its key is another one each time.
    """
    if isinstance(status, OSError):
        return decode.hash64(os.fsencode(path) + os.urandom(8))
    identity = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
    if HAS_CHANGE_TIME:
        return decode.hash64(os.fsencode(f"{identity}\0{status.st_ctime_ns}"))
    return decode.hash64(os.fsencode(identity) + _sample(file, status.st_size))


def _sample(file: Path, size: int) -> bytes:
    """The first, middle and last PAGE bytes of a file of this size; none if it cannot be read."""
    pages = []
    with contextlib.suppress(OSError), file.open("rb") as content:
        for position in (0, (size - PAGE) // 2, size - PAGE):
            content.seek(max(0, position))
            pages.append(content.read(PAGE))
    return b"".join(pages)


def key_with_range(key: int, used_range: PixelRange) -> int:
    """Key of an image with more than 8 bits a pixel: of its file and the range of values."""
    return decode.hash64(f"{key} {used_range.black!r} {used_range.white!r}".encode())
