"""Devices, precision, and a process that is left as it was found."""

import os
import sys
import warnings

import pytest
import torch

from classifier import devices
from classifier.errors import UserError

CPU = torch.device("cpu")


# ---- the device ----


def test_auto_is_the_accelerator_or_the_cpu():
    device = devices.choose_device("auto")
    best = torch.accelerator.current_accelerator(check_available=True)
    assert device.type == (best.type if best else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda", "auto:1"])
def test_missing_device_is_named(name):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(UserError, match=f"--device {name} "):
        devices.choose_device(name)


def test_unknown_device_lists_the_choices():
    with pytest.raises(UserError, match="auto, cpu, cuda, cuda:N or mps"):
        devices.choose_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_cpu_only_torch_beside_an_nvidia_driver_is_explained(folder, monkeypatch, capsys):
    tool = folder / ("nvidia-smi.bat" if sys.platform == "win32" else "nvidia-smi")
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    reinstall = "pip install --force-reinstall torch torchvision --index-url "
    assert devices.choose_device("cpu") == CPU
    with pytest.raises(UserError) as caught:  # which an NVIDIA driver has nothing to do with
        devices.choose_device("xpu")
    assert reinstall not in str(caught.value)
    assert capsys.readouterr().out == ""
    devices.choose_device("auto")
    assert reinstall in capsys.readouterr().out
    with pytest.raises(UserError, match=f"--device cuda .*{reinstall}"):
        devices.choose_device("cuda")


@pytest.mark.parametrize(
    ("feature", "expected"),
    [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)],
)
def test_precision_follows_the_cpu(monkeypatch, feature, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True}, raising=False)
    assert devices.choose_precision("auto", CPU) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_precision_follows_the_gpu(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert devices.choose_precision("auto", torch.device("cuda")) == expected


def test_precision_that_is_asked_for():
    assert devices.choose_precision("fp16", CPU) == torch.float16
    assert devices.choose_precision("auto", torch.device("mps")) == torch.float32


def test_hardware_name():
    assert devices.hardware_name(CPU).endswith(f", {torch.get_num_threads()} threads")
    assert devices.hardware_name(torch.device("mps")).endswith(" mps")


def test_environment_is_plain_text():
    found = devices.environment(CPU, torch.bfloat16, 2)
    assert found["precision"] == "torch.bfloat16"
    assert found["hardware"] == devices.hardware_name(CPU)
    assert all(type(value) is str for value in found.values())  # torch.load reads no more


def test_hardware_name_without_a_name(monkeypatch):
    def unreadable(self):
        raise OSError("no such file")

    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(devices.Path, "read_text", unreadable)
    monkeypatch.setattr(devices.platform, "processor", lambda: "")
    monkeypatch.setattr(devices.platform, "machine", lambda: "riscv64")
    assert devices.hardware_name(CPU).startswith("riscv64, ")


@pytest.mark.parametrize("call", [devices.trim_free_memory, devices.keep_freed_memory])
@pytest.mark.parametrize("error", [OSError, TypeError])
def test_memory_settings_need_glibc(monkeypatch, call, error):
    def no_library(name):
        raise error("none here")

    monkeypatch.setattr(devices.ctypes, "CDLL", no_library)
    call()
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: object())  # without malloc_trim
    call()


def test_freed_memory_is_kept(monkeypatch):
    calls = []

    class Library:
        def malloc_trim(self, pad):
            calls.append(("malloc_trim", pad))

        def mallopt(self, parameter, value):
            calls.append(("mallopt", parameter, value))

    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Library())
    devices.trim_free_memory()
    assert calls == [("malloc_trim", 0)]
    devices.keep_freed_memory()
    assert calls[2:] == [("mallopt", -4, 0), ("mallopt", -1, -1)]


# ---- the state of the process ----

NEWER = [
    "fp32_precision",
    "cudnn.fp32_precision",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
    "cuda.matmul.fp32_precision",
    "mkldnn.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "mkldnn.rnn.fp32_precision",
    "mkldnn.matmul.fp32_precision",
]
OLDER = ["cudnn.allow_tf32", "cuda.matmul.allow_tf32"]
SWITCHES = [name for name in NEWER if name.count(".") == 2]

