"""Recorded steps. In the place of CUDA, a function repeats the work that was recorded."""

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import nn

from classifier import cuda_graphs
from classifier.config import Config
from classifier.devices import training_process


class Batch(NamedTuple):
    order: torch.Tensor
    shifts: torch.Tensor


class Trainer:
    """A linear network in training; counts how often its step runs."""

    def __init__(self, device="cpu"):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.images = torch.rand(20, 4, device=device)
        self.labels = torch.randint(3, (20,), device=device)
        self.steps_run = 0
        self.fallbacks = 0
        self.replay = cuda_graphs.Replay(self.compute_step, self.tensors, zero_grad(self))

    def compute_step(self, batch, scale):
        self.steps_run += 1
        images = scale * self.images[batch.order] + batch.shifts.sum(1, keepdim=True)
        loss = nn.functional.cross_entropy(self.model(images), self.labels[batch.order])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack([loss.detach(), loss.detach() * 2])

    def tensors(self):
        states = [*self.optimizer.state.values()]
        return [*self.model.state_dict().values(), *(each["momentum_buffer"] for each in states)]


def zero_grad(trainer):
    """Clears the gradients and counts, without a reference to the trainer."""
    trainer = weakref.proxy(trainer)

    def clear():
        trainer.fallbacks += 1
        trainer.optimizer.zero_grad()

    return clear


def batches(count, device="cpu"):
    """Batches of two sizes, at two scales."""
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        order = torch.randperm(20, generator=generator)[: 6 + i % 2]
        shifts = torch.rand(len(order), 2, generator=generator)
        yield Batch(order.to(device), shifts.to(device)), 0.5 if i < count // 2 else 1.0


def train(trainer, compute, count=24):
    """The losses of these steps."""
    return torch.stack([compute(batch, scale) for batch, scale in batches(count)])


def repeated(work, pool):
    result = torch.zeros(2)
    return (lambda: result.copy_(work())), result


def refused(work, pool):
    """What CUDA does with work that cannot be recorded: the second error hides the first."""
    try:
        work()
        raise ValueError("operation not permitted when stream is capturing\nmore")
    finally:
        raise RuntimeError("the recording was invalidated")


def silent(work, pool):
    raise RuntimeError


def different_result(work, pool):
    replay, result = repeated(work, pool)
    return (lambda: (replay(), result.mul_(1.02))), result


@pytest.fixture
def stuck():
    """A recording that leaves one of the weights as it is; the trainer is given later."""
    holder = []

    def capture(work, pool):
        replay, result = repeated(work, pool)
        weight = holder[0].model.weight

        def all_but_one():
            before = weight.detach().clone()
            replay()
            weight.data.copy_(before)

        return all_but_one, result

    return holder, capture


def state_of(trainer):
    return [tensor.clone() for tensor in trainer.tensors()]


