"""Finding, downloading and verifying the data, against a real server that stalls, crawls, cuts and lies."""

import hashlib
import io
import pickle
import random
import re
import signal
import ssl
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from conftest import beforehand, wait_for
from mirror import Mirror

import image_classification as ic

CONTENT = random.Random(0).randbytes(1_800_000)
DEAD = "http://127.0.0.1:9/a.tar.gz"  # nobody listens there


@pytest.fixture
def mirror():
    with Mirror(CONTENT) as server:
        yield server


@pytest.fixture
def fetch(mirror, folder, monkeypatch):
    """download_archive of a small archive, from these manners of the server, with little patience."""
    monkeypatch.setattr(ic, "ARCHIVE_BYTES", len(CONTENT))
    monkeypatch.setattr(ic, "ARCHIVE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(ic, "PATIENCE", 1.0)
    monkeypatch.setattr(ic, "PROBE_SECONDS", 3.0)

    def download(*manners, mirror_url=""):
        monkeypatch.setattr(ic, "SOURCES", [f"{mirror.url}/{manner}/a.tar.gz" for manner in manners])
        path = ic.download_archive(folder, mirror_url)
        assert path.read_bytes() == CONTENT
        assert list(folder.iterdir()) == [path]  # no partial file is left
        return path

    return download


@pytest.mark.parametrize("manner", ["good", "rangeless", "lengthless", "redirect", "cut", "crawl"])
def test_archive_arrives_from_a_single_source(fetch, manner):
    fetch(manner)


def test_source_that_stalls_later_is_left(fetch, mirror, capsys):
    began = time.monotonic()
    fetch("good", mirror_url=f"{mirror.url}/tire/a.tar.gz")
    assert time.monotonic() - began < 20
    assert re.search(r"leaving \S+/tire/a.tar.gz: (timed out|it is slow)", capsys.readouterr().out)


def test_quickest_source_is_taken(fetch, mirror):
    fetch("crawl", "good", "gone")
    assert ("good", "bytes=0-") in mirror.requests[3:]  # probes first, then the download
    assert all(manner == "good" for manner, _ in mirror.requests[3:])


@pytest.mark.parametrize("bad", ["silent", "stall", "cut", "lie", "page", "gone", "once"])
def test_bad_mirror_is_left_for_a_good_source(fetch, mirror, bad, capsys):
    fetch("good", mirror_url=f"{mirror.url}/{bad}/a.tar.gz")
    out = capsys.readouterr().out
    assert f"note: leaving {mirror.url}/{bad}/" in out or (bad == "lie" and "what came is not the archive" in out)


def test_slow_mirror_is_left_and_its_bytes_are_kept(fetch, mirror):
    fetch("good", mirror_url=f"{mirror.url}/crawl")  # a folder: the archive's name is added
    resumed = [wanted for manner, wanted in mirror.requests if manner == "good"][-1]
    assert int(resumed.removeprefix("bytes=").removesuffix("-")) > 100_000


@pytest.mark.parametrize("manner", ["good", "rangeless-crawl"])
def test_partial_file_is_continued_or_a_slow_server_gets_the_time_it_needs(fetch, mirror, folder, manner):
    (folder / f"{ic.ARCHIVE}.part").write_bytes(CONTENT[:1_200_000])  # more than it sends before it is left as slow
    fetch(manner)
    assert mirror.requests[-1] == (manner, "bytes=1200000-")


@pytest.mark.parametrize("damage", [b"x" * 1000, bytes(len(CONTENT)), bytes(len(CONTENT) + 5)])
def test_wrong_partial_file_starts_clean(fetch, folder, damage):
    (folder / f"{ic.ARCHIVE}.part").write_bytes(damage)
    fetch("good")


def test_all_sources_failing_is_named_and_each_reason_once(fetch, folder):
    with pytest.raises(ic.Unreachable) as caught:
        fetch("gone", "page", "lie")
    text = str(caught.value)
    assert all(part in text for part in ("404", "/page/", "not the archive", "--mirror", ic.ARCHIVE_SHA256, ic.ARCHIVE))
    assert "\n" not in text and not (folder / f"{ic.ARCHIVE}.part").exists()  # of which nothing came
    with pytest.raises(ic.Unreachable) as caught:
        fetch("gone/1", "gone/2")
    assert str(caught.value).count("404") == 1 and "/gone/2" in str(caught.value)


def test_folder_that_has_to_be_made_is_named(inside, folder, monkeypatch):
    monkeypatch.setattr(ic, "SOURCES", [])
    (folder / "there").mkdir()
    outs = [inside("--fast-dev-run", "--width", "0.25", "--data-dir", name)[0] for name in ("there", "new")]
    assert ["there is no folder" in out for out in outs] == [False, True]


def test_proxy_is_honoured(fetch, mirror, monkeypatch):
    monkeypatch.setattr("urllib.request._opener", None)  # it remembers the proxies of its first request
    monkeypatch.setenv("http_proxy", mirror.url)
    monkeypatch.setenv("no_proxy", "")
    fetch(mirror_url="http://teacher.invalid/good")
    assert mirror.proxied[-1] == f"http://teacher.invalid/good/{ic.ARCHIVE}"


def test_refused_certificate_is_named_with_its_remedy(fetch, folder):
    names = ["-subj", "/CN=localhost", "-days", "1", "-keyout", str(folder / "k"), "-out", str(folder / "c")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *names]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "c", folder / "k")
    with Mirror(CONTENT) as secure, pytest.raises(ic.Unreachable, match="certificate was refused.*SSL_CERT_FILE"):
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        fetch(mirror_url=f"https://127.0.0.1:{secure.server_port}/good/a.tar.gz")


