"""Several processes that train together, as torchrun starts them."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK, Program, only_run, rows_of, same, state_of, wait_for, weights

from alternatives import torchrun as launched

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc")

PLAIN = """
import torch
from torch import nn

def plain(classes=10, channels=3, image_size=32):
    layers = nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten()
    network = nn.Sequential(*layers, nn.Linear(16 * 64, classes))
    network.unused = nn.Parameter(torch.ones(2))  # gets no gradient
    return network
"""


def torchrun(processes, *options):
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options)


@pytest.fixture
def together(folder, monkeypatch):
    """The program, started by torchrun; it sets the number of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return Program(folder, launcher=torchrun(2))


def curve(run):
    names = "train_loss", "valid_loss", "train_accuracy", "valid_accuracy"
    return [[float(row[name]) for name in names] for row in rows_of(run)]


def wait_for_epoch(process, folder, number):
    """Until that many epochs are done."""

    def done():
        assert process.poll() is None, process.communicate()
        return any(len(path.read_text().splitlines()) > number for path in folder.glob("runs/*/*/metrics.csv"))

    wait_for(done)


def first_of(process):
    """The id of the first process that torchrun has started, which writes."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"RANK=0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)


def test_several_processes_give_the_loss_curve_of_one(inside, together, folder):
    """Batches and sets that cannot be divided evenly, so that an image left out or counted twice would show."""
    (folder / "own.py").write_text(PLAIN)
    options = ["--dataset", "digits", "--subset", "401", "--batch-size", "57", "--epochs", "3", "--precision", "fp32",
               "--model", "own.py:plain", "--low-res", "0", "--class-balance", "weights",
               "--optimizer", "sgd", "--device", "cpu"]  # fmt: skip
    inside(*options, "--run-dir", "one")
    together.launcher = torchrun(3)
    out, _ = together(*options, "--run-dir", "three")
    assert out.count("Epoch 0000: ") == out.count("Finished Training") == out.count("Model: ") == 1
    assert "3 processes share each batch" in out
    one, three = torch.tensor(curve(folder / "one")), torch.tensor(curve(folder / "three"))
    assert one.shape == (3, 4) and torch.allclose(one, three, rtol=1e-4, atol=0)
    first, second = (weights(folder / run / "best.pth") for run in ("one", "three"))
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


def test_two_processes_train_the_default_network_as_well(inside, together, folder):
    """In batches of about the default size, of which batch norm sees smaller parts."""
    options = ["--dataset", "digits", "--subset", "1200", "--batch-size", "400", "--epochs", "2", "--precision", "fp32",
               "--image-size", "16", "--device", "cpu"]  # fmt: skip
    inside(*options, "--run-dir", "one")
    together(*options, "--run-dir", "two")
    one, two = torch.tensor(curve(folder / "one")), torch.tensor(curve(folder / "two"))
    assert 0 < (one[:, 0] / two[:, 0] - 1).abs().max() < 0.02


LONG = [*QUICK, "--device", "cpu", "--epochs", "10", "--batch-size", "20", "--image-size", "16"]  # of 20 steps each


def test_run_that_loses_a_process_and_is_pre_empted_ends_as_if_undisturbed(inside, together, folder, tmp_path):
    (tmp_path / "undisturbed").mkdir()
    Program(tmp_path / "undisturbed", launcher=together.launcher)(*LONG)
    undisturbed = only_run(tmp_path / "undisturbed")
    together.launcher = torchrun(2, "--max-restarts=3")
    process = together.start(*LONG)
    wait_for_epoch(process, folder, 2)
    os.kill(first_of(process), signal.SIGKILL)  # the run goes on by itself
    wait_for_epoch(process, folder, 5)
    process.send_signal(signal.SIGTERM)  # pre-emption
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "Go on with: torchrun --nproc-per-node=2 " in out and "--resume" in out
    first, second = out.split("Start Training")[1:]
    assert "Epoch 0000: " in first and "Epoch 0000: " not in second and "Epoch 0004: " in second
    run = only_run(folder)
    assert state_of(run)["step"] < 10 * 20
    together("--resume", "last")
    assert same(weights(undisturbed / "best.pth"), weights(run / "best.pth"))
    assert curve(undisturbed) == curve(run)
    inside("--resume", "last", "--epochs", "11")  # goes on with one process, too
    assert len(curve(run)) == 11


def test_error_of_all_is_one_line_of_the_program(together, folder):
    process = together.start(*QUICK, "--device", "cpu", "--batch-size", "7")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1 and "exitcode  : 2" in err
    assert len([line for line in err.splitlines() if "too small for 2 processes" in line]) == 1
    assert not list(folder.glob("runs/*/*/config.json"))


def test_command_and_device_of_a_process(monkeypatch):
    for name, value in {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "99"}.items():
        monkeypatch.setenv(name, value)
    assert launched.command(["python", "x.py"]) == ["torchrun", "--nnodes=2", "--nproc-per-node=2", "x.py"]
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError):
            launched.device(name)
    assert launched.device("cpu") == "cpu"
