"""Runs with --repeat: several seeds, one after the other."""

import itertools
import math
import signal

import pytest
import torch
from conftest import (
    QUICK,
    beforehand,
    epochs_of,
    only_run,
    report_of,
    rows_of,
    same,
    state_of,
    weights,
)

import image_classification as ic


@pytest.mark.slow
def test_mean_spread_and_the_best_model(inside, folder):
    out, _ = inside(*QUICK, "--repeat", "3")
    run = only_run(folder)
    report = report_of(run)
    seed_runs = [run / f"seed-{seed}" for seed in range(3)]
    seed_reports = [report_of(seed_run) for seed_run in seed_runs]
    accuracies = [each["test_accuracy"] for each in seed_reports]
    scores = torch.tensor(accuracies, dtype=torch.float64)
    mean, std = scores.mean().item(), scores.std().item()
    assert std > 0
    assert report["test_accuracy_mean"] == pytest.approx(mean)
    assert report["test_accuracy_std"] == pytest.approx(std)
    half = 4.302653 * std / 3**0.5  # Student's t, 2 degrees of freedom
    interval = [max(0, mean - half), min(1, mean + half)]
    assert report["test_accuracy_mean_interval"] == pytest.approx(interval)
    assert report["repeats"] == seed_reports
    total = sum(each["seconds"] for each in seed_reports)
    assert report["seconds_total"] == pytest.approx(total)
    # all that a report of one seed has is of the kept one, and so agrees with itself
    kept = report_of(run / report["kept"])
    assert {name: report[name] for name in kept} == kept
    matrix = torch.tensor(report["confusion_matrix"])
    accuracy = float(matrix.trace() / matrix.sum())
    assert report["test_accuracy"] == pytest.approx(accuracy)
    assert report["test_accuracy_interval"][0] < accuracy < report["test_accuracy_interval"][1]

    assert f"Mean test accuracy of 3 seeds: {100 * mean:.2f} %" in out
    assert out.count("Accuracy of the network") == 3
    assert out.count("Accuracy for class 3 ") == 1  # of the kept model
    losses = [min(float(row["valid_loss"]) for row in rows_of(each)) for each in seed_runs]
    best = seed_runs[losses.index(min(losses))]
    assert report["kept"] == best.name
    assert same(weights(folder / "model_cnn_digits.pth"), weights(best / "best.pth"))


@pytest.mark.slow
def test_seed_of_several_learns_what_it_learns_alone(inside, folder):
    briefly = [*QUICK, "--epochs", "1", "--device", "cpu"]
    inside(*briefly, "--repeat", "2", "--seed", "6", "--run-dir", "both")
    inside(*briefly, "--seed", "7", "--run-dir", "alone")
    alone = folder / "alone" / "best.pth"
    assert same(weights(folder / "both" / "seed-7" / "best.pth"), weights(alone))


def accuracy_of_uncertain_views(model, images):
    """With six views of the quarter in which the class is least certain."""
    logits = ic.evaluate(model, *images).logits
    in_views = ic.evaluate(model, *images, tta=6).logits
    by_confidence = logits.softmax(1).amax(1).argsort(descending=True)
    uncertain = by_confidence[math.floor(0.75 * len(logits)) :]
    logits[uncertain] = in_views[uncertain]
    return (logits.argmax(1) == images.labels).float().mean().item()


@pytest.mark.slow
def test_accuracy_with_several_views_is_a_score_of_its_own(folder, capsys):
    data = ic.load_data(ic.Config(dataset="digits", image_size=16))
    data.flip_keeps_label = True
    settings = {"width": 0.25, "epochs": 1, "precision": "fp32", "tta": 6, "repeat": 2}
    report = ic.train(ic.Config(dataset="digits", **settings), data)
    model, _ = ic.load_checkpoint(report.checkpoint)
    plain = ic.evaluate(model, *data.test).accuracy
    with_tta = accuracy_of_uncertain_views(model, data.test)
    repeats = report.results["repeats"]
    kept = repeats[int(report.results["kept"][-1])]
    assert kept["test_accuracy"] == pytest.approx(plain)
    assert kept["test_views_accuracy"] == pytest.approx(with_tta) != plain
    mean = sum(each["test_views_accuracy"] for each in repeats) / 2
    assert report.results["test_views_accuracy_mean"] == pytest.approx(mean)
    assert report.results["test_views_accuracy"] == pytest.approx(with_tta)
    out = capsys.readouterr().out
    assert f"Mean test accuracy of 2 seeds with 6 views: {100 * mean:.2f} %" in out


@pytest.mark.slow
def test_interrupted_seed_goes_on(inside, folder):
    steps = itertools.count(1)

    def interrupt(*_):
        if next(steps) == 10:  # in the second seed: each has 8
            signal.raise_signal(signal.SIGINT)

    with beforehand(ic.Trainer, "train_step", interrupt):
        inside(*QUICK, "--repeat", "3", status=130)
    run = only_run(folder)
    first = weights(run / "seed-0" / "best.pth")
    assert state_of(run / "seed-1")["step"] == 2 and not (run / "seed-2").exists()
    out, _ = inside("--resume", run)
    assert "Mean test accuracy of 3 seeds" in out
    assert [epochs_of(run / f"seed-{seed}") for seed in range(3)] == [[0, 1]] * 3
    assert same(weights(run / "seed-0" / "best.pth"), first)
