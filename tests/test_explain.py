"""explain.py: galleries, Grad-CAM, feature maps, animations, and labels that are probably wrong."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, beforehand, load_photos, save, table_of, tool, write_images
from PIL import Image
from torch import nn

import explain
import image_classification as ic
import inference
from classifier.config import Config
from classifier.errors import Diverged, UsageError, UserError
from classifier.progress import COLUMNS
from classifier.resolve import resolve_defaults
from classifier.seen_images import TRAIN_DIGESTS

TINY = """
from torch import nn

def tiny(classes=10, channels=3, image_size=32):
    features = channels * image_size**2 // 16
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(features, classes))
"""


def untrained(image_size=16, **settings):
    """A Trainer for some of the digits that has not made a step."""
    config = ic.Config(dataset="digits", subset=200, image_size=image_size, **settings)
    data = ic.load_data(config)
    config = resolve_defaults(config, data, ic.DEFAULT_RECIPE)
    return ic.Trainer(config, data, torch.device("cpu"))


def save_model(trainer, path):
    """Write a model file with the weights of this moment."""
    trainer.state.progress.history.append(dict.fromkeys(COLUMNS))
    ic.save_checkpoint(path, trainer.state.model_file())


# ---- feature maps and Grad-CAM ----


class ThreeSizes(nn.Module):
    """Feature maps of 8, 4, 8 and 4 pixels, then a vector and maps of one pixel."""

    def __init__(self):
        super().__init__()
        self.down = nn.AvgPool2d(2)
        self.up = nn.Upsample(scale_factor=2)
        self.down_again = nn.AvgPool2d(2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("pixel_mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("pixel_scale", torch.ones(1, 3, 1, 1) / 255)

    def forward(self, images):
        maps = self.down_again(self.up(self.down(images * self.scale)))
        return self.flatten(self.pool(maps))


def test_stages_are_the_last_layers_of_each_size():
    image = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    network = ThreeSizes()
    stages = explain.find_stages(network, image)
    assert [stage.name for stage in stages] == ["up", "down_again"]
    assert [stage.layer for stage in stages] == [network.up, network.down_again]
    assert [tuple(stage.output.shape) for stage in stages] == [(1, 3, 8, 8), (1, 3, 4, 4)]
    assert all((stage.output == 1).all() for stage in stages)
    assert not any(layer._forward_hooks for layer in network.modules())


class Normalised(nn.Module):
    """A network that takes bytes as they are."""

    def __init__(self):
        super().__init__()
        self.register_buffer("pixel_mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("pixel_scale", torch.ones(1, 3, 1, 1) / 255)
        self.down = nn.Conv2d(3, 8, 2, 2)


class SharedActivation(Normalised):
    """The same activation after the last feature maps and after a linear layer."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.hidden = nn.Linear(8, 4)

    def forward(self, images):
        maps = self.relu(self.down(images))
        return self.relu(self.hidden(maps.mean((2, 3))))


class Tokens(Normalised):
    """Patches of the image become a sequence, as in a vision transformer."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 4)

    def forward(self, images):
        return self.mix(self.down(images).flatten(2).transpose(1, 2)).mean(1)


class ChannelsLast(Normalised):
    """Feature maps with the channels in the last place, as in a Swin transformer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, images):
        return self.norm(self.down(images).permute(0, 2, 3, 1)).mean((1, 2))


def test_layer_that_is_called_again_is_not_taken_for_the_last():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    network = SharedActivation().eval()
    assert explain.find_grad_cam_layer(network, images[:1]) is network.down
    assert explain.grad_cam(network, images, torch.tensor([0, 1])).shape == (2, 8, 8)


@pytest.mark.parametrize("kind", [Tokens, ChannelsLast])
def test_network_that_does_not_end_in_feature_maps_has_no_grad_cam(kind):
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    network = kind().eval()
    assert [stage.name for stage in explain.find_stages(network, images[:1])] == ["down"]
    with pytest.raises(UserError, match="Grad-CAM"):
        explain.grad_cam(network, images, torch.tensor([0, 1]))


