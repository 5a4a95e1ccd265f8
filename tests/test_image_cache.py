"""The cache of decoded images: each file is decoded once, whatever happens."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from conftest import wait_for, write_images
from PIL import Image, UnidentifiedImageError

from classifier.config import Config
from classifier.datasets import cache_folders, decode, image_cache, image_records
from classifier.datasets import folder as folder_module
from classifier.datasets.dataset import same_images
from classifier.datasets.folder import load_folder
from classifier.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
FORMATS = decode.formats()
LOAD_SLOWLY = """
import time, zlib
from classifier.config import Config
from classifier.datasets import decode, folder, image_cache

image_cache.WRITE_BYTES = 0
image_cache.THREADS = 2
decode_fast = decode.decode

def decode_slowly(*arguments):
    time.sleep(0.05)
    return decode_fast(*arguments)

decode.decode = decode_slowly
data = folder.load_folder(Config(dataset="photos"))
print(zlib.crc32(data.train.images.numpy().tobytes()))
"""


@pytest.fixture(autouse=True)
def home(monkeypatch, folder):
    """A home folder without a cache of earlier runs."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))
    return folder / "home"


@pytest.fixture
def photos(folder):
    write_images(folder / "photos", {"red": 40, "green": 40, "blue": 30})
    return folder / "photos"


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded."""
    names = []
    original = decode.decode

    def decode_and_note(path, *arguments):
        names.append(path.name)
        return original(path, *arguments)

    monkeypatch.setattr(decode, "decode", decode_and_note)
    return names


def load(**settings):
    return load_folder(Config(dataset="photos", **settings))


def start_slow_process(folder):
    """Load the photos in another process, slowly; prints a checksum of the training images."""
    return subprocess.Popen(
        [sys.executable, "-c", LOAD_SLOWLY],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def the_cache(folder):
    (path,) = folder.glob("data/.decoded/*/index")
    return path.parent


def count_images(folder):
    """Number of images in the caches of the data folder."""
    paths = folder.glob("data/.decoded/*/index")
    return sum(path.stat().st_size for path in paths) / image_records.RECORD.itemsize


def check_images(folder, data):
    """Every training image is what its file holds."""
    size = data.train.images.shape[-1]
    for index, image in zip(data.train_indices.tolist(), data.train.images, strict=True):
        file = data.files[index]
        expected = decode.decode(folder / "photos" / file, size).pixels
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected), file


def test_images_are_decoded_once(folder, photos, decoded, capsys):
    first = load()
    assert len(decoded) == 110
    assert "Decoding 110 images" in capsys.readouterr().out
    check_images(folder, first)
    decoded.clear()
    second = load()
    assert not decoded
    assert "Decoding" not in capsys.readouterr().out
    assert torch.equal(first.train.images, second.train.images)
    assert first.report == second.report
    load(image_size=20)
    assert len(decoded) == 110  # another size


def write_cache_of_091(folder):
    """A cache as version 0.9.1 lays it out, in which the first file is known to be broken.

    Its pixels are not those of the files.
    """

    def hash64(content):
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")

    photos = folder / "photos"
    identity = hash64(os.fsencode(f"{photos.resolve()} 2"))
    cache = folder / "data" / ".decoded" / f"photos-48-{identity:016x}"
    cache.mkdir(parents=True)
    paths = sorted(path.relative_to(photos) for path in photos.rglob("*.png"))
    keys = []
    for path in paths:
        status = (photos / path).stat()
        keys.append(hash64(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}")))

    random = np.random.default_rng(5)
    pixels = random.integers(0, 256, (len(paths) - 1, 48, 48, 3), dtype=np.uint8)
    layout = [
        ("key", "<u8"),
        ("digest", "<u8"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("sketch", "u1", 32),
    ]
    records = np.zeros(len(pixels), layout)
    records["key"] = keys[1:]
    records["digest"] = [hash64(image.tobytes()) for image in pixels]
    (cache / "images").write_bytes(pixels.tobytes())
    (cache / "index").write_bytes(records.tobytes())
    broken = {"pillow": PIL.__version__, "files": {str(keys[0]): "a reason from before"}}
    (cache / "unreadable.json").write_text(json.dumps(broken))
    of = np.uint64(hash64(records["digest"].tobytes()))
    np.savez(cache / "near.npz", of=of, pairs=np.array([[0, 3]]))
    return cache


def test_cache_of_091_is_not_used(folder, photos, decoded):
    """Its keys do not tell a file from another of the same size and time."""
    cache = write_cache_of_091(folder)
    content = {path.name: path.read_bytes() for path in cache.iterdir()}
    for _ in range(2):
        data = load()
        assert len(decoded) == 110
        assert not data.report["unreadable"] and not data.report["twins"]
    check_images(folder, data)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == content


def test_layout_on_disk_stays_the_same():
    fields = image_records.RECORD.fields.values()
    assert [offset for _, offset in fields] == [0, 8, 16, 24, 28, 32]
    assert image_records.RECORD.itemsize == 64
    assert image_records.DECODED_AS == 3
    fields = image_records.EXTREMA.fields.values()
    assert [offset for _, offset in fields] == [0, 8, 16, 24]
    assert image_records.EXTREMA.itemsize == 32


def test_content_of_files_is_known(folder, photos):
    load()
    load(image_size=20)
    for path in (folder / "data" / ".decoded").iterdir():
        index = np.fromfile(path / "index", image_records.RECORD)
        expected = {decode.hash64(file.read_bytes()) for file in photos.rglob("*.png")}
        assert set(index["content_digest"].tolist()) == expected


# ---- files that took the place of others ----


def swap_by_renaming(first, second):
    between = first.with_name("between")
    first.rename(between)
    second.rename(first)
    between.rename(second)


def swap_contents(first, second):
    """As `cp -p` does: the files stay, and keep their times."""
    first_content, second_content = first.read_bytes(), second.read_bytes()
    for path, content in ((first, second_content), (second, first_content)):
        status = path.stat()
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("has_change_time", [True, False])
@pytest.mark.parametrize("swap", [swap_by_renaming, swap_contents])
def test_files_of_one_size_and_time_that_change_places(
    folder, decoded, monkeypatch, swap, has_change_time
):
    """Labels are corrected by moving files, and uncompressed ones have all the same size."""
    if has_change_time and os.name != "posix":
        pytest.skip("there is no such time")
    monkeypatch.setattr(image_records, "HAS_CHANGE_TIME", has_change_time)
    write_images(folder / "png", {"red": 20, "green": 20})
    for path in (folder / "png").rglob("*.png"):
        bmp = folder / "photos" / path.parent.name / f"{path.stem}.bmp"
        bmp.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(bmp)
        os.utime(bmp, (10**9, 10**9))
    before = load()
    check_images(folder, before)
    decoded.clear()
    for i in range(9):
        swap(*(folder / "photos" / name / f"{i}.bmp" for name in ("red", "green")))
    after = load()
    assert len(decoded) == 18
    load()
    assert len(decoded) == 18
    check_images(folder, after)
    assert not same_images(before.fingerprint(), after.fingerprint())


def test_changed_files_are_decoded_again(folder, photos, decoded):
    load()
    decoded.clear()
    (photos / "red" / "0.png").unlink()
    (photos / "red" / "1.png").rename(photos / "green" / "new.png")
    Image.new("RGB", (48, 36), "white").save(photos / "blue" / "2.png")
    os.utime(photos / "blue" / "3.png", (0, 0))
    Image.open(photos / "blue" / "4.png").save(photos / "blue" / "twin.jpg", quality=80)
    for _ in range(2):
        data = load(val_fraction=0.0)
        assert sorted(decoded) == ["2.png", "3.png", "new.png", "twin.jpg"]
        assert data.report["images_per_class"]["all"] == {"blue": 31, "green": 41, "red": 38}
        ((first, second, kind),) = data.report["twins"]
        names = (Path(first).name, Path(second).name, kind)
        assert names == ("4.png", "twin.jpg", "near-identical")
    check_images(folder, data)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_decoding_that_was_killed_is_continued(folder, photos, decoded):
    process = start_slow_process(folder)
    wait_for(lambda: count_images(folder) >= 40 or process.poll() is not None)
    process.kill()
    process.communicate()
    kept = int(count_images(folder))
    data = load()
    assert 40 <= kept < 110
    assert len(decoded) == 110 - kept
    check_images(folder, data)


def test_half_written_cache_is_completed(folder, photos, decoded):
    load()
    for name, length in (("images", -1000), ("index", -100)):
        path = the_cache(folder) / name
        os.truncate(path, path.stat().st_size + length)
    (the_cache(folder) / "near.npz").write_bytes(b"")
    (the_cache(folder) / "unreadable.json").write_text("{")
    decoded.clear()
    data = load()
    assert len(decoded) == 2
    check_images(folder, data)


@pytest.mark.slow
def test_two_processes_decode_each_image_once(folder, photos):
    processes = [start_slow_process(folder) for _ in range(2)]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    waited = ["Another process" in out for out, _ in outputs]
    assert sorted(waited) == [False, True]
    assert count_images(folder) == 110
    data = load()
    check_images(folder, data)
    checksum = str(zlib.crc32(data.train.images.numpy().tobytes()))
    assert [out.splitlines()[-1] for out, _ in outputs] == [checksum, checksum]


def test_unwritable_data_folder_falls_back_to_the_home_folder(
    folder, home, photos, unwritable, decoded, capsys
):
    (folder / "data").mkdir()
    unwritable(folder / "data")
    load()
    assert "note: data" in capsys.readouterr().out
    assert list((home / ".cache" / "image_classification" / ".decoded").glob("photos-*/images"))
    decoded.clear()
    load()
    assert not decoded


def test_temporary_folder_is_the_last_choice(folder, photos, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    *_, last = cache_folders.cache_folders(folder / "data")
    assert last.parent == folder
    if os.name == "posix":
        assert last.stat().st_mode & 0o777 == 0o700
        monkeypatch.setattr(os, "getuid", lambda: last.stat().st_uid + 1)
        other = folder / f"image_classification-{os.getuid()}"
        other.mkdir()  # prepared by another user
        assert other not in cache_folders.cache_folders(folder / "data")


def test_no_place_can_be_written(folder, photos, monkeypatch, capsys):
    def refuse(self, *_):
        raise OSError(errno.EACCES, "Permission denied", str(self.path))

    monkeypatch.setattr(image_cache.DecodedCache, "fill", refuse)
    with pytest.raises(UserError, match="--dataset photos"):
        load()
    assert capsys.readouterr().out.count("note: ") == 2


def test_complete_cache_is_only_read(folder, photos, unwritable, decoded, capsys):
    """As a teacher would give it to a class."""
    load()
    decoded.clear()
    for path in (the_cache(folder), *the_cache(folder).iterdir()):
        unwritable(path)
    load()
    assert not decoded
    assert "cannot be written" not in capsys.readouterr().out


def test_full_disk_while_decoding(folder, photos, small_disk, decoded, monkeypatch):
    disk = small_disk(600)
    monkeypatch.setattr(image_cache, "WRITE_BYTES", 0)
    monkeypatch.setattr(image_cache, "THREADS", 2)
    with pytest.raises(UserError, match=r"--dataset photos: .*\.decoded"):
        load(data_dir="disk")
    (folder / "data").mkdir()
    shutil.copytree(disk / ".decoded", folder / "data" / ".decoded")  # as on a larger disk
    decoded.clear()
    data = load()
    assert 0 < len(decoded) < 110
    check_images(folder, data)


def test_images_left_on_disk_are_the_same_as_in_memory(photos, monkeypatch):
    in_memory = load()
    monkeypatch.setattr(folder_module, "MAX_BYTES_IN_MEMORY", 0)
    on_disk = load()
    for name in ("train", "valid", "test"):
        expected, split = getattr(in_memory, name), getattr(on_disk, name)
        images = split.images
        assert isinstance(images, image_cache.MemmapImages)
        assert images.shape == expected.images.shape
        assert len(images) == len(expected.images)
        assert torch.equal(split.labels, expected.labels)
        assert torch.equal(torch.cat(list(images.split(7))), expected.images)
    assert (on_disk.mean, on_disk.std) == (in_memory.mean, in_memory.std)


def test_views_of_images_on_disk(photos, monkeypatch):
    expected = load().train.images
    monkeypatch.setattr(folder_module, "MAX_BYTES_IN_MEMORY", 0)
    images = load().train.images
    indices = torch.tensor([5, 0, 5])
    assert torch.equal(images[3], expected[3])
    assert torch.equal(images[indices], expected[indices])
    assert isinstance(images[2:9], image_cache.MemmapImages)
    assert len(images[2:9]) == 7
    assert torch.equal(images[2:9][torch.arange(7)], expected[2:9])
    chosen = images.select(indices)
    assert isinstance(chosen, image_cache.MemmapImages)
    assert torch.equal(chosen[torch.arange(3)], expected[indices])
    assert torch.equal(images.to("cpu")[indices], expected[indices])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no such file here")
def test_images_on_disk_are_read_without_reading_ahead(folder, photos, monkeypatch):
    monkeypatch.setattr(folder_module, "MAX_BYTES_IN_MEMORY", 0)
    data = load()

    def flags():
        maps = Path("/proc/self/smaps").read_text()
        mapping = maps.partition(str(the_cache(folder) / "images"))[2]
        return mapping.partition("VmFlags: ")[2].partition("\n")[0].split()

    assert flags() and "rr" not in flags()
    data.train.images.to("cpu")
    assert "rr" in flags()


def test_broken_files_are_remembered(folder, decoded, capsys):
    write_images(folder / "photos", {"red": 200, "green": 200})
    (folder / "photos" / "red" / "0.png").write_text("no image")
    first = load().report["unreadable"]
    assert len(first) == 1
    assert len(decoded) == 400
    decoded.clear()
    capsys.readouterr()
    assert load().report["unreadable"] == first
    assert not decoded
    assert "Decoding" not in capsys.readouterr().out


@pytest.mark.parametrize("what", ["another Pillow", "a plugin"])
def test_broken_files_are_tried_again_by(folder, decoded, monkeypatch, what):
    write_images(folder / "photos", {"red": 20, "green": 20})
    (folder / "photos" / "red" / "0.png").write_text("no image")
    load()
    decoded.clear()
    if what == "another Pillow":
        monkeypatch.setattr(PIL, "__version__", "99.0")
    else:
        monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])
        monkeypatch.setattr(decode, "formats", lambda: [*FORMATS, "HEIF"])
    load()
    assert decoded == ["0.png"]


def test_files_that_failed_for_a_moment_are_tried_again(folder, decoded, monkeypatch):
    write_images(folder / "photos", {"red": 200, "green": 200})
    (folder / "photos" / "red" / "1.png").write_text("no image")
    original = decode.decode
    errors = [OSError(5, "Input/output error"), MemoryError()]

    def fail_twice(path, *arguments):
        if path.name == "0.png" and errors:
            raise errors.pop()
        return original(path, *arguments)

    monkeypatch.setattr(decode, "decode", fail_twice)
    reasons = load().report["unreadable"].values()
    assert {"MemoryError", "[Errno 5] Input/output error"} < set(reasons)
    assert len(reasons) == 3
    (broken,) = load().report["unreadable"]
    assert Path(broken).name == "1.png"
    assert decoded.count("0.png") == 2


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (MemoryError(), True),
        (OSError(5, "Input/output error"), True),
        (OSError("out of memory when reading image file"), True),  # as Pillow says it
        (OSError("broken data stream when reading image file"), False),
        (UnidentifiedImageError("cannot identify image file 'memory/0.png'"), False),
        (ValueError("in memory of"), False),
    ],
)
def test_which_errors_may_pass(error, may_pass):
    assert image_cache._may_pass(error) == may_pass


def test_cache_that_is_mostly_of_files_that_are_gone_begins_anew(folder, photos):
    load()
    for path in [*photos.rglob("*.png")][:50]:
        os.utime(path, (0, 0))
    load()
    assert count_images(folder) == 160  # 50 of them are of files as they were
    for path in [*photos.rglob("*.png")]:
        if int(path.stem) >= 20:
            path.unlink()
    load()
    assert count_images(folder) == 160  # nothing is missing
    os.utime(photos / "red" / "0.png", (1, 1))
    check_images(folder, load())
    assert count_images(folder) == 60


def test_table_of_a_few_images_leaves_the_others_in_the_cache(folder, photos):
    load()
    named = [path for path in sorted(photos.rglob("*.png")) if int(path.stem) < 10]
    rows = [f"{path.relative_to(photos).as_posix()},{path.parent.name}\n" for path in named]
    (folder / "labels.csv").write_text("file,label\n" + "".join(rows))
    os.utime(named[0], (1, 1))  # one to decode
    load(labels="labels.csv")
    assert count_images(folder) == 111


def test_damaged_cache_is_named(folder, photos):
    load()
    path = the_cache(folder) / "images"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="photos-48"):
        load()


def test_class_folders_in_the_data_folder_itself(folder, photos):
    photos.rename(folder / "data")
    for _ in range(2):
        assert load_folder(Config(dataset="data")).classes == ["blue", "green", "red"]


def test_lock_is_released(folder, photos):
    """After an error, too."""
    from filelock import FileLock

    load()
    (photos / "red" / "new.png").write_bytes((photos / "green" / "0.png").read_bytes())
    path = the_cache(folder) / "images"
    path.write_bytes(bytes(path.stat().st_size))
    with contextlib.suppress(UserError):
        load()
    with FileLock(the_cache(folder) / "lock", timeout=0):
        pass
