"""How an error becomes one line: by its type, its errno and its place, not by words in its text."""

import errno
import subprocess
import sys
import urllib.error

import pytest
import torch
from conftest import REPOSITORY

from classifier.errors import (
    INSTALL,
    REINSTALL_TORCH,
    DatasetUnavailable,
    UserError,
    format_error,
    is_out_of_memory,
)

MISFIT = "raise RuntimeError('operator torchvision::nms does not exist')"


def raised(error):
    """An error with its traceback."""
    try:
        raise error
    except Exception as caught:
        return caught


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_is_full(number):
    line = format_error(OSError(number, "no room there", "out of memory/torchvision.pth"))
    assert "out of memory/torchvision.pth: no room there" in line and "make room" in line
    assert "permissions" not in line and REINSTALL_TORCH not in line


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_place_without_the_right_to_write(number):
    line = format_error(OSError(number, "not there", "a.pth"))
    assert "a.pth: not there" in line and "permissions" in line and "room" not in line


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        urllib.error.URLError(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")),
        TimeoutError("timed out"),
        OSError("libcudnn.so: cannot open shared object file"),
        IsADirectoryError(errno.EISDIR, "Is a directory", "a folder"),
        OSError(errno.EIO, "Input/output error", "a.png"),
    ],
)
def test_other_errors_of_the_system_are_not_blamed_on_the_disk(error):
    line = format_error(error)
    assert (error.strerror or str(error)) in line
    assert "room" not in line and "permissions" not in line


def test_missing_file_is_named():
    assert format_error(FileNotFoundError(2, "No such file", "a.pth")).startswith("a.pth: ")
    assert format_error(FileNotFoundError("nothing")) == "nothing"


# ---- torchvision ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("/home/torchvision/a.pth: the shapes do not match"),
        ValueError("torchvision"),
        RuntimeError("operator torchvision::nms does not exist"),  # said by somebody else
        UserError("/torchvision/photos is empty"),
        FileNotFoundError(2, "No such file", "/torchvision/a.pth"),
    ],
)
def test_torchvision_in_a_text_says_nothing_of_torchvision(error):
    assert REINSTALL_TORCH not in format_error(raised(error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        (MISFIT, REINSTALL_TORCH),
        ("from torch import nothing_like_this", REINSTALL_TORCH),
        ("import nothing_like_this", INSTALL),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_torchvision_that_cannot_be_imported(folder, source, remedy, wrapped):
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import ops\n")
    (package / "ops.py").write_text(source)
    code = f"""
import sys
from classifier.errors import UserError, format_error
try:
    try:
        import torchvision
    except Exception as error:
        if not {wrapped}:
            raise
        raise UserError("the data set: " + str(error)) from error
except Exception as error:
    print(format_error(error))
"""
    path = [str(folder), str(REPOSITORY)]
    program = f"import sys; sys.path[:0] = {path}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    is_lost = wrapped and remedy == INSTALL  # the line is that of the one who wrapped it
    assert (remedy in done.stdout) != is_lost, done.stdout
    assert (REINSTALL_TORCH in done.stdout) == (remedy == REINSTALL_TORCH)


# ---- memory --------------------------------------------------------------------------------------


def too_large_for_the_cpu():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


def test_memory_of_the_machine():
    for error in (too_large_for_the_cpu(), MemoryError()):
        assert is_out_of_memory(error)
        line = format_error(error)
        assert "memory" in line and "--batch-size" in line and "--device" not in line
        line = format_error(error, is_tool=True)  # tools have neither option
        assert "memory" in line and "--" not in line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words"),
        RuntimeError("MPS backend out of memory (MPS allocated: 3 GB). Tried to allocate 1 GB"),
    ],
)
def test_memory_of_a_device(error):
    assert is_out_of_memory(error)
    line = format_error(error)
    assert "out of memory" in line and "--batch-size" in line and "--device cpu" in line
    assert "Tried" not in line
    line = format_error(error, is_tool=True)
    assert "out of memory" in line and "--batch-size" not in line and "--device cpu" in line


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the shelf is out of memory cards"),
        UserError("/out of memory/photos is empty"),
        RuntimeError("cannot read /out of memory/a.pth"),
        OSError(errno.EIO, "Input/output error", "out of memory"),
        DatasetUnavailable("out of memory"),
    ],
)
def test_other_errors_are_not_blamed_on_memory(error):
    assert not is_out_of_memory(error)
    assert "--batch-size" not in format_error(error)
