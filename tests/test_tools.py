"""The tools around the program, each as a user runs it, on a model of real CIFAR-10 where there is some."""

import contextlib
import copy
import json
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Program, save, table_of, tool
from PIL import Image
from test_graphs import TINY

import image_classification as ic
import inference
from alternatives import datasets

# ---- inference.py ----


@pytest.fixture
def pictures(folder, model, data):
    """A folder with the newest model in it, and test images in the folder images/."""
    shutil.copy(model.path, folder)
    (folder / "images" / "deeper").mkdir(parents=True)
    for i in range(6):
        save(data.test.images[i], folder / "images" / ("deeper" if i % 2 else "") / f"{i}.png")
    return folder


def test_same_pixels_same_probabilities_in_any_batch_and_orientation(model, data, folder):
    """As in the test-set evaluation: within 1e-5."""
    count = 120
    expected = (ic.evaluate(model.network, *data.test).logits / model.temperature).softmax(1)[:count].numpy()
    images = data.test.images[:count].numpy()
    assert np.abs(inference.probabilities(model, images) - expected).max() < 1e-5
    alone = np.concatenate([inference.probabilities(model, image[None]) for image in images[:7]])
    assert np.abs(alone - expected[:7]).max() < 1e-5
    turned = []
    for orientation, undo in enumerate([None, 0, 3, 1, 5, 2, 6, 4], 1):  # the file is turned, and says so
        exif = Image.Exif()
        exif[274] = orientation
        image = Image.fromarray(images[3].transpose(1, 2, 0))
        image = image if undo is None else image.transpose(Image.Transpose(undo))
        image.save(path := folder / f"{orientation}.png", exif=exif)
        turned.append(path)
    for classes in inference.predict(model, turned, top_k=len(model.classes)):
        assert dict(classes) == pytest.approx(dict(zip(model.classes, expected[3], strict=True)), rel=0, abs=1e-5)


def test_images_and_folders_are_classified(pictures, model, data):
    out, err = tool("inference", pictures)("images", "images/0.png", "--top-k", "2")
    lines = out.splitlines()
    assert "trained on" in lines[0] and f"{100 * model.test_accuracy:.1f} %" in lines[0]
    assert all(name in lines[0] for name in model.classes) and "one of these" in lines[0]
    assert len(lines) == 1 + 7 and not err
    expected = inference.predict(model, data.test.images[:1].numpy(), 2)[0]
    assert lines[-1].split("  ")[-1].strip() == ", ".join(f"{name} {100 * sure:.1f} %" for name, sure in expected)


def test_formats_are_data_only(pictures, model, tool_inside, monkeypatch):
    drawn, draw = [], inference.draw
    monkeypatch.setattr(inference, "draw", lambda shown: drawn.extend(shown) or draw(shown))
    out, err = tool_inside("inference")("images", "--format", "csv", "--top-k", "10")
    rows = table_of(out)
    assert len(rows) == 6 and "trained on" in err
    for row in rows:
        assert row["answer"] == row["class_1"] in model.classes
        assert sum(float(row[f"confidence_{i}"]) for i in range(1, 11)) == pytest.approx(1, abs=1e-4)
    out, _ = tool_inside("inference")("images", "--format", "json", "--threshold", "1.0", "--save", "look.png")
    found = json.loads(out)
    assert [name.endswith(": unsure") for name, *_ in drawn] == [each["answer"] == "unsure" for each in found]
    assert [each["file"] for each in found] == [row["file"] for row in rows]
    assert all(each["answer"] == "unsure" or each["classes"][0]["confidence"] == 1 for each in found)
    with Image.open(pictures / "look.png") as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(2**24)) > 100


