"""Which images of a folder are held out: by content and by groups, whatever is beside them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_folders import scene_of, write_jpegs, write_noise, write_scenes
from PIL import Image

import explain
from classifier.config import Config
from classifier.datasets import duplicates, splits
from classifier.datasets.decode import hash64
from classifier.datasets.folder import load_folder
from classifier.errors import UserError

QUICK = settings(deadline=None, max_examples=60, derandomize=True, database=None)
PARTS = ("train", "valid", "test")


def load(dataset="photos", **options):
    return load_folder(Config(dataset=str(dataset), **options))


def digest_of(path):
    """The digest by which a data set knows a file."""
    return int(np.uint64(hash64(path.read_bytes())).astype(np.int64))


def parts_of(data, folder=Path("photos")):
    """The part of the data set that each file is in: train, valid or test."""
    part_of_digest = {}
    for part in PARTS:
        ids = getattr(data, f"{part}_ids")
        assert len(ids.digests) == len(ids.groups) == len(getattr(data, part).labels)
        part_of_digest |= dict.fromkeys(ids.digests.tolist(), part)
    paths = [path for path in folder.rglob("*.*") if path.suffix in (".png", ".jpg")]
    return {
        path: part_of_digest[digest_of(path)] for path in paths if digest_of(path) in part_of_digest
    }


def parts_of_scenes(data, folder=Path("photos")):
    """The parts in which there are images of each scene."""
    scenes = {}
    for path, part in parts_of(data, folder).items():
        scenes.setdefault(scene_of(path), set()).add(part)
    return scenes


def random_digests(count, seed=0):
    return np.random.default_rng(seed).integers(-(2**63), 2**63, count)


# ---- by groups ----


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=80),
    st.floats(0, 0.99),
)
def test_groups_are_held_out_whole_and_each_class_keeps_images(images, fraction):
    labels, groups = (np.array(column) for column in zip(*images, strict=True))
    is_held_out = splits.hold_out(labels, groups, fraction, "test")
    assert is_held_out.shape == labels.shape and is_held_out.dtype == bool
    for group in np.unique(groups):
        assert len(set(is_held_out[groups == group].tolist())) == 1
    for label in np.unique(labels):
        assert not is_held_out[labels == label].all()
    if fraction == 0:
        assert not is_held_out.any()
    order = np.random.default_rng(0).permutation(len(labels))
    again = splits.hold_out(labels[order], groups[order], fraction, "test")
    assert again.tolist() == is_held_out[order].tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 10, 40, 100, 1000])
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_class_has_about_its_share_held_out(count, fraction):
    share = round(count * fraction)
    tolerance = max(share // 4, int(share >= 3))
    for seed in range(20):
        labels = np.zeros(count, dtype=np.int64)
        is_held_out = splits.hold_out(labels, random_digests(count, seed), fraction, "test")
        assert abs(is_held_out.sum() - share) <= tolerance


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([5, 5, 5], {5}),  # each is larger than the share, which is 3
        ([5, 5], {0}),  # as for two images
        ([10], {0}),
        ([50, 3, *[1] * 27], set(range(12, 21))),  # the largest would be far too many
        ([60, 40, 7], {7}),
    ],
)
def test_classes_of_large_groups(sizes, expected):
    for seed in range(10):
        groups = np.repeat(random_digests(len(sizes), seed), sizes)
        is_held_out = splits.hold_out(np.zeros_like(groups), groups, 0.2, "test")
        assert is_held_out.sum() in expected


def test_numbers_for_one_purpose_say_nothing_of_those_for_another():
    digests = random_digests(20_000)
    first, second = (splits.random_numbers(digests, salt) for salt in ("test", "validation"))
    assert first.min() >= 0 and first.max() < 1
    assert first.mean() == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert splits.random_numbers(digests[5:9], "test").tolist() == first[5:9].tolist()


@pytest.mark.parametrize("num_classes", [2, 5])
def test_folds_have_whole_groups_and_all_classes(num_classes):
    random = np.random.default_rng(3)
    groups = np.repeat(random_digests(60), random.integers(1, 6, 60))
    labels = random.integers(0, num_classes, 60)[np.unique(groups, return_inverse=True)[1]]
    labels[::25] = 0  # some groups are of two classes
    fold = splits.folds(labels, groups, 3)
    for group in np.unique(groups):
        assert len(set(fold[groups == group].tolist())) == 1
    for label in range(num_classes):
        counts = np.bincount(fold[labels == label], minlength=3)
        assert counts.min() > counts.sum() / 5


# ---- folders with near copies ----


def test_scenes_stay_together(folder):
    write_scenes(folder / "photos", num_scenes=60)
    scenes = parts_of_scenes(load())
    assert len(scenes) == 60 and all(len(parts) == 1 for parts in scenes.values())
    counts = {part: sum(parts == {part} for parts in scenes.values()) for part in PARTS}
    assert 9 <= counts["test"] <= 15 and 3 <= counts["valid"] <= 7


def test_validation_images_of_a_given_training_folder_are_of_other_scenes(folder):
    write_scenes(folder / "photos" / "train", num_scenes=60)
    write_scenes(folder / "photos" / "test", num_scenes=10, seed=1)
    train = Path("photos", "train")
    scenes = parts_of_scenes(load(), train)
    assert all(len(parts) == 1 for parts in scenes.values())
    assert 3 <= sum(parts == {"valid"} for parts in scenes.values()) <= 8


def test_jpegs_of_several_qualities_stay_together(folder):
    write_jpegs(folder / "photos", num_scenes=60)
    scenes = parts_of_scenes(load())
    assert len(scenes) == 60 and all(len(parts) == 1 for parts in scenes.values())


def test_test_images_are_not_like_given_validation_images(folder):
    write_scenes(folder / "photos" / "train", num_scenes=40, shots=3)
    write_scenes(folder / "photos" / "val", num_scenes=40, shots=1, seed=5)
    train, valid = folder / "photos" / "train", folder / "photos" / "val"
    for path in [*train.rglob("*-0.png")]:
        if int(path.stem.partition("-")[0]) < 25:
            path.rename(valid / path.parent.name / f"moved {path.name}")
    scenes = parts_of_scenes(load(), Path("photos", "train"))
    in_test = {int(Path(name).stem) for name, parts in scenes.items() if "test" in parts}
    assert in_test and min(in_test) >= 25


def test_near_copy_in_another_class_is_on_the_same_side(folder):
    write_images(folder / "photos", {"red": 30, "green": 30})
    alike = folder / "photos" / "alike"
    alike.mkdir()
    for number in range(30):
        picture = Image.open(folder / "photos" / "red" / f"{number}.png")
        picture.save(alike / f"{number}.jpg", quality=80)
        shutil.copy(alike / f"{number}.jpg", folder / "photos" / "green" / f"copy {number}.jpg")
    data = load()
    parts = parts_of(data)
    for number in range(30):
        names = [f"red/{number}.png", f"alike/{number}.jpg", f"green/copy {number}.jpg"]
        assert len({parts[Path("photos", name)] for name in names}) == 1


@pytest.mark.parametrize("seed", range(6))
def test_class_of_which_all_images_are_alike_is_trained_on_with_its_copies(folder, seed):
    """The class used to go back to training, but its copies in other classes stayed in test."""
    write_images(folder / "photos", {"red": 30, "green": 30})
    write_scenes(folder / "photos", num_scenes=1, shots=9, seed=seed, classes=["alike"])
    shutil.copy(folder / "photos" / "alike" / "0-0.png", folder / "photos" / "red" / "copy.png")
    parts = parts_of(load())
    copies = {part for path, part in parts.items() if "alike" in path.parts}
    assert copies == {parts[Path("photos", "red", "copy.png")]} == {"train"}


def test_no_image_is_judged_by_a_network_that_was_trained_on_a_near_copy(folder, monkeypatch):
    write_scenes(folder / "photos" / "train", num_scenes=60)
    write_scenes(folder / "photos" / "test", num_scenes=6, seed=1)
    data = load(val_fraction=0.0)
    scene_of_image = {}
    for image, file in zip(data.train.images, data.files, strict=True):
        scene_of_image[image.numpy().tobytes()] = scene_of(file)

    def train_and_predict(config, fold, device):
        trained_on, judged = (
            {scene_of_image[image.numpy().tobytes()] for image in split.images}
            for split in (fold.train, fold.valid)
        )
        assert not trained_on & judged and len(trained_on | judged) == 60
        assert set(fold.train.labels.tolist()) == {0, 1}
        return torch.nn.functional.one_hot(fold.valid.labels, 2).float()

    monkeypatch.setattr(explain, "train_and_predict", train_and_predict)
    config, device = Config(dataset="photos"), torch.device("cpu")
    probabilities = explain.out_of_fold_probabilities(config, data, device)
    assert torch.equal(probabilities.argmax(1), data.train.labels)  # each image was judged


def test_class_of_near_copies_alone_cannot_be_judged(folder):
    write_scenes(folder / "photos" / "train", num_scenes=2, shots=8, classes=["a"])
    write_noise(folder / "photos", {"train/b": 9, "test/a": 3, "test/b": 3})
    data = load(val_fraction=0.0)
    with pytest.raises(UserError, match="3 training images"):
        explain.check_class_sizes(data.train.labels, data.train_ids)


def test_groups_are_whole_where_there_are_too_many_pairs_to_list(folder, monkeypatch):
    write_scenes(folder / "photos", num_scenes=12, shots=8)
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 20)
    monkeypatch.setattr(duplicates, "CHUNK", 5)
    data = load()
    scenes = parts_of_scenes(data)
    assert len(scenes) == 12 and all(len(parts) == 1 for parts in scenes.values())
    assert len(data.report["twins"]) < 12 * 28
    assert "at least " in "\n".join(data.report["words"])


def test_search_that_ends_early_is_reported(folder, monkeypatch):
    write_scenes(folder / "photos", num_scenes=12, shots=8)
    monkeypatch.setattr(duplicates, "MAX_VALUES", 10 * 3 * 48**2)
    for _ in range(2):  # the second time from the file beside the cache
        words = "\n".join(load().report["words"])
        assert "near-identical ones may be in training as well as in validation or test" in words


# ---- folders that grow ----


def num_moved(before, after):
    """How many images went from training to being held out, and the other way."""
    to_held_out = sum(before[path] == "train" != after[path] for path in before)
    to_training = sum(before[path] != "train" == after[path] for path in before)
    return to_held_out, to_training


def test_file_that_sorts_first_moves_hardly_any_other(folder):
    write_noise(folder / "photos", {"a": 100, "b": 100})
    before = parts_of(load())
    assert len(before) == 200
    write_noise(folder / "photos", {"a": 1, "b": 1}, seed=1, name="-{}.png")
    after = parts_of(load())
    assert len(after) == 202
    assert sum(before[path] != after[path] for path in before) <= 2


def test_split_does_not_depend_on_names_and_places(folder):
    write_noise(folder / "photos", {"a": 60, "b": 60})
    before = load()
    paths = sorted((folder / "photos" / "a").iterdir())
    for number, path in enumerate(paths):
        inner = path.parent / str(number % 3)
        inner.mkdir(exist_ok=True)
        path.rename(inner / f"{100 - number}.png")
    shutil.copytree(folder / "photos", folder / "copied")
    for dataset in ("photos", "copied"):
        after = load(dataset)
        for part in PARTS:
            then, now = getattr(before, f"{part}_ids"), getattr(after, f"{part}_ids")
            assert sorted(then.digests.tolist()) == sorted(now.digests.tolist())


@pytest.mark.parametrize(
    ("count", "share", "most"),
    [(10, 0.1, 0.3), (40, 0.1, 0.5), (100, 0.1, 0.6), (1000, 0.01, 0.1), (1000, 0.1, 0.1)],
)
def test_how_many_images_change_sides_when_a_class_grows(count, share, most):
    """On average, of all images of the class."""
    moved = 0
    num_new = max(1, round(count * share))
    repeats = 40
    for seed in range(repeats):
        digests = random_digests(count + num_new, seed)
        labels = np.zeros_like(digests)
        before = splits.hold_out(labels[:count], digests[:count], 0.2, "test")
        after = splits.hold_out(labels, digests, 0.2, "test")[:count]
        moved += (before != after).sum()
    assert moved / repeats <= most


# ---- --subset ----


def test_subset_of_a_folder_is_part_of_that_of_a_larger_folder(folder):
    write_noise(folder / "photos", {"a": 60, "b": 30})
    everything, some, few = (load(subset=count) for count in (0, 30, 10))
    for data, expected in ((some, [20, 10]), (few, [7, 3])):
        assert data.train.labels.bincount().tolist() == expected
    in_some = set(some.train_ids.digests.tolist())
    assert set(few.train_ids.digests.tolist()) < in_some
    assert in_some < set(everything.train_ids.digests.tolist())
    assert torch.equal(some.valid.images, everything.valid.images)
    write_noise(folder / "photos", {"a": 3}, seed=1, name="-{}.png")
    again = set(load(subset=30).train_ids.digests.tolist())
    assert len(in_some & again) >= 27
