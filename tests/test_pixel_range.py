"""The range of values of images with more than 8 bits a pixel: one for a whole data set."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import only_run, report_of, write_images
from PIL import Image

import inference
from classifier.config import Config
from classifier.datasets import decode, image_cache
from classifier.datasets.folder import load_folder
from classifier.datasets.pixel_range import (
    FLOATS,
    INTEGERS,
    Extrema,
    PixelRange,
    describe_misfit,
    extrema_of,
    find_range,
    from_json,
    is_mostly_dark,
    to_8_bits,
    to_json,
    usual_range,
)
from classifier.errors import UserError

FLOAT_PHOTOS = ["--dataset", "photos", "--width", "0.25", "--device", "cpu"]


@pytest.fixture(autouse=True)
def home(monkeypatch, folder):
    """Decoded images do not go into the user's cache."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))


def write_grey(path, share, maximum, dtype, minimum=0):
    """A TIFF whose values are `share`, (H, W) in [0, 1], of the way from minimum to maximum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = minimum + share * (maximum - minimum)
    Image.fromarray(values.astype(dtype)).save(path)


def noise(seed):
    """Random shares, (24, 24), of which the largest is 1 and the least 0."""
    share = np.random.default_rng(seed).random((24, 24))
    share[0, :2] = 0, 1
    return share


def write_photos(folder, maxima, dtype, count=10, minimum=0):
    """Two classes of `count` images each, whose maxima are these in turns."""
    for number, name in enumerate("ab"):
        for i in range(count):
            maximum = maxima[i % len(maxima)]
            path = folder / "photos" / name / f"{i}.tif"
            write_grey(path, noise(100 * number + i), maximum, dtype, minimum)


def load(**settings):
    return load_folder(Config(dataset="photos", image_size=24, val_fraction=0.0, **settings))


def brightest(data):
    """The largest value of each training image, by its file."""
    highest = data.train.images.flatten(1).max(1).values.tolist()
    return dict(zip(data.files, highest, strict=True))


# ---- one range for all ----


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, (0, 1)),
        (0.2, 0.99, (0, 1)),
        (0, 0.5, (0, 1)),
        (0, 0.01, (0, 0.01)),  # of [0, 1] nothing would be left
        (0, 1.02, (0, 1.02)),  # resized by a filter that overshoots
        (0, 200, (0, 255)),
        (0, 256, (0, 256)),
        (0, 800, (0, 1023)),
        (0, 4095, (0, 4095)),
        (0, 3000, (0, 4095)),
        (0, 16000, (0, 16383)),
        (0, 51400, (0, 65535)),
        (0, 1e6, (0, 1e6)),
        (-1, 1, (-1, 1)),
        (-1024, 3071, (-1024, 4095)),  # computed tomography
        (-9999, 400, (0, 400)),  # stands for missing values
        (0, 0, (0, 1)),
        (-5, -5, (-5, -4)),
        (-5, -1, (-5, -1)),
    ],
)
def test_range_of_values(low, high, expected):
    assert usual_range(low, high) == expected


def test_one_image_among_many_does_not_decide():
    low = np.zeros(120)
    high = np.full(120, 0.9)
    high[5] = 255
    assert find_range(low, high) == (0, 1)
    high[6] = 254  # two of 120 are more than a hundredth, and may be right
    assert find_range(low, high) == (0, 255)
    assert is_mostly_dark(high, find_range(low, high))
    assert find_range(low[:5], np.array([1, 1, 1, 1, 255])) == (0, 255)  # so few say nothing
    assert find_range(np.zeros(1), np.zeros(1)) == (0, 1)


def test_values_become_8_bits():
    values = np.array([-5, 0, 0.5, 1, 9, np.nan, np.inf], np.float32)
    assert to_8_bits(values, PixelRange(0, 1)).tolist() == [0, 0, 128, 255, 255, 0, 0]
    assert to_8_bits(values[:4], PixelRange(-1, 1)).tolist() == [0, 128, 191, 255]
    assert extrema_of(values, FLOATS) == (FLOATS, -5, 9)
    assert extrema_of(np.array([np.nan], np.float32), FLOATS) == (FLOATS, 0, 0)


def test_ranges_in_files():
    ranges = {INTEGERS: PixelRange(0, 4095), FLOATS: PixelRange(-1, 1.5)}
    assert from_json(json.loads(json.dumps(to_json(ranges)))) == ranges
    assert from_json(None) == {}
    for bad in ([], {"floats": [1, 0]}, {"colours": [0, 1]}, {"floats": [0, float("inf")]}):
        with pytest.raises(ValueError, match="range"):
            from_json(bad)


@pytest.mark.parametrize(
    ("maxima", "dtype", "expected"),
    [
        ([0.99, 1.02], np.float32, {0.99: 248, 1.02: 255}),
        ([255, 256], np.int32, {255: 254, 256: 255}),
        ([4095, 2048], np.uint16, {4095: 255, 2048: 128}),
        ([65535, 257], np.uint16, {65535: 255, 257: 1}),
    ],
)
def test_images_of_a_folder_share_a_range(folder, maxima, dtype, expected):
    write_photos(folder, maxima, dtype)
    for _ in range(2):  # decoded, and from the cache
        for file, highest in brightest(load()).items():
            number = int(file.partition(".")[0][2:])
            assert highest == expected[maxima[number % 2]], file


def test_range_is_reported(folder):
    write_photos(folder, [0.99, 1.02], np.float32)
    data = load()
    assert data.pixel_ranges == {FLOATS: (0, pytest.approx(1.02))}
    assert data.report["pixel_ranges"] == {FLOATS: [0, pytest.approx(1.02)]}
    assert data.report["outside_range"] == []
    assert any("floats" in line and "1.02" in line for line in data.report["words"])
    assert json.dumps(data.report)


def test_integers_and_floats_have_a_range_each(folder):
    write_photos(folder, [4095], np.uint16)
    write_grey(folder / "photos" / "a" / "float.tif", noise(7), 1.0, np.float32)
    data = load()
    assert data.pixel_ranges == {INTEGERS: (0, 4095), FLOATS: (0, 1)}
    assert set(brightest(data).values()) == {255}


def test_negative_values_are_kept(folder):
    write_photos(folder, [1.0], np.float32, minimum=-1.0)
    data = load()
    assert data.pixel_ranges == {FLOATS: (-1, 1)}
    assert 120 < data.train.images.float().mean() < 135


def test_image_outside_the_range_is_named(folder):
    write_photos(folder, [0.9], np.float32)
    write_grey(folder / "photos" / "a" / "hot.tif", noise(7), 1000.0, np.float32)
    data = load()
    assert data.pixel_ranges == {FLOATS: (0, 1)}
    (outside,) = data.report["outside_range"]
    assert outside.endswith("hot.tif")
    assert any("hot.tif" in line for line in data.report["words"])


def test_two_units_in_one_folder_are_warned_of(folder):
    write_photos(folder, [0.9, 0.9, 200], np.float32)
    words = load().report["words"]
    (warning,) = [line for line in words if "WARNING" in line]
    assert "0.9" in warning and "200" in warning


# ---- the cache ----


def test_only_images_in_the_wrong_range_are_decoded_twice(folder, monkeypatch):
    calls = []
    original = decode.decode

    def decode_and_note(path, *arguments):
        calls.append(path.name)
        return original(path, *arguments)

    monkeypatch.setattr(decode, "decode", decode_and_note)
    write_photos(folder, [4095, 900], np.uint16)
    load()
    assert len(calls) == 30  # 900 looked like 10 bits
    calls.clear()
    load()
    assert not calls
    write_grey(folder / "photos" / "a" / "new.tif", noise(7), 4000, np.uint16)
    load()
    assert calls == ["new.tif"]
    calls.clear()
    for name in ("other.tif", "another.tif"):
        write_grey(folder / "photos" / "a" / name, noise(len(name)), 60000, np.uint16)
    data = load()  # two are enough for another range
    assert data.pixel_ranges == {INTEGERS: (0, 65535)}
    assert len(calls) == 2 + 23
    assert set(brightest(data).values()) <= {16, 4, 233}


def test_decoding_that_was_stopped_is_continued(folder, monkeypatch):
    write_photos(folder, [0.99, 1.02], np.float32)
    expected = load().train.images
    (cache,) = (folder / "data" / ".decoded").iterdir()
    for name, length in (("images", -1000), ("index", -70), ("measured", -10)):
        content = (cache / name).read_bytes()
        (cache / name).write_bytes(content[:length])
    for _ in range(2):
        assert torch.equal(load().train.images, expected)
    assert (cache / "measured").stat().st_size % image_cache.EXTREMA.itemsize == 0


def test_images_of_8_bits_have_no_range(folder):
    write_images(folder / "photos", {"red": 10, "green": 10})
    data = load()
    assert data.pixel_ranges == {}
    assert "pixel_ranges" not in data.report
    assert not list(folder.glob("data/.decoded/*/measured"))


# ---- a model of such images ----


def test_what_is_said_of_an_image_in_another_range():
    inside = Extrema(FLOATS, 0.1, 1.0)
    assert describe_misfit(inside, PixelRange(0, 1), is_known=True) == ""
    assert "no range" in describe_misfit(inside, PixelRange(0, 1), is_known=False)
    for low, high in ((0, 1.5), (-0.5, 1)):
        assert "cut off" in describe_misfit(Extrema(FLOATS, low, high), PixelRange(0, 1), True)


def write_dark_and_bright(folder):
    """Class b is ten times as bright as class a: only one range for both tells them apart."""
    for number, name in enumerate("ab"):
        for i in range(40):
            path = folder / "photos" / name / f"{i}.tif"
            write_grey(path, noise(100 * number + i), (0.1, 1.02)[number], np.float32)


@pytest.mark.slow
def test_model_keeps_the_range(inside, folder, tool_inside, capsys):
    write_dark_and_bright(folder)
    inside(*FLOAT_PHOTOS, "--epochs", "6", "--augment", "none")
    assert report_of(only_run(folder))["test_accuracy"] == 1.0
    model = inference.load_model(folder)
    assert model.pixel_ranges == {FLOATS: (0, pytest.approx(1.02))}
    for name in "ab":
        ((prediction, _), *_) = inference.predict(model, folder / "photos" / name / "0.tif")[0]
        assert prediction == name
    assert "note" not in capsys.readouterr().err

    write_grey(folder / "hot.tif", noise(3), 50.0, np.float32)
    write_grey(folder / "int.tif", noise(3), 50, np.uint16)
    _, err = tool_inside("inference")("hot.tif", "int.tif", "photos/a/0.tif")
    assert "hot.tif" in err and "int.tif" in err and "0.tif" not in err


def test_other_range_of_a_folder_that_has_grown_is_noted(folder, capsys):
    write_photos(folder, [4095], np.uint16)
    data = load()
    model = SimpleNamespace(path=Path("model.pth"), pixel_ranges=dict(data.pixel_ranges))
    inference.note_other_ranges(model, data)
    assert capsys.readouterr().out.count("note: ") == 0
    for i in range(2):
        write_grey(folder / "photos" / "a" / f"new {i}.tif", noise(i), 60000, np.uint16)
    grown = load()
    capsys.readouterr()
    inference.note_other_ranges(model, grown)
    out = capsys.readouterr().out
    assert "4095" in out and "65535" in out and "model.pth" in out


@pytest.mark.slow
def test_exported_model_keeps_the_range(inside, folder, tool_inside):
    pytest.importorskip("onnx")
    write_dark_and_bright(folder)
    inside(*FLOAT_PHOTOS, "--epochs", "1")
    tool_inside("export")()
    exported = inference.load_model(next(folder.glob("*.onnx")))
    assert exported.pixel_ranges == inference.load_model(folder).pixel_ranges != {}


def test_damaged_ranges_in_a_model_file_are_an_error(folder):
    with pytest.raises(UserError, match=r"model\.pth"):
        inference.read_pixel_ranges({"floats": "x"}, folder / "model.pth")