# What a caller may have done before. The mixed ones use both interfaces, or let operators differ,
# so that the older one cannot be read.
OLDER_CALLERS = {
    "untouched": "",
    "older, all exact": "cudnn.allow_tf32 = False; torch.set_float32_matmul_precision('highest')",
    "older, tf32": "cudnn.allow_tf32 = True; cuda.matmul.allow_tf32 = True",
    "older, high": "torch.set_float32_matmul_precision('high')",
    "older, medium": "torch.set_float32_matmul_precision('medium')",
}
NEWER_CALLERS = {
    "newer, all exact": "backends.fp32_precision = cudnn.conv.fp32_precision = "
    "cudnn.rnn.fp32_precision = cuda.matmul.fp32_precision = 'ieee'",
    "newer, exact convolutions": "cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = 'ieee'",
    "newer, tf32 for all": "backends.fp32_precision = 'tf32'",
    "newer, tf32 on CUDA": "cudnn.fp32_precision = 'tf32'",
    "newer, tf32 for each": "cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "
    "cuda.matmul.fp32_precision = 'tf32'",
    "newer, medium": "cuda.matmul.fp32_precision = 'tf32'; mkldnn.matmul.fp32_precision = 'bf16'",
}
MIXED_CALLERS = {
    "mixed": "cudnn.allow_tf32 = True; cudnn.conv.fp32_precision = 'ieee'",
    "newer, bf16 on CPUs": "mkldnn.fp32_precision = 'bf16'",
    "newer, convolutions alone": "cudnn.conv.fp32_precision = 'ieee'",
}
CALLERS = OLDER_CALLERS | NEWER_CALLERS | MIXED_CALLERS


def run_as_caller(code):
    backends = torch.backends
    names = {name: getattr(backends, name) for name in ("cudnn", "cuda", "mkldnn")}
    exec(code, names | {"torch": torch, "backends": backends})


def read(names):
    """The settings of these names; "unreadable" where torch raises."""
    found = {}
    for name in names:
        *path, last = name.split(".")
        owner = torch.backends
        for part in path:
            owner = getattr(owner, part)
        try:
            found[name] = getattr(owner, last)
        except RuntimeError:
            found[name] = "unreadable"
    return found


def read_older():
    found = read(OLDER)
    try:
        found["matmul"] = torch.get_float32_matmul_precision()
    except RuntimeError:
        found["matmul"] = "unreadable"
    return found


@pytest.fixture
def caller(monkeypatch):
    """A function that sets what a caller of that name does; the tests after this one start anew."""
    run_as_caller("backends.fp32_precision = cudnn.fp32_precision = 'none'")
    run_as_caller("mkldnn.fp32_precision = mkldnn.conv.fp32_precision = 'none'")
    run_as_caller("mkldnn.rnn.fp32_precision = 'none'")
    run_as_caller("cudnn.allow_tf32 = True; torch.set_float32_matmul_precision('highest')")
    start = read(NEWER), read_older()
    yield lambda name: run_as_caller(CALLERS[name])
    for name in ("", "cudnn.", "mkldnn.", "mkldnn.conv.", "mkldnn.rnn."):
        run_as_caller(f"torch.backends.{name}fp32_precision = 'none'")
    run_as_caller("cudnn.allow_tf32 = True; torch.set_float32_matmul_precision('highest')")
    assert (read(NEWER), read_older()) == start


def contexts():
    return {
        "exact_fp32": devices.exact_fp32(),
        "training_process": devices.training_process(CPU, deterministic=False),
    }


def enter(context, fails):
    """Enter the context of that name, and leave it by an exception if it `fails`; what it saw."""
    try:
        with contexts()[context]:
            inside = read(SWITCHES), read_older()
            if fails:
                raise KeyError("a failure")
    except KeyError:
        assert fails
    return inside


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("context", list(contexts()))
@pytest.mark.parametrize("name", list(CALLERS))
def test_fp32_settings_are_exact_inside_and_restored(caller, name, context, fails):
    caller(name)
    newer, older = read(NEWER), read_older()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        switches, older_inside = enter(context, fails)
    assert set(switches.values()) <= {"ieee", "none"}
    assert older_inside == {
        "cudnn.allow_tf32": False,
        "cuda.matmul.allow_tf32": False,
        "matmul": "highest",
    }
    assert read(NEWER) == newer
    older_after = read_older()
    for setting, value in older.items():
        if value != "unreadable":
            assert older_after[setting] == value, setting
    if name not in MIXED_CALLERS:
        assert "unreadable" not in older_after.values()


