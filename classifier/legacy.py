"""Settings, weights and states of version 0.9, in the names of this version."""

import math
import re
import unicodedata
from typing import Any

from classifier.errors import UserError
from classifier.progress import STEP_COST

RENAMED_OPTIONS = {"low_res": "progressive_resizing", "test_views": "tta"}
RENAMED_CHOICES = {("scheduler", "onecycle"): "linear"}
REMOVED_OPTIONS = {  # and why
    "depth": "convnet now always has 2 convolutions in each stage",
    "make_imbalanced": "it was used in benchmarks only",
}

# Keys of last.pth.
_RENAMED_STATE = {
    "average": "ema",
    "sums": "step_stats",
    "measured": "fingerprint",
}
# Layers of a stage of the network "cnn".
_RENAMED_LAYERS = {
    "first": "conv1",
    "first_norm": "norm1",
    "second": "conv2",
    "second_norm": "norm2",
}
# stages.0.first.weight, and module.stages.0.first.weight in a moving average.
_STAGE_KEY = re.compile(r"((?:module\.)?stages\.\d+)\.(\w+)\.(.+)")


def is_legacy(versions: dict[str, Any]) -> bool:
    """True if a file was written by version 0.9 or older, judging by the versions in it."""
    numbers = re.match(r"0\.(\d+)", str(versions.get("image_classification", "")))
    return numbers is not None and int(numbers[1]) < 10


def translate_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings under this version's names; those of this version stay as they are.

    settings: all or some of a Config, from config.json, a model file or a recipe. Raises UserError
    for a setting that this version cannot honour.
    """
    translated = {}
    for name, value in settings.items():
        if name in REMOVED_OPTIONS:
            _check_removed(name, value, settings)
            continue
        new_name = RENAMED_OPTIONS.get(name, name)
        if isinstance(value, str):
            value = RENAMED_CHOICES.get((new_name, value), value)
        translated[new_name] = value
    return translated


def _check_removed(name: str, value: Any, settings: dict[str, Any]) -> None:
    """UserError unless leaving out this setting changes nothing."""
    harmless = [None, 0]
    if name == "depth" and settings.get("model") == "convnet":
        harmless.append(2)
    if value not in harmless:
        raise UserError(
            f"the setting {name} {value} needs version 0.9.1 of this program: it has been removed"
        )


def translate_checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a .pth of version 0.9 under this version's names; the tensors are shared.

    content: of a model file or of last.pth, with at least "model" and "config". Raises UserError as
    translate_settings does.
    """
    translated = {_RENAMED_STATE.get(name, name): value for name, value in content.items()}
    translated["config"] = translate_settings(content["config"])
    if "parts" in content:
        parts = translated.pop("parts")  # for full-size images; there were fewer for smaller ones
        translated["micro_batches"] = {scale: math.ceil(parts * scale**2) for scale in STEP_COST}
    if translated["config"].get("model", "cnn") == "cnn":
        translated["model"] = _translate_weights(content["model"])
        if translated.get("ema"):
            translated["ema"] = _translate_weights(translated["ema"])
    if "optimizers" in content:
        translated["optimizers"] = [_translate_optimizer(each) for each in content["optimizers"]]
    return translated


def compose_names(classes: list[str]) -> list[str]:
    """Names of classes in Unicode's composed form, as `folder_layout` now gives them.

    Version 0.9 took the names of the folders as they were, and a Mac may write "é" as two
    characters. Where two names would be one, they stay as they are.
    """
    composed = [unicodedata.normalize("NFC", name) for name in classes]
    return composed if len(set(composed)) == len(classes) else classes


def _translate_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """stages.0.first.weight becomes stages.0.conv1.weight, and so on."""
    translated = {}
    for key, tensor in weights.items():
        match = _STAGE_KEY.fullmatch(key)
        if match:
            stage, layer, rest = match.groups()
            key = f"{stage}.{_RENAMED_LAYERS.get(layer, layer)}.{rest}"
        translated[key] = tensor
    return translated


def _translate_optimizer(saved: dict[str, Any]) -> dict[str, Any]:
    """Muon's state "momentum" becomes "momentum_buffer"; its hyperparameter keeps that name."""
    state = {}
    for index, weight_state in saved["state"].items():
        weight_state = dict(weight_state)
        if "momentum" in weight_state:
            weight_state["momentum_buffer"] = weight_state.pop("momentum")
        state[index] = weight_state
    return {**saved, "state": state}
