"""Training without the easiest images: which they are, what is shown, resuming, processes."""

import itertools
import json
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    QUICK,
    beforehand,
    only_run,
    report_of,
    rows_of,
    same,
    state_of,
    trainer_of,
    without_time,
)

import image_classification as ic
from classifier import runs
from classifier.heartbeat import Heartbeat

SETTINGS = {"width": 0.25, "batch_size": 100, "epochs": 4}
OPTIONS = [*QUICK, "--batch-size", "40", "--epochs", "4", "--drop-easiest", "0.5"]  # 5 steps each


@pytest.fixture
def trainer():
    return trainer_of(**SETTINGS, drop_easiest=0.5, device="cpu", precision="fp32")


def train_epochs(trainer, count):
    heartbeat = Heartbeat(trainer.state, trainer.group)
    for _ in range(count):
        ic.train_one_epoch(trainer, heartbeat)
        trainer.state.end_epoch(valid_loss=None, valid_accuracy=None)


# ---- which images ----


def test_images_with_the_smallest_losses_are_left_out():
    losses = torch.tensor([0.5, 3.0, 0.1, 2.0, 1.0])
    assert ic.hardest_images(losses, 0.4).tolist() == [1, 3, 4]
    assert ic.hardest_images(losses, 0.99).tolist() == [1]  # never none


def test_images_that_no_step_has_seen_count_as_hard():
    losses = torch.tensor([0.5, 3.0, torch.inf])
    assert ic.hardest_images(losses, 0.3).tolist() == [1, 2]


def test_step_gives_the_loss_of_each_image(trainer):
    batch = trainer.plan(0).take(trainer.batch_slices[0])
    images, labels = trainer.train_set
    model = trainer.state.model.train()
    with torch.no_grad():
        x = ic.resize(
            ic.normalise(ic.gather_augmented(images, batch), model), trainer.next_image_scale()
        )
        logits = model(x)
    expected = F.cross_entropy(logits, labels[batch.order], reduction="none")
    is_correct = logits.argmax(1) == labels[batch.order]
    losses, hits = trainer.train_step(batch)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(hits.bool(), is_correct)


def test_from_a_quarter_of_the_run_on_an_epoch_takes_the_hardest(trainer):
    state, num_images = trainer.state, len(trainer.train_set.labels)
    train_epochs(trainer, 1)
    losses = state.image_losses.clone()
    assert state.hardest is None and losses.isfinite().all()
    mean_loss = state.progress.history[0]["train_loss"]
    assert losses.mean().item() == pytest.approx(mean_loss, rel=1e-5)

    train_epochs(trainer, 1)
    is_kept = torch.zeros(num_images, dtype=torch.bool)
    is_kept[state.hardest] = True
    assert is_kept.sum() == len(state.hardest) == round(num_images / 2)
    assert losses[is_kept].min() >= losses[~is_kept].max()
    assert state.progress.history[1]["train_share"] == pytest.approx(0.5, abs=1e-3)
    order = trainer.plan(1).order
    assert len(order) == num_images  # an epoch has as many steps as before
    times = order.bincount(minlength=num_images)
    assert set(times[is_kept].tolist()) == {1, 2} and times[~is_kept].sum() == 0
    assert torch.equal(state.image_losses[~is_kept], losses[~is_kept])  # not seen again

    later = state.image_losses.clone()
    train_epochs(trainer, 1)
    assert set(state.hardest.tolist()) == set(ic.hardest_images(later, 0.5).tolist())


def test_all_images_are_taken_without_it():
    trainer = trainer_of(**SETTINGS, device="cpu")
    train_epochs(trainer, 2)
    assert trainer.state.hardest is None and trainer.state.image_losses is None
    assert trainer.plan(2).order.unique().numel() == len(trainer.train_set.labels)
    assert [row["train_share"] for row in trainer.state.progress.history] == [1.0, 1.0]


def test_longer_run_begins_with_all_images_again():
    trainer = trainer_of(**SETTINGS, drop_easiest=0.5, device="cpu")
    train_epochs(trainer, 2)
    assert trainer.state.hardest is not None
    trainer.state.progress.total_steps *= 10  # as with --resume RUN --epochs 40
    train_epochs(trainer, 1)
    assert trainer.state.hardest is None
    assert trainer.state.progress.history[2]["train_share"] == 1.0


# ---- whole runs ----


def test_what_a_run_shows(inside, folder):
    out, _ = inside(*OPTIONS)
    assert "from epoch 1 on, only the hardest 50 %" in out
    lines = [line for line in out.splitlines() if line.startswith("Epoch ")]
    assert ["hardest 50 %" in line for line in lines] == [False, True, True, True]
    assert [float(row["train_share"]) for row in rows_of(only_run(folder))] == [1, 0.5, 0.5, 0.5]


@pytest.mark.slow
def test_digits_are_learned_without_the_easiest(inside, folder):
    inside("--dataset", "digits", "--drop-easiest", "0.35", "--width", "0.5")
    assert report_of(only_run(folder))["test_accuracy"] > 0.97


@pytest.mark.parametrize("step", [3, 10, 13])
def test_stopped_run_goes_on_bit_for_bit(inside, folder, step):
    """Before images are left out, at the end of an epoch, and within one."""
    inside(*OPTIONS, "--run-dir", "unbroken")
    steps = itertools.count(1)

    def interrupt(*_):
        if next(steps) == step:
            signal.raise_signal(signal.SIGINT)

    with beforehand(ic.Trainer, "train_step", interrupt):
        inside(*OPTIONS, "--run-dir", "stopped", status=130)
    assert state_of(folder / "stopped")["step"] == step
    inside("--resume", "stopped")
    first, second = state_of(folder / "unbroken"), state_of(folder / "stopped")
    assert without_time(first["history"]) == without_time(second["history"])
    assert same(first["model"], second["model"])
    assert torch.equal(first["hardest"], second["hardest"])
    assert torch.equal(first["image_losses"], second["image_losses"])


def test_run_of_an_older_version_goes_on_as_it_began(inside, folder):
    """With all images, also of CIFAR-10, and without balanced rows."""
    inside(*QUICK, "--epochs", "1", "--run-dir", "run")
    path = folder / "run" / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("drop_easiest") == 0.0
    path.write_text(json.dumps(settings))
    assert runs.resume_config("run", epochs=2).drop_easiest == 0.0

    path = folder / "run" / "last.pth"
    state = torch.load(path, weights_only=True)
    del state["hardest"], state["image_losses"], state["config"]["drop_easiest"]
    for row in state["history"]:
        del row["train_share"]
    for weight_state in state["optimizers"][0]["state"].values():
        del weight_state["row_mean_squares"]
    torch.save(state, path)
    inside("--resume", "run", "--epochs", "2")
    assert [float(row["train_share"]) for row in rows_of(folder / "run")] == [1.0, 1.0]
    for weight_state in state_of(folder / "run")["optimizers"][0]["state"].values():
        assert weight_state.keys() == {"momentum_buffer"}
