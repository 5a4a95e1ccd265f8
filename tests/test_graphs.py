"""Recorded training steps: everything but CUDA itself, whose recording a function that repeats the work stands for."""

import functools
import gc
import re
import shutil
import weakref

import pytest
import torch
from conftest import QUICK, SMALL, state_of, trainer_of, without_time

import image_classification as ic
from alternatives import graphs


def repeated(trainer, work, pool):
    result = torch.zeros(2)
    return (lambda: result.copy_(work())), result


def stuck(trainer, work, pool):
    """Counts, but leaves one of the weights as it is."""
    replay, result = repeated(trainer, work, pool)
    weight = trainer.model.stages[0].first.weight

    def all_but_one():
        before = weight.detach().clone()
        replay()
        weight.data.copy_(before)

    return all_but_one, result


def refused(trainer, work, pool):
    work()
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.fixture
def train(folder, monkeypatch):
    """A function that trains, with steps recorded by `capture` if there is one: (epochs, run folder)."""

    usual = {"dataset": "digits", "epochs": 3, "width": 0.25, "low_res": 0.7, "precision": "fp32", "batch_size": 60,
             "subset": 600, "device": "cpu"}  # fmt: skip

    def run(capture=None, **settings):
        def prepare(trainer):
            if capture:
                monkeypatch.setattr(graphs, "capture", functools.partial(capture, trainer))
                trainer.graphs = graphs.Graphs(trainer)

        monkeypatch.setattr(ic.Trainer, "prepare", prepare)
        report = ic.train(ic.configure(**settings if "resume" in settings else usual | settings))
        return report.history, report.run

    return run


def test_recorded_steps_train_as_others_do(train, capsys):
    plain, _ = train(grad_clip=5.0, ema=True)
    calls = []

    def capture(trainer, work, pool):
        replay, result = repeated(trainer, work, pool)
        return (lambda: (calls.append(1), replay())), result

    recorded, run = train(capture, grad_clip=5.0, ema=True)
    assert "CUDA graph" not in capsys.readouterr().out
    assert len(calls) > 0.7 * state_of(run)["step"]  # sizes of batches and scales, the first two steps of each as ever
    assert without_time(recorded) == without_time(plain)


@pytest.mark.parametrize("capture", [stuck, refused])
def test_recording_that_fails_is_not_used(train, capsys, capture):
    plain, _ = train()
    recorded, _ = train(capture)
    assert capsys.readouterr().out.count("note: no CUDA graph of the training step") == 1
    assert without_time(recorded) == without_time(plain)


def test_recordings_go_with_their_trainer():
    trainer = trainer_of(minutes=1.0)
    trainer.graphs = graphs.Graphs(trainer)
    kept = weakref.ref(trainer)
    gc.disable()  # a seed's memory is needed by the next one, at once
    del trainer
    gc.enable()
    assert kept() is None


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_state_from_a_gpu_goes_on_here(train, optimizer):
    _, run = train(repeated if optimizer == "muon" else None, epochs=2, optimizer=optimizer)
    state = state_of(run)
    for group in state["optimizers"][-1]["param_groups"]:
        assert isinstance(group["lr"], torch.Tensor) == (optimizer == "muon")
        group["capturable"] = True
    torch.save(state, run / "last.pth")
    assert len(train(resume=str(run), epochs=3)[0]) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graph_on_cuda(inside, monkeypatch, precision):
    """The default network, recorded and not: the losses agree, and a replay does not wait for the device."""
    replay = graphs.Graphs.__call__

    def losses():
        out, _ = inside(*QUICK, "--low-res", "0.7", "--device", "cuda", "--precision", precision)
        assert "no CUDA graph" not in out
        return [float(part.split(",")[0]) for part in out.split("train loss ")[1:]]

    def unwaiting(self, batch, scale):
        torch.cuda.set_sync_debug_mode("error" if self.recorded.get((len(batch[0]), scale)) else "default")
        try:
            return replay(self, batch, scale)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(graphs.Graphs, "__call__", unwaiting)
    recorded = losses()
    monkeypatch.setattr(graphs.Graphs, "__call__", lambda self, batch, scale: self.trainer.compute(batch, scale))
    assert recorded == pytest.approx(losses(), rel=2e-2)


TINY = """
from torch import nn
def tiny(classes=10, channels=3, image_size=32):
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(channels * image_size**2 // 16, classes))
"""


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no compiler")
def test_compiled(inside, folder):
    (folder / "mine.py").write_text(TINY)
    arguments = *SMALL, "--precision", "fp32", "--model", "mine.py:tiny"
    plain, _ = inside(*arguments)
    torch._dynamo.utils.counters.clear()
    compiled, _ = inside(*arguments, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    losses, others = (re.findall(r"loss (\d\.\d+)", out) for out in (plain, compiled))
    assert [float(loss) for loss in losses] == pytest.approx([float(loss) for loss in others], rel=1e-3)


def test_smallest_images_are_not_compiled(inside, monkeypatch):
    sizes = []

    def compiled(model):
        return lambda images: (sizes.append(images.shape[-1]), model(images))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    inside(*QUICK, "--low-res", "0.5", "--batch-size", "50", "--compile", "--device", "cpu")
    assert set(sizes) == {24, 32}


def test_compile_without_a_compiler(program, folder):
    (folder / "mine.py").write_text(TINY)
    env = {"CXX": str(folder / "none"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    error = program.error(*SMALL, "--device", "cpu", "--model", "mine.py:tiny", "--compile", env=env)
    assert "--compile does not work here" in error and "leave it out" in error
