"""Files from somebody else decide on no place: where to write, what to download, whom to ask."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import QUICK, only_run, trainer_of, write_images
from optuna.trial import TrialState

import image_classification as ic
import inference
from classifier.cli import command_line
from classifier.config import FIELD_TYPES, Config
from classifier.datasets import download, image_cache, load
from classifier.datasets import folder as folder_loader
from classifier.errors import UserError
from classifier.foreign_paths import settings_to_repeat
from classifier.progress import COLUMNS
from classifier.recipes import NOT_IN_RECIPES
from classifier.resolve import configure
from classifier.runs import resume_config
from classifier.study import SETTINGS, WORKER, Study, trial_settings

SHARE = r"\\server\share"
# A value for every setting that is a path, a URL or a file to execute.
PLACES = {
    "dataset": "~/stranger/photos",
    "labels": "~/stranger/labels.csv",
    "data_dir": "~/stranger/data",
    "mirror": "http://127.0.0.1:9/stranger.tar.gz",
    "model": "~/stranger/evil.py:network",
    "init_from": "~/stranger/weights.pth",
    "recipe": "~/stranger/recipe.json",
    "run_dir": "~/stranger/run",
    "out": "~/stranger/model.pth",
    "resume": "~/stranger/run",
}


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    """A model of the digits that has not made a step."""
    trainer = trainer_of(width=0.25)
    trainer.state.progress.history.append(dict.fromkeys(COLUMNS))
    path = tmp_path_factory.mktemp("model") / "model.pth"
    ic.save_checkpoint(path, trainer.state.model_file())
    return path


@pytest.fixture
def home(folder, monkeypatch):
    """An empty home folder; nothing can be downloaded."""
    home = folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setattr(download, "SOURCES", ["http://127.0.0.1:9/cifar.tar.gz"])
    monkeypatch.setattr("urllib.request._opener", None)  # it remembers the first proxies it saw
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    return home


def stranger(own_file, **settings):
    """A model file model_stranger.pth with these settings, in the current folder."""
    content = torch.load(own_file, weights_only=True)
    content["config"] |= settings
    ic.save_checkpoint("model_stranger.pth", content)
    return "model_stranger.pth"


def test_each_setting_that_names_a_place_is_tried_here():
    texts = {name for name, kind in FIELD_TYPES.items() if kind is str}
    harmless = {"optimizer", "scheduler", "augment", "class_balance", "device", "precision", "fit"}
    assert texts - harmless == PLACES.keys()


# ---- a model file ----


SLOW_EXPORT = pytest.param("export", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["explain", SLOW_EXPORT, "inference", "app"])
@pytest.mark.parametrize("dataset", ["cifar10", "mnist", "~/stranger/photos", SHARE])
def test_model_file_decides_on_no_place(own_file, home, tool_inside, monkeypatch, name, dataset):
    """Not on a folder that exists and is empty, either."""
    (home / "empty").mkdir()
    for data_dir in ("~/stranger", "~/empty", SHARE):
        places = PLACES | {"model": "cnn", "dataset": dataset, "data_dir": data_dir}
        path = stranger(own_file, **places)
        if name == "app":
            import app

            model = inference.load_model(path, "cpu")
            assert app.write_test_images(model, None, Path()) == []
        elif name == "explain":  # it would download what it knows, into data/
            error = tool_inside("explain").error("--checkpoint", path)
            assert dataset in error or "CIFAR-10" in error
        elif name == "export":
            monkeypatch.setattr("export.NUM_COMPARED", 10)
            out, _ = tool_inside("export")("--checkpoint", path, "--format", "pt2")
            assert "random images" in out
        elif name == "inference":
            tool_inside("inference")("nothing.png", "--checkpoint", path, status=1)
    assert not list((home / "empty").iterdir())
    # libraries have their caches in hidden folders there
    assert {path.name for path in home.iterdir() if path.name[0] != "."} == {"empty"}
    expected = {"home", "data", "explained", "model_stranger.pth", "model_stranger.pt2"}
    assert {path.name for path in Path().iterdir()} <= expected


def test_cifar10_is_fetched_into_the_default_folder_or_the_typed_one(
    own_file, home, tool_inside, monkeypatch
):
    places = []

    def download_archive(folder, mirror):
        places.append((str(folder), mirror))
        raise UserError("CIFAR-10 is not available")

    monkeypatch.setattr(download, "download_archive", download_archive)
    path = stranger(own_file, dataset="cifar10", data_dir="~/stranger", mirror=PLACES["mirror"])
    tool_inside("explain").error("--checkpoint", path)
    tool_inside("explain").error("--checkpoint", path, "--data-dir", "mine")
    assert places == [("data", ""), ("mine", "")]


def test_folder_that_a_file_names_has_to_hold_the_images_of_the_training(folder, inside):
    write_images(folder / "photos", {"red": 40, "green": 40}, seed=0)
    write_images(folder / "others", {"red": 40, "green": 40}, seed=1)
    inside("--dataset", "photos", "--epochs", "1", "--width", "0.25", "--image-size", "16")
    (path,) = folder.glob("model_*.pth")
    own = inference.load_model(path, "cpu")
    assert inference.load_dataset_of(own).name == "photos"

    for fingerprint in (own.fingerprint, "damaged"):
        content = torch.load(path, weights_only=True) | {"fingerprint": fingerprint}
        content["config"]["dataset"] = str(folder / "others")
        ic.save_checkpoint("model_stranger.pth", content)
        model = inference.load_model("model_stranger.pth", "cpu")
        with pytest.raises(UserError, match="--data-dir"):
            inference.load_dataset_of(model)
    assert inference.load_dataset_of(model, "others").name == "others"  # the user says so


def test_folder_of_other_classes_is_not_read(own_file, folder, monkeypatch, tool_inside):
    """A stranger's file may name any folder, and reading it takes long and fills the disk."""
    write_images(folder / "photos", {"red": 12, "green": 12})
    monkeypatch.setattr(image_cache, "open_cache", lambda *_: pytest.fail("it reads the images"))
    monkeypatch.setattr(folder_loader, "open_cache", image_cache.open_cache)
    path = stranger(own_file, dataset=str(folder / "photos"))
    assert "classes" in tool_inside("explain").error("--checkpoint", path)
    model = inference.load_model(path, "cpu")
    with pytest.raises(UserError, match="classes"):
        inference.load_dataset_of(model, "photos")


