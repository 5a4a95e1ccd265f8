"""inference.py --evaluate: a model on labelled images that it has not seen."""

import json
import math
import os
import shutil
import unicodedata

import pytest
from conftest import report_of, table_of, tool, without, write_images
from PIL import Image
from sklearn.metrics import f1_score

from classifier import plots
from classifier.metrics import wilson_interval


@pytest.fixture
def labelled(folder):
    """Images for `onnx_file`: 7 of the classes red and green, one of which is wrong, and others."""
    colours = {"red": ["red"] * 4, "green": ["lime", "lime", "blue"], "zebra": ["grey", "black"]}
    for name, of_class in colours.items():
        (folder / "new" / name / "deeper").mkdir(parents=True)
        for number, colour in enumerate(of_class):
            place = folder / "new" / name / ("deeper" if number else "")
            Image.new("RGB", (12, 9), colour).save(place / f"{number}.png")
    return folder / "new"


@pytest.fixture
def evaluate(labelled, onnx_file, tool_inside):
    """A function that evaluates the ONNX file on these images; see `Inside`."""

    def run(*options, name="new", **expected):
        arguments = [name, "--evaluate", "--checkpoint", onnx_file, *options]
        return tool_inside("inference")(*arguments, **expected)

    return run


def results_in(folder):
    return json.loads((folder / "evaluation.json").read_text())


def predictions_in(folder):
    return table_of((folder / "predictions.csv").read_text(encoding="utf-8"))


def refusal(output):
    """The one line of an error."""
    (line,) = [line for line in output[1].splitlines() if "error: " in line]
    return line


# ---- results ----


def test_results_of_images_with_labels(evaluate, folder):
    out, err = evaluate()
    results, rows = results_in(folder / "evaluated"), predictions_in(folder / "evaluated")
    assert results["images"] == len(rows) == 7
    assert results["test_accuracy"] == 6 / 7
    assert results["test_accuracy_interval"] == list(wilson_interval(6, 7))
    assert results["class_accuracy"] == {"red": 1, "green": 2 / 3, "blue": None}
    assert results["precision"] == {"red": 1, "green": 1, "blue": None}
    assert results["confusion_matrix"] == [[4, 0, 0], [0, 2, 1], [0, 0, 0]]
    truth, answers = ([row[key] for row in rows] for key in ("label", "prediction"))
    expected = f1_score(truth, answers, labels=["red", "green"], average="macro")
    assert results["macro_f1"] == pytest.approx(expected)
    assert results["temperature"] == 2
    assert 0 < results["calibration_error"] < results["calibration_error_before"]
    low, high = results["test_accuracy_interval"]
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    assert f"Accuracy of the network on the 7 images in new: 85 % (85.71 %, {interval})" in out
    assert "Accuracy for class green is: 66.7 %  (precision 100.0 %, F1 80.0 %, 3 tested)" in out
    assert "Macro-F1: 90.0 %" in out and "Expected calibration error:" in out


def test_each_prediction_is_listed(evaluate, folder):
    evaluate("--out", "results/here")
    rows = predictions_in(folder / "results" / "here")
    assert not (folder / "evaluated").exists()
    (mistake,) = [row for row in rows if row["label"] != row["prediction"]]
    assert (mistake["image"], mistake["prediction"]) == ("green/deeper/2.png", "blue")
    confidence = math.exp(5) / (math.exp(5) + 2)  # logits 10, 0, 0 over the temperature of 2
    assert float(mistake["confidence"]) == pytest.approx(confidence)
    assert len({row["image"] for row in rows}) == 7
    assert {row["seen"] for row in rows} == {""}  # an ONNX file does not say


