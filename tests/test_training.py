"""Training: the whole program on real images, stopping, going on, and what goes wrong on the way."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import records
import time_to_accuracy
import torch
from conftest import (
    QUICK,
    SCRIPT,
    SMALL,
    Program,
    beforehand,
    epochs_of,
    events_of,
    only_run,
    report_of,
    rows_of,
    same,
    state_of,
    trainer_of,
    wait_for,
    weights,
    without_time,
)
from filelock import FileLock
from test_data import DEAD

import image_classification as ic
from alternatives import memory, minutes
from alternatives.datasets import UNSAFE

FILES = {"config.json", "metrics.csv", "last.pth", "best.pth", "training_results.png", "confusion_matrix.png",
         "samples.png", "report.json", "model_cnn_digits.pth"}  # fmt: skip

# A network of a user's own, whose memory holds no more than {limit} images in training.
NETWORK = """
import torch
from torch import nn

class Hungry(nn.Sequential):
    def forward(self, images):
        if self.training and len(images) > {limit}:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)

def small(classes=10, channels=3, image_size=32):
    inputs = channels * image_size**2 // 16
    return Hungry(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, classes))
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The script alone, copied into an empty folder, run on the digits as a user would: (folder, run, printed)."""
    folder = tmp_path_factory.mktemp("alone")
    out, err = Program(folder, shutil.copy(SCRIPT, folder / SCRIPT.name))("--dataset", "digits", timeout=300)
    assert "%|" not in err  # no bar: this is no terminal
    return folder, only_run(folder), out


def test_script_alone_does_its_whole_job(digits):
    folder, run, out = digits
    assert {path.name for path in run.iterdir()} >= FILES
    assert not list(folder.rglob("*.tmp"))
    assert not [path.name for path in folder.rglob("*") if UNSAFE.search(path.name)]  # on Windows
    assert "\nStart Training  " in out
    assert "tensorboard --logdir runs" in out and re.search(r"\nDone in \d\d:\d\d\n\Z", out)


def test_report_and_metrics_agree_with_what_was_printed(digits):
    folder, run, out = digits
    report, rows = report_of(run), rows_of(run)
    matrix, closing = torch.tensor(report["confusion_matrix"]), out.partition("\nFinished Training\n")[2].splitlines()
    assert matrix.sum() == 359 and report["test_accuracy"] >= 0.97
    assert closing[0].startswith(f"Accuracy of the network on the 359 test images: {100 * matrix.trace() // 359} % (")
    assert report["test_accuracy"] == pytest.approx(matrix.trace().item() / 359)
    share, z2 = report["test_accuracy"], 1.959964**2 / 359  # Wilson (1927)
    middle, half = share + z2 / 2, (z2 * (share * (1 - share) + z2 / 4)) ** 0.5
    assert report["test_accuracy_interval"] == pytest.approx([(middle - half) / (1 + z2), (middle + half) / (1 + z2)])
    for index, name in enumerate("0123456789"):
        right, both = matrix[index, index].item(), (report["recall"][name], report["precision"][name])
        assert both == pytest.approx((right / matrix[index].sum().item(), right / matrix[:, index].sum().item()))
        assert report["class_accuracy"][name] == both[0]
        assert report["f1"][name] == pytest.approx(2 * both[0] * both[1] / sum(both))
        printed = f"Accuracy for class {name}     is: {100 * both[0]:.1f} %  (precision {100 * both[1]:.1f} %, F1 "
        assert closing[1 + index].startswith(printed)
    extremes, recall = re.search(r"Best class: (\d); worst class: (\d)", out).groups(), report["recall"]
    assert [recall[name] for name in extremes] == [max(recall.values()), min(recall.values())]
    assert {"test_loss", "seconds", "commit", "hardware", "versions"} <= report.keys()
    assert report["dataset"] == "digits" and report["substituted_for"] is None and report["train_images"] == 1295
    assert list(rows[0]) == ic.COLUMNS
    for index, (row, line) in enumerate(zip(rows, re.findall("^Epoch .*", out, re.M), strict=True)):
        losses = f"train loss {float(row['train_loss']):.4f}, valid loss {float(row['valid_loss']):.4f}, "
        assert line.startswith(f"Epoch {index:04d}: {losses}")
    assert sum(float(row["seconds"]) for row in rows) == pytest.approx(report["seconds"])
    assert all(0 < float(row["seconds"]) < report["seconds"] / 2 for row in rows)
    best = min(range(len(rows)), key=lambda index: float(rows[index]["valid_loss"]))
    assert torch.load(folder / "model_cnn_digits.pth", weights_only=True)["metrics"]["epoch"] == best


def test_model_file_reproduces_the_report(digits):
    folder, run, _ = digits
    model, content = ic.load_checkpoint(folder / "model_cnn_digits.pth")
    data, report = ic.load_data(ic.Config(dataset="digits")), report_of(run)
    result = ic.evaluate(model, *data.test)
    assert result.accuracy == pytest.approx(report["test_accuracy"])
    assert result.loss == pytest.approx(report["test_loss"], rel=1e-4)
    assert content["classes"] == data.classes and content["mean"] == pytest.approx(data.mean)

    def plain(value):
        if isinstance(value, dict):
            return all(plain(key) and plain(each) for key, each in value.items())
        if type(value) is list:
            return all(map(plain, value))
        return type(value) in (str, int, float, bool, type(None), torch.Tensor)

    assert plain(content)


def test_tensorboard_has_it_all(digits):
    run = digits[1]
    train, valid = events_of(run), events_of(run / "valid")
    assert {"loss", "accuracy", "learning rate", "images per second", "test accuracy"} <= set(train.Tags()["scalars"])
    assert {"loss", "accuracy"} == set(valid.Tags()["scalars"])
    assert {"training images", "confusion matrix"} <= set(train.Tags()["images"])
    assert train.Tags()["graph"]
    assert "_hparams_/session_start_info" in train.summary_metadata
    losses = [float(row["valid_loss"]) for row in rows_of(run)]
    assert [event.value for event in valid.Scalars("loss")] == pytest.approx(losses)


def test_learning_on_real_images(cifar10, trained):
    """Fails for shuffled labels, wrong gradients, a dead schedule, unnormalised or garbled images."""
    first, *_, last = rows_of(trained / "run")
    assert float(last["valid_accuracy"]) > 0.55
    assert float(last["train_loss"]) < float(first["train_loss"]) - 0.5


def test_hints_and_worst_mistakes(inside, folder):
    out, _ = inside(*QUICK, "--width", "0.5", "--subset", "30", "--epochs", "15", "--batch-size", "10")
    assert re.search("Overfitting: .* or --init-from a trained model", out)
    run = only_run(folder)
    assert "worst mistakes" in events_of(run).Tags()["images"] and (run / "worst_mistakes.png").exists()


def test_narrow_network_on_grey_images(inside, folder):
    """What its few filters see first has to be more than noise, in bf16 too."""
    inside(*QUICK, "--precision", "bf16", "--low-res", "0")
    assert report_of(only_run(folder))["test_accuracy"] > 0.8


def test_all_training_images_without_validation(inside, folder):
    out, _ = inside(*QUICK, "--val-fraction", "0", "--scheduler", "plateau")
    assert "valid loss -" in out and "valid acc" not in out
    assert same(weights(folder / "model_cnn_digits.pth"), weights(only_run(folder) / "last.pth"))


def test_replacing_a_model_is_said(inside, folder):
    (folder / "mine.pth").write_text("old")
    briefly = [*QUICK, "--subset", "100", "--epochs", "1"]
    assert "mine.pth (replaced)" in inside(*briefly, "--out", "mine.pth")[0]
    assert weights(folder / "mine.pth")
    outs = [inside(*briefly)[0] for _ in range(2)]
    assert ["(replaced; the run that made the old one has a copy)" in out for out in outs] == [False, True]


def test_test_views_are_mean_logits_of_mirrored_and_shifted_images():
    torch.manual_seed(0)
    model = ic.build_network(ic.Config(width=0.25), 10, [0.5] * 3, [0.25] * 3, 32).eval()
    images, labels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6)
    padded = torch.nn.functional.pad(images.float(), (1, 1, 1, 1), "reflect").byte()
    up, down = padded[:, :, :32, :32], padded[:, :, 2:, 2:]
    seen = images, images.flip(3), up, up.flip(3), down, down.flip(3)
    plain, mirror, *shifted = (ic.evaluate(model, each, labels).logits for each in seen)
    two, six = (ic.evaluate(model, images, labels, views).logits for views in (2, 6))
    torch.testing.assert_close(two, (plain + mirror) / 2)
    torch.testing.assert_close(six, (plain + mirror) / 4 + sum(shifted) / 8)


def test_several_views_are_a_score_of_their_own(folder, capsys):
    data = ic.load_data(ic.Config(dataset="digits"))
    data.mirrored = True
    report = ic.train(ic.Config(dataset="digits", width=0.25, epochs=1, precision="fp32", test_views=6, repeat=2), data)
    one, six = (ic.evaluate(ic.load_checkpoint(report.checkpoint)[0], *data.test, views) for views in (1, 6))
    kept = report.results["repeats"][int(report.results["kept"][-1])]
    assert kept["test_accuracy"] == pytest.approx(one.accuracy)
    assert kept["test_views_accuracy"] == pytest.approx(six.accuracy) != one.accuracy
    mean = sum(each["test_views_accuracy"] for each in report.results["repeats"]) / 2
    assert report.results["test_views_accuracy"] == pytest.approx(mean)
    assert f"Mean test accuracy of 2 seeds with 6 views: {100 * mean:.2f} %" in capsys.readouterr().out


# ---- every optimiser, schedule and option does its work ----


@pytest.fixture
def quick(folder):
    return lambda **settings: ic.train(ic.Config(**{"dataset": "digits", "epochs": 3, "width": 0.25} | settings))


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adam", "adamw", "rmsprop"])
def test_every_optimizer_learns(quick, optimizer):
    assert quick(optimizer=optimizer, epochs=5, batch_size=50).results["test_accuracy"] > 0.6


@pytest.mark.parametrize("shape", [(64, 3, 3, 3), (8, 32, 3, 3), (10, 40), (40, 10)])
def test_muon_makes_the_update_orthogonal(shape):
    weight = torch.nn.Parameter(torch.randn(shape))
    weight.grad = torch.randn(shape)
    norm = shape[0] ** 0.5
    before = weight.detach() * norm / weight.detach().norm()
    ic.Muon([weight], lr=1.0, momentum=0.6, dtype=torch.float32).step()
    singular = torch.linalg.svdvals((before - weight.detach()).flatten(1))
    assert singular.min() > 0.3 and singular.max() < 1.5


def test_muon_takes_filters_and_hidden_matrices():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))
    muon, others = ic.build_optimizers(network, ic.Config(optimizer="muon", lr=0.12, momentum=0.6), torch.float32)
    assert isinstance(muon, ic.Muon) and isinstance(others, torch.optim.AdamW)
    taken = {id(weight) for weight in muon.param_groups[0]["params"]}
    assert taken == {id(network[0].weight), id(network[1].weight)}
    assert len(others.param_groups[0]["params"]) == 4 and others.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_settings_reach_the_optimiser(name):
    config = ic.Config(optimizer=name, lr=0.3, momentum=0.4, weight_decay=0.01)
    (optimizer,) = ic.build_optimizers(ic.CNN(), config, torch.float32)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.01) and group.get("momentum", 0.4) == 0.4


def test_confidence_is_calibrated_on_validation_images(quick):
    report = quick(epochs=1, batch_size=50, subset=800, val_fraction=0.3)
    model, content = ic.load_checkpoint(report.checkpoint)
    data = ic.load_data(ic.Config(dataset="digits", subset=800, val_fraction=0.3))
    temperature = content["metrics"]["temperature"]
    assert temperature == report.results["temperature"]

    def loss(temperature):
        logits, labels = ic.evaluate(model, *data.valid).logits / temperature, data.valid.labels
        own = torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        return own - logits.log_softmax(1).mean().item()  # as if one more image had been of any class

    assert 0.1 < temperature < 0.9  # trained with smoothed labels: too unsure
    assert loss(temperature) < min(loss(1.1 * temperature), loss(temperature / 1.1), loss(1.0))

    def error(temperature):
        sure, guess = (ic.evaluate(model, *data.test).logits / temperature).softmax(1).max(1)
        gaps, bins = sure - (guess == data.test.labels).float(), (15 * sure).floor()
        return sum(abs(gaps[bins == low].sum().item()) for low in range(15)) / len(sure)

    assert report.results["calibration_error_before"] == pytest.approx(error(1.0), abs=1e-5)
    assert report.results["calibration_error"] == pytest.approx(error(temperature), abs=1e-5)
    assert error(temperature) < error(1.0)


def test_model_of_every_epoch_is_kept_when_asked_for(quick):
    run = quick(epochs=3, subset=200, keep_epochs=True).run
    first, _, last = sorted(run.glob("epoch-*.pth"))
    assert [first.name, last.name] == ["epoch-0000.pth", "epoch-0002.pth"]
    assert same(weights(last), weights(run / "last.pth")) and not same(weights(first), weights(last))
    assert not list(quick(epochs=1, subset=200).run.glob("epoch-*"))


def test_fp16_with_scaler_and_clipping_learns(quick):
    assert quick(precision="fp16", grad_clip=10.0, batch_size=50, subset=600).results["test_accuracy"] > 0.5


def test_network_computes_the_same_in_fp32_as_in_the_bf16_that_trained_it(quick):
    """Whitening magnifies what bf16 rounds off: a network can learn from the rounding, and fail without it."""
    report = quick(optimizer="adam", epochs=6, batch_size=50, precision="bf16", image_size=16)
    assert report.results["test_accuracy"] > report.history[-1]["valid_accuracy"] - 0.05


def test_deterministic_runs(quick):
    first, second = (quick(deterministic=True, epochs=1) for _ in range(2))
    assert torch.are_deterministic_algorithms_enabled()
    quick(epochs=1, subset=100)
    assert not torch.are_deterministic_algorithms_enabled()
    assert same(weights(first.run / "last.pth"), weights(second.run / "last.pth"))


def test_schedules():
    for name, expected in {
        "onecycle": [0.1, 1.0, 0.5 / 0.9, 0.01 / 0.9], "cosine": [1.0, 0.9755, 0.5, 0.000247],
        "step": [1.0, 1.0, 0.1, 0.01], "none": [1, 1, 1, 1],
    }.items():  # fmt: skip
        assert [ic.schedule(name, p, []) for p in (0, 0.1, 0.5, 0.99)] == pytest.approx(expected, rel=1e-2), name
    # plateau: lower after three epochs that are no better
    assert ic.schedule("plateau", 0.5, [3, 2, 2.5, 2.1]) == 1
    assert ic.schedule("plateau", 0.5, [3, 2, 2.5, 2.1, 2.0]) == pytest.approx(0.1)
    assert ic.schedule("plateau", 0.5, [3, 2, 2, 2, 2, 1, 1, 1, 1]) == pytest.approx(0.01)


def test_learning_rate_reaches_the_optimizers(quick):
    rates = [row["learning_rate"] for row in quick(scheduler="step", epochs=4, lr=0.1, subset=200).history]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])


def test_images_are_small_at_first(quick):
    sizes = []
    with beforehand(ic.CNN, "forward", lambda model, images: sizes.append((model.training, int(images.shape[-1])))):
        quick(low_res=0.5, epochs=2, device="cpu")  # of 26 steps
    assert [size for training, size in sizes if training] == [16] * 13 + [24] * 13 + [32] * 26
    begun = sizes.index((True, 16))  # before it the network was tried
    assert {size for training, size in sizes[begun:] if not training} == {32}


def test_early_stopping(quick):
    losses = [row["valid_loss"] for row in quick(early_stopping=2, epochs=40, subset=400).history]
    assert len(losses) < 40 and len(losses) == losses.index(min(losses)) + 1 + 2


def test_loss_in_the_records_is_plain_cross_entropy(quick):
    """Smoothing must not show in what is printed: at a learning rate of 0 it changes nothing."""
    still = {"lr": 0.0, "optimizer": "sgd", "epochs": 1, "subset": 200}
    losses = [quick(**still, label_smoothing=s).history[0]["train_loss"] for s in (0.0, 0.5)]
    assert losses[0] == losses[1]


def test_label_smoothing_reaches_the_training(quick):
    sure = [
        ic.evaluate(ic.load_checkpoint(report.checkpoint)[0], *ic.load_data(ic.Config(dataset="digits")).test)
        .logits.softmax(1).amax(1).mean()
        for report in (quick(label_smoothing=s, batch_size=50) for s in (0.0, 0.5))
    ]  # fmt: skip
    assert sure[1] < sure[0] - 0.1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_grad_clip_bounds_the_step(quick, folder, precision):
    start = ic.build_model(ic.Config(dataset="digits", width=0.25), ic.load_data(ic.Config(dataset="digits")))
    plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "scheduler": "none", "lr": 1.0}
    quick(**plain, grad_clip=1e-4, precision=precision, batch_size=100, epochs=1)
    moved = weights(folder / "model_cnn_digits.pth")
    distance = sum((moved[name] - value).square().sum() for name, value in start.named_parameters()).sqrt()
    assert 1e-4 < distance <= 13 * 1e-4 + 1e-6  # an epoch is 13 steps


def test_class_weights_help_the_rare_class(folder):
    config = ic.Config(dataset="digits", width=0.25, epochs=4, batch_size=50)
    data = ic.load_data(config)
    keep = (data.train.labels != 8) | (torch.arange(len(data.train.labels)) % 12 == 0)
    data.train = data.train.only(keep)
    recalls = [ic.train(ic.replace(config, class_balance=b), data).results["recall"]["8"] for b in ("none", "weights")]
    assert recalls[1] > recalls[0]


def test_repeat_gives_mean_spread_and_the_best_model(inside, folder):
    out, _ = inside(*QUICK, "--repeat", "3")
    run = only_run(folder)
    report, one = report_of(run), [report_of(run / f"seed-{seed}") for seed in range(3)]
    scores = torch.tensor([each["test_accuracy"] for each in one], dtype=torch.float64)
    assert scores.std() > 0
    assert report["test_accuracy"] == pytest.approx(scores.mean().item())
    assert report["versions"]["script"] == hashlib.sha256(SCRIPT.read_text(encoding="utf-8").encode()).hexdigest()[:12]
    assert report["test_accuracy_std"] == pytest.approx(scores.std().item())
    half = 4.302653 * scores.std().item() / 3**0.5  # Student's t, 2 degrees of freedom
    assert report["test_accuracy_interval"] == pytest.approx([scores.mean().item() - half, scores.mean().item() + half])
    assert f"Mean test accuracy of 3 seeds: {100 * scores.mean():.2f} %" in out
    assert out.count("Accuracy of the network") == 3 and out.count("Accuracy for class 3 ") == 1  # of the kept model
    losses = [min(float(row["valid_loss"]) for row in rows_of(run / f"seed-{seed}")) for seed in range(3)]
    best = run / f"seed-{losses.index(min(losses))}"
    assert same(weights(folder / "model_cnn_digits.pth"), weights(best / "best.pth"))


def test_test_labels_change_nothing_but_the_report(folder):
    config = ic.Config(dataset="digits", width=0.25, epochs=2, device="cpu")
    honest, wrong, opened = ic.load_data(config), ic.load_data(config), []
    wrong.load_test = lambda: ic.Split(honest.test.images, (honest.test.labels + 1) % 10)
    with beforehand(wrong, "load_test", lambda: opened.append(len(list(folder.rglob("last.pth"))))):
        first, second = ic.train(config, honest), ic.train(config, wrong)
    assert opened == [2]  # once, after the second run's training
    assert without_time(first.history) == without_time(second.history)
    assert same(weights(first.run / "best.pth"), weights(second.run / "best.pth"))
    assert first.results["test_accuracy"] > 0.3 and second.results["test_accuracy"] < 0.2


# ---- --minutes ----


def test_minutes_are_kept(program, folder):
    began = time.monotonic()
    process = program.start(*QUICK, "--epochs", "10000", "--minutes", "0.5")  # the epochs would take far longer
    since = {line.partition(" ")[0]: time.monotonic() - began for line in process.stdout}
    assert process.wait() == 0 and len(epochs_of(only_run(folder))) > 3
    assert since["Finished"] < 30 and 22 < since["Done"] < 41  # a busy machine reports slowly


def test_minutes_are_used_where_few_epochs_end_before_a_step_was_timed(folder, monkeypatch):
    monkeypatch.setattr(minutes, "REPORT_SECONDS", 1)
    report = ic.train(ic.Config(dataset="digits", subset=400, width=0.25, epochs=1, minutes=0.1))
    assert len(report.history) > 1


def test_minutes_that_are_too_short_are_said(inside):
    assert re.search(r"^Done in \d\d:\d\d, later than --minutes 0.001$", inside(*QUICK, "--minutes", "0.001")[0], re.M)


def test_minutes_shorter_than_an_epoch(inside, folder, monkeypatch):
    monkeypatch.setattr(minutes, "REPORT_SECONDS", 3)
    monkeypatch.setattr(ic, "START", time.perf_counter())
    with beforehand(ic.Trainer, "advance", lambda *_: time.sleep(0.02)):
        out, _ = inside("--dataset", "digits", "--width", "0.25", "--batch-size", "1", "--minutes", "0.2")
    assert epochs_of(run := only_run(folder)) == [0]
    assert re.search(r"^Epoch 0000: .* s for \d+ of 1295 steps, ", out, re.M)
    assert report_of(run)["train_images"] == state_of(run)["step"] < 1295  # of one image each
    (run / "report.json").unlink()  # as if killed before the report
    inside("--resume", "last")
    assert epochs_of(run) == [0]


@pytest.mark.parametrize("views", [1, 6])
@pytest.mark.parametrize("batch_size", [16, 100])
@pytest.mark.parametrize("per_step", [0.001, 0.05, 0.5])
def test_minutes_are_planned_to_the_step(per_step, batch_size, views):
    """The longest run that fits, counting the test and what ends an epoch, for each of which there are few or many."""
    trainer = trainer_of(minutes=1, low_res=0.7, batch_size=batch_size)
    trainer.step, trainer.config = 12, ic.replace(trainer.config, test_views=views)

    def taken(total):
        scales = [ic.COST[0.5 if i < 0.35 * total else 0.75 if i < 0.7 * total else 1.0] for i in range(12, total)]
        tested = trainer.data.test_images * (7 if views == 6 else 1) + len(trainer.valid.labels)
        pauses = -(-total // len(trainer.places))
        return per_step * (sum(scales) + tested / trainer.places[0].stop / 2) + 0.9 * pauses + minutes.REPORT_SECONDS

    trainer.pace.deadline, trainer.pace.pause = time.perf_counter() + 60, 0.9
    trainer.pace.fit(per_step)
    assert taken(trainer.total_steps) == pytest.approx(60, abs=trainer.pace.pause + 2 * per_step + 0.5)


def test_minutes_of_a_slow_network_are_looked_at_before_they_are_over(folder, monkeypatch):
    slow = NETWORK.format(limit=1000).replace("if self", "__import__('time').sleep(0.05)\n        if self")
    (folder / "mine.py").write_text(slow)
    for name, value in {"PROBE_EVERY": 0.3, "PROBE_STEPS": 1000, "REPORT_SECONDS": 1}.items():
        monkeypatch.setattr(minutes, name, value)
    ic.train(ic.Config(dataset="digits", batch_size=10, model="mine.py:small", minutes=0.1))
    assert 3 < state_of(only_run(folder))["step"] < 6 / 0.05 < 130  # the steps of an epoch, after which it looks anyway


def test_one_slow_probe_does_not_end_a_run():
    trainer = trainer_of(minutes=1, batch_size=16)
    trainer.step, trainer.pace.deadline = 12, time.perf_counter() + 60
    trainer.pace.fit(0.05)
    trainer.pace.fit(3.0)  # the test alone would take longer than there is time
    assert trainer.total_steps > trainer.step
    trainer.pace.agreed = lambda make: 77  # by the first of several processes
    trainer.pace.fit(0.05)
    assert trainer.total_steps == 77


def test_small_images_count_less_in_what_is_planned():
    trainer = trainer_of(width=0.25, low_res=0.7, epochs=1)
    for place in trainer.places:
        trainer.advance([drawn[place] for drawn in trainer.plan(0)])
    assert trainer.cost == pytest.approx(trainer.total_steps * trainer.work(1.0), abs=1.0)
    trainer.step = trainer.total_steps // 2
    trainer.seconds, trainer.cost = 60.0, trainer.total_steps * trainer.work(0.5)
    left = 60 * (trainer.work(1.0) / trainer.work(0.5) - 1)
    assert trainer.left() == f"{ic.tqdm.format_interval(left)} left"


def test_seeds_share_the_minutes(folder, monkeypatch):
    given = []
    monkeypatch.setattr(minutes.Pace, "fit", lambda *_: None)  # or this would take all that time
    with beforehand(minutes.Pace, "__init__", lambda *rest: given.append(rest[2] - time.perf_counter())):
        ic.train(ic.Config(dataset="digits", subset=400, width=0.25, epochs=1, minutes=10.0, repeat=2))
    assert 280 < given[0] < 300 and 500 < given[1] < 600


# ---- stopping and going on ----


LONGER = ["--dataset", "digits", "--width", "0.25", "--epochs", "5", "--batch-size", "50", "--device", "cpu"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The final state of an undisturbed run with the settings LONGER."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("unbroken"))
        assert ic.main(LONGER) == 0
    return state_of(only_run(folder))


def equal_state(first, second):
    return same(first["model"], second["model"]) and without_time(first["history"]) == without_time(second["history"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_run_goes_on_bit_for_bit(program, inside, folder, unbroken, signum, status):
    process = program.start(*LONGER)
    next(line for line in process.stdout if line.startswith("Epoch 0001"))
    time.sleep(0.1)  # into the next epoch
    process.send_signal(signum)
    out, _ = program.finish(process, status, timeout=60)
    command = re.search(r"Go on with: .+image_classification.py\"? (--resume \S+)", out).group(1)
    stopped = state_of(only_run(folder))
    assert 52 <= stopped["step"] < 5 * 26
    out, _ = inside(*command.split())
    assert f"Going on after step {stopped['step']} of {stopped['total_steps']}\n" in out
    assert equal_state(state_of(only_run(folder)), unbroken)
    assert (folder / "model_cnn_digits.pth").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no SIGKILL")
@pytest.mark.parametrize("moment", ["config.json", "last.pth"])
def test_killed_run_goes_on_bit_for_bit(program, inside, folder, unbroken, moment):
    process = program.start(*LONGER, patch="ic.SAVE_EVERY = 0.0")  # last.pth comes after the first step
    wait_for(lambda: list(folder.glob(f"runs/*/*/{moment}")))
    process.kill()
    process.communicate()
    inside("--resume", "last")
    assert equal_state(state_of(only_run(folder)), unbroken)


@pytest.fixture
def stopped(inside):
    """The program in this process, sent Ctrl-C in its step number `step`: a function that returns what it printed."""

    def run(step, *arguments):
        steps = itertools.count(1)
        with beforehand(ic.Trainer, "advance", lambda *_: next(steps) == step and signal.raise_signal(signal.SIGINT)):
            return inside(*arguments, status=130)[0]

    return run


def test_stop_at_the_end_of_an_epoch_loses_none(inside, folder, stopped):
    out = stopped(4, *QUICK, "--subset", "40", "--batch-size", "60", "--epochs", "6")  # one step an epoch
    assert "note: the batch size is 40, the number of training images, not 60" in out
    assert epochs_of(run := only_run(folder)) == [0, 1, 2, 3]
    inside("--resume", "last")
    assert epochs_of(run) == list(range(6))


def test_interrupted_extension_goes_on(inside, folder, stopped):
    inside(*QUICK)
    stopped(3, "--resume", "last", "--epochs", "4")  # within an epoch of 8 steps
    assert state_of(only_run(folder))["step"] == 16 + 3
    inside("--resume", "last")
    assert epochs_of(only_run(folder)) == [0, 1, 2, 3]


def test_run_with_minutes_goes_on(inside, folder, stopped):
    stopped(15, *QUICK, "--minutes", "1000", "--low-res", "0")
    total = state_of(only_run(folder))["total_steps"]
    assert total > 16
    path = only_run(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"minutes": 0.001}))  # not so long here
    inside("--resume", "last")
    assert state_of(only_run(folder))["step"] < total


def test_run_that_stopped_early_is_trained_on(inside, folder):
    inside(*QUICK, "--lr", "0", "--optimizer", "sgd", "--epochs", "9", "--early-stopping", "1")
    done = len(epochs_of(only_run(folder)))
    assert done < 9
    inside("--resume", "last", "--epochs", str(done + 2))  # fewer than it was to have, more than it had
    assert epochs_of(only_run(folder)) == list(range(done + 2))


def test_finished_run_whose_network_changed_keeps_its_report(inside, folder):
    text = NETWORK.format(limit=1000)
    (folder / "mine.py").write_text(text)
    inside(*SMALL, "--model", "mine.py:small")
    report = (only_run(folder) / "report.json").read_bytes()
    (folder / "mine.py").write_text("raise SystemError('executed')")
    more = ["--resume", "last", "--epochs", "4"]
    assert "name it again with --model mine.py:small" in inside.error(*more)  # and does not import it
    (folder / "mine.py").write_text(text.replace("nn.ReLU()", "nn.Linear(32, 32)"))
    assert "holds another network" in inside.error(*more, "--model", "mine.py:small")
    assert (only_run(folder) / "report.json").read_bytes() == report


def test_offline_trains_on_digits_and_stays_with_them(inside, folder, monkeypatch):
    monkeypatch.setattr(ic, "SOURCES", [DEAD])
    outs = [inside(*QUICK[2:])[0]]
    assert outs[0].index("*** CIFAR-10 could not be downloaded") < outs[0].index("Start Training")
    run = only_run(folder)
    assert run.parent.name == "digits" and (folder / "model_cnn_digits.pth").exists()
    monkeypatch.setattr(ic, "find_cifar10", lambda *_: pytest.fail("asked for again"))
    for path in [*run.glob("*.pth"), run / "report.json"]:  # as if killed before its first checkpoint
        path.unlink()
    outs += [inside("--resume", "last", *more)[0] for more in ([], ["--epochs", "3"])]
    for out in outs:
        assert "digits, because CIFAR-10 could not be had" in re.search("Accuracy of the network.*", out)[0]
        assert out.index("*** This model knows digits, not CIFAR-10") > out.index("Trained on")
    why = report_of(run)["substituted_for"]
    assert why.startswith("CIFAR10: ") and epochs_of(run) == [0, 1, 2]
    assert ("actively refused" if sys.platform == "win32" else "Connection refused") in why


def test_stopped_run_of_an_own_network_prints_what_it_needs(inside, folder, stopped):
    (folder / "mine.py").write_text(NETWORK.format(limit=1000))
    out = stopped(10, *SMALL, "--model", "mine.py:small")
    options = out.rpartition("Go on with: ")[2].partition("image_classification.py")[2].split()
    assert options[2:] == ["--model", "mine.py:small"]
    inside(*options)
    assert epochs_of(only_run(folder)) == [0, 1]


def test_folder_of_images_is_found_again_from_elsewhere(inside, folder, photos, monkeypatch):
    inside("--dataset", "photos", "--epochs", "1", "--width", "0.25", "--image-size", "32")
    run = only_run(folder)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    inside("--resume", run, "--epochs", "2", "--data-dir", "unused", "--debug")
    assert epochs_of(run) == [0, 1]


def test_the_newest_unfinished_run_goes_on(inside, folder):
    for name in ("first", "second"):
        inside(*QUICK, "--run-dir", f"runs/digits/{name}", "--epochs", "1")
        (folder / "runs" / "digits" / name / "report.json").unlink()
        time.sleep(0.05)
    assert f"Writing to {os.path.join('runs', 'digits', 'second')}" in inside("--resume", "last")[0]
    assert f"Writing to {os.path.join('runs', 'digits', 'first')}" in inside("--resume", "last")[0]


def test_trial_run_replaces_no_model_and_is_not_trained_on(inside, folder):
    inside(*QUICK, "--run-dir", "runs/digits/real")
    (folder / "model_cnn_digits.pth").write_text("precious")
    inside(*QUICK[:2], "--fast-dev-run", "--run-dir", "runs/digits/trial")
    assert (folder / "model_cnn_digits.pth").read_text() == "precious"
    trial = folder / "runs" / "digits" / "trial"
    assert {path.name for path in trial.iterdir()} >= FILES
    out, _ = inside("--resume", "last", "--epochs", "3")
    assert "Writing to runs/digits/real" in out.replace(os.sep, "/")
    assert "no unfinished run" in inside.error("--resume", trial, "--epochs", "3")
    (trial / "report.json").unlink()  # as if stopped
    assert "no unfinished run" in inside.error("--resume", "last")
    inside("--resume", trial)


def test_interrupted_repeat_goes_on(inside, folder, stopped):
    stopped(20, *QUICK, "--repeat", "3")  # of 16 a seed
    run = only_run(folder)
    assert "Mean test accuracy of 3 seeds" in inside("--resume", run)[0]
    assert [epochs_of(run / f"seed-{seed}") for seed in range(3)] == [[0, 1]] * 3


def test_epoch_that_ended_early_and_goes_on_counts_all_its_steps(inside, folder, monkeypatch):
    whole = []
    monkeypatch.setattr(minutes.Pace, "fit", lambda self, per_step: setattr(self.trainer, "total_steps", 10))
    inside(*QUICK, "--minutes", "1", "--batch-size", "100")  # epochs are 4 steps here
    with beforehand(ic.RunLog, "epoch", lambda log, *_: whole.append(log.trainer.sums)):
        inside("--resume", "last", "--epochs", "4")
    assert epochs_of(only_run(folder)) == [0, 1, 2, 3] and len(whole) == 2
    assert all((sums[:, 0] != 0).all() for sums in whole)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")
def test_second_ctrl_c_quits_at_once(program):
    slow = "import time; step = ic.Trainer.advance; ic.Trainer.advance = lambda *both: (time.sleep(90), step(*both))"
    process = program.start(*LONGER, patch=slow)
    next(line for line in process.stdout if line.startswith("digits: "))
    time.sleep(1)  # into its first step
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it wants to finish its step
    process.send_signal(signal.SIGINT)
    program.finish(process, 130, timeout=5)


def test_finished_run_is_made_longer_and_other_changes_are_refused(inside, folder):
    inside(*QUICK)
    run, longer = only_run(folder), ["--resume", "last", "--epochs", "4"]
    assert "no unfinished run" in inside.error("--resume", "last")
    assert "--lr 0.3: the run goes on with its own, 0.12" in inside.error(*longer, "--lr", "0.3", status=2)
    before = [(run / name).read_bytes() for name in ("report.json", "config.json")]
    for change in (["--seed", "5"], ["--ema"], ["--grad-clip", "1"], ["--fast-dev-run"], ["--weight-decay", "0.1"]):
        assert change[0] in inside.error(*longer, *change, status=2)
    assert before == [(run / name).read_bytes() for name in ("report.json", "config.json")]
    out, _ = inside("--resume", run / "last.pth", "--epochs", "4", "--seed", "0")
    assert "Epoch 0001" not in out and "Epoch 0002" in out and "Epoch 0003" in out
    assert epochs_of(run) == [0, 1, 2, 3]
    for path in (run, run / "valid"):
        assert [event.step for event in events_of(path).Scalars("loss")] == [0, 1, 2, 3]


def test_run_that_cannot_go_on_is_named(inside, folder):
    run = folder / "runs" / "digits" / "run"
    inside(*QUICK, "--run-dir", run)
    assert f"{run} holds a run" in inside.error(*QUICK, "--run-dir", run)
    state, settings, report = (run / name for name in ("last.pth", "config.json", "report.json"))
    whole = {path: path.read_bytes() for path in (state, settings)}
    state.unlink()
    assert "no last.pth any more" in inside.error("--resume", run, "--epochs", "9") and report.exists()
    report.unlink()
    for path, damaged in {state: whole[state][:2000], settings: b'{"dataset": '}.items():
        path.write_bytes(damaged)
        error = inside.error("--resume", "last")
        assert path.name in error and "is damaged" in error
        path.write_bytes(whole[path])
    with FileLock(run / ".lock"):
        assert "another process is training in" in inside.error("--resume", "last")
    inside("--resume", "last")


def test_run_that_failed_at_once_is_not_resumed(inside, folder):
    inside(*QUICK, "--epochs", "1")
    (only_run(folder) / "report.json").unlink()  # as if it had been killed
    with mock.patch.object(ic.Trainer, "compute", side_effect=ValueError("boom")):
        assert "boom" in inside.error(*QUICK)
    out, _ = inside("--resume", "last")
    assert f"Writing to {only_run(folder).relative_to(folder)}" in out


@pytest.mark.parametrize(("owner", "name"), [(ic, "save_checkpoint"), (ic.RunLog, "epoch"), (ic, "keep_model")])
def test_run_that_ran_out_of_space_goes_on(inside, folder, owner, name):
    with mock.patch.object(owner, name, side_effect=OSError(28, "No space left on device", "a file")):
        assert "a file: No space left on device: is there space" in inside.error(*QUICK, "--epochs", "1")
    assert not (only_run(folder) / "report.json").exists()  # it says that the run is finished
    inside("--resume", "last")
    assert epochs_of(only_run(folder)) == [0] and (only_run(folder) / "report.json").exists()
    assert (folder / "model_cnn_digits.pth").exists()


def test_resumed_epoch_is_once_in_tensorboard(inside, folder):
    def full(trainer, path):
        if len(trainer.history) == 2:
            raise OSError(28, "No space left on device", str(path))

    with beforehand(ic.Trainer, "save", full):
        inside.error(*QUICK, "--epochs", "3")
    time.sleep(1.1)  # event files are named by the second
    inside("--resume", "last")
    for path in (only_run(folder), only_run(folder) / "valid"):
        assert [event.step for event in events_of(path).Scalars("loss")] == [0, 1, 2]


def test_only_the_run_s_own_states_count(folder):
    for name in ("last.pth", "seed-3/last.pth", "runs/CIFAR10/another/last.pth"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert ic.saved_states(folder) == [folder / "last.pth", folder / "seed-3" / "last.pth"]


def test_run_of_an_older_version_elsewhere_goes_on_as_suits_the_place_and_says_so(inside, folder):
    inside(*QUICK)
    run = only_run(folder)
    state = state_of(run)
    state["environment"]["hardware"], state["parts"] = "another machine", 77
    del state["measured"]
    ic.save_checkpoint(run / "last.pth", state)
    settings = json.loads((run / "config.json").read_text())
    older = {name: value for name, value in settings.items() if name != "ema"}
    (run / "config.json").write_text(json.dumps(older | {"no_longer": 1}))
    out, _ = inside("--resume", "last", "--epochs", "3")
    assert "note: hardware was another machine, is " in out
    assert state_of(run)["parts"] < 77 and epochs_of(run) == [0, 1, 2]


# ---- what goes wrong ----


def test_divergence_names_step_and_rate_and_saves_nothing_broken(inside, folder):
    error = inside.error(*QUICK, "--optimizer", "sgd", "--lr", "1e30", "--precision", "fp32")
    assert re.search(r"no longer finite at step \d+ \(epoch \d+, lr .*try --lr 1e\+29", error)
    for path in folder.rglob("*.pth"):
        assert all(tensor.isfinite().all() for tensor in weights(path).values())


@pytest.mark.parametrize("part", [
    lambda trainer: trainer.model.classifier.weight.data,
    lambda trainer: next(iter(trainer.optimizers[-1].state.values()))["exp_avg_sq"],
], ids=["weights", "optimiser"])  # fmt: skip
def test_state_that_is_not_finite_is_not_saved(inside, folder, part):
    def overflow(trainer, *_):
        if trainer.step == trainer.total_steps:  # after the last loss
            part(trainer).fill_(float("inf"))

    with beforehand(ic.Trainer, "agree", overflow):
        assert "the loss is no longer finite" in inside.error(*QUICK, "--epochs", "1", "--val-fraction", "0")
    assert not list(folder.rglob("*.pth"))


def test_own_network_may_hold_a_mask_of_infinities(inside, folder):
    masked = """
