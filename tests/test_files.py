"""Files that are written whole, and places that are tried before the work."""

import csv
import os
import sys
from pathlib import Path

import pytest
from conftest import beforehand, only_run, write_images

from classifier.files import (
    check_writable,
    prepare_file,
    prepare_folder,
    write_csv,
    write_into_new_folder,
)
from classifier.runs import new_run_folder
from classifier.text import (
    escape_control_characters,
    has_control_characters,
    is_url,
    printable,
)


def test_names_that_are_not_utf_8_are_escaped(folder):
    name = os.fsdecode(b"caf\xe9.png") if os.name == "posix" else "caf\udce9.png"
    write_csv(folder / "a.csv", [["file", "label"], [name, "cat"], ["Übung 数据", "dog"]])
    with open(folder / "a.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["file", "label"], [r"caf\udce9.png", "cat"], ["Übung 数据", "dog"]]
    assert printable(rows[1][0]) == rows[1][0]


def test_folder_of_a_file_is_made_and_nothing_else(folder):
    prepare_file(folder / "new" / "deeper" / "a.png")
    assert (folder / "new" / "deeper").is_dir() and not list((folder / "new/deeper").iterdir())
    (folder / "old.png").write_text("old")
    prepare_file(folder / "old.png")
    assert (folder / "old.png").read_text() == "old"
    prepare_folder(folder / "new")
    assert {path.name for path in folder.iterdir()} == {"new", "old.png"}


def test_place_that_cannot_be_written_is_named(folder, unwritable):
    (folder / "kept").mkdir()
    (folder / "file").touch()
    unwritable(folder / "kept")
    for path, named in (("kept/a.png", "kept"), ("file/a.png", "file"), ("kept", "kept")):
        with pytest.raises(OSError) as caught:
            prepare_file(folder / path)
        assert caught.value.filename == str(folder / named)
        assert not isinstance(caught.value, FileExistsError)
    with pytest.raises(OSError) as caught:
        prepare_folder(folder / "kept" / "new")
    assert "kept" in caught.value.filename


def remove_once(path):
    """A function that removes a folder when it is called first, as another process may."""
    calls = []

    def remove(*_, **__):
        if not calls and path.exists():
            calls.append(path)
            path.rmdir()

    return remove


@pytest.mark.parametrize("make", [check_writable, prepare_folder])
def test_folder_that_another_process_only_tried_to_make_is_made_again(folder, make):
    with beforehand(Path, "touch", remove_once(folder / "new")):
        make(folder / "new")
    assert (folder / "new").exists() == (make is prepare_folder)


def test_run_folder_is_made_while_others_try_its_place(folder, monkeypatch):
    calls = []
    mkdir = Path.mkdir

    def mkdir_or_miss(path, *args, **options):
        calls.append(path)
        if len(calls) == 1:  # its parent was removed before it could be made
            raise FileNotFoundError(2, "No such file or directory", str(path))
        mkdir(path, *args, **options)

    for run_dir in ("", "there/run"):
        calls.clear()
        monkeypatch.setattr(Path, "mkdir", mkdir_or_miss)
        assert new_run_folder(run_dir, "digits").is_dir()


def test_model_is_written_while_others_try_its_place(folder):
    with beforehand(Path, "open", remove_once(folder / "new")):
        write_into_new_folder(folder / "new" / "a.pth", b"a model")
    assert (folder / "new" / "a.pth").read_bytes() == b"a model"


def test_control_characters_are_escaped():
    assert escape_control_characters("a\x1b[2J\x9b数\n") == r"a\x1b[2J\x9b数\x0a"
    assert escape_control_characters("Übung 数据.png") == "Übung 数据.png"


def test_url_is_no_place_to_write(folder):
    for path in ("https://example.com/a.png", "https://example.com"):
        for prepare in (prepare_file, prepare_folder):
            with pytest.raises(OSError, match="URL"):
                prepare(Path(path))
    assert list(folder.iterdir()) == []


def test_urls():
    for name in ("https://a.b/c.png", "http:/a.b/c.png", "file:///c.png", "s3://bucket/c"):
        assert is_url(name)
    for name in ("c.png", "C:/c.png", r"C:\c.png", "C://c.png", "a/b://c", "", "https", "x:/c"):
        assert not is_url(name)


def test_control_characters():
    for name in ("\x1b[2J", "a\nb", "a\x7f", "a\x9b2J"):
        assert has_control_characters(name)
    for name in ("Übung", "数据", "می‌خواهم", "a b", ""):
        assert not has_control_characters(name)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_training_on_a_folder_whose_names_are_not_utf_8(folder, inside):
    """TensorBoard takes none of them: neither the run's folder nor a hyperparameter."""
    photos = folder / os.fsdecode(b"f\xe9lin")
    write_images(photos, {"red": 30, "green": 30})
    for path in list(photos.glob("red/*.png")):
        path.rename(path.with_name(os.fsdecode(b"\xe9") + path.name))
    settings = ["--dataset", photos, "--epochs", "1", "--width", "0.25", "--image-size", "16"]
    inside(*settings)
    assert only_run(folder).parent.name == "f_lin"
    assert (folder / "model_cnn_f_lin.pth").exists()
    inside("--resume", only_run(folder), "--epochs", "2")
    run_dir = os.fsdecode(b"r\xe9")
    assert "--run-dir" in inside.error(*settings, "--run-dir", run_dir, status=2)
    assert not (folder / run_dir).exists()
