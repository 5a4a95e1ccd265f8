"""Programs without standard output or error, and with one that nobody reads or that is full."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, REPOSITORY, SCRIPT, Program, only_run, report_of, state_of, write_images

import image_classification as ic
from classifier import cli, streams
from classifier.errors import UserError

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs a shell, and pipes of POSIX")


# ---- from Python ---------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [["stderr"], ["stdout"], ["stdout", "stderr"]])
def test_library_works_without_streams_and_leaves_it_so(folder, monkeypatch, missing):
    """As in a program that pythonw runs; decoding images and training would draw bars."""
    write_images(folder / "photos", {"red": 20, "green": 20})
    for name in missing:
        monkeypatch.setattr(sys, name, None)
    config = ic.Config(dataset="photos", epochs=1, width=0.25, image_size=16)
    ic.load_data(config)
    report = ic.train(config)
    assert report.checkpoint.exists()
    for name in missing:
        assert getattr(sys, name) is None


def test_missing_streams_are_missing_again_after_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(UserError):
        ic.train(ic.Config(dataset="digits", subset=100, pretrained=True))
    assert sys.stderr is None


def test_streams_that_are_there_stay(capsys):
    before = sys.stdout, sys.stderr
    with streams.present():
        assert (sys.stdout, sys.stderr) == before
        print("printed")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "printed\n"


@contextlib.contextmanager
def closed_pipe(monkeypatch, name, buffered):
    """Within it a standard stream is a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    raw = io.FileIO(writer, "w")
    binary = io.BufferedWriter(raw) if buffered else raw
    with io.TextIOWrapper(binary, write_through=not buffered) as stream:
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, stream)
            yield
            streams.drop_unwritable()  # or closing it would fail


@posix_only
@pytest.mark.parametrize("buffered", [True, False], ids=["", "PYTHONUNBUFFERED"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_that_is_no_longer_read_ends_a_program_quietly(monkeypatch, capsys, name, buffered):
    def program():
        cli.prepare_console()
        for _ in range(2):
            print("a line", file=getattr(sys, name))
        return 0

    with closed_pipe(monkeypatch, name, buffered):
        assert cli.run_program(program) == 141
        print("more", file=getattr(sys, name), flush=True)  # it is lost
    assert capsys.readouterr().err == ""


def test_other_broken_connections_are_errors(capsys):
    def program():
        raise BrokenPipeError(32, "Broken pipe", "a server")

    assert cli.run_program(program) == 1
    assert "a server: Broken pipe" in capsys.readouterr().err


@posix_only
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError("no route")])
def test_other_errors_keep_their_text_where_nobody_reads(monkeypatch, capsys, error):
    def program():
        print("a line")
        raise error

    with closed_pipe(monkeypatch, "stdout", buffered=True):
        assert cli.run_program(program) == 1
    err = capsys.readouterr().err
    assert str(error.args[-1]) in err and "standard output" not in err
    assert error.filename is None


def test_program_that_closes_its_output_ends_as_usual(monkeypatch):
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    assert not streams.drop_unwritable()
    assert cli.run_program(lambda: 0) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_full_disk_under_standard_output_is_named(monkeypatch, capsys):
    def program():
        print("a line", flush=True)
        return 0

    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert cli.run_program(program) == 1
    assert "standard output: No space left" in capsys.readouterr().err


def test_nowhere_is_a_text_file():
    with contextlib.redirect_stdout(streams.Nowhere()):
        print("lost", flush=True)
        assert not sys.stdout.isatty() and sys.stdout.writable()
        with pytest.raises(io.UnsupportedOperation):
            sys.stdout.fileno()


# ---- from the shell ------------------------------------------------------------------------------


def shell(folder, redirection, *arguments, script=SCRIPT):
    """A program with this redirection: its exit status, standard output and standard error."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [str(each) for each in command], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["2>&-", ">&- 2>&- <&-"])
def test_program_trains_with_closed_streams(folder, redirection):
    write_images(folder / "photos", {"red": 20, "green": 20})
    status, out, err = shell(folder, redirection, "--dataset", "photos", "--epochs", "1")
    assert (status, err) == (0, "")
    assert ("Done in" in out) != redirection.startswith(">&-")
    run = only_run(folder)
    assert report_of(run)["epochs"] == 1 and state_of(run)
    for path in run.rglob("*"):  # no file got the number of a closed stream, and what C++ prints
        if path.name.startswith("events"):
            assert path.read_bytes()[8:12] != b"Warn"


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "status"), [(["--lr", "-1"], 2), (["--resume", "no"], 1)])
def test_errors_without_standard_error_are_a_status(folder, arguments, status):
    assert shell(folder, "2>&-", "--dataset", "digits", *arguments) == (status, "", "")


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("name", ["compare"])  # all tools start alike
def test_tools_without_standard_error_end_with_a_status(folder, name):
    script = REPOSITORY / f"{name}.py"
    assert shell(folder, "2>&-", "--nothing-like-it", script=script) == (2, "", "")
    assert shell(folder, ">&- 2>&-", "--help", script=script) == (0, "", "")


@posix_only
@pytest.mark.slow
def test_run_whose_output_is_no_longer_read_can_be_resumed(folder):
    """As with | head; other programs end then, too."""
    program = Program(folder)
    process = program.start(*QUICK, "--epochs", "12", "--batch-size", "20")
    for line in process.stdout:
        if line.startswith("Epoch 0001"):
            break
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(60), err) == (141, "")
    trained = len(state_of(only_run(folder))["history"])
    assert 2 <= trained < 12
    out, _ = program("--resume", "last")
    assert "Epoch 0001" not in out and "Epoch 0011" in out


@posix_only
@pytest.mark.slow
def test_help_that_is_not_read_to_its_end(folder):
    status, _, err = shell(folder, "| true", "--help")
    assert (status, err) == (0, "")
