"""What the tests share: the program as a user runs it, real data where there is some, folders with awkward names."""

import csv
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests run at once
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "image_classification.py"
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children
import image_classification as ic
import inference

# Settings under which the digits train in a second or two, for tests of everything but accuracy.
SMALL = ["--dataset", "digits", "--subset", "400", "--epochs", "2"]
QUICK = [*SMALL, "--width", "0.25"]


def pytest_xdist_auto_num_workers():
    return min(4, (os.cpu_count() or 1) + 1)  # some tests wait more than they compute


def only_run(folder):
    (path,) = folder.glob("runs/*/*/config.json")
    return path.parent


def weights(path):
    return torch.load(path, weights_only=True, map_location="cpu")["model"]


def state_of(run):
    return torch.load(run / "last.pth", weights_only=True, map_location="cpu")


def report_of(run):
    return json.loads((run / "report.json").read_text())


def table_of(text):
    """The rows of a CSV file, by the names of its columns."""
    return list(csv.DictReader(text.splitlines()))


def rows_of(run):
    return table_of((run / "metrics.csv").read_text())


def same(first, second):
    """Have two networks the same weights?"""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_time(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def epochs_of(run):
    return [int(row["epoch"]) for row in rows_of(run)]


def events_of(path):
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(path), size_guidance={"images": 0}).Reload()


def trainer_of(**settings):
    """A trainer for the digits, on the CPU, with these settings."""
    data = ic.load_data(ic.Config(dataset="digits"))
    return ic.Trainer(ic.settle(ic.Config(dataset="digits", **settings), data), data, torch.device("cpu"))


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def beforehand(owner, name, do):
    """In a block with this, `do` goes before every call of that function or method, with its arguments."""
    original = getattr(owner, name)
    return mock.patch.object(owner, name, lambda *given: (do(*given), original(*given))[1])


class Program:
    """image_classification.py in a folder of its own, run in a process of its own."""

    def __init__(self, folder: Path, script: Path = SCRIPT, launcher: tuple[str, ...] = ()):
        self.folder, self.script, self.launcher = folder, script, launcher

    def start(self, *arguments, patch="", env=None, **options):
        """Start the program; `patch` is Python that changes constants of the module `ic` first."""
        code = f"import sys, image_classification as ic\n{patch}\nsys.exit(ic.main(sys.argv[1:]))"
        command = [sys.executable, *(["-c", code] if patch else [*self.launcher, self.script]), *arguments]
        paths = filter(None, [str(self.script.parent), os.environ.get("PYTHONPATH")])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (env or {})
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": self.folder} | options
        return subprocess.Popen(list(map(str, command)), env=environment, **options)

    def __call__(self, *arguments, status=0, timeout=200, **options):
        """Run it to its end, as `finish` does."""
        return self.finish(self.start(*arguments, **options), status, timeout)

    def finish(self, process, status=0, timeout=200):
        """Wait for its end, check the exit status and return (standard output, standard error)."""
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err, err
        return out, err

    def error(self, *arguments, status=1, **options):
        """Run it, expecting it to fail with one line, after how to use it if that is wrong; returns that line."""
        _, err = self(*arguments, status=status, **options)
        *usage, line = err.strip().splitlines()
        assert "error: " in line and bool(usage) == (status == 2), err
        assert all(each.startswith("       " if i else "usage: ") for i, each in enumerate(usage)), err
        return line


class Inside:
    """A program in this process, where that is as good: it saves the seconds that importing takes."""

    def __init__(self, capsys, monkeypatch, name):
        self.capsys, self.monkeypatch, self.name = capsys, monkeypatch, name

    def __call__(self, *arguments, status=0):
        module = importlib.import_module(self.name)
        self.monkeypatch.setattr(sys, "argv", [f"{self.name}.py", *map(str, arguments)])
        self.capsys.readouterr()
        try:
            got = module.run(module.main) if hasattr(module, "run") else module.main()
        except SystemExit as exit:
            got = exit.code
        out, err = self.capsys.readouterr()
        assert (got or 0) == status, f"status {got}\n{out}\n{err}"
        return out, err

    error = Program.error


@pytest.fixture
def tool_inside(capsys, folder, monkeypatch):
    """A tool in this process, by its name."""
    return functools.partial(Inside, capsys, monkeypatch)


