"""The model card: what it says is in the model file, and its front matter is the Hub's."""

import html
import json
import math
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import survival
import torch
import yaml
from PIL import Image

import export
import inference
from classifier import markup
from classifier.checkpoints import read_checkpoint
from classifier.config import Config
from classifier.metrics import classification_metrics
from classifier.model_card import CARD_FILE, HUB_DATASETS, model_card

CLASSES = [
    "cat|dog",
    "$x$ $$y$$",
    'a "quote": <b>',
    "it's `code`",
    "[link](x) *stars* _",
    "日本\\(",
]
FILE = Path("/home/ann/model_cnn.safetensors")


def make_report(classes):
    """A report as a model file has it: 60 test images, 50 of them right, and one class of 20."""
    labels = torch.tensor([0] * 40 + [1] * 20)
    predictions = labels.clone()
    predictions[50:] = 2
    logits = 3 * torch.nn.functional.one_hot(predictions, len(classes)).float()
    results = classification_metrics(logits, labels, classes, 2.0)
    del results["confusion_matrix"]
    return results | {
        "class_images": {classes[0]: 40, classes[1]: 20, **dict.fromkeys(classes[2:], 0)},
        "valid_images": 30,
        "dataset": "photos",
        "data_digest": "0123456789abcdef",
        "seconds": 90.0,
        "epochs": 4,
        "hardware": "cpu (An | AMD, 2 threads)",
        "commit": "a723adc",
        "substituted_for": None,
    }


def make_content(classes=CLASSES, **changes):
    content = {
        "model": {},
        "config": asdict(Config(dataset="/home/ann/photos", init_from="/home/ann/a_b.pth")),
        "classes": classes,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "image_size": 32,
        "dataset": "photos",
        "train_images": 270,
        "metrics": {"epoch": 2, "test_accuracy": 50 / 60, "test_loss": 0.5, "temperature": 2.0},
        "versions": {"image_classification": "0.10.0", "torch": "2.11.0", "platform": "Linux"},
        "report": make_report(classes),
    }
    return content | changes


def parse(card):
    """The front matter of a card, as the Hub reads it, and its text."""
    _, front_matter, text = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front_matter), text


def cells(row):
    """What the cells of a row of a table show."""
    return [html.unescape(cell.strip()) for cell in row.strip("|").split("|")]


# ---- what it says ----


def test_front_matter_is_that_of_an_image_classifier():
    metadata, _ = parse(model_card(make_content(), FILE))
    assert metadata["license"] == "unknown" and metadata["library_name"] == "pytorch"
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["tags"] == ["image-classification", "safetensors"]
    assert metadata["metrics"] == ["accuracy", "f1"] and "datasets" not in metadata
    (model,) = metadata["model-index"]
    (result,) = model["results"]
    assert model["name"] == "model_cnn"
    assert result["task"]["type"] == "image-classification"
    assert result["dataset"] == {"type": "imagefolder", "name": "photos", "split": "test"}
    accuracy, f1 = result["metrics"]
    assert (accuracy["type"], accuracy["value"]) == ("accuracy", pytest.approx(50 / 60, abs=1e-6))
    assert f1["value"] == pytest.approx(make_report(CLASSES)["macro_f1"], abs=1e-6)


def test_figures_are_those_of_the_report():
    report = make_report(CLASSES)
    _, text = parse(model_card(make_content(), FILE))
    low, high = report["test_accuracy_interval"]
    assert f"83.33 % (95 % interval {100 * low:.1f} to {100 * high:.1f} %" in text
    for name in ("macro_f1", "calibration_error", "calibration_error_before"):
        assert f"| {100 * report[name]:.1f} % |" in text, name
    assert "On 60 test images" in text and "0123456789abcdef" in text
    for part, count in (("training", 270), ("validation", 30), ("test", 60)):
        assert f"| {part} | {count} |" in text
    assert "temperature 2.0000" in text and "1.5 minutes" in text and "number 2" in text
    assert "0.10.0" in text and "2.11.0" in text and "a723adc" in text


