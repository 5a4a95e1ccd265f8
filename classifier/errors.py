"""What a user can fix, and how an error becomes one line on the screen."""

import errno
import sys
import traceback
from pathlib import Path

from classifier.files import NOT_WRITABLE

INSTALL = "install what this program needs with: pip install -r requirements.txt"
INSTALL_EXTRAS = "install what the tools need with: pip install -r requirements-extras.txt"
REINSTALL_TORCH = (
    "torchvision cannot be imported; install it together with the torch that it was built for: "
    "pip install --force-reinstall torch torchvision"
)

MAX_LENGTH = 500  # characters of an error of another program, which may list all its tensors
# errno of a disk that is full, or a user's share of it, which Windows does not know
NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, and hipErrorOutOfMemory


class UserError(Exception):
    """An error the user can fix, in one line: what is wrong and how to fix it (exit status 1)."""


class UsageError(UserError):
    """An invalid setting (exit status 2)."""


class DatasetUnavailable(UserError):
    """A data set that is not on disk, and no source can be reached."""


class Diverged(UserError):
    """A loss, or a weight, that is no longer finite."""


class Stopped(Exception):
    """A run that Ctrl-C or SIGTERM ended after its state was saved.

    Attributes:
        signum: number of the signal.
        run: the run folder, or None where the caller knows it.
    """

    def __init__(self, signum: int, run: Path | None = None):
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum
        self.run = run


def format_error(error: Exception, is_tool: bool = False) -> str:
    """One line that says what is wrong and what to do.

    An error is judged by its type, its errno and where it comes from: words in its text may be part
    of a path.

    is_tool: whether a tool beside image_classification.py has failed, which has other options and
    needs more packages.
    """
    text = " ".join(str(error).split())
    if _failed_to_import("torchvision", error):
        return f"{text}: {REINSTALL_TORCH}"
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError):
        return _format_os_error(error, text)
    if isinstance(error, ModuleNotFoundError):
        return f"{text}: {INSTALL_EXTRAS if is_tool else INSTALL}"
    if is_out_of_memory(error):
        return _format_out_of_memory(error, text, is_tool)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        first_line = str(error).partition("\n")[0]
        return f"torch.compile fails here: {first_line}: leave out --compile"
    return f"{repr(error)[:MAX_LENGTH]} (--debug shows where)"


def _failed_to_import(package: str, error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, arose while a package was imported.

    Not if the package lacks another one: then that one has to be installed.
    """
    cause: BaseException | None = error
    while cause is not None:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            module = frame.f_globals.get("__name__", "")
            is_imported = frame.f_code.co_name == "<module>"
            if is_imported and module.partition(".")[0] == package:
                return not isinstance(cause, ModuleNotFoundError)
        cause = cause.__cause__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or of the device was too small.

    torch has a type for this error on GPUs, but CPUs and MPS raise a plain RuntimeError: nothing
    but its text tells it from others.
    """
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # only torch raises its errors, and it is slow to import
    if torch is None:
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY
    return type(error) is RuntimeError and (
        _is_mps_out_of_memory(error) or _is_cpu_out_of_memory(error)
    )


def _is_mps_out_of_memory(error: BaseException) -> bool:
    return str(error).startswith("MPS backend out of memory")


def _is_cpu_out_of_memory(error: BaseException) -> bool:
    return "DefaultCPUAllocator: " in str(error)


def _format_out_of_memory(error: Exception, text: str, is_tool: bool) -> str:
    """How much memory there is on a device, and what to try."""
    if isinstance(error, MemoryError) or _is_cpu_out_of_memory(error):
        advice = "try a smaller --batch-size or --image-size"
        if is_tool:
            advice = "close other programs, or use a machine with more memory"
        return f"the memory of this machine is too small: {advice}"
    first_sentence = text.partition(". ")[0]
    advice = "try --device cpu" if is_tool else "try a smaller --batch-size, or --device cpu"
    return f"{first_sentence}: {advice}"


def _format_os_error(error: OSError, text: str) -> str:
    """The file, what is wrong with it, and what to do where its errno tells."""
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: there is no such file or folder"
    reason = error.strerror or text
    named = f"{error.filename}: {reason}" if error.filename else reason
    if error.errno in NO_SPACE:
        return f"{named}: make room, or use another place"
    if error.errno in NOT_WRITABLE:
        return f"{named}: change its permissions, or use another place"
    return named
