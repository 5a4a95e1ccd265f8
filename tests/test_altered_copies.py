"""Copies that were mirrored, cropped, brightened or made smaller: which are found, which not."""

import io
import tracemalloc

import numpy as np
import pytest
import torch
from photo_folders import compressed, scene
from PIL import Image, ImageDraw

from classifier.config import Config
from classifier.datasets import altered_copies, dataset, duplicates
from classifier.datasets.altered_copies import MIRRORED, Parts
from classifier.datasets.decode import square
from classifier.datasets.folder import load_folder

COUNT = 40  # scenes


def cut(image, area, horizontal, vertical):
    """A part with this share of the area; 0 is left or top, 1 right or bottom."""
    width, height = (int(side * area**0.5) for side in image.size)
    left, top = int((image.width - width) * horizontal), int((image.height - height) * vertical)
    return image.crop((left, top, left + width, top + height))


CHANGES = {
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "brighter": lambda image: image.point(lambda value: value * 1.2),
    "darker": lambda image: image.point(lambda value: value * 0.8),
    "JPEG": lambda image: Image.open(io.BytesIO(compressed(image, 40))),
    "quarter": lambda image: image.resize((image.width // 4, image.height // 4)),
    "90 % in the middle": lambda image: cut(image, 0.9, 0.5, 0.5),
    "90 % in a corner": lambda image: cut(image, 0.9, 1, 0),
    "80 % in the middle": lambda image: cut(image, 0.8, 0.5, 0.5),
    "80 % at the side": lambda image: cut(image, 0.8, 0, 0.5),
    "80 % in a corner": lambda image: cut(image, 0.8, 1, 1),
    "85 % elsewhere": lambda image: cut(image, 0.85, 0.3, 0.8),
    "mirrored and 85 %": lambda image: cut(CHANGES["mirrored"](image), 0.85, 1, 0.5),
}
# Scenes change more from place to place than photographs do, so some large crops are missed.
LEAST = {"80 % at the side": 0.7, "80 % in a corner": 0.5}


@pytest.fixture(scope="module")
def scenes():
    random = np.random.default_rng(0)
    return [scene(random, (160, 160)) for _ in range(COUNT)]


def find(images, size=32, groups=None):
    """The pairs among some images, as a set, and whether all were compared."""
    pixels = np.stack([square(image, size) for image in images])
    return find_pixels(pixels, groups)


def find_pixels(pixels, groups=None):
    rows = np.arange(len(pixels))
    groups = rows if groups is None else groups
    pairs, is_complete = altered_copies.altered_copies(pixels, rows, groups)
    assert pairs.dtype == np.int64
    return {tuple(sorted(pair)) for pair in pairs.tolist()}, is_complete


# ---- what is found ----


@pytest.mark.parametrize("change", CHANGES)
def test_altered_copies_are_found_and_nothing_else(change, scenes):
    copies = [CHANGES[change](image) for image in scenes]
    pairs, is_complete = find([*scenes, *copies])
    expected = {(number, number + COUNT) for number in range(COUNT)}
    assert is_complete
    assert not pairs - expected
    assert len(pairs) >= LEAST.get(change, 0.95) * COUNT


@pytest.mark.parametrize("size", [16, 20, 48, 64])
def test_images_of_any_size_are_compared(size, scenes):
    copies = [CHANGES["mirrored and 85 %"](image) for image in scenes]
    pairs, _ = find([*scenes, *copies], size)
    assert not pairs - {(number, number + COUNT) for number in range(COUNT)}
    assert len(pairs) >= 0.9 * COUNT


def test_different_images_are_no_copies():
    random = np.random.default_rng(1)
    assert find([scene(random) for _ in range(1500)]) == (set(), True)
    noise = random.integers(0, 256, (500, 32, 32, 3), dtype=np.uint8)
    assert find_pixels(noise) == (set(), True)


def test_same_colors_with_other_details_are_no_copies(monkeypatch):
    """The third stage refuses them, too, where the second lets them pass."""
    random = np.random.default_rng(0)

    def blurred(places, strength):
        noise = Image.fromarray(random.integers(0, 256, (places, places, 3), dtype=np.uint8))
        smooth = noise.resize((32, 32), Image.Resampling.BICUBIC)
        return strength * (np.asarray(smooth) - 128.0)

    images = []
    for _ in range(10):
        large = 128 + blurred(3, 0.9)
        images += [(large + blurred(9, 0.15)).clip(0, 255).astype(np.uint8) for _ in range(2)]
    monkeypatch.setattr(altered_copies, "MIN_FINE", 0.5)
    assert len(find_pixels(np.stack(images))[0]) <= 1


def test_many_images_that_are_alike_are_no_copies(scenes):
    """Such as digits of one kind: otherwise a whole class would be one group."""
    places = np.linspace(0, 1, 10)
    parts = [cut(scenes[0], area, place, 0.5) for area in (0.97, 0.95) for place in places]
    mirrored = CHANGES["mirrored"](scenes[1])
    assert find([*parts, scenes[1], mirrored])[0] == {(20, 21)}


def test_plain_images_are_not_compared():
    """Their noise says nothing, and `duplicates` compares them by thumbnails."""
    random = np.random.default_rng(1)
    dark = random.integers(0, 12, (20, 32, 32, 3), dtype=np.uint8)
    assert find_pixels(np.concatenate([dark, dark[:, :, ::-1]])) == (set(), True)


def test_same_drawing_in_other_colors_is_no_copy():
    random = np.random.default_rng(1)
    images = []
    for _ in range(3):
        corners = [int(value) for value in random.integers(4, 12, 2)]
        corners += [corner + 16 for corner in corners]
        for background, color in (("white", "red"), ("yellow", "blue")):
            image = Image.new("RGB", (32, 32), background)
            ImageDraw.Draw(image).ellipse(corners, fill=color)
            images.append(image)
    assert not {(0, 1), (2, 3), (4, 5)} & find(images)[0]


def test_images_that_belong_together_are_not_compared(scenes):
    copies = [CHANGES["mirrored"](image) for image in scenes[:4]]
    groups = np.array([0, 1, 2, 3, 0, 1, 6, 7])
    assert find([*scenes[:4], *copies], groups=groups)[0] == {(2, 6), (3, 7)}


def test_few_or_tiny_images_have_no_copies(scenes):
    assert find(scenes[:1]) == (set(), True)
    assert find(scenes[:1] * 2, size=8) == (set(), True)


# ---- how ----


def test_patterns_of_parts_are_those_of_cropped_images():
    greys = np.random.default_rng(0).uniform(0, 255, (2, 32, 32)).astype(np.float32)
    parts = Parts(np.array([1, 0.5, 0.75]), np.array([0, 0.25, 0]), np.array([0, 0.5, 0.25]))
    found = altered_copies._patterns_of_parts(greys, parts)
    assert found.shape == (2, 3, altered_copies.NUM_FINE, altered_copies.NUM_FINE)
    cropped = [greys, greys[:, 8:24, 16:], greys[:, :24, 8:]]
    for number, images in enumerate(cropped):
        expected = altered_copies._patterns(images)
        np.testing.assert_allclose(found[:, number], expected, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(expected, axis=(1, 2)), 1, rtol=1e-5)
    mirrored = altered_copies._patterns(np.ascontiguousarray(greys[:, :, ::-1]))
    np.testing.assert_allclose(mirrored, altered_copies._patterns(greys) * MIRRORED, atol=1e-5)


@pytest.mark.parametrize("size", [16, 32, 64, 50])
def test_larger_images_become_means_of_areas(size):
    images = np.random.default_rng(0).uniform(0, 255, (2, size, size)).astype(np.float32)
    small = altered_copies._shrink(images)
    assert small.shape == (2, min(size, 32), min(size, 32))
    np.testing.assert_allclose(small.mean(axis=(1, 2)), images.mean(axis=(1, 2)), rtol=1e-4)
    if size == 64:
        np.testing.assert_allclose(small[:, 0, 0], images[:, :2, :2].mean(axis=(1, 2)), rtol=1e-4)


def test_pairs_do_not_depend_on_the_blocks(scenes, monkeypatch):
    images = [*scenes, *(CHANGES["mirrored and 85 %"](image) for image in scenes)]
    expected = find(images)
    for name, size in (("ROWS", 7), ("CHUNK", 5)):
        monkeypatch.setattr(altered_copies, name, size)
    assert find(images) == expected
    assert len(expected[0]) > 30


def test_search_among_too_many_alike_images_ends(scenes, monkeypatch):
    images = [*scenes, *(CHANGES["mirrored"](image) for image in scenes)]
    with monkeypatch.context() as few:
        few.setattr(altered_copies, "MAX_COMPARED", 30)
        pairs, is_complete = find(images)
        assert not is_complete and 0 < len(pairs) < COUNT
    monkeypatch.setattr(altered_copies, "MAX_CHECKED", 10)
    pairs, is_complete = find(images)
    assert not is_complete and len(pairs) == 10


def test_after_many_pairs_only_those_that_join_groups_are_listed(scenes, monkeypatch):
    images = []
    for image in scenes[:4]:
        images += [image, *(cut(image, 0.95, place, 0.5) for place in (0, 0.3, 0.7, 1))]
    every_pair, _ = find(images)
    assert len(every_pair) > 30
    monkeypatch.setattr(altered_copies, "MAX_LISTED", 3)
    pairs, _ = find(images)
    assert 16 <= len(pairs) < 20
    for some in (every_pair, pairs):
        groups = duplicates.group_images(np.arange(20), np.array([(*pair, 0) for pair in some]))
        assert groups.tolist() == [number // 5 * 5 for number in range(20)]


def test_memory_of_a_search_is_bounded():
    """All correlations of each with each would be 36 MB."""
    coarse = np.random.default_rng(0).integers(0, 256, (3000, 8, 8, 3), dtype=np.uint8)
    pixels = coarse.repeat(2, axis=1).repeat(2, axis=2)
    tracemalloc.start()
    find_pixels(pixels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20


def test_memory_of_a_search_among_digits_is_bounded():
    """Where all are alike, all pairs would be 65 MB."""
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (8, 8, 1)).repeat(2, axis=0).repeat(2, axis=1)
    noise = random.integers(-20, 20, (1500, 16, 16, 3))
    pixels = (image + noise).clip(0, 255).astype(np.uint8)
    tracemalloc.start()
    assert find_pixels(pixels) == (set(), True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


@pytest.mark.parametrize("seed", range(10))
def test_crowds_are_images_that_are_like_many_others(seed):
    """Each pair may be found from one of its images or from both."""
    found_from = np.random.default_rng(seed).random((60, 60)) < 0.11
    np.fill_diagonal(found_from, False)
    crowds = altered_copies._Crowds(60)
    for source, is_alike in enumerate(found_from):
        others = np.flatnonzero(is_alike)
        if crowds.has(source):
            others = others[~crowds.has(others)]
        crowds.add(source, others)
    num_alike = (found_from | found_from.T).sum(axis=1)
    expected = num_alike > altered_copies.MAX_ALIKE
    assert 0 < expected.sum() < 60
    assert crowds.has(np.arange(60)).tolist() == expected.tolist()


# ---- in a folder ----


def test_altered_copies_stay_on_one_side_of_the_split(folder):
    random = np.random.default_rng(0)
    for number in range(60):
        place = folder / "photos" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        image = scene(random, (48, 48))
        image.save(place / f"{number}-0.png")
        CHANGES["mirrored"](image).save(place / f"{number}-1.png")
        cut(image, 0.9, 0, 1).save(place / f"{number}-2.png")
    data = load_folder(Config(dataset="photos"))
    groups = [ids.groups.tolist() for ids in (data.train_ids, data.valid_ids, data.test_ids)]
    assert sum(len(set(part)) for part in groups) == len(set(sum(groups, []))) == 60
    assert all(len(part) == 3 * len(set(part)) for part in groups)
    assert {kind for *_, kind in data.report["twins"]} == {"near-identical"}
    assert torch.isin(data.test_ids.groups, data.train_ids.groups).sum() == 0


def test_pairs_of_an_older_search_are_not_used(folder, monkeypatch):
    """Nor are its rules those of today: other images are held out."""
    random = np.random.default_rng(0)
    photos = folder / "photos"
    for name in ("a", "b"):
        (photos / name).mkdir(parents=True)
        for number in range(12):
            scene(random).save(photos / name / f"{number}.png")
    CHANGES["mirrored"](Image.open(photos / "a" / "0.png")).save(photos / "a" / "z.png")
    nothing = np.empty((0, 2), np.int64), True
    with monkeypatch.context() as older:
        older.setattr(duplicates, "SEARCHED_AS", duplicates.SEARCHED_AS - 1)
        older.setattr(duplicates, "altered_copies", lambda *given: nothing)
        assert not load_folder(Config(dataset="photos")).report["twins"]
    assert len(load_folder(Config(dataset="photos")).report["twins"]) == 1
    assert dataset.SPLIT_RULES == 3
