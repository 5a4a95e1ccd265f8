"""Metrics, each against its definition or another implementation."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)

from classifier.metrics import (
    classification_metrics,
    cross_entropy,
    expected_calibration_error,
    fit_temperature,
    minimize,
    predict,
    softmax,
    top_accuracy,
    wilson_interval,
)

CLASSES = ["cat", "dog", "frog", "horse"]


@pytest.fixture
def outputs():
    """Logits, float (500, 4), that are too confident, and labels; no image is of class horse."""
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (500,))
    logits = 4 * torch.randn(500, 4)
    logits[torch.arange(500), labels] += 5
    return logits, labels


def test_metrics_are_those_of_scikit_learn(outputs):
    logits, labels = outputs
    results = classification_metrics(logits, labels, CLASSES, 1.7)
    predictions = logits.argmax(1)
    options = {"labels": range(4), "average": None, "zero_division": 0}
    for name, score in {
        "precision": precision_score,
        "recall": recall_score,
        "f1": f1_score,
    }.items():
        assert list(results[name]) == CLASSES
        expected = list(score(labels, predictions, **options))
        assert list(results[name].values()) == [*expected[:3], None]  # of horse there is no image
    assert results["class_accuracy"] == results["recall"]
    assert results["test_accuracy"] == accuracy_score(labels, predictions)
    expected_loss = log_loss(labels, logits.double().softmax(1), labels=range(4))
    assert results["test_loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert results["temperature"] == 1.7
    of_tested = f1_score(labels, predictions, labels=range(3), average="macro")
    assert results["macro_f1"] == pytest.approx(of_tested)


def test_what_is_not_known_is_none_and_what_is_zero_is_zero():
    """cat: all wrong; dog: never predicted; frog: predicted, but not tested; horse: right."""
    labels = torch.tensor([0, 0, 1, 3])
    logits = torch.eye(4)[[2, 3, 0, 3]]
    results = classification_metrics(logits, labels, CLASSES, None)
    assert results["recall"] == {"cat": 0.0, "dog": 0.0, "frog": None, "horse": 1.0}
    assert results["precision"] == {"cat": 0.0, "dog": None, "frog": None, "horse": 0.5}
    assert results["f1"] == pytest.approx({"cat": 0.0, "dog": 0.0, "frog": None, "horse": 2 / 3})
    assert results["macro_f1"] == pytest.approx((0 + 0 + 2 / 3) / 3)
    assert json.loads(json.dumps(results))["f1"]["frog"] is None


def test_confusion_matrix_has_a_row_for_each_true_class(outputs):
    logits, labels = outputs
    matrix = classification_metrics(logits, labels, CLASSES, None)["confusion_matrix"]
    counts = torch.zeros(4, 4, dtype=torch.int64)
    for label, prediction in zip(labels, logits.argmax(1), strict=True):
        counts[label, prediction] += 1
    assert matrix == counts.tolist()
    assert matrix[3] == [0, 0, 0, 0]


def test_interval_is_wilsons(outputs):
    results = classification_metrics(*outputs, CLASSES, None)
    share, z2 = results["test_accuracy"], 1.959964**2 / 500  # Wilson (1927)
    middle = share + z2 / 2
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    expected = [(middle - half) / (1 + z2), (middle + half) / (1 + z2)]
    assert results["test_accuracy_interval"] == pytest.approx(expected)


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (1, 3), (9031, 10_000)])
def test_interval_is_that_of_scipy(hits, count):
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson_interval(hits, count) == pytest.approx(tuple(expected), abs=1e-12)


def test_results_are_plain_numbers_in_the_order_of_the_report(outputs):
    results = classification_metrics(*outputs, CLASSES, None)
    assert list(results) == [
        "test_accuracy",
        "test_accuracy_interval",
        "top5_accuracy",
        "test_loss",
        "class_accuracy",
        "precision",
        "recall",
        "f1",
        "macro_f1",
        "confusion_matrix",
        "temperature",
        "calibration_error",
        "calibration_error_before",
    ]
    for value in (results["test_accuracy"], results["precision"]["cat"], results["macro_f1"]):
        assert type(value) is float
    assert type(results["confusion_matrix"][0][0]) is int
    assert results["calibration_error"] == results["calibration_error_before"]


def slow_calibration_error(logits, labels):
    """The definition, image by image: Guo et al., 2017."""
    gaps = [0.0] * 15
    for confidence, is_hit in zip(
        logits.softmax(1).amax(1).tolist(), (logits.argmax(1) == labels).tolist(), strict=True
    ):
        gaps[min(14, math.floor(15 * confidence))] += confidence - is_hit
    return sum(abs(gap) for gap in gaps) / len(labels)


def test_calibration_error_is_as_defined(outputs):
    logits, labels = outputs
    error = expected_calibration_error(logits, labels)
    assert error == pytest.approx(slow_calibration_error(logits, labels), abs=1e-5)
    assert error > 0.02


@pytest.mark.parametrize(("label", "expected"), [(0, 0.0), (1, 1.0)])
def test_calibration_error_of_full_confidence(label, expected):
    """A confidence of exactly 1 belongs to the last bin."""
    logits = torch.tensor([[1000.0, 0.0]]).repeat(10, 1)
    labels = torch.full((10,), label)
    assert expected_calibration_error(logits, labels) == expected


def test_temperature_makes_the_loss_smallest(outputs):
    logits, labels = outputs
    temperature = fit_temperature(logits, labels)

    def loss(temperature):
        scaled = logits / temperature
        own = F.cross_entropy(scaled, labels, reduction="sum").item()
        return own - scaled.log_softmax(1).mean().item()  # one more image, of any class

    assert temperature > 1
    assert loss(temperature) < min(loss(1.05 * temperature), loss(temperature / 1.05), loss(1.0))
    before = expected_calibration_error(logits, labels)
    after = expected_calibration_error(logits, labels, temperature)
    assert after == pytest.approx(slow_calibration_error(logits / temperature, labels), abs=1e-5)
    assert after < before
    results = classification_metrics(logits, labels, CLASSES, temperature)
    assert results["calibration_error"] == after
    assert results["calibration_error_before"] == before


def test_temperature_stays_finite_where_all_predictions_are_right():
    labels = torch.arange(4).repeat(10)
    temperature = fit_temperature(F.one_hot(labels).float(), labels)
    confidence, prediction = predict(F.one_hot(labels).float(), temperature)
    assert prediction.tolist() == labels.tolist()
    assert confidence.max() < 1 - 1 / 100  # 40 images cannot show more


def test_prediction_does_not_depend_on_the_temperature(outputs):
    logits, _ = outputs
    confidence, prediction = predict(logits, 2.5)
    assert prediction.tolist() == logits.argmax(1).tolist()
    expected = (logits / 2.5).softmax(1)
    assert confidence == pytest.approx(expected.amax(1).numpy(), abs=1e-6)
    assert softmax(logits, 2.5) == pytest.approx(expected.numpy(), abs=1e-6)
    assert predict(logits)[0].tolist() == predict(logits, 1.0)[0].tolist()


def test_huge_logits_are_no_overflow():
    confidence, prediction = predict([[1e4, 0.0], [-1e4, 1e4]])
    assert (confidence.tolist(), prediction.tolist()) == ([1, 1], [0, 1])
    assert cross_entropy([[0.0, 1e4]], [0]) == 1e4


@pytest.mark.parametrize(("num_classes", "is_given"), [(20, False), (21, True)])
def test_top_5_accuracy_is_that_of_scikit_learn(num_classes, is_given):
    torch.manual_seed(0)
    logits, labels = torch.randn(300, num_classes), torch.arange(300) % num_classes
    names = [str(label) for label in range(num_classes)]
    expected = top_k_accuracy_score(labels, logits, k=5)
    assert 0.1 < expected < 0.5
    assert top_accuracy(logits, labels) == pytest.approx(expected)
    results = classification_metrics(logits, labels, names, None)
    assert results["top5_accuracy"] == (pytest.approx(expected) if is_given else None)


def test_network_that_sees_no_difference_is_no_good_at_top_5():
    labels = torch.arange(30)
    assert top_accuracy(torch.zeros(30, 30), labels) == pytest.approx(5 / 30)


@pytest.mark.parametrize("lowest_at", [0.01, 0.02, 0.7, 3.0, 99.0, 100.0])
def test_minimum_is_where_scipy_finds_it(lowest_at):
    def loss(x):
        return (math.log(x) - math.log(lowest_at)) ** 2

    expected = minimize_scalar(loss, bounds=(0.01, 100), options={"xatol": 1e-8}).x
    assert minimize(loss, 0.01, 100) == pytest.approx(expected, rel=1e-4)
    assert minimize(loss, 0.01, 100) == pytest.approx(lowest_at, rel=1e-5)
