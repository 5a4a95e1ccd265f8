"""Why a file cannot be read as an image, in words. Imports no torch."""

import codecs
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import UnidentifiedImageError

from classifier.datasets import decode
from classifier.files import write_csv
from classifier.text import pluralize, printable

HEAD = 512  # bytes at the beginning of a file that tell what it is
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
BEGINNINGS = {  # of files that are no images, or none that Pillow reads
    b"%PDF": "a PDF document",
    b"%!PS": "PostScript",
    b"PK\x03\x04": "a ZIP archive",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
}
# What begins a text, in lower case and after spaces.
TEXT_BEGINNINGS = {
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<svg": "an SVG drawing",
    b"version https://git-lfs": "a pointer of Git LFS",
}
ADVICE = {
    "HEIC": "pip install pillow-heif, or convert it to JPEG",
    "AVIF": "pip install --upgrade pillow, or convert it to JPEG",
    "JPEG XL": "convert it to JPEG",
    "an SVG drawing": "convert it to PNG",
    "a pointer of Git LFS": "git lfs pull brings the image",
}
MAX_REASONS = 3  # that a message lists


class Content(NamedTuple):
    """What a file is, if not an image that can be read.

    Attributes:
        name: "a web page", "HEIC" and so on.
        advice: what to do about it; may be empty.
    """

    name: str
    advice: str

    def describe(self) -> str:
        text = f"it is {self.name}"
        return f"{text}: {self.advice}" if self.advice else text


def recognise(path: Path) -> Content | None:
    """What a file is by its first bytes; None if they do not tell, or cannot be read."""
    try:
        with path.open("rb") as file:
            name = _name_of(file.read(HEAD))
    except OSError:
        return None
    if name is None or name in _readable_now():
        return None
    return Content(name, ADVICE.get(name, ""))


def describe_images(files: Iterable[Path]) -> list[str]:
    """A line for each of these files that is an image, but of no format that is read."""
    lines = []
    for file in files:
        content = recognise(file)
        if content is not None and content.advice:
            lines.append(f"{file}: {content.describe()}")
    return lines


def _readable_now() -> set[str]:
    """Formats that Pillow reads here: a file of one that cannot be read is damaged."""
    names = {"HEIF": "HEIC", "AVIF": "AVIF", "JXL": "JPEG XL"}
    return {names[name] for name in decode.formats() if name in names}


def _name_of(head: bytes) -> str | None:
    """What a file is that begins with these bytes."""
    if not head:
        return "empty"
    if not head.strip(b"\0"):
        return "only zeros, as an interrupted download leaves them"
    for beginning, name in BEGINNINGS.items():
        if head.startswith(beginning):
            return name
    if head[4:8] == b"ftyp":
        return _name_of_media(head)
    return _name_of_text(head)


def _name_of_media(head: bytes) -> str:
    """HEIC, AVIF or a video: files of boxes, of which the first one names the format."""
    brand = head[8:12]
    compatible = head[16 : int.from_bytes(head[:4], "big")]
    if brand in (b"avif", b"avis") or b"avif" in compatible:
        return "AVIF"
    return "HEIC" if brand in HEIC_BRANDS else "a video"


def _name_of_text(head: bytes) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, name in TEXT_BEGINNINGS.items():
        if text.startswith(beginning):
            return name
    if text.startswith(b"<?xml") and b"<svg" in text:
        return "an SVG drawing"
    try:
        characters = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last may be cut
    except UnicodeDecodeError:
        return None
    is_text = all(character.isprintable() or character.isspace() for character in characters)
    return "text" if is_text else None


def reason(path: Path, error: Exception) -> str:
    """Why a file could not be decoded, in a few words.

    error: what was raised. Only what was checked is claimed: see `recognise`.
    """
    is_of_system = bool(getattr(error, "errno", None))
    if not is_of_system and not isinstance(error, MemoryError):
        content = recognise(path)
        if content is not None:
            return content.describe()
        if isinstance(error, UnidentifiedImageError):
            return "it is of no format that Pillow reads, or damaged"
    return str(error) or type(error).__name__


def summarize(reasons: Iterable[str]) -> str:
    """The most common reasons, with their numbers: "12 files: it is a web page; 1 file: ..."."""
    counts = Counter(reasons)
    parts = []
    for text, count in counts.most_common(MAX_REASONS):
        parts.append(f"{pluralize(count, 'file')}: {text}")
    if len(counts) > MAX_REASONS:
        parts.append("others")
    return "; ".join(parts)


def summarize_files(paths: Iterable[Path]) -> str:
    """What these files are, that are no images, as `summarize` puts it."""
    reasons = []
    for path in paths:
        content = recognise(path)
        unknown = "no image"
        if path.suffix and path.suffix.lower() not in decode.extensions():
            unknown = f"it ends in {path.suffix}, which is no image"
        reasons.append(content.describe() if content else unknown)
    return summarize(reasons)


def write_list(file: Path, folder: Path, unreadable: Mapping[str, str]) -> Path | None:
    """Write all unreadable files and the reasons as CSV; returns its path, or None if it failed.

    folder: of the data set; unreadable: path in it and reason of each file.
    """
    rows = [["file", "reason"]]
    for path, why in unreadable.items():
        rows.append([printable(str(folder / path)), printable(why)])
    try:
        write_csv(file, rows)
    except OSError:
        return None
    return file
