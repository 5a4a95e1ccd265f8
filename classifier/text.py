"""Words and numbers as they are printed."""

import difflib
from collections.abc import Iterable


def percent(share: float) -> str:
    """A share in [0, 1] as 12.3 %."""
    return f"{100 * share:.1f} %"


def pluralize(count: int, noun: str) -> str:
    """1 image, 2 images."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def printable(name: str) -> str:
    """A file name that can be written: \\udcff stands for a byte 0xff that is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def shorten(text: str, length: int) -> str:
    """A text of at most `length` letters; if need be with … in the place of its middle."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    tail = length - 1 - head
    return f"{text[:head]}…{text[-tail:]}"


def did_you_mean(name: str, known: Iterable[str], others: str = "") -> str:
    """The closest known name as a question, or the list of known names.

    others: what else is accepted, as the end of that list (", or FILE.py:FACTORY").
    """
    names = list(known)
    wanted = name.lower()
    close = [each for each in names if wanted and each.startswith(wanted)]
    close = close or difflib.get_close_matches(wanted, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"choose from {', '.join(names)}{others}"