def test_worst_mistakes_are_drawn_with_their_files(evaluate, labelled, folder, monkeypatch):
    drawn = []

    def draw_images(images, titles, columns):
        drawn.append((images, titles))
        return plots.new_figure(1, 1, 1, 1)

    monkeypatch.setattr(plots, "draw_images", draw_images)
    evaluate()
    ((images, titles),) = drawn
    assert images.shape == (1, 3, 8, 8) and (images[0].mean((1, 2)) == [0, 0, 255]).all()
    assert [title.splitlines()[:2] for title in titles] == [["2.png", "green, taken for"]]
    assert {path.name for path in (folder / "evaluated").iterdir()} == {
        "evaluation.json",
        "predictions.csv",
        "confusion_matrix.png",
        "worst_mistakes.png",
    }
    # the picture of an earlier evaluation goes, where there is no mistake any more
    (labelled / "green" / "deeper" / "2.png").unlink()
    evaluate()
    assert results_in(folder / "evaluated")["test_accuracy"] == 1
    assert not (folder / "evaluated" / "worst_mistakes.png").exists()


def test_report_of_training_and_evaluation_of_its_test_images_agree(inside, tool_inside, folder):
    """For a .pth; the note on images of the training is about those, and no others."""
    counts = {"red": 30, "green": 30, "blue": 20}
    write_images(folder / "photos" / "train", counts)
    write_images(folder / "photos" / "test", {"red": 9, "green": 9, "blue": 9}, seed=1)
    for number in range(3):  # mistakes
        moved = folder / "photos" / "test" / "red" / f"{number}.png"
        moved.rename(folder / "photos" / "test" / "blue" / f"from_red_{number}.png")
    inside("--dataset", "photos", "--epochs", "2", "--width", "0.25", "--run-dir", "run")
    expected = report_of(folder / "run")
    _, err = tool_inside("inference")("photos/test", "--evaluate")
    results = results_in(folder / "evaluated")
    assert 0 < expected["test_accuracy"] < 1
    for name in ("test_accuracy", "test_accuracy_interval", "confusion_matrix", "f1", "recall"):
        assert results[name] == expected[name], name
    for name in ("macro_f1", "test_loss", "calibration_error", "calibration_error_before"):
        assert results[name] == pytest.approx(expected[name], abs=1e-5), name
    # the keys of the report, but for those on how the training went
    about_run = {"seconds", "train_images", "epochs", "best_epoch", "commit", "hardware"}
    about_run |= {"dataset", "substituted_for", "versions", "data_digest"}
    assert expected.keys() - results.keys() == about_run
    assert results["test_digest"] == expected["test_digest"]
    assert results["seen_images"] == 0 and "was trained on" not in err

    shutil.copy("photos/test/blue/from_red_0.png", "photos/train/blue")
    _, err = tool_inside("inference")("photos/train", "--evaluate")
    results, rows = results_in(folder / "evaluated"), predictions_in(folder / "evaluated")
    num_seen = expected["train_images"]  # the others are for validation
    assert results["images"] == 81 and 0 < num_seen < 81
    assert results["seen_images"] == [row["seen"] for row in rows].count("yes") == num_seen
    (unseen,) = [row["seen"] for row in rows if "from_red" in row["image"]]
    assert unseen == "no" and f"trained on {num_seen} of these 81 images" in err


# ---- what is left out ----


def test_classes_that_the_model_or_the_folder_lacks_are_named(evaluate, labelled, folder):
    (labelled / "zebra").rename(labelled / "Blues")
    (labelled / "blue").mkdir()  # without an image
    _, err = evaluate()
    results = results_in(folder / "evaluated")
    assert results["unknown_classes"] == {"Blues": 2}
    assert results["missing_classes"] == ["blue"]
    unknown, missing, _ = err.splitlines()
    assert "Blues (2 images, is it blue?)" in unknown
    assert "blue" in missing and "red" not in missing


