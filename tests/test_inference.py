"""inference.py: predictions from model files, on the command line and from Python."""

import contextlib
import json
import lzma
import os
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    QUICK,
    REPOSITORY,
    Program,
    beforehand,
    load_photos,
    save,
    table_of,
    tool,
    without,
    write_images,
)
from PIL import Image

import image_classification as ic
import inference
from classifier import devices, prediction_output
from classifier.config import Config
from classifier.datasets import decode
from classifier.datasets.cifar10 import MD5
from classifier.datasets.folder import load_folder
from classifier.errors import UserError
from classifier.metrics import softmax
from classifier.seen_images import describe_seen

OLD_FILES = Path(__file__).resolve().parent / "fixtures" / "0.9.1"
TINY = """
from torch import nn

def tiny(classes=10, channels=3, image_size=32):
    features = channels * image_size**2 // 16
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(features, classes))
"""


def probabilities(model, images):
    """The calibrated probabilities of all classes, which predict() gives the largest of."""
    return softmax(model.logits(images), model.temperature)


@pytest.fixture
def pictures(folder, model, data):
    """The current folder, with the newest model in it, and test images in the folder images/."""
    shutil.copy(model.path, folder)
    (folder / "images" / "deeper").mkdir(parents=True)
    for i in range(6):
        place = folder / "images" / ("deeper" if i % 2 else "")
        save(data.test.images[i], place / f"{i}.png")
    return folder


# ---- predictions ----


def test_same_pixels_same_probabilities_in_any_batch(model, data):
    """As in the evaluation of the whole test set: within 1e-5."""
    logits = ic.evaluate(model.network, *data.test.first(500)).logits
    expected = (logits / model.temperature).softmax(1)[:120].numpy()
    images = data.test.images[:120].numpy()
    assert np.abs(probabilities(model, images) - expected).max() < 1e-5
    for i in range(7):
        alone = probabilities(model, images[i : i + 1])
        assert np.abs(alone - expected[i]).max() < 1e-5


def test_turned_files_are_turned_back(model, data, folder):
    image = data.test.images[3].numpy()
    expected = probabilities(model, image[None])[0]
    paths = []
    for orientation, undo in enumerate([None, 0, 3, 1, 5, 2, 6, 4], 1):
        exif = Image.Exif()
        exif[274] = orientation
        picture = Image.fromarray(image.transpose(1, 2, 0))
        if undo is not None:
            picture = picture.transpose(Image.Transpose(undo))
        paths.append(folder / f"{orientation}.png")
        picture.save(paths[-1], exif=exif)
    expected_classes = dict(zip(model.classes, expected, strict=True))
    for classes in inference.predict(model, paths, top_k=len(model.classes)):
        assert dict(classes) == pytest.approx(expected_classes, rel=0, abs=1e-5)


def test_predictions_are_sorted_and_name_the_classes(model, data):
    images = data.test.images[:20].numpy()
    rows = probabilities(model, images)
    for classes, row in zip(inference.predict(model, images, top_k=4), rows, strict=True):
        assert len(classes) == 4
        confidences = [confidence for _, confidence in classes]
        assert confidences == sorted(row, reverse=True)[:4]
        for name, confidence in classes:
            assert row[model.classes.index(name)] == confidence


def test_predict_takes_paths_and_arrays(model, data, folder):
    path = save(data.test.images[0], folder / "a.png")
    expected = inference.predict(model, data.test.images[:1].numpy())
    for images in (path, str(path), [path], [str(path)]):
        assert inference.predict(model, images) == expected
    assert inference.predict(model, []) == []
    (folder / "b.png").write_text("no")
    with pytest.raises(UserError, match=r"b\.png"):
        inference.predict(model, [path, folder / "b.png"])


# ---- what predict takes ----


@pytest.fixture
def both(onnx_file):
    """The ONNX file and a network of PyTorch that computes the same."""
    on_onnx = inference.load_model(onnx_file)

    def compute(images):
        return 10 * torch.from_numpy(images).float().mean((2, 3)).numpy() / 255

    return [on_onnx, replace(on_onnx, compute_logits=compute)]


