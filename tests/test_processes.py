"""Several processes that train together, as torchrun starts them.

Some tests start them with torchrun, which imports torch in each; the others are quicker.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    QUICK,
    REPOSITORY,
    Program,
    only_run,
    rows_of,
    run_together,
    same,
    state_of,
    wait_for,
    weights,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc"),
]

PLAIN = """
import torch
from torch import nn

def plain(classes=10, channels=3, image_size=32):
    network = nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, classes),
    )
    network.unused = nn.Parameter(torch.ones(2))  # gets no gradient
    return network
"""


def torchrun(processes, *options):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return (*command, *options)


@pytest.fixture
def together(folder, monkeypatch):
    """The program, started by torchrun; it sets the number of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return Program(folder, launcher=torchrun(2))


def curve(run):
    names = ["train_loss", "valid_loss", "train_accuracy", "valid_accuracy"]
    return [[float(row[name]) for name in names] for row in rows_of(run)]


def wait_for_epoch(process, folder, number):
    """Wait until so many epochs are done."""

    def is_done():
        assert process.poll() is None, process.communicate()
        files = folder.glob("runs/*/*/metrics.csv")
        return any(len(path.read_text().splitlines()) > number for path in files)

    wait_for(is_done)


def rank_0_of(process):
    """The id of the process of rank 0, which writes, of those that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in children:
        if b"RANK=0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)


def test_several_processes_give_the_loss_curve_of_one(inside, program, folder):
    """Sizes that cannot be divided evenly: an image left out or counted twice would show."""
    (folder / "own.py").write_text(PLAIN)
    options = ["--dataset", "digits", "--subset", "401", "--batch-size", "57", "--epochs", "3"]
    options += ["--model", "own.py:plain", "--progressive-resizing", "0", "--optimizer", "sgd"]
    options += ["--class-balance", "weights", "--precision", "fp32", "--device", "cpu"]
    options += ["--drop-easiest", "0.3"]
    inside(*options, "--run-dir", "one")
    out, _ = run_together(program, 3, *options, "--run-dir", "three")
    for line in ("Epoch 0000: ", "Finished Training", "Model: "):
        assert out.count(line) == 1
    assert "3 processes share each batch" in out
    one, three = torch.tensor(curve(folder / "one")), torch.tensor(curve(folder / "three"))
    assert one.shape == three.shape == (3, 4)
    losses, accuracies = slice(0, 2), slice(2, 4)
    torch.testing.assert_close(three[:, losses], one[:, losses], rtol=1e-3, atol=0)
    # Sums in another order round otherwise, which may decide about one image of 143.
    torch.testing.assert_close(three[:, accuracies], one[:, accuracies], rtol=0, atol=1.5 / 143)
    first, second = (weights(folder / run / "best.pth") for run in ("one", "three"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-3, msg=name)


def test_two_processes_train_the_default_network_as_well(inside, program, folder):
    """In batches of about the default size, of which batch norm sees smaller parts."""
    options = ["--dataset", "digits", "--subset", "800", "--batch-size", "400", "--epochs", "2"]
    options += ["--precision", "fp32", "--image-size", "16", "--width", "0.5", "--device", "cpu"]
    inside(*options, "--run-dir", "one")
    run_together(program, 2, *options, "--run-dir", "two")
    one, two = torch.tensor(curve(folder / "one")), torch.tensor(curve(folder / "two"))
    assert 0 < (one[:, 0] / two[:, 0] - 1).abs().max() < 0.02


# of ten steps each
LONG = [*QUICK, "--device", "cpu", "--epochs", "7", "--batch-size", "20", "--drop-easiest", "0.3"]


def test_run_that_loses_a_process_and_is_stopped_ends_as_if_undisturbed(
    inside, together, program, folder, tmp_path
):
    (tmp_path / "undisturbed").mkdir()
    run_together(Program(tmp_path / "undisturbed"), 2, *LONG)
    undisturbed = only_run(tmp_path / "undisturbed")
    together.launcher = torchrun(2, "--max-restarts=3")
    process = together.start(*LONG)
    wait_for_epoch(process, folder, 2)
    os.kill(rank_0_of(process), signal.SIGKILL)  # torchrun restarts it, and it resumes
    wait_for_epoch(process, folder, 5)
    process.send_signal(signal.SIGTERM)  # as a cluster does that needs the machine
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Resume with: torchrun --nproc-per-node=2 " in out and "--resume" in out
    first, second = out.split("Start Training")[1:]
    assert "Epoch 0000: " in first
    assert "Epoch 0000: " not in second and "Epoch 0004: " in second
    run = only_run(folder)
    assert state_of(run)["step"] < 7 * 10
    run_together(program, 2, "--resume", "last")
    assert same(weights(undisturbed / "best.pth"), weights(run / "best.pth"))
    assert curve(undisturbed) == curve(run)
    inside("--resume", "last", "--epochs", "8")  # goes on with one process, too
    assert len(curve(run)) == 8


def test_error_of_all_processes_is_one_line_of_the_program(together, folder):
    process = together.start(*QUICK, "--device", "cpu", "--batch-size", "7")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1 and "exitcode  : 2" in err
    lines = [line for line in err.splitlines() if line.startswith("image_classification.py: error")]
    assert len(lines) == 1 and "--batch-size 7" in lines[0]
    assert not list(folder.glob("runs/*/*/config.json"))


# Runs the program, whose rank 1 fails in its third step; or library calls, where all ranks do.
FAILING = """
import json, sys
from pathlib import Path

import torch.distributed as dist

import image_classification as ic

train_step = ic.Trainer.train_step
steps = []


def failing_step(trainer, batch):
    steps.append(1)
    if len(steps) == 3 and (trainer.group.rank == 1 or not sys.argv[1:]):
        raise ValueError("boom")
    return train_step(trainer, batch)


ic.Trainer.train_step = failing_step
if sys.argv[1:]:
    sys.exit(ic.main())
settings = {"dataset": "digits", "subset": 400, "width": 0.25, "image_size": 16, "device": "cpu"}
config = ic.Config(**settings, epochs=1, batch_size=40)
outcomes = []
for _ in range(2):
    try:
        ic.train(config)
        outcomes.append("done")
    except Exception as error:
        outcomes.append(type(error).__name__)
    outcomes.append("joined" if dist.is_initialized() else "left")
Path(f"rank-{ic.distributed.os.environ['RANK']}.json").write_text(json.dumps(outcomes))
"""


def test_error_of_one_process_is_the_one_that_is_printed(together, folder):
    """Not that of the others, which lose their connection to it."""
    together.script = folder / "failing.py"
    together.script.write_text(FAILING)
    options = [*QUICK, "--device", "cpu", "--batch-size", "40"]
    process = together.start(*options, env={"PYTHONPATH": str(REPOSITORY)})
    _, err = process.communicate(timeout=100)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(lines) == 1, err
    assert "boom" in lines[0]


def test_processes_train_again_after_an_error(together, folder):
    together.script = folder / "failing.py"
    together.script.write_text(FAILING)
    together(env={"PYTHONPATH": str(REPOSITORY)})
    for rank in range(2):
        outcomes = json.loads((folder / f"rank-{rank}.json").read_text())
        assert outcomes == ["ValueError", "left", "done", "left"]
