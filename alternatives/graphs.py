"""CUDA graphs: training steps that are recorded once and replayed, which spares the CPU hundreds of launches each."""

import weakref
from collections.abc import Callable
from typing import Any

import torch


def capture(work: Callable[[], torch.Tensor], pool: Any) -> tuple[Callable[[], None], torch.Tensor]:
    """What does the same work again, on the same tensors, and the tensor that receives its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        result = work()
    return graph.replay, result


def of(trainer: Any, augments: bool) -> "Graphs | None":
    """What records a trainer's steps, if it can: those of `cnn` and Muon, whose images are on the device.

    augments: by more than flips and shifts? Not what draws at random in a step, may skip one, or talks to others.
    """
    config = trainer.config
    known = config.model == "cnn" and config.optimizer == "muon" and isinstance(trainer.images, torch.Tensor)
    fixed = not (config.dropout or augments or trainer.scaler.is_enabled()) and trainer.world == 1
    return Graphs(trainer) if known and fixed else None


class Graphs:
    """Does a trainer's steps (`compute`) by replaying recordings, one for each size of batch and images.

    The first step of a size is done as ever, which sets up what is set up once; the second one is recorded. If a
    recording does not change every tensor as that step did, the trainer goes on without any.
    """

    def __init__(self, trainer: Any):
        self.trainer: Any = weakref.proxy(trainer)  # or its memory would be kept after it
        self.recorded: dict[Any, Any] = {}
        self.pool = None
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
            torch.cuda.set_stream(torch.cuda.Stream(trainer.device))  # the default one cannot be recorded
            self.pool = torch.cuda.graph_pool_handle()
        for group in trainer.groups():  # a number would be recorded; a tensor is read anew each time
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64, device=trainer.device)

    def __call__(self, batch: list[torch.Tensor], scale: float) -> torch.Tensor:
        """What `trainer.compute(batch, scale)` does; returns what it does, float32 (2,)."""
        size = len(batch[0]), scale
        if size not in self.recorded:
            self.recorded[size] = None
            return self.trainer.compute(batch, scale)
        if not self.recorded[size]:
            return self.record(size, batch, scale)
        inputs, replay, result = self.recorded[size]
        for own, new in zip(inputs, batch, strict=True):
            own.copy_(new)
        replay()
        return result.clone()

    def state(self) -> list[torch.Tensor]:
        """All that a step changes."""
        states = [state for optimizer in self.trainer.optimizers for state in optimizer.state.values()]
        found = [*self.trainer.model.state_dict().values(), *(value for state in states for value in state.values())]
        return [value for value in found if isinstance(value, torch.Tensor)]

    def record(self, size: Any, batch: list[torch.Tensor], scale: float) -> torch.Tensor:
        """Do a step as ever, and record it if a recording does the same."""

        def take(values: list[torch.Tensor]) -> None:
            for tensor, value in zip(self.state(), values, strict=True):
                tensor.copy_(value)

        inputs, before = [drawn.clone() for drawn in batch], [tensor.clone() for tensor in self.state()]
        expected = self.trainer.compute(inputs, scale)
        after, why = [tensor.clone() for tensor in self.state()], "it does something else"
        take(before)
        try:
            replay, result = capture(lambda: self.trainer.compute(inputs, scale), self.pool)
            replay()
            same = torch.allclose(result, expected, rtol=0.01)
            for was, now, should in zip(before, self.state(), after, strict=True):
                off, moved = (now - should).double().norm(), (should - was).double().norm()
                same = same and bool(off <= 0.5 * moved)  # noise in small gradients turns some of AdamW's steps round
        except Exception as error:  # whatever cannot be recorded; the cause comes before what ending it raises
            same, why = False, str(error.__context__ or error).partition("\n")[0]
        take(after)
        if same:
            self.recorded[size] = inputs, replay, result
            return expected
        print(f"note: no CUDA graph of the training step ({why}): it is slower without")
        self.trainer.graphs = None
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = float(group["lr"])
        return expected