def test_each_class_has_a_row_with_its_name_as_it_is():
    _, text = parse(model_card(make_content(), FILE))
    rows = [cells(row) for row in text.splitlines() if row.startswith("|")]
    of_classes = {row[0]: row[1:] for row in rows if len(row) == 5}
    assert [*of_classes] == ["class", "---", *CLASSES]
    assert of_classes[CLASSES[0]][:2] == ["40", "100.0 %"]
    assert of_classes[CLASSES[1]][:2] == ["20", "50.0 %"]
    assert of_classes[CLASSES[2]] == ["0", "-", "-", "-"]
    assert html.unescape(", ".join(map(markup.escape_markdown, CLASSES))) in html.unescape(text)
    assert "# model_cnn\n" in text  # as it is
    for syntax in ("cat|", "$x", "<b>", "`code`", "[link]", "*stars*"):
        assert syntax not in text
    # of the classes with few images
    (line,) = [line for line in text.splitlines() if "fewer than 30" in line]
    assert CLASSES[1] in html.unescape(line) and CLASSES[0] not in html.unescape(line)


def test_it_says_nothing_of_the_folders_of_this_machine():
    card = model_card(make_content(), FILE)
    assert "/ann" not in card and "home" not in card
    assert "a_b.pth" in html.unescape(card)  # what the training started from


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("cifar10", "CIFAR10", HUB_DATASETS["cifar10"]),
        ("auto", "CIFAR10", HUB_DATASETS["cifar10"]),
        ("auto", "digits", "digits"),
        ("stl10", "STL10", "stl10"),
        ("/home/ann/CIFAR10", "CIFAR10", "imagefolder"),
        ("./cifar10", "cifar10", "imagefolder"),
    ],
)
def test_data_set_is_named_as_the_hub_does(source, name, expected):
    report = make_report(CLASSES) | {"dataset": name}
    content = make_content(config=asdict(Config(dataset=source)), report=report)
    metadata, _ = parse(model_card(content, FILE))
    (model,) = metadata["model-index"]
    assert model["results"][0]["dataset"]["type"] == expected
    assert metadata.get("datasets") == ([expected] if "/" in expected else None)


# ---- what it does not say ----


def test_what_is_not_known_is_left_out():
    older = make_content()
    del older["report"]
    metadata, text = parse(model_card(older, FILE))
    (model,) = metadata["model-index"]
    assert [each["type"] for each in model["results"][0]["metrics"]] == ["accuracy"]
    assert "83.33 %" in text and "interval 9" not in text and "macro" not in text.lower()

    nothing = make_content(metrics={}, versions={}, config={})
    del nothing["report"], nothing["dataset"], nothing["train_images"]
    metadata, text = parse(model_card(nothing, FILE))
    assert not {"model-index", "metrics", "datasets"} & metadata.keys()
    assert "pixel_ranges" not in text
    assert "pixel_ranges" in model_card(make_content(pixel_ranges={"integers": [0.0, 9.0]}), FILE)
    assert "## Results" not in text and "not calibrated" in text and " None" not in text


def test_strange_values_are_left_out():
    """A stranger's file may hold anything in its report."""
    values = [*survival.strange_values(), "NaN\n---\n", {"cat": math.nan}, [math.inf, 1.0], True]
    sound = make_content()
    metrics, report = sound["metrics"], sound["report"]
    report |= {"test_views": 2, "test_views_accuracy": 0.5}
    changed = []
    for value in values:
        changed += [{"report": {**report, name: value}} for name in report]
        changed += [{"report": value, "metrics": {**metrics, name: value}} for name in metrics]
    front_matters = set()
    for change in changed:
        card = model_card({**sound, **change}, FILE)
        front_matter, text = card.removeprefix("---\n").split("\n---\n")
        front_matters.add(front_matter)
        assert not re.search(r"\b(nan|inf|tensor)\b", text), change
    assert len(front_matters) > 3
    for front_matter in front_matters:
        assert yaml.safe_load(front_matter)["license"] == "unknown"


@pytest.mark.parametrize(
    "text", [*CLASSES, "a \u2028 b", "\x7f\ufffe", "🦊", "\udcff", "\\", "---", "# x"]
)
def test_quoted_text_is_what_a_parser_reads(text):
    expected = text.encode("utf-8", "backslashreplace").decode()
    lines = markup.yaml_lines({"a": text, "b": [text, {"c": text, "d": {"e": 0.5}}]})
    parsed = yaml.safe_load("\n".join(lines))
    assert parsed == {"a": expected, "b": [expected, {"c": expected, "d": {"e": 0.5}}]}


