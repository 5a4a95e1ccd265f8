"""One process, and several that torchrun starts."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import Program, run_together
from torch import nn

from classifier import distributed, rendezvous
from classifier.distributed import Group
from classifier.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


# ---- without torchrun ----


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(distributed, "LAUNCHED", False)


def test_alone_nothing_happens(alone, folder):
    given = {"epochs": 3}
    assert distributed.is_main_process()
    distributed.divide_cores()
    assert distributed.settings_after_restart(given) is given
    assert distributed.device_name("mps") == "mps"
    assert distributed.load_once_per_machine(lambda: "data") == "data"
    assert distributed.resume_command(["python", "x.py"]) == ["python", "x.py"]
    distributed.remember_run(folder)


def test_group_of_one(alone):
    group = distributed.join(CPU)
    assert (group.rank, group.world_size, group.is_main) == (0, 1, True)
    assert not dist.is_initialized()

    network, stats = nn.Linear(2, 2), torch.tensor([1.0, 2.0])
    assert group.wrap(network, has_unused_params=True) is network
    assert group.max(3) == 3
    assert group.broadcast_from_rank0(lambda: "made") == "made"
    assert group.share_evaluation(network, torch.ones(3), lambda images: images * 2).sum() == 6
    for stop in (False, True):
        for poll in (False, True):
            assert group.all_reduce_and_poll(stats, stop, poll) is stop
    assert stats.tolist() == [1, 2]
    for last in (False, True):
        with group.accumulate(network, last):
            pass
    state = torch.get_rng_state()
    group.seed_ranks(seed=1, step=2)
    assert torch.equal(torch.get_rng_state(), state)
    group.barrier()
    group.leave()


def test_gradients_are_exchanged_only_in_the_last_micro_batch():
    class Wrapped(nn.Linear):
        entered = 0

        @contextlib.contextmanager
        def no_sync(self):
            self.entered += 1
            yield

    wrapped, group = Wrapped(2, 2), Group()
    for last, expected in [(False, 1), (False, 2), (True, 2)]:
        with group.accumulate(wrapped, last):
            assert wrapped.entered == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batch_norm_sees_all_processes_on_gpus(monkeypatch, device):
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **options: model)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    weights, names = list(network.parameters()), list(network.state_dict())
    Group(device, world_size=2).wrap(network, has_unused_params=False)
    assert isinstance(network[1], nn.SyncBatchNorm) == (device == "cuda")
    assert list(network.state_dict()) == names
    # the optimisers have these objects
    assert all(one is other for one, other in zip(weights, network.parameters(), strict=True))


def test_process_group_of_the_caller_is_used_and_stays(alone):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = distributed.join(CPU)
        group.leave()
        assert group.world_size == 1 and dist.is_initialized()
    finally:
        dist.destroy_process_group()


# ---- what a process of torchrun finds in its environment ----


@pytest.fixture
def launched(monkeypatch):
    """A function that sets torchrun's variables: as if it had started this process."""
    monkeypatch.setattr(distributed, "LAUNCHED", True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def set_variables(**variables):
        usual = {"RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2}
        for name, value in (usual | {"GROUP_RANK": 0} | variables).items():
            monkeypatch.setenv(name, str(value))

    return set_variables


@pytest.fixture
def store(monkeypatch):
    """The store of torchrun, which outlives a restart; here in this process."""
    store = dist.HashStore()
    monkeypatch.setattr(distributed, "_agent_store", lambda: store)
    return store


def test_main_process(launched):
    launched(RANK=0)
    assert distributed.is_main_process()
    launched(RANK=3, LOCAL_RANK=0)  # of a second machine
    assert not distributed.is_main_process()


def test_main_process_of_a_group_of_the_caller(alone, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert distributed.is_main_process() == (rank == 0)


def test_gpu_is_as_before_if_the_processes_do_not_meet(launched, monkeypatch):
    launched()
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device))

    def fail(*_, **__):
        raise dist.DistNetworkError("nobody answers")

    monkeypatch.setattr(dist, "init_process_group", fail)
    gpu = torch.device("cuda:1")
    with pytest.raises(dist.DistNetworkError), distributed.joined(gpu):
        pytest.fail("joined")
    assert current == [0, gpu, 0]


def test_timeout_of_the_store_can_be_changed(launched, monkeypatch):
    launched(MASTER_ADDR="localhost", MASTER_PORT=1, TORCHELASTIC_USE_AGENT_STORE=True)
    asked = []
    monkeypatch.setattr(dist, "TCPStore", lambda *_, timeout, **__: asked.append(timeout))
    monkeypatch.setattr(distributed, "STORE_TIMEOUT", timedelta(seconds=3))
    distributed._agent_store()
    assert asked == [timedelta(seconds=3)]


@pytest.mark.parametrize(
    ("world_size", "launcher"),
    [
        (2, ["torchrun"]),
        (4, ["torchrun", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=HOST:PORT"]),
    ],
)
def test_resume_command(launched, world_size, launcher):
    launched(WORLD_SIZE=world_size)
    command = distributed.resume_command(["python", "x.py", "--resume", "runs/a b"])
    assert command == [*launcher, "--nproc-per-node=2", "x.py", "--resume", "runs/a b"]


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("cpu", 0, "cpu"),
        ("auto", 0, "cpu"),
        ("cpu", 4, "cpu"),
        ("auto", 4, "cuda:1"),
        ("cuda", 4, "cuda:1"),
        ("auto", 1, None),
        ("cuda", 0, None),
        ("cuda:1", 4, None),
        ("mps", 0, None),
    ],
)
def test_device_of_a_process(launched, monkeypatch, name, gpus, expected):
    launched(LOCAL_RANK=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if expected:
        assert distributed.device_name(name) == expected
    else:
        with pytest.raises(UserError, match=f"--device {name}"):
            distributed.device_name(name)


@pytest.mark.parametrize(("gpus", "advice"), [(0, "--device cpu"), (1, "--nproc-per-node")])
def test_advice_where_gpus_are_missing(launched, monkeypatch, gpus, advice):
    launched(LOCAL_RANK=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=advice):
        distributed.device_name("cuda")


def test_single_process_of_torchrun_may_name_its_device(launched):
    launched(LOCAL_WORLD_SIZE=1)
    assert distributed.device_name("cuda:3") == "cuda:3"


@pytest.mark.parametrize(
    ("local_world_size", "omp_num_threads", "expected"),
    [(2, "1", [4]), (3, "1", [2]), (20, "1", [1]), (1, "1", []), (2, "5", []), (2, None, [])],
)
def test_share_of_the_cores(launched, monkeypatch, local_world_size, omp_num_threads, expected):
    """1 is torchrun's choice for OMP_NUM_THREADS; any other is the user's."""
    launched(LOCAL_WORLD_SIZE=local_world_size)
    if omp_num_threads:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    distributed.divide_cores()
    assert threads == expected


@pytest.fixture
def run(folder):
    """A run folder that can be resumed."""
    run = folder / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": "cnn"}))
    return run


GIVEN = {"epochs": 3, "data_dir": "images", "out": "there/model.pth", "debug": True}


def test_first_start_takes_the_command_line(launched, store):
    launched()
    assert distributed.settings_after_restart(GIVEN) is GIVEN


def test_restart_resumes_the_run(launched, store, run, monkeypatch):
    launched()
    monkeypatch.chdir(run.parent)
    distributed.remember_run(Path("run"))
    monkeypatch.chdir(run)  # the folder is remembered by its absolute path
    expected = {name: GIVEN[name] for name in ("data_dir", "out", "debug")}
    expected["resume"] = str(run)
    assert distributed.settings_after_restart(GIVEN) == expected


@pytest.mark.parametrize("model", ["mine.py:small", "torchvision:resnet18", "timm:resnet18"])
def test_restart_names_the_file_of_a_network(launched, store, run, model):
    launched()
    (run / "config.json").write_text(json.dumps({"model": model}))
    distributed.remember_run(run)
    assert distributed.settings_after_restart({}).get("model") == (
        model if model.startswith("mine") else None
    )


@pytest.mark.parametrize("name", ["dataset", "init_from"])
def test_restart_names_network_paths(launched, store, run, name):
    launched()
    saved = {"model": "cnn", "dataset": "digits", "init_from": "", name: "//server/share"}
    (run / "config.json").write_text(json.dumps(saved))
    distributed.remember_run(run)
    assert distributed.settings_after_restart({}) == {name: "//server/share", "resume": str(run)}


def test_restart_of_a_finished_run_ends(launched, store, run):
    launched()
    distributed.remember_run(run)
    (run / "report.json").write_text("{}")
    with pytest.raises(SystemExit) as exit:
        distributed.settings_after_restart(GIVEN)
    assert exit.value.code == 0


def test_restart_with_nothing_to_resume_starts_anew(launched, store, run):
    launched()
    distributed.remember_run(run)
    (run / "config.json").unlink()
    assert distributed.settings_after_restart(GIVEN) is GIVEN


def test_one_process_of_a_machine_loads_first(launched, store):
    launched(LOCAL_RANK=1)
    events = []

    def second():
        distributed.load_once_per_machine(lambda: events.append("second"))

    waiting = threading.Thread(target=second)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive() and not events
    # the other process: the variables of the environment are those of the whole process
    launched(LOCAL_RANK=0)
    assert distributed.load_once_per_machine(lambda: events.append("first") or "data") == "data"
    waiting.join(30)
    assert events == ["first", "second"]


def test_another_machine_does_not_wait(launched, store):
    launched(LOCAL_RANK=0, GROUP_RANK=0)
    distributed.load_once_per_machine(lambda: None)
    launched(LOCAL_RANK=0, GROUP_RANK=1)
    assert distributed.load_once_per_machine(lambda: "data") == "data"
    assert store.check(["image_classification/loaded by 0", "image_classification/loaded by 1"])


def test_new_group_meets_in_a_fresh_part_of_the_store():
    """Though the store still holds the part of a group that is gone, with question and answer."""
    store = dist.HashStore()
    old = dist.PrefixStore("old", store)
    old.set("asked by 1", "gone")
    old.set("answer to 1", "gone")
    old.set("address", "of a process that has ended")
    store.set(rendezvous.PREFIX_KEY, "old")
    parts = {}

    def meet(rank):
        parts[rank] = rendezvous.fresh_prefix(store, rank, 3, distributed.TIMEOUT)

    others = [threading.Thread(target=meet, args=(rank,), daemon=True) for rank in (1, 2)]
    for thread in others:
        thread.start()
    others[0].join(0.3)
    assert not parts  # they do not take the old part
    meet(0)
    for thread in others:
        thread.join(30)
    parts[0].set("greeting", "hello")
    assert [parts[rank].get("greeting") for rank in range(3)] == [b"hello"] * 3
    assert not parts[1].check(["address"])


# ---- two processes ----


def results_of_ranks(folder):
    """The JSON that each of two ranks wrote."""
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def run_code_together(code, folder):
    """Run code in two processes; the JSON that each rank wrote."""
    run_together(Program(folder), 2, patch=f"{code}\nsys.exit()")
    return results_of_ranks(folder)


def torchrun(folder, code, *options):
    """Run code in two processes that torchrun starts; the JSON that each rank wrote."""
    script = folder / "snippet.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", *options, str(script)]
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return results_of_ranks(folder)


TOGETHER = """
import json, time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from classifier import distributed

distributed.divide_cores()
group = distributed.join(torch.device("cpu"))
rank = group.rank
found = {"rank": rank, "world_size": group.world_size, "is_main": group.is_main}
found["is_main_process"] = distributed.is_main_process()
found["threads"] = torch.get_num_threads()
found["max"] = group.max(5 + rank)
found["made"] = group.broadcast_from_rank0(lambda: f"by {rank}")

# sums and stop requests: only rank 1 was asked
stats = torch.tensor([1.0 + rank, 10.0])
found["unpolled"] = group.all_reduce_and_poll(stats, rank == 1, poll=False)
found["polled"] = group.all_reduce_and_poll(torch.zeros(0), rank == 1, poll=True)
found["nobody"] = group.all_reduce_and_poll(torch.zeros(1), False, poll=True)
found["sums"] = stats.tolist()


# gradients of two micro-batches; one weight gets none
class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("statistic", torch.zeros(1))

    def forward(self, images):
        return (images * self.weight).sum()


network = Sum()
forward = group.wrap(network, has_unused_params=True)
for i in range(2):
    images = torch.full((1, 2), float(1 + i + 10 * rank))
    with group.accumulate(forward, last=i == 1):
        forward(images).backward()
    found[f"gradient after {i}"] = network.weight.grad.tolist()

# random numbers
torch.manual_seed(3)
group.seed_ranks(seed=3, step=7)
found["drawn"] = torch.rand(2).tolist()

# evaluation: the statistic of rank 0 counts
counted = []


def classify(images):
    counted.append(len(images))
    return torch.stack([images.float(), images.float() + network.statistic], 1)


network.statistic.fill_(100.0 * (rank + 1))
for count in (5, 4, 1):
    logits = group.share_evaluation(network, torch.arange(count), classify)
    found[f"logits of {count}"] = logits.tolist()
found["counted"] = counted

# rank 0 waits at the barrier
if rank == 1:
    time.sleep(0.3)
    Path("late").touch()
group.barrier()
found["late"] = Path("late").exists()
group.leave()
found["left"] = not dist.is_initialized()
Path(f"rank-{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes(folder):
    results = run_code_together(TOGETHER, folder)
    first, second = results
    assert [found.pop("rank") for found in results] == [0, 1]
    assert [found.pop("is_main") for found in results] == [True, False]
    assert [found.pop("is_main_process") for found in results] == [True, False]
    own_numbers = [found.pop("drawn") for found in results]
    assert own_numbers[0] != own_numbers[1]
    torch.manual_seed(3)
    assert own_numbers[0] == torch.rand(2).tolist()  # rank 0 draws as a single process does
    assert [found.pop("counted") for found in results] == [[3, 2, 1], [2, 2, 1]]

    # before the exchange each has its own sum; then all have the mean over the processes
    assert [found.pop("gradient after 0") for found in results] == [[1, 1], [11, 11]]
    mean = ((1 + 2) + (11 + 12)) / 2
    assert first.pop("gradient after 1") == second.pop("gradient after 1") == [mean, mean]

    for found in results:
        for count in (5, 4, 1):
            logits = found.pop(f"logits of {count}")
            assert logits == [[i, i + 100] for i in range(count)]
        assert found.pop("threads") >= 1
        assert found == {
            "world_size": 2,
            "max": 6,
            "made": "by 0",
            "unpolled": False,
            "polled": True,
            "nobody": False,
            "sums": [3, 20],
            "late": True,
            "left": True,
        }


RESTARTED = """
import json, os, signal
from pathlib import Path

import torch

from classifier import distributed

distributed.divide_cores()
settings = distributed.settings_after_restart({"epochs": 3, "data_dir": "images"})
data = distributed.load_once_per_machine(lambda: "data")
group = distributed.join(torch.device("cpu"))
run = Path("run")
if "resume" not in settings:
    if group.is_main:
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"model": "cnn"}))
        distributed.remember_run(run)
    group.barrier()
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier()  # which the other never reaches
found = {"settings": settings, "max": group.max(group.rank)}
group.leave()
Path(f"rank-{group.rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_processes_meet_again_after_a_restart(folder):
    results = torchrun(folder, RESTARTED, "--max-restarts=1")
    resumed = {"data_dir": "images", "resume": str((folder / "run").absolute())}
    assert results == [{"settings": resumed, "max": 1}] * 2


ERRORS = """
import json
from pathlib import Path

import torch
import torch.distributed as dist

from classifier import distributed
from classifier.errors import Stopped, UserError

distributed.divide_cores()
found = {}


class Unsendable(Exception):
    def __init__(self, function):
        super().__init__("not to be sent")
        self.function = function


def attempt(name, work):
    outcome = "nothing"
    try:
        with distributed.joined(torch.device("cpu")) as group:
            outcome = work(group)
    except Exception as error:
        outcome = [type(error).__name__, str(error)]
    found[name] = {"outcome": outcome, "left": not dist.is_initialized()}


def fail_on(rank):
    def work(group):
        if group.rank == rank:
            raise ValueError("boom")
        return group.max(5)  # waits for the other

    return work


def fail_in_broadcast(error):
    def make():
        raise error

    return lambda group: group.broadcast_from_rank0(make)


def stop(group):
    group.barrier()
    raise Stopped(15)


attempt("rank 0", fail_on(0))
attempt("rank 1", fail_on(1))
attempt("user error", fail_in_broadcast(UserError("told to all")))
attempt("system error", fail_in_broadcast(OSError(28, "No space", "a file")))
attempt("unsendable", fail_in_broadcast(Unsendable(lambda: None)))
attempt("stopped", stop)
attempt("well", lambda group: group.max(group.rank))
rank = int(distributed.os.environ["RANK"])
Path(f"rank-{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_processes_leave_after_an_error_and_can_meet_again(folder):
    """Without waiting for a process that does not come; an error of rank 0 is raised in all."""
    results = run_code_together(ERRORS, folder)
    for rank, found in enumerate(results):
        assert all(each["left"] for each in found.values())
        outcomes = {name: each["outcome"] for name, each in found.items()}
        assert outcomes[f"rank {rank}"] == ["ValueError", "boom"]
        assert outcomes[f"rank {1 - rank}"][0] != "ValueError"  # the connection was lost
        assert outcomes["user error"] == ["UserError", "told to all"]
        assert outcomes["system error"] == ["OSError", "[Errno 28] No space: 'a file'"]
        assert "not to be sent" in outcomes["unsendable"][1]
        assert outcomes["stopped"][0] == "Stopped"
        assert outcomes["well"] == 1
