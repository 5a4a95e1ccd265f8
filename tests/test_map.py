"""The map that a folder's images are decoded into: each once, whatever happens; and training that reads from it."""

import os
import re
import shutil
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_photos, same, wait_for, weights, write_images
from PIL import Image

import image_classification as ic
from alternatives import datasets

SLOWLY = """
import time
from alternatives import datasets
datasets.WRITTEN, datasets.THREADS, decode = 0, 2, datasets.decode
datasets.decode = lambda path, size: (time.sleep(0.05), decode(path, size))[1]
"""
CHECKSUM = """
import zlib
print(zlib.crc32(ic.load_data(ic.Config(dataset="photos")).train.images.numpy().tobytes()))
sys.exit()
"""
QUICKLY = ["--dataset", "photos", "--width", "0.25", "--epochs", "2", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, folder):
    """What is decoded does not go into this repository's data/, nor into the user's cache."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that have been decoded, which happens as ever."""
    names, decode = [], datasets.decode
    monkeypatch.setattr(datasets, "decode", lambda path, size: (names.append(path.name), decode(path, size))[1])
    return names


def the_map(folder):
    (path,) = folder.glob("data/.decoded/*/index")
    return path.parent


def held(folder):
    """How many images are in the map."""
    return sum(path.stat().st_size for path in folder.glob("data/.decoded/*/index")) / datasets.RECORD.itemsize


def check_whole(folder, data):
    """Every image that is learned is what its file holds."""
    for file, image in zip([data.files[int(place)] for place in data.kept], data.train.images, strict=True):
        there = datasets.decode(folder / "photos" / file, image.shape[-1]).pixels
        assert np.array_equal(image.permute(1, 2, 0).numpy(), there), file


def test_images_are_decoded_once(folder, photos, decoded, capsys):
    first = load_photos()
    assert len(decoded) == 110 and "Decoding 110 images, once, into" in capsys.readouterr().out
    check_whole(folder, first)
    decoded.clear()
    second = load_photos()
    assert not decoded and "Decoding" not in capsys.readouterr().out
    assert torch.equal(first.train.images, second.train.images) and first.report == second.report
    load_photos(image_size=20)
    assert len(decoded) == 110  # another size


def test_changed_folder_is_noticed(folder, photos, decoded):
    load_photos()
    decoded.clear()
    (photos / "red" / "0.png").unlink()
    (photos / "red" / "1.png").rename(photos / "green" / "new.png")
    Image.new("RGB", (48, 36), "white").save(photos / "blue" / "2.png")
    os.utime(photos / "blue" / "3.png", (0, 0))
    Image.open(photos / "blue" / "4.png").save(photos / "blue" / "twin.jpg", quality=80)
    for _ in range(2):
        data = load_photos(val_fraction=0.0)
        assert sorted(decoded) == ["2.png", "3.png", "new.png", "twin.jpg"]
        assert data.report["images_per_class"]["all"] == {"blue": 31, "green": 41, "red": 38}
        ((one, other, kind),) = data.report["twins"]
        assert (Path(one).name, Path(other).name, kind) == ("4.png", "twin.jpg", "near-identical")
    check_whole(folder, data)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_stopped_decoding_goes_on_where_it_was(program, folder, photos, decoded):
    process = program.start(*QUICKLY, patch=SLOWLY)
    wait_for(lambda: held(folder) >= 40 or process.poll() is not None)
    process.kill()
    process.communicate()
    kept = int(held(folder))
    data = load_photos()
    assert 40 <= kept < 110 and len(decoded) == 110 - kept
    check_whole(folder, data)


def test_half_written_map_is_mended(folder, photos, decoded):
    load_photos()
    for name, length in (("images", -1000), ("index", -100)):
        path = the_map(folder) / name
        os.truncate(path, path.stat().st_size + length)
    (the_map(folder) / "near.npz").write_bytes(b"")
    decoded.clear()
    data = load_photos()
    assert len(decoded) == 2
    check_whole(folder, data)


