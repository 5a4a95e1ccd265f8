"""Settings and states of version 0.9 under the names of this version."""

import copy
import unicodedata

import pytest

from classifier.config import Config
from classifier.errors import UserError
from classifier.legacy import (
    REMOVED_OPTIONS,
    RENAMED_CHOICES,
    RENAMED_OPTIONS,
    compose_names,
    is_legacy,
    translate_checkpoint,
    translate_settings,
)


def test_versions():
    for version in ("0.9.1", "0.9.0", "0.1", "0.9.1.dev0"):
        assert is_legacy({"image_classification": version}), version
    for version in ("0.10.0", "0.11", "1.0.0", "10.9", "", None, "2026"):
        assert not is_legacy({"image_classification": version}), version
    assert not is_legacy({})


def test_names_exist_only_on_one_side():
    known = Config.__dataclass_fields__
    assert not (RENAMED_OPTIONS.keys() | REMOVED_OPTIONS.keys()) & known.keys()
    assert set(RENAMED_OPTIONS.values()) <= known.keys()
    for (name, _), choice in RENAMED_CHOICES.items():
        assert choice in known[name].metadata["choices"]


def test_settings_get_their_new_names():
    old = {
        "model": "cnn",
        "low_res": 0.7,
        "test_views": 6,
        "scheduler": "onecycle",
        "depth": None,
        "make_imbalanced": 0.0,
        "lr": 0.12,
        "substitution": "onecycle",
    }
    before = copy.deepcopy(old)
    new = translate_settings(old)
    assert new == {
        "model": "cnn",
        "progressive_resizing": 0.7,
        "tta": 6,
        "scheduler": "linear",
        "lr": 0.12,
        "substitution": "onecycle",  # of another setting it is no choice
    }
    assert old == before
    assert translate_settings(new) == new
    new.pop("substitution")
    assert Config(**new).scheduler == "linear"


def test_odd_values_are_left_to_the_checks_of_config():
    odd = {"scheduler": ["onecycle"], "test_views": {"a": 1}}
    assert translate_settings(odd) == {"scheduler": ["onecycle"], "tta": {"a": 1}}


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "convnet", "depth": 3},
        {"model": "convnet", "depth": 1},
        {"model": "mine.py:net", "depth": 4},
        {"model": "mine.py:net", "depth": 2},  # the factory's default may be another number
        {"make_imbalanced": 0.1},
    ],
)
def test_removed_setting_that_counts_is_refused(settings):
    with pytest.raises(UserError, match=r"0\.9\.1") as caught:
        translate_settings(settings)
    assert "\n" not in str(caught.value)


def test_removed_setting_that_changes_nothing_is_dropped():
    assert translate_settings({"model": "convnet", "depth": 2}) == {"model": "convnet"}
    assert translate_settings({"make_imbalanced": 0}) == {}


def weights_of_0_9(prefix=""):
    keys = ["whiten.weight", "classifier.weight"]
    for stage in (0, 1, 2):
        for layer in ("first", "first_norm", "second", "second_norm"):
            keys.append(f"stages.{stage}.{layer}.weight")
        keys.append(f"stages.{stage}.first_norm.running_mean")
    return {prefix + key: key for key in keys}


def test_weights_of_cnn_get_their_new_names_in_order():
    content = {"config": {"model": "cnn"}, "model": weights_of_0_9()}
    new = translate_checkpoint(content)["model"]
    assert list(new)[:8] == [
        "whiten.weight",
        "classifier.weight",
        "stages.0.conv1.weight",
        "stages.0.norm1.weight",
        "stages.0.conv2.weight",
        "stages.0.norm2.weight",
        "stages.0.norm1.running_mean",
        "stages.1.conv1.weight",
    ]
    assert list(new.values()) == list(content["model"].values())
    assert not any("first" in key or "second" in key for key in new)


def test_weights_of_other_networks_keep_their_names():
    for model in ("convnet", "resnet18", "mine.py:net"):
        content = {"config": {"model": model}, "model": weights_of_0_9()}
        assert translate_checkpoint(content)["model"] == weights_of_0_9()


def test_names_of_classes_are_composed():
    """As those of folders are now."""
    parts, composed = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    assert compose_names(["bar", parts]) == ["bar", composed]
    assert compose_names([composed, parts]) == [composed, parts]


def test_state_of_a_run():
    momentum, step = object(), object()
    groups = [{"lr": 0.12, "momentum": 0.6, "params": [0]}]
    content = {
        "config": {"low_res": 0.7, "scheduler": "onecycle"},
        "model": weights_of_0_9(),
        "average": {"n_averaged": 3, **weights_of_0_9("module.")},
        "sums": "sums",
        "parts": 3,
        "measured": [1.0, 2.0],
        "optimizers": [
            {"state": {0: {"momentum": momentum}}, "param_groups": groups},
            {"state": {0: {"step": step}}, "param_groups": []},
        ],
        "step": 7,
        "history": [{"epoch": 0}],
    }
    before = copy.copy(content)
    new = translate_checkpoint(content)
    assert new["config"] == {"progressive_resizing": 0.7, "scheduler": "linear"}
    assert new["step_stats"] == "sums"
    assert new["micro_batches"] == {0.5: 1, 0.75: 2, 1.0: 3}  # as 0.9 computed smaller images
    assert new["fingerprint"] == [1.0, 2.0] and new["step"] == 7
    assert not new.keys() & {"sums", "parts", "measured", "average"}
    assert new["ema"]["module.stages.2.norm2.weight"] == "stages.2.second_norm.weight"
    assert new["ema"]["n_averaged"] == 3 and len(new["ema"]) == len(content["average"])
    assert new["optimizers"][0]["state"] == {0: {"momentum_buffer": momentum}}
    assert new["optimizers"][0]["param_groups"] == groups
    assert new["optimizers"][1]["state"] == {0: {"step": step}}
    assert content == before and content["optimizers"][0]["state"][0] == {"momentum": momentum}


def test_state_without_a_moving_average_or_fingerprint():
    content = {"config": {}, "model": weights_of_0_9(), "average": None}
    new = translate_checkpoint(content)
    assert new["ema"] is None and "fingerprint" not in new and "optimizers" not in new
    assert "stages.0.conv1.weight" in new["model"]  # cnn is the default