def test_setting_that_is_invalid_is_no_wrong_usage(own_file, folder, tool_inside):
    path = stranger(own_file, val_fraction=7.0)
    assert "--val-fraction" in tool_inside("explain").error("--checkpoint", path)


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": {"temperature": "hot"}},
        {"metrics": {"temperature": -1.0}},
        {"metrics": {"temperature": float("nan")}},
        {"metrics": {"test_accuracy": [1]}},
        {"dataset": 3},
        {"dataset": "\x1b[2Jdigits"},
        {"classes": ["\x1b[2J", *"123456789"]},
    ],
)
def test_values_that_no_model_has_are_refused(own_file, folder, change):
    ic.save_checkpoint("model.pth", torch.load(own_file, weights_only=True) | change)
    with pytest.raises(UserError, match=r"model\.pth is damaged"):
        inference.load_model("model.pth", "cpu")


def test_model_for_grey_images_is_refused(own_file, folder):
    content = torch.load(own_file, weights_only=True) | {"mean": [0.5], "std": [0.25]}
    network = ic.instantiate(Config(width=0.25), 10, [0.5], [0.25], image_size=32)
    content["model"] = network.state_dict()
    ic.save_checkpoint("grey.pth", content)
    with pytest.raises(UserError, match=r"grey\.pth .*1 channels"):
        inference.load_model("grey.pth", "cpu")


# ---- a run folder ----


def write_run(path, **settings):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(asdict(Config()) | settings))
    return str(path)


def test_run_folder_decides_on_no_place(folder, home):
    places = {"data_dir": "~/stranger/data", "mirror": PLACES["mirror"]}
    config = resume_config(write_run(folder / "run", **places))
    assert (config.data_dir, config.mirror) == ("data", "")
    config = resume_config(str(folder / "run"), mirror="https://a.b", data_dir="mine")
    assert (config.data_dir, config.mirror) == ("mine", "https://a.b")
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    "out",
    ["~/stranger/model.pth", "/stranger.pth", "../model.pth", "new/model.pth", ".bashrc", SHARE],
)
def test_run_folder_does_not_decide_where_the_model_goes(folder, out):
    run = write_run(folder / "run", out=out)
    with pytest.raises(UserError, match="--out"):
        resume_config(run)
    assert resume_config(run, out="mine.pth").out == "mine.pth"
    assert resume_config(run, out=out).out == os.path.expanduser(out)
    assert resume_config(write_run(folder / "own", out="mine.pth")).out == "mine.pth"


@pytest.mark.parametrize("name", ["dataset", "labels", "init_from"])
def test_run_folder_that_names_another_machine_is_refused(folder, name):
    flag = "--" + name.replace("_", "-")
    run = write_run(folder / "run", **{name: SHARE})
    with pytest.raises(UserError, match=flag):
        resume_config(run)
    assert getattr(resume_config(run, **{name: SHARE}), name) == SHARE


@pytest.mark.parametrize("name", ["dataset", "labels", "data_dir", "init_from", "out", "model"])
def test_resume_command_names_what_a_run_folder_does_not_decide_on(folder, name):
    value = {"out": "new/model.pth", "model": "mine.py:small"}.get(name, SHARE)
    config = Config(**{name: value})
    to_repeat = settings_to_repeat(vars(config))
    assert to_repeat == {name: value}
    resumed = resume_config(write_run(folder / "run", **{name: value}), **to_repeat)
    assert getattr(resumed, name) == value


