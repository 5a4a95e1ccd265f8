"""How unlike its training images an image is: the score, its model file, and what tools answer."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import QUICK, beforehand, report_of, save, table_of
from torch import nn

import image_classification as ic
import inference
from classifier import checkpoints, ood_score, prediction_output
from classifier.checkpoints import read_checkpoint
from classifier.datasets.dataset import Split
from classifier.datasets.memmap_images import MemmapImages
from classifier.errors import UserError
from classifier.networks.features import find_stages

CONFIG = ic.Config(dataset="digits", width=0.25)


@pytest.fixture(scope="module")
def digits():
    return ic.load_data(CONFIG)


@pytest.fixture
def network(digits):
    """A network whose weights are as they were drawn, in training mode."""
    return ic.build_model(CONFIG, digits)


@pytest.fixture
def score(network, digits):
    return ood_score.fit(network, ic.evaluate, digits, 10**6)


def scores_of(network, score, images):
    with ood_score.recorded(network, score) as scores:
        ic.evaluate(network, images, torch.zeros(len(images), dtype=torch.int64))
    return scores.unlikeness()


def noise(data, count=100):
    generator = torch.Generator().manual_seed(0)
    shape = (count, *data.train.images.shape[1:])
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


# ---- the score ----


def test_stages_are_the_last_of_each_size(network, digits):
    few = digits.train.first(2)
    stages = find_stages(network, lambda: ic.evaluate(network, *few))
    assert stages == ["whiten", "stages.0", "stages.1", "stages.2"]


def test_unlike_images_score_higher_than_all_but_few_validation_images(network, score, digits):
    of_valid = scores_of(network, score, digits.valid.images)
    assert (of_valid > 0.95).mean() == pytest.approx(0.05, abs=0.02)
    assert (scores_of(network, score, digits.test.images) > 0.95).mean() < 0.15
    assert (scores_of(network, score, noise(digits)) > 0.95).all()
    assert (scores_of(network, score, 255 - digits.test.images) > 0.95).mean() > 0.9


@pytest.mark.slow
def test_score_is_of_the_image_alone(network, score, digits):
    """Not of the others in its batch; and it is the same each time."""
    images = digits.test.images[:60]
    together = scores_of(network, score, images)
    alone = np.concatenate([scores_of(network, score, image[None]) for image in images])
    assert alone == pytest.approx(together, abs=1e-3)
    again = ood_score.fit(network, ic.evaluate, digits, 10**6)
    assert again.quantiles == score.quantiles


def test_fitting_leaves_network_and_random_numbers_as_they_were(network, digits):
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random_state = torch.get_rng_state()
    fitted = ood_score.fit(network, ic.evaluate, digits, 10**6)
    scores_of(network, fitted, digits.test.images[:10])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for module in network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    network.eval()


class WithoutFeatures(nn.Module):
    """Its last layer with weights is never called as one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 10)

    def forward(self, images):
        return nn.functional.linear(images.mean((2, 3)), self.layer.weight, self.layer.bias)


def with_buffers(network):
    network.register_buffer("pixel_mean", torch.zeros(1, 3, 1, 1), persistent=False)
    network.register_buffer("pixel_scale", torch.full((1, 3, 1, 1), 1 / 255), persistent=False)
    return network


def test_network_without_features_has_no_score(digits, capsys):
    network = with_buffers(WithoutFeatures())
    assert ood_score.fit(network, ic.evaluate, digits, 10**6) is None
    assert capsys.readouterr().out.startswith("note: ")
    assert scores_of(network, None, digits.test.images[:5]) is None


def test_few_or_no_validation_images_give_no_score(network, digits, capsys):
    without = replace(digits, valid=digits.valid.first(0))
    assert ood_score.fit(network, ic.evaluate, without, 10**6) is None
    assert capsys.readouterr().out == ""  # that is what was asked for
    few = replace(digits, valid=digits.valid.first(ood_score.MIN_IMAGES - 1))
    assert ood_score.fit(network, ic.evaluate, few, 10**6) is None
    assert str(ood_score.MIN_IMAGES) in capsys.readouterr().out


def test_short_training_is_not_followed_by_a_long_fit(network, digits):
    seen = []

    def evaluate(network, images, labels):
        seen.append(len(labels))
        return ic.evaluate(network, images, labels)

    ood_score.fit(network, evaluate, digits, 1000)
    _, num_train, num_valid = seen
    assert num_train == 100 and num_valid == len(digits.valid.labels)


