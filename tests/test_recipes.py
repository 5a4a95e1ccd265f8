"""Recipes by name and in files, and the tables of defaults."""

import dataclasses
import json

import pytest

from classifier.config import FIELD_TYPES, Config
from classifier.errors import UsageError, UserError
from classifier.recipes import (
    DATASET_DEFAULTS,
    LIBRARY_DEFAULTS,
    NETWORK_DEFAULTS,
    NOT_IN_RECIPES,
    OPTIMIZER_DEFAULTS,
    PRETRAINED_DEFAULTS,
    RECIPES,
    defaults_for_images,
    find_recipe,
    read_recipe,
)

# By the references' READMEs.
STATED = {
    "coursework": {"model": "coursework-cnn", "epochs": 10},
    "resnet-augmented": {
        "model": "resnet18",
        "optimizer": "adam",
        "scheduler": "plateau",
        "augment": "flip,rotate=20,brightness=0.2,contrast=0.2,saturation=0.2,sharpness,erase=0.75",
    },
    "beginner": {
        "model": "beginner-cnn",
        "epochs": 10,
        "batch_size": 32,
        "optimizer": "adam",
        "lr": 0.001,
        "augment": "flip,crop=4",
    },
    "resnet-dropout": {"model": "resnet18-dropout", "epochs": 25},
    "notebook": {
        "model": "notebook-cnn",
        "batch_size": 20,
        "val_fraction": 0.2,
        "optimizer": "sgd",
        "lr": 0.01,
    },
}


@pytest.mark.parametrize("name", STATED)
def test_recipe_is_what_its_reference_states(name):
    config = dataclasses.asdict(Config(**find_recipe(name)))
    expected = {**STATED[name], "precision": "fp32", "label_smoothing": 0.0}
    for setting, value in expected.items():
        assert config[setting] == value, setting
    if name == "resnet-augmented":
        assert config["grad_clip"] > 0 and config["weight_decay"] > 0


def test_tables_hold_valid_settings():
    tables = [RECIPES, DATASET_DEFAULTS, OPTIMIZER_DEFAULTS, NETWORK_DEFAULTS]
    several = [settings for table in tables for settings in table.values()]
    for settings in [*several, LIBRARY_DEFAULTS, PRETRAINED_DEFAULTS]:
        assert Config(**settings)
        assert not settings.keys() & NOT_IN_RECIPES
    for settings in OPTIMIZER_DEFAULTS.values():
        assert settings.keys() == {"lr", "momentum", "weight_decay"}


def test_recipe_that_is_found_can_be_changed_without_changing_the_table():
    find_recipe("beginner").clear()
    assert find_recipe("beginner") and find_recipe("default") == {}


@pytest.mark.parametrize("name", ["defualt", "", "accuracy96", "nothing at all"])
def test_unknown_recipe_is_wrong_usage(name):
    with pytest.raises(UsageError, match=f"unknown recipe {name}"):
        find_recipe(name)


def test_unknown_recipe_gets_the_closest_name():
    with pytest.raises(UsageError, match=r"did you mean default\?"):
        find_recipe("defualt")


def test_recipe_in_a_file(folder):
    settings = {"dataset": "digits", "epochs": 1, "lr": 0.5, "freeze": True}
    (folder / "mine.json").write_text(json.dumps(settings))
    assert find_recipe("mine.json") == settings
    assert read_recipe(folder / "mine.json") == settings


def test_recipe_file_with_a_byte_order_mark(folder):
    (folder / "mine.json").write_text('{"epochs": 3}', encoding="utf-8-sig")
    assert find_recipe("mine.json") == {"epochs": 3}


def test_recipe_file_of_version_0_9(folder):
    old = {"low_res": 0.5, "test_views": 6, "scheduler": "onecycle", "depth": None, "lr": 0.1}
    (folder / "best.json").write_text(json.dumps(old))
    new = {"progressive_resizing": 0.5, "tta": 6, "scheduler": "linear", "lr": 0.1}
    assert find_recipe("best.json") == new


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '"lr"', "3", "", '{"lr": 0.1,}', '{"learning_rate": 1}', '{"debug": true}'],
)
def test_wrong_recipe_file_is_named(folder, text):
    (folder / "mine.json").write_text(text)
    with pytest.raises(UserError, match="mine.json") as caught:
        find_recipe("mine.json")
    assert not isinstance(caught.value, UsageError) and "\n" not in str(caught.value)


def test_recipe_file_that_is_no_text(folder):
    (folder / "mine.json").write_bytes(b"\xff\xfe\x00\xd8\xff")
    with pytest.raises(UserError, match="mine.json"):
        find_recipe("mine.json")


def test_unknown_setting_in_a_file_gets_the_closest_name(folder):
    (folder / "mine.json").write_text('{"epoch": 1}')
    with pytest.raises(UserError, match=r"did you mean epochs\?"):
        find_recipe("mine.json")


def test_missing_recipe_file(folder):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        find_recipe("nowhere.json")


@pytest.mark.parametrize("pretrained", [False, True])
def test_defaults_follow_the_number_of_images(pretrained):
    assert FIELD_TYPES.keys() >= defaults_for_images(1, 8, True, pretrained).keys()
    previous = None
    for count in (1, 20, 200, 2000, 20_000, 200_000):
        defaults = defaults_for_images(count, 32, True, pretrained)
        assert 16 <= defaults["batch_size"] <= (64 if pretrained else 500)
        assert (5 if pretrained else 11) <= defaults["epochs"] <= (30 if pretrained else 60)
        if previous:
            assert defaults["batch_size"] >= previous["batch_size"]
            assert defaults["epochs"] <= previous["epochs"]
        previous = defaults


def test_defaults_of_particular_sets():
    small = defaults_for_images(99, 64, True, False)
    assert small == {
        "epochs": 60,
        "batch_size": 16,
        "augment": "flip,crop=4",
        "progressive_resizing": 0.7,
        "drop_easiest": 0.0,
    }
    digits_like = defaults_for_images(60_000, 27, False, False)
    assert digits_like["augment"] == "crop=1" and digits_like["progressive_resizing"] == 0.0
    assert digits_like["batch_size"] == 500 and digits_like["epochs"] == 11
    assert defaults_for_images(1280, 224, True, True)["epochs"] == 15  # 300 steps of 64 images
