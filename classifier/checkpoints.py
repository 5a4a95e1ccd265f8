"""Model files and saved states: written whole, read without executing anything in them."""

import errno
import io
import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from classifier import legacy
from classifier.cli import command_line, program
from classifier.config import FIELD_TYPES, Config, is_custom_model
from classifier.errors import UserError, is_out_of_memory
from classifier.files import write_atomically
from classifier.text import has_control_characters

# build(config, num_classes, mean, std, image_size, skip_check=...) -> the network on the CPU
Build = Callable[..., nn.Module]

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")  # under which others keep one
SAFETENSORS = ".safetensors"  # how the names of its files end
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and DDP, and of torch.compile

REQUIRED = {  # what every checkpoint holds; last.pth holds more
    "model": dict,
    "config": dict,
    "classes": list,
    "mean": list,
    "std": list,
    "image_size": int,
    "metrics": dict,
    "versions": dict,
}
# What a model file may hold besides. Everything else, such as the state of a run, is not exported.
OPTIONAL = ("dataset", "train_images", "fingerprint", "split_rules", "pixel_ranges", "report")
DIGESTS = ("train_digests", "earlier_digests")  # int64 (N,): see seen_images

SCORE = "ood_score"  # how unlike the training images an image is: see ood_score.with_score
# Characters of metadata: as Python's objects they take up to 20 times as much.
MAX_JSON = 10_000_000


def save_checkpoint(path: Path | str, content: dict[str, Any]) -> None:
    """Write a checkpoint that `torch.load(path, weights_only=True)` reads, atomically.

    content: tensors, str, int, float, bool, None, and lists and dicts of them.
    """
    buffer = io.BytesIO()  # in memory first: if the disk is full, the old file stays as it was
    torch.save(content, buffer)
    write_atomically(Path(path), buffer.getvalue())


def read_checkpoint(path: Path | str, classes: list[str] | None = None) -> dict[str, Any]:
    """Read a checkpoint, executing nothing in it; one of version 0.9 comes in today's names.

    classes: if given, those that the checkpoint has to be for.

    Raises UserError if the file is damaged, not one of our checkpoints, or for other classes, and
    OSError, which names it, if it cannot be read.
    """
    damaged = UserError(
        f"{path} is damaged or not a checkpoint of this program (nothing in it was executed)"
    )
    content = _load(Path(path))
    if not _is_checkpoint(content):
        weights = _find_state_dict(content)
        raise damaged if weights is None else bare_weights_error(path, weights)
    if legacy.is_legacy(content["versions"]):
        content["classes"] = legacy.compose_names(content["classes"])
    if classes and classes != content["classes"]:
        raise UserError(f"{path} is for other classes: {', '.join(content['classes'])}")
    if not legacy.is_legacy(content["versions"]):
        return content
    try:
        return legacy.translate_checkpoint(content)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise damaged from None


def _load(path: Path) -> Any:
    """What torch.save or `to_safetensors` wrote, or None if it cannot be read safely.

    Raises OSError, which names the file, if the disk fails, and torch's error if memory runs out;
    UserError as `read_safetensors` does.
    """
    if path.suffix.lower() == SAFETENSORS:
        return _from_safetensors(*read_safetensors(path))
    is_zip = False
    with open(path, "rb") as file:
        try:
            is_zip = zipfile.is_zipfile(file)
            if is_zip:
                entries = zipfile.ZipFile(file).infolist()
                uncompressed_size = sum(entry.file_size for entry in entries)
                file_size = file.seek(0, os.SEEK_END)
                # torch.save does not compress; a compressed file could grow to any size in memory
                if uncompressed_size > file_size:
                    return None
            file.seek(0)
            return torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # torch may raise anything for a damaged file
            # EINVAL: the offsets in a damaged file may be negative
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise OSError(error.errno, error.strerror, str(path)) from None
            # a damaged file in the older format, which is no ZIP file, may ask for any amount
            if is_zip and is_out_of_memory(error):
                raise
            return None


def _is_checkpoint(content: Any) -> bool:
    """True if everything that a checkpoint has to hold is there and of the right type."""
    if not isinstance(content, dict):
        return False
    for name, expected_type in REQUIRED.items():
        if not isinstance(content.get(name), expected_type):
            return False
    weights = content["model"]
    return (
        all(isinstance(name, str) for name in content["classes"])
        and not any(has_control_characters(name) for name in content["classes"])
        and all(isinstance(number, float) for number in content["mean"] + content["std"])
        and all(isinstance(name, str) for name in weights)
        and all(isinstance(tensor, torch.Tensor) for tensor in weights.values())
    )


