"""Several processes that train one network together, started by torchrun on one or more machines.

Every function, and every method of a `Group` of one process, also works without torchrun: it then
does what a single process needs, which is mostly nothing. Besides this module, only rendezvous.py
uses torch.distributed.
"""

import contextlib
import gc
import io
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from classifier import rendezvous
from classifier.errors import Stopped, UserError
from classifier.foreign_paths import settings_to_repeat
from classifier.text import pluralize

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # did torchrun start this process?
TIMEOUT = timedelta(minutes=30)  # for which processes wait for each other
STORE_TIMEOUT = timedelta(minutes=5)  # for which they try to reach torchrun's store
LOAD_TIMEOUT = timedelta(days=2)  # for which they wait for one of them to load the data

# Keys in torchrun's store.
RUN_KEY = "image_classification/run"
LOADED_KEY = "image_classification/loaded by {}"  # by the machine of that number
FAILED_KEY = "image_classification/failed first after {} restarts"

# Settings that a run still takes from the command line when torchrun restarts it.
RESTART_OVERRIDES = ("data_dir", "mirror", "out", "debug")

T = TypeVar("T")


# ---- before the processes meet ----


def is_main_process() -> bool:
    """True if this is the process that prints and writes: rank 0, or the only one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not LAUNCHED or os.environ["RANK"] == "0"


def silence_all_but_rank_0() -> None:
    """Let only the main process print; for programs, not for library functions."""
    if not is_main_process():
        sys.stdout = io.StringIO()


def wait_for_first_error() -> None:
    """Wait before printing an error, unless this process was the first to fail.

    When that one has ended, torchrun ends the others: their errors are the same, or follow from it.
    """
    if LAUNCHED and not _claim_first_failure():
        time.sleep(30)  # on a busy machine a process takes many seconds to end


def _claim_first_failure() -> bool:
    """Note that this process has failed; True if it is the first one of this start of torchrun."""
    rank = os.environ["RANK"]
    with contextlib.suppress(RuntimeError):  # torchrun itself has ended
        store = _agent_store(timedelta(seconds=10))
        if store is not None:
            key = FAILED_KEY.format(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
            return store.compare_set(key, "", rank).decode() == rank
    return rank == "0"


def divide_cores() -> None:
    """Divide the cores among the processes of this machine, unless OMP_NUM_THREADS was set."""
    if not LAUNCHED:
        return
    local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if local_world_size == 1 or os.environ.get("OMP_NUM_THREADS") != "1":  # 1 is torchrun's choice
        return
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // local_world_size))


def settings_after_restart(given: dict[str, Any]) -> dict[str, Any]:
    """The settings to use instead of `given`, those of the command line.

    They differ where torchrun repeats the command line because it lost a process: then the run is
    resumed. Ends the program (SystemExit) if that run is finished.
    """
    if not LAUNCHED:
        return given
    store = _agent_store()
    if store is None or not store.check([RUN_KEY]):
        return given  # not a restart
    run = Path(store.get(RUN_KEY).decode())
    if (run / "report.json").exists():
        raise SystemExit(0)
    if not (run / "config.json").exists():  # the run ended before there was anything to resume
        return given
    # resuming asks for some settings again, in case the folder is somebody else's: this one is not
    saved = json.loads((run / "config.json").read_text())
    settings: dict[str, Any] = dict(settings_to_repeat(saved))
    settings.update({name: given[name] for name in RESTART_OVERRIDES if name in given})
    settings["resume"] = str(run)
    return settings


def device_name(name: str) -> str:
    """The device of this process, where --device says `name`.

    Raises UserError if there is none.
    """
    if not LAUNCHED:
        return name
    local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if name == "auto" and not torch.cuda.is_available():
        return "cpu"  # other accelerators cannot send tensors to each other
    if name not in ("auto", "cuda"):
        if local_world_size > 1 and name != "cpu":
            raise UserError(
                f"--device {name}: with torchrun each process has a device of its own: "
                "use auto, cuda or cpu"
            )
        return name
    local_rank = int(os.environ["LOCAL_RANK"])
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        raise UserError(f"--device {name}: this machine has no CUDA GPU: use --device cpu")
    if local_rank >= num_gpus:
        raise UserError(
            f"--device {name}: {local_world_size} processes, but {pluralize(num_gpus, 'GPU')} on "
            "this machine: use a smaller --nproc-per-node"
        )
    return f"cuda:{local_rank}"


def load_once_per_machine(load: Callable[[], T]) -> T:
    """Call `load` in each process, but on each machine first in one, so that only one downloads."""
    if not LAUNCHED:
        return load()
    store = _agent_store()
    loaded = LOADED_KEY.format(os.environ["GROUP_RANK"])
    is_first = os.environ["LOCAL_RANK"] == "0"
    if store is not None and not is_first:
        store.wait([loaded], LOAD_TIMEOUT)
    result = load()
    if store is not None and is_first:
        store.set(loaded, "")
    return result


def remember_run(run: Path) -> None:
    """Tell the processes of a restart which run to resume. Rank 0 calls it."""
    store = _agent_store() if LAUNCHED else None
    if store is not None:
        store.set(RUN_KEY, str(run.absolute()))


def resume_command(command: list[str]) -> list[str]:
    """The command that starts as many processes as there are now, from the one for one process.

    command: [python, script, options…].
    """
    if not LAUNCHED:
        return command
    local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
    world_size = int(os.environ["WORLD_SIZE"])
    launcher = ["torchrun"]
    if world_size > local_world_size:
        launcher.append(f"--nnodes={world_size // local_world_size}")
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=HOST:PORT"]
    launcher.append(f"--nproc-per-node={local_world_size}")
    return [*launcher, *command[1:]]


def _agent_store(timeout: timedelta | None = None) -> "dist.Store | None":
    """What all processes of this torchrun share, also after a restart; None if it has no store.

    timeout: for which to try to reach it. None: STORE_TIMEOUT.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout or STORE_TIMEOUT)