def test_heat_is_where_the_class_is():
    """The logit of a class is the mean of a colour: the heat lies on the half with that colour."""
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[:, 0, :, :4] = 255  # red on the left
    images[:, 2, :, 4:] = 255  # blue on the right
    heat = explain.grad_cam(ThreeSizes().eval(), images, torch.tensor([0, 2]))
    assert heat.shape == (2, 8, 8) and heat.dtype == torch.float32
    assert heat[0, :, :2].min() == 1 and heat[0, :, 6:].max() == 0
    assert heat[1, :, 6:].min() == 1 and heat[1, :, :2].max() == 0


def test_grad_cam_of_many_images_is_that_of_each(model, data, monkeypatch):
    images, labels = data.test.first(5)
    monkeypatch.setattr(explain, "CAM_BATCH_SIZE", 2)
    together = explain.grad_cam(model.network, images, labels)
    for i in range(5):
        alone = explain.grad_cam(model.network, images[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(together[i], alone[0], rtol=1e-3, atol=1e-3)


def test_network_without_feature_maps_has_no_grad_cam(folder, capsys):
    trainer = untrained(model="fcn")
    save_model(trainer, folder / "model.pth")
    model = inference.load_model(folder / "model.pth", "cpu")
    images, labels = trainer.data.test.first(2)
    with pytest.raises(UserError):
        explain.grad_cam(model.network, images, labels)
    explain.draw_filters(model.network, folder)
    explain.draw_feature_maps(model, images[:1], folder / "feature_maps.png")
    explain.draw_galleries(model, trainer.data.test.first(30), folder)
    out = capsys.readouterr().out
    assert "No filters.png" in out and "No gallery_incorrect_cam.png" in out
    assert {path.name for path in folder.glob("*.png")} >= {
        "feature_maps.png",
        "gallery_incorrect.png",
    }


def test_heat_lies_on_what_is_there(model, data):
    """An image in a corner of an otherwise grey canvas has most of the heat."""
    size = data.test.images.shape[-1]
    predictions = ic.evaluate(model.network, *data.test.first(300)).logits.argmax(1)
    is_correct = predictions == data.test.labels[:300]
    shares = []
    for number, i in enumerate(is_correct.nonzero()[:40, 0]):
        top, left = size * (number % 2), size * (number // 2 % 2)
        corner = (..., slice(top, top + size), slice(left, left + size))
        canvas = torch.full((1, 3, 2 * size, 2 * size), 128, dtype=torch.uint8)
        canvas[corner] = data.test.images[i]
        heat = explain.grad_cam(model.network, canvas, predictions[i][None])
        shares.append(float(heat[corner].sum() / heat.sum().clamp(min=1e-9)))
    assert np.mean(shares) > 0.5  # of a quarter of the canvas
    assert np.mean(np.array(shares) > 0.5) > 0.7


def test_overlay_hides_more_where_it_is_hot():
    images = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 255)]).byte()
    heat = torch.zeros(2, 4, 4)
    heat[:, :, 2:] = 1
    black, white = explain.overlay(images, heat).float()
    opacity = 1 - (white - black) / 255
    assert opacity[:, :, :2].numpy() == pytest.approx(0.15, abs=0.01)
    assert opacity[:, :, 2:].numpy() == pytest.approx(0.55, abs=0.01)


# ---- pictures of a model ----


@pytest.mark.pictures
@pytest.mark.slow
def test_pictures_of_what_a_model_sees(model, data, folder, tool_inside):
    out, _ = tool_inside("explain")("--checkpoint", model.path, "--device", "cpu")
    found = folder / "explained"
    galleries = ["gallery_correct", "gallery_incorrect"]
    names = [*galleries, *(f"{name}_cam" for name in galleries), "filters", "feature_maps"]
    for name in names:
        with Image.open(found / f"{name}.png") as picture:
            assert picture.width > 300 and len(picture.convert("RGB").getcolors(2**24)) > 50, name
    rows = table_of((found / "confused.csv").read_text())
    counts = [int(row["confused"]) for row in rows]
    predictions = ic.evaluate(model.network, *data.test).logits.argmax(1)
    assert sum(counts) == int((predictions != data.test.labels).sum())
    assert counts == sorted(counts, reverse=True)
    assert f"{rows[0]['class']} and {rows[0]['other']}" in out


