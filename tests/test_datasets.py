"""Other data sets: those of torchvision, from files in their own formats, and folders of images with their faults."""

import functools
import json
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_photos, only_run, report_of, write_images
from PIL import Image
from scipy.io import savemat

import image_classification as ic
from alternatives import datasets

QUICKLY = ["--width", "0.25", "--epochs", "1"]


def drawn(count, size, seed=0):
    """Images (N, 3, size, size), lighter above, and labels to learn: the brighter, the later the class."""
    labels = np.arange(count) % 10
    noise = np.random.default_rng(seed).integers(0, 10, (count, 3, size, size))
    noise[:, :, : size // 2] += 10
    return (noise + 23 * labels[:, None, None, None]).astype(np.uint8), labels.astype(np.uint8)


# ---- by name ----


def write_cifar100(folder):
    base = folder / "cifar-100-python"
    base.mkdir()
    for name, count in (("train", 200), ("test", 50)):
        images, labels = drawn(count, 32)
        content = {"data": images.reshape(count, -1), "fine_labels": labels.tolist()}
        (base / name).write_bytes(pickle.dumps(content))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))


def write_mnist(folder, name="MNIST"):
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 200), ("t10k", 50)):
        images, labels = drawn(count, 28)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images[:, 0].tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())


def write_svhn(folder):
    for part, count in (("train", 200), ("test", 50)):
        images, labels = drawn(count, 32)
        labels = np.where(labels == 0, 10, labels)  # as there
        savemat(folder / f"{part}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]})


def write_stl10(folder):
    base = folder / "stl10_binary"
    base.mkdir()
    (base / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    (base / "fold_indices.txt").write_text("0 1 2\n")
    (base / "unlabeled_X.bin").touch()
    for part, count in (("train", 60), ("test", 20)):
        images, labels = drawn(count, 96)
        (base / f"{part}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        (base / f"{part}_y.bin").write_bytes((labels + 1).tobytes())


WRITERS = {"cifar100": write_cifar100, "mnist": write_mnist, "svhn": write_svhn, "stl10": write_stl10,
           "fashion-mnist": functools.partial(write_mnist, name="FashionMNIST")}  # fmt: skip


@pytest.mark.parametrize("name", datasets.NAMES)
def test_data_set_by_name_trains_an_epoch(inside, folder, monkeypatch, name):
    WRITERS[name](folder)
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_: True)  # these are not the published files
    inside("--dataset", name, "--data-dir", folder, *QUICKLY)
    report = report_of(only_run(folder))
    kind = "FashionMNIST" if name == "fashion-mnist" else name.upper()
    assert report["dataset"] == kind and (folder / f"model_cnn_{kind}.pth").exists()
    data = ic.load_data(ic.Config(dataset=name, data_dir=str(folder)))
    assert len(data.classes) == (100 if name == "cifar100" else 10)
    assert data.mirrored == (name not in ("mnist", "svhn"))
    brightness = torch.stack([data.train.images[data.train.labels == k].float().mean() for k in range(10)])
    assert (brightness.diff() > 15).all()  # labels and images belong together
    halves = [half.float().mean() for half in data.train.images.chunk(2, dim=2)]
    assert halves[0] > halves[1] + 8  # upright
    assert data.train.images.dtype == torch.uint8 and data.train.images.shape[1] == 3
    assert ("flip" in json.loads((only_run(folder) / "config.json").read_text())["augment"]) == data.mirrored


def test_data_set_that_cannot_be_downloaded(inside, folder, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request._opener", None)  # it would remember the proxies of its first use
    error = inside.error("--dataset", "stl10")
    assert "--dataset stl10" in error and error.endswith("put stl10_binary.tar.gz into data")
    assert not list(folder.glob("runs"))


def test_data_set_whose_files_are_cut_off(inside, folder):
    write_mnist(folder / "data")
    (folder / "data/MNIST/raw/train-images-idx3-ubyte").write_bytes(b"")
    place = os.path.join("data", "MNIST", "raw")
    assert inside.error("--dataset", "mnist").endswith(f"its files in {place} are damaged: delete them and run again")


# ---- folders ----


def test_folder_of_class_folders_is_split_and_learned(inside, folder, photos):
    out, _ = inside("--dataset", "photos", "--epochs", "12", "--width", "0.25")
    assert "becomes 48 by 48 pixels" in out
    assert out.count("all: 110 images (blue 30, green 40, red 40)") == 1
    assert "Accuracy for class green is: " in out and "Accuracy for class red   is: " in out
    assert out.count(" 8 tested)") == 2 and out.count(" 6 tested)") == 1
    report = report_of(only_run(folder))
    assert report["test_accuracy"] > 0.8 and report["train_images"] == 80
    assert sum(map(sum, report["confusion_matrix"])) == 22 and set(report["recall"]) == {"red", "green", "blue"}
    assert (folder / "model_cnn_photos.pth").exists() and only_run(folder).parent.name == "photos"
    listed = json.loads((only_run(folder) / "data_report.json").read_text())
    assert listed["images_per_class"] == {"all": {"blue": 30, "green": 40, "red": 40}}
    assert ic.load_checkpoint(folder / "model_cnn_photos.pth")[1]["classes"] == ["blue", "green", "red"]
    assert "Epoch 0012" in inside("--resume", "last", "--epochs", "13")[0]


def test_train_test_and_validation_folders(folder):
    for part, count in (("Training", 20), ("Test", 5), ("validation", 4)):
        write_images(folder / "photos" / part, {"red": count, "green": count}, seed=count)
    data = load_photos(image_size=24)
    assert [len(part.labels) for part in (data.train, data.valid, data.test)] == [40, 8, 10]
    first = Image.open(folder / "photos" / "Training" / "green" / "0.png").resize((24, 24), box=(6, 0, 42, 36))
    seen = data.train.images[0].permute(1, 2, 0).numpy().astype(int)
    assert abs(seen - np.asarray(first)).mean() < 3 < abs(seen.transpose(1, 0, 2) - np.asarray(first)).mean()
    assert data.train.images.shape == (40, 3, 24, 24) == (40, *data.test.images.shape[1:])


@pytest.mark.parametrize(("sides", "size"), [((20, 30), 32), ((40, 60), 48), ((300, 200), 64)])
def test_image_size_follows_the_images(folder, capsys, sides, size):
    write_images(folder / "photos", {"red": 10, "green": 10}, sides)
    assert load_photos().train.images.shape[2:] == (size, size)
    cost = {32: "", 48: ", 2.2 times the work of CIFAR-10's 32", 64: ", 4.0 times the work of CIFAR-10's 32"}[size]
    words = f"becomes {size} by {size} pixels{cost}: its middle square, resized; --image-size N for another size"
    assert words in capsys.readouterr().out


def test_every_kind_of_image_is_read_upright(folder):
    path = folder / "image"
    half = np.zeros((60, 40, 3), np.uint8)
    half[:30] = 200  # the upper half is bright
    upright = Image.fromarray(half)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90, expand=True).save(path.with_suffix(".jpg"), exif=exif)
    upright.convert("L").save(path.with_suffix(".png"))
    upright.convert("P").save(path.with_suffix(".gif"))
    Image.fromarray(half[..., 0].astype(np.uint16) * 257).save(path.with_suffix(".tiff"))
    clear = np.dstack([np.zeros_like(half), np.where(np.arange(60) < 30, 0, 255)[:, None].repeat(40, 1)])
    Image.fromarray(clear.astype(np.uint8)).save(path.with_suffix(".webp"), lossless=True)
    for kind in ("jpg", "png", "gif", "tiff", "webp"):
        found = datasets.decode(path.with_suffix(f".{kind}"), 32)
        assert found.pixels.shape == (32, 32, 3) and found.pixels.dtype == np.uint8, kind
        top, bottom = found.pixels[:14].mean(), found.pixels[18:].mean()
        assert bottom < 5 and abs(top - (255 if kind == "webp" else 200)) < 6, (kind, top, bottom)
    assert datasets.decode(path.with_suffix(".png"), 32).size == (40, 60)
    for most in (1.0, 255.0, 1000.0):
        Image.fromarray((half[..., 0] / 200 * most).astype(np.float32)).save(path.with_suffix(".tiff"))
        found = datasets.decode(path.with_suffix(".tiff"), 32).pixels
        assert found[:14].mean() > (250 if most < 1000 else 3) and found[18:].mean() < 5, most


def test_numbers_that_are_none_are_black_and_what_is_transparent_is_white(folder):
    half = np.zeros((60, 60), np.float32)
    half[:30] = 200
    holes = half.copy()
    holes[0, :2] = np.nan, np.inf
    Image.fromarray(holes).save(folder / "holes.tiff")
    whole = datasets.decode(folder / "holes.tiff", 32).pixels
    assert abs(whole[4:14].mean() - 200) < 6 and whole[18:].mean() < 5
    Image.fromarray(half.astype(np.uint16) * 257).save(folder / "16.png", transparency=0)
    Image.fromarray(half.astype(np.uint8)).convert("P").save(folder / "palette.png", transparency=0)
    Image.fromarray(half.astype(np.uint8)).save(folder / "grey.png", transparency=0)
    for name in ("16", "palette", "grey"):
        assert datasets.decode(folder / f"{name}.png", 32).pixels[18:].mean() > 250, name


def test_faults_of_real_folders_are_reported(photos, capsys):
    write_images(photos, {"rare": 3}, seed=5)
    for name in ("red", "green"):
        shutil.copy(photos / "red" / "0.png", photos / name / "copy.png")
    Image.open(photos / "blue" / "0.png").save(photos / "blue" / "again.jpg", quality=70)
    shutil.copy(photos / "red" / "1.png", photos / "red" / "really a png.jpg")
    for name in ("red/text.jpg", "blue/.hidden.png", "blue/notes.txt"):
        (photos / name).write_text("no image")
    Image.new("RGB", (20, 30)).save(photos / "blue" / "icon.png")
    data = load_photos()
    out = "\n".join([capsys.readouterr().out, *data.report["words"]])
    assert "no format that Pillow knows: 1 file (1 .txt)" in out
    assert "cannot be read: 1 file: " in out and "text.jpg" in out
    assert "1 image is less than half as large as 48 pixels" in out
    assert "fewer than 10 images: rare (3)" in out and "differ much in size" in out
    assert "in two classes, such as " in out and "near-identical" in out
    kinds = [kind for *_, kind in data.report["twins"]]
    assert kinds.count("near-identical") == 1 and kinds.count("identical") == 3
    total = 110 + 3 + 5 - 2  # of the red copies one each is left
    assert sum(len(part.labels) for part in (data.train, data.valid, data.test)) == total


def test_twins_across_training_and_test_are_a_warning(folder):
    for part, seed in (("train", 1), ("test", 2)):
        write_images(folder / "photos" / part, {"red": 12, "green": 12}, seed=seed)
    train, test = Path("photos", "train"), Path("photos", "test")
    first, leak = train / "red" / "3.png", test / "red" / "leak.png"
    shutil.copy(first, leak)
    shutil.copy(train / "green" / "3.png", train / "green" / "again.png")  # this pair is not across
    out = "\n".join(load_photos().report["words"])
    assert f"WARNING: 1 pair across train and test, such as {first} and {leak}: the test accuracy" in out
    shutil.copytree(train, train.with_name("val"))
    leak.unlink()
    out = "\n".join(load_photos().report["words"])
    assert "WARNING: 25 pairs across train and valid" in out and "the test accuracy" not in out


@pytest.mark.parametrize(("count", "split"), [(1, (1, 0, 0)), (2, (2, 0, 0)), (3, (2, 0, 1)), (10, (7, 1, 2))])
def test_how_few_images_of_a_class_are_split(photos, count, split):
    write_images(photos, {"rare": count}, seed=7)
    for i in range(12):  # identical ones are used once
        shutil.copy(photos / "rare" / "0.png", photos / "rare" / f"copy {i}.png")
    data = load_photos()
    rare = data.classes.index("rare")
    assert tuple(int((part.labels == rare).sum()) for part in (data.train, data.valid, data.test)) == split
    words = "\n".join(data.report["words"])
    assert (f"fewer than 10 images: rare ({count})" in words) == (count < 10)


def test_images_are_known_by_what_they_hold(photos):
    (photos / "red" / "0.png").rename(photos / "red" / "0")
    (photos / "red" / "1.png").rename(photos / "red" / "1.picture")
    (photos / "red" / "phone.heic").write_bytes(b"....ftypheic....")
    data = load_photos()
    assert data.report["images_per_class"]["all"]["red"] == 40
    assert data.report["left_out"] == [os.path.join("photos", "red", "phone.heic")]


@pytest.mark.parametrize(("layout", "words"), [  # of each folder how many images lie in it
    ({}, "has no class folders"),
    ({"red": 3}, "has 1 class folder: at least two"),
    ({"red": 3, "green": 3, "yellow": 0}, "yellow holds no image: put some into it, or delete it"),
    ({"red?": 3, "green": 3}, "'red?' in"), ({os.fsdecode(b"caf\xe9"): 3, "green": 3}, r"'caf\udce9' in"),
    ({"blue": 3, "red": 3, "train": 0}, "train/ and blue/ side by side"),
    ({f"{part}/{name}": 3 for part in ("train", "val", "valid") for name in "ab"}, "has both val and valid"),
    ({"red": 3, "red/test": 3, "green": 3, "green/test": 3}, "parts of the data inside the classes?"),
    ({f"{part}/{name}": 3 for part in ("first", "second") for name in ("blue", "green")},
     "has blue and green in it: which are the classes?"),
    ({f"seg_{part}/{name}": 3 for part in ("train", "test") for name in ("blue", "seg_train")},
     "has seg_test and seg_train: parts of the data?"),
    ({"test/red": 3, "test/green": 3}, "has test, but no train/"),
    ({"train/red": 3, "train/green": 3, "test/red": 3, "test/yellow": 3}, "has a class yellow that"),
    ({"red": 3, "green": 3, ".": 1}, "0.png lies in"),
    ({"train/red": 3, "train/green": 3, "train": 1}, "0.png lies in"),
    ({"red": 2, "green": 2, "blue": 2}, "no class has enough images to test with"),
])  # fmt: skip
def test_folder_that_is_no_data_set(inside, folder, layout, words):
    if "red?" in layout and os.name == "nt" or r"\ud" in words and not sys.platform.startswith("linux"):
        pytest.skip("there are no such folders")
    (folder / "photos").mkdir()
    write_images(folder / "photos", layout)
    assert words in inside.error("--dataset", "photos", *QUICKLY)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(("count", "words"), [
    (5, "5 of 110 images cannot be read, more than 1 %: mend or delete them"),
    (40, "no image of the class red can be read"),
])  # fmt: skip
def test_damaged_images(inside, folder, photos, count, words):
    for i in range(count):
        (photos / "red" / f"{i}.png").write_bytes(b"")
    assert words in inside.error("--dataset", "photos", *QUICKLY)
    assert not (folder / "runs").exists()


def test_a_name_wins_over_a_folder(folder):
    write_images(folder / "digits", {"red": 20, "green": 20})
    assert ic.load_data(ic.Config(dataset="digits")).classes == [str(i) for i in range(10)]
    assert ic.load_data(ic.Config(dataset="./digits")).classes == ["green", "red"]


def test_near_identical_images_stay_on_one_side_of_the_split(folder):
    write_images(folder / "photos", {"red": 30, "green": 30})
    for path in [*folder.rglob("*.png")]:
        Image.open(path).save(path.with_suffix(".jpg"), quality=80)
    data = load_photos(val_fraction=0.0)
    assert len(data.report["twins"]) == 60 and 12 < len(data.test.labels) < 36
    train, test = (part.images.flatten(1).float() for part in (data.train, data.test))
    assert torch.cdist(test, train, p=1).min() / test.shape[1] > 255 * 0.03


def test_unseen_class_is_not_called_the_worst(inside, folder):
    """Whatever its name: scikit-learn's report has rows of its own called accuracy and macro avg."""
    write_images(folder / "photos" / "train", {"red": 20, "green": 20, "accuracy": 20})
    write_images(folder / "photos" / "test", {"red": 5, "green": 5}, seed=1)
    out, _ = inside("--dataset", "photos", "--width", "0.25", "--epochs", "3")
    assert "Accuracy for class accuracy is: 0.0 %  (not tested)" in out and "worst class: accuracy" not in out
    assert "Accuracy for class red      is: " in out  # as wide as the longest


def test_classes_may_be_called_like_parts(folder):
    write_images(folder / "photos", {"bullet_train": 10, "test_tube": 10})
    assert load_photos().classes == ["bullet_train", "test_tube"]


def test_class_names_are_shown_as_they_are(inside, folder, recwarn):
    write_images(folder / "photos", {"under_$10": 10, "$10_$20": 10, "\u718a": 10})
    assert "Accuracy for class under_$10 is: " in inside("--dataset", "photos", *QUICKLY)[0]
    assert not [each for each in recwarn if "Glyph" in str(each.message)]


@pytest.mark.skipif(os.name != "posix", reason="Windows lets few make links")
def test_linked_folders_are_walked_once(folder):
    write_images(folder / "elsewhere", {"a": 12}, seed=1)
    write_images(folder / "photos", {"red": 10, "green": 10, "red/@eaDir": 1})
    (folder / "photos" / "red" / "linked").symlink_to(folder / "elsewhere")
    (folder / "elsewhere" / "a" / "back").symlink_to(folder / "elsewhere")  # a circle
    for name, target in (("up", folder / "photos"), ("upper", folder), ("aside", folder / "photos" / "green")):
        (folder / "photos" / "red" / name).symlink_to(target)
    assert load_photos().report["images_per_class"]["all"] == {"green": 10, "red": 22}


def test_changed_folder_is_not_resumed(inside, folder, photos):
    inside("--dataset", "photos", *QUICKLY)
    assert "Epoch 0001" in inside("--resume", "last", "--dataset", "photos", "--epochs", "2")[0]
    write_images(folder / "other", {"red": 5, "green": 1}, seed=9)
    for path in (folder / "other" / "red").iterdir():
        shutil.copy(path, photos / "red")  # as many as before, five of them others
    report = (only_run(folder) / "report.json").read_bytes()
    assert "the images are others than when" in inside.error("--resume", "last", "--epochs", "3")
    assert (only_run(folder) / "report.json").read_bytes() == report


def test_folder_with_the_name_of_a_data_set(inside, folder):
    write_images(folder / "in" / "CIFAR10", {"red": 20, "green": 20})
    (folder / "model_cnn.pth").write_text("precious")
    inside("--dataset", folder / "in" / "CIFAR10", *QUICKLY)
    assert (folder / "model_cnn.pth").read_text() == "precious" and (folder / "model_cnn_CIFAR10-images.pth").exists()


def test_photographs_keep_their_detail_for_imagenet_weights(folder):
    write_images(folder / "photos", {"red": 8, "green": 8}, (300, 260))
    for model, size in (("resnet18", 224), ("efficientnet_v2_s", 384)):
        assert load_photos(model=f"torchvision:{model}", pretrained=True).train.images.shape[-1] == size


@pytest.mark.parametrize(("count", "pairs", "tested"), [
    (30, [[0, 9], [8, 9]], 6 + 2), (10, [[0, i] for i in range(1, 10)], 0),
], ids=["a chain", "a whole class"])  # fmt: skip
def test_near_identical_images_are_for_one_purpose(folder, monkeypatch, count, pairs, tested):
    """Of a chain, two are like a third, not like each other; a class that is all alike is trained on."""

    def first_for_testing(labels, fraction):
        places = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
        held = torch.cat([each[: round(len(each) * fraction)] for each in places])
        return torch.tensor([i for i in range(len(labels)) if i not in held]), held

    write_images(folder / "photos", {"red": 30, "green": count})
    monkeypatch.setattr(ic, "split_off", first_for_testing)
    monkeypatch.setattr(datasets, "near_identical", lambda *given: np.array(pairs))
    data = load_photos(val_fraction=0.0)
    labels = [part.labels.tolist().count(data.classes.index("green")) for part in (data.train, data.test)]
    assert labels == [count - tested, tested]


@pytest.mark.parametrize(("accuracy", "hint"), [(0.8, False), (0.5, True), (0.0, True)])
def test_two_classes_told_apart_are_no_guessing(inside, folder, monkeypatch, accuracy, hint):
    write_images(folder / "photos", {"red": 20, "green": 20})
    known = torch.eye(2)
    monkeypatch.setattr(ic, "evaluate", lambda net, x, labels, *_, **__: ic.Evaluation(0.5, accuracy, known[labels]))
    assert ("hardly better than guessing" in inside("--dataset", "photos", *QUICKLY)[0]) == hint


def test_few_photographs_are_enough_to_tune_a_pretrained_network(inside, folder, imagenet):
    write_images(folder / "photos", {"red": 12, "green": 12})
    model = ["--model", "torchvision:squeezenet1_1", "--image-size", "32", "--epochs", "1"]
    out, _ = inside("--dataset", "photos", "--recipe", "finetune", *model)
    assert ", 2 steps an epoch" in out and "Done in" in out


@pytest.mark.parametrize(("count", "batch", "epochs"), [(80, 16, 30), (1000, 64, 19), (20_000, 64, 5)])
def test_pretrained_network_takes_some_hundred_steps(count, batch, epochs):
    split = ic.Split(torch.zeros(1, 3, 64, 64, dtype=torch.uint8).expand(count, -1, -1, -1), torch.zeros(count))
    data = ic.Data("photos", ["a", "b"], split, split, lambda: None, 10, True, [0.5] * 3, [0.5] * 3)
    config = ic.settle(ic.configure(recipe="finetune"), data)
    assert (config.batch_size, config.epochs) == (batch, epochs)
    assert ic.settle(ic.configure(recipe="finetune"), ic.replace(data, name="CIFAR10")).epochs == epochs


def test_other_networks_train_small_folders_as_long_as_ours(photos):
    data = load_photos()
    for model in ("cnn", "resnet18"):
        assert ic.settle(ic.Config(dataset="photos", model=model), data).epochs == 60


def test_images_of_every_data_set_are_resized_alike(cifar10, folder):
    """As arrays in training and as files in inference.py: but for what rounding leaves."""
    images = ic.load_data(ic.Config(dataset="cifar10", data_dir=str(cifar10), subset=20)).train.images
    for size in (24, 48):
        for image, there in zip(images, ic.resized(ic.Split(images, images), size).images, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "image.png")
            here = torch.from_numpy(datasets.decode(folder / "image.png", size).pixels.copy()).permute(2, 0, 1)
            assert (here.int() - there.int()).abs().max() <= 1
