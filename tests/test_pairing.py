"""compare.py pairs the same images, or says why it cannot: on made-up runs and on real ones."""

import random
import re
import shutil

import pytest
from conftest import report_of, table_of, write_images
from test_compare import make_report, make_run, numbers, write_predictions, write_run

import compare
from classifier.datasets import load

PHOTOS = {"dataset": "photos", "labels": "c"}  # of a folder, which may change


@pytest.fixture
def compared(tool_inside):
    """compare.py in this process: it takes options and returns standard output and error."""
    return tool_inside("compare")


def verdict_of(compared, *names):
    """The first line of the verdict, and what is on standard error."""
    out, err = compared(*names)
    return out.partition("\n\n")[2].splitlines()[0], err


def make_seeds(path, hits_of_seeds, images, **settings):
    """A run of several seeds, from 0 on, with the predictions of each, on the folder photos."""
    reports = []
    for seed, hits in enumerate(hits_of_seeds):
        (path / f"seed-{seed}").mkdir(parents=True)
        write_predictions(path / f"seed-{seed}", hits, "c", images)
        reports.append(make_report(sum(hits) / len(hits), len(hits), "photos"))
    report = {**reports[0], "test_accuracy_mean_interval": [0.1, 0.9], "repeats": reports}
    return write_run(path, report, dataset="photos", repeat=len(reports), **settings)


# ---- by image ----


def test_images_are_paired_by_their_digest_wherever_they_stand(compared, folder):
    """b has 80 of the 100 images of a, in another order, and 20 others."""
    draw = random.Random(0)
    hits_a = {image: draw.random() < 0.7 for image in range(100)}
    hits_b = {image: draw.random() < 0.8 for image in range(20, 120)}
    order = list(hits_b)
    draw.shuffle(order)
    make_run(folder / "a", [*hits_a.values()], images=[*hits_a], **PHOTOS)
    make_run(folder / "b", [hits_b[image] for image in order], images=order, **PHOTOS)
    shared = [(hits_a[image], hits_b[image]) for image in range(20, 100)]
    only_a, only_b = shared.count((True, False)), shared.count((False, True))
    assert min(only_a, only_b) > 5

    line, _ = verdict_of(compared, "a", "b")
    expected = f"80 test images that both have, of 100 and 100: {only_a} only a recognises"
    assert expected in line and f"{only_b} only b" in line
    difference = compare.paired_difference(only_a, only_b, 80)
    assert numbers(line)[0] == pytest.approx(100 * abs(difference.value), abs=0.006)


def test_a_folder_that_was_renamed_is_the_same(compared, folder):
    images = range(40)
    make_run(folder / "a", [True] * 30 + [False] * 10, images=images, **PHOTOS)
    renamed = {**PHOTOS, "dataset": "pictures"}
    make_run(folder / "b", [True] * 20 + [False] * 20, images=images, **renamed)
    line, _ = verdict_of(compared, "a", "b")
    assert "paired over 40 test images: 10 only a recognises, 0 only b" in line


def test_identical_images_are_paired_once_each(compared, folder):
    """a has image 7 twice, b three times."""
    make_run(folder / "a", [True] * 20 + [True, False], images=[*range(20, 40), 7, 7], **PHOTOS)
    b = [True] * 20 + [False, True, True]
    make_run(folder / "b", b, images=[*range(20, 40), 7, 7, 7], **PHOTOS)
    line, _ = verdict_of(compared, "a", "b")
    assert "22 test images that both have, of 22 and 23: 1 only a recognises, 1 only b" in line


def test_image_with_another_label_is_another_question(compared, folder):
    make_run(folder / "a", [True] * 20, images=range(20), **PHOTOS)
    relabelled = {**PHOTOS, "labels": "c" * 15 + "d" * 5}
    make_run(folder / "b", [True] * 20, images=range(20), **relabelled)
    assert "paired over 15 test images that both have" in verdict_of(compared, "a", "b")[0]


@pytest.mark.parametrize(
    ("num_a", "num_b", "num_shared", "enough"),
    [
        (32, 36, 3, False),
        (100, 100, 50, True),
        (100, 100, 49, False),
        (20, 900, 10, True),
        (9, 9, 9, False),
        (18, 18, 9, False),
        (100, 100, 0, False),
    ],
)
def test_too_few_of_the_same_images(compared, folder, num_a, num_b, num_shared, enough):
    make_run(folder / "a", [True] * num_a, images=range(num_a), **PHOTOS)
    first = num_a - num_shared
    make_run(folder / "b", [True] * num_b, images=range(first, first + num_b), **PHOTOS)
    line, err = verdict_of(compared, "a", "b")
    assert line.startswith(compare.NO_VERDICT) == (not enough)
    assert str(num_shared) in line and str(num_a) in line and str(num_b) in line
    assert "different test images" in err or num_a == num_b


def test_files_that_could_not_be_read_are_paired_with_nothing(compared, folder):
    for name in ("a", "b"):
        make_run(folder / name, [True] * 30, images=range(30), **PHOTOS)
        path = folder / name / "test_predictions.csv"
        path.write_text(path.read_text().replace(f",{5:016x}", ","))
    assert "paired over 29 test images" in verdict_of(compared, "a", "b")[0]


# ---- runs of version 0.9, which recorded no images ----


def test_runs_of_0_9_are_paired_only_where_the_images_are_known(compared, folder):
    hits = [True] * 30 + [False] * 10
    for name, dataset in (("old", "photos"), ("old2", "photos")):
        make_run(folder / name, hits, labels="c", dataset=dataset)
    make_run(folder / "new", hits, images=range(40), **PHOTOS)
    for pair in (("old", "old2"), ("old", "new"), ("new", "old")):
        line, _ = verdict_of(compared, *pair)
        assert line.startswith(compare.NO_VERDICT) and "old" in line and "train it again" in line
    make_run(folder / "old digits", hits)
    make_run(folder / "new digits", hits, images=range(40))
    for pair in (("old digits", "new digits"), ("new digits", "old digits")):
        assert "paired over 40 test images" in verdict_of(compared, *pair)[0]


