"""Runs for which CIFAR-10 cannot be downloaded, or whose data go away; no internet is needed."""

import hashlib
import json
import os
import pickle
import signal
import sys

import numpy as np
import pytest
from conftest import beforehand, only_run, report_of, wait_for
from mirror import Mirror

import image_classification as ic
from classifier.datasets import cifar10, download
from classifier.datasets.cifar10 import BATCHES
from classifier.datasets.download import ARCHIVE, ARCHIVE_SHA256

TINY = ["--subset", "200", "--width", "0.25", "--epochs", "1", "--image-size", "16"]
DEAD = "http://127.0.0.1:9/a.tar.gz"  # nobody listens there


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(download, "SOURCES", [DEAD])


@pytest.fixture
def batches(folder, monkeypatch):
    """Batch files in data/ as those of CIFAR-10, of 60 images of noise each."""
    batches = folder / "data" / BATCHES
    batches.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in cifar10.MD5:
        labels = [number % 10 for number in range(60)]
        content = {"data": random.integers(0, 256, (60, 3072), dtype=np.uint8), "labels": labels}
        (batches / name).write_bytes(pickle.dumps(content))
        digest = hashlib.md5((batches / name).read_bytes()).hexdigest()
        monkeypatch.setitem(cifar10.MD5, name, digest)
    return batches


# ---- no source can be reached ----


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("options", [["--dataset", "cifar10"], ["--recipe", "default"]])
def test_no_fallback_for_who_wants_cifar10(inside, folder, options):
    error = inside.error(*options)
    for named in (DEAD, ARCHIVE, ARCHIVE_SHA256, "--mirror"):
        assert named in error
    assert not (folder / "runs").exists()


@pytest.mark.usefixtures("offline")
def test_digits_are_trained_on_instead_and_everything_says_so(inside, folder):
    out, _ = inside(*TINY, "--fast-dev-run")
    (note,) = [line for line in out.splitlines() if DEAD in line]
    assert out.index(note) < out.index("Start Training")
    (accuracy,) = [line for line in out.splitlines() if "Accuracy of the network" in line]
    assert "digits" in accuracy and "CIFAR-10" in accuracy
    run = only_run(folder)
    assert run.parent.name == "digits"
    assert report_of(run)["dataset"] == "digits" and DEAD in report_of(run)["substituted_for"]
    config = json.loads((run / "config.json").read_text())
    assert config["dataset"] == "digits" and DEAD in config["substitution"]


@pytest.mark.usefixtures("offline")
def test_data_folder_that_is_not_writable(inside, folder, unwritable):
    (folder / "data").mkdir()
    unwritable(folder / "data")
    error = inside.error()
    assert str(folder / "data") in error and "--data-dir" in error


def test_data_folder_that_is_a_file(inside, folder):
    (folder / "cifar").touch()
    error = inside.error("--dataset", "cifar10", "--data-dir", "cifar")
    assert "--data-dir" in error and str(folder / "cifar") in error


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", bytes(100_000)])
def test_damaged_archive_is_named_and_kept(inside, folder, content):
    archive = folder / "data" / ARCHIVE
    archive.parent.mkdir()
    archive.write_bytes(content)
    error = inside.error()  # no digits instead: the user wanted this file to be used
    assert ARCHIVE in error and "delete it" in error
    assert archive.read_bytes() == content
    assert not (folder / "runs").exists()


# ---- Ctrl-C ----


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")
def test_ctrl_c_keeps_the_partial_download(program, folder):
    part = folder / "data" / f"{ARCHIVE}.part"
    with Mirror(bytes(50_000_000)) as server:
        lines = [
            "from classifier.datasets import download",
            "download.ARCHIVE_BYTES = 50_000_000",
            f"download.SOURCES = ['{server.url}/crawl/a.tar.gz']",
        ]
        process = program.start("--dataset", "cifar10", patch="\n".join(lines))
        wait_for(lambda: part.exists() and part.stat().st_size > 300_000)
        process.send_signal(signal.SIGINT)
        program.finish(process, 130, timeout=30)
    assert part.stat().st_size > 300_000


# ---- data that are there, and then are not ----


def test_run_from_files_that_are_there_asks_no_source(inside, folder, batches, monkeypatch):
    monkeypatch.setattr(download, "download_archive", lambda *_: pytest.fail("a download began"))
    out, _ = inside(*TINY)
    assert "CIFAR10: 200 training" in out and "Accuracy for class plane" in out
    assert (folder / "model_cnn.pth").exists()


def test_damaged_batch_file_is_named(inside, folder, batches):
    path = batches / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1000])
    error = inside.error("--fast-dev-run")
    assert "data_batch_3" in error and "delete it" in error
    assert not (folder / "runs").exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows moves no folder that is in use")
def test_data_folder_that_vanishes_during_the_run(inside, folder, batches):
    with beforehand(ic, "test", lambda *_: (folder / "data").rename("elsewhere")):
        error = inside.error(*TINY)
    assert "put it back" in error
    (folder / "elsewhere").rename(folder / "data")
    out, _ = inside("--resume", "last")
    assert "Epoch" not in out and "Accuracy of the network" in out