def test_what_cannot_be_read_costs_a_line_and_the_others_are_predicted(pictures):
    bad = pictures / "bad"
    (bad / "none").mkdir(parents=True)
    good = (pictures / "images" / "0.png").read_bytes()
    (bad / "cut.png").write_bytes(good[: len(good) // 2])
    (bad / "text.jpg").write_text("no image")
    (bad / "empty.png").write_bytes(b"")
    (bad / "notes.txt").write_text("not meant")
    Image.new("1", (20_000, 20_000)).save(bad / "bomb.png")
    names = ["images/0.png", "bad", "bad/none", "missing.jpg", "images/2.png"]
    out, err = tool("inference", pictures)(*names, "--format", "csv", status=1)
    assert [row["file"] for row in table_of(out)] == ["images/0.png", "images/2.png"]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 6
    for name in ("cut.png", "text.jpg", "empty.png", "bomb.png", "none", "missing.jpg"):
        assert sum(name in line for line in errors) == 1, name
    assert "notes.txt" not in err and str(pictures / "bad" / "text.jpg") not in out


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "F"])
def test_modes_of_images(model, data, folder, mode):
    """Whatever way the pixels are stored in, the network is shown the picture."""
    picture = Image.fromarray(data.test.images[0].permute(1, 2, 0).numpy()).resize((70, 40))
    of_numbers = {"I;16": (np.uint16, 257), "I": (np.int32, 257), "F": (np.float32, 1)}  # up to 65535 and 255
    if mode in of_numbers:
        picture = picture.convert("L")
        kind, factor = of_numbers[mode]
        stored = Image.fromarray(np.asarray(picture).astype(kind) * factor)
    else:
        picture = stored = picture.convert(mode)
    assert stored.mode == mode
    stored.save(folder / "stored.tiff")
    picture.convert("RGB").save(folder / "picture.png")
    found, expected = (inference.read_one(model, name).astype(int) for name in ("stored.tiff", "picture.png"))
    assert np.ptp(expected) > 50 and np.abs(found - expected).max() <= 1


def test_usage_of_inference(pictures, folder, model, tool_inside):
    run = tool_inside("inference")
    assert "required" in run.error(status=2)
    assert "--top-k" in run.error("images", "--top-k", "0", status=2)
    assert "--threshold" in run.error("images", "--threshold", "2", status=2)
    assert "nowhere.pth" in run.error("images", "--checkpoint", "nowhere.pth")
    assert "nowhere.onnx: No such file" in run.error("images", "--checkpoint", "nowhere.onnx")
    (folder / "rubbish.pth").write_bytes(b"rubbish")
    assert "rubbish.pth is damaged" in run.error("images", "--checkpoint", "rubbish.pth")
    (folder / "rubbish.onnx").write_bytes(b"rubbish")
    assert "cannot be had for ONNX" in run.error("images", "--checkpoint", "rubbish.onnx", "--device", "mps")
    assert len(run("images/*.png", "--format", "csv")[0].splitlines()) == 1 + len(list(folder.glob("images/*.png")))
    assert "rubbish.onnx is damaged" in run.error("images", "--checkpoint", "rubbish.onnx")
    (folder / model.path.name).unlink()
    assert "--checkpoint" in run.error("images")


def test_functions_of_the_reference(model, data, folder):
    path = save(data.test.images[0], folder / "a.png")
    figure = inference.visualize_predictions(model, path, torch.device("cpu"))
    figure.savefig(folder / "seen.png")
    assert (folder / "seen.png").stat().st_size > 3000
    (folder / "b.png").write_text("no")
    with pytest.raises(inference.InferenceError, match="b.png"):
        inference.predict(model, [path, folder / "b.png"])
    assert inference.predict(model, []) == []


def test_images_are_classified_in_batches(pictures, tool_inside, monkeypatch):
    """So that thousands need no more memory than a few."""
    read, seen, held, decode, ranked = [], [], [], datasets.decode, inference.ranked

    def watched(model, images, top_k):
        assert not any(earlier() is not None for earlier in held)  # those of the batches before are gone
        held.append(weakref.ref(images))
        seen.append((len(images), len(read)))
        return ranked(model, images, top_k)

    monkeypatch.setattr(inference, "AT_ONCE", 4)
    monkeypatch.setattr(datasets, "decode", lambda *given: (read.append(given), decode(*given))[1])
    monkeypatch.setattr(inference, "ranked", watched)
    out, _ = tool_inside("inference")("images", "--format", "csv")
    assert seen == [(4, 4), (2, 6)] and len(out.splitlines()) == 7


def test_model_that_names_no_data_set_is_taken_for_cifar10(model, folder):
    nameless = replace(model, settings={})
    assert not inference.at_hand(nameless)
    (folder / "data").mkdir()
    (folder / "data" / "test_batch").touch()
    assert inference.at_hand(nameless)


def test_checkpoint_of_a_folder_and_what_is_newest(pictures, model, tool_inside):
    assert tool_inside("inference")("images/0.png", "--checkpoint", model.path.parent)[0].startswith("model_cnn")
    shutil.copy(model.path, old := pictures / "model_old.pth")
    os.utime(old, (0, 0))
    run = pictures / "runs" / "CIFAR10" / "now"
    run.mkdir(parents=True)
    shutil.copy(model.path, run / "model_other.pth")
    out, err = tool_inside("inference")("images/0.png")
    assert "model_cnn" in out.splitlines()[0] and "is the newest of 2 models; --checkpoint names another" in err
    for path in pictures.glob("model_*.pth"):
        path.unlink()
    assert "model_other" in tool_inside("inference")("images/0.png")[0].splitlines()[0]


def test_confidence_that_is_not_calibrated_is_said(pictures, model, tool_inside):
    content = torch.load(model.path, weights_only=True)
    assert "not calibrated" not in tool_inside("inference")("images/0.png")[0]
    del content["metrics"]["temperature"]
    torch.save(content, pictures / model.path.name)
    assert "not calibrated" in tool_inside("inference")("images/0.png")[0]


def test_postscript_is_no_image(folder):
    """Pillow would start another program, Ghostscript, on it."""
    (folder / "cat.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n")
    with Image.open(folder / "cat.png") as picture:
        assert picture.format == "EPS"  # by its content
    with pytest.raises(OSError, match="cannot identify"):
        datasets.decode(folder / "cat.png", 32)
    assert not datasets.is_image(folder / "cat.png")


def test_names_that_matplotlib_and_the_shell_would_read(pictures, tool_inside):
    for name in ("$a_b$.png", "~tmp.png"):
        shutil.copy(pictures / "images" / "0.png", pictures / name)
    out, _ = tool_inside("inference")("$a_b$.png", "~tmp.png", "--save", "seen.png")
    assert "$a_b$.png" in out and "~tmp.png" in out and (pictures / "seen.png").exists()


def test_model_of_a_changed_script_is_remarked(folder, tool_inside, model, data):
    content = torch.load(model.path, weights_only=True)
    save(data.test.images[0], folder / "0.png")
    inference.remark.cache_clear()
    for script, said in ((ic.VERSIONS["script"], False), ("other", True)):
        content["versions"] |= {"script": script}
        torch.save(content, folder / "changed.pth")
        err = tool_inside("inference")("0.png", "--checkpoint", "changed.pth")[1]
        assert ("made by another image_classification.py" in err) == said


# ---- export.py ----


@pytest.fixture(scope="session")
def exported(model):
    """A model in ONNX, the same in 8 bits, and what export.py printed."""
    out, _ = tool("export", model.path.parent)("--int8", "--checkpoint", model.path.name)
    (small,) = model.path.parent.glob("model_*-int8.onnx")
    return model.path.with_suffix(".onnx"), small, out


def test_onnx_computes_the_same(exported, model, data):
    import onnxruntime

    path, _, out = exported
    assert "on 1000 images: logits differ by" in out and "class of 0 images differs" in out
    session = onnxruntime.InferenceSession(str(path))
    (entry,), (result,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.type, entry.shape[1:]) == ("images", "tensor(float)", [3, 32, 32])
    assert result.name == "logits" and isinstance(entry.shape[0], str)
    images = data.valid.images[:137]
    for count in (1, 137):
        (logits,) = session.run(["logits"], {"images": images[:count].numpy().astype(np.float32) / 255})
        assert np.abs(logits - model.logits(images[:count].numpy())).max() < 1e-3
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == model.classes and json.loads(metadata["image_size"]) == 32
    assert "bicubic" in metadata["resize"] and json.loads(metadata["temperature"]) == model.temperature


def test_int8_is_smaller_and_as_good(exported):
    _, path, out = exported
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith(("| float32", "| int8"))]
    (_, whole, size, _), (_, small, less, _) = rows
    assert float(less) < 0.5 * float(size)
    assert f"In 8 bits: {path.name}" in out
    assert inference.load_model(path).test_accuracy is None  # it was not tested
    assert float(whole.split()[0]) - float(small.split()[0]) <= 1.0


