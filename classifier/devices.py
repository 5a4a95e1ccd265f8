"""The device to train on, and the state of the process while it trains or evaluates."""

import contextlib
import ctypes
import gc
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from classifier import lazy_compiler
from classifier.errors import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REINSTALL_FOR_NVIDIA = (
    "pip install --force-reinstall torch torchvision "
    "--index-url https://download.pytorch.org/whl/cu130"
)
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it, cuBLAS is not deterministic

# Parameters of glibc's mallopt.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


# ---- the device and what it computes in ----


def choose_device(name: str) -> torch.device:
    """The device that --device names; "auto": the accelerator of this machine, else the CPU.

    Raises UserError if there is no such device.
    """
    driver_problem = _nvidia_problem()
    if name == "auto":
        if driver_problem:
            print(f"note: {driver_problem}")
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        wanted = accelerator or torch.device("cpu")
        remedy = "choose another, such as --device cpu"
    else:
        wanted = _parse_device(name)
        remedy = "leave it out to use the best device"
    try:
        # allocating adds the index, and finds out whether the device works
        return torch.empty(0, device=wanted).device
    except Exception as error:  # each kind of device raises its own
        reason = str(error).partition("\n")[0]
        if wanted.type == "cuda" and driver_problem:
            reason = driver_problem
        raise UserError(f"--device {name} is not available: {reason}; {remedy}") from None


def _parse_device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:  # whose text lists devices that this program does not know
        raise UserError(
            f"--device {name} is no device: choose auto, cpu, cuda, cuda:N or mps"
        ) from None


def _nvidia_problem() -> str:
    """What to do if NVIDIA's tools are there, but this torch was built without CUDA; else ""."""
    built_for_gpu = torch.version.cuda or torch.version.hip
    if built_for_gpu or not shutil.which("nvidia-smi"):
        return ""
    return (
        f"this torch {torch.__version__} was built without CUDA; for an NVIDIA GPU install one "
        f"that has it: {REINSTALL_FOR_NVIDIA}"
    )


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: that of --precision, or with "auto" one that is fast here."""
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        # a T4 emulates bf16, slowly
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def hardware_name(device: torch.device) -> str:
    """The model of the GPU, or of the CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = _cpu_name()
    if device.type == "cpu":
        return f"{name}, {torch.get_num_threads()} threads"
    return f"{name} {device.type}"


def environment(device: torch.device, dtype: torch.dtype, world_size: int) -> dict[str, str]:
    """What has to be the same for a resumed run to repeat an unbroken one bit for bit."""
    return {
        "torch": str(torch.__version__),
        "hardware": hardware_name(device),
        "precision": str(dtype),
        "number of processes": str(world_size),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError, IndexError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.check_output(command, text=True).strip()
        after_key = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2]
        return after_key.splitlines()[0]
    return platform.processor() or platform.machine()


# ---- speed of the process ----


def tune_process(device: torch.device) -> None:
    """Make this process train faster in ways that cannot be undone: for programs only."""
    lazy_compiler.spare_optimizers()
    gc.freeze()  # what is imported stays: the garbage collector takes 0.3 s to look through it
    if device.type == "cpu":  # not before the data is read, which is faster without it
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors instead of returning it to the system.

    To return it and fault it in again took a third of a training step. This cannot be undone, so
    only a program calls it, not a library function.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)  # what is free so far
        libc.mallopt(M_MMAP_MAX, 0)  # take large blocks from the heap as well,
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # and never return the end of the heap


def trim_free_memory() -> None:
    """Return what is free now to the system, between two phases that use memory differently."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc, the only one that has malloc_trim.

    In others mallopt is missing, or numbers its parameters differently.
    """
    with contextlib.suppress(OSError, TypeError):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            return libc
    return None


# ---- state of the process that training changes, and restores ----


@contextlib.contextmanager
def training_process(device: torch.device, deterministic: bool) -> Iterator[None]:
    """Prepare this process for training on `device`; afterwards all is as it was before.

    Inside, fp32 means fp32 (see `exact_fp32`), torch uses deterministic algorithms if that is asked
    for, here or by the caller, and CUDA work runs on a side stream. Afterwards, also after an
    exception, these and the random states and the number of threads are restored. Enter it before
    the first random number is drawn.
    """
    with (
        _restore_num_threads(),
        _restore_random_states(device),
        exact_fp32(),
        _deterministic_algorithms(deterministic),
        _side_stream(device),
    ):
        yield


