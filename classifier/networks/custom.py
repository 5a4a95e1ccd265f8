"""A user's network: --model FILE.py:FACTORY.

FACTORY is a function or class that is called as `factory(classes=10, channels=3, image_size=32)`
and returns a torch.nn.Module. FILE.py may import the modules beside it, except one that is named
`classifier`: it would get this package instead.
"""

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from classifier.checkpoints import load_state
from classifier.errors import UsageError, UserError, is_out_of_memory


def split_custom_model(model: str) -> tuple[str, str]:
    """FILE.py:FACTORY as (FILE.py, FACTORY). Raises UsageError if there is no such Python file."""
    file, _, factory = model.rpartition(":")  # the last colon: C:\nets.py:small has two
    if not Path(file).is_file() or Path(file).suffix != ".py":
        raise UsageError(f"unknown model {model}: there is no Python file {file}")
    return file, factory


def load_factory(model: str) -> Callable[..., nn.Module]:
    """Run FILE.py and return its FACTORY.

    Raises UserError if there is no such file, if it fails, or if it has no such function or class.
    """
    file, factory_name = split_custom_model(model)
    try:
        module = _run_file(file)
    except (Exception, SystemExit) as error:  # SystemExit: it may parse a command line
        hint = error_hint(error, model)
        raise UserError(f"--model {model}: {file} fails with {error!r}{hint}") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise UserError(f"--model {model}: {file} has no function or class {factory_name}")
    return factory


def _run_file(file: str) -> ModuleType:
    """Import a Python file, with its folder on sys.path, as if Python had been started with it."""
    spec = importlib.util.spec_from_file_location(f"network_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look themselves up there
    folder = str(Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    return module


def check_logits(logits: Any, num_classes: int, model: str) -> None:
    """Raise UserError unless a network's output for two images is logits, (2, num_classes)."""
    if not isinstance(logits, torch.Tensor):
        kind = type(logits).__name__
        raise UserError(
            f"--model {model}: the output is a {kind}, not a tensor of logits (N, {num_classes})"
        )
    shape = tuple(logits.shape)
    if shape != (2, num_classes):
        raise UserError(
            f"--model {model}: the output for 2 images is {shape}, not (2, {num_classes}): "
            "one logit for each class"
        )
    distances_from_1 = (logits.sum(1) - 1).abs()
    if (logits >= 0).all() and distances_from_1.max() < 1e-5:
        raise UserError(f"--model {model} ends in a softmax, but the loss has one: leave it out")


def smoke_test(
    network: nn.Module, model: str, image_shape: tuple[int, ...], batch_size: int
) -> None:
    """Train a network on empty images of that shape, (C, H, W), then restore its state.

    Raises UserError if that fails other than for lack of memory.
    """
    before = {name: value.clone() for name, value in network.state_dict().items()}
    try:
        _try_two_images_or_a_batch(network, model, image_shape, batch_size)
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # the run finds out how many images fit
            return
        reason = describe_error(error) + error_hint(error, model)
        raise UserError(f"--model {model} cannot be trained: {reason}") from error
    finally:
        network.zero_grad(set_to_none=True)
        load_state(network, before)  # batch norm has updated its statistics


def _try_two_images_or_a_batch(
    network: nn.Module, model: str, image_shape: tuple[int, ...], batch_size: int
) -> None:
    """Some networks, with ghost batch norm for one, take only certain numbers of images."""
    with contextlib.suppress(Exception):
        _forward_backward(network, model, torch.zeros(2, *image_shape))
        return
    _forward_backward(network, model, torch.zeros(batch_size, *image_shape))


def _forward_backward(network: nn.Module, model: str, images: torch.Tensor) -> None:
    network.train()
    logits = network(images)
    if not isinstance(logits, torch.Tensor):
        kind = type(logits).__name__
        raise UserError(
            f"--model {model} cannot be trained: in training its output is a {kind}, not a tensor"
        )
    if not logits.requires_grad:
        raise UserError(
            f"--model {model} cannot be trained: it has no weights, all of them are frozen, "
            "or it computes without gradients"
        )
    logits.sum().backward()


def describe_error(error: BaseException) -> str:
    """The message of an error, with its type where the message alone may say too little."""
    if isinstance(error, (ValueError, RuntimeError)):
        return str(error)
    return repr(error)


def error_hint(error: BaseException, model: str) -> str:
    """The last line of FILE.py that an error passed through, as " (FILE.py, line N)", or ""."""
    file = Path(model.rpartition(":")[0]).resolve()
    line = None
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).resolve() == file:
            line = frame.lineno
    return f" ({file.name}, line {line})" if line else ""
