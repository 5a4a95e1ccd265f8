"""--fit: how a photograph of any shape becomes a square, in training and in the tools."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_photos, only_run, write_images
from PIL import Image, ImageOps

import compare
import export
import inference
from classifier.cli import tool_parser
from classifier.config import FITS, Config
from classifier.datasets import decode, duplicates, fitting
from classifier.datasets.data_report import MUCH_CUT_OFF
from classifier.datasets.folder import load_folder
from classifier.datasets.folder_layout import list_images
from classifier.datasets.image_cache import open_cache
from classifier.datasets.load import load_data
from classifier.errors import UsageError, UserError

SIDES = [(1, 1), (1, 500), (500, 1), (33, 31), (48, 36), (36, 48), (32, 32), (641, 427)]


@pytest.fixture(autouse=True)
def home(monkeypatch, folder):
    """Decoded images do not go into the user's cache."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))


def flag_of(width=60, height=20):
    """A picture whose thirds from left to right are red, green and blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        pixels[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 255
    return Image.fromarray(pixels)


def noise(width, height):
    random = np.random.default_rng(width)
    return Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8))


# ---- the square ----


@pytest.mark.parametrize("size", SIDES)
def test_crop_is_what_it_was_before_there_were_others(size):
    expected = ImageOps.fit(noise(*size), (32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(decode.square(noise(*size), 32), np.asarray(expected))


@pytest.mark.parametrize("size", SIDES)
def test_pad_keeps_the_whole_image_and_its_proportions(size):
    square = fitting.to_square(noise(*size), 32, "pad")
    assert square.shape == (32, 32, 3) and square.dtype == np.uint8
    width, height = (max(1, round(32 * side / max(size))) for side in size)
    left, top = (32 - width) // 2, (32 - height) // 2
    inside = np.zeros((32, 32), bool)
    inside[top : top + height, left : left + width] = True
    assert (square[~inside] == fitting.GREY).all()
    whole = noise(*size).resize((width, height), Image.Resampling.BICUBIC)
    assert np.array_equal(square[inside], np.asarray(whole).reshape(-1, 3))


def test_what_stands_at_the_sides_is_seen():
    middle = {fit: fitting.to_square(flag_of(), 30, fit)[15] for fit in FITS}
    for fit in ("pad", "stretch"):
        assert middle[fit][3, 0] > 250 and middle[fit][-3, 2] > 250, fit
    assert not middle["crop"][5:-5, [0, 2]].any()
    stretched = fitting.to_square(flag_of(), 30, "stretch")
    assert (stretched[[0, -1], 3, 0] > 250).all()  # no border


def test_turned_file_fits_as_it_is_seen(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    flag_of().save("flag.png", exif=exif)
    pixels = decode.decode(Path("flag.png"), 30, fit="pad").pixels
    assert (pixels[15, [0, -1]] == fitting.GREY).all()  # a tall image: the border is beside it
    assert pixels[2, 15, 0] > 250 and pixels[-3, 15, 2] > 250


def test_hash_of_an_image_is_that_of_all_of_it(folder):
    flag_of().save("flag.png")
    hashes = [decode.decode(Path("flag.png"), 30, None, fit).dhash for fit in FITS]
    assert (hashes[0] == hashes[1]).all() and (hashes[0] == hashes[2]).all()


# ---- data sets ----


def test_each_fit_has_its_own_cache_and_crop_the_one_it_had(folder, photos, capsys):
    means = {fit: load_photos(fit=fit).mean for fit in FITS}
    assert means["crop"] != means["pad"] != means["stretch"]
    names = sorted(path.name.rpartition("-")[0] for path in folder.glob("data/.decoded/*"))
    assert names == ["photos-48", "photos-48-pad", "photos-48-stretch"]
    capsys.readouterr()
    for fit in FITS:
        assert load_photos(fit=fit).mean == means[fit]
    assert "Decoding" not in capsys.readouterr().out


def test_images_are_as_their_files_with_each_fit(folder, photos):
    for fit in FITS:
        data = load_photos(fit=fit)
        file = data.files[int(data.train_indices[7])]
        expected = decode.decode(photos / file, 48, None, fit).pixels
        assert np.array_equal(data.train.images[7].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("dataset", ["digits", "auto", "mnist"])
def test_data_sets_of_squares_refuse_it(dataset):
    with pytest.raises(UsageError, match="--fit pad"):
        load_data(Config(dataset=dataset, fit="pad"))
    with pytest.raises(UsageError, match="--fit"):
        Config(fit="squash")


def panorama(random):
    coarse = random.integers(40, 216, (4, 12, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((256, 32), Image.Resampling.BICUBIC)


def test_border_makes_no_images_alike(folder, monkeypatch):
    """A difference that is too large without a border is too large within one."""
    no_copies = np.empty((0, 2), np.int64)  # a brighter one would be found as such
    monkeypatch.setattr(duplicates, "altered_copies", lambda *_: (no_copies, True))
    picture = panorama(np.random.default_rng(0))
    brighter = Image.fromarray(np.asarray(picture) + np.uint8(12))
    copy = Image.fromarray(np.asarray(picture) + np.uint8(1))
    for name, image in {"a/1": picture, "b/2": brighter, "b/3": copy}.items():
        path = folder / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    photos = folder / "photos"
    for fit in FITS:
        files, _, _ = list_images({"all": photos}, photos)
        cache = open_cache(photos, folder / "data", 64, files, fit)
        pairs = duplicates.near_duplicates(files, cache).pairs
        assert pairs.tolist() == [[0, 2, 0]], fit


# ---- the report ----


def cut_off_of(**settings):
    report = load_folder(Config(dataset="photos", **settings)).report
    return report["cut_off"], "\n".join(report["words"])


def test_report_says_how_much_is_cut_off(folder, photos):
    cut_off, words = cut_off_of()
    assert cut_off == {"mean": pytest.approx(0.25), "images": 0}
    assert "25 %" in words and "--fit" not in words
    write_images(photos, {"wide": 220}, size=(64, 32), seed=3)
    cut_off, words = cut_off_of()
    assert cut_off["images"] == 220
    assert cut_off["mean"] == pytest.approx((110 * 0.25 + 220 * 0.5) / 330)
    assert cut_off["mean"] > MUCH_CUT_OFF
    assert "42 %" in words and "220 of the 330 images" in words and "--fit pad" in words


def test_report_is_silent_where_nothing_is_cut_off(folder, photos):
    for fit in ("pad", "stretch"):
        cut_off, words = cut_off_of(fit=fit)
        assert cut_off is None and "--fit" not in words and "square" not in words
    write_images(folder / "photos", {"red": 40, "green": 40, "blue": 30}, size=(40, 40))
    cut_off, words = cut_off_of()
    assert cut_off == {"mean": 0.0, "images": 0} and "square" not in words


# ---- models ----


def test_model_keeps_its_fit_and_the_tools_obey_it(folder, photos, inside):
    settings = ["--epochs", "1", "--width", "0.25", "--fit", "pad", "--out", "model_pad.pth"]
    out, _ = inside("--dataset", "photos", *settings)
    assert "grey border" in out
    padded = inference.load_model("model_pad.pth", "cpu")
    assert padded.fit == "pad" and padded.settings["fit"] == "pad"
    flag_of().save("flag.png")
    expected = decode.decode(Path("flag.png"), 48, None, "pad").pixels.transpose(2, 0, 1)
    assert np.array_equal(inference.read_image(padded, "flag.png"), expected)
    (file,) = next(inference.read_in_batches([Path("flag.png")], padded))
    assert np.array_equal(file.pixels, expected)
    (by_path,), (by_pixels,) = (
        inference.predict(padded, each) for each in ("flag.png", np.asarray(flag_of()))
    )
    assert [name for name, _ in by_path] == [name for name, _ in by_pixels]
    assert [share for _, share in by_path] == pytest.approx(
        [share for _, share in by_pixels], abs=1e-5
    )

    # its data set is loaded with its own fit, and so has the images of the training
    data = inference.load_dataset_of(padded)
    assert data.mean == load_photos(fit="pad").mean
    assert inference.has_images_of_training(padded, data)

    # a resumed run keeps its own
    run = only_run(folder)
    assert json.loads((run / "config.json").read_text())["fit"] == "pad"
    error = inside.error("--resume", run, "--epochs", "2", "--fit", "stretch", status=2)
    assert "--fit stretch" in error and "pad" in error

    # weights to start from may be of another fit
    settings = ["--epochs", "1", "--width", "0.25", "--fit", "stretch", "--out", "model_s.pth"]
    inside("--dataset", "photos", *settings, "--init-from", "model_pad.pth")
    assert inference.load_model("model_s.pth", "cpu").fit == "stretch"

    # two runs of different fits are compared image by image, and the table shows the setting
    runs, _ = compare.read_runs(sorted(str(path) for path in run.parent.iterdir()))
    assert {each.settings["fit"] for each in runs} == {"pad", "stretch"}
    assert "fit" in compare.table(runs)[0]
    verdict = "\n".join(compare.verdict(*runs))
    assert (
        f"over {data.num_test_images} test images" in verdict and compare.NO_VERDICT not in verdict
    )


def test_metadata_of_an_export_name_the_fit(model):
    for fit, word in {"crop": "middle square", "pad": "grey", "stretch": "shape"}.items():
        about = export.metadata(replace(model, fit=fit))
        assert json.loads(about["fit"]) == fit
        assert word in json.loads(about["resize"])


def test_tools_refuse_a_fit(tool_inside, capsys):
    error = tool_inside("inference").error("cat.jpg", "--fit", "pad", status=2)
    assert "--fit" in error and "training" in error
    for device in (True, False):  # explain.py and app.py, and export.py
        with pytest.raises(SystemExit):
            tool_parser("", device).parse_args(["--fit", "pad"])
        assert "--fit" in capsys.readouterr().err
        assert "--fit" not in tool_parser("", device).format_help()


# ---- files of older versions ----


def test_file_without_the_setting_means_crop(model, folder, onnx_file):
    content = torch.load(model.path, weights_only=True)
    del content["config"]["fit"]
    torch.save(content, "old.pth")
    assert inference.load_model("old.pth", "cpu").fit == "crop"
    assert inference.load_model(onnx_file).fit == "crop"


def with_fit(onnx_file, fit):
    """Write what an ONNX file says of its fit into its metadata."""
    import onnx

    proto = onnx.load(str(onnx_file))
    about = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(proto, about | {"fit": json.dumps(fit)})
    onnx.save_model(proto, str(onnx_file))


def test_onnx_file_is_obeyed(onnx_file, tool_inside):
    """The mean of a padded picture tells: red, but for two thirds of grey."""
    with_fit(onnx_file, "pad")
    model = inference.load_model(onnx_file)
    Image.new("RGB", (80, 20), "red").save("red.png")
    assert (inference.read_image(model, "red.png")[0, 0] == fitting.GREY).all()
    out, _ = tool_inside("inference")("red.png", "--checkpoint", onnx_file, "--format", "json")
    shares = json.loads(out)
    with_fit(onnx_file, "crop")
    out, _ = tool_inside("inference")("red.png", "--checkpoint", onnx_file, "--format", "json")
    assert json.loads(out) != shares


@pytest.mark.parametrize("fit", ["squash", 3, None, ["pad"]])
def test_file_with_an_unknown_fit_is_damaged(onnx_file, fit):
    with_fit(onnx_file, fit)
    with pytest.raises(UserError, match=r"model\.onnx"):
        inference.load_model(onnx_file)