def test_confused_classes(folder, capsys):
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    predictions = torch.tensor([0, 1, 1, 1, 0, 2, 2, 1])
    explain.list_confused_classes(["cat", "dog", "car"], labels, predictions, folder)
    first, second = table_of((folder / "confused.csv").read_text())
    assert list(first.values()) == ["cat", "dog", "3", "2", "1", "0.6"]
    assert list(second.values()) == ["dog", "car", "1", "0", "1", "0.2"]
    assert "cat and dog: 3 confused, 60.0 % of both (2 cat as dog, 1 dog as cat)" in (
        capsys.readouterr().out
    )


def test_galleries_are_sorted_by_confidence(model, data, folder, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        explain,
        "save_grid",
        lambda images, titles, columns, path: shown.update({path.stem: titles}),
    )
    monkeypatch.setattr(explain, "GALLERY_SIZE", 5)
    test = data.test.first(1000)
    predictions = explain.draw_galleries(model, test, folder)
    logits = ic.evaluate(model.network, *test).logits / model.temperature
    confidences = logits.softmax(1).amax(1)
    is_correct = predictions == test.labels
    for kind, chosen in (("correct", is_correct), ("incorrect", ~is_correct)):
        best = confidences[chosen].sort(descending=True).values[:5].tolist()
        titles = shown[f"gallery_{kind}"]
        assert shown[f"gallery_{kind}_cam"] == titles
        for title, confidence in zip(titles, best, strict=True):
            assert title.endswith(f"{100 * confidence:.1f} %")
            assert ("taken for" in title) == (kind == "incorrect")


def test_gallery_of_nothing_is_said(model, data, folder, capsys):
    predictions = ic.evaluate(model.network, *data.test.first(200)).logits.argmax(1)
    is_correct = predictions == data.test.labels[:200]
    explain.draw_galleries(model, data.test.first(200).select(is_correct), folder)
    assert "No gallery_incorrect.png" in capsys.readouterr().out
    assert not (folder / "gallery_incorrect.png").exists()


@pytest.mark.slow
def test_feature_maps_of_a_picture(model, data, folder, tool_inside):
    save(data.test.images[0], folder / "my cat.png")
    arguments = ["--checkpoint", model.path, "--image", "my cat.png", "--out", "seen/here"]
    out, _ = tool_inside("explain")(*arguments)
    ((prediction, _),) = inference.predict(model, "my cat.png", top_k=1)[0]
    assert f": {prediction} " in out
    assert [path.name for path in Path("seen", "here").iterdir()] == ["feature_maps_my cat.png"]
    error = tool_inside("explain").error("--checkpoint", model.path, "--image", "nowhere.png")
    assert "nowhere.png" in error


# ---- animations ----


@pytest.mark.pictures
@pytest.mark.slow
def test_epochs_become_an_animation(trained, model, folder, tool_inside):
    tool_inside("explain")("--animate", trained / "run", "--device", "cpu")
    paths = list((folder / "explained").glob("cam_*.gif"))
    assert {path.stem for path in paths} == {f"cam_{name}" for name in model.classes}
    with Image.open(paths[0]) as picture:
        assert picture.n_frames == 4 and picture.info["loop"] == 0
        assert picture.info["duration"] == explain.FRAME_MS


@pytest.mark.slow
def test_frames_are_of_the_epochs_that_are_there(model, folder, tool_inside):
    for epoch in (3, 12):
        shutil.copy(model.path, folder / f"epoch-{epoch:04d}.pth")
    captions = []
    with beforehand(explain, "draw_frame", lambda picture, caption: captions.append(caption)):
        tool_inside("explain")("--animate", ".", "--device", "cpu")
    assert {caption.partition(":")[0] for caption in captions} == {"epoch 3", "epoch 12"}


def test_run_without_its_epochs_is_refused(folder, tool_inside):
    run = tool_inside("explain")
    assert "--keep-epochs" in run.error("--animate", folder)
    (folder / "run" / "seed-0").mkdir(parents=True)
    (folder / "run" / "seed-0" / "epoch-0000.pth").touch()
    assert "seed" in run.error("--animate", "run")