def test_int8_that_costs_too_much_is_refused(exported, model, data, folder, monkeypatch, capsys):
    """Judged on training images where there are no validation images: test images are used once."""
    export = pytest.importorskip("export")
    blind = copy.deepcopy(model.network)
    for weight in blind.parameters():
        torch.nn.init.zeros_(weight)
    useless = export.to_onnx(replace(model, network=blind))
    monkeypatch.setattr(export, "quantised", lambda path, images: useless)
    shutil.copy(exported[0], folder / "whole.onnx")
    monkeypatch.setattr(ic.Data, "test", property(lambda self: pytest.fail("test images are used")))
    for used, kind in ((data, "validation"), (replace(data, valid=data.valid.only(slice(0))), "training")):
        with pytest.raises(inference.InferenceError, match="8 bits cost this network .* is not written"):
            export.quantise(folder / "whole.onnx", folder / "small-int8.onnx", used)
        assert f" {kind} images |" in capsys.readouterr().out
    assert not (folder / "small-int8.onnx").exists()


def test_inference_without_torch(exported, pictures, model, data):
    """Where torch cannot be imported, the ONNX file gives the same answers."""
    hidden = pictures / "hidden"
    hidden.mkdir()
    for name in ("torch", "torchvision", "sklearn", "scipy", "matplotlib"):
        (hidden / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here', name={name!r})")
    run = tool("inference", pictures)
    environment = {"PYTHONPATH": str(hidden)}
    out, _ = run("images", "--checkpoint", exported[0], "--format", "csv", env=environment)
    rows = table_of(out)
    assert {row["file"] for row in rows} == {str(path) for path in Path("images").rglob("*.png")}
    assert [row["class_1"] for row in rows] == [inference.predict(model, [row["file"]])[0][0][0] for row in rows]
    assert "pip install -r requirements.txt" in run.error("images", env=environment)


def test_pt2_computes_the_same(trained, model, data, folder, tool_inside):
    out, _ = tool_inside("export")("--checkpoint", model.path, "--format", "pt2", "--out", "m.pt2")
    assert "logits differ by" in out
    extra = {"classification.json": ""}
    program = torch.export.load(folder / "m.pt2", extra_files=extra).module()
    assert json.loads(json.loads(extra["classification.json"])["classes"]) == model.classes
    images = data.valid.images[:5]
    assert np.abs(program(images / 255).detach().numpy() - model.logits(images.numpy())).max() < 1e-3


def test_export_that_computes_something_else_is_refused(model, folder, tool_inside, monkeypatch):
    import export

    logits = np.random.default_rng(0).normal(size=(10, 4))
    assert "differ by 1.0e-04" in export.check(logits, logits + 1e-4)
    for wrong in (logits + 2e-3, logits * np.nan):
        with pytest.raises(inference.InferenceError):
            export.check(logits, wrong)
    (folder / "m.onnx").write_text("an earlier one")
    monkeypatch.setattr(export.Deployable, "forward", lambda self, images: self.network(images))  # not normalised
    assert "not compute the same" in tool_inside("export").error("--checkpoint", model.path, "--out", "m.onnx")
    assert (folder / "m.onnx").read_text() == "an earlier one"


def test_usage_of_export(pictures, model, tool_inside):
    path = pictures / model.path.name
    assert "end in .onnx" in tool_inside("export").error("--out", path.name, status=2)
    assert "--int8" in tool_inside("export").error("--format", "pt2", "--int8", status=2)
    assert path.read_bytes() == model.path.read_bytes()


def test_export_where_the_data_are_not(pictures, model, tool_inside):
    out, _ = tool_inside("export")("--data-dir", "nowhere", "--format", "pt2")
    if model.dataset == "CIFAR10":
        assert "random images" in out and "Downloading" not in out
    assert "on 1000 images" in out


# ---- explain.py ----


def test_long_titles_get_smaller_letters():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    sizes = [text.get_fontsize() for text in ic.draw_images(images, ["cat", "x" * 44, ""], 3).axes[0].texts]
    assert sizes == [7, 3.5, 7]


@pytest.mark.parametrize("size", [2, 3, 8, 32, 100])
@pytest.mark.parametrize("count", [1, 7])
def test_images_are_below_their_titles(folder, size, count):
    """Each black one in its column, with nothing of a title on it, and no other black but the titles'."""
    figure = ic.draw_images(torch.zeros(count, 3, size, size, dtype=torch.uint8), ["one\nand two"] * count, 5)
    black = torch.from_numpy(ic.save_figure(figure, folder / "a.png").copy()).float().mean(2) < 128
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        x, bottom = round((box.x0 + box.x1) / 2), round(len(black) - box.y0)
        assert not black[bottom : bottom + 2, x].any() and black[bottom + 8 : bottom + 100, x].all()


def test_pictures_of_what_it_sees(trained, model, data, folder):
    out, _ = tool("explain", folder)("--checkpoint", model.path)
    found = folder / "explained"
    names = ["gallery_correct", "gallery_correct_cam", "gallery_incorrect", "gallery_incorrect_cam", "filters"]
    for name in [*names, "feature_maps"]:
        with Image.open(found / f"{name}.png") as picture:
            assert picture.width > 300 and len(picture.convert("RGB").getcolors(2**24)) > 50, name
    rows = table_of((found / "confused.csv").read_text())
    counts = [int(row["confused"]) for row in rows]
    guess = ic.evaluate(model.network, *data.test).logits.argmax(1)
    assert sum(counts) == int((guess != data.test.labels).sum())
    assert counts == sorted(counts, reverse=True) and f"{rows[0]['class']} and {rows[0]['other']}" in out


def test_heat_lies_on_what_is_there(model, data):
    """An image in a corner of an otherwise blank canvas has most of the heat: the maps mean something."""
    import explain

    size = data.test.images.shape[-1]
    guess = ic.evaluate(model.network, *data.test).logits.argmax(1)
    chosen = (guess == data.test.labels).nonzero()[:40, 0]
    inside = []
    for place, i in enumerate(chosen):
        top, left = (place % 2) * size, (place // 2 % 2) * size
        canvas = torch.full((1, 3, 2 * size, 2 * size), 128, dtype=torch.uint8)
        canvas[0, :, top : top + size, left : left + size] = data.test.images[i]
        heat = explain.grad_cam(model.network, canvas, guess[i][None])[0]
        inside.append(float(heat[top : top + size, left : left + size].sum() / heat.sum().clamp(min=1e-9)))
    assert np.mean(inside) > 0.5  # of a quarter of the canvas
    assert np.mean(np.array(inside) > 0.5) > 0.7


def test_epochs_become_an_animation(trained, model, folder, tool_inside):
    tool_inside("explain")("--animate", trained / "run")
    paths = list((folder / "explained").glob("cam_*.gif"))
    assert len(paths) == len(model.classes)
    with Image.open(paths[0]) as picture:
        assert picture.n_frames == 4 and picture.info["loop"] == 0
    assert "--keep-epochs" in tool_inside("explain").error("--animate", folder)


def test_label_issues_and_data_that_moved(folder, inside, tool_inside):
    """A folder of digits, some in the wrong class, moved after the training."""
    digits = ic.load_data(ic.Config(dataset="digits"))
    for i, (image, label) in enumerate(zip(*digits.train, strict=True)):
        place = folder / "here" / f"number {label if i % 60 else (label + 1) % 10}"
        place.mkdir(parents=True, exist_ok=True)
        save(image, place / f"{i}.png")
    inside("--dataset", "here", "--epochs", "4", "--width", "0.5", "--augment", "none", "--image-size", "16")
    (folder / "here").rename(folder / "there")
    explain = tool_inside("explain")
    assert "--data-dir" in explain.error("--label-issues")
    out, _ = explain("--label-issues", "--data-dir", "there")
    rows = table_of((folder / "explained" / "label_issues.csv").read_text())
    assert all((folder / row["file"]).exists() for row in rows)
    assert sum(int(Path(row["file"]).stem) % 60 == 0 for row in rows[:10]) >= 7  # by chance none
    assert "are others than in training" not in out
    explain("--image", picture := next((folder / "there").rglob("*.png")))
    assert (folder / "explained" / f"feature_maps_{picture.stem}.png").exists()


# ---- every network ----


@pytest.mark.parametrize(
    "name",
    ["cnn", "beginner-cnn", "coursework-cnn", "notebook-cnn", "fcn", "fftnet", "convnet", "resnet18", "resnet50",
     "resnet18-dropout", "airbench94", "torchvision:squeezenet1_1", "torchvision:mobilenet_v3_small"],
)  # fmt: skip
def test_every_network_is_exported_and_explained(name, folder):
    import explain
    import export

    small = name in ("resnet18", "resnet50", "resnet18-dropout", "airbench94")  # which take images of any size
    size = 64 if name.startswith("torchvision") else 16 if small else 32
    config = ic.Config(dataset="digits", model=name, image_size=size)
    data = ic.load_data(config)
    network = ic.build_model(config, data)
    with torch.no_grad():  # batch norm gets statistics of its own
        network.train()(ic.normalise(data.train.images[:16], network))
    ic.save_checkpoint("m.pth", {"model": network.state_dict(), "config": ic.asdict(config), "classes": data.classes,
                                 "mean": data.mean, "std": data.std, "image_size": size, "dataset": "digits",
                                 "metrics": {}, "versions": {}})  # fmt: skip
    model = inference.load_model("m.pth", "cpu")
    ic.write_atomically(folder / "m.onnx", export.to_onnx(model))
    images = data.test.images[:53].numpy()  # more than go through a network at once
    export.check(model.logits(images), inference.load_model("m.onnx").logits(images))
    with pytest.raises(inference.InferenceError) if name == "fcn" else contextlib.nullcontext():
        heat = explain.grad_cam(model.network, data.test.images[:2], torch.zeros(2, dtype=torch.int64))
        assert heat.shape == (2, size, size) and heat.min() >= 0 and heat.max() <= 1
    explain.feature_maps(model, data.test.images[:1], folder / "feature_maps.png")
    explain.filters(model.network, folder)


@pytest.mark.parametrize("name", ["inference", "export", "explain", "app"])
def test_help_of_the_tools(name, tool_inside):
    text, _ = tool_inside(name)("--help")
    assert f"python {name}.py" in text and "--checkpoint" in text


@pytest.mark.parametrize(("name", "package", "file"), [
    ("inference", "PIL", "requirements.txt"), ("compare", "tqdm", "requirements.txt"),
    ("image_classification", "torch", "requirements.txt"), ("export", "onnx", "requirements-extras.txt"),
    ("explain", "captum", "requirements-extras.txt"), ("app", "gradio", "requirements-extras.txt"),
    ("tune", "optuna", "requirements-extras.txt"),
])  # fmt: skip
def test_missing_package_is_named(name, package, file, folder):
    (folder / f"{package}.py").write_text(f"raise ModuleNotFoundError('no {package} here', name='{package}')")
    line = tool(name, folder).error(env={"PYTHONPATH": str(folder)})
    assert package in line and f"pip install -r {file}" in line


def test_inference_copied_without_alternatives_says_so(folder):
    script = shutil.copy(REPOSITORY / "inference.py", folder / "inference.py")
    assert "No module named 'alternatives': copy that folder too" in Program(folder, script).error("cat.jpg")


def test_own_network_is_named_again(folder, tool_inside):
    """A model file never makes a tool run the file that it names."""
    (folder / "net.py").write_text(TINY)
    report = ic.train(ic.Config(dataset="digits", model="net.py:tiny", epochs=1, subset=300))
    (folder / "net.py").rename(folder / "moved.py")
    save(ic.load_data(ic.Config(dataset="digits")).test.images[0], folder / "a.png")
    error = tool_inside("inference").error("a.png", "--checkpoint", report.checkpoint)
    assert "holds a network of its own: give --model net.py:tiny" in error
    tool_inside("inference")("a.png", "--checkpoint", report.checkpoint, "--model", "moved.py:tiny")
    tool_inside("explain")("--label-issues", "--checkpoint", report.checkpoint, "--model", "moved.py:tiny")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_tools_on_cuda(model, data, folder):
    there = inference.load_model(model.path, "cuda")
    images = data.test.images[:100].numpy()
    assert np.abs(inference.probabilities(there, images) - inference.probabilities(model, images)).max() < 1e-4
    tool("explain", folder)("--checkpoint", model.path, "--device", "cuda")
