"""The report on a folder of images: data_report.json, and the lines of it that are printed."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from classifier.datasets import duplicates
from classifier.datasets.duplicates import Duplicates
from classifier.datasets.fitting import squareness
from classifier.datasets.image_cache import DecodedCache
from classifier.text import pluralize

FEW_IMAGES = 10  # a class with fewer training images is named
# What follows for images that are split off where near-identical ones are not all known.
NOT_KEPT_TOGETHER = [
    "    near-identical ones may be in training as well as in validation or test, which then look",
    "    better than they are",
]
MUCH_CUT_OFF = 0.25  # share of an image's area: all that a photograph of 4:3 loses
LITTLE_CUT_OFF = 0.005  # on average: less is not worth a line
LARGE_RATIO = 5  # of the largest to the smallest class: the report then advises to balance them


def build_report(
    folder: Path,
    classes: list[str],
    cache: DecodedCache,
    images: np.ndarray,
    used: np.ndarray,
    twins: Duplicates,
    left_out: list[str],
) -> dict[str, Any]:
    """Describe the images of a folder and point out what is wrong with them.

    Args:
        folder: the folder of the data set.
        classes: names of the classes.
        cache: the decoded images, which also knows the files that could not be decoded.
        images: FILE (N,), all that could be decoded.
        used: int64 (M,), the indices of those that are used.
        twins: the images that are identical or nearly so.
        left_out: the files that are no images.

    Returns the content of data_report.json. Its "words" are the lines to print.
    """
    splits = list(dict.fromkeys(images["split"].tolist()))  # in order: the first is trained on
    counts = {}
    for split in splits:
        counts[split] = _count_per_class(images[images["split"] == split], classes)
    used_images = images[used]
    training = _count_per_class(used_images[used_images["split"] == splits[0]], classes)
    small_classes = {name: count for name, count in training.items() if count < FEW_IMAGES}
    pairs = twins.pairs
    unreadable = cache.unreadable
    cut_off = _measure_cut_off(images) if cache.fit == "crop" else None
    paired_files = _name_pairs(folder, images, pairs)
    words = [
        f"Data report of {folder}: {len(images)} images in {len(classes)} classes",
        *_describe_counts(counts),
        *_describe_sizes(images, cache.size),
        *_describe_cut_off(cut_off, len(images)),
        *_describe_small_classes(small_classes, has_test="test" in counts),
        *_describe_imbalance(training),
        *_describe_unreadable(folder, unreadable),
        *_describe_duplicates(images, twins, used_once="all" in counts),
        *_warn_of_leaks(splits, images, pairs, paired_files),
        *_describe_two_labels(images, pairs, paired_files),
    ]
    return {
        "folder": str(folder),
        "image_size": cache.size,
        "fit": cache.fit,
        "cut_off": cut_off,
        "images_per_class": counts,
        "words": words,
        "sizes": _most_common_sizes(images),
        "unreadable": {str(folder / path): reason for path, reason in unreadable.items()},
        "classes_with_few_images": small_classes,
        "twins": paired_files,
        "left_out": left_out,
    }


def _count_per_class(images: np.ndarray, classes: list[str]) -> dict[str, int]:
    counts = np.bincount(images["label"], minlength=len(classes))
    return dict(zip(classes, counts.tolist(), strict=True))


def _name_pairs(folder: Path, images: np.ndarray, pairs: np.ndarray) -> list[list[str]]:
    """For each pair its two files and "identical" or "near-identical"."""
    named = []
    for first, second, is_identical in pairs.tolist():
        first_path = str(folder / images["path"][first])
        second_path = str(folder / images["path"][second])
        kind = "identical" if is_identical else "near-identical"
        named.append([first_path, second_path, kind])
    return named


def _most_common_sizes(images: np.ndarray) -> list[list[Any]]:
    """The 20 most common sizes, as "640x480", and how many images have them."""
    sizes = images["record"][["width", "height"]].tolist()
    rows = []
    for (width, height), count in Counter(sizes).most_common(20):
        rows.append([f"{width}x{height}", count])
    return rows


def _measure_cut_off(images: np.ndarray) -> dict[str, Any]:
    """How much of their area --fit crop cuts off the images.

    "mean" is in [0, 1], "images" the number of those that lose more than MUCH_CUT_OFF.
    """
    lost = 1 - squareness(images["record"]["width"], images["record"]["height"])
    return {"mean": float(lost.mean()), "images": int((lost > MUCH_CUT_OFF).sum())}


# ---- the lines ----


def _describe_counts(counts: dict[str, dict[str, int]]) -> list[str]:
    words = []
    for split, per_class in counts.items():
        total = pluralize(sum(per_class.values()), "image")
        listed = ", ".join(f"{name} {count}" for name, count in per_class.items())
        words.append(f"  {split}: {total} ({listed})")
    return words


def _describe_sizes(images: np.ndarray, size: int) -> list[str]:
    widths = images["record"]["width"]
    heights = images["record"]["height"]
    sides = np.sort(np.minimum(widths, heights))
    shortest = sides[0]
    median = sides[len(sides) // 2]
    longest = sides[-1]
    if shortest < longest:
        spread = f"from {shortest} to {longest} pixels, half of them up to {median}"
    else:
        spread = f"of {shortest} pixels"
    words = [f"  shorter sides {spread}"]
    num_small = int((sides < size / 2).sum())
    if num_small:
        verb = "is" if num_small == 1 else "are"
        smaller = f"less than half as large as {size} pixels"
        words.append(f"  {pluralize(num_small, 'image')} {verb} {smaller}")
    return words


def _describe_cut_off(cut_off: dict[str, Any] | None, num_images: int) -> list[str]:
    """cut_off: see _measure_cut_off; None where nothing is cut off."""
    if cut_off is None or cut_off["mean"] < LITTLE_CUT_OFF:
        return []
    words = [
        f"  the middle square leaves out {100 * cut_off['mean']:.0f} % of an image on average, and "
        f"more than {100 * MUCH_CUT_OFF:.0f} % of {cut_off['images']} of the {num_images} images"
    ]
    if cut_off["mean"] > MUCH_CUT_OFF:
        words.append(
            "    if what matters may stand at the side, try --fit pad or --fit stretch, which use "
            "the whole image"
        )
    return words


def _describe_small_classes(small_classes: dict[str, int], has_test: bool) -> list[str]:
    if not small_classes:
        return []
    listed = ", ".join(f"{name} ({count})" for name, count in small_classes.items())
    words = [f"  fewer than {FEW_IMAGES} images: {listed}"]
    if not has_test:
        words.append(
            "    few or none of these are set aside for validation and testing, which then say "
            "little about these classes"
        )
    return words


def _describe_imbalance(training: dict[str, int]) -> list[str]:
    """training: number of training images of each class."""
    if max(training.values()) <= LARGE_RATIO * min(training.values()):
        return []
    advice = "look at each class's accuracy, and try --class-balance weights"
    return [f"  the classes differ much in size: {advice}"]


def _describe_unreadable(folder: Path, unreadable: dict[str, str]) -> list[str]:
    if not unreadable:
        return []
    examples = [f"{folder / path} ({reason})" for path, reason in unreadable.items()][:5]
    files = pluralize(len(unreadable), "file")
    return [f"  left out, because it cannot be read: {files}: {'; '.join(examples)}"]


def _describe_duplicates(images: np.ndarray, twins: Duplicates, used_once: bool) -> list[str]:
    num_identical = int(twins.pairs[:, 2].sum())
    num_near_identical = len(twins.pairs) - num_identical
    num_different = len(images) - num_identical
    identical = pluralize(num_identical, "pair")
    once = "; identical ones of a class are used once" if used_once else ""
    if num_different > duplicates.MAX_COMPARED:
        return [
            f"  {identical} of identical images{once}. {num_different} are too many to look for "
            "near-identical ones:",
            *NOT_KEPT_TOGETHER,
        ]
    words = []
    if len(twins.pairs):
        is_all = twins.is_complete and num_near_identical < duplicates.MAX_PAIRS
        at_least = "" if is_all else "at least "
        words.append(
            f"  {identical} of identical and {at_least}{num_near_identical} of near-identical "
            f"images{once}"
        )
    if not twins.is_complete:
        words.append("  too many images are similar to compare all of them with each other:")
        words += NOT_KEPT_TOGETHER
    return words


def _warn_of_leaks(
    splits: list[str], images: np.ndarray, pairs: np.ndarray, paired_files: list[list[str]]
) -> list[str]:
    """A warning for any two splits that share images."""
    words = []
    pair_splits = images["split"][pairs[:, :2]]  # (P, 2)
    for first, second in itertools.combinations(splits, 2):
        is_across = (pair_splits == [first, second]).all(axis=1)
        if not is_across.any():
            continue
        first_file, second_file, _ = paired_files[is_across.argmax()]
        measured = "test" if "test" in (first, second) else "validation"
        words.append(
            f"  WARNING: {pluralize(int(is_across.sum()), 'pair')} across {first} and {second}, "
            f"such as {first_file} and {second_file}: "
            f"the {measured} accuracy will look better than it is"
        )
    return words


def _describe_two_labels(
    images: np.ndarray, pairs: np.ndarray, paired_files: list[list[str]]
) -> list[str]:
    """The pairs whose images have different labels, so that one may be wrong."""
    labels = images["label"][pairs[:, :2]]  # (P, 2)
    differ = labels[:, 0] != labels[:, 1]
    if not differ.any():
        return []
    first_file, second_file, _ = paired_files[differ.argmax()]
    example = f"such as {first_file} and {second_file}: both stay, but one label may be wrong"
    return [f"  {differ.sum()} of these in two classes, {example}"]