# ---- the group ----


class Group:
    """The processes that train together: one, or several that torchrun started.

    Attributes:
        device: the device of this process.
        rank: number of this process, from 0.
        world_size: number of processes.
        owns_process_group: True if `join` created torch's process group, which `leave` destroys.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        owns_process_group: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.rank = rank
        self.world_size = world_size
        self.owns_process_group = owns_process_group

    @property
    def is_main(self) -> bool:
        """True if this is the process that prints and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module, has_unused_params: bool) -> nn.Module:
        """The module to call in training, which makes gradients the mean over all processes.

        Batch norm sees the images of all processes on GPUs, those of each process on CPUs: on GPUs
        the network's layers of batch norm are replaced by SyncBatchNorm with the same weights.

        has_unused_params: does the network have weights that get no gradient?
        """
        if self.world_size == 1:
            return model
        if self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=has_unused_params)

    def seed_ranks(self, seed: int, step: int) -> None:
        """Let each process draw its own random numbers in training; rank 0 goes on with its state.

        step: where training starts, so that a resumed run does not repeat its numbers.
        """
        if self.rank > 0:
            number = (seed * 1_000_003 + step) * self.world_size + self.rank
            torch.manual_seed(number % 2**63)

    def max(self, number: int) -> int:
        """The largest `number` of any process."""
        if self.world_size == 1:
            return number
        numbers = torch.tensor([number], device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def accumulate(self, forward: Callable[..., Any], last: bool) -> AbstractContextManager[None]:
        """A context for the forward and backward pass of one micro-batch.

        Gradients are synchronised only in the `last` micro-batch of a step (DDP's no_sync).
        """
        if last:
            return contextlib.nullcontext()
        no_sync = getattr(forward, "no_sync", contextlib.nullcontext)  # a bare network has none
        return no_sync()

    def all_reduce_and_poll(self, stats: torch.Tensor, stop: bool, poll: bool) -> bool:
        """Sum `stats` over all processes, in place; True if any was asked to stop.

        stats: float32, of any shape.
        stop: was this process asked to stop?
        poll: find out about the others now? This waits for a GPU; without it the result is False.
        A single process returns `stop` in any case.
        """
        if self.world_size == 1:
            return stop
        stop_flag = stats.new_full((1,), float(stop))
        sums = torch.cat([stats.flatten(), stop_flag])
        dist.all_reduce(sums)
        stats.copy_(sums[:-1].view_as(stats))
        return poll and bool(sums[-1] > 0)

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 and return its result in all processes, which wait for it.

        If it raises an error there, all of them raise it.
        """
        if self.world_size == 1:
            return make()
        outcome: list[Any] = [None, None]  # the result and the error
        if self.is_main:
            try:
                outcome[0] = make()
            except Exception as error:
                with contextlib.suppress(RuntimeError):  # another process has failed as well
                    dist.broadcast_object_list([None, _to_send(error)])
                raise
        dist.broadcast_object_list(outcome)
        result, error_of_rank_0 = outcome
        if error_of_rank_0 is not None:
            raise error_of_rank_0
        return result

    def share_evaluation(
        self, model: nn.Module, images: Any, classify: Callable[[Any], torch.Tensor]
    ) -> torch.Tensor:
        """Return `classify(images)`, of which each process computes a part.

        The buffers of `model`, which are batch norm's statistics, become those of rank 0.

        images: uint8 (N, C, H, W), a tensor or MemmapImages.
        classify: images to logits, float32 (N, num_classes), on the CPU.
        """
        if self.world_size == 1:
            return classify(images)
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
        if len(images) < self.world_size:
            return classify(images)
        own_logits = classify(images[self.rank :: self.world_size])
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, own_logits)
        logits = torch.empty(len(images), own_logits.shape[1])
        for rank, rank_logits in enumerate(gathered):
            logits[rank :: self.world_size] = rank_logits
        return logits

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def leave(self, after_error: bool = False) -> None:
        """Destroy the process group that `join` created.

        Python would abort if it ended while a thread of Gloo still holds a tensor.

        after_error: do not wait for the other processes, which may have ended, or be waiting for
            this one. They go on waiting until it ends, or for TIMEOUT.
        """
        if not self.owns_process_group:
            return
        if not after_error:
            dist.barrier()  # others may still need this process
        elif dist.get_backend() == "nccl" and dist.group.WORLD is not None:
            dist.group.WORLD.abort()  # otherwise it waits for what the GPU has begun to exchange
        gc.collect()  # DDP holds the group, and is part of a reference cycle
        dist.destroy_process_group()
        self.owns_process_group = False


def _to_send(error: Exception) -> Exception:
    """An error as other processes can receive it; one that cannot be sent becomes its text."""
    with contextlib.suppress(Exception):  # anybody's error, with anything in it
        return pickle.loads(pickle.dumps(error))
    return RuntimeError(repr(error))


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Train together with the other processes of this torchrun, and leave them afterwards."""
    gpu_before = torch.cuda.current_device() if device.type == "cuda" else None
    group = Group(device)
    try:
        group = join(device)
        yield group
        group.leave()
    except BaseException as error:
        is_stopped = isinstance(error, Stopped)  # as all processes are, at the same step
        if LAUNCHED and not is_stopped:
            _claim_first_failure()  # before the others lose this process, and fail as well
        with contextlib.suppress(RuntimeError):  # the first error is the one to report
            group.leave(after_error=not is_stopped)
        raise
    finally:
        if gpu_before is not None:
            torch.cuda.set_device(gpu_before)


def join(device: torch.device) -> Group:
    """Meet the other processes of this torchrun, which may still be loading their data.

    Without torchrun this process is alone, unless the caller has created a process group.
    """
    if dist.is_available() and dist.is_initialized():
        return Group(device, dist.get_rank(), dist.get_world_size())
    if not LAUNCHED:
        return Group(device)
    options: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device  # NCCL would have to guess it
    store = _agent_store()
    if store is not None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        options["store"] = rendezvous.fresh_prefix(store, rank, world_size, TIMEOUT)
        options["rank"] = rank
        options["world_size"] = world_size
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, **options)
    return Group(device, dist.get_rank(), dist.get_world_size(), owns_process_group=True)