# ---- the program, end to end ----


@pytest.fixture(scope="module")
def real_archive(cifar10, tmp_path_factory):
    """A tar with the real batches, and with members that must not be unpacked."""
    path = tmp_path_factory.mktemp("archive") / ic.ARCHIVE
    evil = path.with_name("evil")
    evil.write_text("evil")
    with tarfile.open(path, "w") as tar:
        for name in ("../evil", "/tmp/evil-absolute", f"{ic.BATCHES}/../../evil", f"{ic.BATCHES}/other"):
            tar.add(evil, name)
        for kind in (tarfile.CHRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE):
            odd = tarfile.TarInfo(f"{ic.BATCHES}/readme.html")
            odd.type, odd.linkname = kind, "/etc/passwd"
            tar.addfile(odd)
        for name in ic.MEMBERS[:7]:
            tar.add(cifar10 / ic.BATCHES / name, f"{ic.BATCHES}/{name}")
    return path


@pytest.fixture
def as_published(real_archive, monkeypatch):
    """Let the program take real_archive for the published one; returns the same as Python code."""
    digest = hashlib.sha256(real_archive.read_bytes()).hexdigest()
    constants = {"ARCHIVE_BYTES": real_archive.stat().st_size, "ARCHIVE_SHA256": digest, "SOURCES": []}
    for name, value in constants.items():
        monkeypatch.setattr(ic, name, value)
    return "\n".join(f"ic.{name} = {value!r}" for name, value in constants.items())


def test_two_processes_share_one_download_and_unpack_only_the_batches(program, folder, real_archive, as_published):
    with Mirror(real_archive.read_bytes()) as server:
        patch = f"{as_published}\nic.find_cifar10(ic.Path('data'), '{server.url}/good'); sys.exit()"
        both = [program.start(patch=patch) for _ in range(2)]
        outputs = [program.finish(process)[0] for process in both]
    assert sum("Downloading CIFAR-10" in out for out in outputs) == 1
    unpacked = {path.name for path in (folder / "data" / ic.BATCHES).iterdir()}
    assert unpacked == set(ic.MEMBERS[:7])  # no link, no stranger
    assert {path.name for path in (folder / "data").iterdir()} <= {ic.BATCHES, ".cifar-10.lock"}  # archive deleted
    assert not list(folder.parent.rglob("evil*"))
    assert not Path("/tmp/evil-absolute").exists()


def test_archive_put_there_by_hand_is_used_and_kept(inside, folder, real_archive, as_published):
    (folder / "data").mkdir()
    (folder / "data" / ic.ARCHIVE).symlink_to(real_archive)
    assert "Accuracy of the network" in inside("--fast-dev-run", "--dataset", "cifar10")[0]
    assert (folder / "data" / ic.ARCHIVE).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")
def test_ctrl_c_keeps_the_partial_download(program, folder):
    part = folder / "data" / f"{ic.ARCHIVE}.part"
    with Mirror(bytes(50_000_000)) as server:
        patch = f"ic.ARCHIVE_BYTES = 50_000_000; ic.SOURCES = ['{server.url}/crawl/a.tar.gz']"
        process = program.start("--dataset", "cifar10", patch=patch)
        wait_for(lambda: part.exists() and part.stat().st_size > 300_000)
        process.send_signal(signal.SIGINT)
        program.finish(process, 130, timeout=30)
    assert part.stat().st_size > 300_000


@pytest.mark.parametrize("options", [["--dataset", "cifar10"], ["--recipe", "default"]])
def test_offline_without_substitution_fails(inside, monkeypatch, options):
    monkeypatch.setattr(ic, "SOURCES", [DEAD])
    error = inside.error(*options)
    assert all(part in error for part in (DEAD, ic.ARCHIVE, ic.ARCHIVE_SHA256, "--mirror", "by hand")), error


