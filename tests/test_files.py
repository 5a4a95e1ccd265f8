"""Files that are written whole, and places that are tried before the work."""

import csv
import os
import sys

import pytest
from conftest import only_run, write_images

from classifier.files import prepare_file, prepare_folder, write_csv
from classifier.text import has_control_characters, is_url, printable


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
    for path in (folder / "kept" / "a.png", folder / "file" / "a.png", folder / "kept"):
        with pytest.raises(OSError) as caught:
            prepare_file(path)
        assert caught.value.filename == str(path)
    with pytest.raises(OSError) as caught:
        prepare_folder(folder / "kept" / "new")
    assert "kept" in caught.value.filename


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
