"""export.py --raw: an ONNX file that takes a photograph of any size."""

import json

import numpy as np
import pytest
import torch
from conftest import shared_folder, table_of
from PIL import Image

import export
import inference
from classifier.config import FITS
from classifier.datasets import decode
from classifier.errors import UserError
from classifier.raw_network import ODD_SIZES, RawNetwork, bicubic, odd_photographs


def squares_of(photographs, size, fit):
    """Photographs as inference.py makes squares of them: uint8 (N, 3, size, size)."""
    squares = [decode.square(Image.fromarray(each), size, fit=fit) for each in photographs]
    return np.stack(squares).transpose(0, 3, 1, 2)


# ---- the resizing ----


def test_filter_is_that_of_pillow():
    """An image of one bright column, enlarged, is the filter itself."""
    line = np.zeros((1, 41), np.uint8)
    line[0, 20] = 255
    enlarged = Image.fromarray(line).resize((41 * 8, 1), Image.Resampling.BICUBIC)
    distances = np.abs((np.arange(41 * 8) + 0.5) / 8 - 20.5)
    expected = bicubic(torch.from_numpy(distances)).numpy().clip(0) * 255
    assert np.abs(np.asarray(enlarged)[0] - expected).max() <= 1


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [32, 45])
def test_squares_are_those_of_pillow(fit, size):
    network = RawNetwork(torch.nn.Identity(), size, fit)
    num_values = num_different = 0
    for photograph in odd_photographs(30):
        square = network.to_square(torch.from_numpy(photograph)).numpy()
        (expected,) = squares_of([photograph], size, fit)
        difference = np.abs(square - expected)
        assert difference.max() <= 1, photograph.shape
        if photograph.shape[0] > 100 * photograph.shape[1]:
            continue  # Pillow then resizes down first
        num_values += difference.size
        num_different += int((difference > 0).sum())
    assert num_different < 1e-4 * num_values


@pytest.mark.parametrize("fit", FITS)
def test_square_photograph_stays_as_it_is(fit):
    (pixels,) = squares_of(list(odd_photographs(9))[-1:], 24, "crop")
    photograph = torch.from_numpy(pixels.transpose(1, 2, 0).copy())
    square = RawNetwork(torch.nn.Identity(), 24, fit).to_square(photograph)
    assert np.array_equal(square.numpy(), pixels)


def test_generated_photographs_are_of_odd_sizes():
    photographs = list(odd_photographs(12))
    sizes = [(each.shape[1], each.shape[0]) for each in photographs]
    assert sizes[: len(ODD_SIZES)] == ODD_SIZES and len(photographs) == 12
    assert all(each.dtype == np.uint8 for each in photographs)


# ---- the file ----


@pytest.fixture(scope="session")
def raw_file(model, tmp_path_factory):
    """The model as export.py --raw writes it."""
    with shared_folder(tmp_path_factory, "raw") as folder:
        path = folder / "model-raw.onnx"
        if not path.exists():
            path.write_bytes(export.to_onnx(model, raw=True))
    return path


@pytest.mark.slow
def test_raw_file_recognises_the_same_in_photographs_of_any_size(raw_file, model):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(raw_file))
    (entry,), (result, *_) = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.type) == ("image", "tensor(uint8)")
    assert entry.shape[2] == 3 and all(isinstance(side, str) for side in entry.shape[:2])
    assert (result.name, result.shape) == ("logits", [1, len(model.classes)])
    photographs = list(odd_photographs(200))
    assert {(1, 1, 3), (500, 1, 3), (1, 500, 3), (31, 33, 3)} <= {
        each.shape for each in photographs
    }
    found = [session.run(["logits"], {"image": each})[0] for each in photographs]
    expected = model.logits(squares_of(photographs, model.image_size, model.fit))
    export.compare_raw_logits(expected, np.concatenate(found))
    assert np.abs(expected - np.concatenate(found)).max() < 0.1


@pytest.mark.slow
def test_what_is_no_photograph_is_refused(raw_file):
    loaded = inference.load_model(raw_file)
    channels_last, grey = np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), np.uint8)
    for wrong in (channels_last, grey, np.zeros((3, 0, 40), np.uint8)):
        with pytest.raises(ValueError, match="3, H, W"):
            loaded.logits([wrong])
    for wrong in (np.zeros((3, 30, 40)), "cat.jpg"):
        with pytest.raises(TypeError, match="uint8|numpy"):
            loaded.logits([wrong])


@pytest.mark.slow
def test_metadata_tell_that_it_is_raw(raw_file, model):
    loaded = inference.load_model(raw_file)
    assert loaded.is_raw and loaded.fit == model.fit
    assert not model.is_raw
    for name in ("classes", "image_size", "temperature", "dataset", "test_accuracy"):
        assert getattr(loaded, name) == getattr(model, name), name


@pytest.mark.slow
def test_inference_hands_in_whole_photographs(raw_file, model, folder, tool_inside, monkeypatch):
    for number, photograph in enumerate(odd_photographs(8)):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned
        suffix = "jpg" if number > 5 else "png"
        Image.fromarray(photograph).save(f"{number}.{suffix}", exif=exif)
    names = sorted(path.name for path in folder.iterdir())
    (folder / "rubbish.png").write_text("no image")
    run = tool_inside("inference")
    rows = {}
    for path in (raw_file, model.path):
        out, err = run(*names, "rubbish.png", "--checkpoint", path, "--format", "csv", status=1)
        assert "rubbish.png" in err
        rows[path] = table_of(out)
    for row, expected in zip(rows[raw_file], rows[model.path], strict=True):
        assert row["file"] == expected["file"]
        assert float(row["confidence_1"]) == pytest.approx(
            float(expected["confidence_1"]), abs=0.02
        )

    loaded = inference.load_model(raw_file)
    shapes = []
    compute = loaded.compute_scores
    loaded.compute_scores = lambda images: shapes.extend(x.shape for x in images) or compute(images)
    results = inference.Results()
    inference.classify_files(loaded, [folder / "5.png", folder / "1.png"], 1, 0.0, results)
    assert shapes == [(3, 640, 427), (3, 1, 500)]  # turned
    size = model.image_size
    assert [picture.pixels.shape for picture in results.pictures] == [(3, size, size)] * 2
    (one,) = inference.predict(loaded, np.zeros((20, 30, 3), np.uint8))  # which makes the square
    assert one[0][0] == inference.predict(model, np.zeros((20, 30, 3), np.uint8))[0][0][0]


@pytest.mark.slow
def test_folder_is_evaluated_with_a_raw_file(raw_file, model, folder, tool_inside):
    name = model.classes[0]
    (folder / "new" / name).mkdir(parents=True)
    for number, photograph in enumerate(odd_photographs(6)):
        Image.fromarray(photograph).save(folder / "new" / name / f"{number}.png")
    accuracies = []
    for path in (raw_file, model.path):
        tool_inside("inference")("new", "--evaluate", "--checkpoint", path)
        result = json.loads((folder / "evaluated" / "evaluation.json").read_text())
        accuracies.append(result["test_accuracy"])
    assert accuracies[0] == accuracies[1]


# ---- the export ----


def test_raw_file_is_checked_and_named(model, folder, tool_inside, monkeypatch):
    """Written from made-up logits: what export.py prints, where it writes, and what it refuses."""
    wrong = []

    def load_model(path, *arguments):
        if str(path).endswith(".pth"):
            return inference.load_model(path, *arguments)

        class File:
            def logits(self, images):
                photographs = [image.transpose(1, 2, 0) for image in images]
                logits = model.logits(squares_of(photographs, model.image_size, model.fit))
                return logits[:, ::-1] if wrong else logits + 1e-4

        return File()

    monkeypatch.setattr(export, "to_onnx", lambda model, raw: b"raw" if raw else b"normal")
    monkeypatch.setattr(export, "load_model", load_model)
    monkeypatch.setattr(export, "dataset_available", lambda model: False)
    monkeypatch.setattr(export, "NUM_PHOTOGRAPHS", 12)
    (folder / "model_a.pth").write_bytes(model.path.read_bytes())
    run = tool_inside("export")
    out, _ = run("--raw", "--checkpoint", "model_a.pth")
    assert "photographs of odd sizes" in out and "model_a-raw.onnx" in out
    assert (folder / "model_a-raw.onnx").read_bytes() == b"raw"
    wrong.append(True)
    error = run.error("--raw", "--checkpoint", "model_a.pth", "--out", "other.onnx")
    assert "inference.py" in error
    assert not (folder / "other.onnx").exists()


def test_photographs_of_the_folder_are_compared_too(folder, photos, model):
    from conftest import load_photos

    alone = export.photographs_to_compare(model, None)
    assert len(alone) == export.NUM_PHOTOGRAPHS
    with_folder = export.photographs_to_compare(model, load_photos())
    assert len(with_folder) == 2 * export.NUM_PHOTOGRAPHS
    assert all(each.shape == (36, 48, 3) for each in with_folder[export.NUM_PHOTOGRAPHS :])


def test_class_may_differ_only_where_two_are_as_likely():
    expected = np.array([[1.0, 0.97], [2.0, 0.0]])
    almost = np.array([[0.98, 0.99], [2.0, 0.0]])
    assert "predictions for 1 of them" in export.compare_raw_logits(expected, almost)
    for found in (np.array([[1.0, 0.97], [0.0, 2.0]]), expected * np.nan):
        with pytest.raises(UserError):
            export.compare_raw_logits(expected, found)


def test_what_raw_does_not_go_with(folder, model, tool_inside):
    run = tool_inside("export")
    for others in (["--int8"], ["--format", "pt2"]):
        assert "--raw" in run.error("--raw", *others, "--checkpoint", model.path, status=2)
