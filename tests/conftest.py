"""What the tests share: the program as users run it, real data if there is any, and odd folders."""

import contextlib
import csv
import functools
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests run at once
import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "image_classification.py"
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]
# background jobs of a shell ignore SIGINT, and so would their children
signal.signal(signal.SIGINT, signal.default_int_handler)
import fork_server
from blank_pictures import draw_nothing

import image_classification as ic
from classifier.cli import run_tool
from classifier.datasets.load import find_source
from classifier.resolve import resolve_defaults

# Settings under which the digits train in a second or two, for tests of everything but accuracy.
SMALL = ["--dataset", "digits", "--subset", "200", "--epochs", "2", "--image-size", "16"]
QUICK = [*SMALL, "--width", "0.25"]


def pytest_xdist_auto_num_workers():
    return min(4, os.cpu_count() or 1)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # in the first process only
        fork_server.start(REPOSITORY)


def pytest_collection_finish():
    gc.freeze()  # train() collects garbage at its end, which takes 0.3 s otherwise


# ---- What a run has written ----------------------------------------------------------------------


def only_run(folder):
    """The folder of the one run below this folder."""
    (path,) = folder.glob("runs/*/*/config.json")
    return path.parent


def weights(path):
    """The weights in a model file."""
    return torch.load(path, weights_only=True, map_location="cpu")["model"]


def state_of(run):
    """The content of last.pth."""
    return torch.load(run / "last.pth", weights_only=True, map_location="cpu")


def report_of(run):
    """The content of report.json."""
    return json.loads((run / "report.json").read_text())


def table_of(text):
    """The rows of a CSV file, by the names of its columns."""
    return list(csv.DictReader(text.splitlines()))


def rows_of(run):
    """The rows of metrics.csv."""
    return table_of((run / "metrics.csv").read_text())


def epochs_of(run):
    """The numbers of the epochs in metrics.csv."""
    return [int(row["epoch"]) for row in rows_of(run)]


def events_of(path):
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(path), size_guidance={"images": 0}).Reload()


def same(first, second):
    """Whether two networks have the same weights."""
    if first.keys() != second.keys():
        return False
    return all(torch.equal(first[name], second[name]) for name in first)


def without_time(history):
    """The rows of a history without what depends on the machine's speed."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


# ---- Helpers -------------------------------------------------------------------------------------


def trainer_of(**settings):
    """A trainer for the digits, on the CPU, with these settings."""
    config = ic.Config(dataset="digits", **settings)
    data = ic.load_data(ic.Config(dataset="digits"))
    config = resolve_defaults(config, data, ic.DEFAULT_RECIPE)
    return ic.Trainer(config, data, torch.device("cpu"))


def wait_for(condition, seconds=60):
    """Wait until the condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def beforehand(owner, name, do):
    """Within this context, `do` is called before that function or method, with its arguments."""
    original = getattr(owner, name)

    def do_first(*args, **kwargs):
        do(*args, **kwargs)
        return original(*args, **kwargs)

    return mock.patch.object(owner, name, do_first)


def save(image, path, **options):
    """Write an image, uint8 (3, H, W), to a file; returns its path."""
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, **options)
    return path


def write_images(folder, counts, size=(48, 36), seed=0):
    """Write folders of different images, one for each class, that a network can tell apart.

    counts: number of images of each class.
    """
    random = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        colour = [120 * (number == channel) for channel in range(3)]
        for i in range(count):
            pixels = random.integers(0, 120, (6, 8, 3)) + colour
            image = Image.fromarray(pixels.astype(np.uint8))
            image.resize(size).save(folder / name / f"{i}.png")


def load_photos(**settings):
    """The data set in the folder photos/ of the current one."""
    return ic.load_data(ic.Config(dataset="photos", **settings))


# ---- Programs ------------------------------------------------------------------------------------


