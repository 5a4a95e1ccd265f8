"""Several processes that train one network together, started by torchrun; on one machine or on many."""

import gc
import json
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

RUN, PART = "image_classification/run", "image_classification/part"  # where these are named in the store
PATIENCE = timedelta(minutes=30)  # of processes with each other
CHANGEABLE = ("data_dir", "mirror", "debug")  # what a run that goes on still takes from the command line


def store() -> Any:
    """What all processes of this torchrun share, those after a restart included; None where it has no such store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def begin(given: dict[str, Any]) -> dict[str, Any]:
    """Take this process's share of the cores; returns the settings to use instead of those given.

    They are others where torchrun repeats the command line because a process was lost: the run goes on. Ends the
    program where it is finished.
    """
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if here > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own choice
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // here))
    if not (shared := store()) or not shared.check([RUN]):
        return given
    run = Path(shared.get(RUN).decode())
    if (run / "report.json").exists():
        raise SystemExit(0)
    if not (run / "config.json").exists():  # it ended before there was anything to go on from
        return given
    model = json.loads((run / "config.json").read_text())["model"]
    # a network's file has to be named again, lest the folder be somebody else's: this one is not
    own = {"model": model} if ":" in model and not model.startswith("torchvision:") else {}
    return {name: given[name] for name in CHANGEABLE if name in given} | own | {"resume": str(run)}


def remember(run: Path) -> None:
    """Let the processes that a restart begins know which run is theirs."""
    if shared := store():
        shared.set(RUN, str(run.absolute()))


def after_first(load: Callable[[], Any]) -> Any:
    """What `load` gives. On each machine one process comes first, so that it alone downloads."""
    shared, done = store(), f"image_classification/loaded by {os.environ['GROUP_RANK']}"
    first = os.environ["LOCAL_RANK"] == "0"
    if shared and not first:
        shared.wait([done], timedelta(days=2))
    found = load()
    if shared and first:
        shared.set(done, "")
    return found


def device(name: str) -> str:
    """This process's own device where --device says `name`; ValueError where there is none."""
    here, rank = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if name == "auto" and not torch.cuda.is_available():
        return "cpu"  # other accelerators cannot send tensors to each other
    if name not in ("auto", "cuda"):
        if here > 1 and name != "cpu":
            raise ValueError("torchrun gives each process a device of its own: auto, cuda or cpu")
        return name
    if rank >= (there := torch.cuda.device_count()):
        raise ValueError(f"{here} processes, but {there} GPUs here: a smaller --nproc-per-node")
    return f"cuda:{rank}"


def join(device: torch.device) -> None:
    """Meet the other processes; those of other machines may still be getting their data."""
    place: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        place["device_id"] = device  # else NCCL would guess
    if shared := store():
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        place |= {"store": fresh_part(shared, rank, world), "rank": rank, "world_size": world}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, **place)


def fresh_part(shared: Any, rank: int, world: int) -> Any:
    """A part of the store in which processes that a restart has ended have left no addresses of theirs.

    A new group would call them and wait for ever (pytorch/pytorch issue 135712). The first process names the part; the
    others take the name for the new one when what they have asked there is answered.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        part = dist.PrefixStore(own, shared)
        shared.set(PART, own)
        for other in range(1, world):
            part.wait([f"asked by {other}"], PATIENCE)
            part.set(f"answer to {other}", part.get(f"asked by {other}").decode())
        return part
    shared.wait([PART], PATIENCE)
    while True:
        part = dist.PrefixStore(shared.get(PART).decode(), shared)
        part.set(f"asked by {rank}", own)
        time.sleep(0.05)
        if part.check([f"answer to {rank}"]) and part.get(f"answer to {rank}").decode() == own:
            return part


def from_first(make: Callable[[], Any]) -> Any:
    """What the first process makes, in all of them; the others wait for it."""
    content = [None if dist.get_rank() else make()]
    dist.broadcast_object_list(content)
    return content[0]


def parallelise(trainer: Any) -> None:
    """Let a trainer's steps compute gradients over all processes. On CPUs each one's batch norm sees its own images."""
    parts = torch.tensor([trainer.parts], device=trainer.device)
    dist.all_reduce(parts, dist.ReduceOp.MAX)
    trainer.parts = int(parts)
    if trainer.device.type == "cuda":
        trainer.model = nn.SyncBatchNorm.convert_sync_batchnorm(trainer.model)
    trainer.parallel = nn.parallel.DistributedDataParallel(trainer.model, find_unused_parameters=trainer.unused)
    if trainer.rank:
        torch.manual_seed(((trainer.config.seed * 1_000_003 + trainer.step) * trainer.world + trainer.rank) % 2**63)


def agree(result: torch.Tensor, asked: bool, look: bool) -> bool:
    """Add up `result`, float32 (N,), over all processes, in place; only to `look` whether one was `asked` may wait."""
    both = torch.cat([result, result.new_full((1,), float(asked))])
    dist.all_reduce(both)
    result.copy_(both[:-1])
    return look and bool(both[-1] > 0)


def share(model: nn.Module, images: Any, classify: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """`classify(images)`, of which each process does its share, as the first one's model would."""
    rank, count = dist.get_rank(), dist.get_world_size()
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    if len(images) < count:
        return classify(images)
    shares: list[Any] = [None] * count
    dist.all_gather_object(shares, classify(images[rank::count]))
    logits = torch.empty(len(images), shares[0].shape[1])
    for i, part in enumerate(shares):
        logits[i::count] = part
    return logits


def leave() -> None:
    """Part from the others. A thread of Gloo's that still holds a tensor when Python ends would abort the process."""
    dist.barrier()  # none goes while others may need it
    gc.collect()  # what trained keeps the group, and refers to itself
    dist.destroy_process_group()


def command(alone: list[str]) -> list[str]:
    """What to type to start as many processes as there are now, from the command for one."""
    here, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    nodes = [f"--nnodes={world // here}"] if world > here else []
    return ["torchrun", *nodes, f"--nproc-per-node={here}", *alone[1:]]
