"""What a run prints: its start, one line an epoch, its end."""

import math

import torch
from tqdm import tqdm

from classifier.config import Config
from classifier.datasets.dataset import Dataset
from classifier.devices import hardware_name
from classifier.distributed import Group
from classifier.progress import Progress, Row
from classifier.text import percent


def print_start(
    config: Config,
    progress: Progress,
    data: Dataset,
    device: torch.device,
    dtype: torch.dtype,
    group: Group,
    drop_after: float,
) -> None:
    """Print the device, the size of the data set and where a resumed run goes on.

    dtype: what the network computes in. drop_after: share of the run after which --drop-easiest
    leaves images out.
    """
    precision = str(dtype).removeprefix("torch.")
    print(f"Start Training  {device} ({hardware_name(device)}, {precision})")
    num_train, num_valid = len(data.train.labels), len(data.valid.labels)
    line = f"{data.name}: {num_train} training and {num_valid} validation images"
    line += f", {progress.steps_per_epoch} steps an epoch"
    if config.progressive_resizing:
        share = 100 * config.progressive_resizing
        line += f"; the first {share:.0f} % of the run on smaller images"
    if group.world_size > 1:
        line += f"; {group.world_size} processes share each batch"
    first_epoch = math.ceil(drop_after * progress.total_steps / progress.steps_per_epoch)
    if config.drop_easiest and first_epoch * progress.steps_per_epoch < progress.total_steps:
        share = 100 * (1 - config.drop_easiest)
        since = f"from epoch {first_epoch} on"
        if config.minutes:  # the number of steps may change
            since = f"after {100 * drop_after:.0f} % of it"
        line += f"; {since}, only the hardest {share:.0f} %"
    print(line)
    if progress.step:
        print(f"Resuming after step {progress.step} of {progress.total_steps}")


def print_epoch(progress: Progress, row: Row, is_best: bool, eta: str) -> None:
    """Print an epoch's losses and accuracies.

    eta: the time that is left. is_best: whether this epoch's weights are the best so far.
    """
    valid_loss, valid_accuracy = "-", ""
    if row["valid_loss"] is not None:
        valid_loss = f"{row['valid_loss']:.4f}"
        valid_accuracy = f", valid acc {percent(row['valid_accuracy'])}"
    seconds = f"{row['seconds']:.1f} s"
    if progress.step_in_epoch:  # --minutes ended the run within an epoch
        seconds += f" for {progress.step_in_epoch} of {progress.steps_per_epoch} steps"
    size = "" if row["image_scale"] == 1 else f", images at {100 * row['image_scale']:.0f} %"
    train_accuracy = percent(row["train_accuracy"])
    if row["train_share"] < 1:
        train_accuracy += f" (of the hardest {100 * row['train_share']:.0f} %)"
    saved = ", saved" if is_best else ""
    print(
        f"Epoch {row['epoch']:04d}: train loss {row['train_loss']:.4f}, valid loss {valid_loss}, "
        f"train acc {train_accuracy}{valid_accuracy}{size}, {seconds}, {eta}{saved}"
    )


def print_end(seconds: float, minutes: float) -> None:
    """Print how long a run took, and whether that was longer than --minutes (0: no budget)."""
    late = ""
    if minutes and seconds > 1.1 * 60 * minutes:
        late = f", later than --minutes {minutes:g}"
    print(f"Done in {tqdm.format_interval(seconds)}{late}")
