"""The report on a folder of images."""

import shutil
from pathlib import Path

import pytest
from conftest import write_images
from PIL import Image

from classifier.config import Config
from classifier.datasets.folder import load_folder


def report_of(**settings):
    """The report on the folder photos, and its lines as one text."""
    report = load_folder(Config(dataset="photos", **settings)).report
    return report, "\n".join(report["words"])


@pytest.fixture
def photos(folder):
    write_images(folder / "photos", {"red": 40, "green": 40, "blue": 30})
    return folder / "photos"


def test_folder_without_faults(photos):
    report, words = report_of()
    assert list(report) == [
        "folder",
        "image_size",
        "fit",
        "cut_off",
        "images_per_class",
        "words",
        "sizes",
        "unreadable",
        "classes_with_few_images",
        "twins",
        "left_out",
    ]
    assert report["folder"] == "photos"
    assert report["image_size"] == 48
    assert report["images_per_class"] == {"all": {"blue": 30, "green": 40, "red": 40}}
    assert report["sizes"] == [["48x36", 110]]
    for name in ("unreadable", "classes_with_few_images", "twins", "left_out"):
        assert not report[name]
    assert len(report["words"]) == 4
    assert "all: 110 images (blue 30, green 40, red 40)" in words


def test_sizes_in_files_are_counted(photos):
    Image.new("RGB", (20, 30)).save(photos / "blue" / "icon.png")
    Image.new("RGB", (300, 200)).save(photos / "blue" / "large.png")
    report, words = report_of()
    assert report["sizes"] == [["48x36", 110], ["20x30", 1], ["300x200", 1]]
    assert "from 20 to 200 pixels, half of them up to 36" in words
    assert "1 image is less than half as large as 48 pixels" in words
    Image.new("RGB", (31, 21)).save(photos / "blue" / "icon 2.png")
    assert "2 images are less than half as large" in report_of()[1]


def test_faults_of_real_folders_are_reported(photos):
    write_images(photos, {"rare": 3}, seed=5)
    for name in ("red", "green"):
        shutil.copy(photos / "red" / "0.png", photos / name / "copy.png")
    Image.open(photos / "blue" / "0.png").save(photos / "blue" / "again.jpg", quality=70)
    shutil.copy(photos / "red" / "1.png", photos / "red" / "really a png.jpg")
    for name in ("red/text.jpg", "blue/.hidden.png", "blue/notes.txt"):
        (photos / name).write_text("no image")
    report, words = report_of()
    assert report["left_out"] == [str(Path("photos", "blue", "notes.txt"))]
    assert list(report["unreadable"]) == [str(Path("photos", "red", "text.jpg"))]
    assert "cannot be read: 1 file: " in words
    assert report["classes_with_few_images"] == {"rare": 3}
    assert "fewer than 10 images: rare (3)" in words
    assert "differ much in size" in words
    assert " 3 to 6 " not in words  # are tested, unless some are alike
    assert "in two classes, such as " in words
    kinds = [kind for *_, kind in report["twins"]]
    assert sorted(kinds) == ["identical"] * 3 + ["near-identical"]
    assert "3 pairs of identical and 1 of near-identical images" in words


def test_copies_are_not_counted_as_images_to_train_on(folder):
    write_images(folder / "photos", {"red": 30, "green": 5})
    for i in range(20):
        shutil.copy(folder / "photos/green/0.png", folder / f"photos/green/copy {i}.png")
    report, words = report_of()
    assert report["images_per_class"]["all"]["green"] == 25
    assert report["classes_with_few_images"] == {"green": 5}
    assert "few or none of these" in words


def test_small_classes_of_a_folder_with_test_images(folder):
    for split in ("train", "test"):
        write_images(folder / "photos" / split, {"red": 12, "green": 4}, seed=len(split))
    report, words = report_of()
    assert report["classes_with_few_images"] == {"green": 4}
    assert "few or none of these" not in words


def test_duplicates_across_splits_are_a_warning(folder):
    for split, seed in (("train", 1), ("test", 2)):
        write_images(folder / "photos" / split, {"red": 12, "green": 12}, seed=seed)
    train, test = Path("photos", "train"), Path("photos", "test")
    original = train / "red" / "3.png"
    leak = test / "red" / "leak.png"
    shutil.copy(original, leak)
    shutil.copy(train / "green" / "3.png", train / "green" / "again.png")  # this pair is not across
    report, words = report_of()
    assert f"WARNING: 1 pair across train and test, such as {original} and {leak}" in words
    assert [str(original), str(leak), "identical"] in report["twins"]
    shutil.copytree(train, train.with_name("val"))
    leak.unlink()
    _, words = report_of()
    assert "WARNING: 25 pairs across train and valid" in words
    assert "the validation accuracy" in words
    assert "the test accuracy" not in words