# ---- Safetensors ---------------------------------------------------------------------------------


def read_safetensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors in a safetensors file, on the CPU, and its metadata, which may be empty.

    Such a file holds numbers and text, and so nothing that could be executed. Raises UserError if
    it is damaged or the package is missing, and OSError, which names it, if it cannot be read.
    """
    try:
        from safetensors.torch import load
    except ImportError:
        raise UserError(f"{path} needs safetensors: pip install safetensors") from None
    content = Path(path).read_bytes()
    try:
        weights = load(content)
        # the package has checked the header: its size, 8 bytes, and then JSON
        header_size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_size])
    except Exception as error:  # the package may raise anything for a damaged file
        if is_out_of_memory(error):
            raise
        reason = type(error).__name__
        raise UserError(f"{path} is damaged or not a safetensors file ({reason})") from None
    return weights, header.get("__metadata__") or {}


def to_safetensors(content: dict[str, Any]) -> bytes:
    """The content of a checkpoint as that of a safetensors file, which `read_checkpoint` reads.

    The weights have the names of the state dict. Everything else is in the metadata, which take
    nothing but text: each value as JSON, and digests as hexadecimal digits. What only resuming
    needs is left out. Raises UserError for values that no model file has.
    """
    from safetensors.torch import save

    metadata = {"format": "pt"}  # by which other programs know that these are torch's
    try:
        for name in (*REQUIRED, *OPTIONAL):
            if name in content and name != "model":
                metadata[name] = json.dumps(content[name])
    except (TypeError, ValueError, RecursionError):
        raise UserError(
            f"{name!r} in the model file cannot be written to a safetensors file"
        ) from None
    for name in DIGESTS:
        digests = content.get(name)
        if isinstance(digests, torch.Tensor):
            metadata[name] = digests.numpy().astype("<i8").tobytes().hex()
    weights = {}
    for name, tensor in content["model"].items():
        # safetensors refuses tensors that share memory
        weights[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if SCORE in content:
        score = dict(content[SCORE])
        for name, tensor in score.pop("tensors").items():
            weights[f"{SCORE}.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
        metadata[SCORE] = json.dumps(score)
    return save(weights, metadata)


def _from_safetensors(
    weights: dict[str, torch.Tensor], metadata: dict[str, str]
) -> dict[str, Any] | None:
    """The content of a checkpoint that `to_safetensors` wrote; of any other file, its weights.

    None if the metadata are damaged.
    """
    described = [name for name in (*REQUIRED, *OPTIONAL) if name in metadata and name != "model"]
    if not set(REQUIRED) <= {"model", *described}:
        return dict(weights)
    if sum(len(metadata[name]) for name in (*described, SCORE) if name in metadata) > MAX_JSON:
        return None
    content: dict[str, Any] = {"model": weights}
    try:
        for name in described:
            content[name] = json.loads(metadata[name])
        for name in DIGESTS:
            if name in metadata:
                digests = np.frombuffer(bytes.fromhex(metadata[name]), "<i8")
                content[name] = torch.from_numpy(digests.astype(np.int64))
        if SCORE in metadata:
            prefix = f"{SCORE}."
            names = [name for name in weights if name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): weights.pop(name) for name in names}
            content[SCORE] = {**json.loads(metadata[SCORE]), "tensors": tensors}
    except (TypeError, ValueError, RecursionError):
        return None
    return content


# ---- State dicts ---------------------------------------------------------------------------------


def read_state_dict(path: Path | str) -> dict[str, torch.Tensor] | None:
    """The weights in a file of another program, or None if it holds something else.

    It may hold a plain state dict, such as torchvision publishes, or one among other things.
    Nothing in it is executed. Raises OSError, which names it, if it cannot be read.
    """
    return _find_state_dict(_load(Path(path)))


def _find_state_dict(content: Any) -> dict[str, torch.Tensor] | None:
    """The state dict that the content of a file is or holds, or None.

    None, too, for a file that is meant to be a checkpoint of this program but lacks something.
    """
    if not isinstance(content, dict) or "classes" in content:
        return None
    for candidate in (content, *(content.get(name) for name in STATE_DICT_KEYS)):
        if not isinstance(candidate, dict):
            continue
        weights = {name: value for name, value in candidate.items() if name != "n_averaged"}
        is_state_dict = all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in weights.items()
        )
        if weights and is_state_dict:
            return weights
    return None


def bare_weights_error(path: Path | str, weights: dict[str, torch.Tensor]) -> UserError:
    """The error for a file that holds weights and nothing else that is needed."""
    command = program("image_classification.py") or ["python", "image_classification.py"]
    return UserError(
        f"{path} is a state dict of {len(weights)} tensors: it holds neither the names of the "
        "classes nor the mean and standard deviation of the images; to train from it: "
        + command_line([*command, "--model", "NAME", "--init-from", str(path)])
    )


def without_wrapper(
    weights: dict[str, torch.Tensor], expected: Container[str]
) -> dict[str, torch.Tensor]:
    """The same weights under the names that a network has.

    DataParallel and DDP put "module." before each name, torch.compile "_orig_mod.", and both may
    have done so. Weights whose names fit, or that no such prefix explains, stay as they are.

    expected: the network's own names.
    """
    names = {name: name for name in weights}
    while not any(name in expected for name in names):
        for prefix in WRAPPER_PREFIXES:
            if names and all(name.startswith(prefix) for name in names):
                names = {name.removeprefix(prefix): old for name, old in names.items()}
                break
        else:
            return weights
    return {name: weights[old] for name, old in names.items()}


def check_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path | str) -> None:
    """Raise UserError unless names and shapes of the weights are those of the model.

    The names may have a prefix: see `without_wrapper`. path: the file that the weights are from,
    for the message.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = without_wrapper(weights, expected)
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    different = [name for name in expected | found if expected.get(name) != found.get(name)]
    if different:
        first = different[0]
        raise UserError(
            f"{path} holds another network: {len(different)} tensors differ, "
            f"{first} is {found.get(first, 'missing')} there, {expected.get(first, 'missing')} here"
        )


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path | str) -> None:
    """Load weights whose names and shapes all fit; otherwise UserError and an unchanged model."""
    check_weights(model, weights, path)
    load_state(model, without_wrapper(weights, model.state_dict()))