class Program:
    """image_classification.py, or another script, in a process of its own.

    Attributes:
        folder: its current folder.
        script: the file.
        launcher: what stands between Python and the script, such as -m torch.distributed.run.
    """

    def __init__(self, folder: Path, script: Path = SCRIPT, launcher: tuple[str, ...] = ()):
        self.folder = folder
        self.script = script
        self.launcher = launcher

    def start(self, *arguments, patch="", env=None, **options):
        """Start the program.

        patch: Python code that runs first, with the script imported as `ic`; it changes constants
        through their modules.
        """
        source = None
        run = [*self.launcher, self.script]
        if patch:
            code = [
                "import sys, image_classification as ic",
                patch,
                "ic.cli.end_process(ic.main(sys.argv[1:]))",
            ]
            source = "\n".join(code)
            run = ["-c", source]
        paths = [str(self.script.parent)]
        if "PYTHONPATH" in os.environ:
            paths.append(os.environ["PYTHONPATH"])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (env or {})
        is_usual = not (self.launcher or options) and self.script.parent == REPOSITORY
        if is_usual and fork_server.can_start(environment):
            first = "-c" if patch else str(self.script)
            arguments = [first, *map(str, arguments)]
            return fork_server.Forked(arguments, self.folder, source, environment)
        defaults = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "cwd": self.folder,
        }
        command = [str(word) for word in [sys.executable, *run, *arguments]]
        return subprocess.Popen(command, env=environment, **defaults | options)

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
        """Run it, expecting it to fail with one line; returns that line.

        After wrong usage the line comes below the usage.
        """
        _, err = self(*arguments, status=status, **options)
        *usage, line = err.strip().splitlines()
        assert "error: " in line and bool(usage) == (status == 2), err
        for number, usage_line in enumerate(usage):
            assert usage_line.startswith("       " if number else "usage: "), err
        return line