@pytest.fixture
def inside(tool_inside):
    """The program in this process."""
    return tool_inside("image_classification")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A fresh folder with a space and non-ASCII letters in its path, which is the current one."""
    path = tmp_path / "Übung 1 数据"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def program(folder):
    return Program(folder)


def find_cifar10():
    """The folder to give as --data-dir for real CIFAR-10, if there is one."""
    places = map(Path, filter(None, [os.environ.get("CIFAR10_DIR"), REPOSITORY / "data"]))
    return next((place for place in places if (place / "cifar-10-batches-py" / "test_batch").exists()), None)


@pytest.fixture(scope="session")
def cifar10():
    """The same, for tests that need it."""
    return find_cifar10() or pytest.skip("no CIFAR-10 in data/ or in the folder that CIFAR10_DIR names")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a model_*.pth and its run, whose epochs are kept; of all processes that test, one trains it."""
    shared, own = os.environ.get("PYTEST_XDIST_TESTRUNUID"), tmp_path_factory.getbasetemp()
    folder = own.parent / f"trained-{shared}" if shared else own / "trained"
    folder.mkdir(exist_ok=True)
    data = ["--dataset", "digits"]
    if place := find_cifar10():
        data = ["--dataset", "cifar10", "--data-dir", place, "--subset", "5000", "--batch-size", "250"]
    with FileLock(folder / ".lock"):
        if not list(folder.glob("model_*.pth")):
            Program(folder)(*data, "--epochs", "4", "--width", "0.5", "--keep-epochs", "--run-dir", "run")
    return folder


@pytest.fixture(scope="session")
def model(trained):
    """That model, as inference.py loads it."""
    (path,) = trained.glob("model_*.pth")
    return inference.load_model(path, "cpu")


@pytest.fixture(scope="session")
def data(model):
    """Its data set."""
    return inference.load_its_data(model)


def tool(name, folder):
    """One of the tools, to be run in that folder."""
    return Program(folder, REPOSITORY / f"{name}.py")


def save(image, path, **options):
    """Write an image, uint8 (3, H, W), to a file; returns its path."""
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, **options)
    return path


def write_images(folder, counts, size=(48, 36), seed=0):
    """Class folders of images that a network can tell apart, each image another one."""
    random = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            small = random.integers(0, 120, (6, 8, 3)) + [120 * (number == 0), 120 * (number == 1), 120 * (number == 2)]
            Image.fromarray(small.astype(np.uint8)).resize(size).save(folder / name / f"{i}.png")


@pytest.fixture
def photos(folder):
    write_images(folder / "photos", {"red": 40, "green": 40, "blue": 30})
    return folder / "photos"


def load_photos(**settings):
    """The data set in the folder photos/ of the current one."""
    return ic.load_data(ic.Config(dataset="photos", **settings))


@pytest.fixture
def small_disk(folder, request):
    """A function that mounts a file system of so many KiB and returns its folder."""

    def mount(size):
        disk = folder / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk]
        if os.name != "posix" or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no right to mount a small file system")
        request.addfinalizer(lambda: subprocess.run(["umount", disk], check=True))
        return disk

    return mount


@pytest.fixture
def unwritable(folder, request):
    """A function that takes every right to write to a file or folder away, from root as well."""

    def protect(path):
        if os.name != "posix":
            pytest.skip("Windows protects no folder this way")
        if os.geteuid():
            path.chmod(0o555)
            request.addfinalizer(lambda: path.chmod(0o755))
        elif shutil.which("chattr") and not subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
            request.addfinalizer(lambda: subprocess.run(["chattr", "-i", path], capture_output=True))
        else:
            pytest.skip("root can write everywhere here, and chattr +i does not work")

    return protect


@pytest.fixture
def imagenet(folder, monkeypatch):
    """torchvision's SqueezeNet weights as if downloaded before: of the real names and shapes, drawn at random."""
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(folder / "hub"))
    torch.manual_seed(1)
    path = folder / "hub" / "hub" / "checkpoints" / Path(SqueezeNet1_1_Weights.DEFAULT.url).name
    path.parent.mkdir(parents=True)
    torch.save(squeezenet1_1().state_dict(), path)
    return path
