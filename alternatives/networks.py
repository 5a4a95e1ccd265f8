"""Networks that `--model` takes besides the script's own `cnn`."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

NAMES = ["beginner-cnn", "coursework-cnn"]


def build(name: str, classes: int, channels: int, image_size: int) -> nn.Module:
    """The network that one of NAMES or FILE.py:FACTORY stands for, tried on two images: lazy layers get their shapes.

    Raises ValueError if its output is not (2, classes), and whatever the factory or the network raises.
    """
    factory = from_file(name) if ".py:" in name else globals()[name.replace("-", "_")]
    network = factory(classes=classes, channels=channels, image_size=image_size)
    with torch.no_grad():  # rather now than after the run has begun
        shape = tuple(network.eval()(torch.zeros(2, channels, image_size, image_size)).shape)
    if shape != (2, classes):
        raise ValueError(f"2 images give {shape}, not (2, {classes}): a number for each class")
    return network.train()


def blocks(widths: list[int]) -> list[nn.Module]:
    """Conv 3×3, batch norm, ReLU and max-pooling to half the size, once for each width after the first."""
    pairs = zip(widths, widths[1:], strict=False)
    parts = [[nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)] for i, o in pairs]
    return [part for block in parts for part in block]


def beginner_cnn(classes: int = 10, channels: int = 3, image_size: int = 32) -> nn.Module:
    """Reference 002's network: two blocks of 32 and 64 channels, one hidden layer of 128; 545,290 parameters."""
    head = [nn.Linear(64 * (image_size // 4) ** 2, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes)]
    return nn.Sequential(*blocks([channels, 32, 64]), nn.Flatten(), *head)


def coursework_cnn(classes: int = 10, channels: int = 3, image_size: int = 32) -> nn.Module:
    """Reference 000's network, rebuilt from the sizes in its table's footer: 685,962 parameters."""
    head: list[nn.Module] = [nn.Linear(256 * (image_size // 16) ** 2, 256), nn.ReLU(), nn.Dropout(0.5)]
    head += [nn.Linear(256, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes)]
    return nn.Sequential(*blocks([channels, 32, 64, 128, 256]), nn.Flatten(), *head)


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
