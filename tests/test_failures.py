"""What goes wrong in a run: divergence, memory, disks, networks of a user's own that fail."""

import re
from unittest import mock

import pytest
import torch
from conftest import (
    QUICK,
    SMALL,
    beforehand,
    epochs_of,
    only_run,
    report_of,
    state_of,
    trainer_of,
    weights,
)

import image_classification as ic
from classifier import micro_batches, reports, runs
from classifier.heartbeat import Heartbeat
from classifier.run_log import RunLog

# A network of a user's own, whose memory holds no more than LIMIT images in training.
NETWORK = """
import torch
from torch import nn

LIMIT = 1000

class Hungry(nn.Sequential):
    def forward(self, images):
        if self.training and len(images) > LIMIT:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)

def small(classes=10, channels=3, image_size=32):
    inputs = channels * image_size**2 // 16
    hidden = nn.Linear(inputs, 32)
    return Hungry(nn.AvgPool2d(4), nn.Flatten(), hidden, nn.ReLU(), nn.Linear(32, classes))
"""


def write_network(folder, limit):
    text = NETWORK.replace("LIMIT = 1000", f"LIMIT = {limit}")
    (folder / "mine.py").write_text(text)


# ---- Divergence ----------------------------------------------------------------------------------


def test_divergence_names_step_and_rate_and_saves_nothing_broken(inside, folder):
    options = ["--optimizer", "sgd", "--lr", "1e30", "--precision", "fp32"]
    error = inside.error(*QUICK, *options)
    assert re.search(r"step \d+ \(epoch \d+, lr .*--lr 1e\+29", error)
    for path in folder.rglob("*.pth"):
        assert all(tensor.isfinite().all() for tensor in weights(path).values())


def a_weight(state):
    return state.model.classifier.weight.data


def a_second_moment(state):
    adamw = state.optimizers[-1]
    return next(iter(adamw.state.values()))["exp_avg_sq"]


@pytest.mark.parametrize("find", [a_weight, a_second_moment])
def test_state_that_is_not_finite_is_not_saved(inside, folder, find):
    def overflow(heartbeat, stats, order):
        if heartbeat.progress.done:  # after the last loss
            find(heartbeat.state).fill_(float("inf"))

    with beforehand(Heartbeat, "record", overflow):
        error = inside.error(*QUICK, "--epochs", "1", "--val-fraction", "0")
    assert "diverged" in error and "--lr" in error
    assert not list(folder.rglob("*.pth"))


def test_validation_loss_that_is_not_finite_ends_the_run(inside, folder, monkeypatch):
    broken = ic.Evaluation(float("nan"), 0.1, torch.zeros(1, 10))
    monkeypatch.setattr(ic, "evaluate", lambda *_, **__: broken)
    assert "diverged" in inside.error(*QUICK)
    assert not list(folder.rglob("*.pth"))


def test_custom_network_may_hold_a_mask_of_infinities(inside, folder):
    masked = """
def masked(**given):
    network = small(**given)
    network.register_buffer("mask", torch.full((3,), -float("inf")))
    return network
"""
    (folder / "mine.py").write_text(NETWORK + masked)
    inside(*SMALL, "--epochs", "1", "--model", "mine.py:masked")


# ---- Memory --------------------------------------------------------------------------------------


def test_memory_that_is_too_small_for_one_image(inside, folder):
    write_network(folder, limit=0)
    assert "--image-size" in inside.error(*SMALL, "--model", "mine.py:small")


def test_batch_is_divided_until_it_fits(inside, folder):
    write_network(folder, limit=30)
    options = ["--model", "mine.py:small", "--batch-size", "100", "--epochs", "4"]
    out, _ = inside("--dataset", "digits", *options)
    assert re.search("^note: .* 4 micro-batches of 25 images.* batch norm", out, re.MULTILINE)
    run = only_run(folder)
    assert set(state_of(run)["micro_batches"].values()) == {4}
    accuracy = report_of(run)["test_accuracy"]
    assert accuracy > 0.5
    write_network(folder, limit=1000)
    own_network = f"{folder / 'mine.py'}:small"
    model, _ = ic.load_checkpoint(folder / "model_small_digits.pth", model=own_network)
    test = ic.load_data(ic.Config(dataset="digits")).test
    assert ic.evaluate(model, *test).accuracy == pytest.approx(accuracy)


