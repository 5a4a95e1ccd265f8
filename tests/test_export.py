"""export.py: files that compute the same elsewhere."""

import contextlib
import io
import json
import logging
import shutil
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import save, shared_folder, table_of, tool, write_images

import export
import image_classification as ic
import inference
from classifier.cli import run_tool
from classifier.datasets.dataset import Dataset
from classifier.errors import UserError

NETWORKS = [
    "cnn",
    "beginner-cnn",
    "coursework-cnn",
    "notebook-cnn",
    "fcn",
    "fftnet",
    "convnet",
    "airbench94",
    "torchvision:squeezenet1_1",
    "timm:test_efficientnet",
]


@pytest.fixture(scope="session")
def exported(model, tmp_path_factory):
    """A folder with model.onnx, model-int8.onnx, model.pt2 and what export.py printed of them."""
    with shared_folder(tmp_path_factory, "exported") as folder:
        if not (folder / "out.txt").exists():
            shutil.copy(model.path, folder / "model.pth")
            printed = io.StringIO()
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
                patch.chdir(folder)
                for options in (["--int8"], ["--format", "pt2"]):
                    patch.setattr(sys, "argv", ["export.py", *options, "--checkpoint", "model.pth"])
                    assert run_tool(export.main) == 0
            (folder / "out.txt").write_text(printed.getvalue())
    return folder


# ---- ONNX ----


@pytest.mark.slow
def test_onnx_computes_the_same(exported, model, data):
    import onnxruntime

    out = (exported / "out.txt").read_text()
    assert "on 1000 images: logits differ by" in out and "predictions for 0 of them" in out
    session = onnxruntime.InferenceSession(str(exported / "model.onnx"))
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type) == ("images", "tensor(float)")
    size = model.image_size
    assert entry.shape[1:] == [3, size, size] and isinstance(entry.shape[0], str)
    assert [result.name for result in session.get_outputs()] == ["logits", "ood_score"]
    images = data.valid.images[:137].numpy()
    for count in (1, 137):
        inputs = images[:count].astype(np.float32) / 255
        (logits,) = session.run(["logits"], {"images": inputs})
        assert np.abs(logits - model.logits(images[:count])).max() < 1e-3


@pytest.mark.slow
def test_metadata_of_onnx(exported, model):
    loaded = inference.load_model(exported / "model.onnx")
    for name in ("classes", "image_size", "temperature", "dataset", "test_accuracy"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert export.metadata(model).keys() == {*inference.ONNX_METADATA, "fit", "resize"}
    assert export.metadata(model, scored=True).keys() - export.metadata(model).keys() == {
        "ood_quantiles",
        "ood_threshold",
    }
    assert "bicubic" in json.loads(export.metadata(model)["resize"])


@pytest.mark.slow
def test_onnx_calls_the_same_images_unknown(exported, model, data):
    loaded = inference.load_model(exported / "model.onnx")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (20, *data.test.images.shape[1:]), generator=generator).byte()
    images = torch.cat([data.test.images[:200], noise]).numpy()
    _, expected = model.score(images)
    _, found = loaded.score(images)
    assert np.abs(found - expected).max() < 0.01
    assert (found[-20:] > 0.95).all() and (found[:200] > 0.95).mean() < 0.3
    about = export.metadata(model, scored=True)
    _, scores = loaded.compute_scores(images)
    is_beyond = scores > json.loads(about["ood_threshold"])
    assert is_beyond.tolist() == [each.is_unknown for each in inference.predict(loaded, images)]
    out = (exported / "out.txt").read_text()
    assert "unknown for 0" in out and "does not tell which images are unknown" in out


@pytest.mark.slow
def test_exported_file_without_torch(exported, model, data, folder):
    hidden = folder / "hidden"
    hidden.mkdir()
    text = "raise ModuleNotFoundError('no torch here', name='torch')"
    (hidden / "torch.py").write_text(text)
    for i in range(6):
        save(data.test.images[i], folder / f"{i}.png")
    names = [f"{i}.png" for i in range(6)]
    arguments = [*names, "--checkpoint", exported / "model.onnx", "--format", "csv"]
    out, _ = tool("inference", folder)(*arguments, env={"PYTHONPATH": str(hidden)})
    predicted = inference.predict(model, names)
    rows = table_of(out)
    assert [row["class_1"] for row in rows] == [classes[0][0] for classes in predicted]
    is_unknown = [row["answer"] == "unknown" for row in rows]
    assert is_unknown == [classes.is_unknown for classes in predicted]


# ---- 8 bits ----


@pytest.mark.slow
def test_int8_is_smaller_and_as_good(exported):
    out = (exported / "out.txt").read_text()
    table = [line for line in out.splitlines() if line.startswith(("| float32", "| int8"))]
    (_, accuracy, _, _), (_, int8_accuracy, _, _) = [
        line.strip("| ").split(" | ") for line in table
    ]
    size = (exported / "model.onnx").stat().st_size
    int8_size = (exported / "model-int8.onnx").stat().st_size
    assert int8_size < 0.7 * size  # of so small a network the graph itself is a good part
    assert float(accuracy.split()[0]) - float(int8_accuracy.split()[0]) <= 1.0
    assert "In 8 bits: model-int8.onnx" in out
    int8 = inference.load_model(exported / "model-int8.onnx")
    assert int8.test_accuracy is None  # it was not tested
    assert int8.temperature is not None
    assert int8.quantiles is None  # distances in 8 bits are others