@pytest.mark.parametrize(
    "name",
    [
        "beginner-cnn",
        "fcn",
        "fftnet",
        "airbench94",
        pytest.param("torchvision:squeezenet1_1", marks=pytest.mark.slow),
        pytest.param("torchvision:vit_b_32", marks=pytest.mark.slow),
    ],
)
def test_any_network_has_a_score(name, digits):
    few = replace(digits, train=digits.train.first(60), valid=digits.valid.first(40))
    network = ic.build_model(ic.Config(dataset="digits", model=name), few)
    score = ood_score.fit(network, ic.evaluate, few, 10**6)
    assert score is not None
    # the head may have no say yet, as its weights are random or zero: still, noise is unlike
    assert np.median(scores_of(network, score, noise(few, 40))) > 0.9


# ---- model files ----


def content_with(score, network):
    return {"image_size": 32, "mean": [0.5] * 3, **ood_score.with_score({}, score)}


def test_score_survives_its_file_and_is_small(network, score, digits, folder):
    content = content_with(score, network)
    ic.save_checkpoint("score.pth", content)
    assert (folder / "score.pth").stat().st_size < 1e6
    loaded = ood_score.in_file(torch.load("score.pth", weights_only=True), network)
    images = digits.test.images[:50]
    assert (scores_of(network, loaded, images) == scores_of(network, score, images)).all()
    assert ood_score.with_score(content, None).keys() == {"image_size", "mean"}
    assert ood_score.in_file({}, network) is None


def changed(content, path, value):
    """A copy of nested dicts with another value at this path."""
    if not path:
        return value
    return {**content, path[0]: changed(content.get(path[0]), path[1:], value)}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ([], 3),
        (["stages"], "whiten"),
        (["stages"], ["nowhere", "stages.0", "stages.1", "stages.2"]),
        (["stages"], ["whiten"]),
        (["quantiles"], [2.0, 1.0]),
        (["tensors"], {}),
        (["tensors", "middle"], torch.zeros(1, 1, 99)),
        (["tensors", "middle"], "text"),
        (["tensors", "spread"], torch.full((6,), torch.nan)),
        (["tensors", "gaussians.0.axes"], torch.zeros(3, 3)),
        (["tensors", "gaussians.0.centre"], torch.zeros(48, dtype=torch.int64)),
    ],
)
def test_damaged_score_is_refused(network, score, path, value):
    content = content_with(score, network)
    content[checkpoints.SCORE] = changed(content[checkpoints.SCORE], path, value)
    with pytest.raises(ValueError):
        ood_score.in_file(content, network)


def test_damaged_score_in_a_model_file_is_named(model, folder):
    content = read_checkpoint(model.path)
    content[checkpoints.SCORE]["quantiles"] = "none"
    ic.save_checkpoint(folder / "damaged.pth", content)
    with pytest.raises(UserError, match=r"damaged\.pth"):
        inference.load_model(folder / "damaged.pth", "cpu")


# ---- what the tools answer ----


@pytest.fixture
def pictures(folder, model, data):
    """The current folder, with the model, two usual images, and one of noise."""
    shutil.copy(model.path, folder / "model_cnn.pth")
    images = data.test.images[:40]
    unlikeness = [each.unlikeness for each in inference.predict(model, images.numpy())]
    usual = np.argsort(unlikeness)[:2]
    (folder / "images").mkdir()
    for number in range(2):
        save(images[usual[number]], folder / "images" / f"{number}.png")
    save(noise(data, 1)[0], folder / "images" / "noise.png")
    return folder


def test_unlike_image_is_unknown(pictures, tool_inside):
    out, _ = tool_inside("inference")("images")
    description, *lines = out.splitlines()
    assert "unknown" in description
    assert ["unknown" in line for line in lines] == [False, False, True]
    assert "100.0 %" in lines[2]
    entries = json.loads(tool_inside("inference")("images", "--format", "json")[0])
    assert [entry["answer"] == "unknown" for entry in entries] == [False, False, True]
    assert entries[2]["unlikeness"] == 1 > 0.95 > entries[0]["unlikeness"]
    assert len(entries[2]["classes"]) == 3  # the closest ones
    rows = table_of(tool_inside("inference")("images", "--format", "csv")[0])
    assert [row["answer"] for row in rows] == [entry["answer"] for entry in entries]
    assert [float(row["unlikeness"]) > 0.95 for row in rows] == [False, False, True]


