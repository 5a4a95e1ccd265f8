"""Folders of images as data sets."""

import os
import shlex
import shutil
import sys
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, write_images
from PIL import Image

from classifier.config import Config
from classifier.datasets import decode, image_cache
from classifier.datasets import folder as folder_module
from classifier.datasets.dataset import Split, resize
from classifier.datasets.folder import load_folder
from classifier.errors import UsageError, UserError

posix_only = pytest.mark.skipif(os.name != "posix", reason="Windows lets few make links")


@pytest.fixture
def photos(folder):
    write_images(folder / "photos", {"red": 40, "green": 40, "blue": 30})
    return folder / "photos"


def load(image_size=None, **settings):
    settings.setdefault("dataset", "photos")
    return load_folder(Config(**settings), image_size)


def sizes_of_splits(data):
    return [len(split.labels) for split in (data.train, data.valid, data.test)]


# ---- what is loaded ----


def test_class_folders_are_split(photos):
    data = load()
    assert data.name == "photos"
    assert data.classes == ["blue", "green", "red"]
    num_train, num_valid, num_test = sizes_of_splits(data)
    assert num_train + num_valid + num_test == 110
    for count, share in zip(data.test.labels.bincount().tolist(), (6, 8, 8), strict=True):
        assert abs(count - share) <= share // 4
    assert data.valid.labels.bincount().min() >= 2
    assert data.num_test_images == num_test
    assert data.flip_keeps_label
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.shape == (num_train, 3, 48, 48)
    assert len(data.files) == num_train + num_valid  # before validation images were held out
    for index, label in zip(data.train_indices.tolist(), data.train.labels.tolist(), strict=True):
        assert Path(data.files[index]).parent.name == data.classes[label]


def test_split_is_the_same_in_every_run_and_at_every_size(photos):
    first, second, small = load(), load(seed=5), load(image_size=20)
    for other in (second, small):
        assert other.files == first.files
        assert torch.equal(other.train_indices, first.train_indices)
    assert torch.equal(first.test.images, second.test.images)


def test_train_test_and_validation_folders(folder):
    for split, count in (("Training", 20), ("Test", 5), ("validation", 4)):
        write_images(folder / "photos" / split, {"red": count, "green": count}, seed=count)
    data = load(image_size=24)
    assert sizes_of_splits(data) == [40, 8, 10]
    assert data.train.images.shape == (40, 3, 24, 24)
    assert data.test.images.shape == (10, 3, 24, 24)
    with Image.open(folder / "photos" / "Training" / "green" / "0.png") as image:
        expected = np.asarray(image.resize((24, 24), box=(6, 0, 42, 36))).astype(int)
    pixels = data.train.images[0].permute(1, 2, 0).numpy().astype(int)
    upright = abs(pixels - expected).mean()
    transposed = abs(pixels.transpose(1, 0, 2) - expected).mean()
    assert upright < 3 < transposed


def test_train_and_test_folders_without_validation(folder):
    for split, count in (("train", 20), ("test", 5)):
        write_images(folder / "photos" / split, {"red": count, "green": count}, seed=count)
    assert sizes_of_splits(load()) == [36, 4, 10]
    assert sizes_of_splits(load(val_fraction=0.0)) == [40, 0, 10]


def test_classes_of_test_and_validation_may_be_fewer_or_empty(folder):
    write_images(folder / "photos" / "train", {"blue": 20, "red": 20, "green": 20})
    write_images(folder / "photos" / "test", {"red": 5, "green": 5}, seed=1)
    write_images(folder / "photos" / "val", {"red": 5, "green": 0}, seed=2)
    data = load()
    assert data.classes == ["blue", "green", "red"]
    assert set(data.test.labels.tolist()) == {1, 2}
    assert data.valid.labels.tolist() == [2] * 5


