"""Programs that start at once: forked from a process that has imported what is slow to import.

A test that starts a program spends most of its time on importing torch. On Linux, the first
process of pytest starts a server, which imports the packages that programs use, but nothing of this
project, and forks a process for each program. That process has streams, signals, environment and
exit status of its own, and reads the program's source as Python does. Elsewhere, and for what a
fork cannot show (other environment variables, a launcher), programs are started as usual.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from importlib.machinery import SourceFileLoader
from pathlib import Path

# Environment variables: the path of the server's socket, and the variables that the server has.
ADDRESS = "TESTS_FORK_SERVER"
ENVIRONMENT = "TESTS_FORK_SERVER_ENVIRONMENT"
NO_PICTURES = "TESTS_FORK_SERVER_NO_PICTURES"  # set: programs that the server starts draw nothing
# Beginnings of the variables that torchrun gives its processes.
OF_TORCHRUN = ("TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_", "GROUP_", "WORLD_SIZE")
PRELOADED = [
    "torch",
    "torchvision.transforms.v2",
    "matplotlib.pyplot",
    "sklearn.datasets",
    "sklearn.metrics",
    "sklearn.model_selection",
    "tensorboard.summary.writer.event_file_writer",
    "torch.utils.tensorboard",
    "torchsummary",
    "tqdm",
    "PIL.Image",
]


# ---- In the tests --------------------------------------------------------------------------------


def start(repository):
    """Start the server, which ends with this process; does nothing where it cannot work.

    repository: what is in PYTHONPATH of the programs.
    """
    if sys.platform != "linux":
        return
    address = Path(tempfile.mkdtemp(prefix="tests-")) / "socket"
    environment = os.environ | {"PYTHONPATH": str(repository)}
    server = subprocess.Popen(
        [sys.executable, __file__, address],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,  # streams remember whether they can seek, as pipes cannot
        stderr=subprocess.PIPE,
    )

    def stop():
        server.stdin.close()
        server.wait()
        shutil.rmtree(address.parent)

    atexit.register(stop)
    if not server.stdout.readline():  # it does not listen
        return
    os.environ[ADDRESS] = str(address)
    os.environ[ENVIRONMENT] = json.dumps(variables_that_matter(environment))


def variables_that_matter(environment):
    """Those environment variables that packages may read when they are imported."""
    other = ("PYTEST_", ADDRESS, "COLUMNS", "LINES", *OF_TORCHRUN)
    return {name: value for name, value in environment.items() if not name.startswith(other)}


def can_start(environment):
    """Whether the server can start a program that has these environment variables."""
    if ADDRESS not in os.environ:
        return False
    return variables_that_matter(environment) == json.loads(os.environ[ENVIRONMENT])


class Forked:
    """A program in a process of its own, with what tests use of subprocess.Popen.

    Attributes:
        pid: of the process.
        returncode: None while it runs.
        stdout, stderr: what it prints, as text files.
    """

    def __init__(self, arguments, folder, source, environment):
        """Start it.

        arguments: sys.argv of the program.
        source: its Python code; None: it is the file named by the first argument.
        environment: its environment variables.
        """
        request = {
            "argv": arguments,
            "cwd": str(folder),
            "source": source,
            "env": environment,
        }
        self.args = arguments
        self.returncode = None
        out, out_of_program = os.pipe()
        err, err_of_program = os.pipe()
        self.stdout = open(out, encoding="utf-8")  # noqa: SIM115
        self.stderr = open(err, encoding="utf-8")  # noqa: SIM115
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(os.environ[ADDRESS])
        with open(os.devnull) as nothing:
            files = [nothing.fileno(), out_of_program, err_of_program]
            socket.send_fds(self._server, [b" "], files)
        os.close(out_of_program)
        os.close(err_of_program)
        self._server.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._server.makefile("rb")
        self.pid = int(self._answers.readline())

    def poll(self):
        """The exit status, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        """The exit status, when it has ended; raises subprocess.TimeoutExpired."""
        if self.returncode is not None:
            return self.returncode
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.returncode = int(self._answers.readline())
        self._server.close()
        return self.returncode

    def communicate(self, timeout=None):
        """What it prints until its end, (standard output, standard error)."""
        texts = {}

        def read(name):
            texts[name] = getattr(self, name).read()

        readers = [threading.Thread(target=read, args=[name]) for name in ("stdout", "stderr")]
        for reader in readers:
            reader.daemon = True
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():  # a process that it has left behind can still print
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.stdout.close()
        self.stderr.close()
        return texts["stdout"], texts["stderr"]

    def send_signal(self, signum):
        """Send it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self):
        """Send it SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)


# ---- In the server -------------------------------------------------------------------------------


def serve(address):
    """Fork a process for each request, until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes of requests
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    os.write(1, b"\n")
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    while True:
        ready = [key.fileobj for key, _ in selector.select()]
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        for name in PRELOADED:
            importlib.import_module(name)
        gc.freeze()  # in the programs, the garbage collector passes over what is there so far
        if os.fork() == 0:
            listener.close()
            selector.close()
            supervise(connection)
            os._exit(0)
        connection.close()


def supervise(connection):
    """Fork the process of one program, and tell its number and later its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as lines:
        request = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        status = 1
        try:
            status = run(**request)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    for file in files:
        os.close(file)
    connection.sendall(b"%d\n" % pid)
    _, status = os.waitpid(pid, 0)
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def run(argv, cwd, source, env):
    """Run a program as Python does, and return its exit status."""
    if NO_PICTURES in env:
        from blank_pictures import draw_nothing  # not earlier: it imports parts of this project

        draw_nothing(setattr)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    name = "<string>"
    sys.path[0] = ""
    if source is None:
        name = argv[0]
        source = Path(name).read_bytes()
        sys.path[0] = str(Path(name).parent)
        module.__file__ = name
        module.__loader__ = SourceFileLoader("__main__", name)
    status = 0
    try:
        exec(compile(source, name, "exec"), vars(module))
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve(sys.argv[1])
