"""CUDA graphs: training steps that are recorded once and replayed.

A replay spares the CPU hundreds of kernel launches per step, which take longer than the work of a
small network itself.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from classifier.config import Config, parse_augment

RESULT_TOLERANCE = 0.01  # relative, between the result of a step and that of its replay
# Largest distance of a replayed step from the real one, as a share of that step. It is generous,
# because noise in small gradients reverses some of AdamW's updates.
STATE_TOLERANCE = 0.5


class Batch(Protocol):
    """A NamedTuple of tensors that describe the images of a batch."""

    @property
    def order(self) -> torch.Tensor:
        """Indices of the images, int64 (N,)."""

    def __iter__(self) -> Iterator[torch.Tensor]: ...

    def _make(self, *args: Any, **kwargs: Any) -> Any: ...


BatchT = TypeVar("BatchT", bound=Batch)
Step = Callable[[BatchT, float], torch.Tensor]


def can_record(config: Config, images: Any, world_size: int, has_scaler: bool) -> bool:
    """True if the device part of a training step can be recorded.

    Not if it draws random numbers, may skip an update or talks to other processes; and only for the
    default network and Muon, with the images in the memory of a GPU.

    images: the training images, a tensor or MemmapImages.
    has_scaler: is there loss scaling, which skips steps that overflow?
    """
    known = config.model == "cnn" and config.optimizer == "muon"
    on_gpu = isinstance(images, torch.Tensor) and images.is_cuda
    augments = parse_augment(config.augment).others  # with random numbers of their own
    varies = config.dropout or augments or has_scaler or world_size > 1
    return known and on_gpu and not varies


def capture(work: Callable[[], torch.Tensor], pool: Any) -> tuple[Callable[[], None], torch.Tensor]:
    """Record `work` on the current stream, which must not be the default one.

    pool: the memory pool to use: torch.cuda.graph_pool_handle().
    Returns a function that does the work again, on the same tensors, and the tensor that receives
    the result.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        result = work()
    return graph.replay, result


@dataclass
class Recording(Generic[BatchT]):
    """A recorded step.

    Attributes:
        inputs: the batch that a replay reads.
        replay: does the step again.
        result: the tensor that receives its result.
    """

    inputs: BatchT
    replay: Callable[[], None]
    result: torch.Tensor


class Replay(Generic[BatchT]):
    """Calls a training step, by replaying recordings where possible.

    There is one recording for each size of batch and of images. The first step of a size runs
    eagerly, which sets up what has to be set up once. The second one runs eagerly and is recorded,
    and the recording is replayed from the same state. If that does not change all tensors as the
    step did, all further steps run eagerly.
    """

    def __init__(
        self,
        step: Step[BatchT],
        tensors: Callable[[], list[torch.Tensor]],
        on_fallback: Callable[[], None],
    ) -> None:
        """Prepare to record.

        step: computes a batch at an image scale; all its work is on the device. A method is held
            weakly: this object may belong to the trainer whose method it is, and the memory of a
            finished trainer has to be free at once.
        tensors: all that a step changes, in the same order at each call.
        on_fallback: called when a recording has failed, to clear the gradients it left behind.
        """
        self._step: Callable[[], Step[BatchT] | None] = lambda: step
        if inspect.ismethod(step):
            self._step = weakref.WeakMethod(step)
        self._tensors = tensors
        self._on_fallback = on_fallback
        self._recordings: dict[tuple[int, float], Recording[BatchT] | None] = {}
        self._pool: Any = None  # handle of the memory pool that all recordings share
        self._enabled = True

    def __call__(self, batch: BatchT, scale: float) -> torch.Tensor:
        """Compute one step; returns what `step` returns.

        scale: image size as a share of the full size.
        """
        size = (len(batch.order), scale)
        if not self._enabled:
            return self._run(batch, scale)
        if size not in self._recordings:
            self._recordings[size] = None
            return self._run(batch, scale)
        recording = self._recordings[size]
        if recording is None:
            return self._run_and_record(batch, scale)
        for recorded_input, tensor in zip(recording.inputs, batch, strict=True):
            recorded_input.copy_(tensor)
        recording.replay()
        return recording.result.clone()  # the next replay overwrites it

    def _run(self, batch: BatchT, scale: float) -> torch.Tensor:
        step = self._step()
        assert step is not None, "the trainer is gone"
        return step(batch, scale)

    def _run_and_record(self, batch: BatchT, scale: float) -> torch.Tensor:
        """Run a step eagerly, and record it if the recording does the same."""
        inputs = batch._make(tensor.clone() for tensor in batch)
        before = self._snapshot()
        expected = self._run(inputs, scale)
        after = self._snapshot()

        self._restore(before)
        problem = ""
        try:
            replay, result = capture(lambda: self._run(inputs, scale), self._memory_pool(inputs))
            replay()
            if not self._same_step(result, expected, before, after):
                problem = "it does something else"
        except Exception as error:  # there are many things that cannot be recorded
            cause = error.__context__ or error  # ending the recording raises a second error
            problem = str(cause).partition("\n")[0] or type(cause).__name__
        self._restore(after)

        if problem:
            self._fall_back(problem)
        else:
            size = (len(batch.order), scale)
            self._recordings[size] = Recording(inputs, replay, result)
        return expected

    def _same_step(
        self,
        result: torch.Tensor,
        expected: torch.Tensor,
        before: list[torch.Tensor],
        after: list[torch.Tensor],
    ) -> bool:
        """True if the replay, which started at `before`, gave the result and state of the step."""
        # of single images a prediction may change, and a loss by more than the tolerance
        same = torch.allclose(result.sum(-1), expected.sum(-1), rtol=RESULT_TOLERANCE)
        for was, now, should_be in zip(before, self._tensors(), after, strict=True):
            distance = (now - should_be).double().norm()
            moved = (should_be - was).double().norm()
            same = same and bool(distance <= STATE_TOLERANCE * moved)
        return same

    def _fall_back(self, problem: str) -> None:
        """Run all further steps eagerly."""
        print(f"note: no CUDA graph of the training step ({problem}): training is slower without")
        self._enabled = False
        self._recordings.clear()
        self._on_fallback()

    def _snapshot(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self._tensors()]

    def _restore(self, snapshot: list[torch.Tensor]) -> None:
        for tensor, value in zip(self._tensors(), snapshot, strict=True):
            tensor.copy_(value)

    def _memory_pool(self, inputs: BatchT) -> Any:
        if self._pool is None and inputs.order.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool
