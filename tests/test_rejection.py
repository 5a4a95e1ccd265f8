"""Which images are refused: shares of the validation images, and what a test says of it."""

import numpy as np
import pytest

from classifier import rejection

SCORES = np.random.default_rng(0).normal(size=1000)
QUANTILES = rejection.quantiles_of(SCORES)


@pytest.mark.parametrize("reject", [0.01, 0.05, 0.3, 0.95])
def test_so_many_validation_images_are_refused(reject):
    refused = rejection.is_unknown(rejection.unlikeness(SCORES, QUANTILES), reject)
    assert refused.mean() == pytest.approx(reject, abs=0.002)
    assert SCORES[refused].min() > SCORES[~refused].max()
    limit = rejection.threshold(QUANTILES, reject)
    assert ((limit < SCORES) == refused).mean() > 0.999


def test_nothing_is_refused_where_that_is_off():
    assert not rejection.is_unknown([0.0, 0.5, 1.0], 0).any()
    assert rejection.is_unknown([0.9, 0.95, 1.0], 0.05).tolist() == [False, False, True]


def test_unlikeness_is_a_share_of_the_validation_images():
    found = rejection.unlikeness([-100, np.median(SCORES), 100, np.nan], QUANTILES)
    assert found == pytest.approx([0, 0.5, 1, 1])


@pytest.mark.parametrize(
    "content", [None, 3, [], [1.0], ["a", "b"], [True, False], [1.0, 0.0], [0.0, float("nan")]]
)
def test_what_are_no_quantiles_is_refused(content):
    with pytest.raises(ValueError):
        rejection.read_quantiles(content)


def test_quantiles_survive_their_file():
    assert rejection.read_quantiles(QUANTILES) == QUANTILES
    assert all(type(value) is float for value in QUANTILES)


def test_share_refused_and_accuracy_on_the_others():
    logits = np.eye(2)[[0, 0, 1, 1]]
    labels = np.array([0, 1, 1, 0])
    results = rejection.rejection_metrics(logits, labels, [0.1, 0.99, 0.2, 0.3], 0.05)
    assert results == {"unknown_share": 0.25, "accepted_accuracy": pytest.approx(2 / 3)}
    nothing_left = rejection.rejection_metrics(logits, labels, [1.0] * 4, 0.05)
    assert nothing_left == {"unknown_share": 1.0, "accepted_accuracy": None}
    for unlikeness, reject in ((None, 0.05), ([0.1] * 4, 0)):
        results = rejection.rejection_metrics(logits, labels, unlikeness, reject)
        assert results == {"unknown_share": None, "accepted_accuracy": None}
