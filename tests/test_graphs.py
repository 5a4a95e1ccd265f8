"""Recorded training steps: everything but CUDA itself, whose recording a function that repeats the work stands for."""

import re
import shutil

import pytest
import torch
from conftest import QUICK, SMALL

import image_classification as ic
from alternatives import graphs


def repeated(work, pool):
    result = torch.zeros(2)
    return (lambda: result.copy_(work())), result


def stuck(work, pool):
    return (lambda: None), torch.zeros(2)


def refused(work, pool):
    work()
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.fixture
def trained(folder, monkeypatch):
    """A function that trains, with steps recorded by `capture` if there is one: (epochs, weights)."""
    monkeypatch.chdir(folder)

    def train(capture=None, **settings):
        if capture:
            monkeypatch.setattr(graphs, "capture", capture)
            monkeypatch.setattr(ic.Trainer, "prepare", lambda self: setattr(self, "graphs", graphs.Graphs(self)))
        config = ic.Config(dataset="digits", epochs=3, width=0.25, low_res=0.7, precision="fp32", **settings)
        report = ic.train(config)
        return report.history, torch.load(report.run / "last.pth", weights_only=True)

    return train


def test_recorded_steps_train_as_others_do(trained, capsys):
    plain, _ = trained(batch_size=60, grad_clip=5.0, ema=True)
    calls = []

    def capture(work, pool):
        replay, result = repeated(work, pool)
        return (lambda: (calls.append(1), replay())), result

    recorded, state = trained(capture, batch_size=60, grad_clip=5.0, ema=True)
    assert "CUDA graph" not in capsys.readouterr().out
    assert len(calls) > 0.7 * state["step"]  # sizes of batches and scales, the first two steps of each as ever
    for one, other in zip(plain, recorded, strict=True):
        for name in ("train_loss", "valid_loss", "learning_rate"):
            assert one[name] == other[name]


@pytest.mark.parametrize("capture", [stuck, refused])
def test_recording_that_fails_is_not_used(trained, capsys, capture):
    plain, _ = trained(batch_size=60)
    recorded, _ = trained(capture, batch_size=60)
    assert capsys.readouterr().out.count("note: no CUDA graph of the training step") == 1
    for one, other in zip(plain, recorded, strict=True):
        assert one["train_loss"] == other["train_loss"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_graph_on_cuda(inside, monkeypatch):
    """The default network in fp32: recorded and not, the losses agree; and nothing waits for the device in an epoch."""

    def losses(*more):
        out, _ = inside(*QUICK, "--device", "cuda", "--precision", "fp32", *more)
        assert "no CUDA graph" not in out
        return [float(part.split(",")[0]) for part in out.split("train loss ")[1:]]

    recorded = losses()
    monkeypatch.setattr(graphs.Graphs, "__call__", lambda self, batch, scale: self.trainer.compute(batch, scale))
    assert recorded == pytest.approx(losses(), rel=1e-2)


TINY = """
from torch import nn
def tiny(classes=10, channels=3, image_size=32):
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(channels * image_size**2 // 16, classes))
"""


def test_compiled(inside, folder):
    (folder / "mine.py").write_text(TINY)
    arguments = *SMALL, "--precision", "fp32", "--model", "mine.py:tiny"
    plain, _ = inside(*arguments)
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no compiler")
    compiled, _ = inside(*arguments, "--compile")
    losses, others = (re.findall(r"loss (\d\.\d+)", out) for out in (plain, compiled))
    assert [float(loss) for loss in losses] == pytest.approx([float(loss) for loss in others], rel=1e-3)


def test_compile_without_a_compiler(program, folder):
    (folder / "mine.py").write_text(TINY)
    env = {"CXX": str(folder / "none"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    error = program.error(*SMALL, "--model", "mine.py:tiny", "--compile", env=env)
    assert "--compile does not work here" in error and "leave it out" in error