def test_nothing_else_is_to_be_named_again():
    assert settings_to_repeat(vars(Config())) == {}
    places = {
        "dataset": "photos",
        "data_dir": "/data",
        "init_from": "a.pth",
        "mirror": "http://a.b",
    }
    assert settings_to_repeat(vars(Config(**places))) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "my files/net.py:small; rm x"),
        ("out", "there/my model.pth"),
        ("dataset", "//server/my photos"),
    ],
)
def test_advice_to_type_a_setting_is_quoted_for_the_shell(folder, name, value):
    with pytest.raises(UserError) as caught:
        resume_config(write_run(folder / "run", **{name: value}))
    assert command_line([f"--{name}", value]) in str(caught.value)
    if name == "out":
        return
    (folder / "recipe.json").write_text(json.dumps({name: value}))
    with pytest.raises(UserError) as caught:
        configure(recipe="recipe.json")
    assert command_line([f"--{name}", value]) in str(caught.value)


def test_own_run_goes_on_with_its_own_folders(inside, folder):
    """Its images are decoded where they were, and its model goes where it went."""
    write_images(folder / "photos", {"red": 30, "green": 30})
    settings = ["--dataset", "photos", "--data-dir", "cache", "--image-size", "16"]
    inside(*settings, "--width", "0.25", "--epochs", "1", "--out", "mine.pth")
    (folder / "mine.pth").unlink()
    inside("--resume", only_run(folder), "--epochs", "2")
    assert (folder / "mine.pth").exists() and not (folder / "data").exists()


# ---- a recipe ----


@pytest.mark.parametrize("name", PLACES)
def test_recipe_decides_on_no_place(folder, home, name):
    (folder / "recipe.json").write_text(json.dumps({"epochs": 3, name: PLACES[name]}))
    if name in NOT_IN_RECIPES or name == "model":
        with pytest.raises(UserError, match=name):
            configure(recipe="recipe.json")
        return
    config = configure(recipe="recipe.json")
    assert config.epochs == 3
    if name in ("data_dir", "mirror"):
        assert getattr(config, name) == getattr(Config(), name)


def test_recipe_for_a_network_of_ones_own_names_it_again(folder):
    (folder / "recipe.json").write_text('{"model": "mine.py:small", "width": 2.0}')
    with pytest.raises(UserError, match="--model mine.py:small"):
        configure(recipe="recipe.json")
    config = configure(recipe="recipe.json", model="mine.py:small")
    assert (config.model, config.width) == ("mine.py:small", 2.0)


@pytest.mark.parametrize("name", ["dataset", "init_from"])
def test_recipe_that_names_another_machine_is_refused(folder, name):
    (folder / "recipe.json").write_text(json.dumps({name: SHARE}))
    with pytest.raises(UserError, match="recipe.json"):
        configure(recipe="recipe.json")
    assert getattr(configure(recipe="recipe.json", **{name: SHARE}), name) == SHARE


@pytest.mark.parametrize("name", ["mirror", "data_dir"])
def test_place_in_a_recipe_that_is_not_used_is_said(folder, capsys, name):
    value = {"mirror": "http://a.b/x.tar.gz", "data_dir": "there"}[name]
    flag = "--" + name.replace("_", "-")
    (folder / "best.json").write_text(json.dumps({"dataset": "cifar10", name: value}))
    configure(recipe="best.json")
    out = capsys.readouterr().out
    assert "note: " in out and flag in out and "best.json" in out and value not in out
    configure(recipe="best.json", **{name: value})
    configure(recipe="best.json", dataset="digits")  # nothing is downloaded
    (folder / "data").mkdir()
    with mock.patch.object(load, "has_batches", lambda folder: True):
        configure(recipe="best.json")
    assert capsys.readouterr().out == ""


# ---- a study ----


def test_study_decides_on_no_place(folder):
    (folder / "study").mkdir()
    study = Study(folder / "study", epochs=1)
    trial = study.ask(worker=0, max_trials=2)
    trial.set_user_attr(SETTINGS, {"lr": 0.1, **PLACES})
    study.complete(trial, 1.0)
    assert trial_settings(study.best_trial()) == {"lr": 0.1}

    study.ask(worker=0, max_trials=2).set_user_attr(WORKER, "/../../stranger/x")
    study.begin({}, [1.0])
    (failed,) = study._trials(TrialState.FAIL)
    assert failed.number == 1
    assert not (folder / "stranger").exists()


# ---- URLs ----


@pytest.mark.parametrize("name", ["dataset", "data-dir", "init-from", "run-dir", "out", "resume"])
def test_urls_are_not_opened(inside, folder, name):
    error = inside.error(*QUICK, f"--{name}", "https://example.com/x", status=2)
    assert f"--{name}" in error and "URL" in error
    assert list(folder.iterdir()) == []
