"""A library call changes nobody's process, and never ends it.

Each caller is a process of its own, because a test process that has once used one of torch's two
ways to set TF32 cannot go back to the state before. As a program this file is that caller:

    python tests/test_process_state.py CALLER FILE.json

It prepares its process, calls `train` and `evaluate` in several ways, and writes what came of each
call, and which parts of the process state had changed.
"""

import contextlib
import gc
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.optim.optimizer import register_optimizer_step_post_hook

import image_classification as ic

TINY = {"dataset": "digits", "subset": 100, "epochs": 1, "width": 0.25, "batch_size": 20}

# Environment variables that scikit-learn and torch's compiler set when they are imported.
SET_BY_IMPORTS = ("KMP_", "TORCHINDUCTOR_")

# What each call is to come to: "done" or a class of the error.
CALLS = {
    "train": "done",
    "train_with_an_error": "UserError",
    "train_with_one_ctrl_c": "Stopped",
    "train_with_two_ctrl_c": "KeyboardInterrupt",
    "evaluate": "done",
    "evaluate_with_an_error": "ValueError",
}


# ---- the caller's process ----


def prepare_untouched():
    """A caller that has set nothing."""
    return {"deterministic": True}


def prepare_old_api():
    """A caller with TF32 by the older of torch's ways, who wants deterministic algorithms."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    return {"deterministic": False}


def prepare_new_api():
    """A caller with TF32 by the newer of torch's ways, who wants errors instead of warnings."""
    torch.backends.fp32_precision = "tf32"
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)
    return {"deterministic": True}


CALLERS = {
    "untouched": prepare_untouched,
    "old_api": prepare_old_api,
    "new_api": prepare_new_api,
}
OTHER_CALLERS = [name for name in CALLERS if name != "untouched"]


def precision_flags():
    """Flags of TF32 in torch's two ways, those that can be read: see torch issue 166387."""
    backends = torch.backends
    readers = {
        "cuda.matmul.allow_tf32": lambda: backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": lambda: backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision,
        "fp32_precision": lambda: backends.fp32_precision,
        "cuda.matmul.fp32_precision": lambda: backends.cuda.matmul.fp32_precision,
        "cudnn.fp32_precision": lambda: backends.cudnn.fp32_precision,
        "cudnn.conv.fp32_precision": lambda: backends.cudnn.conv.fp32_precision,
        "cudnn.rnn.fp32_precision": lambda: backends.cudnn.rnn.fp32_precision,
        "mkldnn.fp32_precision": lambda: backends.mkldnn.fp32_precision,
        "mkldnn.matmul.fp32_precision": lambda: backends.mkldnn.matmul.fp32_precision,
        "mkldnn.conv.fp32_precision": lambda: backends.mkldnn.conv.fp32_precision,
    }
    flags = {}
    for name, read in readers.items():
        with contextlib.suppress(RuntimeError, AttributeError):
            flags[name] = read()
    return flags


def process_state():
    """What a library call is to leave as it was, by name."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(SET_BY_IMPORTS)
    }
    state = {
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": str(np.random.get_state()),
        "python random state": random.getstate(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "stdout": id(sys.stdout),
        "stderr": id(sys.stderr),
        "warning filters": [each for each in warnings.filters if is_builtin(each[2])],
        "profile and trace": (sys.getprofile(), sys.gettrace()),
        "excepthook": sys.excepthook,
        "recursion limit": sys.getrecursionlimit(),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "socket timeout": socket.getdefaulttimeout(),
        "root logger": (list(logging.root.handlers), logging.root.level, logging.root.disabled),
        "Pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "matplotlib's backend": matplotlib.get_backend(auto_select=False),
        "matplotlib's settings": matplotlib_settings(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "default device": torch.get_default_device(),
        "umask": umask(),
        "threads of Python": [each for each in threading.enumerate() if not is_of_tqdm(each)],
        "SIGINT": signal.getsignal(signal.SIGINT),
        "SIGTERM": signal.getsignal(signal.SIGTERM),
        "folder": os.getcwd(),
        "environment": environment,
    }
    if torch.cuda.is_available():
        state["cuda random state"] = torch.cuda.get_rng_state().tolist()
        state["cuda stream"] = torch.cuda.current_stream()
    return state | precision_flags()


def is_builtin(category):
    """Whether a category of warnings is no other package's, which its import may filter."""
    return category.__module__ == "builtins"


def is_of_tqdm(thread):
    """Whether it is the thread by which progress bars watch each other."""
    return thread.name == "tqdm_monitor"


def matplotlib_settings():
    """All but the backend, which is chosen when it is read."""
    settings = matplotlib.rcParams
    return {name: settings[name] for name in settings if name != "backend"}


def umask():
    current = os.umask(0)
    os.umask(current)
    return current


def interrupt_training(times):
    """Send SIGINT at the end of the first optimiser step, so many times."""

    def interrupt(optimizer, arguments, options):
        handle.remove()
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    handle = register_optimizer_step_post_hook(interrupt)


class Caller:
    """The calls, by the names in CALLS."""

    def __init__(self, settings):
        self.settings = TINY | settings
        self.data = ic.load_data(ic.Config(**self.settings))
        self.model = ic.build_model(ic.Config(**self.settings), self.data)

    def train(self, **settings):
        ic.train(ic.Config(**self.settings | settings), self.data)

    def train_with_an_error(self):
        self.train(optimizer="sgd", lr=1e30)  # diverges

    def train_with_one_ctrl_c(self):
        interrupt_training(times=1)
        self.train()

    def train_with_two_ctrl_c(self):
        interrupt_training(times=2)
        self.train()

    def evaluate(self):
        ic.evaluate(self.model, *self.data.test, 2)

    def evaluate_with_an_error(self):
        images, labels = self.data.test
        ic.evaluate(self.model, images[:, :2], labels)  # 2 channels of 3


def main(caller, path):
    settings = CALLERS[caller]()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = Caller(settings)
    found = {}
    for seed, name in enumerate(CALLS, start=1000):
        torch.manual_seed(seed)  # or two calls in a row might leave the same state
        before = process_state()
        outcome = ["done"]
        try:
            getattr(calls, name)()
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            outcome = [kind.__name__ for kind in type(error).__mro__]
        after = process_state()
        changed = [part for part in before if before[part] != after.get(part)]
        found[name] = {"outcome": outcome, "changed": changed}
    Path(path).write_text(json.dumps(found))


# ---- the tests ----


@pytest.fixture(
    scope="module",
    params=["untouched", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_CALLERS)],
)
def found(request, tmp_path_factory):
    """What came of each call in the process of a caller."""
    folder = tmp_path_factory.mktemp(request.param)
    program_folder = str(Path(ic.__file__).parent)
    paths = [program_folder, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, request.param, "found.json"]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert (folder / "found.json").exists(), f"the process has ended:\n{process.stderr}"
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_call_comes_back_and_leaves_the_process_as_it_was(found, call):
    assert CALLS[call] in found[call]["outcome"]
    assert found[call]["changed"] == []


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_the_mode_of_the_network(training):
    config = ic.Config(**TINY)
    data = ic.load_data(config)
    model = ic.build_model(config, data).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ic.evaluate(model, *data.test)
    assert model.training == training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


if __name__ == "__main__":
    main(*sys.argv[1:])
