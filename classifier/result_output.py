"""The results of a test as they are printed, after training and by `inference.py --evaluate`.

Imports no torch: an ONNX file is tested without it.
"""

from typing import Any

from classifier.text import percent

FEW_TEST_IMAGES = 30  # of a class: with fewer, its figures say little


def print_accuracy(results: dict[str, Any], images: str, note: str = "") -> None:
    """Print the accuracy and its 95 % interval; for many classes the top-5 accuracy as well.

    Args:
        results: see `metrics.classification_metrics`.
        images: what was tested, in words.
        note: what else there is to say, after the interval.
    """
    matrix = results["confusion_matrix"]
    count = sum(sum(row) for row in matrix)
    hits = sum(matrix[i][i] for i in range(len(matrix)))
    low, high = results["test_accuracy_interval"]
    details = f"{100 * hits / count:.2f} %, 95 % interval {100 * low:.1f} to {percent(high)}{note}"
    # rounded down: 100 % means that all are right
    whole_percent = 100 * hits // count
    print(f"Accuracy of the network on the {count} {images}: {whole_percent} % ({details})")
    if results["top5_accuracy"] is not None:
        print(f"Top-5 accuracy: {100 * results['top5_accuracy']:.2f} %")


def print_classes(results: dict[str, Any]) -> None:
    """Print accuracy, precision and F1 of each class, their mean F1, calibration, and unknowns.

    results: see `metrics.classification_metrics` and `rejection.rejection_metrics`.
    """
    recall, f1 = results["recall"], results["f1"]
    test_images = {}  # of each class
    for name, row in zip(recall, results["confusion_matrix"], strict=True):
        test_images[name] = sum(row)
    name_width = max(5, min(20, max(len(name) for name in recall)))
    for name in recall:
        accuracy, details = "-", "not tested"
        if test_images[name]:
            accuracy = percent(recall[name])
            precision = results["precision"][name]
            details = "never predicted" if precision is None else f"precision {percent(precision)}"
            details += f", F1 {percent(f1[name])}"
        if 0 < test_images[name] < FEW_TEST_IMAGES:
            details += f", {test_images[name]} tested"
        print(f"Accuracy for class {name:{name_width}s} is: {accuracy}  ({details})")

    tested_classes = [name for name in recall if test_images[name]]
    tested_classes.sort(key=lambda name: (recall[name], f1[name]))
    print(f"Best class: {tested_classes[-1]}; worst class: {tested_classes[0]}")
    averaged = "classes"
    if len(tested_classes) < len(recall):
        averaged = f"{len(tested_classes)} of {len(recall)} classes that were tested"
    print(f"Macro-F1: {percent(results['macro_f1'])} (mean over the {averaged})")
    details = "not calibrated: no validation images"
    if results["temperature"] is not None:
        details = f"{percent(results['calibration_error_before'])} before temperature scaling"
    print(f"Expected calibration error: {percent(results['calibration_error'])} ({details})")

    unknown_share = results.get("unknown_share")
    accepted_accuracy = results.get("accepted_accuracy")
    if unknown_share is not None:
        others = "-" if accepted_accuracy is None else percent(accepted_accuracy)
        called = f"Called unknown: {percent(unknown_share)} of these images"
        print(f"{called}; accuracy on the others: {others}")