def test_two_processes_decode_each_image_once(program, folder, photos):
    processes = [program.start(patch=SLOWLY + CHECKSUM) for _ in range(2)]
    out = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], out
    assert sum("Another process is decoding these images" in each for each in out) == 1
    assert held(folder) == 110
    data = load_photos()
    check_whole(folder, data)
    checksum = str(zlib.crc32(data.train.images.numpy().tobytes()))
    assert [each.splitlines()[-1] for each in out] == [checksum, checksum]


def test_unwritable_data_folder_falls_back_to_one_that_is_not(inside, folder, photos, unwritable, decoded):
    (folder / "data").mkdir()
    unwritable(folder / "data")
    out, _ = inside(*QUICKLY)
    assert re.search("^note: data.* cannot be written: the decoded images are in .*home", out, re.MULTILINE)
    assert list((folder / "home" / ".cache" / "image_classification" / ".decoded").glob("photos-*/images"))
    decoded.clear()
    load_photos()
    assert not decoded


def test_map_in_a_folder_that_is_only_read(folder, photos, unwritable, decoded, capsys):
    """As a teacher would give it to a class."""
    load_photos()
    decoded.clear()
    for path in (the_map(folder), *the_map(folder).iterdir()):
        unwritable(path)
    load_photos()
    assert not decoded and "cannot be written" not in capsys.readouterr().out


def test_full_disk_while_decoding(inside, folder, photos, small_disk, decoded, monkeypatch):
    disk = small_disk(600)
    monkeypatch.setattr(datasets, "WRITTEN", 0)
    monkeypatch.setattr(datasets, "THREADS", 2)
    error = inside.error(*QUICKLY, "--data-dir", "disk")
    assert "No space left on device" in error and ".decoded" in error
    (folder / "data").mkdir()
    shutil.copytree(disk / ".decoded", folder / "data" / ".decoded")  # what a larger disk would have
    decoded.clear()
    data = load_photos()
    assert 0 < len(decoded) < 110
    check_whole(folder, data)


@pytest.mark.parametrize("options", [
    "--val-fraction 0", "--subset 50 --class-balance oversample",
    "--make-imbalanced 0.5 --augment flip,crop=2,erase --test-views 6",
])  # fmt: skip
def test_training_from_the_map_is_the_same_as_from_memory(inside, photos, monkeypatch, options):
    outs = []
    for name, most in (("memory", datasets.HELD), ("map", 0)):
        monkeypatch.setattr(datasets, "HELD", most)
        out, _ = inside(*QUICKLY, *options.split(), "--run-dir", name)
        lines = [line for line in out.splitlines() if line.startswith(("Epoch", "Acc"))]
        outs.append([line.partition(", train acc")[0] for line in lines])
    assert outs[0] == outs[1] and len(outs[0]) >= 6
    assert same(*(weights(f"{name}/model_cnn_photos.pth") for name in ("memory", "map")))
    assert isinstance(load_photos().train.images, datasets.Mapped)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no such file here")
def test_map_is_read_without_reading_ahead(folder, photos, monkeypatch):
    monkeypatch.setattr(datasets, "HELD", 0)
    data = load_photos()

    def flags():
        mapping = Path("/proc/self/smaps").read_text().partition(str(the_map(folder) / "images"))[2]
        return mapping.partition("VmFlags: ")[2].partition("\n")[0].split()

    assert flags() and "rr" not in flags()
    ic.Trainer(ic.settle(ic.Config(dataset="photos"), data), data, torch.device("cpu"))
    assert "rr" in flags()


