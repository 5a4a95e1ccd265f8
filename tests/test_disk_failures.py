"""Files of a run: never half written, and one clear line when the disk refuses."""

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import QUICK, beforehand, weights

import image_classification as ic
from classifier.files import check_writable, write_atomically
from classifier.run_log import RunLog


def test_writers_leave_old_or_new_but_never_half(folder):
    path = folder / "file"
    contents = [bytes([i]) * 300_000 for i in range(4)]
    path.write_bytes(contents[0])
    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write_atomically, path, content) for content in 10 * contents]
        while not all(writer.done() for writer in writers):
            assert path.read_bytes() in contents
    assert all(writer.exception() is None for writer in writers)
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("out", ["file/model.pth", "."])
def test_model_that_cannot_be_written_is_named_before_training(inside, folder, out):
    (folder / "file").touch()
    error = inside.error(*QUICK, "--out", out)
    assert "--out" in error and out.partition("/")[0] in error
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_folder_of_the_model_is_made(inside, folder):
    inside(*QUICK, "--epochs", "1", "--out", "new/inner/model.pth")
    assert weights(folder / "new" / "inner" / "model.pth")
    assert not list(folder.glob("*.pth"))


def test_place_that_can_be_written_is_left_as_it_was(folder):
    for place in (folder, folder / "new" / "inner", folder / "new"):
        check_writable(place)
        assert list(folder.iterdir()) == []


def test_folder_of_runs_that_cannot_be_written(inside, folder, unwritable):
    (folder / "runs").mkdir()
    unwritable(folder / "runs")
    error = inside.error(*QUICK)
    assert "runs" in error and "--run-dir" in error and "--out" not in error


def test_current_folder_that_cannot_be_written(inside, folder, unwritable):
    (folder / "elsewhere").mkdir()
    unwritable(folder)
    error = inside.error(*QUICK, "--run-dir", folder / "elsewhere")
    assert "--out" in error and "--run-dir" not in error
    assert list((folder / "elsewhere").iterdir()) == []


@pytest.fixture
def read_only(folder, monkeypatch):
    """The current folder, in which nothing can be made."""
    touch, mkdir = Path.touch, Path.mkdir

    def refuse(path, do, **options):
        if path.resolve().is_relative_to(folder.resolve()):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        do(path, **options)

    monkeypatch.setattr(Path, "touch", lambda path, **options: refuse(path, touch, **options))
    monkeypatch.setattr(Path, "mkdir", lambda path, **options: refuse(path, mkdir, **options))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (QUICK, ["--run-dir", "--out"]),
        ([*QUICK, "--fast-dev-run"], ["--run-dir"]),  # which leaves no model in the current folder
        ([*QUICK, "--run-dir", ".."], ["--out"]),
        ([*QUICK, "--run-dir", "../run", "--out", "here.pth"], ["--out"]),
        ([*QUICK, "--run-dir", "here", "--out", "../model.pth"], ["--run-dir"]),
        (["--dataset", "cifar10"], ["--run-dir", "--out", "--data-dir"]),
        (["--dataset", "mnist", "--data-dir", "../data"], ["--run-dir", "--out"]),
    ],
)
def test_read_only_folder_is_named_with_the_options_that_lead_elsewhere(
    inside, folder, read_only, monkeypatch, arguments, named
):
    monkeypatch.setattr(ic, "load_data", lambda config: pytest.fail("the data were read"))
    error = inside.error(*arguments)
    assert str(folder) in error and os.strerror(errno.EROFS) in error
    for option in ("--run-dir", "--out", "--data-dir"):
        assert (option in error) == (option in named), error
    assert list(folder.iterdir()) == [] and not (folder.parent / "data").exists()


@pytest.mark.slow
def test_full_disk_while_saving(inside, small_disk):
    disk = small_disk(2600)
    options = ["--dataset", "digits", "--epochs", "1", "--width", "0.8"]
    error = inside.error(*options, "--run-dir", "disk/run")
    assert "No space left on device" in error and ".pth" in error
    assert weights(disk / "run" / "best.pth")  # the last good one is intact
    assert list(disk.rglob("*.tmp")) == []


def test_locked_metrics_do_not_stop_a_run(inside, folder, unwritable):
    run = folder / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("locked")
    unwritable(run / "metrics.csv")
    if os.name == "posix" and os.geteuid() != 0:
        pytest.skip("a file's rights do not stop it from being replaced here")
    out, _ = inside(*QUICK, "--epochs", "1", "--run-dir", "run")
    assert "note: metrics.csv" in out
    assert "Done in" in out and (run / "report.json").exists()
    assert (run / "metrics.csv").read_text() == "locked"


def test_run_folder_that_vanishes(inside):
    with beforehand(RunLog, "end_epoch", lambda log, *_: shutil.rmtree(log.run)):
        error = inside.error(*QUICK)
    assert "runs" in error and "no such file or folder" in error


@pytest.mark.skipif(os.name != "posix", reason="Windows lets few users make links")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("run", [*QUICK, "--run-dir", "run"]),
        ("data", ["--dataset", "cifar10", "--data-dir", "data"]),
    ],
)
def test_link_to_nowhere_is_named(inside, folder, name, options):
    (folder / name).symlink_to(folder / "nowhere" / name)
    assert f"{name}: File exists" in inside.error(*options)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Windows lets few users make links")
def test_model_file_that_is_a_link_is_replaced(inside, folder):
    (folder / "model.pth").symlink_to(folder / "nowhere" / "model.pth")
    inside(*QUICK, "--epochs", "1", "--out", "model.pth")
    assert weights(folder / "model.pth") and not (folder / "model.pth").is_symlink()


@pytest.mark.slow
def test_two_runs_started_together_both_finish(program, folder):
    for process in [program.start(*QUICK) for _ in range(2)]:
        program.finish(process)
    assert len(list(folder.glob("runs/*/*/report.json"))) == 2
    assert weights(folder / "model_cnn_digits.pth")