def test_known_data_sets_are_those_of_the_program():
    assert {"auto", *load.NAMES} == compare.FIXED_DATASETS


def test_report_of_0_9_with_several_seeds(compared, folder):
    """There the mean over the seeds and Student's interval had the names of a single test."""
    reports = [make_report(accuracy, 100) for accuracy in (0.9, 0.8)]
    for name, changes in {
        "old": {"test_accuracy": 0.85, "test_accuracy_interval": [0.7, 0.95]},
        "new": {"test_accuracy_mean": 0.85, "test_accuracy_mean_interval": [0.7, 0.95]},
    }.items():
        report = {**reports[0], "kept": "seed-0", "repeats": reports, **changes}
        write_run(folder / name, report, repeat=2)
    rows = table_of(compared("old", "new", "--format", "csv")[0])
    for row in rows:
        assert [row[name] for name in ("accuracy %", "95 % low", "95 % high")] == [
            "85.00",
            "70.00",
            "95.00",
        ]


# ---- by seed ----


def test_seeds_are_compared_on_the_images_that_both_runs_have(compared, folder):
    """Of 40 and 40 images 30 are shared; on the others b is always right, and a always wrong."""
    wrong = [[3, 5, 9], [1, 2, 6]]  # how many of the shared ones, by run and seed
    hits_a = [[False] * n + [True] * (30 - n) + [False] * 10 for n in wrong[0]]
    hits_b = [[True] * 10 + [False] * n + [True] * (30 - n) for n in wrong[1]]
    make_seeds(folder / "a", hits_a, [*range(30), *range(100, 110)])
    make_seeds(folder / "b", hits_b, [*range(200, 210), *range(30)])
    line, err = verdict_of(compared, "a", "b")
    assert "3 seeds, on 30 test images that both have, of 40 and 40" in line
    expected = compare.seed_difference(
        {seed: 1 - n / 30 for seed, n in enumerate(wrong[0])},
        {seed: 1 - n / 30 for seed, n in enumerate(wrong[1])},
    )
    assert numbers(line)[0] == pytest.approx(100 * expected.value, abs=0.006)


def test_seeds_on_other_images_are_not_compared(compared, folder):
    hits = [[True] * 30 + [False] * wrong for wrong in (10, 10)]
    make_seeds(folder / "a", hits, range(40))
    make_seeds(folder / "b", hits, range(35, 75))
    line, _ = verdict_of(compared, "a", "b")
    assert line.startswith(compare.NO_VERDICT) and " 5 are the same" in line
    shutil.rmtree(folder / "b" / "seed-1")  # which images, is not known any more
    line, _ = verdict_of(compared, "a", "b")
    assert line.startswith(compare.NO_VERDICT) and "b has no record" in line


# ---- the note above the table ----


@pytest.mark.parametrize(
    ("digests", "names", "different"),
    [
        (["x", "x", "x"], ["photos", "photos", "renamed"], False),
        (["x", "x", "y"], ["photos"] * 3, True),
        (["x", "", ""], ["photos"] * 3, False),
        (["x", "", "y"], ["photos"] * 3, True),
        (["", "", ""], ["photos", "photos", "others"], True),
    ],
)
def test_table_says_where_the_test_images_differ(folder, digests, names, different):
    paths = []
    for number, (digest, name) in enumerate(zip(digests, names, strict=True)):
        report = {**make_report(0.9, 40, name), "test_digest": digest}
        paths.append(write_run(folder / str(number), report, dataset=name))
    runs, _ = compare.read_runs(paths)
    assert any("different test images" in note for note in compare.notes(runs)) == different


# ---- real runs on a folder ----


@pytest.mark.slow
def test_runs_on_a_folder_that_grew_and_on_another_of_its_name(inside, compared, folder):
    settings = ["--epochs", "1", "--width", "0.25", "--batch-size", "32"]

    def train(name, *more, dataset="photos"):
        inside("--dataset", dataset, *settings, *more, "--run-dir", name, "--out", f"{name}.pth")
        return report_of(folder / name)

    write_images(folder / "photos", {"red": 40, "blue": 40})
    first = train("first")
    resized = train("resized", "--image-size", "16")
    assert first["test_digest"] == resized["test_digest"]
    rows = table_of((folder / "first" / "test_predictions.csv").read_text())
    for row in rows:
        assert (folder / "photos" / row["image"]).is_file()
        assert row["image"].startswith(f"{row['label']}/")
    line, err = verdict_of(compared, "first", "resized")
    assert f"paired over {len(rows)} test images: " in line and "test images" not in err

    write_images(folder / "more", {"red": 12, "blue": 12}, seed=1)
    for path in (folder / "more").glob("*/*.png"):
        path.rename(folder / "photos" / path.parent.name / f"0-{path.name}")
    train("grown")
    both = [
        table_of((folder / name / "test_predictions.csv").read_text())
        for name in ("first", "grown")
    ]
    shared = {row["digest"] for row in both[0]} & {row["digest"] for row in both[1]}
    line, err = verdict_of(compared, "first", "grown")
    assert str(len(shared)) in line and "different test images" in err

    write_images(folder / "elsewhere" / "photos", {"red": 40, "blue": 40}, seed=5)
    train("another", dataset="elsewhere/photos")
    line, err = verdict_of(compared, "first", "another")
    assert line.startswith(compare.NO_VERDICT) and re.search(r"only 0 are the same", line)