def test_tools_read_from_the_map(folder, photos, monkeypatch, inside, tool_inside):
    monkeypatch.setattr(datasets, "HELD", 0)
    inside(*QUICKLY, "--epochs", "6", "--keep-epochs", "--run-dir", "run", "--image-size", "24")
    assert "Epoch 0006" in inside("--resume", "run", "--epochs", "7")[0]
    for options in ([], ["--label-issues"], ["--animate", "run"]):
        tool_inside("explain")(*options)
    tool_inside("export")("--int8")
    assert (folder / "explained" / "label_issues.csv").exists() and list(folder.glob("*-int8.onnx"))


def test_broken_files_are_remembered(folder, decoded, capsys):
    write_images(folder / "photos", {"red": 200, "green": 200})
    (folder / "photos" / "red" / "0.png").write_text("no image")
    first = load_photos().report["unreadable"]
    assert len(first) == 1 and len(decoded) == 400
    decoded.clear()
    capsys.readouterr()
    assert load_photos().report["unreadable"] == first and not decoded and "Decoding" not in capsys.readouterr().out


def test_file_that_could_not_be_read_at_that_moment_is_tried_again(folder, decoded, monkeypatch):
    write_images(folder / "photos", {"red": 200, "green": 200})
    (folder / "photos" / "red" / "1.png").write_text("no image")
    decode, moments = datasets.decode, [OSError(5, "Input/output error"), MemoryError()]

    def failing(path, size):
        if path.name == "0.png" and moments:
            raise moments.pop()
        return decode(path, size)

    monkeypatch.setattr(datasets, "decode", failing)
    reasons = load_photos().report["unreadable"].values()
    assert {"MemoryError", "[Errno 5] Input/output error"} < set(reasons) and len(reasons) == 3
    (broken,) = load_photos().report["unreadable"]
    assert Path(broken).name == "1.png" and decoded.count("0.png") == 2


def test_map_that_is_mostly_of_files_that_are_gone_begins_anew(folder, photos):
    load_photos()
    for path in photos.rglob("*.png"):
        os.utime(path, (0, 0))
    load_photos()
    assert held(folder) == 220
    for path in [*photos.rglob("*.png")]:
        os.utime(path, (1, 1)) if int(path.stem) < 20 else path.unlink()
    check_whole(folder, load_photos())
    assert held(folder) == 60


def test_damaged_map_is_named(folder, photos, inside):
    load_photos()
    path = the_map(folder) / "images"
    path.write_bytes(bytes(path.stat().st_size))
    assert "damaged: delete that folder and run again" in inside.error(*QUICKLY)


def test_class_folders_in_the_data_folder_itself(folder, photos):
    photos.rename(folder / "data")
    for _ in range(2):
        assert ic.load_data(ic.Config(dataset="data")).classes == ["blue", "green", "red"]


def test_images_in_folders_within_a_class_come_in_the_order_of_their_paths(photos):
    (photos / "red" / "1").mkdir()
    (photos / "red" / "1" / "z.png").write_bytes((photos / "green" / "0.png").read_bytes())
    files = [file for file in load_photos(val_fraction=0.0).files if file.startswith("red")]
    assert files == [str(path) for path in sorted(map(Path, files))] and len(files) > 25


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_what_is_no_file_is_left_alone(folder, photos):
    os.mkfifo(photos / "red" / "pipe.png")  # who opens it waits for ever
    (photos / "red" / "link.png").symlink_to(folder / "nowhere.png")
    found = []
    thread = threading.Thread(target=lambda: found.append(load_photos()), daemon=True)
    thread.start()
    thread.join(60)
    assert found and found[0].report["images_per_class"]["all"]["red"] == 40


def test_many_images_are_not_compared_each_with_each(photos, monkeypatch):
    monkeypatch.setattr(datasets, "MOST_COMPARED", 100)
    shutil.copy(photos / "red" / "0.png", photos / "red" / "copy.png")
    report = load_photos().report
    assert [kind for *_, kind in report["twins"]] == ["identical"]
    said = "1 pair of identical images; identical ones of a class are used once. 110 are too many to look for near"
    assert said in "\n".join(report["words"])
