"""The learning-rate schedules: their values, and that they need nothing but the run's history."""

import math

import pytest

from classifier.schedules import lr_factor

EXPECTED = {  # at the start, after a tenth, at half and at the end of a run
    "cosine": [1.0, 0.9755, 0.5, 0.000247],
    "step": [1.0, 1.0, 0.1, 0.01],
    "none": [1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_values(name):
    factors = [lr_factor(name, fraction, []) for fraction in (0, 0.1, 0.5, 0.99)]
    assert factors == pytest.approx(EXPECTED[name], rel=1e-2)


def test_step_falls_at_half_and_at_three_quarters():
    just_before_half = math.nextafter(0.5, 0)
    just_before_three_quarters = math.nextafter(0.75, 0)
    assert lr_factor("step", just_before_half, []) == 1.0
    assert lr_factor("step", just_before_three_quarters, []) == 0.1
    assert lr_factor("step", 0.75, []) == 0.1**2


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], 1),
        ([3, 2, 2.5, 2.1], 1),
        ([3, 2, 2.5, 2.1, 2.0], 0.1),  # three epochs that are no better
        ([3, 2, 2.5, 2.1, 1.9], 1),
        ([3, 2, 2, 2, 2, 1, 1, 1, 1], 0.01),
        ([math.nan] * 4, 0.1),
    ],
)
def test_plateau_falls_after_three_epochs_without_a_lower_loss(losses, expected):
    for fraction in (0.1, 0.9):
        assert lr_factor("plateau", fraction, losses) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "step", "none"])
def test_other_schedules_ignore_the_losses(name):
    assert lr_factor(name, 0.6, [1, 2, 3, 4, 5]) == lr_factor(name, 0.6, [])


@pytest.mark.parametrize("name", ["cosine", "step", "plateau", "none"])
def test_factor_is_a_share_of_the_peak(name):
    losses = [2.0] * 9
    factors = [lr_factor(name, i / 100, losses) for i in range(100)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors == sorted(factors, reverse=True)


def test_unknown_name():
    with pytest.raises(ValueError, match="warmup"):
        lr_factor("warmup", 0.0, [])