def test_run_that_does_not_exist_is_called_so(folder, tool_inside):
    error = tool_inside("explain").error("--animate", "typo")
    assert "typo" in error and "no such folder" in error and "--keep-epochs" not in error
    error = tool_inside("explain").error("--animate", "https://example.com/run")
    assert "https://example.com/run" in error and "URL" in error


def test_example_of_each_class_is_a_correct_one_if_there_is_one(model, data):
    test = data.test.first(500)
    chosen = explain.choose_examples(model.network, test)
    is_correct = ic.evaluate(model.network, *test).logits.argmax(1) == test.labels
    assert test.labels[chosen].tolist() == list(range(len(model.classes)))
    for label, index in enumerate(chosen.tolist()):
        of_class = (test.labels == label) & is_correct
        if of_class.any():
            assert index == int(of_class.nonzero()[0])


# ---- labels that are probably wrong ----


@pytest.mark.slow
def test_label_issues_of_data_that_moved(folder, inside, tool_inside):
    """A folder of digits, some in the wrong class, moved after the training."""
    digits = ic.load_data(ic.Config(dataset="digits", subset=900))
    for i, (image, label) in enumerate(zip(*digits.train, strict=True)):
        is_wrong = i % 60 == 0
        shown = (int(label) + 1) % 10 if is_wrong else int(label)
        place = folder / "here" / f"number {shown}"
        place.mkdir(parents=True, exist_ok=True)
        save(image, place / f"{i}.png")
    settings = ["--epochs", "4", "--width", "0.5", "--augment", "none", "--image-size", "16"]
    inside("--dataset", "here", *settings)
    (folder / "here").rename(folder / "there")
    run = tool_inside("explain")
    assert "--data-dir" in run.error("--label-issues")

    before = torch.get_rng_state()
    out, _ = run("--label-issues", "--data-dir", "there", "--device", "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert "note" not in out
    rows = table_of((folder / "explained" / "label_issues.csv").read_text())
    assert all((folder / row["file"]).exists() for row in rows)
    for row in rows:
        assert Path(row["file"]).parent.name == row["label"] != row["looks_like"]
    assert sum(int(Path(row["file"]).stem) % 60 == 0 for row in rows[:10]) >= 5  # by chance none
    assert (folder / "explained" / "label_issues.png").exists()


@pytest.mark.slow
def test_label_issues_of_a_custom_network(folder, inside, tool_inside):
    (folder / "net.py").write_text(TINY)
    settings = ["--dataset", "digits", "--subset", "200", "--epochs", "1", "--image-size", "16"]
    inside(*settings, "--model", "net.py:tiny", "--out", "model.pth")
    arguments = ["--label-issues", "--checkpoint", "model.pth", "--model", "net.py:tiny"]
    out, _ = tool_inside("explain")(*arguments)
    rows = table_of((folder / "explained" / "label_issues.csv").read_text())
    assert f"{len(rows)} of 200 labels" in out
    # the digits are no files; the index is that among all training images
    assert {row["file"] for row in rows} <= {""}
    assert max(int(row["index_in_training_set"]) for row in rows) > 200


@pytest.fixture
def fine_tuned(folder, inside):
    """A model of two classes of photos, whose last layer was trained on top of one for digits."""
    brief = ["--epochs", "1", "--width", "0.25", "--image-size", "16"]
    inside(*QUICK, *brief, "--out", "digits.pth")
    write_images(folder / "photos", {"red": 20, "blue": 20})
    photos = ["--dataset", "photos", "--batch-size", "10"]
    start = ["--init-from", "digits.pth", "--freeze"]
    inside(*photos, *brief, *start, "--out", "photos.pth")
    return inference.load_model("photos.pth", "cpu")


@pytest.mark.slow
def test_label_issues_of_a_fine_tuned_model(fine_tuned, tool_inside, folder):
    """The networks that judge start from the same weights, which have not seen these images."""
    run = tool_inside("explain")
    out, _ = run("--label-issues", "--checkpoint", "photos.pth")
    assert "labels look wrong" in out and "random weights" not in out
    assert out.count("digits.pth is for other classes") == explain.NUM_FOLDS  # it was loaded
    data = load_photos(image_size=16)
    config = explain.settings_of_folds(fine_tuned, data)
    assert config.init_from == "digits.pth" and config.freeze
    (folder / "digits.pth").unlink()
    out, _ = run("--label-issues", "--checkpoint", "photos.pth")
    assert "labels look wrong" in out
    (note,) = [line for line in out.splitlines() if line.startswith("note: ")]
    assert "digits.pth" in note and "random weights" in note


@pytest.mark.slow
def test_weights_that_cannot_serve_are_left_out(fine_tuned, folder, capsys, monkeypatch):
    data = load_photos(image_size=16)
    assert data.train_ids is not None
    _, content = ic.load_checkpoint("digits.pth")
    cases = {
        "same data": {**content, "config": {**content["config"], **fine_tuned.settings}},
        "same classes": {**content, "classes": fine_tuned.classes},
        "another network": {**content, "model": {"weight": torch.zeros(1)}},
        "same images": {**content, TRAIN_DIGESTS: data.train_ids.digests[:1]},
    }
    for name, changed in cases.items():
        ic.save_checkpoint("digits.pth", changed)
        config = explain.settings_of_folds(fine_tuned, data)
        assert not config.init_from and not config.freeze, name
        assert "digits.pth" in capsys.readouterr().out, name
    others = {**content, "classes": fine_tuned.classes, TRAIN_DIGESTS: torch.tensor([1, 2])}
    assert not explain.may_have_seen(others, fine_tuned, data)  # it says so itself
    (folder / "digits.pth").write_text("no model")
    assert not explain.settings_of_folds(fine_tuned, data).init_from
    # a path to another machine, which a stranger's file may hold, is not even looked at
    monkeypatch.setattr(Path, "is_file", lambda path: pytest.fail("looked at"))
    for path in ("\\\\server\\share\\model.pth", "\\/server/share/m.pth", "/\\server/m.pth"):
        fine_tuned.settings["init_from"] = path
        capsys.readouterr()
        assert not explain.settings_of_folds(fine_tuned, data).init_from
        assert "no longer there" not in capsys.readouterr().out


@pytest.mark.slow
def test_note_on_weights_does_not_control_the_terminal(fine_tuned, capsys):
    data = load_photos(image_size=16)
    fine_tuned.settings["init_from"] = "\x1b[2Jgone.pth"
    explain.settings_of_folds(fine_tuned, data)
    out = capsys.readouterr().out
    assert "gone.pth" in out and "\x1b" not in out


@pytest.mark.slow
def test_weights_that_the_training_has_taken_are_taken(fine_tuned, folder, capsys):
    """Those that torch.compile or DDP has named, and of other classes."""
    data = load_photos(image_size=16)
    content = torch.load("digits.pth", weights_only=True)
    content["model"] = {f"module.{name}": value for name, value in content["model"].items()}
    torch.save(content, "digits.pth")
    config = explain.settings_of_folds(fine_tuned, data)
    assert config.init_from == "digits.pth" and config.freeze
    assert "note" not in capsys.readouterr().out


@pytest.mark.slow
def test_state_dict_does_not_tell_what_it_has_seen(fine_tuned, folder, capsys):
    data = load_photos(image_size=16)
    torch.save(fine_tuned.network.state_dict(), "digits.pth")
    config = explain.settings_of_folds(fine_tuned, data)
    note = capsys.readouterr().out
    assert not config.init_from and "digits.pth" in note and "a training can start" not in note


@pytest.mark.slow
def test_pretrained_weights_are_kept_and_frozen(fine_tuned, folder, capsys):
    from torchvision.models import squeezenet1_1

    data = load_photos(image_size=16)
    settings = {"model": "torchvision:squeezenet1_1", "pretrained": True}
    network = ic.instantiate(ic.Config(**settings), 2, data.mean, data.std, image_size=16)
    tuned = replace(fine_tuned, network=network, settings=fine_tuned.settings | settings)
    torch.save(squeezenet1_1().state_dict(), "digits.pth")  # as torchvision's own file
    config = explain.settings_of_folds(tuned, data)
    assert config.init_from == "digits.pth" and config.freeze and config.pretrained
    assert "note" not in capsys.readouterr().out
    torch.save(squeezenet1_1(num_classes=2).state_dict(), "digits.pth")  # perhaps of these images
    assert not explain.settings_of_folds(tuned, data).init_from
    assert "digits.pth" in capsys.readouterr().out
    (folder / "digits.pth").unlink()
    config = explain.settings_of_folds(tuned, data)
    assert not config.init_from and config.freeze and config.pretrained
    assert "ImageNet" in capsys.readouterr().out


def test_plateau_has_losses_to_read_where_nothing_is_validated():
    trainer = untrained(scheduler="plateau", epochs=2, width=0.25)
    seen = []
    with beforehand(ic, "lr_factor", lambda name, fraction, losses: seen.append(len(losses))):
        explain.train_and_predict(trainer.config, trainer.data, trainer.device)
    assert set(seen) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [UsageError, Diverged])
