"""What a user can fix, and how an error becomes one line on the screen."""

from pathlib import Path

INSTALL = "install what this program needs with: pip install -r requirements.txt"
INSTALL_EXTRAS = "install what the tools need with: pip install -r requirements-extras.txt"
REINSTALL_TORCH = (
    "torch and torchvision do not fit each other: pip install --force-reinstall torch torchvision"
)

MAX_LENGTH = 500  # characters of an error of another program, which may list all its tensors


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


def format_error(error: Exception, install: str = INSTALL) -> str:
    """One line that says what is wrong and what to do.

    install: what to do about a missing package.
    """
    text = " ".join(str(error).split())
    if "operator torchvision::" in text:
        return f"{text}: {REINSTALL_TORCH}"
    if isinstance(error, UserError):
        return text
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: there is no such file or folder"
    if isinstance(error, OSError):
        return _format_os_error(error, text)
    if isinstance(error, ModuleNotFoundError):
        return f"{text}: {install}"
    if "out of memory" in text:
        first_sentence = text.partition(". ")[0]
        return f"{first_sentence}: try a smaller --batch-size, or --device cpu"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        first_line = str(error).partition("\n")[0]
        return f"--compile does not work here: {first_line}: leave it out"
    if "torchvision" in text:
        return f"{text}: {REINSTALL_TORCH}"
    return f"{repr(error)[:MAX_LENGTH]} (--debug shows where)"


def _format_os_error(error: OSError, text: str) -> str:
    """The file, what is wrong with it, and what to check on the disk."""
    reason = error.strerror or text
    named = f"{error.filename}: {reason}" if error.filename else reason
    if isinstance(error, (FileExistsError, IsADirectoryError, NotADirectoryError)):
        return named
    return f"{named}: is there space, and the right to write?"