@pytest.mark.pictures
def test_unknown_goes_before_unsure_and_is_drawn(pictures, tool_inside):
    drawn = []
    with beforehand(prediction_output, "draw_predictions", drawn.extend):
        tool_inside("inference")("images", "--threshold", "1", "--save", "look.png")
    assert [picture.title.partition(": ")[2] for picture in drawn] == [
        "unsure",
        "unsure",
        "unknown",
    ]
    assert [picture.classes.is_unknown for picture in drawn] == [False, False, True]


def test_share_may_be_chosen(pictures, tool_inside):
    def answers(*options):
        out, _ = tool_inside("inference")("images", "--format", "json", *options)
        return [entry["answer"] for entry in json.loads(out)]

    assert "unknown" not in answers("--reject", "0")
    assert answers("--reject", "0.999999") == ["unknown"] * 3
    for value in ("1", "-0.1", "nan"):
        line = tool_inside("inference").error("images", "--reject", value, status=2)
        assert "--reject" in line


def test_older_file_answers_as_it_did(pictures, tool_inside):
    content = ood_score.with_score(read_checkpoint("model_cnn.pth"), None)
    ic.save_checkpoint("model_cnn.pth", content)
    for options in ([], ["--reject", "0"]):
        out, err = tool_inside("inference")("images", "--format", "json", *options)
        assert "unknown" not in out and not any("unlikeness" in each for each in json.loads(out))
        assert "unknown" not in err
    line = tool_inside("inference").error("images", "--reject", "0.05")
    assert "--reject" in line and "model_cnn.pth" in line
    model = inference.load_model("model_cnn.pth", "cpu")
    (classes,) = inference.predict(model, "images/noise.png")
    assert classes.unlikeness is None and not classes.is_unknown


def test_predict_tells_what_is_unknown(pictures):
    paths = ["images/0.png", "images/noise.png"]
    for reject, expected in ((None, [False, True]), (0, [False, False]), (0.99999, [True, True])):
        model = inference.load_model("model_cnn.pth", "cpu", reject=reject)
        assert [each.is_unknown for each in inference.predict(model, paths)] == expected
    with pytest.raises(ValueError, match="reject"):
        inference.load_model("model_cnn.pth", "cpu", reject=1)


@pytest.mark.slow
def test_report_and_evaluation_agree(inside, tool_inside, folder):
    out, _ = inside(*QUICK, "--subset", "1000", "--run-dir", "run")
    report = report_of(folder / "run")
    model = inference.load_model(folder / "model_cnn_digits.pth", "cpu")
    data = ic.load_data(ic.Config(dataset="digits", image_size=16))
    logits, unlikeness = model.score(data.test.images.numpy())
    is_unknown = unlikeness > 0.95
    is_right = logits.argmax(1) == data.test.labels.numpy()
    assert report["unknown_share"] == is_unknown.mean() < 0.3
    assert report["accepted_accuracy"] == pytest.approx(is_right[~is_unknown].mean())
    (line,) = [line for line in out.splitlines() if line.startswith("Called unknown: ")]
    assert f"{100 * report['unknown_share']:.1f} %" in line
    for label, image in enumerate(data.test.images[:40]):
        name = model.classes[int(data.test.labels[label])]
        (folder / "new" / name).mkdir(parents=True, exist_ok=True)
        save(image, folder / "new" / name / f"{label}.png")
    out, _ = tool_inside("inference")("new", "--evaluate")
    results = json.loads((folder / "evaluated" / "evaluation.json").read_text())
    assert results["unknown_share"] == is_unknown[:40].mean()
    assert "Called unknown: " in out
    rows = table_of((folder / "evaluated" / "predictions.csv").read_text())
    assert sum(float(row["unlikeness"]) > 0.95 for row in rows) == is_unknown[:40].sum()


def test_no_validation_no_score(inside, folder):
    out, _ = inside(*QUICK, "--val-fraction", "0", "--run-dir", "run")
    assert "Called unknown" not in out
    report = report_of(folder / "run")
    assert report["unknown_share"] is report["accepted_accuracy"] is None
    assert checkpoints.SCORE not in read_checkpoint(folder / "model_cnn_digits.pth")


def test_images_on_the_disk_give_the_same_score(network, score, digits):
    images, labels = digits.train
    on_disk = MemmapImages(images, torch.arange(len(images)), None)
    fitted = ood_score.fit(
        network, ic.evaluate, replace(digits, train=Split(on_disk, labels)), 10**6
    )
    assert fitted.quantiles == score.quantiles
