"""Where each setting comes from: option, recipe, network, optimiser, data set."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from classifier import runs
from classifier.config import PATHS, Config
from classifier.datasets import named
from classifier.datasets.dataset import Dataset, Split
from classifier.datasets.load import load_data
from classifier.distributed import Group
from classifier.errors import UsageError, UserError
from classifier.recipes import RECIPES
from classifier.resolve import (
    check_before_data,
    check_places,
    check_processes,
    configure,
    network_defaults,
    resolve_defaults,
)

DEFAULT_RECIPE = {
    "optimizer": "muon",
    "lr": 0.12,
    "momentum": 0.6,
    "weight_decay": 0.0,
    "width": 1.0,
    "epochs": 9,
    "drop_easiest": 0.35,
    "batch_size": 500,
    "micro_batch": 500,
    "augment": "flip,crop=2",
    "progressive_resizing": 0.7,
    "label_smoothing": 0.2,
    "scheduler": "linear",
}


def dataset(name="CIFAR10", count=600, size=32, flip_keeps_label=True, report=None):
    """A data set of black images."""
    images = torch.zeros((), dtype=torch.uint8).expand(count, 3, size, size)
    train = Split(images, torch.zeros(count, dtype=torch.int64))
    return Dataset(
        name=name,
        classes=["a", "b"],
        train=train,
        valid=train.select(slice(0)),
        load_test=lambda: train,
        num_test_images=count,
        flip_keeps_label=flip_keeps_label,
        mean=[0.0] * 3,
        std=[1.0] * 3,
        report=report,
    )


def resolved(data=None, **given):
    return resolve_defaults(configure(**given), data or dataset(), DEFAULT_RECIPE)


# ---- configure -----------------------------------------------------------------------------------


def test_explicit_options_override_the_recipe():
    config = configure(recipe="accuracy94", epochs=3)
    assert (config.width, config.epochs, config.val_fraction, config.tta) == (2.0, 3, 0.0, 6)
    assert config.recipe == "accuracy94"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_complete_with_the_defaults(name):
    config = resolved(recipe=name)
    optional = {"width", "dropout", "image_size"}
    for entry in dataclasses.fields(Config):
        if entry.name not in optional:
            assert getattr(config, entry.name) is not None, entry.name
    for setting, value in RECIPES[name].items():
        if setting not in ("batch_size",):  # limited by the number of images
            assert getattr(config, setting) == value, setting


def test_no_recipe_is_the_default_recipe():
    assert resolved() == dataclasses.replace(resolved(recipe="default"), recipe="")


def test_recipe_with_another_network_leaves_out_what_was_for_its_own():
    assert configure(recipe="beginner", model="resnet18").dropout is None
    assert configure(recipe="beginner", model="beginner-cnn").dropout == 0.1
    assert configure(recipe="beginner", model="fcn", dropout=0.2).dropout == 0.2
    assert configure(recipe="accuracy94", model="resnet18").width is None
    assert configure(recipe="accuracy94", model="cnn").width == 2.0


def test_wrong_value_in_a_recipe_file_is_wrong_usage(folder):
    (folder / "mine.json").write_text('{"epochs": "many"}')
    with pytest.raises(UsageError, match="--epochs"):
        configure(recipe="mine.json")


def test_resume_is_left_to_the_run(monkeypatch):
    monkeypatch.setattr(runs, "resume_config", lambda **given: given)
    assert configure(resume="last", epochs=3) == {"resume": "last", "epochs": 3}
    assert configure(resume="") == Config()


# ---- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", ["cnnn", "cn", "nothing", "torchvision:resnet19", "nowhere.py:small", "folder:net"]
)
def test_unknown_network_is_wrong_usage(model, folder):
    with pytest.raises(UsageError, match="unknown model"):
        network_defaults(model)
    with pytest.raises(UsageError, match="unknown model"):
        check_before_data(Config(model=model))


def test_unknown_network_gets_the_closest_name():
    for typed in ("cnnn", "cn"):  # not fcn
        with pytest.raises(UsageError, match=r"did you mean cnn\?"):
            network_defaults(typed)


def test_file_of_a_custom_network_is_not_executed(folder):
    (folder / "mine.py").write_text("raise SystemExit('executed')")
    assert network_defaults("mine.py:net")["optimizer"] == "muon"


def test_pretrained_network_has_a_lower_learning_rate():
    fresh = network_defaults("torchvision:resnet18")
    pretrained = network_defaults("torchvision:resnet18", pretrained=True)
    assert pretrained["lr"] < fresh["lr"] and pretrained["optimizer"] == "adamw"


def test_defaults_can_be_changed_without_changing_the_table():
    network_defaults("fcn").clear()
    assert network_defaults("fcn")["optimizer"] == "adamw"
    resolved(data=dataset("photos"), model="fcn")
    assert network_defaults("fcn")["epochs"] == 15


# ---- before the data -----------------------------------------------------------------------------


def test_mistakes_are_found_before_the_data(folder):
    with pytest.raises(UsageError, match="--augment"):
        check_before_data(Config(augment="turn"))
    with pytest.raises(UsageError, match="--augment"):
        check_before_data(Config(augment="flip,flip"))
    with pytest.raises(FileNotFoundError, match=r"nothere\.pth"):
        check_before_data(Config(init_from="nothere.pth"))
    check_before_data(Config(init_from="nothere.pth", resume="run"))  # needed no more
    check_before_data(Config())


# ---- defaults ------------------------------------------------------------------------------------


def test_default_recipe_on_cifar10():
    config = resolved(data=dataset(count=45_000))
    for name, value in DEFAULT_RECIPE.items():
        assert getattr(config, name) == value, name
    assert config.dropout is None and config.dataset == "cifar10"


def test_digits_have_their_own():
    config = resolved(data=dataset("digits", flip_keeps_label=False))
    assert (config.epochs, config.batch_size, config.augment) == (8, 50, "crop=2")
    assert config.lr == 0.12 and config.progressive_resizing == 0.7
    assert config.dataset == "digits"


def test_other_data_sets_by_their_images():
    config = resolved(data=dataset("photos", count=99, size=64), model="resnet18")
    assert (config.epochs, config.batch_size, config.augment) == (60, 16, "flip,crop=4")


def test_network_overrides_data_set():
    config = resolved(model="convnet")
    assert config.epochs == 8 and config.progressive_resizing == 0.0 and config.batch_size == 500
    assert config.width is None  # of cnn
    assert resolved(model="resnet18-dropout").dropout == 0.1


def test_learning_rate_is_the_networks_only_with_its_own_optimizer():
    own = resolved(model="fcn")
    assert (own.optimizer, own.lr, own.weight_decay) == ("adamw", 0.001, 0.05)
    other = resolved(model="fcn", optimizer="adam")
    assert (other.optimizer, other.lr, other.epochs) == ("adam", 0.005, 15)
    muon = resolved(model="fcn", optimizer="muon")
    assert (muon.lr, muon.momentum, muon.weight_decay) == (0.12, 0.6, 0.0)
    assert resolved(optimizer="sgd", lr=0.3).lr == 0.3
    assert resolved(optimizer="sgd").momentum == 0.9


def test_default_recipe_decides_on_cnn_alone():
    changed = {**DEFAULT_RECIPE, "lr": 0.3, "momentum": 0.5, "width": 0.5}
    config = resolve_defaults(Config(), dataset(), changed)
    assert (config.lr, config.momentum, config.width) == (0.3, 0.5, 0.5)
    config = resolve_defaults(Config(model="resnet18"), dataset(), changed)
    assert (config.lr, config.momentum, config.width) == (0.12, 0.5, None)
    adamw = {**DEFAULT_RECIPE, "optimizer": "adamw", "lr": 0.02}
    assert resolve_defaults(Config(), dataset(), adamw).lr == 0.02
    assert resolve_defaults(Config(optimizer="sgd"), dataset(), adamw).lr == 0.1


def test_batch_size_of_a_network_is_at_most_that_of_the_data_set():
    assert resolved(model="torchvision:resnet18").batch_size == 64
    digits = dataset("digits", flip_keeps_label=False)
    assert resolved(data=digits, model="torchvision:resnet18").batch_size == 50


def test_pretrained_network_takes_epochs_by_the_number_of_images():
    for name in ("CIFAR10", "digits", "photos"):
        config = resolved(data=dataset(name, count=1280), recipe="finetune")
        assert (config.epochs, config.batch_size, config.lr) == (15, 64, 3e-4)


def test_images_are_left_out_only_of_cifar10_and_by_its_own_recipe():
    """Others may have wrong labels, which are the hardest, and were not measured."""
    data = dataset(count=45_000)
    assert resolved(data=data).drop_easiest == 0.35
    assert resolved(data=data, optimizer="sgd").drop_easiest == 0.35
    assert resolved(data=data, class_balance="weights").drop_easiest == 0.35
    for other in (
        {"model": "resnet18"},
        {"recipe": "finetune"},
        {"class_balance": "oversample"},
        {"augment": "flip,mixup"},
    ):
        assert resolved(data=data, **other).drop_easiest == 0.0
    assert resolved(data=dataset(count=600)).drop_easiest == 0.0  # some 20 steps
    for name in ("digits", "MNIST", "photos"):
        assert resolved(data=dataset(name, count=45_000)).drop_easiest == 0.0


@pytest.mark.parametrize("class_balance", ["oversample", "undersample"])
def test_easiest_images_are_not_dropped_of_resampled_classes(class_balance):
    with pytest.raises(UsageError, match="--drop-easiest.*--class-balance"):
        resolved(drop_easiest=0.1, class_balance=class_balance)


@pytest.mark.parametrize("step", ["mixup", "cutmix"])
def test_easiest_images_are_not_dropped_where_images_are_mixed(step):
    with pytest.raises(UsageError, match=f"--drop-easiest.*--augment.*{step}"):
        resolved(drop_easiest=0.1, augment=f"flip,{step}")


def test_explicit_settings_stay():
    given = {
        "epochs": 3,
        "batch_size": 7,
        "lr": 0.5,
        "momentum": 0.1,
        "weight_decay": 0.2,
        "augment": "none",
        "progressive_resizing": 0.0,
        "label_smoothing": 0.0,
        "scheduler": "none",
        "width": 0.25,
        "dropout": 0.3,
    }
    config = resolved(**given)
    for name, value in given.items():
        assert getattr(config, name) == value, name


def test_resolving_twice_changes_nothing():
    for data in (dataset(), dataset("digits", flip_keeps_label=False), dataset("x", size=20)):
        config = resolved(data=data)
        assert resolve_defaults(config, data, DEFAULT_RECIPE) == config


def test_small_images_and_small_batches_are_not_resized():
    assert resolved(data=dataset("MNIST", size=28)).progressive_resizing == 0.7
    assert resolved(data=dataset(size=27)).progressive_resizing == 0.0
    assert resolved(batch_size=4).progressive_resizing == 0.7
    assert resolved(batch_size=3).progressive_resizing == 0.0
    assert resolved(micro_batch=3).progressive_resizing == 0.0
    assert resolved(data=dataset(count=3)).progressive_resizing == 0.0
    assert resolved(batch_size=3, progressive_resizing=0.5).progressive_resizing == 0.5


# ---- changes, notes and checks -------------------------------------------------------------------


def test_batch_is_at_most_all_images(capsys):
    assert resolved(batch_size=1000).batch_size == 600
    assert capsys.readouterr().out.count("note: the batch size") == 1
    assert resolved(data=dataset(count=100)).batch_size == 100  # the default, too
    assert "note: the batch size" in capsys.readouterr().out
    assert resolved(batch_size=600).batch_size == 600
    assert not capsys.readouterr().out


def test_mirroring_where_it_changes_the_meaning(capsys):
    digits = dataset("digits", flip_keeps_label=False)
    config = resolved(data=digits, tta=6, augment="flip")
    assert config.tta == 1 and config.augment == "flip"
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == 2 and all(note.startswith("note: ") for note in notes)
    assert "--augment" in notes[1]
    assert resolved(tta=6, augment="flip").tta == 6
    assert not capsys.readouterr().out


def test_trial_run_is_one_epoch_of_one_seed():
    config = resolved(fast_dev_run=True, epochs=5, minutes=3.0, repeat=2)
    assert (config.epochs, config.minutes, config.repeat) == (1, 0.0, 1)


def test_shift_out_of_sight_is_wrong_usage():
    with pytest.raises(UsageError, match="--augment crop=32"):
        resolved(augment="crop=32")
    assert resolved(augment="crop=31").augment == "crop=31"


def test_model_that_cannot_be_written_is_named(folder, unwritable):
    for out in (".", str(folder)):
        with pytest.raises(UserError, match="--out"):
            check_before_data(Config(out=out))
    for out in ("", "model.pth", "nowhere/model.pth"):
        check_before_data(Config(out=out))
        check_places(Config(dataset="digits", out=out))
    unwritable(folder)
    with pytest.raises(UserError, match="--run-dir, --out"):
        check_places(Config(dataset="digits"))


def test_data_are_downloaded_only_where_they_are_not_there(folder, unwritable):
    (folder / "mine").mkdir()
    (folder / "data" / "MNIST").mkdir(parents=True)
    (folder / "elsewhere").mkdir()
    unwritable(folder)
    places = {"run_dir": "elsewhere/run", "out": "elsewhere/model.pth"}
    for dataset_name in ("digits", "mine", "mnist"):
        check_places(Config(dataset=dataset_name, **places))
    missing = Config(dataset="svhn", data_dir="missing", **places)
    check_places(missing, reads_data=False)
    with pytest.raises(UserError, match="--data-dir"):
        check_places(missing)


def test_run_that_would_write_into_the_data_set_is_refused(folder, monkeypatch):
    """The next run would take what it has written for images of a class."""
    (folder / "photos" / "cats").mkdir(parents=True)
    elsewhere = str(folder / "data")
    for places in ({"data_dir": "photos/data"}, {"run_dir": "photos/cats/run"}):
        with pytest.raises(UsageError, match="photos"):
            check_places(Config(dataset="photos", **places))
    check_places(Config(dataset="photos"))
    check_places(Config(dataset="photos", data_dir="photos"))  # what it writes there is hidden
    check_places(Config(dataset="photos", data_dir="photos/.cache"))
    check_places(Config(dataset="photos", data_dir="photos/data", labels="labels.csv"))
    monkeypatch.chdir("photos")
    with pytest.raises(UsageError, match="--data-dir data"):
        check_places(Config(dataset="."))
    with pytest.raises(UsageError, match="--run-dir runs"):
        check_places(Config(dataset=".", data_dir=elsewhere))
    check_places(Config(dataset=".", data_dir=elsewhere, run_dir="../mine"))


def test_home_folder_is_meant_wherever_a_path_is_typed(folder, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder))
    for name in PATHS:
        config = configure(**{name: "~/x"}) if name != "resume" else Config(resume="~/x")
        assert Path(getattr(config, name)) == folder / "x", name
    with pytest.raises(UsageError, match="~no-such-user/photos"):
        load_data(Config(dataset="~no-such-user/photos"))


def test_typed_folder_is_the_one_that_data_are_looked_for_in(folder, unwritable):
    for place in ("data", "full"):
        on_disk = folder / place / named.DATASETS["mnist"].on_disk
        on_disk.parent.mkdir(parents=True)
        on_disk.touch()
    unwritable(folder)
    unwritable(folder / "full")
    places = {"run_dir": "data/run", "out": "data/model.pth", "dataset": "mnist"}
    check_places(Config(data_dir=f"/{folder}/full", **places))  # a share that can only be read
    with pytest.raises(UserError, match="--data-dir"):  # though data/ has them
        check_places(Config(data_dir="empty", **places))


def test_folder_of_images_is_recorded_with_its_whole_path(folder, monkeypatch):
    (folder / "photos").mkdir()
    photos = dataset("photos", report={"words": []})
    assert resolved(data=photos, dataset="photos").dataset == str((folder / "photos").resolve())
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert Path(resolved(data=photos, dataset="~/photos").dataset) == (folder / "photos").resolve()


def test_fallback_is_recorded_as_what_it_is():
    config = resolved(data=dataset("digits", flip_keeps_label=False), dataset="auto")
    assert config.dataset == "digits"
    assert resolved(dataset="cifar10").dataset == "cifar10"
    assert json.loads(json.dumps(dataclasses.asdict(config)))["dataset"] == "digits"


class Processes(Group):
    """Several processes with the same images."""

    def broadcast_from_rank0(self, make):
        return make()


@pytest.mark.parametrize(
    ("world_size", "given", "named"),
    [
        (2, {"batch_size": 3}, "--batch-size 3"),
        (2, {"batch_size": 7}, "--batch-size 7"),
        (3, {"batch_size": 8}, "--batch-size 8"),
        (2, {"batch_size": 8, "class_balance": "undersample"}, "6 training images"),
    ],
)
def test_processes_need_some_images_each(world_size, given, named):
    data = dataset(count=600)
    data.train.labels[:3] = 1  # an epoch of "undersample" has three images of each class
    config = resolved(data, **given)
    with pytest.raises(UsageError, match=named):
        check_processes(config, data, Processes(world_size=world_size))
    check_processes(config, data, Group())
    config = resolved(data, batch_size=4 * world_size)
    check_processes(config, data, Processes(world_size=world_size))


# ---- progressive resizing in short runs ----


def test_runs_of_few_steps_are_not_resized():
    """The network would hardly see full-size images."""
    shares = [
        resolved(batch_size=100, epochs=epochs).progressive_resizing  # 6 steps an epoch
        for epochs in (3, 4)
    ]
    assert shares == [0.0, 0.7]
    assert resolved(batch_size=100, epochs=3, minutes=1.0).progressive_resizing == 0.7


def test_steps_are_those_of_the_balanced_classes():
    data = dataset(count=2000)
    data.train.labels[:20] = 1
    settings = {"epochs": 10, "batch_size": 40}
    assert resolved(data, **settings).progressive_resizing == 0.7
    balanced = resolved(data, class_balance="undersample", **settings)  # one step an epoch
    assert balanced.progressive_resizing == 0.0


@pytest.mark.parametrize(("share", "fits"), [(0.75, True), (0.76, False)])
def test_share_that_leaves_no_step_for_whole_images_is_refused(share, fits):
    settings = {"batch_size": 300, "epochs": 2, "progressive_resizing": share}  # 4 steps
    if fits:
        assert resolved(**settings).progressive_resizing == share
        return
    with pytest.raises(UsageError, match="--progressive-resizing"):
        resolved(**settings)


def test_trial_run_is_on_whole_images():
    assert resolved(fast_dev_run=True, progressive_resizing=0.7).progressive_resizing == 0.0