def masked(**given):
    network = small(**given)
    network.register_buffer("mask", torch.full((3,), -float("inf")))
    return network"""
    (folder / "mine.py").write_text(NETWORK.format(limit=1000) + masked)
    inside(*SMALL, "--model", "mine.py:masked")


def test_validation_loss_that_is_not_finite_ends_the_run(inside, folder, monkeypatch):
    monkeypatch.setattr(ic, "evaluate", lambda *_, **__: ic.Evaluation(float("nan"), 0.1, torch.zeros(1, 10)))
    assert "the loss is no longer finite" in inside.error(*QUICK)
    assert not list(folder.rglob("*.pth"))


def test_own_network_and_out_of_memory(inside, folder):
    (folder / "mine.py").write_text(NETWORK.format(limit=0))
    assert "too short for a single image: try --device cpu" in inside.error(*SMALL, "--model", "mine.py:small")
    alone = ic.in_words(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))  # without alternatives/
    assert alone == "CUDA out of memory: try a smaller --batch-size, or --device cpu"
    (folder / "mine.py").write_text(NETWORK.format(limit=30))
    out, _ = inside("--dataset", "digits", "--epochs", "4", "--model", "mine.py:small", "--batch-size", "100")
    assert "computed as 4 parts of 25 images" in out and "batch norm" in out
    accuracy = report_of(only_run(folder))["test_accuracy"]
    assert accuracy > 0.5
    (folder / "mine.py").write_text(NETWORK.format(limit=1000))
    model, _ = ic.load_checkpoint(folder / "model_small_digits.pth", model=f"{folder / 'mine.py'}:small")
    test = ic.load_data(ic.Config(dataset="digits")).test
    assert ic.evaluate(model, *test).accuracy == pytest.approx(accuracy)


def test_network_too_large_for_a_cpu_is_computed_in_parts(monkeypatch):
    monkeypatch.setattr(memory, "CPU_BYTES", 2**27)
    trainer = trainer_of(model="fftnet", batch_size=100, precision="fp32")
    trainer.settle_batch()
    assert trainer.parts == 5  # 100 images keep 623 MiB


@pytest.mark.parametrize("balance", ["none", "weights"])
def test_parts_of_a_batch_add_up_to_its_gradient(folder, balance):
    (folder / "mine.py").write_text(NETWORK.format(limit=1000))
    gradients = []
    for parts in (1, 3):
        trainer = trainer_of(model="mine.py:small", precision="fp32", class_balance=balance)
        trainer.parts = parts
        plan = ic.plan_epoch(len(trainer.labels), 0, 0, "none", trainer.device)
        trainer.backward(trainer.model, [drawn[trainer.places[0]] for drawn in plan], 1.0)
        gradients.append(torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("first", "scale"), [(3.0, "linear"), (1e6, "log")])
def test_losses_can_be_read_whatever_the_first_one_was(first, scale):
    row = {"train_loss": 2.0, "train_accuracy": 1.0, "valid_accuracy": 0.5}
    rows = [row | {"valid_loss": loss} for loss in (first, 1)]
    assert [axes.get_yscale() for axes in ic.draw_curves(rows).axes] == [scale, "linear"]


LEARNER = """from torch import nn
class small(nn.Sequential):
    def __init__(self, **k): super().__init__(nn.Flatten(), nn.LazyBatchNorm1d(), nn.LazyLinear(10))
    def forward(self, x):"""


@pytest.mark.parametrize(("text", "words"), [
    ("def small(**k): raise KeyError('boom')", "KeyError('boom') (mine.py, line 1)"),
    ("import torch\nclass small(torch.nn.Flatten):\n    def __init__(self, **k): super().__init__()\n"
     "    def forward(self, x): return x, x", "it gives a tuple, not a tensor"),
    ("def small(**k): pass", "it is a NoneType, not a torch.nn.Module"),
    ("import torch\ndef small(**k): return torch.nn.Flatten()", "2 images give (2, 3072), not (2, 10)"),
    ("from torch import nn\ndef small(**k): return nn.Sequential(nn.Flatten(), nn.LazyLinear(10), nn.Softmax(1))",
     "ends in a softmax, but the loss has one"),
    ("import sys\ndef small(**k): sys.exit(0)", "SystemExit(0) (mine.py, line 2)"),
    (f"{LEARNER} y = super().forward(x); return (y, 1) if self.training else y", "cannot be trained: it gives a tuple"),
    (f"{LEARNER} return super().forward(x).detach()", "cannot be trained: it has no weights, all are frozen"),
    (f"{LEARNER} y = super().forward(x).exp(); return y.add_(1)", "inplace operation"),
    ("small = 3", "no function or class small"), ("", "no function or class small"),
    ("import nothing_like_this", "fails with ModuleNotFoundError"),
    ("import sys\nsys.exit(0)", "mine.py fails with SystemExit(0)"),
])  # fmt: skip
def test_broken_own_network(inside, folder, text, words):
    (folder / "mine.py").write_text(text)
    error = inside.error(*SMALL, "--model", "mine.py:small")
    assert "--model mine.py:small" in error and words in error
    assert not (folder / "runs").exists()  # or it would be the newest unfinished run


# ---- console and imports ----


def test_summary_changes_nothing_and_failing_gives_the_parameter_count(capsys):
    model, other = ic.CNN().train(), torch.nn.LSTM(3, 4)  # which takes no images
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    ic.print_summary(other, (3, 32, 32))
    assert "144 parameters" in capsys.readouterr().out and torch.equal(random, torch.get_rng_state())
    ic.print_summary(model, (3, 32, 32))
    assert "Total params" in capsys.readouterr().out
    assert same(before, model.state_dict()) and model.training and torch.equal(random, torch.get_rng_state())
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


def test_console_that_knows_only_cp1252(program):
    env = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    program(*QUICK, "--subset", "100", "--epochs", "1", "--out", "модель.pth", env=env)


def test_bar_is_drawn_on_a_terminal(program):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 120)) if hasattr(termios, "tcsetwinsize") else pytest.skip("Python 3.10")
    every_step = {"TQDM_MININTERVAL": "0"}  # a fast machine is through an epoch before tqdm draws again
    process = program.start(*QUICK, stdout=subprocess.DEVNULL, stderr=inside, env=every_step)
    os.close(inside)
    drawn = b""
    with contextlib.suppress(OSError):  # when the other end is closed
        while piece := os.read(terminal, 65536):
            drawn += piece
    assert process.wait() == 0
    assert re.search(rb"Epoch 0000:.*loss \d\.\d{3}, run \d\d:\d\d left", drawn) and b"img/s" in drawn


def test_slow_imports_wait_until_they_are_needed(program, cifar10):
    patch = """