def test_options_of_the_training_are_not_blamed_on_the_user(
    fine_tuned, tool_inside, monkeypatch, kind
):
    def fail(*arguments):
        raise kind("--crop: too large")

    monkeypatch.setattr(explain, "out_of_fold_probabilities", fail)
    error = tool_inside("explain").error("--label-issues", "--checkpoint", "photos.pth", status=1)
    assert "photos.pth" in error and "--crop" in error and "image_classification.py" in error


@pytest.mark.slow
def test_galleries_of_a_folder_name_the_files(fine_tuned, folder, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        explain,
        "save_grid",
        lambda images, titles, columns, path: shown.update({path.stem: titles}),
    )
    data = inference.load_dataset_of(fine_tuned)
    explain.draw_galleries(fine_tuned, data.test, folder, data.test_files)
    titles = [title for name, each in shown.items() if "cam" not in name for title in each]
    names = sorted(title.partition("\n")[0] for title in titles)
    assert names == sorted(Path(path).name for path in data.test_files)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_label_issues_of_files_whose_names_are_not_utf_8(folder, tool_inside, monkeypatch):
    write_images(folder / "photos", {"red": 12, "green": 12})
    for path in list(folder.glob("photos/red/*.png")):
        path.rename(path.with_name(os.fsdecode(b"caf\xe9-") + path.name))
    data = ic.load_data(ic.Config(dataset="photos", image_size=16))
    probabilities = torch.zeros(len(data.train.labels), 2)
    probabilities[torch.arange(len(data.train.labels)), 1 - data.train.labels] = 1  # all wrong
    explain.save_label_issues(data, torch.arange(len(data.train.labels)), probabilities, folder)
    rows = table_of((folder / "label_issues.csv").read_text(encoding="utf-8"))
    assert len(rows) == len(data.train.labels)
    for row in rows:
        name = row["file"].encode().decode("unicode_escape") if "\\" in row["file"] else row["file"]
        assert (folder / name).exists()