def assert_same_state(first, second):
    for one, other in zip(state_of(first), state_of(second), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def plain():
    """A trainer that has done its steps without recordings, and their losses."""
    trainer = Trainer()
    return trainer, train(trainer, trainer.compute_step)


def test_recorded_steps_train_as_others_do(plain, monkeypatch, capsys):
    """Four sizes: the first two steps of each are eager, the others are replays."""
    replays = []

    def capture(work, pool):
        replay, result = repeated(work, pool)
        return (lambda: (replays.append(1), replay())), result

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    trainer = Trainer()
    losses = train(trainer, trainer.replay)
    assert torch.equal(losses, plain[1])
    assert_same_state(trainer, plain[0])
    assert len(replays) == 24 - 4 * 2 + 4  # after a recording, one replay is compared
    assert capsys.readouterr().out == "" and not trainer.fallbacks


def test_results_are_not_overwritten_by_later_replays(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", repeated)
    trainer = Trainer()
    batch, scale = next(batches(1))
    results = [trainer.replay(batch, scale) for _ in range(6)]
    assert len({float(result[0]) for result in results}) == 6


def test_replay_does_not_change_the_callers_batch(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", repeated)
    trainer = Trainer()
    first, second, third, fourth = (batch for batch, _ in batches(8) if len(batch.order) == 6)
    kept = [[tensor.clone() for tensor in batch] for batch in (first, second, third, fourth)]
    for batch in (first, second, third, fourth):
        trainer.replay(batch, 1.0)
    for batch, before in zip((first, second, third, fourth), kept, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, before, strict=True))


@pytest.mark.parametrize("capture", [refused, silent, different_result])
def test_recording_that_fails_is_not_used(plain, monkeypatch, capsys, capture):
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    trainer = Trainer()
    losses = train(trainer, trainer.replay)
    assert capsys.readouterr().out.count("note: no CUDA graph of the training step") == 1
    assert torch.equal(losses, plain[1])
    assert_same_state(trainer, plain[0])
    assert trainer.fallbacks == 1


def test_recording_that_leaves_out_a_weight_is_not_used(plain, monkeypatch, capsys, stuck):
    holder, capture = stuck
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    trainer = Trainer()
    holder.append(trainer)
    losses = train(trainer, trainer.replay)
    assert capsys.readouterr().out.count("note: no CUDA graph of the training step") == 1
    assert torch.equal(losses, plain[1])
    assert_same_state(trainer, plain[0])


def test_reason_of_a_refusal_is_the_first_error(monkeypatch, capsys):
    monkeypatch.setattr(cuda_graphs, "capture", refused)
    trainer = Trainer()
    train(trainer, trainer.replay)
    note = capsys.readouterr().out
    assert "not permitted when stream is capturing" in note
    assert "more" not in note and "invalidated" not in note


def test_no_step_is_lost_or_done_twice_in_a_fallback(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", refused)
    trainer = Trainer()
    train(trainer, trainer.replay)
    assert trainer.steps_run == 24 + 1  # one was tried in the recording


def test_recordings_go_with_their_trainer(monkeypatch):
    """A seed's memory is needed by the next one, at once."""

    def recorded(work, pool):  # as CUDA does, keeps the memory but not the function
        return (lambda: None), work()

    monkeypatch.setattr(cuda_graphs, "capture", recorded)
    trainer = Trainer()
    train(trainer, trainer.replay, count=8)
    # tensors() of a real trainer is a method of its state, so it is replaced here
    model, optimizer = trainer.model, trainer.optimizer
    trainer.replay._tensors = lambda: [*model.state_dict().values(), *optimizer.state.values()]
    kept = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert kept() is None
    finally:
        gc.enable()


def test_step_may_be_a_function(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture", repeated)
    weight = torch.zeros(2)

    def step(batch, scale):
        weight.add_(scale)
        return weight.clone()

    replay = cuda_graphs.Replay(step, lambda: [weight], lambda: None)
    batch, _ = next(batches(1))
    assert [float(replay(batch, 0.5)[0]) for _ in range(4)] == [0.5, 1.0, 1.5, 2.0]


class OnCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    ("settings", "changes", "expected"),
    [
        ({}, {}, True),
        ({"dropout": 0.0}, {}, True),
        ({"model": "resnet18"}, {}, False),
        ({"optimizer": "adam"}, {}, False),
        ({"dropout": 0.1}, {}, False),
        ({}, {"world_size": 2}, False),
        ({}, {"has_scaler": True}, False),
        ({"augment": "flip,crop=2"}, {}, True),
        ({"augment": "flip,mixup"}, {}, False),
        ({}, {"images": torch.zeros(2, 3, 8, 8)}, False),
        ({}, {"images": [1, 2]}, False),
    ],
)
def test_what_can_be_recorded(settings, changes, expected):
    config = Config(**({"model": "cnn", "optimizer": "muon"} | settings))
    images = torch.zeros(2, 3, 8, 8).as_subclass(OnCuda)
    usual = {"images": images, "world_size": 1, "has_scaler": False}
    assert cuda_graphs.can_record(config, **(usual | changes)) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_graph_on_cuda(capsys):
    """Real recordings: the losses agree, and a replay does not wait for the device."""
    device = torch.device("cuda")
    all_losses = []
    for records in (False, True):
        with training_process(device, deterministic=False):
            trainer = Trainer(device)
            compute = trainer.replay if records else trainer.compute_step
            losses = []
            for i, (batch, scale) in enumerate(batches(24, device)):
                replays = records and i % 12 >= 4
                torch.cuda.set_sync_debug_mode("error" if replays else "default")
                losses.append(compute(batch, scale))
            torch.cuda.set_sync_debug_mode("default")
            all_losses.append(torch.stack(losses).cpu())
    assert "no CUDA graph" not in capsys.readouterr().out
    assert torch.allclose(*all_losses, rtol=2e-2)