def test_all_ways_to_give_an_image_are_the_same(both, folder):
    """A picture that is not square and of another size than the network's."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture.save("a.png")
    channels_first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    for model in both:
        expected = inference.predict(model, "a.png")
        assert len(expected) == 1
        tensor = torch.from_numpy(channels_first)
        for image in (Path("a.png"), picture, pixels, tensor, pixels[::1, ::1]):
            assert inference.predict(model, image) == expected
            assert inference.predict(model, [image]) == expected
            assert inference.predict(model, (image for _ in range(2))) == 2 * expected
        mixed = ["a.png", picture, pixels, tensor]
        assert inference.predict(model, mixed) == 4 * expected
        for batch in (pixels[None], channels_first[None], tensor[None]):
            assert inference.predict(model, batch) == expected
        assert inference.predict(model, np.array(["a.png", "a.png"])) == 2 * expected
        for empty in ([], np.empty((0, 3, 8, 8), np.uint8), torch.empty(0, 3, 8, 8).byte()):
            assert inference.predict(model, empty) == []


def test_pytorch_and_onnx_see_the_same_pixels(both):
    for image in (np.full((9, 70), 200, np.uint8), np.zeros((200, 200, 3), np.uint8)):
        on_onnx, on_torch = (inference.predict(model, image) for model in both)
        for (name, confidence), other in zip(on_onnx[0], on_torch[0], strict=True):
            assert (name, pytest.approx(confidence, abs=1e-5)) == other


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "F"])
def test_pictures_of_all_modes_are_read_as_their_files_are(both, mode):
    gray = np.arange(0, 240, 0.1).reshape(40, 60) // 1
    picture = Image.fromarray(gray.astype(np.uint8))
    if mode == "I;16":
        picture = Image.fromarray((gray * 256).astype(np.uint16))
    else:
        picture = picture.convert(mode)
    picture.save("a.tif")
    for model in both:
        assert inference.predict(model, picture) == inference.predict(model, "a.tif")


def test_turned_picture_is_turned_back(both):
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = (255, 0, 0)
    Image.fromarray(pixels).save("a.png", exif=exif)
    with Image.open("a.png") as picture:
        assert inference.predict(both[0], picture) == inference.predict(both[0], "a.png")


UINT8 = np.zeros((3, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("images", "kind"),
    [
        (np.random.default_rng(0).random((8, 8, 3)), TypeError),
        (np.random.default_rng(0).random((2, 3, 8, 8), np.float32), TypeError),
        (np.full((8, 8, 3), np.nan), TypeError),
        (np.zeros((8, 8, 3), np.int64), TypeError),
        (np.zeros((8, 8, 3), bool), TypeError),
        (torch.rand(3, 8, 8), TypeError),
        (torch.rand(1, 3, 8, 8).bfloat16(), TypeError),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3))], TypeError),
        ([[0, 1], [2, 3]], TypeError),
        (None, TypeError),
        (3, TypeError),
        (b"a.png", TypeError),
        ({"a.png": 1}, TypeError),
        ([None], TypeError),
        (UINT8, ValueError),  # of an array the channels come last
        (UINT8[None, None], ValueError),
        (np.zeros((8, 8, 4), np.uint8), ValueError),
        (np.zeros((8, 8, 1), np.uint8), ValueError),
        (np.zeros((0, 8, 3), np.uint8), ValueError),
        (np.zeros((2, 8, 8, 4), np.uint8), ValueError),
        (np.zeros((2, 3, 8, 3), np.uint8), ValueError),  # nobody can tell which are the channels
        (np.zeros(3, np.uint8), ValueError),
        (torch.zeros(8, 8, 3).byte(), ValueError),
        (torch.zeros(8, 3).byte(), ValueError),
        (torch.zeros(2, 8, 8, 3).byte(), ValueError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_image_is_refused(both, images, kind):
    for model in both:
        with pytest.raises(kind, match="uint8"):
            inference.predict(model, images)


def test_what_a_network_takes_is_checked(both):
    for model in both:
        for images in (np.zeros((2, 3, 8, 8)), torch.zeros(2, 3, 8, 8).byte(), [UINT8]):
            with pytest.raises(TypeError, match="uint8|numpy"):
                model.logits(images)
        for images in (UINT8, np.zeros((2, 3, 9, 9), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)):
            with pytest.raises(ValueError, match="8, 8"):
                probabilities(model, images)
        with pytest.raises(ValueError, match="top_k"):
            inference.predict(model, UINT8[None], top_k=0)
    with pytest.raises(TypeError, match="load_model"):
        inference.predict("model.pth", UINT8[None])


@pytest.mark.pictures
def test_picture_of_an_image_and_its_classes(model, data, folder):
    path = save(data.test.images[0], folder / "a.png")
    figure = inference.visualize_predictions(model, path, torch.device("cpu"), top_k=2)
    image_axes, bar_axes = figure.axes
    assert image_axes.get_title() == "a.png"
    (classes,) = inference.predict(model, path, top_k=2)
    assert [text.get_text().split()[0] for text in bar_axes.texts] == [name for name, _ in classes]
    figure.savefig(folder / "seen.png")
    assert (folder / "seen.png").stat().st_size > 3000


def test_accuracy_of_zero_is_known_and_none_is_not(model):
    assert "recognises 0.0 %" in replace(model, test_accuracy=0.0).describe()
    assert "recognises" not in replace(model, test_accuracy=None).describe()


# ---- the command line ----


def test_images_and_folders_are_classified(pictures, model, data, tool_inside):
    options = ["--top-k", "2", "--reject", "0"]
    out, err = tool_inside("inference")("images", "images/0.png", *options)
    description, *lines = out.splitlines()
    assert "trained on" in description and f"{100 * model.test_accuracy:.1f} %" in description
    assert all(name in description for name in model.classes)
    assert len(lines) == 7 and not err
    (classes,) = inference.predict(model, data.test.images[:1].numpy(), 2)
    expected = ", ".join(f"{name} {100 * confidence:.1f} %" for name, confidence in classes)
    assert lines[-1].split("  ")[-1].strip() == expected


def test_formats_are_data_only(pictures, model, tool_inside):
    options = ["images", "--top-k", "10", "--reject", "0"]
    out, err = tool_inside("inference")(*options, "--format", "csv")
    rows = table_of(out)
    assert len(rows) == 6 and "trained on" in err
    for row in rows:
        assert row["answer"] == row["class_1"] in model.classes
        confidences = [float(row[f"confidence_{i}"]) for i in range(1, 11)]
        assert sum(confidences) == pytest.approx(1, abs=1e-4)
    options = ["images", "--top-k", "1", "--reject", "0"]
    out, err = tool_inside("inference")(*options, "--format", "json")
    entries = json.loads(out)
    assert "trained on" in err
    assert [entry["file"] for entry in entries] == [row["file"] for row in rows]
    for entry, row in zip(entries, rows, strict=True):
        assert entry["answer"] == row["answer"]
        assert entry["classes"][0]["confidence"] == pytest.approx(
            float(row["confidence_1"]), abs=1e-6
        )


def test_notes_on_the_device_are_not_among_the_data(pictures, tool_inside, monkeypatch):
    def choose(device):
        print("note: this machine has a GPU that torch cannot use")
        return torch.device("cpu")

    monkeypatch.setattr(devices, "choose_device", choose)
    for format in ("json", "csv"):
        out, err = tool_inside("inference")("images", "--format", format)
        assert "note: " in err and "note: " not in out
    out, _ = tool_inside("inference")("images")
    assert out.startswith("note: ")


@pytest.mark.pictures
def test_answer_below_the_threshold_is_unsure(pictures, tool_inside, monkeypatch):
    drawn = []
    with beforehand(prediction_output, "draw_predictions", drawn.extend):
        options = ["--threshold", "1.0", "--reject", "0"]
        output = ["--format", "json", "--save", "look.png"]
        out, _ = tool_inside("inference")("images", *options, *output)
    entries = json.loads(out)
    is_unsure = [entry["classes"][0]["confidence"] < 1 for entry in entries]
    assert any(is_unsure)
    assert [entry["answer"] == "unsure" for entry in entries] == is_unsure
    assert [picture.title.endswith(": unsure") for picture in drawn] == is_unsure
    with Image.open(pictures / "look.png") as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(2**24)) > 100
    table, _ = tool_inside("inference")("images", *options)
    assert sum("unsure: " in line for line in table.splitlines()) == sum(is_unsure)


def test_files_that_cannot_be_read_cost_a_line_each(pictures, tool_inside):
    bad = pictures / "bad"
    (bad / "none").mkdir(parents=True)
    good = (pictures / "images" / "0.png").read_bytes()
    (bad / "cut.png").write_bytes(good[: len(good) // 2])
    (bad / "text.jpg").write_text("no image")
    (bad / "empty.png").write_bytes(b"")
    (bad / "notes.txt").write_text("not meant")
    Image.new("1", (14_000, 14_000)).save(bad / "bomb.png")
    names = ["images/0.png", "bad", "bad/none", "missing.jpg", "images/2.png"]
    out, err = tool_inside("inference")(*names, "--format", "csv", status=1)
    assert [row["file"] for row in table_of(out)] == ["images/0.png", "images/2.png"]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 6 and "notes.txt" not in err
    for name in ("cut.png", "text.jpg", "empty.png", "bomb.png", "none", "missing.jpg"):
        assert sum(name in line for line in errors) == 1, name
    assert str(bad / "text.jpg") not in out


def test_hidden_files_and_others_in_a_folder(folder):
    for name in ("a.png", "b.unknown", ".hidden.png", ".hidden/c.png", "deeper/d.PNG"):
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "photos" / name, format="png")
    (folder / "photos" / "notes.txt").write_text("no image")
    found, problems = inference.find_images(["photos"])
    assert [path.name for path in found] == ["a.png", "b.unknown", "d.PNG"]
    assert not problems


def test_folders_are_walked_as_in_training(folder):
    """Links into the folder, thumbnails of a NAS and what a Mac adds to archives are no images."""
    write_images(folder / "photos", {"red": 12, "green": 12})
    write_images(folder / "elsewhere", {"blue": 3})
    photos = folder / "photos"
    for name in (".hidden.png", ".trash/1.png", "__MACOSX/._2.png", "@eaDir/3.png", "@eaDir.png"):
        path = photos / "red" / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(photos / "red" / "0.png", path)
    with contextlib.suppress(OSError):  # Windows lets few make links
        (photos / "red" / "aside").symlink_to(photos / "green")
        (photos / "red" / "up").symlink_to(photos)
        (photos / "red" / "more").symlink_to(folder / "elsewhere" / "blue")
        (photos / "red" / "nowhere.png").symlink_to(folder / "missing.png")
    found, problems = inference.find_images(["photos"])
    data = load_folder(Config(dataset="photos", val_fraction=0.0))
    num_images = sum(data.report["images_per_class"]["all"].values())
    assert len(found) == len(set(found)) == num_images in (24, 27)
    assert not problems
    trained_on = {Path("photos", path) for path in data.files}
    assert trained_on < set(found)


def test_folder_that_is_named_is_walked_whatever_its_name(folder):
    write_images(folder / ".cache", {"@eaDir": 2, "red": 3})
    assert len(inference.find_images([".cache"])[0]) == 3
    assert len(inference.find_images([".cache/@eaDir"])[0]) == 2


def test_folder_that_cannot_be_read_is_skipped(folder, monkeypatch):
    """The images beside it still count."""
    write_images(folder / "photos", {"red": 2, "secret": 2})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found, problems = inference.find_images(["photos"])
    assert len(found) == 2 and not problems


@pytest.mark.pictures
def test_patterns_and_names_that_look_like_something_else(pictures, tool_inside):
    for name in ("$a_b$.png", "~tmp.png"):
        shutil.copy(pictures / "images" / "0.png", pictures / name)
    run = tool_inside("inference")
    out, _ = run("$a_b$.png", "~tmp.png", "--save", "seen.png")
    assert "$a_b$.png" in out and "~tmp.png" in out and (pictures / "seen.png").exists()
    out, _ = run("images/*.png", "--format", "csv")
    assert len(table_of(out)) == len(list(pictures.glob("images/*.png")))
    out, _ = run("image*", "--format", "csv")  # a folder that a pattern stands for is searched, too
    assert len(table_of(out)) == 6


def test_name_that_no_file_can_have_costs_a_line(pictures, tool_inside):
    too_long = 300 * "a" + ".png"
    out, err = tool_inside("inference")("images/0.png", too_long, "--format", "csv", status=1)
    assert len(table_of(out)) == 1
    assert [line for line in err.splitlines() if line.startswith(f"error: {too_long}: ")]


@pytest.mark.skipif(sys.platform == "win32", reason="such names are not allowed there")
def test_control_characters_in_names_do_not_reach_the_terminal(pictures, tool_inside):
    image, text = pictures / "images" / "a\x1b[2Jb.png", pictures / "images" / "c\x1b[2Jd.png"
    shutil.copy(pictures / "images" / "0.png", image)
    text.write_text("no image")
    model_file = next(pictures.glob("model_*.pth"))
    model_file.rename(pictures / "model_e\x1b[2Jf.pth")
    out, err = tool_inside("inference")("images", status=1)
    assert "\x1b" not in out + err
    assert r"a\x1b[2Jb.png" in out and r"model_e\x1b[2Jf.pth" in out
    assert r"c\x1b[2Jd.png" in err
    out, _ = tool_inside("inference")("images/a*", "--format", "json")
    assert [entry["file"] for entry in json.loads(out)] == [os.path.join("images", image.name)]


def test_postscript_is_no_image(model, folder):
    """Pillow would start another program, Ghostscript, on it."""
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    (folder / "cat.png").write_bytes(text)
    with Image.open(folder / "cat.png") as picture:
        assert picture.format == "EPS"  # by its content
    with pytest.raises(UserError, match=r"cat\.png"):
        inference.read_image(model, folder / "cat.png")
    assert not decode.is_image(folder / "cat.png")


def test_images_are_classified_in_batches(pictures, tool_inside, monkeypatch):
    """So that thousands need no more memory than a few."""
    decoded, batches, earlier = [], [], []

    def watch(model, images, top_k):
        assert not any(batch() is not None for batch in earlier)  # they are gone
        earlier.append(weakref.ref(images))
        batches.append((len(images), len(decoded)))

    monkeypatch.setattr(inference, "BATCH_SIZE", 4)
    with (
        beforehand(decode, "decode", lambda path, *others: decoded.append(path)),
        beforehand(inference, "top_classes", watch),
    ):
        out, _ = tool_inside("inference")("images", "--format", "csv")
    assert batches == [(4, 4), (2, 6)] and len(table_of(out)) == 6


def test_ctrl_c_prints_what_is_classified_so_far(pictures, tool_inside, monkeypatch):
    batches = []

    def stop_in_the_second_batch(model, images, top_k):
        batches.append(images)
        if len(batches) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(inference, "BATCH_SIZE", 4)
    with beforehand(inference, "top_classes", stop_in_the_second_batch):
        out, _ = tool_inside("inference")("images", "--format", "csv", status=130)
    assert len(table_of(out)) == 4


def test_picture_that_cannot_be_written_leaves_the_old_one(pictures, tool_inside, unwritable):
    (pictures / "kept").mkdir()
    (pictures / "kept" / "look.png").write_text("the old one")
    unwritable(pictures / "kept")
    error = tool_inside("inference").error("images", "--save", "kept/look.png")
    assert "kept" in error
    assert (pictures / "kept" / "look.png").read_text() == "the old one"


@pytest.mark.pictures
@pytest.mark.parametrize(
    ("name", "format"), [("a.jpg", "JPEG"), ("a.PNG", "PNG"), ("a.webp", "WEBP"), ("a.tif", "TIFF")]
)
def test_picture_is_saved_in_the_format_of_its_name(pictures, tool_inside, name, format):
    tool_inside("inference")("images/0.png", "--save", f"new/folder/{name}")
    with Image.open(pictures / "new" / "folder" / name) as picture:
        assert picture.format == format and picture.width > 300


def test_picture_is_saved_as_drawing(pictures, tool_inside):
    for name, beginning in (("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        tool_inside("inference")("images/0.png", "--save", name)
        assert (pictures / name).read_bytes().startswith(beginning)


def test_picture_that_cannot_be_written_is_noticed_before_the_work(pictures, tool_inside):
    run = tool_inside("inference")
    (pictures / "file").touch()
    (pictures / "folder.png").mkdir()
    with beforehand(inference, "top_classes", lambda *_: pytest.fail("it has begun")):
        for name in ("look", "look.bmp", "look.png.txt", "look.gif"):
            error = run.error("images", "--save", name, status=2)
            assert "--save" in error and ".png" in error
        assert "file" in run.error("images", "--save", "file/look.png")
        assert "folder.png" in run.error("images", "--save", "folder.png")


def test_urls_are_not_read(pictures, tool_inside):
    run = tool_inside("inference")
    url = "https://example.com/cat.png"
    out, err = run("images/0.png", url, "--format", "csv", status=1)
    assert len(table_of(out)) == 1
    assert [line for line in err.splitlines() if f"error: {url}: " in line and "URL" in line]
    assert "URL" in run.error("images/0.png", "--checkpoint", "https://example.com/model.pth")
    with pytest.raises(UserError, match="URL"):
        inference.load_model("https://example.com/model.pth")
    with pytest.raises(UserError, match="URL"):
        inference.read_image(inference.load_model("."), url)


@pytest.mark.slow
@pytest.mark.pictures
@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_names_that_are_not_utf_8_keep_their_rows(pictures, tool_inside, model):
    """In every format, into a file and a pipe; `Program` decodes the output as UTF-8."""
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(pictures / "images" / "0.png", pictures / "images" / name)
    run = tool("inference", pictures)
    escaped = os.path.join("images", r"caf\udce9.png")
    out, _ = run("images", "--format", "csv", "--save", "seen.png")
    rows = table_of(out)
    assert len(rows) == 7 and escaped in [row["file"] for row in rows]
    out, _ = run("images", "--format", "json")
    assert os.path.join("images", name) in [entry["file"] for entry in json.loads(out)]
    out, _ = run("images", env={"PYTHONIOENCODING": "ascii"})
    assert len(out.splitlines()) == 8
    (classes,) = inference.predict(model, pictures / "images" / name)
    assert (classes,) == tuple(inference.predict(model, "images/0.png"))


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_onnx_file_whose_name_is_not_utf_8(onnx_file):
    path = onnx_file.rename(os.fsdecode(b"caf\xe9.onnx"))
    assert inference.load_model(path).classes == ["red", "green", "blue"]


def test_wrong_usage(pictures, folder, model, tool_inside):
    run = tool_inside("inference")
    assert "IMAGE" in run.error(status=2)
    assert "--top-k" in run.error("images", "--top-k", "0", status=2)
    assert "--threshold" in run.error("images", "--threshold", "2", status=2)
    assert "--format" in run.error("images", "--format", "xml", status=2)
    assert "--device" in run.error("images", "--device", "gpu")


def test_files_that_are_no_models(pictures, folder, model, tool_inside):
    run = tool_inside("inference")
    for suffix in (".pth", ".onnx"):
        assert f"nowhere{suffix}" in run.error("images", "--checkpoint", f"nowhere{suffix}")
        (folder / f"rubbish{suffix}").write_bytes(b"rubbish")
        assert f"rubbish{suffix}" in run.error("images", "--checkpoint", f"rubbish{suffix}")
    (folder / model.path.name).unlink()
    assert "--checkpoint" in run.error("images")


# ---- which model, and what is said about it ----


def test_newest_model_of_a_folder_is_used(pictures, model, tool_inside):
    run = tool_inside("inference")
    out, _ = run("images/0.png", "--checkpoint", model.path.parent)
    assert out.startswith(model.path.stem)
    old = pictures / "model_old.pth"
    shutil.copy(model.path, old)
    os.utime(old, (0, 0))
    folder_of_run = pictures / "runs" / "CIFAR10" / "now"
    folder_of_run.mkdir(parents=True)
    shutil.copy(model.path, folder_of_run / "model_other.pth")
    out, err = run("images/0.png")
    assert out.startswith(f"{model.path.name} ")
    assert model.path.name in err and "--checkpoint" in err
    old.unlink()
    assert not run("images/0.png")[1]
    for path in pictures.glob("model_*.pth"):
        path.unlink()
    assert run("images/0.png")[0].startswith("model_other")


def test_models_of_trial_runs_do_not_count(pictures, model, tool_inside):
    """--fast-dev-run makes one in its run folder, and somebody may have copied it."""
    content = torch.load(model.path, weights_only=True)
    content["config"]["fast_dev_run"] = True
    trial = pictures / "model_trial.pth"
    torch.save(content, trial)
    run = tool_inside("inference")
    out, err = run("images/0.png")
    assert out.startswith(f"{model.path.name} ") and "model_trial.pth" in err
    folder_of_run = pictures / "runs" / "CIFAR10" / "now"
    folder_of_run.mkdir(parents=True)
    (pictures / model.path.name).rename(folder_of_run / "model_real.pth")
    assert run("images/0.png")[0].startswith("model_real.pth ")
    (folder_of_run / "model_real.pth").unlink()
    assert "trial" in run.error("images/0.png").splitlines()[-1]
    assert run("images/0.png", "--checkpoint", trial)[0].startswith("model_trial.pth ")


def test_confidence_that_is_not_calibrated_is_said(pictures, model, tool_inside):
    content = torch.load(model.path, weights_only=True)
    assert "not calibrated" not in tool_inside("inference")("images/0.png")[0]
    del content["metrics"]["temperature"]
    torch.save(content, pictures / model.path.name)
    assert "not calibrated" in tool_inside("inference")("images/0.png")[0]


def test_note_on_a_model_of_a_changed_script(folder, tool_inside, model, data):
    content = torch.load(model.path, weights_only=True)
    save(data.test.images[0], folder / "0.png")
    version = ic.VERSIONS["image_classification"]
    cases = [
        (version, ic.VERSIONS["script"], False),
        (version, "other", True),
        ("99.0", "other", False),
    ]
    for program_version, script, is_changed in cases:
        inference.print_note_once.cache_clear()
        content["versions"] |= {"image_classification": program_version, "script": script}
        torch.save(content, folder / "changed.pth")
        _, err = tool_inside("inference")("0.png", "--checkpoint", "changed.pth")
        assert ("image_classification.py" in err) == is_changed
    inference.print_note_once.cache_clear()


@pytest.mark.slow
def test_custom_network_has_to_be_named_again(folder, inside, tool_inside, data):
    """A model file never makes a tool run the file that it names."""
    (folder / "net.py").write_text(TINY)
    inside(*QUICK[:4], "--epochs", "1", "--model", "net.py:tiny", "--out", "model.pth")
    (folder / "net.py").rename(folder / "moved.py")
    save(data.test.images[0], folder / "a.png")
    run = tool_inside("inference")
    assert "--model net.py:tiny" in run.error("a.png", "--checkpoint", "model.pth")
    run("a.png", "--checkpoint", "model.pth", "--model", "moved.py:tiny")
    assert "moved.py" in run.error("a.png", "--checkpoint", "model.pth", "--model", "moved.py:big")
    loaded = inference.load_model("model.pth", "cpu", "moved.py:tiny")
    assert loaded.settings["model"] == "moved.py:tiny"


# ---- version 0.9.1 ----


def old_model(name, folder):
    """The path of a model file that version 0.9.1 wrote."""
    path = OLD_FILES / name
    if path.suffix != ".xz":
        return path
    unpacked = folder / path.stem
    unpacked.write_bytes(lzma.decompress(path.read_bytes()))
    return unpacked


@pytest.mark.parametrize(
    "name",
    [
        "model_cnn_digits.pth",
        "model_convnet_digits.pth.xz",
        "model_airbench94_digits.pth.xz",
    ],
)
def test_model_of_version_0_9_1_has_the_logits_it_had(name, folder, capsys):
    expected = json.loads((OLD_FILES / "expected.json").read_text())["logits"][name]
    old = inference.load_model(old_model(name, folder), "cpu")
    assert not {"low_res", "test_views", "depth", "make_imbalanced"} & old.settings.keys()
    images = inference.load_dataset_of(old).test.images[:20].numpy()
    assert np.abs(old.logits(images) - np.array(expected)).max() < 1e-3
    assert capsys.readouterr().err == ""  # no note on another script


def test_model_that_this_version_cannot_build_names_the_version_that_can(folder, tool_inside):
    path = old_model("model_convnet_3_digits.pth.xz", folder)
    assert "0.9.1" in tool_inside("inference").error("a.png", "--checkpoint", path)


# ---- the data set of a model ----


def test_model_that_names_no_data_set_is_taken_for_cifar10(model, folder):
    nameless = replace(model, settings={})
    assert not inference.dataset_available(nameless)
    assert not inference.dataset_available(nameless, "elsewhere")
    (folder / "data").mkdir()
    for name in MD5:
        (folder / "data" / name).touch()
    assert inference.dataset_available(nameless)
    assert inference.dataset_available(nameless, "data")


@pytest.mark.slow
def test_folder_of_images_that_moved_or_changed(photos, inside, capsys):
    inside("--dataset", "photos", "--epochs", "1", "--width", "0.25", "--out", "model.pth")
    model = inference.load_model("model.pth", "cpu")
    assert inference.load_dataset_of(model).mean == load_photos().mean
    assert "note" not in capsys.readouterr().out

    photos.rename("moved")
    assert not inference.dataset_available(model)
    with pytest.raises(UserError, match="--data-dir"):
        inference.load_dataset_of(model)
    assert inference.dataset_available(model, "moved")
    inference.load_dataset_of(model, "moved")
    assert "note" not in capsys.readouterr().out

    for path in list(Path("moved", "red").iterdir())[:10]:
        path.unlink()
    data = inference.load_dataset_of(model, "moved")
    seen = describe_seen(data, model.seen_digests)
    noted = f"note: model.pth was trained on {seen}" in capsys.readouterr().out
    assert noted == (seen != "")
    assert inference.has_images_of_training(model, data) is False
    old = replace(model, seen_digests=None, fingerprint=None)  # of version 0.9: the mean tells
    inference.load_dataset_of(old, "moved")
    assert "note: model.pth does not say" in capsys.readouterr().out
    assert inference.has_images_of_training(old, data) is False
    old = replace(old, settings=model.settings | {"pretrained": True})  # which is ImageNet's here
    assert inference.has_images_of_training(old, data) is None

    # where the folder is only named by the file, what is not known is not called wrong
    named = {"dataset": str(Path("moved").resolve())}
    known = replace(model, settings=model.settings | named)
    with pytest.raises(UserError, match="images in .*moved are not those .*--data-dir"):
        inference.load_dataset_of(known)
    for unknown in (
        replace(old, settings=old.settings | named),
        replace(known, split_rules=1),
        replace(known, settings=known.settings | {"fast_dev_run": True}),
    ):
        with pytest.raises(UserError, match="moved is not known.*--data-dir"):
            inference.load_dataset_of(unknown)

    Path("moved", "red").rename(Path("moved", "pink"))
    with pytest.raises(UserError, match=r"model\.pth"):
        inference.load_dataset_of(model, "moved")


# ---- ONNX ----


def test_onnx_file_without_torch(onnx_file, folder, model):
    """Where torch cannot be imported, an ONNX file is classified, and a .pth asks for torch."""
    environment = without(folder, "torch", "torchvision", "sklearn", "scipy")
    run = tool("inference", folder)
    out, err = run(
        *["lime.png", "blue.png", "--checkpoint", onnx_file, "--format", "csv"],
        *["--save", "seen.png"],
        env=environment,
    )
    assert [row["class_1"] for row in table_of(out)] == ["green", "blue"]
    assert (folder / "seen.png").exists() and "colours" in err
    error = run.error("lime.png", "--checkpoint", model.path, env=environment)
    assert "pip install -r requirements.txt" in error


def test_onnx_probabilities(onnx_file, monkeypatch):
    monkeypatch.setattr(inference, "ONNX_BATCH_SIZE", 2)
    model = inference.load_model(onnx_file)
    assert (model.network, model.settings, model.image_size) == (None, {}, 8)
    images = np.zeros((5, 3, 8, 8), np.uint8)
    for i in range(5):
        images[i, i % 3] = 255
    logits = model.logits(images)
    assert logits.dtype == np.float32
    assert logits == pytest.approx(10 * images.mean((2, 3)) / 255)
    confidence = np.exp(5) / (np.exp(5) + 2)  # 10 over the temperature of 2
    assert probabilities(model, images).max(1) == pytest.approx([confidence] * 5)
    with pytest.raises(UserError, match=r"model\.onnx"):
        model.require_network()


def with_metadata(onnx_file, **values):
    """Change values in the metadata of an ONNX file."""
    import onnx

    proto = onnx.load(str(onnx_file))
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(proto, metadata | values)
    onnx.save_model(proto, str(onnx_file))


@pytest.mark.parametrize("classes", [["red", "green"], ["red", "green", "blue", "grey"]])
def test_onnx_file_whose_classes_are_not_those_of_its_network(onnx_file, tool_inside, classes):
    with_metadata(onnx_file, classes=json.dumps(classes))
    error = tool_inside("inference").error("blue.png", "--checkpoint", onnx_file)
    assert "model.onnx is damaged" in error


@pytest.mark.parametrize(("old", "new"), [("images", "pixels"), ("logits", "scores")])
def test_onnx_file_with_other_inputs_or_outputs(onnx_file, tool_inside, old, new):
    import onnx

    proto = onnx.load(str(onnx_file))
    for node in proto.graph.node:
        for names in (node.input, node.output):
            renamed = [new if name == old else name for name in names]
            del names[:]
            names.extend(renamed)
    for value in [*proto.graph.input, *proto.graph.output]:
        value.name = new if value.name == old else value.name
    onnx.save_model(proto, str(onnx_file))
    error = tool_inside("inference").error("blue.png", "--checkpoint", onnx_file)
    assert "model.onnx" in error and "export.py" in error


def test_memory_that_is_too_small_is_no_damaged_onnx_file(onnx_file, monkeypatch):
    import onnxruntime

    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(MemoryError):
        inference.load_model(onnx_file)


def test_range_of_pixel_values_that_no_float_holds(onnx_file, tool_inside):
    ranges = '{"integers": [0, 1' + 400 * "0" + "]}"
    with_metadata(onnx_file, pixel_ranges=ranges)
    error = tool_inside("inference").error("blue.png", "--checkpoint", onnx_file)
    assert "model.onnx is damaged" in error and len(error) < 300


def test_onnx_devices(onnx_file, tool_inside):
    for device in ("mps", "cuda:x", "tpu"):
        error = tool_inside("inference").error(
            "blue.png", "--checkpoint", onnx_file, "--device", device
        )
        assert f"--device {device}" in error
    ((name, options),) = inference.onnx_providers("cuda:1", ["CUDAExecutionProvider"])
    assert name == "CUDAExecutionProvider"
    assert options == {"use_tf32": 0, "device_id": 1}
    with pytest.raises(UserError, match="cuda:x"):
        inference.onnx_providers("cuda:x", ["CUDAExecutionProvider"])
    for device in ("auto", "cpu"):
        available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        assert inference.onnx_providers(device, available) == ["CPUExecutionProvider"]


def test_onnx_file_of_another_program_is_refused(onnx_file, tool_inside):
    import onnx

    proto = onnx.load(str(onnx_file))
    del proto.metadata_props[:]
    onnx.save_model(proto, str(onnx_file))
    error = tool_inside("inference").error("blue.png", "--checkpoint", onnx_file)
    assert "model.onnx" in error and "export.py" in error


def test_missing_onnx_runtime_is_named(onnx_file, tool_inside, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = tool_inside("inference").error("blue.png", "--checkpoint", onnx_file)
    assert "pip install onnxruntime" in error


# ---- the start of the program ----


def test_help(tool_inside):
    text, _ = tool_inside("inference")("--help")
    assert "python inference.py" in text and "--checkpoint" in text


def test_missing_package_is_named(folder):
    (folder / "PIL.py").write_text("raise ModuleNotFoundError('no PIL here', name='PIL')")
    error = tool("inference", folder).error(env={"PYTHONPATH": str(folder)})
    assert "PIL" in error and "pip install -r requirements.txt" in error


def test_copy_without_the_package_says_so(folder):
    script = shutil.copy(REPOSITORY / "inference.py", folder / "inference.py")
    error = Program(folder, script).error("cat.jpg")
    assert "classifier" in error


def test_importing_it_needs_no_torch(folder):
    program = Program(folder, folder / "check.py")
    (folder / "check.py").write_text("import sys, inference\nassert 'torch' not in sys.modules\n")
    program(env={"PYTHONPATH": str(REPOSITORY)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_same_predictions_on_cuda(model, data):
    on_cuda = inference.load_model(model.path, "cuda")
    images = data.test.images[:100].numpy()
    difference = probabilities(on_cuda, images) - probabilities(model, images)
    assert np.abs(difference).max() < 1e-4
