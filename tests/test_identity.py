"""Digests that tell which image is which."""

import re
from dataclasses import replace

import pytest
from conftest import load_photos

import image_classification as ic
from classifier.datasets import identity
from classifier.datasets.decode import hash64


def test_test_images_of_a_folder_are_named_by_their_files(photos):
    data = load_photos()
    names = identity.name_test_images(data)
    digests = identity.digest_test_images(data)
    assert len(names) == len(digests) == len(data.test.labels)
    for name, digest, label in zip(names, digests, data.test.labels, strict=True):
        content = (photos / name).read_bytes()
        assert name.split("/")[0] == data.classes[label]
        assert digest == f"{hash64(content):016x}"


def test_digests_do_not_depend_on_the_image_size_or_on_names(photos, folder):
    digests = identity.digest_test_images(load_photos())
    assert identity.digest_test_images(load_photos(image_size=16)) == digests
    photos.rename(folder / "renamed")
    data = ic.load_data(ic.Config(dataset="renamed"))
    assert identity.digest_test_images(data) == digests


def test_digests_of_arrays_are_of_the_pixels_before_they_are_resized():
    data = ic.load_data(ic.Config(dataset="digits"))
    digests = identity.digest_test_images(data)
    pixels = [image.numpy().tobytes() for image in data.test.images]
    assert digests == [f"{hash64(each):016x}" for each in pixels]
    assert identity.name_test_images(data) == [str(i) for i in range(len(digests))]
    smaller = ic.load_data(ic.Config(dataset="digits", image_size=16))
    assert smaller.test.images.shape[-1] == 16
    assert identity.digest_test_images(smaller) == digests


@pytest.mark.parametrize("dataset", ["digits", "photos"])
def test_trial_run_has_the_first_of_them(photos, dataset):
    data = ic.load_data(ic.Config(dataset=dataset, image_size=16))
    first = data.first(5)
    assert identity.digest_test_images(first) == identity.digest_test_images(data)[:5]
    assert identity.name_test_images(first) == identity.name_test_images(data)[:5]
    assert first.test.images.equal(data.test.images[:5])


def test_digest_of_all_does_not_depend_on_the_order():
    together = identity.digest_all(["a", "b", "b"], ["cat", "dog", "dog"])
    assert identity.digest_all(["b", "a", "b"], ["dog", "cat", "dog"]) == together
    assert identity.digest_all(["a", "b"], ["cat", "dog"]) != together
    assert identity.digest_all(["a", "b", "b"], ["cat", "dog", "cat"]) != together


def data_digest(data):
    labels = [data.classes[label] for label in data.test.labels.tolist()]
    return identity.digest_data(
        data, identity.digest_all(identity.digest_test_images(data), labels)
    )


def test_data_digest_of_a_folder_is_of_images_labels_and_split(photos, folder):
    digest = data_digest(load_photos())
    assert re.fullmatch("[0-9a-f]{16}", digest)
    assert data_digest(load_photos(image_size=16, seed=3)) == digest
    (photos / "red" / "0.png").rename(photos / "red" / "renamed.png")
    photos.rename(folder / "moved")
    (folder / "moved").rename(photos)
    assert data_digest(load_photos()) == digest
    others = {data_digest(load_photos(val_fraction=0.3)), data_digest(load_photos(subset=50))}
    (photos / "red").rename(photos / "pink")
    others.add(data_digest(load_photos()))
    (photos / "pink").rename(photos / "red")
    (photos / "blue" / "1.png").rename(photos / "red" / "blue.png")
    others.add(data_digest(load_photos()))
    (photos / "red" / "blue.png").unlink()
    others.add(data_digest(load_photos()))
    assert len(others | {digest}) == 6


def test_data_digest_of_arrays():
    digits = ic.load_data(ic.Config(dataset="digits"))
    digest = data_digest(digits)
    assert data_digest(ic.load_data(ic.Config(dataset="digits", seed=7))) == digest
    other_names = replace(digits, classes=list("abcdefghij"))
    fewer = ic.load_data(ic.Config(dataset="digits", subset=100))
    other_split = ic.load_data(ic.Config(dataset="digits", val_fraction=0.2))
    more_names = replace(digits, classes=[*digits.classes, "more"])
    different = (digits, other_names, more_names, fewer, other_split)
    assert len({data_digest(each) for each in different}) == len(different)