def run_together(program: Program, world_size: int, *arguments, patch=""):
    """Run a program in several processes with all that torchrun gives them, but started at once.

    patch: as for `Program.start`. Waits for their end, checks that all succeed, and returns
    (standard output, standard error) of rank 0.
    """
    if sys.platform == "win32":
        pytest.skip("torch's store there needs a build with libuv")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in range(world_size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(program.start(*arguments, patch=patch, env=shared | own))
    printed = [program.finish(process) for process in processes]
    return printed[0]


class Inside:
    """A program in this process, which saves the seconds that importing takes."""

    def __init__(self, capsys, monkeypatch, name):
        self.capsys = capsys
        self.monkeypatch = monkeypatch
        self.name = name

    def __call__(self, *arguments, status=0):
        module = importlib.import_module(self.name)
        self.monkeypatch.setattr(sys, "argv", [f"{self.name}.py", *map(str, arguments)])
        self.monkeypatch.setattr(gc, "freeze", lambda: None)  # it would keep the garbage of tests
        self.capsys.readouterr()
        try:
            returned = module.main() if module is ic else run_tool(module.main)
        except SystemExit as exit:
            returned = exit.code
        out, err = self.capsys.readouterr()
        assert (returned or 0) == status, f"status {returned}\n{out}\n{err}"
        return out, err

    error = Program.error


def tool(name, folder):
    """One of the tools, to be run in that folder."""
    return Program(folder, REPOSITORY / f"{name}.py")


def without(folder, *names):
    """An environment for a `Program`, in which these packages cannot be imported."""
    hidden = folder / "hidden"
    hidden.mkdir()
    for name in names:
        text = f"raise ModuleNotFoundError('no {name} here', name={name!r})"
        (hidden / f"{name}.py").write_text(text)
    return {"PYTHONPATH": str(hidden)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A fresh folder with a space and non-ASCII letters in its path, which is the current one."""
    path = tmp_path / "Übung 1 数据"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Runs of this test draw nothing, unless it is marked `pictures`."""
    if not request.node.get_closest_marker("pictures"):
        draw_nothing(monkeypatch.setattr)
        monkeypatch.setenv(fork_server.NO_PICTURES, "1")


@pytest.fixture
def program(folder):
    """The program in a process of its own."""
    return Program(folder)


@pytest.fixture
def tool_inside(capsys, folder, monkeypatch) -> Callable[[str], Inside]:
    """A tool in this process, by its name."""
    return functools.partial(Inside, capsys, monkeypatch)


@pytest.fixture
def inside(tool_inside):
    """The program in this process."""
    return tool_inside("image_classification")


# ---- Data and models -----------------------------------------------------------------------------


def find_cifar10():
    """The folder to give as --data-dir for real CIFAR-10, or None."""
    places = [REPOSITORY / "data"]
    if os.environ.get("CIFAR10_DIR"):
        places.insert(0, Path(os.environ["CIFAR10_DIR"]))
    for place in places:
        if (place / "cifar-10-batches-py" / "test_batch").exists():
            return place
    return None


@pytest.fixture(scope="session")
def cifar10():
    """The folder to give as --data-dir for real CIFAR-10; without it the test is skipped."""
    place = find_cifar10()
    if place is None:
        pytest.skip("no CIFAR-10 in data/ or in the folder that CIFAR10_DIR names")
    return place


@contextlib.contextmanager
def shared_folder(tmp_path_factory, name):
    """A folder that all processes of this test run share, locked: the first one fills it."""
    own = tmp_path_factory.getbasetemp()
    test_run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = own.parent / f"{name}-{test_run}" if test_run else own / name
    folder.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        yield folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a model_*.pth, and in run/ its run with --keep-epochs."""
    settings = ["--epochs", "4", "--width", "0.25", "--image-size", "16", "--keep-epochs"]
    with shared_folder(tmp_path_factory, "trained") as folder:
        if not list(folder.glob("model_*.pth")):
            Program(folder)("--dataset", "digits", *settings, "--run-dir", "run")
    return folder


@pytest.fixture(scope="session")
def model(trained):
    """That model, as inference.py loads it."""
    import inference

    (path,) = trained.glob("model_*.pth")
    return inference.load_model(path, "cpu")


@pytest.fixture(scope="session")
def data(trained):
    """Its data set."""
    (path,) = trained.glob("model_*.pth")
    _, content = ic.load_checkpoint(path)
    return ic.load_data(ic.Config(**find_source(content["config"], content["image_size"]).settings))


@pytest.fixture
def onnx_file(folder):
    """An ONNX file as export.py writes it; its logits are 10 times the mean of each channel."""
    from onnx import TensorProto, helper, save_model

    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    ten = helper.make_tensor("ten", TensorProto.FLOAT, [1], [10.0])
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["means"]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("Mul", ["flat", "ten"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "colours", [images], [logits], [ten])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    about = {
        "classes": ["red", "green", "blue"],
        "image_size": 8,
        "temperature": 2.0,
        "dataset": "colours",
        "test_accuracy": None,
    }
    helper.set_model_props(model, {name: json.dumps(value) for name, value in about.items()})
    save_model(model, str(folder / "model.onnx"))
    for colour in ("blue", "lime"):
        Image.new("RGB", (20, 10), colour).save(folder / f"{colour}.png")
    return folder / "model.onnx"


@pytest.fixture
def photos(folder):
    """A folder of 110 images of three classes, photos/ in the current folder."""
    write_images(folder / "photos", {"red": 40, "green": 40, "blue": 30})
    return folder / "photos"


@pytest.fixture
def imagenet(folder, monkeypatch):
    """torchvision's SqueezeNet weights as if downloaded before: real names and shapes, random."""
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(folder / "hub"))
    torch.manual_seed(1)
    path = folder / "hub" / "hub" / "checkpoints" / Path(SqueezeNet1_1_Weights.DEFAULT.url).name
    path.parent.mkdir(parents=True)
    torch.save(squeezenet1_1().state_dict(), path)
    return path


# ---- Disks ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(folder, request):
    """A function that mounts a file system of so many KiB and returns its folder."""

    def mount(size):
        disk = folder / "disk"
        disk.mkdir()
        if os.name != "posix":
            pytest.skip("no way to mount a small file system")
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no right to mount a small file system")
        request.addfinalizer(lambda: subprocess.run(["umount", disk], check=True))
        return disk

    return mount


@pytest.fixture
def unwritable(folder, request):
    """A function that makes a file or folder read-only, for root as well."""

    def protect(path):
        if os.name != "posix":
            pytest.skip("Windows protects no folder this way")
        if os.geteuid() != 0:
            path.chmod(0o555)
            request.addfinalizer(lambda: path.chmod(0o755))
            return
        if not shutil.which("chattr"):
            pytest.skip("root can write everywhere here, and there is no chattr")
        if subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
            pytest.skip("root can write everywhere here, and chattr +i does not work")
        request.addfinalizer(lambda: subprocess.run(["chattr", "-i", path], capture_output=True))

    return protect
