"""Identical and near-identical images: finding them, and which belong together."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_folders import write_cards
from PIL import Image

from classifier.config import Config
from classifier.datasets import duplicates
from classifier.datasets.folder import load_folder
from classifier.datasets.folder_layout import list_images
from classifier.datasets.image_cache import open_cache
from classifier.datasets.image_records import FILE

QUICK = settings(deadline=None, max_examples=60, derandomize=True, database=None)
LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array)


def load(**options):
    return load_folder(Config(dataset="photos", **options))


@pytest.fixture
def pictures(folder):
    """A cache, and its images: FILE (N,), sorted by path."""

    def open_pictures():
        photos = folder / "photos"
        files, _, _ = list_images({"all": photos}, photos)
        cache = open_cache(photos, folder / "data", 32, files)
        return files, cache

    return open_pictures


def index_of(images, path):
    return images["path"].tolist().index(path)


# ---- finding them ----


def test_pairs_of_identical_and_near_identical_images(folder, pictures):
    write_images(folder / "photos", {"red": 8, "green": 8})
    red = folder / "photos" / "red"
    for name in ("b.png", "c.png"):
        (red / name).write_bytes((red / "5.png").read_bytes())
    Image.open(red / "6.png").save(red / "6.jpg", quality=80)
    images, cache = pictures()
    pairs, is_complete = duplicates.near_duplicates(images, cache)
    assert is_complete
    assert pairs.dtype == np.int64
    paths = images["path"]
    named = {(paths[first], paths[second], kind) for first, second, kind in pairs.tolist()}
    names = [str(red.relative_to(folder / "photos") / name) for name in ("5.png", "b.png", "c.png")]
    jpeg, png = (str((red / name).relative_to(folder / "photos")) for name in ("6.jpg", "6.png"))
    first, second, third = names
    assert named == {(first, second, 1), (first, third, 1), (jpeg, png, 0)}
    assert (pairs[:, 0] < pairs[:, 1]).all()


def find_groups(images, cache):
    """The files of each group, and whether all were compared."""
    pairs, is_complete = duplicates.near_duplicates(images, cache)
    groups = duplicates.group_images(images["record"]["content_digest"].astype(np.int64), pairs)
    files = {}
    for path, group in zip(images["path"], groups.tolist(), strict=True):
        files.setdefault(group, set()).add(Path(path).stem)
    return list(files.values()), is_complete


@pytest.mark.parametrize("size", [(48, 36), (32, 32), (20, 20)])
def test_plain_images_are_grouped_by_thumbnails(folder, pictures, size):
    """Their hashes say little: none of these used to be compared."""
    write_cards(folder / "photos", num_cards=30, size=size)
    images, cache = pictures()
    ones = np.unpackbits(images["record"]["dhash"], axis=1).sum(axis=1)
    assert (ones <= duplicates.MAX_PLAIN).all()
    groups, is_complete = find_groups(images, cache)
    assert is_complete
    assert len(groups) == 30 and all(len(files) == 5 for files in groups)
    assert all(len({file.split("-")[0] for file in files}) == 1 for files in groups)


def test_cards_stay_on_one_side_of_the_split(folder):
    write_cards(folder / "photos", num_cards=30)
    data = load()
    assert data.report["twins"]
    train, test = data.train_ids.groups, data.test_ids.groups
    assert len(test) and not torch.isin(test, train).any()


def test_plain_images_of_other_colors_or_with_other_drawings_are_not_near_identical(
    folder, pictures
):
    write_images(folder / "photos", {"red": 4, "green": 4})
    for grey in (80, 100, 120):
        Image.new("RGB", (40, 40), (grey, grey, grey)).save(folder / "photos" / f"red/{grey}.png")
    for place in (4, 14, 24):  # a spot of 1 % of the image
        drawing = Image.new("RGB", (40, 40), "white")
        drawing.paste("black", (place, 20, place + 4, 24))
        drawing.save(folder / "photos" / f"green/spot {place}.png")
    images, cache = pictures()
    assert not len(duplicates.near_duplicates(images, cache).pairs)


def search_pixels(pixels):
    """Search among images without structure, uint8 (N, S, S, 3)."""
    images = np.zeros(len(pixels), FILE)
    images["row"] = np.arange(len(pixels))
    return duplicates.search_near_identical(images, np.arange(len(pixels)), pixels)


def test_thousands_of_black_images_are_one_group_in_seconds():
    pixels = np.random.default_rng(0).integers(0, 4, (10_000, 16, 16, 3), dtype=np.uint8)
    begun = time.perf_counter()
    pairs, is_complete = search_pixels(pixels)
    assert time.perf_counter() - begun < 20  # half a second; comparing each with each takes minutes
    assert is_complete and len(pairs) < 2 * duplicates.MAX_PAIRS
    groups = duplicates.group_images(np.arange(10_000), np.pad(pairs, ((0, 0), (0, 1))))
    assert len(np.unique(groups)) == 1


def test_plain_images_that_were_not_compared_are_reported(folder, monkeypatch):
    write_cards(folder / "photos", num_cards=30, shots=1)
    monkeypatch.setattr(duplicates, "MAX_VALUES", 100)
    report = load().report
    assert not report["twins"]
    assert "near-identical ones may be in training as well" in "\n".join(report["words"])


@pytest.mark.parametrize("size", [1, 3, 8, 20, 48])
def test_thumbnails_are_means_of_places(size):
    pixels = np.random.default_rng(0).integers(0, 256, (5, size, size, 3), dtype=np.uint8)
    thumbnails, means = duplicates._thumbnails(pixels, np.array([3, 1]))
    assert thumbnails.shape == (2, 3 * min(8, size) ** 2)
    np.testing.assert_allclose(means, pixels[[3, 1]].mean(axis=(1, 2, 3)), rtol=1e-5)
    end = max(1, size // 8)
    corner = pixels[3, :end, :end].mean(axis=(0, 1))
    np.testing.assert_allclose(thumbnails[0, :3], corner, rtol=1e-5)


def test_similar_hashes_are_not_enough(folder, pictures, monkeypatch):
    """A picture and the same one much darker differ in their pixels: other means find them."""
    write_images(folder / "photos", {"red": 4, "green": 4})
    photos = folder / "photos"
    picture = Image.open(photos / "red" / "0.png")
    picture.point(lambda value: value * 0.8).save(photos / "red" / "dark.png")
    images, cache = pictures()
    bits = np.unpackbits(images["record"]["dhash"], axis=1)
    first = index_of(images, str((photos / "red" / "0.png").relative_to(photos)))
    second = index_of(images, str((photos / "red" / "dark.png").relative_to(photos)))
    assert (bits[first] != bits[second]).sum() <= duplicates.MAX_DIFFERENT_BITS
    with monkeypatch.context() as patch:
        patch.setattr(duplicates, "altered_copies", lambda *given: (np.empty((0, 2), int), True))
        assert not len(duplicates.near_duplicates(images, cache).pairs)
    (cache.path / "near.npz").unlink()
    assert duplicates.near_duplicates(images, cache).pairs.tolist() == [[first, second, 0]]


def test_images_in_several_chunks_are_compared(folder, pictures, monkeypatch):
    write_images(folder / "photos", {"red": 10, "green": 10})
    for path in [*folder.rglob("*.png")]:
        Image.open(path).save(path.with_name(f"z{path.stem}.jpg"), quality=80)
    images, cache = pictures()
    expected = duplicates.near_duplicates(images, cache).pairs
    assert len(expected) == 20
    (cache.path / "near.npz").unlink()
    monkeypatch.setattr(duplicates, "CHUNK", 3)
    assert np.array_equal(duplicates.near_duplicates(images, cache).pairs, expected)


def test_where_there_are_many_pairs_those_that_join_groups_are_enough(
    folder, pictures, monkeypatch
):
    write_images(folder / "photos", {"red": 4, "green": 4})
    for path in [*folder.rglob("*.png")]:
        for quality in (70, 80, 90, 95):
            file = path.with_name(f"{quality}-{path.stem}.jpg")
            Image.open(path).save(file, quality=quality)
    images, cache = pictures()
    every_pair = duplicates.near_duplicates(images, cache).pairs
    assert len(every_pair) == 8 * 10
    (cache.path / "near.npz").unlink()
    monkeypatch.setattr(duplicates, "CHUNK", 2)
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 5)
    pairs, is_complete = duplicates.near_duplicates(images, cache)
    assert is_complete and 8 * 4 <= len(pairs) < 50
    digests = np.arange(len(images))
    expected = duplicates.group_images(digests, every_pair)
    assert duplicates.group_images(digests, pairs).tolist() == expected.tolist()


def test_search_among_too_many_similar_images_ends(folder, pictures, monkeypatch):
    write_images(folder / "photos", {"red": 10, "green": 10})
    for path in [*folder.rglob("*.png")]:
        Image.open(path).save(path.with_name(f"z{path.stem}.jpg"), quality=80)
    images, cache = pictures()
    monkeypatch.setattr(duplicates, "MAX_VALUES", 5 * cache.image_bytes)
    for _ in range(2):  # the second time from the file
        pairs, is_complete = duplicates.near_duplicates(images, cache)
        assert len(pairs) == 5 and not is_complete


def test_many_images_are_only_searched_for_identical_ones(folder, monkeypatch):
    write_images(folder / "photos", {"red": 30, "green": 30})
    red = folder / "photos" / "red"
    (red / "copy.png").write_bytes((red / "0.png").read_bytes())
    Image.open(red / "1.png").save(red / "1.jpg", quality=80)
    monkeypatch.setattr(duplicates, "MAX_COMPARED", 60)
    report = load().report
    assert [kind for *_, kind in report["twins"]] == ["identical"]
    assert "61 are too many" in "\n".join(report["words"])
    assert "near-identical ones may be in training as well" in "\n".join(report["words"])


def test_pairs_are_kept_beside_the_cache(folder, pictures, monkeypatch):
    write_images(folder / "photos", {"red": 8, "green": 8})
    red = folder / "photos" / "red"
    Image.open(red / "6.png").save(red / "6.jpg", quality=80)
    images, cache = pictures()
    expected = duplicates.near_duplicates(images, cache).pairs
    assert len(expected) == 1
    searches = []

    def search(*given):
        searches.append(given)
        return np.empty((0, 2), np.int64), True

    monkeypatch.setattr(duplicates, "search_near_identical", search)
    assert np.array_equal(duplicates.near_duplicates(images, cache).pairs, expected)
    assert not searches
    (red / "7.png").unlink()
    images, cache = pictures()
    duplicates.near_duplicates(images, cache)
    assert len(searches) == 1  # other images
    for content in (b"", b"no zip file", b"PK\x03\x04"):
        (cache.path / "near.npz").write_bytes(content)
        duplicates.near_duplicates(images, cache)
    assert len(searches) == 4


@QUICK
@given(LABELS)
def test_first_occurrence(values):
    expected = [values.tolist().index(value) for value in values.tolist()]
    assert duplicates.first_occurrence(values).tolist() == expected


# ---- groups ----


@QUICK
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40), st.data())
def test_group_is_the_smallest_digest_of_all_that_are_linked(digests, data):
    places = st.integers(0, len(digests) - 1)
    links = data.draw(st.lists(st.tuples(places, places), max_size=20))
    pairs = np.array([(*sorted(pair), 0) for pair in links], np.int64).reshape(-1, 3)
    linked = [{place} for place in range(len(digests))]
    for first, second in links * len(digests):
        linked[first] |= linked[second]
        linked[second] |= linked[first]
    groups = duplicates.group_images(np.array(digests), pairs)
    expected = [min(digests[place] for place in places) for places in linked]
    assert groups.tolist() == expected


def test_near_identical_images_stay_on_one_side_of_the_split(folder):
    write_images(folder / "photos", {"red": 30, "green": 30})
    for path in [*folder.rglob("*.png")]:
        Image.open(path).save(path.with_suffix(".jpg"), quality=80)
    data = load()
    assert len(data.report["twins"]) == 60
    assert 12 < len(data.test.labels) < 36
    parts = [split.images.flatten(1).float() for split in (data.train, data.valid, data.test)]
    for first, second in itertools.combinations(parts, 2):
        mean_differences = torch.cdist(first, second, p=1) / first.shape[1]
        assert mean_differences.min() > duplicates.MAX_DIFFERENCE


def test_images_that_a_third_is_like_are_for_one_purpose(folder, monkeypatch):
    """The first and the last of a chain differ."""
    write_images(folder / "photos", {"red": 30, "green": 30})
    chain = np.array([[0, 9], [8, 9]])
    monkeypatch.setattr(duplicates, "near_identical", lambda *given: (chain, True))
    data = load()
    groups = [set(ids.groups.tolist()) for ids in (data.train_ids, data.valid_ids, data.test_ids)]
    assert sum(map(len, groups)) == 58 == len(set.union(*groups))
