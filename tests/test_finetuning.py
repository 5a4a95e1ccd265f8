"""--head-first and --first-layer-lr: layers that begin later or learn more slowly."""

import functools
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    beforehand,
    run_together,
    same,
    state_of,
    trainer_of,
    weights,
    without_time,
)
from torch import nn

import explain
import image_classification as ic
from classifier import finetuning
from classifier.config import Config
from classifier.errors import UsageError
from classifier.resolve import resolve_defaults

FLAT = """
from torch import nn

def flat(classes=10, channels=3, image_size=32):
    hidden = nn.Linear(channels * image_size**2, 16)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(16, classes))
"""
BRIEF = ["--dataset", "digits", "--subset", "200", "--width", "0.25", "--image-size", "16"]
ADAMW = {"optimizer": "adamw", "width": 0.25, "batch_size": 20, "augment": "none"}
IN_PHASES = ["--optimizer", "adamw", "--batch-size", "20", "--head-first", "0.4"]


@pytest.fixture
def start(folder):
    """A file with weights for the digits, which have been trained for a few steps."""
    trainer = trainer_of(**ADAMW, image_size=16, epochs=1, seed=5)
    take_steps(trainer, 3)
    torch.save(trainer.state.model.state_dict(), "start.pth")
    return "start.pth"


def take_steps(trainer, count):
    plan = trainer.plan(0)
    for batch_slice in trainer.batch_slices[:count]:
        trainer.train_step(plan.take(batch_slice))


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    after = model.state_dict()
    return {name for name in after if not torch.equal(before[name], after[name])}


# ---- the layers' learning rates ----


def test_by_default_all_weights_are_one_group():
    model = ic.CNN(width=0.25)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    given = finetuning.layer_groups(model, Config(lr=0.1))
    assert [id(weight) for weight in given] == [id(weight) for weight in trained]


def test_rates_rise_in_equal_factors_from_the_first_layer_to_the_last():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))
    groups = finetuning.layer_groups(model, Config(lr=0.3, first_layer_lr=0.01))
    assert [group["params"] for group in groups] == [
        list(layer.parameters()) for layer in reversed(model)
    ]
    rates = [group["lr"] for group in groups]
    assert rates[0] == 0.3 and rates[-1] == pytest.approx(0.003)
    factors = [later / earlier for earlier, later in zip(rates, rates[1:], strict=False)]
    assert factors == pytest.approx([factors[0]] * 7)
    assert [group["is_last_layer"] for group in groups] == [True] + [False] * 7