@pytest.mark.parametrize("name", list(CALLERS))
def test_caller_can_go_on_with_either_interface(caller, name):
    caller(name)
    enter("exact_fp32", fails=False)
    run_as_caller("cudnn.allow_tf32 = False; torch.set_float32_matmul_precision('highest')")
    run_as_caller("cudnn.allow_tf32 = True; cuda.matmul.allow_tf32 = True")
    for switch in ("cudnn.conv", "cudnn.rnn", "cuda.matmul"):
        run_as_caller(f"{switch}.fp32_precision = 'ieee'")
        assert read([f"{switch}.fp32_precision"])[f"{switch}.fp32_precision"] == "ieee"


@pytest.mark.parametrize("parent", ["backends", "cudnn"])
def test_operators_still_follow_their_parent(caller, parent):
    """A caller who sets the parent after our context reaches the operators, as before it."""
    caller("older, all exact")
    torch.backends.cuda.matmul.fp32_precision = "none"
    run_as_caller(f"{parent}.fp32_precision = 'tf32'")
    operators = [name for name in SWITCHES if name.startswith("cu")]
    assert set(read(operators).values()) == {"tf32"}
    enter("exact_fp32", fails=False)
    run_as_caller(f"{parent}.fp32_precision = 'ieee'")
    assert set(read(operators).values()) == {"ieee"}


def test_contexts_nest(caller):
    caller("older, tf32")
    newer, older = read(NEWER), read_older()
    with devices.training_process(CPU, deterministic=False):
        inside = read(NEWER), read_older()
        with devices.exact_fp32():
            pass
        assert (read(NEWER), read_older()) == inside
    assert (read(NEWER), read_older()) == (newer, older)


@pytest.fixture
def determinism():
    """Restores the setting after the test."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def read_determinism():
    enabled = torch.are_deterministic_algorithms_enabled()
    return enabled, torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_determinism_is_restored(determinism, monkeypatch, before, asked, fails):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        with devices.training_process(CPU, deterministic=asked):
            enabled, warn_only = read_determinism()
            assert enabled == (asked or before[0])  # what the caller wants stays
            if before[0]:
                assert warn_only == before[1]  # nothing between an error and a warning
            assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == enabled
            if fails:
                raise KeyError("a failure")
    except KeyError:
        pass
    assert read_determinism() == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_workspace_of_the_caller_stays(determinism, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with devices.training_process(CPU, deterministic=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_random_state_and_threads_are_restored(fails):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        with devices.training_process(CPU, deterministic=False):
            assert torch.equal(torch.get_rng_state(), state)  # it changes only when it is used
            torch.manual_seed(7)
            torch.rand(3)
            torch.set_num_threads(threads + 1)
            if fails:
                raise KeyError("a failure")
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_cuda_stream_and_random_state_are_restored(fails):
    device = torch.device("cuda:0")
    state, stream = torch.cuda.get_rng_state(device), torch.cuda.current_stream()
    numbers = torch.arange(10.0, device=device)
    try:
        with devices.training_process(device, deterministic=False):
            assert torch.cuda.current_stream() != torch.cuda.default_stream()
            torch.manual_seed(7)
            torch.rand(3, device=device)
            doubled = numbers * 2
            if fails:
                raise KeyError("a failure")
    except KeyError:
        pass
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    assert doubled.sum().item() == 90


def test_streams_wait_for_each_other(monkeypatch):
    """On entry the side stream waits for the caller's, on exit the caller's for the side stream."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            events.append("enter")

        def __exit__(self, *_):
            events.append("exit")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("caller"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    with pytest.raises(KeyError), devices._side_stream(torch.device("cuda")):
        events.append("work")
        raise KeyError("a failure")
    assert events == ["side waits for caller", "enter", "work", "caller waits for side", "exit"]
