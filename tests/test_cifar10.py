"""Finding, unpacking and reading CIFAR-10."""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, wait_for
from filelock import FileLock
from mirror import Mirror

from classifier.config import Config
from classifier.datasets import download
from classifier.datasets.cifar10 import (
    BATCHES,
    CLASSES,
    MD5,
    MEMBERS,
    find_cifar10,
    load_cifar10,
)
from classifier.errors import DatasetUnavailable, UserError

FIND = """
from pathlib import Path
from classifier.datasets import cifar10, download
{constants}
print("found", cifar10.find_cifar10(Path("data")))
"""


def start(folder, **constants):
    """Start find_cifar10 in another process, with these constants of `download`."""
    lines = [f"download.{name} = {value!r}" for name, value in constants.items()]
    code = FIND.format(constants="\n".join(lines))
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def batch_folder(tmp_path_factory):
    """A folder with small files that are named as the batch files."""
    folder = tmp_path_factory.mktemp("batches")
    for name in MD5:
        (folder / name).write_text(f"content of {name}")
    return folder


@pytest.fixture(scope="module")
def archive(batch_folder, tmp_path_factory):
    """A tar with these files, and with members that must not be unpacked."""
    path = tmp_path_factory.mktemp("archive") / download.ARCHIVE
    evil = path.with_name("evil")
    evil.write_text("evil")
    with tarfile.open(path, "w") as tar:
        for name in ("../evil", "/tmp/evil-absolute", f"{BATCHES}/../../evil", f"{BATCHES}/other"):
            tar.add(evil, name)
        for kind in (tarfile.CHRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE):
            odd = tarfile.TarInfo(f"{BATCHES}/readme.html")
            odd.type = kind
            odd.linkname = "/etc/passwd"
            tar.addfile(odd)
        for name in MD5:
            tar.add(batch_folder / name, f"{BATCHES}/{name}")
    return path


@pytest.fixture
def constants(archive, monkeypatch):
    """Take this archive for the published one; returns the constants that say so."""
    constants = {
        "ARCHIVE_BYTES": archive.stat().st_size,
        "ARCHIVE_SHA256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "SOURCES": [],
    }
    for name, value in constants.items():
        monkeypatch.setattr(download, name, value)
    return constants


@pytest.fixture
def batches(folder, cifar10):
    """The files of CIFAR-10 in data/, each a link."""
    batches = folder / "data" / BATCHES
    batches.mkdir(parents=True)
    for name in MD5:
        (batches / name).symlink_to(cifar10 / BATCHES / name)
    return batches


# ---- find_cifar10 ----


@pytest.mark.parametrize("inner", ["", BATCHES])
def test_batch_files_are_found_in_the_folder_or_in_its_own(folder, batch_folder, inner):
    (folder / "data" / inner).mkdir(parents=True)
    for name in MD5:
        (folder / "data" / inner / name).write_bytes((batch_folder / name).read_bytes())
    assert find_cifar10(Path("data")) == Path("data", inner)
    assert not list(folder.rglob("*.lock"))  # nothing is written, so the folder may be read-only


@pytest.mark.slow
def test_two_processes_share_one_download_and_unpack_only_the_batches(folder, archive, constants):
    (folder / "data").mkdir()
    lock = FileLock(folder / "data" / ".cifar-10.lock")
    with Mirror(archive.read_bytes()) as server:
        constants["SOURCES"] = [f"{server.url}/good/a.tar.gz"]
        with lock:
            processes = [start(folder, **constants) for _ in range(2)]
            for process in processes:
                assert "waiting" in process.stdout.readline()
        outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("Downloading CIFAR-10" in out for out, _ in outputs) == 1
    assert all("found" in out for out, _ in outputs)
    unpacked = {path.name for path in (folder / "data" / BATCHES).iterdir()}
    assert unpacked == set(MD5)  # no link and no stranger
    left = {path.name for path in (folder / "data").iterdir()}
    assert left <= {BATCHES, ".cifar-10.lock"}  # the archive was deleted
    assert not list(folder.parent.rglob("evil*"))
    assert not Path("/tmp/evil-absolute").exists()


