"""Images that a network has been trained on although they are held out now."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import only_run, report_of, rows_of, state_of, write_images
from photo_folders import write_noise, write_scenes
from PIL import Image

import explain
import image_classification as ic
import inference
import tune
from classifier import seen_images
from classifier.datasets.dataset import Dataset, Split
from classifier.datasets.decode import decode, hash64
from classifier.datasets.splits import ImageIds
from classifier.errors import UserError

BRIEFLY = ["--epochs", "1", "--width", "0.25", "--image-size", "16", "--progressive-resizing", "0"]


def digests_in(path):
    content = torch.load(path, weights_only=True)
    return content, seen_images.digests_in_file(content)


@pytest.fixture
def all_for_training(folder, photos):
    """The images of photos/, all in the training folder of another data set."""
    shutil.copytree(photos, folder / "old" / "train")
    write_images(folder / "old" / "test", {"red": 5, "green": 5, "blue": 5}, seed=9)


def ids(*digests, groups=None):
    groups = digests if groups is None else groups
    return ImageIds(torch.tensor(digests), torch.tensor(groups))


def dataset(**parts):
    split = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    data = Dataset("photos", ["a", "b"], split, split, lambda: split, 4, True, [0.5], [0.5])
    return replace(data, **parts)


def test_held_out_images_that_were_seen_are_counted():
    data = dataset(
        train_ids=ids(1, 2, 3, groups=[1, 2, 3]),
        valid_ids=ids(4, 5, 6, groups=[4, 2, 6]),
        test_ids=ids(7, 8, 9, 10, groups=[7, 8, 8, 10]),
        all_ids=ids(*range(1, 12), groups=[1, 2, 3, 4, 2, 6, 7, 8, 8, 10, 7]),
    )
    seen = torch.tensor([8, 10, 99])
    assert seen_images.describe_seen(data, seen) == "3 of the 4 test images"  # 9 is like 8
    both = seen_images.describe_seen(data, torch.tensor([2, 4, 7]))
    assert both == "1 of the 4 test images and 2 of the 3 validation images"
    assert seen_images.describe_seen(data, torch.tensor([1, 3])) == ""
    copy = torch.tensor([11])  # of 7; it is in no part
    assert seen_images.describe_seen(data, copy) == "1 of the 4 test images"
    assert seen_images.describe_seen(dataset(), seen) == ""  # a data set that is no folder


def test_file_without_digests_or_with_other_things_says_nothing():
    for content in (
        {},
        [1, 2],
        torch.zeros(2, 2).long(),
        torch.zeros(2),
        torch.zeros(2).long().to_sparse(),
    ):
        assert seen_images.digests_in_file({"train_digests": content}) is None
    assert seen_images.digests_in_file({}) is None


def test_model_file_of_a_folder_knows_its_training_images(inside, folder, photos):
    inside("--dataset", "photos", *BRIEFLY)
    content, digests = digests_in(folder / "model_cnn_photos.pth")
    data = ic.load_data(ic.Config(dataset="photos"))
    assert content["train_digests"].dtype == torch.int64
    assert torch.equal(digests, data.train_ids.digests.unique())
    assert "earlier_digests" not in content


def test_model_file_of_a_fixed_data_set_has_no_digests(inside, folder):
    inside("--dataset", "digits", "--subset", "100", *BRIEFLY)
    _, digests = digests_in(folder / "model_cnn_digits.pth")
    assert digests is None


@pytest.mark.slow
@pytest.mark.usefixtures("all_for_training")
def test_weights_that_saw_held_out_images_are_noted(inside, folder):
    out, _ = inside("--dataset", "old", *BRIEFLY, "--val-fraction", "0", "--out", "first.pth")
    assert "was trained on" not in out
    briefly = ["--dataset", "photos", *BRIEFLY, "--run-dir", "run"]
    out, _ = inside(*briefly, "--repeat", "2", "--init-from", "first.pth")
    data = ic.load_data(ic.Config(dataset="photos", image_size=16))
    num_test, num_valid = len(data.test.labels), len(data.valid.labels)
    counts = f"{num_test} of the {num_test} test images and {num_valid} of the {num_valid} validat"
    assert out.count(f"note: first.pth was trained on {counts}") == 1

    # What the first weights saw is remembered by what is trained on, and in a resumed run.
    (folder / "first.pth").rename(folder / "gone.pth")
    inside("--resume", "run", "--epochs", "2")
    assert torch.equal(
        state_of(folder / "run" / "seed-0")["earlier_digests"],
        digests_in(folder / "gone.pth")[1],
    )
    inside("--dataset", "digits", *BRIEFLY, "--init-from", "gone.pth", "--out", "second.pth")
    out, _ = inside(*briefly[:-1], "again", "--init-from", "second.pth")
    assert f"note: second.pth was trained on {counts}" in out


@pytest.mark.slow
@pytest.mark.usefixtures("all_for_training")
def test_tools_note_what_a_model_has_seen(inside, folder, tool_inside, monkeypatch, capsys):
    inside("--dataset", "old", *BRIEFLY, "--val-fraction", "0", "--out", "first.pth")
    explain = tool_inside("explain")
    out, _ = explain("--checkpoint", "first.pth")
    assert "was trained on" not in out.replace("first.pth, trained on", "")
    out, _ = explain("--checkpoint", "first.pth", "--data-dir", "photos")
    num_test = len(ic.load_data(ic.Config(dataset="photos")).test.labels)
    note = f"note: first.pth was trained on {num_test} of the {num_test} test images"
    assert note in out
    arguments = ["tune.py", "--dataset", "photos", "--init-from", "first.pth", *BRIEFLY]
    monkeypatch.setattr(sys, "argv", arguments)
    tune.prepare(*tune.parse_options())
    assert note in capsys.readouterr().out


def test_near_copies_of_what_was_seen_are_noted(inside, folder, photos):
    shutil.copytree(photos, folder / "old" / "train")
    write_images(folder / "old" / "test", {"red": 5, "green": 5, "blue": 5}, seed=9)
    for path in photos.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"), quality=90)
        if int(path.stem) % 2:
            path.unlink()
    inside("--dataset", "old", *BRIEFLY, "--val-fraction", "0", "--out", "first.pth")
    out, _ = inside("--dataset", "photos", *BRIEFLY, "--init-from", "first.pth")
    data = ic.load_data(ic.Config(dataset="photos", image_size=16))
    groups, counts = data.test_ids.groups.unique(return_counts=True)
    assert 0 < (counts == 2).sum() < len(groups)
    assert f"was trained on {2 * int((counts == 2).sum())} of the {counts.sum()} test images" in out


def test_identical_copies_of_what_was_seen_are_noted(inside, folder, photos):
    """Of an image and its copies only the first is used; the one that was seen is another."""
    inside("--dataset", "photos", *BRIEFLY, "--val-fraction", "0", "--out", "first.pth")
    content, digests = digests_in(folder / "first.pth")
    names = {
        int(np.uint64(hash64(file.read_bytes())).astype(np.int64)): file
        for file in photos.rglob("*.png")
    }
    for digest in digests.tolist():
        file = names[digest]
        Image.open(file).save(file.with_name(f"-{file.name}"), compress_level=1)
    data = ic.load_data(ic.Config(dataset="photos", image_size=16))
    pixels = [
        {image.numpy().tobytes() for image in split.images} for split in (data.train, data.test)
    ]
    trained_on = {
        decode(names[digest], 16).pixels.transpose(2, 0, 1).tobytes() for digest in digests.tolist()
    }
    num_seen = len(trained_on & pixels[1])
    assert num_seen > 0 and trained_on & pixels[0]
    assert not torch.isin(data.test_ids.digests, digests).all()
    expected = f"{num_seen} of the {len(data.test.labels)} test images"
    assert seen_images.describe_seen(data, digests).startswith(expected)
    model = inference.load_model(folder / "first.pth")
    assert explain.may_have_seen(content, model, data)
    only_copies = torch.isin(data.all_ids.digests, digests)
    assert not torch.isin(data.train_ids.digests, data.all_ids.digests[only_copies]).any()


@pytest.mark.parametrize("resume", ["", "run"])
def test_starting_weights_of_a_resumed_run_are_remembered(monkeypatch, capsys, resume):
    """A seed that had not begun when the run was stopped has them from nowhere else."""
    content = {"train_digests": torch.tensor([7, 8])}
    monkeypatch.setattr(seen_images, "read_checkpoint", lambda path: content)
    data = dataset(test_ids=ids(7, 9), all_ids=ids(7, 9))
    config = ic.Config(init_from="first.pth", resume=resume)
    assert seen_images.note_initial_weights(data, config).earlier_digests.tolist() == [7, 8]
    assert ("was trained on" in capsys.readouterr().out) == (not resume)
    monkeypatch.undo()  # the file is gone
    assert seen_images.note_initial_weights(data, config).earlier_digests is None


def test_errors_of_the_note_are_not_taken_for_those_of_the_file(monkeypatch):
    content = {"train_digests": torch.tensor([7])}
    monkeypatch.setattr(seen_images, "read_checkpoint", lambda path: content)

    def fail(*given):
        raise UserError("something else")

    monkeypatch.setattr(seen_images, "note_seen", fail)
    with pytest.raises(UserError, match="something else"):
        seen_images.note_initial_weights(dataset(), ic.Config(init_from="first.pth"))


@pytest.mark.slow
def test_folder_that_grows_keeps_its_test_images(inside, folder):
    """Of 2×100 images, pictures that sort first used to move most of the test images."""
    write_noise(folder / "photos", {"a": 100, "b": 100})
    inside("--dataset", "photos", *BRIEFLY, "--out", "first.pth")
    write_noise(folder / "photos", {"a": 1, "b": 1}, seed=1, name="-{}.png")
    out, _ = inside("--dataset", "photos", *BRIEFLY, "--init-from", "first.pth")
    _, digests = digests_in(folder / "first.pth")
    data = ic.load_data(ic.Config(dataset="photos", image_size=16))
    num_seen = int(torch.isin(data.test_ids.digests, digests).sum())
    assert num_seen <= 1
    assert ("note: first.pth was trained on" in out) == (
        seen_images.describe_seen(data, digests) != ""
    )


@pytest.mark.slow
def test_labels_by_chance_are_validated_by_chance(inside, folder):
    """They were predicted from the other photographs of the same scene: 100 % in validation."""
    write_scenes(folder / "photos" / "train", num_scenes=120)
    write_scenes(folder / "photos" / "test", num_scenes=100, shots=1, seed=1)
    settings = ["--augment", "none", "--progressive-resizing", "0", "--val-fraction", "0.25"]
    settings += ["--image-size", "24", "--width", "0.5", "--epochs", "10"]
    inside("--dataset", "photos", *settings)
    run = only_run(folder)
    last = rows_of(run)[-1]
    assert float(last["train_accuracy"]) > 0.95
    assert 0.25 < float(last["valid_accuracy"]) < 0.75
    report = report_of(run)
    assert 0.3 < report["test_accuracy"] < 0.7
    assert report["calibration_error"] < report["calibration_error_before"] + 0.02
