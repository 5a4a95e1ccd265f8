"""Balanced and imbalanced choices of images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from classifier.sampling import balanced_indices, imbalanced_indices, repeated_indices

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=300).map(torch.tensor)
QUICK = settings(deadline=None, max_examples=60, derandomize=True, database=None)


def draw(labels, class_balance, epoch):
    return balanced_indices(labels, class_balance, seed=0, epoch=epoch)


@given(LABELS, st.sampled_from(["oversample", "undersample"]), st.integers(0, 100))
@QUICK
def test_balanced_classes_come_equally_often(labels, class_balance, seed):
    indices = draw(labels, class_balance, seed)
    counts = labels.bincount(minlength=7)
    size = counts.max() if class_balance == "oversample" else counts[counts > 0].min()
    expected = [int(size) if count else 0 for count in counts]
    assert labels[indices].bincount(minlength=7).tolist() == expected

    # The images of a class are repeated as evenly as possible.
    times = indices.bincount(minlength=len(labels))
    for label in labels.unique():
        of_class = times[labels == label]
        assert int(of_class.max() - of_class.min()) <= 1


@pytest.mark.parametrize("class_balance", ["oversample", "undersample"])
def test_each_generator_draws_other_images(class_balance):
    labels = torch.tensor([0] * 500 + [1] * 20)
    first = draw(labels, class_balance, 0)
    assert torch.equal(first, draw(labels, class_balance, 0))
    assert not torch.equal(first, draw(labels, class_balance, 1))
    assert first.dtype == torch.int64


def test_drawing_does_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    draw(torch.tensor([0, 0, 1]), "oversample", 0)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(1, 50), st.integers(1, 200), st.integers(0, 100))
@QUICK
def test_repeated_indices_come_equally_often(num_indices, size, seed):
    indices = 3 * torch.arange(num_indices) + 1
    drawn = repeated_indices(indices, size, seed, epoch=0)
    assert len(drawn) == size and drawn.dtype == torch.int64
    times = drawn.bincount(minlength=3 * num_indices)[indices]
    assert times.sum() == size and times.max() - times.min() <= 1


def test_other_epochs_repeat_other_indices():
    drawn = [repeated_indices(torch.arange(60), 100, seed=0, epoch=epoch) for epoch in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0].bincount(), drawn[2].bincount())


@given(LABELS, st.floats(0.01, 1))
@QUICK
def test_imbalanced_classes_shrink_and_none_is_lost(labels, share):
    indices = imbalanced_indices(labels, share)
    assert torch.equal(indices, indices.sort().values.unique())  # ascending, each once
    whole = labels.bincount(minlength=7)
    counts = labels[indices].bincount(minlength=7)
    assert ((counts > 0) == (whole > 0)).all()
    assert (counts <= whole).all()
    kept = counts[whole > 50] / whole[whole > 50]
    assert (kept.diff() <= 0.02).all()  # images are whole


def test_imbalanced_shares_fall_exponentially():
    labels = torch.arange(5).repeat_interleave(1000)
    counts = labels[imbalanced_indices(labels, 0.0625)].bincount()
    assert counts.tolist() == pytest.approx([1000, 500, 250, 125, 63], abs=1)
    assert len(imbalanced_indices(labels, 1.0)) == len(labels)


def test_imbalanced_data_of_a_single_class_stay_whole():
    labels = torch.zeros(5, dtype=torch.int64)
    assert imbalanced_indices(labels, 0.1).tolist() == [0, 1, 2, 3, 4]