def test_readme_is_unpacked_as_well(folder, batch_folder, monkeypatch):
    path = folder / download.ARCHIVE
    (folder / "readme.html").write_text("about")
    with tarfile.open(path, "w:gz") as tar:
        for name in MD5:
            tar.add(batch_folder / name, f"{BATCHES}/{name}")
        for name in ("batches.meta", "readme.html"):
            tar.add(folder / "readme.html", f"{BATCHES}/{name}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(download, "ARCHIVE_SHA256", digest)
    found = find_cifar10(folder)
    assert {path.name for path in found.iterdir()} == set(MEMBERS)
    assert (found / "test_batch").read_text() == "content of test_batch"


@pytest.mark.usefixtures("constants")
def test_archive_put_there_by_hand_is_used_and_kept(folder, archive):
    (folder / "data").mkdir()
    placed = folder / "data" / download.ARCHIVE
    placed.write_bytes(archive.read_bytes())
    assert find_cifar10(Path("data")) == Path("data", BATCHES)
    assert placed.read_bytes() == archive.read_bytes()


@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"<html>404</html>", id="HTML"),
        pytest.param(lambda content: content[:-1000], id="truncated"),
        pytest.param(lambda content: bytes([content[0] ^ 1]) + content[1:], id="bit-flipped"),
    ],
)
def test_damaged_archive_is_refused_and_kept(folder, archive, damage):
    placed = folder / download.ARCHIVE
    placed.write_bytes(damage(archive.read_bytes()))
    content = placed.read_bytes()
    with pytest.raises(UserError, match=f"{download.ARCHIVE}.*{download.ARCHIVE_SHA256}") as caught:
        find_cifar10(folder)
    assert not isinstance(caught.value, DatasetUnavailable)  # for which the digits would be used
    assert placed.read_bytes() == content
    assert not (folder / BATCHES).exists()


@pytest.mark.usefixtures("constants")
def test_incomplete_batch_folder_is_completed(folder, archive):
    (folder / BATCHES).mkdir()
    (folder / BATCHES / "data_batch_1").write_text("half of")
    (folder / download.ARCHIVE).write_bytes(archive.read_bytes())
    found = find_cifar10(folder)
    assert (found / "data_batch_1").read_text() == "content of data_batch_1"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")
def test_ctrl_c_keeps_the_partial_download(folder):
    part = folder / "data" / f"{download.ARCHIVE}.part"
    with Mirror(bytes(50_000_000)) as server:
        sources = [f"{server.url}/crawl/a.tar.gz"]
        process = start(folder, ARCHIVE_BYTES=50_000_000, SOURCES=sources)
        wait_for(lambda: part.exists() and part.stat().st_size > 300_000)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert part.stat().st_size > 300_000


@pytest.mark.parametrize(("name", "is_named"), [("there", False), ("data", False), ("new", True)])
def test_folder_that_is_created_is_named(folder, monkeypatch, capsys, name, is_named):
    """Unless it is the default one: a new one may be a typing error."""
    monkeypatch.setattr(download, "SOURCES", [])
    (folder / "there").mkdir()
    with pytest.raises(DatasetUnavailable):
        find_cifar10(Path(name))
    assert (f"--data-dir {name}" in capsys.readouterr().out) == is_named
    assert (folder / name).is_dir()


def test_data_dir_that_is_a_file(folder):
    (folder / "cifar").touch()
    with pytest.raises(UserError, match="--data-dir cifar"):
        find_cifar10(Path("cifar"))


def test_data_dir_that_is_not_writable(folder, unwritable):
    (folder / "data").mkdir()
    unwritable(folder / "data")
    with pytest.raises(OSError, match="data"):
        find_cifar10(Path("data"))


# ---- load_cifar10 ----


def test_images_and_labels(cifar10):
    data = load_cifar10(find_cifar10(cifar10), Config())
    assert data.name == "CIFAR10" and data.flip_keeps_label and data.num_test_images == 10_000
    assert data.train.images.shape == (45_000, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8
    assert data.valid.labels.bincount().tolist() == [500] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    ships = data.train.images[data.train.labels == CLASSES.index("ship")].float()
    sky, water = ships.chunk(2, dim=2)
    assert sky.mean() > water.mean() + 10  # they are upright
    assert data.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.002)
    assert data.std == pytest.approx([0.2470, 0.2435, 0.2616], abs=0.002)


def test_classes_are_in_the_order_of_the_files(cifar10):
    meta = pickle.loads((cifar10 / BATCHES / "batches.meta").read_bytes())
    as_printed = {"airplane": "plane", "automobile": "car"}
    assert [as_printed.get(name, name) for name in meta["label_names"]] == CLASSES


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_truncated_batch_file(batches, name):
    content = (batches / name).read_bytes()
    (batches / name).unlink()
    (batches / name).write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"{name}.* delete it"):
        load_cifar10(batches, Config())


def test_batch_file_that_is_gone_when_the_test_images_are_read(batches):
    data = load_cifar10(batches, Config(subset=100, image_size=16))
    for path in batches.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="test_batch.* put it back"):
        _ = data.test
