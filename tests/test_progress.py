"""Where a run is: its best epoch, and whether it still gets better."""

import pytest

from classifier.progress import Progress


def make_progress(losses, scales=None, name="valid_loss", train_shares=None):
    """A run with these losses.

    scales: of the images in each epoch, 1 by default. train_shares: of the images that it takes.
    """
    progress = Progress(total_steps=10 * len(losses), steps_per_epoch=10)
    for epoch, loss in enumerate(losses):
        row = {"epoch": epoch, "train_loss": 9.0, "valid_loss": None, name: loss}
        row["image_scale"] = 1.0 if scales is None else scales[epoch]
        row["train_share"] = 1.0 if train_shares is None else train_shares[epoch]
        progress.history.append(row)
    return progress


def test_best_epoch_has_the_lowest_validation_loss():
    assert make_progress([2.0, 1.0, 1.5]).best_epoch() == 1
    assert make_progress([2.0, 1.0, 1.0]).best_epoch() == 1  # the first of equals


def test_without_validation_images_the_latest_epoch_is_the_best():
    assert make_progress([1.0, 2.0, 1.5], name="train_loss").best_epoch() == 2


def test_epochs_on_smaller_images_are_never_the_best():
    scales = [0.5, 0.5, 0.75, 1.0, 1.0]
    assert make_progress([0.1, 0.2, 0.3, 2.0, 3.0], scales).best_epoch() == 3
    assert make_progress([0.1, 0.2, 0.3], scales).best_epoch() == 2  # no other yet: the latest


def test_run_that_goes_on_returns_to_smaller_images():
    scales = [0.5, 1.0, 1.0, 0.75, 1.0]
    progress = make_progress([0.1, 3.0, 2.0, 0.1, 2.5], scales)
    assert progress.best_epoch() == 2
    assert progress.losses() == [3.0, 2.0, 2.5]
    assert progress.stalled(1) and not progress.stalled(2)


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([1.0, 2.0, 3.0], 2, True),
        ([1.0, 2.0, 3.0], 3, False),
        ([3.0, 2.0, 1.0], 1, False),
        ([1.0, 2.0, 3.0], 0, False),
        ([], 1, False),
    ],
)
def test_stalled(losses, patience, expected):
    assert make_progress(losses).stalled(patience) is expected


def test_epochs_on_smaller_images_do_not_count_as_stalled():
    scales = [0.5] * 5 + [1.0] * 2
    progress = make_progress([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], scales)
    assert not progress.stalled(2)
    assert progress.stalled(1)
    assert not make_progress([1.0] * 5, scales).stalled(1)


def test_losses_without_validation_images_are_those_of_training():
    assert make_progress([3.0, 2.0], [0.5, 1.0], "train_loss").losses() == [2.0]


def test_training_losses_of_other_images_do_not_count():
    """Those of the hardest images are larger, though the network has become better."""
    shares = [1.0, 1.0, 0.65, 0.65]
    losses = [2.0, 1.0, 1.6, 1.5]
    progress = make_progress(losses, name="train_loss", train_shares=shares)
    assert progress.losses() == [1.6, 1.5] and not progress.stalled(1)
    assert make_progress(losses, train_shares=shares).losses() == losses  # of validation images


def test_scale_of_the_latest_step():
    progress = Progress(total_steps=4, steps_per_epoch=2)
    progress.advance(0.5)
    assert (progress.step, progress.image_scale, progress.cost) == (1, 0.5, 0.38)
    progress.advance(1.0)
    assert (progress.step, progress.image_scale, progress.cost) == (2, 1.0, 1.38)