@pytest.mark.slow
def test_int8_that_costs_too_much_is_refused(exported, model, data, folder, monkeypatch, capsys):
    """Judged on training images where there are no validation images: test images are used once."""
    useless = onnx.load(exported / "model.onnx")
    for weight in useless.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT:
            weight.raw_data = bytes(len(weight.raw_data))
    monkeypatch.setattr(export, "quantise", lambda path, images: useless.SerializeToString())
    monkeypatch.setattr(Dataset, "test", property(lambda self: pytest.fail("test images are used")))
    shutil.copy(exported / "model.onnx", folder / "whole.onnx")
    small = replace(data, train=data.train.first(300), valid=data.valid.first(300))
    without_validation = replace(small, valid=data.valid.first(0))
    for used, kind in ((small, "validation"), (without_validation, "training")):
        with pytest.raises(UserError, match=r"small-int8\.onnx"):
            export.export_int8(folder / "whole.onnx", folder / "small-int8.onnx", used)
        assert f" {kind} images |" in capsys.readouterr().out
    assert not (folder / "small-int8.onnx").exists()


def test_calibration_hands_out_every_image_once():
    images = np.arange(250, dtype=np.uint8).reshape(250, 1, 1, 1)
    reader = export.CalibrationBatches(images)
    batches = []
    while (batch := reader.get_next()) is not None:
        batches.append(batch["images"])
    assert len(batches) == 2 and reader.get_next() is None
    together = np.concatenate(batches)
    assert together.dtype == np.float32
    assert together == pytest.approx(images / 255)
    assert export.CalibrationBatches(images[:3]).get_next()["images"].shape == (3, 1, 1, 1)


@pytest.mark.slow
def test_quantising_leaves_logging_as_it_was(exported, data):
    export.quantise(exported / "model.onnx", data.train.images[:20].numpy())
    assert logging.root.manager.disable == logging.NOTSET


# ---- PyTorch's own format ----


@pytest.mark.slow
def test_pt2_computes_the_same(exported, model, data):
    assert (exported / "out.txt").read_text().count("logits differ by") == 2
    extra_files = {"classification.json": ""}
    program = torch.export.load(exported / "model.pt2", extra_files=extra_files).module()
    assert json.loads(extra_files["classification.json"]) == export.metadata(model)
    images = data.valid.images[:5]
    with torch.no_grad():
        logits = program(images / 255).numpy()
    assert np.abs(logits - model.logits(images.numpy())).max() < 1e-3


# ---- what is refused ----


def test_logits_that_differ_are_refused():
    logits = np.random.default_rng(0).normal(size=(10, 4))
    assert "differ by 1.0e-04" in export.compare_logits(logits, logits + 1e-4)
    almost_equal = np.zeros((10, 4))
    changed = almost_equal.copy()
    changed[2:, 1] = 5e-4
    assert "predictions for 8 of them" in export.compare_logits(almost_equal, changed)
    for wrong in (logits + 2e-3, logits * np.nan, logits * np.inf):
        with pytest.raises(UserError):
            export.compare_logits(logits, wrong)


@pytest.mark.slow
def test_export_that_computes_something_else_is_refused(model, folder, tool_inside, monkeypatch):
    (folder / "m.pt2").write_text("an earlier one")

    def not_normalised(self, images):
        return self.network(images)

    monkeypatch.setattr(export.NormalisedNetwork, "forward", not_normalised)
    arguments = ["--checkpoint", model.path, "--format", "pt2", "--out", "m.pt2"]
    _, err = tool_inside("export")(*arguments, status=1)
    assert err.startswith("error: ") and "PyTorch" in err
    assert (folder / "m.pt2").read_text() == "an earlier one"


@pytest.mark.slow
def test_folder_of_the_export_is_made(model, folder, tool_inside):
    arguments = ["--checkpoint", model.path, "--format", "pt2", "--out", "new/folder/m.PT2"]
    tool_inside("export")(*arguments)
    assert (folder / "new" / "folder" / "m.PT2").exists()


def test_file_that_cannot_be_written_is_noticed_before_the_work(
    model, folder, tool_inside, unwritable, monkeypatch
):
    monkeypatch.setattr(export, "to_pt2", lambda model: pytest.fail("it has begun"))
    (folder / "kept").mkdir()
    (folder / "file").touch()
    unwritable(folder / "kept")
    for place in ("kept", "file"):
        arguments = ["--checkpoint", model.path, "--format", "pt2", "--out", f"{place}/m.pt2"]
        assert place in tool_inside("export").error(*arguments)


def test_wrong_usage(folder, model, tool_inside):
    shutil.copy(model.path, folder / "model.pth")
    run = tool_inside("export")
    assert "--out" in run.error("--out", "model.pth", status=2)
    assert "--int8" in run.error("--format", "pt2", "--int8", status=2)
    assert "nowhere.pth" in run.error("--checkpoint", "nowhere.pth")
    assert (folder / "model.pth").read_bytes() == model.path.read_bytes()


