"""Downloading the archive, from a real server that stalls, crawls, cuts connections and lies."""

import hashlib
import io
import random
import re
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from mirror import Mirror

from classifier.datasets import download
from classifier.errors import DatasetUnavailable, UserError

CONTENT = random.Random(0).randbytes(900_000)


@pytest.fixture
def mirror():
    with Mirror(CONTENT) as server:
        yield server


@pytest.fixture
def fetch(mirror, folder, monkeypatch):
    """download_archive of a small archive, from these manners of the server, with short waits."""
    monkeypatch.setattr(download, "ARCHIVE_BYTES", len(CONTENT))
    monkeypatch.setattr(download, "ARCHIVE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(download, "PROBE_BYTES", 100_000)
    monkeypatch.setattr(download, "PATIENCE", 1.0)
    monkeypatch.setattr(download, "PROBE_SECONDS", 3.0)

    def fetch(*manners, mirror_url=""):
        sources = [f"{mirror.url}/{manner}/a.tar.gz" for manner in manners]
        monkeypatch.setattr(download, "SOURCES", sources)
        path = download.download_archive(folder, mirror_url)
        assert path.read_bytes() == CONTENT
        assert list(folder.iterdir()) == [path]  # no partial file is left
        return path

    return fetch


def first_byte(wanted):
    """The position that a Range header asks for."""
    return int(wanted.removeprefix("bytes=").removesuffix("-"))


@pytest.mark.slow
@pytest.mark.parametrize("manner", ["good", "rangeless", "lengthless", "redirect", "cut", "crawl"])
def test_archive_arrives_from_a_single_source(fetch, manner):
    fetch(manner)


def test_folder_is_created(fetch, mirror, folder, monkeypatch):
    monkeypatch.setattr(download, "SOURCES", [f"{mirror.url}/good/a.tar.gz"])
    path = download.download_archive(str(folder / "new" / "inner"))
    assert path == folder / "new" / "inner" / download.ARCHIVE and path.read_bytes() == CONTENT


def test_source_that_stalls_later_is_given_up(fetch, mirror, capsys):
    began = time.monotonic()
    fetch("good", mirror_url=f"{mirror.url}/tire/a.tar.gz")
    assert time.monotonic() - began < 20
    assert re.search(r"note: .*/tire/a.tar.gz: (timed out|it is slow)", capsys.readouterr().out)


def test_fastest_source_is_used(fetch, mirror):
    fetch("crawl", "good", "gone")
    downloads = mirror.requests[3:]  # after one probe of each source
    assert ("good", "bytes=0-") in downloads
    assert all(manner == "good" for manner, _ in downloads)


def test_mirror_comes_before_a_faster_source(fetch, mirror, monkeypatch):
    used = []

    def append_from(url, part, min_speed):
        used.append((url, min_speed))
        part.write_bytes(CONTENT)

    monkeypatch.setattr(download, "_append_from", append_from)
    crawl = f"{mirror.url}/crawl/a.tar.gz"
    fetch("good", mirror_url=crawl)
    assert used == [(crawl, download.MIN_SPEED)]


def test_mirror_that_is_a_source_as_well_is_asked_once(fetch, mirror):
    fetch("good", mirror_url=f"{mirror.url}/good/a.tar.gz")
    assert len(mirror.requests) == 2  # the probe and the download


@pytest.mark.parametrize("bad", ["silent", "stall", "cut", "lie", "page", "gone", "once"])
def test_bad_mirror_is_given_up_for_a_good_source(fetch, mirror, bad, capsys):
    fetch("good", mirror_url=f"{mirror.url}/{bad}/a.tar.gz")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    expected = "SHA-256" if bad == "lie" else f"{mirror.url}/{bad}/"
    assert any(expected in note for note in notes)


def test_slow_mirror_is_given_up_and_its_bytes_are_kept(fetch, mirror):
    fetch("good", mirror_url=f"{mirror.url}/crawl")  # a folder: the archive's name is added
    resumed = [wanted for manner, wanted in mirror.requests if manner == "good"][-1]
    assert first_byte(resumed) > 100_000


@pytest.mark.slow
@pytest.mark.parametrize("manner", ["good", "rangeless-crawl"])
def test_partial_file_is_continued(fetch, mirror, folder, manner):
    # More than the slow server sends before it is given up for the first time: it is asked again.
    (folder / f"{download.ARCHIVE}.part").write_bytes(CONTENT[:600_000])
    fetch(manner)
    assert mirror.requests[-1] == (manner, "bytes=600000-")


@pytest.mark.parametrize("damage", [b"x" * 1000, bytes(len(CONTENT)), bytes(len(CONTENT) + 5)])
def test_wrong_partial_file_starts_again(fetch, folder, damage):
    (folder / f"{download.ARCHIVE}.part").write_bytes(damage)
    fetch("good")


def test_complete_partial_file_needs_no_source(fetch, mirror, folder):
    (folder / f"{download.ARCHIVE}.part").write_bytes(CONTENT)
    fetch("gone")
    assert not mirror.requests


def test_all_sources_failing_are_named_with_their_reasons(fetch, folder):
    with pytest.raises(DatasetUnavailable) as caught:
        fetch("gone", "page", "lie")
    text = str(caught.value)
    for part in ("404", "/page/", "/lie/", "--mirror", download.ARCHIVE_SHA256, download.ARCHIVE):
        assert part in text
    assert str(folder) in text and "\n" not in text
    assert not (folder / f"{download.ARCHIVE}.part").exists()  # nothing came


def test_each_reason_is_given_once(fetch):
    with pytest.raises(DatasetUnavailable) as caught:
        fetch("gone/1", "gone/2")
    text = str(caught.value)
    assert text.count("Error 404") == 1 and "/gone/1" in text and "/gone/2" in text


def test_partial_file_of_sources_that_fail_is_kept(fetch, folder):
    with pytest.raises(DatasetUnavailable):
        fetch("once")  # a probe gets a third, the download nothing
    with pytest.raises(DatasetUnavailable):
        (folder / f"{download.ARCHIVE}.part").write_bytes(CONTENT[:1000])
        fetch("gone")
    assert (folder / f"{download.ARCHIVE}.part").read_bytes() == CONTENT[:1000]


def test_no_sources(fetch):
    with pytest.raises(DatasetUnavailable):
        fetch()


def test_malformed_mirror_is_an_error_of_that_source(fetch, capsys):
    fetch("good", mirror_url="http://[broken/a.tar.gz")
    assert "http://[broken/a.tar.gz" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mirror_url", "archive_url"),
    [
        ("", ""),
        ("http://a/b", f"http://a/b/{download.ARCHIVE}"),
        ("http://a/b/", f"http://a/b/{download.ARCHIVE}"),
        ("http://a/x.tar.gz", "http://a/x.tar.gz"),
        ("http://a/x.tar.gz?download=1", "http://a/x.tar.gz?download=1"),
    ],
)
def test_mirror_may_be_an_archive_or_a_folder(folder, monkeypatch, mirror_url, archive_url):
    probed = []

    def probe(urls, start):
        probed.extend(urls)
        return {}, {}

    monkeypatch.setattr(download, "SOURCES", ["http://source"])
    monkeypatch.setattr(download, "_probe", probe)
    with pytest.raises(DatasetUnavailable):
        download.download_archive(folder, mirror_url)
    assert probed == [url for url in (archive_url, "http://source") if url]


