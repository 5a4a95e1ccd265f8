"""Networks that `--model` takes besides the script's own `cnn`."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn


def from_file(name: str) -> Callable[..., nn.Module]:
    """The factory that FILE.py:FACTORY names: `factory(classes=10, channels=3, image_size=32) -> nn.Module`.

    Raises ValueError if there is no such file, if it fails, or has no such callable. The name is split at its last
    colon: C:\\nets.py:small works.
    """
    file, _, factory = name.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"network_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in it look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} fails with {error!r}") from error
    if not callable(found := getattr(module, factory, None)):
        raise ValueError(f"{file} has no function or class {factory}")
    return found
