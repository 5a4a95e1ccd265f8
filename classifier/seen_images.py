"""Data leakage: images that are held out now, but that a network was trained on.

A model file of a folder of images lists what it was trained on: a 64-bit digest of each file's
content. So images are known wherever they have been moved or renamed to.
"""

from dataclasses import replace
from typing import Any

import torch

from classifier.checkpoints import read_checkpoint
from classifier.config import Config
from classifier.datasets.dataset import Dataset
from classifier.datasets.splits import ImageIds
from classifier.errors import UserError

TRAIN_DIGESTS = "train_digests"  # in a model file: int64 (N,), of the images it was trained on
EARLIER_DIGESTS = "earlier_digests"  # and those that the weights it started from were trained on


def digests_for_file(data: Dataset) -> dict[str, torch.Tensor]:
    """What a model file says of the images that a network has been trained on."""
    content = {}
    if data.train_ids is not None:
        content[TRAIN_DIGESTS] = data.train_ids.digests
    if data.earlier_digests is not None:
        content[EARLIER_DIGESTS] = data.earlier_digests
    return content


def digests_in_file(content: dict[str, Any]) -> torch.Tensor | None:
    """Digests of all images that the network in a model file has been trained on: int64 (N,).

    None if the file does not say, as for a data set that is no folder and in version 0.9.
    """
    found = [_digests(content, name) for name in (TRAIN_DIGESTS, EARLIER_DIGESTS)]
    digests = [each for each in found if each is not None]
    return torch.cat(digests).unique() if digests else None


def _digests(content: dict[str, Any], name: str) -> torch.Tensor | None:
    """Digests under this name in a file, which may be a stranger's and hold anything there."""
    value = content.get(name)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    return value if value.dtype == torch.int64 and value.ndim == 1 else None


def describe_changes(content: dict[str, Any], data: Dataset) -> str:
    """How the training images differ from those in a model file, in words; "" if it does not say.

    content: of the file.
    """
    then = _digests(content, TRAIN_DIGESTS)
    if data.train_ids is None or then is None:
        return ""
    now = data.train_ids.digests
    num_missing = int((~torch.isin(then, now)).sum())
    num_new = int((~torch.isin(now, then)).sum())
    if not num_missing and not num_new:
        return " (their classes, order or pixels differ)"
    return f" ({num_missing} of {len(then)} are missing, {num_new} are new)"


def is_seen(data: Dataset, ids: ImageIds, digests: torch.Tensor) -> torch.Tensor:
    """Whether images of a data set are among those with these digests, or like one of them.

    ids: of the images. digests: see digests_in_file. Returns bool (N,).
    """
    all_ids = ids if data.all_ids is None else data.all_ids
    seen_groups = all_ids.groups[torch.isin(all_ids.digests, digests)]
    return torch.isin(ids.groups, seen_groups)


def describe_seen(data: Dataset, digests: torch.Tensor) -> str:
    """How many of the held-out images are among those with these digests, in words, or "".

    An image that is nearly identical to one of them counts as well.
    """
    counts = []
    for ids, purpose in ((data.test_ids, "test"), (data.valid_ids, "validation")):
        if ids is None:
            continue
        num_seen = int(is_seen(data, ids, digests).sum())
        if num_seen:
            counts.append(f"{num_seen} of the {len(ids.groups)} {purpose} images")
    return " and ".join(counts)


def note_initial_weights(data: Dataset, config: Config) -> Dataset:
    """Return the data set with the digests of what the weights of --init-from were trained on.

    Prints a note if they were trained on images that are held out now, unless the run is resumed,
    which has printed it already. A file that cannot be read is left to the code that loads the
    weights.
    """
    if not config.init_from:
        return data
    try:
        content = read_checkpoint(config.init_from)
    except (UserError, OSError):
        return data
    digests = digests_in_file(content)
    if digests is None:
        return data
    if not config.resume:
        note_seen(config.init_from, data, digests)
    return replace(data, earlier_digests=digests)


def note_seen(model: Any, data: Dataset, digests: torch.Tensor) -> None:
    """Print a note if a model was trained on images that are held out now.

    model: its file. digests: see digests_in_file.
    """
    seen = describe_seen(data, digests)
    if seen:
        print(
            f"note: {model} was trained on {seen}, or on near-identical ones: "
            "the accuracy on these is overestimated"
        )
