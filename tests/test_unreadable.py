"""What is said of files that cannot be read as images."""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

import inference
from classifier.config import Config
from classifier.datasets import decode, unreadable, walk
from classifier.datasets.folder import load_folder
from classifier.errors import UserError

HEIC = b"\x00\x00\x00\x1cftypheic\x00\x00\x00\x00mif1heicmiaf" + bytes(100)
AVIF = b"\x00\x00\x00\x1cftypavif\x00\x00\x00\x00mif1avifmiaf" + bytes(100)
VIDEO = b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00mp42isom" + bytes(100)
PAGE = b"\xef\xbb\xbf\n <!DOCTYPE html><html><body>404</body></html>"


@pytest.fixture(autouse=True)
def home(monkeypatch, folder):
    """Decoded images do not go into the user's cache."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))


@pytest.fixture
def no_heic(monkeypatch):
    """Pillow without pillow-heif."""
    formats = [name for name in decode.formats() if name != "HEIF"]
    extensions = decode.extensions() - {".heic", ".heif"}
    monkeypatch.setattr(decode, "formats", lambda: formats)
    monkeypatch.setattr(decode, "extensions", lambda: extensions)


def load(**settings):
    return load_folder(Config(dataset="photos", **settings))


def listed(folder):
    """The list of unreadable files: names and reasons."""
    (path,) = folder.glob("data/.decoded/*/unreadable.csv")
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "reason"]
    return path, {Path(file).name: reason for file, reason in rows}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (bytes(3000), "zeros"),
        (PAGE, "web page"),
        (b"<HTML>", "web page"),
        (HEIC, "pip install pillow-heif"),
        (VIDEO, "video"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?>\n<svg/>", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", "git lfs pull"),
        (b"%PDF-1.4", "PDF"),
        (b"PK\x03\x04abc", "ZIP"),
        ("Bäume, in einer Datei".encode() * 50, "text"),
        (b"\x89PNG\r\n\x1a\nrest", "Pillow"),
        (b"\xc3\x28\x00\x01", "Pillow"),
    ],
)
def test_files_are_known_by_their_first_bytes(folder, no_heic, content, word):
    (folder / "image.png").write_bytes(content)
    problem = inference.read_file(folder / "image.png", 32).problem
    assert word in problem
    assert str(folder) not in problem


@pytest.mark.parametrize(("content", "format"), [(HEIC, "HEIF"), (AVIF, "AVIF")])
def test_no_plugin_is_recommended_that_is_there(folder, monkeypatch, content, format):
    (folder / "image").write_bytes(content)
    monkeypatch.setattr(decode, "formats", lambda: ["PNG"])
    assert "pip install" in unreadable.recognise(folder / "image").advice
    monkeypatch.setattr(decode, "formats", lambda: ["PNG", format])
    assert unreadable.recognise(folder / "image") is None


def test_pillow_heif_is_used_where_it_is_installed(folder, monkeypatch):
    plugin = folder / "pillow_heif.py"
    plugin.write_text(
        "from PIL import Image, PngImagePlugin\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', PngImagePlugin.PngImageFile,"
        " lambda prefix: prefix[:4] == b'heic')\n"
        "    Image.register_extension('HEIF', '.heic')\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    assert "HEIF" in decode.formats.__wrapped__()
    assert ".heic" in Image.EXTENSION
    sys.modules.pop("pillow_heif")


def test_errors_of_the_disk_are_not_explained_by_the_content(folder):
    (folder / "image.png").write_bytes(PAGE)
    error = OSError(5, "Input/output error")
    assert "Input/output" in unreadable.reason(folder / "image.png", error)
    assert unreadable.reason(folder / "image.png", MemoryError()) == "MemoryError"
    assert unreadable.reason(folder / "missing.png", ValueError("odd")) == "odd"


def test_images_in_a_folder_whose_format_is_not_read_are_named(folder, no_heic):
    """Rather than left out in silence."""
    write_images(folder / "photos", {"red": 2})
    (folder / "photos" / "phone.heic").write_bytes(HEIC)
    (folder / "photos" / "notes.txt").write_text("no image")
    found, problems = inference.find_images(["photos"])
    assert len(found) == 2
    (problem,) = problems
    assert "phone.heic" in problem and "pillow-heif" in problem


# ---- a folder with such files ----


def test_all_unreadable_files_are_listed_if_the_run_is_refused(folder):
    write_images(folder / "photos", {"red": 100, "green": 100})
    for i in range(12):
        (folder / "photos" / "red" / f"{i}.png").write_bytes(PAGE)
    with pytest.raises(UserError) as caught:
        load()
    path, reasons = listed(folder)
    assert len(reasons) == 12
    assert set(reasons.values()) == {"it is a web page"}
    for part in ("12 of 200", "web page", str(path.relative_to(folder)), "--skip-unreadable"):
        assert part in str(caught.value)


def test_all_unreadable_files_are_listed_if_the_run_goes_on(folder):
    write_images(folder / "photos", {"red": 100, "green": 100})
    for i in range(5):
        (folder / "photos" / "red" / f"{i}.png").write_bytes(b"")
    for _ in range(2):
        data = load()
        path, reasons = listed(folder)
        assert len(reasons) == len(data.report["unreadable"]) == 5
        assert any(str(path.relative_to(folder)) in line for line in data.report["words"])


def test_list_of_an_earlier_run_is_deleted(folder):
    write_images(folder / "photos", {"red": 20, "green": 20})
    path = folder / "photos" / "red" / "0.png"
    content = path.read_bytes()
    path.write_bytes(b"")
    load()
    assert list(folder.glob("data/.decoded/*/unreadable.csv"))
    path.write_bytes(content)
    load()
    assert not list(folder.glob("data/.decoded/*/unreadable.csv"))


@pytest.mark.parametrize(
    ("count", "total", "is_refused"),
    [
        (1, 8, False),  # one file never ends a run
        (2, 8, True),
        (2, 20, False),
        (3, 20, True),
        (5, 100, False),
        (6, 100, True),
        (6, 600, False),
        (7, 600, True),
    ],
)
def test_how_many_unreadable_files_are_too_many(folder, count, total, is_refused):
    for i in range(total):
        path = folder / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colors = np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(colors).save(path)
        if i < count:
            path.write_bytes(b"")
    settings = {"val_fraction": 0.0, "image_size": 8}
    if is_refused:
        with pytest.raises(UserError, match=f"{count} of {total}"):
            load(**settings)
        load(**settings, skip_unreadable=True)
    else:
        load(**settings)


def test_files_whose_status_cannot_be_read_are_images_that_cannot_be_read(folder, monkeypatch):
    """They were "no image", although their names end in .png."""
    write_images(folder / "photos", {"red": 20, "green": 20})
    red = folder / "photos" / "red"
    (red / "3.png").rename(red / "without extension")
    (red / "notes.txt").write_text("no image")
    broken = {"2.png", "without extension", "notes.txt"}
    read_status, read_bytes = os.stat, Path.read_bytes

    def fail(path):
        if Path(path).name in broken and Path(path).parent.name == "red":
            raise OSError(5, "Input/output error", str(path))

    def stat(path, **options):
        fail(path)
        return read_status(path, **options)

    def read(path):
        fail(path)
        return read_bytes(path)

    monkeypatch.setattr(walk.os, "stat", stat)
    monkeypatch.setattr(Path, "read_bytes", read)
    report = load().report
    broken.clear()
    reasons = {Path(path).name: reason for path, reason in report["unreadable"].items()}
    assert set(reasons) == {"2.png", "without extension"}
    assert all("Input/output error" in reason for reason in reasons.values())
    assert [Path(path).name for path in report["left_out"]] == ["notes.txt"]
    assert not load().report["unreadable"]  # nothing of it is remembered
    words = unreadable.summarize_files([red / "gone.PNG", red / "gone.txt"])
    assert "in .PNG" not in words and "in .txt" in words


def test_class_of_which_nothing_can_be_read(folder):
    """Only the reasons of its own files are given, and no option helps."""
    write_images(folder / "photos", {"red": 10, "green": 10})
    (folder / "photos" / "green" / "0.png").write_bytes(b"")
    for path in (folder / "photos" / "red").iterdir():
        path.write_bytes(PAGE)
    for skip_unreadable in (False, True):
        with pytest.raises(UserError, match="class red") as caught:
            load(skip_unreadable=skip_unreadable)
        assert "10 files: it is a web page" in str(caught.value)
        assert "empty" not in str(caught.value)
        assert "unreadable.csv" in str(caught.value)


@pytest.mark.parametrize("name", ["{}.heic", "{}.HEIC", "{}.jpg"])
def test_class_of_heic_only(folder, no_heic, name):
    write_images(folder / "photos", {"green": 10})
    (folder / "photos" / "red").mkdir()
    for i in range(7):
        (folder / "photos" / "red" / name.format(i)).write_bytes(HEIC)
    with pytest.raises(UserError, match="red") as caught:
        load()
    for part in ("7 files", "HEIC", "pillow-heif"):
        assert part in str(caught.value)
    assert "put some into it" not in str(caught.value)


def test_heic_beside_images_is_noted(folder, no_heic, capsys):
    write_images(folder / "photos", {"red": 10, "green": 10})
    for i in range(3):
        (folder / "photos" / "red" / f"{i}.heic").write_bytes(HEIC)
    (folder / "photos" / "red" / "notes.txt").write_text("no image")
    load()
    out = capsys.readouterr().out
    assert "3 files: it is HEIC" in out


def test_files_whose_names_are_no_unicode_are_listed(folder):
    write_images(folder / "photos", {"red": 20, "green": 20})
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (folder / "photos" / "red" / name).write_bytes(b"")
    except OSError:
        pytest.skip("there are no such names here")
    load()
    _, reasons = listed(folder)
    assert list(reasons) == ["caf\\udce9.png"]
