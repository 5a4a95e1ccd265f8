"""Standard output and error: where there are none, and where nobody reads them any more."""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import TextIO

# errno of a pipe whose reader has gone; on Windows it is EINVAL
CLOSED_PIPE = {errno.EPIPE, errno.EINVAL} if os.name == "nt" else {errno.EPIPE}


class Nowhere(io.TextIOBase):
    """A text file that forgets what is written to it."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def present() -> Iterator[None]:
    """Within it there is something to print to; afterwards sys.stdout and sys.stderr are as before.

    Python sets them to None where there is no console (pythonw), or where they were closed (2>&-).
    Progress bars, for example, fail then.
    """
    with contextlib.ExitStack() as stack:
        if sys.stdout is None:
            stack.enter_context(contextlib.redirect_stdout(Nowhere()))
        if sys.stderr is None:
            stack.enter_context(contextlib.redirect_stderr(Nowhere()))
        yield


def open_missing() -> None:
    """The same for good, and for libraries in C++ too; for programs, not for library functions."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # the next file to be opened would get this number, and warnings of libraries in it
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
    if sys.stdout is None:
        sys.stdout = Nowhere()
    if sys.stderr is None:
        sys.stderr = Nowhere()


def drop_unwritable() -> set[int]:
    """Print nothing more to where nothing can be printed; returns the errno of each such place.

    It may be a pipe that was closed (| head), or a full disk. Otherwise Python would try again at
    its end to print what is left, and complain. For programs, not for library functions.
    """
    found = set()
    for stream in (sys.stdout, sys.stderr):
        failed = _errno_of_writing(stream)
        if failed is None:
            continue
        found.add(failed)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return found


def _errno_of_writing(stream: TextIO) -> int | None:
    """The errno if what is left to write cannot be written, or a pipe has no reader; else None."""
    try:
        stream.flush()
        descriptor = stream.fileno()
    except ValueError:  # it is in memory, which is an io.UnsupportedOperation, or was closed
        return None
    except OSError as error:
        return error.errno
    if not hasattr(select, "poll"):  # Windows
        return None
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    is_broken = any(event & select.POLLERR for _, event in poll.poll(0))
    return errno.EPIPE if is_broken else None