def test_out_of_memory_later_in_a_run_names_the_batch_size(inside, folder):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words")
    with mock.patch.object(ic.Trainer, "train_step", side_effect=error):
        line = inside.error(*QUICK)
    assert "CUDA out of memory" in line and "--batch-size" in line and "More words" not in line


@pytest.mark.slow
def test_network_too_large_for_a_cpu_is_computed_in_micro_batches(monkeypatch):
    monkeypatch.setattr(micro_batches, "CPU_BYTES", 2**27)
    trainer = trainer_of(model="fftnet", batch_size=100, precision="fp32")
    assert trainer.state.num_micro_batches[1.0] == 5  # 100 images keep 623 MiB


# ---- Disks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name"),
    [(runs, "save_checkpoint"), (RunLog, "end_epoch"), (reports, "export_model")],
)
def test_run_that_ran_out_of_space_goes_on(inside, folder, owner, name):
    full = OSError(28, "No space left on device", "a file")
    with mock.patch.object(owner, name, side_effect=full):
        error = inside.error(*QUICK, "--epochs", "1")
    assert "a file" in error and "No space left on device" in error
    run = only_run(folder)
    assert not (run / "report.json").exists()  # it says that the run is finished
    inside("--resume", "last")
    assert epochs_of(run) == [0] and (run / "report.json").exists()
    assert (folder / "model_cnn_digits.pth").exists()


def test_real_full_disk_ends_a_run_in_one_line(inside, small_disk):
    disk = small_disk(600)  # KiB; last.pth and TensorBoard's events need more
    error = inside.error(*QUICK, "--run-dir", disk / "run")
    assert "No space left on device" in error and str(disk) in error
    assert not list(disk.rglob("*.tmp"))
    for path in disk.rglob("*.pth"):  # what is there is whole
        assert weights(path)


def test_folder_that_cannot_be_written_is_named(inside, folder, unwritable):
    (folder / "runs").mkdir()
    unwritable(folder / "runs")
    assert "runs" in inside.error(*QUICK)


# ---- Networks of a user's own --------------------------------------------------------------------

# ends in the body of forward(self, x)
LEARNER = """
from torch import nn
class small(nn.Sequential):
    def __init__(self, **given):
        super().__init__(nn.Flatten(), nn.LazyBatchNorm1d(), nn.LazyLinear(10))
    def forward(self, x):
        """

BROKEN = {
    "raises": ("def small(**given): raise KeyError('boom')", "KeyError('boom') (mine.py, line 1)"),
    "tuple": (LEARNER + "return x, x", "tuple"),
    "tuple in training": (
        LEARNER + "y = super().forward(x); return (y, 1) if self.training else y",
        "in training its output is a tuple",
    ),
    "no module": ("def small(**given): pass", "NoneType"),
    "no logits": (
        "import torch\ndef small(**given): return torch.nn.Flatten()",
        "(2, 768), not (2, 10)",
    ),
    "softmax": (
        "from torch import nn\n"
        "def small(**given):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10), nn.Softmax(1))",
        "softmax",
    ),
    "exits": ("import sys\ndef small(**given): sys.exit(0)", "SystemExit(0) (mine.py, line 2)"),
    "no gradient": (LEARNER + "return super().forward(x).detach()", "cannot be trained"),
    "in place": (LEARNER + "y = super().forward(x).exp(); return y.add_(1)", "inplace operation"),
    "no factory": ("small = 3", "small"),
    "empty": ("", "small"),
    "missing import": ("import nothing_like_this", "ModuleNotFoundError"),
    "file exits": ("import sys\nsys.exit(0)", "SystemExit(0)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_custom_network_is_refused_before_a_run_begins(inside, folder, fault):
    text, words = BROKEN[fault]
    (folder / "mine.py").write_text(text)
    error = inside.error(*SMALL, "--model", "mine.py:small")
    assert "--model mine.py:small" in error and words in error
    assert not (folder / "runs").exists()  # or it would be the newest unfinished run


def test_custom_network_that_fails_within_a_run(inside, folder):
    fails = "if self.training and len(x) > 2: raise ValueError('too many')\n        "
    (folder / "mine.py").write_text(LEARNER + fails + "return super().forward(x)")
    assert "too many" in inside.error(*SMALL, "--model", "mine.py:small")
    assert not list(folder.glob("runs/*/*/config.json"))