def test_full_disk_is_not_the_source_s_fault(fetch, monkeypatch):
    class Full(io.FileIO):
        def write(self, content):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda path, mode="r", *_, **__: Full(path, mode.replace("b", "")))
    with pytest.raises(ic.UserError, match="cannot write .*No space left on device") as caught:
        fetch("good", "good")
    assert not isinstance(caught.value, ic.Unreachable)


def test_name_look_ups_that_hang_do_not_hang_the_program(fetch, monkeypatch):
    def hang(*_, **__):
        time.sleep(90)  # which no timeout ends
        raise OSError("at last")

    monkeypatch.setattr(ic.urllib.request, "urlopen", hang)
    began = time.monotonic()
    with pytest.raises(ic.Unreachable, match="no answer"):
        fetch("good", "good")
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", CONTENT[:1_000_000], bytes([CONTENT[0] ^ 1]) + CONTENT[1:]],
    ids=["empty", "HTML", "truncated", "bit-flipped"],
)  # fmt: skip
@pytest.mark.usefixtures("fetch")  # for which CONTENT is the published archive
def test_damaged_archive(folder, content):
    archive = folder / ic.ARCHIVE
    archive.write_bytes(content)
    with pytest.raises(ic.UserError, match=r"damaged or not the CIFAR-10 archive.*delete it"):
        ic.load_data(ic.Config(data_dir=str(folder)))  # no digits stand in
    assert archive.read_bytes() == content  # nothing lost


@pytest.fixture
def batches(folder, cifar10):
    """The files of CIFAR-10 in the folder data/, each a link."""
    batches = folder / "data" / ic.BATCHES
    batches.mkdir(parents=True)
    for name in ic.MEMBERS[:7]:
        (batches / name).symlink_to(cifar10 / ic.BATCHES / name)
    return batches


def test_truncated_batch_file(inside, batches, cifar10):
    (batches / "data_batch_3").unlink()
    (batches / "data_batch_3").write_bytes((cifar10 / ic.BATCHES / "data_batch_3").read_bytes()[:-1000])
    assert "data_batch_3 is damaged: delete it and run again" in inside.error("--fast-dev-run")


def test_data_folder_that_vanishes_during_the_run(inside, folder, batches):
    with beforehand(ic, "write_report", lambda *_: (folder / "data").rename(folder / "elsewhere")):
        error = inside.error("--subset", "200", "--width", "0.25", "--epochs", "1", "--image-size", "16")
    assert "is no longer there: put it back" in error
    (folder / "elsewhere").rename(folder / "data")
    out, _ = inside("--resume", "last")
    assert "Epoch" not in out and "Accuracy of the network" in out


@pytest.mark.parametrize("inner", ["", ic.BATCHES])
def test_data_folder_may_be_the_batch_folder(cifar10, inner):
    data = ic.load_data(ic.Config(data_dir=str(cifar10 / inner)))
    assert data.train.images.shape == (45_000, 3, 32, 32) and data.train.images.dtype == torch.uint8
    assert data.valid.labels.bincount().tolist() == [500] * 10
    sky, ground = (half.float().mean() for half in data.train.images[data.train.labels == 8].chunk(2, dim=2))
    assert sky > ground + 10  # ships are upright
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert data.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.002)
    assert data.std == pytest.approx([0.2470, 0.2435, 0.2616], abs=0.002)


def test_data_folder_that_is_a_file_or_unwritable(inside, folder, unwritable, monkeypatch):
    (folder / "cifar").touch()
    assert "--data-dir cifar is a file" in inside.error("--dataset", "cifar10", "--data-dir", "cifar")
    (folder / "data").mkdir()
    unwritable(folder / "data")
    monkeypatch.setattr(ic, "SOURCES", [DEAD])
    error = inside.error()
    assert "data" in error and "right to write" in error


# ---- the split and the batches ----


def test_epoch_plan_follows_from_seed_and_epoch():
    device = torch.device("cpu")
    plans = [ic.plan_epoch(100, seed, epoch, "flip,crop=2", device) for seed, epoch in [(1, 0), (1, 0), (1, 1), (2, 0)]]
    order, _, shifts = plans[0]
    assert all(torch.equal(a, b) for a, b in zip(plans[0], plans[1], strict=True))
    assert not torch.equal(order, plans[2][0]) and not torch.equal(order, plans[3][0])
    assert shifts.min() == -2 and shifts.max() == 2
    flipped = [dict(zip(plan[0].tolist(), plan[1].tolist(), strict=True)) for plan in (plans[0], plans[2])]
    assert all(flipped[0][image] != flipped[1][image] for image in range(100))  # alternating


def test_classes_are_named_in_the_files_order(cifar10):
    names = pickle.loads((cifar10 / ic.BATCHES / "batches.meta").read_bytes())["label_names"]
    assert [{"plane": "airplane", "car": "automobile"}.get(name, name) for name in ic.CLASSES] == names
