"""An image file without the metadata that its pixels do not need. Imports no torch.

Pillow refuses some files of which only the metadata are damaged: a colour profile, a comment, a
resolution. What is left of such a file shows the same picture.
"""

import struct
import zlib
from collections.abc import Iterator

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
EXIF = b"Exif\0\0"  # how the content of a JPEG's APP1 segment with EXIF data begins
# Markers of JPEG segments.
APP0, APP1, APP14, APP15, COMMENT, START_OF_SCAN = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE, 0xDA


def has_signature(head: bytes) -> bool:
    """Whether a file that begins with these bytes, 8 or more, is of a format with such metadata."""
    return head.startswith((PNG_SIGNATURE, JPEG_SIGNATURE))


def without_metadata(content: bytes) -> bytes | None:
    """A PNG or JPEG file without its metadata, but for EXIF data, which say how it is turned.

    Returns None for a file of another format, or one that is damaged elsewhere.
    """
    try:
        if content.startswith(PNG_SIGNATURE):
            return PNG_SIGNATURE + b"".join(_png_chunks(content))
        if content.startswith(JPEG_SIGNATURE):
            return JPEG_SIGNATURE + b"".join(_jpeg_segments(content))
    except (struct.error, IndexError):
        return None
    return None


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """The chunks of a PNG file that are not optional, and transparency and EXIF data."""
    position = len(PNG_SIGNATURE)
    while position < len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        chunk = content[position:end]
        is_critical = name[:1].isupper()
        # the checksum at the end is of the name and the data
        is_sound = chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if is_critical or (name in (b"tRNS", b"eXIf") and is_sound):
            yield chunk
        position = end


def _jpeg_segments(content: bytes) -> Iterator[bytes]:
    """What a JPEG file needs, and its EXIF data; from the first scan on, all of it."""
    position = len(JPEG_SIGNATURE)
    while True:
        start, marker, length = struct.unpack_from(">BBH", content, position)
        if start != 0xFF or marker == START_OF_SCAN:
            yield content[position:]
            return
        end = position + 2 + length
        segment = content[position:end]
        if _is_needed(marker, segment[4:]):
            yield segment
        position = end


def _is_needed(marker: int, data: bytes) -> bool:
    """Whether a JPEG segment with this content is needed to decode the image."""
    if marker == APP0:
        return data.startswith(b"JFIF\0") and len(data) >= 14
    if marker == APP1:
        return data.startswith(EXIF)
    if marker == APP14:  # says how colours are coded
        return data.startswith(b"Adobe") and len(data) >= 12
    return marker != COMMENT and not APP0 <= marker <= APP15