@pytest.mark.parametrize(
    ("count", "split"), [(1, (1, 0, 0)), (2, (2, 0, 0)), (3, (2, 0, 1)), (10, (7, 1, 2))]
)
def test_how_few_images_of_a_class_are_split(photos, count, split):
    write_images(photos, {"rare": count}, seed=7)
    for i in range(12):  # identical ones are used once
        shutil.copy(photos / "rare" / "0.png", photos / "rare" / f"copy {i}.png")
    data = load()
    rare = data.classes.index("rare")
    counts = [int((each.labels == rare).sum()) for each in (data.train, data.valid, data.test)]
    assert tuple(counts) == split


def test_copies_in_two_classes_are_both_used(photos):
    for name in ("red", "green"):
        shutil.copy(photos / "red" / "0.png", photos / name / "copy.png")
    assert sum(sizes_of_splits(load())) == 111  # once in red, once in green


def test_only_the_test_images_are_kept_for_later(photos):
    """The training images are copied when they are chosen: the others have to be freed."""
    data = load(subset=10)
    kept = [cell.cell_contents for cell in data.load_test.__closure__]
    assert len(kept) == 1
    assert kept[0] is data.load_test()


def test_val_fraction_that_leaves_no_images(folder):
    write_images(folder / "photos", {"red": 4, "green": 4})
    with pytest.raises(UsageError, match="--val-fraction"):
        load(val_fraction=0.05)


@pytest.mark.parametrize("name", ["CIFAR10", "digits", "mnist", "FashionMNIST"])
def test_folder_with_the_name_of_another_data_set(folder, name):
    write_images(folder / "in" / name, {"red": 20, "green": 20})
    assert load(dataset=str(folder / "in" / name)).name == f"{name}-images"


