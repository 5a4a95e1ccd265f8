"""ZIP files of images as data sets."""

import os
import shutil
import stat
import struct
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import pytest
from conftest import load_photos, report_of, state_of, write_images

import image_classification as ic
import inference
from classifier.datasets import archive
from classifier.datasets.load import dataset_available
from classifier.errors import UserError

BRIEF = ["--dataset", "photos.zip", "--epochs", "1", "--width", "0.25", "--image-size", "16"]


@pytest.fixture(autouse=True)
def home(monkeypatch, folder):
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))


@pytest.fixture
def zipped(photos):
    """The file photos.zip, with the images of the folder photos/, which is gone."""
    shutil.make_archive("photos", "zip", photos)
    photos.rename("moved")
    return Path("photos.zip")


def load(dataset="photos.zip", **settings):
    return ic.load_data(ic.Config(dataset=str(dataset), **settings))


def unpacked(data_dir="data"):
    """What lies in the folder of unpacked files, but for locks."""
    return [path for path in Path(data_dir, ".unpacked").iterdir() if path.suffix != ".lock"]


def write_zip(entries, path="photos.zip", compression=zipfile.ZIP_STORED):
    """A ZIP with these contents, by names or ZipInfo."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for entry, content in entries:
            file.writestr(entry, content)
    return Path(path)


# ---- what is unpacked ----


def test_zip_is_what_its_folder_is(zipped, capsys):
    data = load()
    assert "Unpacking photos.zip (110 files" in capsys.readouterr().out
    Path("moved").rename("photos")
    of_folder = load_photos()
    assert data.name == of_folder.name == "photos"
    assert data.classes == of_folder.classes
    assert data.fingerprint() == of_folder.fingerprint()
    assert data.files == of_folder.files


def test_zip_is_unpacked_once(zipped, capsys):
    first = load()
    (place,) = unpacked()
    capsys.readouterr()
    os.utime(zipped)
    Path("elsewhere").mkdir()
    zipped.rename("elsewhere/photos.zip")
    second = load("elsewhere/photos.zip")
    out = capsys.readouterr().out
    assert "Unpacking" not in out and "Decoding" not in out
    assert second.fingerprint() == first.fingerprint()

    write_images(Path("moved"), {"yellow": 20}, seed=9)
    shutil.make_archive("photos", "zip", "moved")
    assert "yellow" in load().classes
    assert len(unpacked()) == 2

    (place / "red" / "0.png").unlink()  # somebody has touched the folder
    assert load("elsewhere/photos.zip").fingerprint() == first.fingerprint()
    assert len(unpacked()) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_stays_half_unpacked(zipped, monkeypatch, error):
    original = archive._unpack_entry
    names = []

    def fail_later(path, file, entry, *rest):
        names.append(entry)
        if len(names) == 50:
            raise error
        original(path, file, entry, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(archive, "_unpack_entry", fail_later)
        with pytest.raises((UserError, KeyboardInterrupt)):
            load()
    assert unpacked() == []
    title = archive._title(zipped, archive.read_entries(zipped))
    Path("data", ".unpacked", f"{title}.tmp").mkdir()  # of a process that was killed
    assert len(load().classes) == 3
    assert [path.name for path in unpacked()] == [title]


@pytest.mark.slow
def test_two_processes_unpack_once(zipped):
    code = "import sys; from pathlib import Path; from classifier.datasets import archive\n"
    code += "print(archive.unpack(Path('photos.zip'), Path('data')))"
    environment = os.environ | {"PYTHONPATH": str(Path(ic.__file__).parent)}
    command = [sys.executable, "-c", code]
    several = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in several]
    assert [process.returncode for process in several] == [0, 0, 0]
    assert sum("Unpacking" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1


def test_hidden_files_are_left_in_the_zip(photos):
    (photos / ".git").mkdir()
    (photos / ".git" / "config").touch()
    (photos.parent / "__MACOSX").mkdir()
    with zipfile.ZipFile("photos.zip", "w") as file:
        for path in sorted(photos.rglob("*")):
            file.write(path, path.relative_to(photos.parent))
            if path.suffix:
                file.write(path, Path("__MACOSX", path.relative_to(photos.parent)))
    data = load()
    (place,) = unpacked()
    assert [path.name for path in place.iterdir()] == ["photos"]
    assert not (place / "photos" / ".git").exists()
    assert len(data.classes) == 3


@pytest.mark.parametrize("says_so", [True, False])
def test_names_in_utf8_with_and_without_the_flag(photos, says_so):
    """Macs do not set it; a name in another encoding is as zipfile reads it."""
    (photos / "red").rename(photos / unicodedata.normalize("NFD", "grün"))
    shutil.make_archive("photos", "zip", photos)
    if not says_so:
        content = bytearray(Path("photos.zip").read_bytes())
        for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            position = content.find(signature)
            while position >= 0:
                flags = struct.unpack_from("<H", content, position + offset)[0]
                struct.pack_into("<H", content, position + offset, flags & ~0x800)
                position = content.find(signature, position + 4)
        Path("photos.zip").write_bytes(content)
    assert "grün" in load().classes


def test_backslashes_are_separators(photos):
    entries = [
        (f"photos\\{path.parent.name}\\{path.name}", path.read_bytes())
        for path in sorted(photos.rglob("*.png"))
    ]
    write_zip(entries)
    assert load().classes == ["blue", "green", "red"]


def test_unwritable_data_dir(zipped, monkeypatch):
    """Then the user's folder for caches takes its place."""
    Path("data").write_text("")
    original = Path.mkdir

    def refuse(path, *arguments, **options):
        if path.parts[0] == "data":
            raise PermissionError(13, "Permission denied", str(path))
        original(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert archive.unpack(zipped, Path("data")).is_relative_to(Path("home").resolve())


# ---- what is refused ----


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ([("../evil.png", b"x")], "../evil.png"),
        ([("red/../../evil.png", b"x")], "evil.png"),
        ([("red\\..\\..\\evil.png", b"x")], "evil.png"),
        ([("/evil.png", b"x")], "/evil.png"),
        ([("C:\\evil.png", b"x")], "evil.png"),
        ([("C:evil.png", b"x")], "evil.png"),
        ([("red/C:evil.png", b"x")], "evil.png"),
        ([("red/C:/Users/evil.png", b"x")], "evil.png"),
        ([(link("red/evil"), b"/etc")], "red/evil"),
        ([("red/\x1b[2J/../../x", b"x")], "red/\\x1b[2J"),
        ([("red/0.png", b"x"), ("red/./0.png", b"y")], "red/0.png"),
        ([("red", b"x"), ("red/0.png", b"y")], "red"),
        ([], "no files"),
        ([("__MACOSX/x", b"x")], "no files"),
    ],
)
def test_zip_that_could_do_harm(folder, entries, word):
    write_zip([("green/0.png", b"first"), *entries] if "no files" not in word else entries)
    with pytest.raises(UserError, match="photos.zip") as caught:
        load()
    assert word in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert not list(folder.rglob("*evil*")) and not list(folder.parent.glob("evil*"))
    assert not Path("data", ".unpacked").exists() or unpacked() == []


