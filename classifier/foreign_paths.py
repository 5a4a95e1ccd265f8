"""Paths that a file names: a model file, a run folder, a recipe. It may be somebody else's.

What the user types is done; what a file names is only looked at. Nothing is written, made or
downloaded there, and no other machine is asked.
"""

from pathlib import Path

from classifier.errors import UserError


def is_network_path(path: str) -> bool:
    """Whether a path is on another machine, as \\\\server\\share is on Windows.

    Only to look whether it exists would send the user's name and a hash of the password there.
    Windows takes both kinds of slashes.
    """
    return path[:2] in ("\\\\", "//", "\\/", "/\\")


def existing_folder(path: str) -> Path | None:
    """The folder of this name if there is one on this machine, else None; ~ is the home folder."""
    if is_network_path(path):
        return None
    try:
        folder = Path(path).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # a name that no folder can have, or ~nobody
        return None


def refuse_network_path(path: str, source: str, option: str) -> None:
    """Raise UserError for a path on another machine, unless the user types it.

    source: the file that names it. option: with which the user can name it.
    """
    if is_network_path(path):
        raise UserError(
            f"{source} names {path}, on another machine: add {option} {path} if you know it"
        )
