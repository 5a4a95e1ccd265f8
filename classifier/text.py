"""Words and numbers as they are printed."""

import difflib
import re
from collections.abc import Iterable

FROM_FLOATS = "floats in [0, 1] become that by (255 * images).round(), as uint8"
URL_REFUSED = "this is a URL: name a file or folder on this machine, downloaded if need be"
OTHER_MODELS = ", torchvision:NAME, timm:NAME or FILE.py:FACTORY"  # than those with a short name
CONTROL_CHARACTER = r"[\x00-\x1f\x7f-\x9f]"


def percent(share: float) -> str:
    """A share in [0, 1] as 12.3 %."""
    return f"{100 * share:.1f} %"


def pluralize(count: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def shorten(text: str, length: int) -> str:
    """A text of at most `length` letters; if need be with … in the place of its middle."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    tail = length - 1 - head
    return f"{text[:head]}…{text[-tail:]}"


def natural_key(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """What names are sorted by such that numbers come by their size: 1, 2, 10; img2, img10.

    Names without digits come in the order of their characters.
    """
    key: list[str | tuple[int, str]] = []
    pieces = re.split(r"([0-9]+)", name)  # text at even positions, numbers at odd ones
    for position, piece in enumerate(pieces):
        if position % 2 == 0:
            key.append(piece)
        else:
            digits = piece.lstrip("0")
            key.append((len(digits), digits))  # a number of any length
    return key, name  # the name decides between 1 and 01


def did_you_mean(name: str, known: Iterable[str], others: str = "") -> str:
    """The closest known name as a question, or the list of known names.

    others: what else is accepted, as the end of that list (", or FILE.py:FACTORY").
    """
    names = list(known)
    closest = closest_name(name, names)
    if closest is not None:
        return f"did you mean {closest}?"
    return f"choose from {', '.join(names)}{others}"


def closest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one; None if none is like it."""
    names = list(known)
    wanted = name.lower()
    close = [each for each in names if wanted and each.startswith(wanted)]
    close = close or difflib.get_close_matches(wanted, names, n=1)
    return close[0] if close else None


def is_url(name: str) -> bool:
    """Whether this is a URL, such as https://example.com/cat.jpg or file:///cat.jpg."""
    # pathlib makes one slash of two
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|(https?|ftp|file):/", name) is not None


def printable(name: str) -> str:
    """A file name that UTF-8 can encode.

    Python keeps the bytes of a name that is not UTF-8 as lone surrogates, which few libraries take;
    here each becomes \\udcXX, where XX are the hexadecimal digits of the byte.
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def escape_control_characters(text: str) -> str:
    """A text from somebody else's file, such that printing it does nothing but print.

    The escape character, for example, becomes \\x1b.
    """
    return re.sub(CONTROL_CHARACTER, lambda match: f"\\x{ord(match[0]):02x}", text)


def has_control_characters(name: str) -> bool:
    """Whether printing this may do more than print, such as move the cursor of a terminal."""
    return re.search(CONTROL_CHARACTER, name) is not None