def test_fence_of_code_is_longer_than_any_within():
    assert markup.code_block("a ```` b").splitlines() == ["`````", "a ```` b", "`````"]


# ---- how to use the model ----


def code_of(card, language=""):
    """The blocks of code in this language."""
    blocks = re.findall(r"^(`{3,})(\w*)\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
    return [code for _, name, code in blocks if name == language]


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_example_for_onnx_runtime_gives_the_program_s_answer(onnx_file, folder, capsys, fit):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((50, 30)).save("cat.jpg", quality=95)
    network = onnx.load(onnx_file)
    network.metadata_props.add(key="fit", value=json.dumps(fit))
    onnx.save(network, onnx_file)
    config = asdict(Config(dataset="photos", fit=fit))
    (code,) = code_of(model_card(make_content(config=config), onnx_file), "python")
    exec(code, {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    (expected,) = inference.predict(inference.load_model(onnx_file), ["cat.jpg"])
    assert [name for name, _ in printed] == [name for name, _ in expected]
    assert [float(number) for _, number in printed] == pytest.approx(
        [confidence for _, confidence in expected], abs=1e-3
    )


def test_example_for_a_file_that_takes_photographs(onnx_file):
    (code,) = code_of(model_card(make_content(), onnx_file, raw=True), "python")
    compile(code, "example", "exec")
    assert '{"image": np.asarray(image)}' in code and "size, size" not in code


def test_what_is_said_of_images_of_something_else():
    assert "ood_threshold" not in model_card(make_content(), FILE)
    assert "ood_threshold" in model_card(make_content(ood_score={"stages": []}), FILE)


@pytest.mark.parametrize("name", ["m.safetensors", "m.onnx", "m.pt2", "it's a `model`.onnx"])
def test_commands_name_the_file(name):
    config = asdict(Config(model="/home/ann/net.py:small"))
    card = model_card(make_content(config=config), Path("/home/ann") / name)
    (code,) = code_of(card, "python")
    compile(code, name, "exec")
    commands = [shlex.split(command) for command in code_of(card)]
    assert len(commands) == {".safetensors": 2, ".onnx": 1, ".pt2": 0}[Path(name).suffix]
    for command in commands:
        assert command[command.index("--checkpoint") + 1] == name
        assert command[command.index("--model") + 1] == "net.py:small"


# ---- the Hub's own reader ----


def test_hub_reads_the_card():
    hub = pytest.importorskip("huggingface_hub")
    text = model_card(make_content(), FILE)
    card = hub.ModelCard(text)  # it raises ValueError for a model-index that it cannot read
    accuracy, f1 = card.data.eval_results
    assert (accuracy.metric_type, f1.metric_type) == ("accuracy", "f1")
    assert accuracy.dataset_type == "imagefolder" and accuracy.dataset_split == "test"
    assert card.data.model_name == "model_cnn" and card.data.license == "unknown"
    metadata, body = parse(text)
    assert card.data.to_dict() == metadata
    assert card.text.strip() == body.strip()


# ---- export.py --card ----


def test_card_is_written_once_beside_the_export(model, folder, tool_inside, monkeypatch):
    monkeypatch.setattr(export, "NUM_COMPARED", 10)
    monkeypatch.setattr(export, "dataset_available", lambda model: False)
    run = tool_inside("export")
    out_file = folder / "new" / "m.safetensors"
    arguments = ["--checkpoint", model.path, "--format", "safetensors", "--out", out_file, "--card"]
    out, _ = run(*arguments)
    card = folder / "new" / CARD_FILE
    metadata, text = parse(card.read_text(encoding="utf-8"))
    assert CARD_FILE in out and all(name in text for name in model.classes)
    accuracy = metadata["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert accuracy == pytest.approx(model.test_accuracy, abs=1e-6)
    report = read_checkpoint(model.path)["report"]
    assert report["data_digest"] in text
    settings = json.loads(code_of(text, "json")[0])
    assert settings["epochs"] == 4 and "data_dir" not in settings

    card.write_text("in my own words")
    out_file.write_text("an earlier one")
    assert CARD_FILE in run.error(*arguments)
    assert card.read_text() == "in my own words"
    assert out_file.read_text() == "an earlier one"