def load_state(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load a module's state that has lost the versions which PyTorch keeps beside the names.

    Files hold plain dictionaries. Without versions a module may take its state for that of an old
    PyTorch, and torchvision's MNASNet refuses it. The names and shapes are those of this module, so
    its own versions are right.
    """
    versioned = OrderedDict(state)
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(versioned)


def load_model(path: Path | str, build: Build, model: str = "") -> tuple[nn.Module, dict[str, Any]]:
    """Load a finished model, in eval mode on the CPU, and return it with the checkpoint's content.

    Args:
        build: builds the network that a Config names. Unless skip_check=True it also sends two
            empty images through it. Raises UserError for a network that does not work.
        model: FILE.py:FACTORY of a user's network. A checkpoint never makes this program import
            the file that it names, so the user names it again.
    """
    content = read_checkpoint(path)
    settings = {name: value for name, value in content["config"].items() if name in FIELD_TYPES}
    config = Config(**settings)
    if is_custom_model(config.model) and not model:
        advice = command_line(["--model", config.model])
        raise UserError(f"{path} holds a network of your own: add {advice}")
    config = replace(config, model=model or config.model)

    def build_described(skip_check: bool) -> nn.Module:
        num_classes, image_size = len(content["classes"]), content["image_size"]
        return build(
            config, num_classes, content["mean"], content["std"], image_size, skip_check=skip_check
        )

    skip_check = False
    if not is_custom_model(config.model):
        skip_check = _compare_on_meta(build_described, content["model"], path)
    network = build_described(skip_check)
    load_weights(network, content["model"], path)
    return network.eval(), content


def _compare_on_meta(
    build: Callable[[bool], nn.Module], weights: dict[str, torch.Tensor], path: Path | str
) -> bool:
    """Compare a file's weights with the network it describes, before that takes any memory.

    Meta tensors have shapes but no values: a damaged or hostile file may describe a network of any
    size, and only one with weights of these shapes is allocated afterwards.

    Returns True if the real network's forward pass need not be checked: here it was, or the network
    cannot be built on the meta device. In that case the weights are compared when they are loaded.
    Raises UserError if names or shapes of the weights differ.
    """
    network = _build_on_meta(build, skip_check=False)
    is_checked = network is not None
    if network is None:  # meta tensors do not know every operation, or the images do not fit
        network = _build_on_meta(build, skip_check=True)
    if network is None:  # torchvision's RegNets, for example, cannot be built on the meta device
        return True
    check_weights(network, weights, path)
    return is_checked


def _build_on_meta(build: Callable[[bool], nn.Module], skip_check: bool) -> nn.Module | None:
    """The network on the meta device, or None where it cannot be built there."""
    with torch.device("meta"):
        try:
            return build(skip_check)
        except UserError:
            return None