def test_proxy_is_used(fetch, mirror, monkeypatch):
    monkeypatch.setattr("urllib.request._opener", None)  # it remembers the first proxies it saw
    monkeypatch.setenv("http_proxy", mirror.url)
    monkeypatch.setenv("no_proxy", "")
    fetch(mirror_url="http://teacher.invalid/good")
    assert mirror.proxied[-1] == f"http://teacher.invalid/good/{download.ARCHIVE}"


def test_refused_certificate_is_named_with_its_remedy(fetch, folder):
    certificate, key = str(folder / "certificate"), str(folder / "key")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-keyout", key, "-out", certificate]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Mirror(CONTENT) as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        with pytest.raises(DatasetUnavailable, match="certificate.*SSL_CERT_FILE"):
            fetch(mirror_url=f"https://127.0.0.1:{secure.server_port}/good/a.tar.gz")


def test_full_disk_is_not_the_fault_of_a_source(fetch, mirror, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, content):
            raise OSError(28, "No space left on device")

    def open_on_full_disk(path, mode="r", *_, **__):
        return FullDisk(path, mode.replace("b", ""))

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    with pytest.raises(UserError, match=f"{download.ARCHIVE}.*No space left") as caught:
        fetch("good", "good")
    assert not isinstance(caught.value, DatasetUnavailable)
    assert len(mirror.requests) == 2  # one probe for both, one download: no other one was tried


@pytest.mark.slow
def test_name_look_ups_that_hang_do_not_hang_the_program(fetch, monkeypatch):
    def hang(*_, **__):
        time.sleep(90)  # no time-out ends it
        raise OSError("at last")

    monkeypatch.setattr(download.urllib.request, "urlopen", hang)
    began = time.monotonic()
    with pytest.raises(DatasetUnavailable, match="no answer"):
        fetch("good", "good")
    assert time.monotonic() - began < 8