@pytest.mark.parametrize("name", ["cnn", "torchvision:resnet18", "timm:test_vit"])
def test_each_trained_weight_is_in_one_group(name):
    model = ic.instantiate(Config(model=name), 10, [0.5] * 3, [0.5] * 3, 32)
    groups = finetuning.layer_groups(model, Config(lr=0.1, head_first=0.2))
    grouped = [id(weight) for group in groups for weight in group["params"]]
    trained = [id(weight) for weight in model.parameters() if weight.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert {group["lr"] for group in groups} == {0.1}
    assert len(groups) <= finetuning.BODY_GROUPS + 1


def test_shared_weight_is_in_one_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    groups = finetuning.layer_groups(model, Config(lr=0.1, first_layer_lr=0.5))
    torch.optim.AdamW(groups)  # refuses a weight that comes twice
    assert sum(len(group["params"]) for group in groups) == 5


# ---- two phases ----


def test_each_phase_has_its_own_warm_up_and_decay():
    assert [finetuning.phase_fraction(x, 0.0) for x in (0.0, 0.3, 0.9)] == [0.0, 0.3, 0.9]
    found = [finetuning.phase_fraction(x, 0.25) for x in (0.0, 0.125, 0.25, 0.625)]
    assert found == [0.0, 0.5, 0.0, 0.5]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_at_first_only_the_last_layer_changes(start, optimizer):
    settings = {**ADAMW, "optimizer": optimizer, "image_size": 16, "epochs": 1}
    settings |= {"weight_decay": 0.1, "momentum": 0.9, "lr": 0.01, "init_from": start}
    trainer = trainer_of(**settings, head_first=0.1)  # of 65 steps
    before = copy_of(trainer.state.model)
    take_steps(trainer, 6)
    assert changed(before, trainer.state.model) == {"classifier.weight"}  # no statistics either
    take_steps(trainer, 2)
    body = {name for name in before if "num_batches" not in name and name != "whiten.weight"}
    assert body <= changed(before, trainer.state.model)


def test_slow_layers_move_less(start):
    moved = {}
    for share in (1.0, 0.01):
        settings = {**ADAMW, "image_size": 16, "epochs": 1, "lr": 0.01, "init_from": start}
        trainer = trainer_of(**settings, first_layer_lr=share)
        before = copy_of(trainer.state.model)
        take_steps(trainer, 1)
        for name in ("classifier.weight", "stages.0.conv1.weight"):
            distance = (trainer.state.model.state_dict()[name] - before[name]).norm()
            moved[name, share] = float(distance)
    last, first = "classifier.weight", "stages.0.conv1.weight"
    assert moved[last, 0.01] == pytest.approx(moved[last, 1.0])
    assert 0 < moved[first, 0.01] < 0.05 * moved[first, 1.0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")
def test_resumed_run_is_the_same_bit_for_bit(inside, start, folder):
    options = [*BRIEF, *IN_PHASES, "--first-layer-lr", "0.1", "--init-from", start]
    options += ["--epochs", "4", "--precision", "fp32"]  # 36 steps, of which the first 15
    inside(*options, "--run-dir", "whole")
    arguments = [*options, "--run-dir", "broken"]
    for step in (10, 25):  # one in each phase
        with beforehand(ic.Trainer, "train_step", functools.partial(interrupt, step)):
            inside(*arguments, status=130)
        arguments = ["--resume", "broken"]
    inside(*arguments)
    whole, broken = state_of(folder / "whole"), state_of(folder / "broken")
    assert same(whole["model"], broken["model"])
    assert without_time(whole["history"]) == without_time(broken["history"])


def interrupt(step, trainer, *_):
    """Send Ctrl-C to this process in that step."""
    if trainer.state.progress.step == step:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_two_processes_learn_the_same(inside, program, start):
    options = [*BRIEF[:4], "--image-size", "16", *IN_PHASES, "--init-from", start, "--epochs", "2"]
    options += ["--precision", "fp32", "--optimizer", "sgd", "--lr", "0.01"]
    options += ["--model", "flat.py:flat"]
    Path("flat.py").write_text(FLAT)  # without batch norm, which sees the images of its process
    variables: dict = {}
    exec(FLAT, variables)
    torch.save(variables["flat"](image_size=16).state_dict(), start)
    inside(*options, "--run-dir", "one")
    run_together(program, 2, *options, "--run-dir", "two")
    one, two = weights(Path("one/last.pth")), weights(Path("two/last.pth"))
    before = torch.load(start, weights_only=True)
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-4), name
        assert not torch.allclose(value, before[name], atol=1e-3), name


# ---- where it makes no sense ----


def resolved(**settings):
    data = ic.load_data(Config(dataset="digits"))
    config = Config(dataset="digits", **settings)
    return resolve_defaults(config, data, ic.DEFAULT_RECIPE)


@pytest.mark.parametrize("setting", [{"head_first": 0.2}, {"first_layer_lr": 0.1}])
def test_needs_trained_weights_and_no_muon(setting):
    option = "--head-first" if "head_first" in setting else "--first-layer-lr"
    with pytest.raises(UsageError, match=f"{option} .*--init-from"):
        resolved(**setting, optimizer="adamw")
    with pytest.raises(UsageError, match=f"{option} .*muon.*--optimizer"):
        resolved(**setting, init_from="model.pth")
    config = resolved(**setting, init_from="model.pth", optimizer="adamw")
    assert finetuning.has_groups(config)
    with pytest.raises(UsageError, match="--first-layer-lr 1.5"):
        Config(first_layer_lr=1.5)


@pytest.mark.parametrize("setting", ["freeze", "fast_dev_run"])
def test_single_layer_and_single_step_have_no_phases(setting):
    settings = {"init_from": "model.pth", "optimizer": "adamw", setting: True}
    config = resolved(head_first=0.2, first_layer_lr=0.1, **settings)
    assert config.head_first == 0 and config.first_layer_lr == 1


def test_networks_that_judge_labels_without_the_weights_have_no_phases(capsys):
    settings = {"init_from": "gone.pth", "head_first": 0.2, "first_layer_lr": 0.1}
    model = type("Model", (), {"settings": settings})
    config = explain.settings_of_folds(model, None)
    assert not finetuning.has_groups(config) and not config.init_from
    assert "gone.pth" in capsys.readouterr().out