@contextlib.contextmanager
def _restore_num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextlib.contextmanager
def _restore_random_states(device: torch.device) -> Iterator[None]:
    """Restore torch's random states: `torch.manual_seed` changes those of all devices."""
    cpu_state = torch.get_rng_state()
    has_cuda = device.type == "cuda" or torch.cuda.is_initialized()
    cuda_states = torch.cuda.get_rng_state_all() if has_cuda else []
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu_state)
        torch.cuda.set_rng_state_all(cuda_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


@contextlib.contextmanager
def _deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Use deterministic algorithms, with a warning for operations that have none.

    enabled: False: only if the caller of this program uses them; then as the caller does.
    """
    enabled_before = torch.are_deterministic_algorithms_enabled()
    warn_only_before = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace_before = os.environ.get(CUBLAS_WORKSPACE)
    sets_workspace = workspace_before is None and (enabled or enabled_before)
    if sets_workspace:
        os.environ[CUBLAS_WORKSPACE] = ":4096:8"
    if enabled and not enabled_before:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        if enabled and not enabled_before:
            torch.use_deterministic_algorithms(False, warn_only=warn_only_before)
        if sets_workspace:
            os.environ.pop(CUBLAS_WORKSPACE, None)


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Run CUDA work on a stream of its own: on the default stream no CUDA graph can be recorded."""
    if device.type != "cuda":
        yield
        return
    stream_before = torch.cuda.current_stream(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(stream_before)
    with torch.cuda.stream(stream):
        try:
            yield
        finally:
            stream_before.wait_stream(stream)


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Compute fp32 operations in fp32, not in TF32 or bf16, and restore the settings afterwards.

    torch has two interfaces to the same settings, which disagree once a program has used both, and
    then reading the older one raises (pytorch/pytorch issues 166387, 179445). So both are set here,
    the older one first, because to set it changes the newer one. Both can be read inside; after it,
    the newer one has the values it had, and so has the older one. If the older one could not be
    read before, because the caller used the newer one, it now agrees with it.
    """
    switches = _fp32_switches()
    newer_before = [switch.fp32_precision for switch, _ in switches]
    conv_before = newer_before[0]
    matmul_before = _float32_matmul_precision()
    _set_older_fp32_settings(conv="ieee", matmul="highest")
    for switch, _ in switches:
        if switch.fp32_precision not in ("ieee", "none"):
            switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        _set_older_fp32_settings(conv=conv_before, matmul=matmul_before)
        for (switch, parent), value in zip(switches, newer_before, strict=True):
            # a value like the parent's was most likely the parent's: with "none" it stays so
            switch.fp32_precision = "none" if value == parent.fp32_precision else value


def _fp32_switches() -> list[tuple[Any, Any]]:
    """The objects whose `fp32_precision` says how an operator computes fp32, with their parents.

    The value is "ieee" (exact), "tf32", "bf16" or "none": an operator with "none" follows its
    parent, and the parent follows torch.backends.
    """
    cuda: Any = torch.backends.cudnn
    cpu: Any = torch.backends.mkldnn
    return [
        (cuda.conv, cuda),
        (cuda.rnn, cuda),
        (torch.backends.cuda.matmul, cuda),
        (cpu.conv, cpu),
        (cpu.rnn, cpu),
        (cpu.matmul, cpu),
    ]


def _set_older_fp32_settings(conv: str, matmul: str) -> None:
    """Set the older interface; conv: a value of the newer one, matmul: one of the older."""
    torch.backends.cudnn.allow_tf32 = conv == "tf32"
    torch.set_float32_matmul_precision(matmul)


def _float32_matmul_precision() -> str:
    """What torch.get_float32_matmul_precision() returns, or should return where it raises."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        pass
    if torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "highest"
    cpu: Any = torch.backends.mkldnn
    return "medium" if cpu.matmul.fp32_precision == "bf16" else "high"