def test_folder_that_cannot_be_written_is_noticed_before_the_work(
    model, folder, tool_inside, unwritable, monkeypatch
):
    monkeypatch.setattr(explain, "load_model", lambda *_: pytest.fail("it has begun"))
    (folder / "kept").mkdir()
    (folder / "file").touch()
    unwritable(folder / "kept")
    for out in ("kept", "file", "kept/new"):
        assert "kept" in tool_inside("explain").error("--out", out) or out == "file"


def test_each_image_is_judged_by_a_network_that_has_not_seen_it(monkeypatch):
    data = ic.load_data(ic.Config(dataset="digits", subset=300))
    seen = []

    def train_and_predict(config, fold, device):
        seen.append((fold.train, fold.valid))
        return torch.nn.functional.one_hot(fold.valid.labels, 10).float()

    monkeypatch.setattr(explain, "train_and_predict", train_and_predict)
    config = Config(dataset="digits")
    probabilities = explain.out_of_fold_probabilities(config, data, torch.device("cpu"))
    assert torch.equal(probabilities.argmax(1), data.train.labels)
    assert (probabilities.sum(1) == 1).all()
    assert len(seen) == explain.NUM_FOLDS
    for train, valid in seen:
        assert len(train.labels) + len(valid.labels) == 300
        assert set(valid.labels.tolist()) == set(train.labels.tolist()) == set(range(10))