@pytest.mark.slow
def test_onnx_file_cannot_be_exported_again(exported, tool_inside):
    assert "model.onnx" in tool_inside("export").error("--checkpoint", exported / "model.onnx")


# ---- the images of the comparison ----


def test_images_to_compare_are_validation_images_first(model, data, capsys):
    few = replace(data, valid=data.valid.first(30), train=data.train.first(50))
    images = export.images_to_compare(model, few)
    expected = torch.cat([few.valid.images, few.train.images]).numpy()
    assert np.array_equal(images, expected)
    assert len(export.images_to_compare(model, data)) == export.NUM_COMPARED
    assert capsys.readouterr().out == ""


def test_random_images_where_the_data_set_is_not(model, capsys):
    images = export.images_to_compare(model, None)
    assert images.shape == (1000, 3, model.image_size, model.image_size)
    assert images.dtype == np.uint8 and images.max() == 255
    assert "--data-dir" in capsys.readouterr().out


def test_typed_folder_without_the_data_set_is_an_error(model, folder, tool_inside):
    content = torch.load(model.path, weights_only=True)
    for dataset in ("cifar10", "mnist", "photos"):
        content["config"]["dataset"] = dataset
        torch.save(content, folder / "model_any.pth")
        error = tool_inside("export").error("--format", "pt2", "--data-dir", "wrong")
        assert "wrong" in error, dataset
        assert not (folder / "model_any.pt2").exists()


@pytest.mark.slow
def test_reason_for_random_images_is_the_true_one(folder, inside, tool_inside):
    """The data set is there, and was refused: it is not said to be missing."""
    write_images(folder / "photos", {"red": 20, "green": 20})
    settings = ["--epochs", "1", "--width", "0.25", "--image-size", "16", "--out", "model_a.pth"]
    inside("--dataset", "photos", *settings)
    (folder / "photos" / "red").rename(folder / "photos" / "\x1b[31mred")
    content = torch.load("model_a.pth", weights_only=True)
    (folder / "photos").rename(folder / "photos\x1b[2J")
    content["config"]["dataset"] = str(folder / "photos\x1b[2J")
    torch.save(content, "model_a.pth")
    out, err = tool_inside("export")("--format", "pt2")
    assert "random images" in out and "not here" not in out
    assert "\x1b" not in out + err


@pytest.mark.slow
def test_export_downloads_nothing(model, folder, tool_inside, monkeypatch):
    """A model of CIFAR-10 is compared on random images where CIFAR-10 is not."""
    content = torch.load(model.path, weights_only=True)
    content["config"] |= {"dataset": "cifar10", "data_dir": "nowhere"}
    torch.save(content, folder / "model_cifar10.pth")
    out, _ = tool_inside("export")("--format", "pt2")
    assert "random images" in out and "Downloading" not in out
    assert "on 1000 images" in out and (folder / "model_cifar10.pt2").exists()


# ---- the program ----


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_exported(name, folder):
    size = 16 if name == "airbench94" else 32
    if name.startswith(("torchvision:", "timm:")):
        size = 64
    config = ic.Config(dataset="digits", subset=100, model=name, image_size=size)
    data = ic.load_data(config)
    network = ic.build_model(config, data)
    with torch.no_grad():  # batch norm gets statistics that are not its first ones
        network.train()(ic.normalise(data.train.images[:16], network))
    content = {
        "model": network.state_dict(),
        "config": vars(config),
        "classes": data.classes,
        "mean": data.mean,
        "std": data.std,
        "image_size": size,
        "dataset": "digits",
        "metrics": {},
        "versions": {},
    }
    ic.save_checkpoint("m.pth", content)
    model = inference.load_model("m.pth", "cpu")
    (folder / "m.onnx").write_bytes(export.to_onnx(model))
    images = data.test.images[:53].numpy()  # more than go through a network at once
    logits = inference.load_model("m.onnx").logits(images)
    export.compare_logits(model.logits(images), logits)


@pytest.mark.slow
def test_old_model_is_exported(folder, tool_inside):
    """A model of version 0.9.1, whose layers had other names."""
    from test_inference import OLD_FILES

    path = OLD_FILES / "model_cnn_digits.pth"
    tool_inside("export")("--checkpoint", path, "--format", "pt2", "--out", "old.pt2")
    model = inference.load_model(path, "cpu")
    images = inference.load_dataset_of(model).test.images[:20].numpy()
    assert np.abs(export.pt2_logits("old.pt2", images) - model.logits(images)).max() < 1e-3


def test_help(tool_inside):
    text, _ = tool_inside("export")("--help")
    assert "python export.py" in text and "--checkpoint" in text
    assert "--device" not in text


def test_missing_package_is_named(folder):
    (folder / "onnx.py").write_text("raise ModuleNotFoundError('no onnx here', name='onnx')")
    error = tool("export", folder).error(env={"PYTHONPATH": str(folder)})
    assert "onnx" in error and "pip install -r requirements-extras.txt" in error