def test_bombs(folder, monkeypatch):
    write_zip([("red/0.png", bytes(10**7))], compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(archive, "MAX_BYTES_UNCHECKED", 10**6)
    with pytest.raises(UserError, match="photos.zip would grow"):
        load()
    assert not Path("data").exists()
    monkeypatch.setattr(archive, "MAX_BYTES_UNCHECKED", 10**8)
    with pytest.raises(UserError, match="no class folders|1 class folder"):
        load()


def patched(path, signature, offset, value):
    """The ZIP with another number, of 4 bytes, in the first record of this kind."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.find(signature) + offset, value)
    path.write_bytes(content)


def test_size_that_is_not_the_declared_one(folder):
    """Neither more nor less than declared is written."""
    for size in (10, 10**6):
        path = write_zip([("red/0.png", bytes(10**5))], compression=zipfile.ZIP_DEFLATED)
        patched(path, b"PK\x01\x02", 24, size)
        with pytest.raises(UserError, match="photos.zip is damaged"):
            load()
        assert unpacked() == []


def test_files_that_overlap(folder):
    path = write_zip([(f"red/{i}.png", bytes(1000)) for i in range(5)])
    patched(path, b"PK\x01\x02", 20, 10**6)
    with pytest.raises(UserError, match="photos.zip.*overlap"):
        load()


def test_disk_that_is_too_small(zipped, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="photos.zip needs.*--data-dir"):
        load()
    assert unpacked() == []


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "middle", "encrypted"])
def test_damaged_zip(zipped, inside, damage):
    content = bytearray(zipped.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "text":
        content = b"<html>not found</html>"
    elif damage == "empty":
        content = b""
    elif damage == "middle":
        middle = len(content) // 2
        content[middle : middle + 2000] = bytes(2000)
    else:
        content[content.find(b"PK\x01\x02") + 8] |= 1
    zipped.write_bytes(content)
    assert "photos.zip" in inside.error(*BRIEF)


def test_other_files_are_no_data_sets(folder, inside):
    Path("photos.tar.gz").touch()
    error = inside.error("--dataset", "photos.tar.gz", status=2)
    assert "photos.tar.gz" in error and "ZIP" in error
    assert "no such" in inside.error("--dataset", "./gone.zip", status=2)


# ---- the ZIP of a trained model ----


@pytest.mark.slow
def test_run_goes_on_and_tools_find_the_images(zipped, inside, tool_inside, folder, monkeypatch):
    inside(*BRIEF, "--run-dir", "run", "--data-dir", "elsewhere")
    assert state_of(folder / "run")["config"]["dataset"] == str(folder / "photos.zip")
    report = report_of(folder / "run")
    assert report["dataset"] == "photos"

    out, _ = inside("--resume", "run", "--epochs", "2")
    assert "Unpacking" not in out and "Decoding" not in out
    (path,) = folder.glob("model_*.pth")
    assert path.name == "model_cnn_photos.pth"
    model = inference.load_model(path, "cpu")
    assert dataset_available(model.settings, 16)
    assert inference.load_dataset_of(model).num_test_images == sum(
        sum(row) for row in report["confusion_matrix"]
    )
    out, _ = tool_inside("explain")("--checkpoint", path)
    assert "gallery" in out

    zipped.rename("renamed.zip")
    assert not dataset_available(model.settings, 16)
    assert "--data-dir" in tool_inside("explain").error("--checkpoint", path)
    assert inference.load_dataset_of(model, "renamed.zip").classes == model.classes
    assert inference.load_dataset_of(model, "moved").classes == model.classes


def test_zip_of_other_classes_is_not_unpacked(zipped, inside, folder):
    """A stranger's model file may name any ZIP."""
    inside(*BRIEF, "--data-dir", "elsewhere")
    (path,) = folder.glob("model_*.pth")
    model = inference.load_model(path, "cpu")
    write_zip([("letters/secret.txt", b"x")], path="private.zip")
    model.settings["dataset"] = str(folder / "private.zip")
    with pytest.raises(UserError, match="classes"):
        inference.load_dataset_of(model)
    assert not Path("data").exists()