def test_current_folder_has_its_own_name(folder, photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert load(dataset=".", data_dir=str(folder / "data")).name == "photos"


def test_home_folder_in_a_path(folder, photos, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    load(dataset="~/photos", data_dir="~/data")
    assert list((folder / "data" / ".decoded").iterdir())


# ---- image size ----


@pytest.mark.parametrize(("sides", "size"), [((20, 30), 32), ((40, 60), 48), ((300, 200), 64)])
def test_image_size_follows_the_images(folder, capsys, sides, size):
    write_images(folder / "photos", {"red": 10, "green": 10}, sides)
    assert load().train.images.shape[2:] == (size, size)
    out = capsys.readouterr().out
    assert f"{size} by {size} pixels" in out
    assert ("times the work" in out) == (size > 32)
    assert "--image-size" in out


def test_image_size_of_the_settings_or_the_network(folder):
    write_images(folder / "photos", {"red": 10, "green": 10}, (300, 260))
    assert load(image_size=224).train.images.shape[2:] == (224, 224)
    data = load_folder(Config(dataset="photos", image_size=40), image_size=224)
    assert data.train.images.shape[2:] == (40, 40)


def test_images_of_every_data_set_are_resized_alike(folder):
    """As arrays in training and as files in prediction, except for rounding."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (4, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = resize(Split(small, torch.zeros(4)), 32).images
    for size in (24, 48):
        resized = resize(Split(images, torch.zeros(4)), size).images
        for image, expected in zip(images, resized, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "image.png")
            pixels = decode.decode(folder / "image.png", size).pixels
            difference = pixels.astype(int) - expected.permute(1, 2, 0).numpy().astype(int)
            assert abs(difference).max() <= 1


# ---- which files are images ----


def test_images_are_known_by_their_content(photos, capsys):
    (photos / "red" / "0.png").rename(photos / "red" / "0")
    (photos / "red" / "1.png").rename(photos / "red" / "1.picture")
    (photos / "red" / "phone.heic").write_bytes(b"....ftypheic....")
    data = load()
    assert data.report["images_per_class"]["all"]["red"] == 40
    assert data.report["left_out"] == [os.path.join("photos", "red", "phone.heic")]
    assert "1 .heic" in capsys.readouterr().out


def test_hidden_files_and_folders_are_ignored(photos):
    for name in (".hidden.png", ".trash/1.png", "__MACOSX/2.png", "@eaDir/3.png"):
        path = photos / "red" / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(photos / "green" / "0.png", path)
    (photos / ".git").mkdir()
    data = load()
    assert data.classes == ["blue", "green", "red"]
    assert data.report["images_per_class"]["all"]["red"] == 40
    assert not data.report["left_out"]


def test_images_in_folders_within_a_class_come_in_the_order_of_their_paths(photos):
    (photos / "red" / "1").mkdir()
    shutil.copy(photos / "green" / "0.png", photos / "red" / "1" / "z.png")
    files = [file for file in load(val_fraction=0.0).files if file.startswith("red")]
    assert files == [str(path) for path in sorted(map(Path, files))]
    assert len(files) > 25


@posix_only
def test_linked_folders_are_walked_once(folder):
    write_images(folder / "elsewhere", {"a": 12}, seed=1)
    write_images(folder / "photos", {"red": 10, "green": 10, "red/@eaDir": 1})
    red = folder / "photos" / "red"
    (red / "linked").symlink_to(folder / "elsewhere")
    (folder / "elsewhere" / "a" / "back").symlink_to(folder / "elsewhere")  # a circle
    (red / "up").symlink_to(folder / "photos")
    (red / "upper").symlink_to(folder)
    (red / "aside").symlink_to(folder / "photos" / "green")
    assert load().report["images_per_class"]["all"] == {"green": 10, "red": 22}


@posix_only
def test_class_folders_may_be_links(folder):
    write_images(folder / "elsewhere", {"red": 10, "green": 10})
    (folder / "photos").mkdir()
    for name in ("red", "green"):
        (folder / "photos" / name).symlink_to(folder / "elsewhere" / name)
    assert load().classes == ["green", "red"]


@posix_only
def test_what_is_no_file_is_left_alone(folder, photos):
    os.mkfifo(photos / "red" / "pipe.png")  # opening it would block
    (photos / "red" / "link.png").symlink_to(folder / "nowhere.png")
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(load()), daemon=True)
    thread.start()
    thread.join(60)
    assert loaded
    assert loaded[0].report["images_per_class"]["all"]["red"] == 40
    assert not loaded[0].report["left_out"]


# ---- what is refused ----

OTHER_NAMES = {f"seg_{split}/{name}": 3 for split in ("train", "test") for name in ("a", "seg_x")}
NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("images", "words"),  # in each folder so many images
    [
        ({}, ["photos", "no class folders"]),
        ({"red": 3}, ["photos", "1 class folder"]),
        ({"red": 3, "green": 3, "yellow": 0}, ["yellow"]),
        ({"red?": 3, "green": 3}, ["'red?'"]),
        ({"con": 3, "green": 3}, ["'con'"]),
        ({"it\x92s": 3, "green": 3}, [r"'it\x92s'"]),
        ({NOT_UTF8: 3, "green": 3}, [r"'caf\udce9'"]),
        ({"blue": 3, "red": 3, "train": 0}, ["train/", "blue/"]),
        (
            {f"{split}/{name}": 3 for split in ("train", "val", "valid") for name in "ab"},
            ["val and valid"],
        ),
        ({"red": 3, "red/test": 3, "green": 3, "green/test": 3}, ["inside the class folders"]),
        (
            {f"{outer}/{name}": 3 for outer in ("first", "second") for name in ("blue", "green")},
            ["photos", "blue and green"],
        ),
        (OTHER_NAMES, ["seg_test and seg_train"]),
        ({"test/red": 3, "test/green": 3}, ["test", "no train/"]),
        (
            {"train/red": 3, "train/green": 3, "test/red": 3, "test/yellow": 3},
            ["test has a class yellow"],
        ),
        (
            {"train/red": 3, "train/green": 3, "test/red": 3, "test/green": 0},
            [os.path.join("test", "green")],
        ),
        ({"red": 3, "green": 3, ".": 1}, ["0.png"]),
        ({"train/red": 3, "train/green": 3, "train": 1}, ["0.png"]),
        ({"train/red": 3, "train/green": 3, "val": 1}, ["0.png", "val"]),
        ({"train/red": 3, "train/green": 3, "test": 1, "test/red": 1}, ["0.png", "test"]),
        ({"photos": 3, "photos/red": 3, "photos/green": 3}, ["photos", "1 class folder"]),
        ({"red": 2, "green": 2, "blue": 2}, ["photos", "test"]),
    ],
)
def test_folder_that_is_no_data_set(folder, images, words):
    if os.name == "nt" and {"red?", "con", "it\x92s"} & images.keys():
        pytest.skip("Windows has no such folders")
    if NOT_UTF8 in images and not sys.platform.startswith("linux"):
        pytest.skip("there are no such folders")
    (folder / "photos").mkdir()
    write_images(folder / "photos", images)
    with pytest.raises(UserError) as caught:
        load()
    for word in words:
        assert word in str(caught.value)


def test_missing_folder_is_named(folder):
    with pytest.raises(UserError, match="nowhere"):
        load(dataset="nowhere")


def test_classes_may_be_called_like_splits(folder):
    write_images(folder / "photos", {"bullet_train": 10, "test_tube": 10})
    assert load().classes == ["bullet_train", "test_tube"]


@pytest.mark.parametrize("names", [["bus", "train_test"], ["test_train", "val_test"]])
def test_classes_may_be_called_like_several_splits(folder, names):
    """Then they are no splits, even with folders within."""
    write_images(folder / "photos", {f"{name}/inner {name}": 10 for name in names})
    assert load().classes == names


@pytest.mark.parametrize(
    ("images", "inner"),
    [
        (["photos/red", "photos/green"], "photos"),
        (["photos/photos/red", "photos/photos/green"], "photos/photos"),
        ([f"photos/{split}/{name}" for split in ("train", "test") for name in "ab"], "photos"),
        (["photos/train/red", "photos/train/green"], "photos"),
        (["photos/red/2019", "photos/red/2020", "photos/green/2020"], "photos"),
        (["only/2019", "only/2020"], "only"),
    ],
)
def test_folder_in_a_folder_as_unpacked_from_a_zip(folder, images, inner, capsys):
    for seed, image in enumerate(images):
        write_images(folder / "photos", {image: 12}, seed=seed)
    (folder / "photos" / "__MACOSX" / "photos").mkdir(parents=True)
    (folder / "photos" / "README.txt").touch()
    data = load()
    assert data.name == "photos"
    parts = [Path(path).parts for path in [*data.files, *data.test_files]]
    inner_parts = tuple(inner.split("/"))
    assert all(each[: len(inner_parts)] == inner_parts for each in parts)
    depth = len(inner_parts) + ("train" in images[0])
    assert data.classes == sorted({each[depth] for each in parts})
    assert f"note: photos holds nothing but {Path('photos', inner)}" in capsys.readouterr().out
    load_folder(Config(dataset=str(Path("photos", inner))))
    assert "holds nothing but" not in capsys.readouterr().out


def test_test_images_without_labels_are_left_alone(folder, capsys):
    write_images(folder / "my photos" / "train", {"red": 20, "green": 20})
    images = {"test_batch": 7}
    write_images(folder, images, seed=1)
    (folder / "test_batch").rename(folder / "my photos" / "test")
    data = load(dataset="my photos")
    out = capsys.readouterr().out
    test = Path("my photos", "test")
    assert f"note: {test} has no class folders: its 7 images" in out
    if os.name == "posix":
        command = out.partition("predict them with: ")[2].splitlines()[0]
        *_, tool, named = shlex.split(command)
        assert Path(tool).samefile(REPOSITORY / "inference.py") and Path(named) == test
    assert sum(sizes_of_splits(data)) == 40
    assert len(data.test.labels) > 0
    assert all(Path(path).parts[0] == "train" for path in data.test_files)


@posix_only
def test_folder_that_links_to_itself(folder):
    (folder / "photos").mkdir()
    (folder / "photos" / "again").symlink_to(folder / "photos")
    with pytest.raises(UserError, match="class folder"):
        load()


# ---- names of classes ----

CAFE, CAFE_IN_PARTS = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def make_folders(folder, names):
    """Make folders of these names; the test is skipped where two of them are one."""
    for name in names:
        try:
            (folder / name).mkdir(parents=True)
        except FileExistsError:
            pytest.skip("these names are one folder here")


@pytest.mark.parametrize(
    "names", [("Cat", "cat"), (CAFE, CAFE_IN_PARTS), (CAFE.upper(), CAFE_IN_PARTS)]
)
@pytest.mark.parametrize("where", ["", "train", "test"])
def test_two_classes_of_one_name_are_named(folder, names, where):
    """Files are named after classes, and some systems know no difference."""
    images = {"red": 3, "green": 3}
    if where == "test":
        write_images(folder / "photos" / "train", {**images, **dict.fromkeys(names, 3)})
    make_folders(folder / "photos" / where, names)
    write_images(folder / "photos" / where, {**images, **dict.fromkeys(names, 3)})
    with pytest.raises(UserError) as caught:
        load()
    for name in names:
        assert name in str(caught.value) or ascii(name) in str(caught.value)


@pytest.mark.parametrize(("first", "second"), [(CAFE, CAFE_IN_PARTS), (CAFE_IN_PARTS, CAFE)])
def test_class_is_the_same_in_both_forms_of_its_name(folder, first, second):
    write_images(folder / "photos" / "train", {first: 10, "red": 10})
    write_images(folder / "photos" / "test", {second: 5, "red": 5}, seed=1)
    data = load()
    assert data.classes == [CAFE, "red"]
    assert data.test.labels.bincount().tolist() == [5, 5]


def test_order_of_classes_is_that_of_their_composed_names(folder):
    write_images(folder / "photos", {CAFE_IN_PARTS: 10, "cafz": 10, "zoo": 10})
    assert load().classes == ["cafz", CAFE, "zoo"]


def test_class_that_differs_in_case_between_splits_is_named(folder):
    write_images(folder / "photos" / "train", {"Cat": 3, "dog": 3})
    write_images(folder / "photos" / "test", {"cat": 3, "dog": 3}, seed=1)
    with pytest.raises(UserError, match="class cat .* Cat"):
        load()


@pytest.mark.parametrize(
    ("count", "words"), [(6, ["6 of 110", "0.png"]), (40, ["photos", "class red"])]
)
def test_too_many_unreadable_images(photos, count, words):
    for i in range(count):
        (photos / "red" / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load()
    for word in words:
        assert word in str(caught.value)


def test_folder_that_cannot_be_read_is_an_error(photos, monkeypatch):
    """Rather than a class that is smaller than it is."""
    (photos / "red" / "inner").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="--dataset photos: .*inner"):
        load()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), ValueError("mmap"), RuntimeError()]
)
def test_errors_while_loading_name_the_option(photos, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(image_cache.DecodedCache, "fill", fail)
    with pytest.raises(UserError, match="--dataset photos") as caught:
        load()
    assert ("make room" in str(caught.value)) == isinstance(error, OSError)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: no memory")])
def test_too_little_memory_is_not_blamed_on_the_folder(photos, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(image_cache.DecodedCache, "fill", fail)
    with pytest.raises(type(error)):
        load()


@posix_only
def test_names_of_files_do_not_control_the_terminal(photos, capsys):
    shutil.copy(photos / "red" / "0.png", photos / "red" / "copy\x1b[2J.png")
    shutil.copy(photos / "red" / "0.png", photos / "green" / "copy\x1b[2J.png")
    (photos / "red" / "notes\x1b[2J.txt").write_text("no image")
    (photos / "blue" / "broken\x1b[2J.png").write_text("no image")
    words = "\n".join(load().report["words"])
    out = capsys.readouterr().out
    assert r"notes\x1b[2J.txt" in out
    assert r"copy\x1b[2J.png" in words and r"broken\x1b[2J.png" in words
    assert "\x1b" not in out + words


def test_many_images_stay_on_disk(photos, monkeypatch):
    num_bytes = 110 * 3 * 48 * 48
    for limit, in_memory in ((num_bytes, True), (num_bytes - 1, False)):
        monkeypatch.setattr(folder_module, "MAX_BYTES_IN_MEMORY", limit)
        assert isinstance(load().train.images, torch.Tensor) == in_memory