advance = ic.Trainer.advance
def only(trainer, batch):
    slow = {"sklearn", "matplotlib", "tensorboard", "scipy", "pandas", "kornia"} & set(sys.modules)
    assert not slow, slow
    return advance(trainer, batch)
ic.Trainer.advance = only"""
    program("--data-dir", cifar10, "--fast-dev-run", patch=patch)


# ---- benchmarks ----


def test_too_few_images_for_a_large_folder_are_refused(tool_inside):
    assert "--images 9999: at least 10000" in tool_inside("large").error("--images", "9999", status=2)


def test_training_benchmark_tells_what_a_run_did(cifar10):
    result = time_to_accuracy.run("default --fast-dev-run", 3, str(cifar10))
    assert result["variant"] == "default --fast-dev-run" and result["seed"] == 3 and len(result["epochs"]) == 1
    assert 0 < result["start_up"] < result["whole_run"] and result["train_images"] == 500
    assert 0 <= result["test_accuracy"] <= 1 and result["epochs"][0]["train_loss"] > 0


RECORD = """
import time
print("|  run     |  epoch  |  val_acc  |  tta_val_acc  |  time_seconds  |", flush=True)
for run in range(200):
    print(f"|  {run:6d}  |      0  |   0.8000  |               |        0.1000  |", flush=True)
    print(f"|          |   eval  |   0.9300  |       0.940{run}  |        {2 + run / 10:.4f}  |", flush=True)
    time.sleep(0.2)
