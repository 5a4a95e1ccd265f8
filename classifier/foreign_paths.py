"""Paths in untrusted files: model files, run folders and recipes may come from other people.

Paths that the user types are used as given. Those in a file are only read: nothing is written or
downloaded there, and no other machine is contacted.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from classifier.cli import command_line
from classifier.config import FIELD_TYPES, PATHS, flag, is_custom_model
from classifier.errors import UserError

# Settings that name a place to read. A network path among them has to be typed again.
PLACES_TO_READ = ("dataset", "labels", "data_dir", "init_from")


def is_network_path(path: str) -> bool:
    """Whether a path looks like one on another machine: \\\\server\\share, as Windows writes it.

    Merely checking whether it exists would send the user's name and a hash of the password there.
    Windows takes both kinds of slashes. Elsewhere //folder is on this machine, but is treated
    alike, as a file may go from one system to another.
    """
    return path[:2] in ("\\\\", "//", "\\/", "/\\")


def existing_folder(path: str) -> Path | None:
    """The folder of this name if there is one on this machine, else None; ~ is the home folder."""
    return _existing(path, Path.is_dir)


def existing_file(path: str) -> Path | None:
    """The file of this name if there is one on this machine, else None; ~ is the home folder."""
    return _existing(path, Path.is_file)


def _existing(path: str, is_it: Callable[[Path], bool]) -> Path | None:
    """The path if it is on this machine and `is_it`, else None."""
    if is_network_path(path):
        return None
    try:
        place = Path(os.path.expanduser(path))
        return place if is_it(place) else None
    except (OSError, ValueError):  # a name that nothing can have
        return None


def full_path(folder: str) -> str:
    """The full path of a folder that the user has typed, as it is written into files.

    Links are followed. But a network drive, H:\\photos, stays what it is: the path that it stands
    for, \\\\server\\photos, would have to be typed again wherever a file names it.
    """
    path = Path(os.path.expanduser(folder))
    resolved = str(path.resolve())
    return os.path.abspath(path) if is_network_path(resolved) else resolved


def format_option(name: str, value: str) -> str:
    """An option and its value, quoted for the shell: --out 'my model.pth'."""
    return command_line([flag(name), value])


def refuse_network_path(path: str, source: str, name: str) -> None:
    """Raise UserError for what looks like a network path, unless the user types it.

    source: the file that names it. name: of the setting.
    """
    if is_network_path(path):
        raise UserError(
            f"{source} names {path}, which looks like a network path: add "
            f"{format_option(name, path)} if you know it"
        )


def settings_to_repeat(settings: Mapping[str, Any]) -> dict[str, str]:
    """Those of a run's settings that resuming takes only from the command line, if at all.

    The run folder may be somebody else's, and does not decide on them: the file of a custom
    network, network paths, and the file that the model is written to. (Resuming takes a
    plain file name for the model from the run folder, too.)

    settings: by name; missing ones count as empty.
    """
    found = {}
    if is_custom_model(settings.get("model", "")):
        found["model"] = settings["model"]
    for name in PLACES_TO_READ:
        if is_network_path(settings.get(name) or ""):
            found[name] = settings[name]
    if settings.get("out"):
        found["out"] = settings["out"]
    return found


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run for a file to give away, which says nothing of this machine's folders.

    Of paths the last part stays: photos of /home/ann/photos. A mirror is left out, and so is
    everything that is no setting.

    settings: by name; some may be missing.
    """
    kept = {name: value for name, value in settings.items() if name in FIELD_TYPES}
    kept.pop("mirror", None)
    places = [*PATHS, "recipe"]
    if is_custom_model(kept.get("model") or ""):
        places.append("model")
    for name in places:
        path = kept.get(name)
        if not isinstance(path, str):
            continue
        last_part = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
        if name == "dataset" and last_part != path:
            last_part = f"./{last_part}"  # so that a folder mnist is not taken for MNIST
        kept[name] = last_part
    return kept