def test_folds_are_those_of_version_0_9_1():
    """The same images are held out together, so that its results stay the same."""
    from sklearn.model_selection import StratifiedKFold

    labels = torch.tensor([0, 0, 0, 1, 3] + [0, 1, 2, 3] * 10)
    expected = StratifiedKFold(3, shuffle=True, random_state=0)
    expected_folds = list(expected.split(np.zeros(len(labels)), labels.numpy()))
    folds = list(explain.stratified_folds(labels))
    for (train, held_out), (expected_train, expected_held_out) in zip(
        folds, expected_folds, strict=True
    ):
        assert train.tolist() == expected_train.tolist()
        assert held_out.tolist() == expected_held_out.tolist()


def test_class_with_too_few_images_is_refused():
    data = ic.load_data(ic.Config(dataset="digits", subset=100))
    rare = data.train.labels == 3
    rare[rare.nonzero()[:2]] = False
    with pytest.raises(UserError, match="3 training images"):
        explain.check_class_sizes(data.train.labels[~rare])
    explain.check_class_sizes(data.train.labels)


# ---- the program ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "cnn",
        "beginner-cnn",
        "coursework-cnn",
        "notebook-cnn",
        "fftnet",
        "convnet",
        "resnet18-dropout",
        "airbench94",
        "torchvision:squeezenet1_1",
        "torchvision:mobilenet_v3_small",
        "timm:test_efficientnet",
    ],
)
def test_every_network_is_explained(name, folder):
    any_size = ["resnet18", "resnet50", "resnet18-dropout", "airbench94"]
    size = 16 if name in any_size else 32
    if name.startswith(("torchvision:", "timm:")):
        size = 64
    trainer = untrained(model=name, image_size=size, batch_size=20)
    save_model(trainer, folder / "model.pth")
    model = inference.load_model(folder / "model.pth", "cpu")
    images, labels = trainer.data.test.first(2)
    heat = explain.grad_cam(model.network, images, labels)
    assert heat.shape == (2, size, size) and heat.min() >= 0 and heat.max() <= 1
    explain.draw_feature_maps(model, images[:1], folder / "feature_maps.png")
    explain.draw_filters(model.network, folder)


@pytest.mark.parametrize(
    "options",
    [
        ["--image", "cat.png", "--label-issues"],
        ["--animate", "run", "--label-issues"],
        ["--animate", "run", "--image", "cat.png"],
        ["--animate", "run", "--checkpoint", "model.pth"],
        ["--image", "cat.png", "--data-dir", "data"],
    ],
)
def test_options_that_exclude_each_other(tool_inside, folder, options):
    error = tool_inside("explain").error(*options, status=2)
    assert options[2] in error
    assert not list(folder.iterdir())


def test_filters_that_are_not_square(folder, capsys):
    explain.draw_filters(nn.Conv2d(3, 4, (1, 7)), folder)
    assert "4 images" in capsys.readouterr().out


def test_unknown_picture_is_called_so(model, folder, capsys):
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, model.image_size, model.image_size)
    noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    explain.draw_feature_maps(model, noise, folder / "maps.png")
    assert "unknown, closest: " in capsys.readouterr().out
    known = replace(model, reject=0)
    explain.draw_feature_maps(known, noise, folder / "maps.png")
    assert "unknown, closest" not in capsys.readouterr().out


def test_help(tool_inside):
    text, _ = tool_inside("explain")("--help")
    assert "python explain.py" in text and "--checkpoint" in text


@pytest.mark.slow
def test_missing_package_is_named(folder):
    (folder / "captum.py").write_text("raise ModuleNotFoundError('no captum here', name='captum')")
    error = tool("explain", folder).error(env={"PYTHONPATH": str(folder)})
    assert "captum" in error and "pip install -r requirements-extras.txt" in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_pictures_on_cuda(model, folder, tool_inside):
    tool_inside("explain")("--checkpoint", model.path, "--device", "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_label_issues_on_cuda(folder, inside, tool_inside):
    inside("--dataset", "digits", "--subset", "300", "--epochs", "1", "--out", "model.pth")
    tool_inside("explain")("--label-issues", "--checkpoint", "model.pth", "--device", "cuda")