"""


def test_records_are_run_in_turns_and_their_first_run_does_not_count(tool_inside, folder, monkeypatch):
    (folder / "record.py").write_text(RECORD)
    ours = "default --dataset digits --width 0.25 --epochs 1 --subset 100"
    options = ["--variant", ours, "--runs", "2", "--rounds", "2", "--name", "records_tried"]
    monkeypatch.setattr(records, "RESULTS", folder)
    table, _ = tool_inside("records")(folder / "record.py", *options)
    assert f"| `{folder / 'record.py'}` | 4 | 2.150 ± 0.092 |" in table and f"| `{ours}` | 4 |" in table
    results = json.loads((folder / "records_tried.json").read_text())
    assert [result["contender"] for result in results] == [str(folder / "record.py"), ours] * 2
    assert [(run["seconds"], run["accuracy"]) for run in results[0]["runs"]] == [(2.1, 0.9401), (2.2, 0.9402)]
    for run in results[1]["runs"] + results[3]["runs"]:
        assert 0 < run["seconds"] < run["with_test"] < 30 and run["since"] > 0 and 0 <= run["accuracy"] <= 1
    assert results[1]["runs"] != results[3]["runs"]  # other seeds

    def two_runs(command, where):
        """What a repeated run prints, at which second; and the report that it leaves."""
        (where / "run").mkdir()
        one = {"seconds": 2.0, "test_accuracy": 0.9}
        (where / "run" / "report.json").write_text(json.dumps({"repeats": [one, one]}))
        words = {"Start Training": 1, "Accuracy of the network": 4, "Accuracy with 6 views": 5, "Accuracy for class": 9}
        return [(10.0 * number + since, line) for number in (1, 2) for line, since in words.items()]

    monkeypatch.setattr(records, "output", two_runs)
    assert [run["with_test"] for run in records.ours("default", 1, 0, "data")] == [4.0]