def test_images_that_cannot_be_read_are_named(evaluate, labelled, folder):
    (labelled / "red" / "page.png").write_text("<html>")
    for name in ("green", "zebra"):
        (labelled / name / "new.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    (labelled / "green" / "notes.txt").write_text("words")
    (labelled / "zebra" / "page.png").write_text("<html>")
    (labelled / "loose.png").write_bytes((labelled / "red" / "0.png").read_bytes())
    _, err = evaluate(status=1)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "page.png: it is a web page" in errors[0] and "new.heic: it is HEIC" in errors[1]
    assert "loose.png" in err
    results = results_in(folder / "evaluated")
    assert results["images"] == 7
    assert results["confusion_matrix"] == [[4, 0, 0], [0, 2, 1], [0, 0, 0]]
    assert [path.rpartition("page")[2] for path in results["unreadable"]] == [".png"]


def test_folder_whose_name_is_in_another_form_of_unicode(onnx_file, tool_inside, labelled):
    """A Mac may write é as two characters."""
    import onnx

    model = onnx.load(str(onnx_file))
    for entry in model.metadata_props:
        if entry.key == "classes":
            entry.value = json.dumps(["ré", "green", "blue"])
    onnx.save_model(model, str(onnx_file))
    (labelled / "red").rename(labelled / unicodedata.normalize("NFD", "ré"))
    tool_inside("inference")("new", "--evaluate", "--checkpoint", onnx_file)
    results = results_in(onnx_file.parent / "evaluated")
    assert results["class_accuracy"] == {"ré": 1, "green": 2 / 3, "blue": None}


@pytest.mark.parametrize("has_inner", [False, True])
def test_folder_without_a_class_of_the_model(evaluate, labelled, folder, has_inner):
    if has_inner:  # a folder of splits
        labelled.rename(folder / "test")
        (folder / "new").mkdir()
        (folder / "test").rename(folder / "new" / "test")
    else:
        shutil.rmtree(labelled / "red")
        shutil.rmtree(labelled / "green")
    line = refusal(evaluate(status=1))
    assert "its folders are " + ("test" if has_inner else "zebra") in line
    assert "red, green, blue" in line
    assert line.endswith("new/test?".replace("/", os.sep)) == has_inner
    assert not (folder / "evaluated").exists()


def test_folder_of_which_nothing_can_be_tested(evaluate, labelled, folder):
    assert "nowhere" in refusal(evaluate(name="nowhere", status=1))
    for name in ("red", "green"):
        shutil.rmtree(labelled / name)
        (labelled / name).mkdir()
    assert "no image" in refusal(evaluate(status=1))
    (labelled / "red" / "page.png").write_text("<html>")
    assert "web page" in refusal(evaluate(status=1))


# ---- the program ----


def test_onnx_file_is_tested_without_torch(labelled, onnx_file, folder):
    environment = without(folder, "torch", "torchvision", "sklearn", "scipy")
    inference = tool("inference", folder)
    arguments = ["new", "--evaluate", "--checkpoint", onnx_file]
    out, err = inference(*arguments, env=environment)
    assert "Accuracy of the network on the 7 images in new: 85 %" in out
    assert "does not say whether it was trained on" in err
    for name in ("confusion_matrix.png", "worst_mistakes.png"):
        with Image.open(folder / "evaluated" / name) as picture:
            assert picture.format == "PNG"


def test_results_are_written_without_matplotlib(labelled, onnx_file, folder):
    inference = tool("inference", folder)
    arguments = ["new", "--evaluate", "--checkpoint", onnx_file]
    _, err = inference(*arguments, env=without(folder, "torch", "matplotlib"))
    assert "matplotlib is not installed" in err
    written = {path.name for path in (folder / "evaluated").iterdir()}
    assert written == {"evaluation.json", "predictions.csv"}


def test_wrong_usage_of_evaluate(evaluate, tool_inside):
    for option in (["--save", "a.png"], ["--threshold", "0.5"], ["--format", "csv"]):
        assert option[0] in refusal(evaluate(*option, status=2))
    assert "--evaluate" in refusal(evaluate(name="https://example.com/new", status=2))
    inference = tool_inside("inference")
    assert "--evaluate" in refusal(inference("new", "new/red", "--evaluate", status=2))
    assert "--out" in refusal(inference("new", "--out", "results", status=2))


def test_place_that_cannot_be_written_is_noticed_before_the_work(evaluate, folder):
    (folder / "evaluated").write_text("a file")
    output = evaluate(status=1)
    assert "evaluated" in refusal(output) and "Accuracy" not in output[0]
