"""--compile, and CUDA graphs within the whole program."""

import gc
import re
import shutil
import weakref

import pytest
import torch
from conftest import QUICK, SMALL, trainer_of, without_time

import image_classification as ic
from classifier import cuda_graphs

TINY = """
from torch import nn

def tiny(classes=10, channels=3, image_size=32):
    inputs = channels * image_size**2 // 16
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(inputs, classes))
"""


def losses_in(out):
    return [float(loss) for loss in re.findall(r"loss (\d\.\d+)", out)]


# ---- --compile -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no compiler")
def test_compiled_network_learns_the_same(inside, folder):
    (folder / "mine.py").write_text(TINY)
    arguments = [*SMALL, "--precision", "fp32", "--model", "mine.py:tiny"]
    plain, _ = inside(*arguments)
    torch._dynamo.utils.counters.clear()
    compiled, _ = inside(*arguments, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert losses_in(compiled) == pytest.approx(losses_in(plain), rel=1e-3)


def test_smallest_images_are_not_compiled(inside, monkeypatch):
    sizes = []

    def compile(network):
        def forward(images):
            sizes.append(images.shape[-1])
            return network(images)

        return forward

    monkeypatch.setattr(torch, "compile", compile)
    options = ["--progressive-resizing", "0.5", "--batch-size", "50", "--device", "cpu"]
    inside(*QUICK, "--image-size", "32", *options, "--compile")
    assert set(sizes) == {24, 32}


@pytest.mark.slow
def test_compile_without_a_compiler(program, folder):
    (folder / "mine.py").write_text(TINY)
    env = {"CXX": str(folder / "none"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    options = ["--device", "cpu", "--model", "mine.py:tiny", "--compile"]
    assert "--compile" in program.error(*SMALL, *options, env=env)


# ---- CUDA graphs ---------------------------------------------------------------------------------


class FakeCapture:
    """Stands for CUDA's recording: a replay repeats the work."""

    def __init__(self):
        self.replays = 0

    def __call__(self, work, pool):
        result = torch.zeros(0)

        def replay():
            self.replays += 1
            output = work()
            result.resize_(output.shape).copy_(output)

        return replay, result


def train(**settings):
    usual = {"dataset": "digits", "subset": 600, "epochs": 3, "width": 0.25, "batch_size": 60}
    usual |= {"progressive_resizing": 0.7, "precision": "fp32", "device": "cpu"}
    return without_time(ic.train(ic.Config(**(usual | settings))).history)


@pytest.mark.slow
def test_recorded_steps_train_as_others_do(folder, monkeypatch, capsys):
    plain = train(grad_clip=5.0, ema=True)
    capture = FakeCapture()
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda *_: True)
    assert train(grad_clip=5.0, ema=True) == plain
    assert "CUDA graph" not in capsys.readouterr().out
    # of 27 steps, the first two of each size of batch and image are not replayed
    assert capture.replays > 0.7 * 27


def refuse(work, pool):
    work()
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.slow
def test_recording_that_fails_is_not_used(folder, monkeypatch, capsys):
    plain = train()
    monkeypatch.setattr(cuda_graphs, "capture", refuse)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda *_: True)
    assert train() == plain
    assert capsys.readouterr().out.count("note: no CUDA graph of the training step") == 1


def test_trainers_are_freed_with_their_recordings(monkeypatch):
    """A seed's memory is needed by the next one, at once."""

    monkeypatch.setattr(cuda_graphs, "capture", FakeCapture())
    monkeypatch.setattr(cuda_graphs, "can_record", lambda *_: True)
    trainer = trainer_of(width=0.25, batch_size=50, progressive_resizing=0.0)
    plan = trainer.plan(0)
    trainer.train_step(plan.take(slice(50)))
    assert trainer.cuda_graph is not None
    alive = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graph_on_cuda(inside, monkeypatch, precision):
    """The losses with and without recordings agree, and a replay does not wait for the device."""
    call = cuda_graphs.Replay.__call__
    replays = []

    def call_without_waiting(replay, batch, scale):
        is_recorded = replay._recordings.get((len(batch.order), scale)) is not None
        replays.append(is_recorded)
        torch.cuda.set_sync_debug_mode("error" if is_recorded else "default")
        try:
            return call(replay, batch, scale)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    options = ["--progressive-resizing", "0.7", "--image-size", "32"]
    options += ["--device", "cuda", "--precision", precision]
    monkeypatch.setattr(cuda_graphs.Replay, "__call__", call_without_waiting)
    recorded, _ = inside(*QUICK, *options)
    assert any(replays) and "no CUDA graph" not in recorded
    monkeypatch.setattr(cuda_graphs, "can_record", lambda *_: False)
    plain, _ = inside(*QUICK, *options)
    assert losses_in(recorded) == pytest.approx(losses_in(plain), rel=2e-2)
