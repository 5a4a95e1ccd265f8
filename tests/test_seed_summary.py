"""--repeat: mean, spread, and which model is kept."""

import json
import math
import signal
import time
from pathlib import Path

import pytest

from classifier.config import Config
from classifier.distributed import Group
from classifier.errors import Stopped
from classifier.reports import Report
from classifier.runs import Run, StopRequest
from classifier.seed_summary import summarize, train_seeds


def make_report(seed, accuracy, losses, **results):
    best_epoch = losses.index(min(losses)) if losses[0] is not None else len(losses) - 1
    results = {
        "test_accuracy": accuracy,
        "test_accuracy_interval": [accuracy - 0.02, accuracy + 0.02],
        "seconds": 2.5,
        "f1": seed,
        "best_epoch": best_epoch,
        **results,
    }
    history = [{"valid_loss": loss, "image_scale": 1.0} for loss in losses]
    return Report(results, history, Path("run", f"seed-{seed}"), Path(f"seed-{seed}", "best.pth"))


def test_summary_has_mean_spread_and_the_model_of_the_lowest_loss(capsys):
    reports = [
        make_report(0, 0.91, [0.9, 0.5]),
        make_report(1, 0.93, [0.4, 0.8]),
        make_report(2, 0.92, [0.7, 0.6]),
    ]
    report = summarize(reports, Path("run"))
    half_width = 4.302653 * 0.01 / math.sqrt(3)  # Student's t, 2 degrees of freedom
    interval = [0.92 - half_width, 0.92 + half_width]
    assert report.results["test_accuracy_mean"] == pytest.approx(0.92)
    assert report.results["test_accuracy_std"] == pytest.approx(0.01)
    assert report.results["test_accuracy_mean_interval"] == pytest.approx(interval)
    assert report.results["seconds_total"] == 7.5
    assert report.results["kept"] == "seed-1"
    kept = reports[1].results
    assert {name: report.results[name] for name in kept} == kept  # with its own interval
    assert report.results["repeats"] == [each.results for each in reports]
    assert report.run == Path("run") and report.checkpoint == reports[1].checkpoint
    assert report.history == reports[1].history
    assert reports[1].results["test_accuracy"] == 0.93  # the seed's report is as it was
    out = capsys.readouterr().out
    assert out.startswith(
        "\nMean test accuracy of 3 seeds: 92.00 %, standard deviation 1.00, 95 % interval 89.52 to "
        "94.48 %\n"
    )
    assert "seed-1" in out


def test_accuracy_with_several_views_has_a_mean_of_its_own(capsys):
    views = {"test_views": 6}
    reports = [
        make_report(0, 0.8, [1.0], test_views_accuracy=0.86, **views),
        make_report(1, 0.8, [2.0], test_views_accuracy=0.9, **views),
    ]
    results = summarize(reports, Path("run")).results
    assert results["test_accuracy_std"] == 0
    assert results["test_views_accuracy"] == 0.86  # of the kept seed
    assert results["test_views_accuracy_mean"] == pytest.approx(0.88)
    assert results["test_views_accuracy_std"] == pytest.approx(0.04 / math.sqrt(2))
    assert results["test_views_accuracy_mean_interval"][1] == 1.0  # no accuracy is higher
    assert "Mean test accuracy of 2 seeds with 6 views: 88.00 %, " in capsys.readouterr().out


def test_the_loss_that_counts_is_that_of_the_weights_that_were_kept():
    """An epoch may have a lower loss and not be the best one: on smaller images, for example."""
    first = make_report(0, 0.9, [0.1, 0.5], best_epoch=1)
    second = make_report(1, 0.9, [0.9, 0.4])
    assert summarize([first, second], Path("run")).results["kept"] == "seed-1"


def test_loss_of_zero_is_the_lowest():
    reports = [make_report(0, 0.9, [0.1]), make_report(1, 0.9, [0.0])]
    assert summarize(reports, Path("run")).results["kept"] == "seed-1"


def test_first_seed_is_kept_without_validation_images():
    reports = [make_report(seed, 0.8, [None, None]) for seed in (4, 5)]
    assert summarize(reports, Path("run")).results["kept"] == "seed-4"


# ---- training with each seed ----


@pytest.fixture
def train_each(folder):
    """A function that trains with the seeds of a Config and returns the report and the calls."""
    (folder / "run").mkdir()

    def run_all(config, stop=None, minutes_ago=0.0):
        calls = []
        started = time.perf_counter() - 60 * minutes_ago

        def train_seed(config, run, deadline):
            calls.append((config, run.path, deadline - time.perf_counter()))
            return make_report(config.seed, 0.9, [1.0 / (1 + config.seed)])

        stop = stop or StopRequest()
        run = Run(folder / "run")
        try:
            return train_seeds(train_seed, config, run, started, Group(), stop), calls
        except Stopped as stopped:
            return stopped, calls

    return run_all


def test_each_seed_is_trained_in_its_folder_and_reports(train_each, folder):
    report, calls = train_each(Config(seed=3, repeat=2))
    configs = [config for config, _, _ in calls]
    assert configs == [Config(seed=3), Config(seed=4)]
    assert [path for _, path, _ in calls] == [folder / "run" / f"seed-{seed}" for seed in (3, 4)]
    assert report.results["kept"] == "seed-4" and report.run == folder / "run"
    for seed in (3, 4):
        results = json.loads((folder / "run" / f"seed-{seed}" / "report.json").read_text())
        assert results["f1"] == seed
    assert not (folder / "run" / "report.json").exists()


def test_single_seed_is_trained_in_the_run_itself(train_each, folder):
    report, calls = train_each(Config(seed=3))
    assert [(config, path) for config, path, _ in calls] == [(Config(seed=3), folder / "run")]
    assert "kept" not in report.results
    assert not list((folder / "run").iterdir())


def test_seeds_share_the_minutes_that_are_left(train_each):
    _, calls = train_each(Config(repeat=3, minutes=10.0), minutes_ago=4.0)
    # each leaves all its time to the others
    assert [seconds for _, _, seconds in calls] == pytest.approx([120, 180, 360], abs=5)


def test_stop_between_seeds(train_each):
    stop = StopRequest()
    stop.signals.append(signal.SIGINT)
    stopped, calls = train_each(Config(repeat=2), stop)
    assert len(calls) == 1 and stopped.signum == signal.SIGINT
    report, calls = train_each(Config(repeat=1), stop)  # all is done: it is reported
    assert len(calls) == 1 and report.results["test_accuracy"] == 0.9
