"""How much of what the device can do does a training step use?

    python benchmarks/utilisation.py
    python benchmarks/utilisation.py --recipe accuracy94 --device cuda

Counts the operations of the network's forward and backward pass, times whole steps (images,
gradients, optimisers) at each size of images that a run uses, and compares with the multiplication
of large matrices in the same precision. Steps and matrices are timed in turns, --rounds times.
Prints a Markdown table; writes results/utilisation.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import harness
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(harness.SCRIPT.parent))
import image_classification as ic
from classifier import devices, resolve

ROUNDS = 5
CPU_MATRIX_SIZE = 2048  # rows and columns of the matrices that are multiplied
GPU_MATRIX_SIZE = 8192
TIMED_SECONDS = 2.0  # for which the same work is repeated
MANY_STEPS = 10**9  # of a run that stays where it is while some of its steps are timed
HEAD = "images of | ms a step | images/s | TFLOP/s | matrices, TFLOP/s | share"


class Utilisation(NamedTuple):
    """What one size of images gave; its fields are those of the result file.

    Attributes:
        scale: size of the images as a share of their own.
        seconds: a training step takes, in each round.
        rates: operations of a step, in FLOP/s.
        peaks: operations of the matrices, in FLOP/s.
        shares: of the second in the first.
    """

    scale: float
    seconds: list[float]
    rates: list[float]
    peaks: list[float]
    shares: list[float]


def time_work(work: Callable[[], object], device: torch.device, timed_seconds: float) -> float:
    """Median of the seconds that `work` takes; it is repeated for so long, but at least thrice."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < timed_seconds:
        began = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def count_operations(trainer: ic.Trainer, batch: ic.Batch, scale: float) -> int:
    """Floating-point operations of a forward and backward pass."""
    num_micro_batches = min(trainer.state.num_micro_batches[scale], len(batch.order))
    with FlopCounterMode(display=False) as counter:
        trainer.forward_backward(trainer.forward, batch, scale, num_micro_batches)
    trainer.state.zero_grad()
    return counter.get_total_flops()


def middle_of_phase(scale: float, progressive_resizing: float) -> float:
    """The fraction of a run in the middle of the time with images of this scale."""
    if scale == 0.5:
        return 0.25 * progressive_resizing
    if scale == 0.75:
        return 0.75 * progressive_resizing
    return (progressive_resizing + 1) / 2


def measure(
    trainer: ic.Trainer, scale: float, matrix_size: int, rounds: int, timed_seconds: float
) -> Utilisation:
    """Time steps on images of this scale, and matrices of this size, in turns."""
    device, progress = trainer.device, trainer.state.progress
    batch = trainer.plan(0).take(trainer.batch_slices[0])
    operations = count_operations(trainer, batch, scale)
    matrix_operations = 2 * matrix_size**3
    factors = torch.randn(2, matrix_size, matrix_size, device=device).to(trainer.dtype)

    # go to where the run has images of this scale
    fraction = middle_of_phase(scale, trainer.config.progressive_resizing)
    progress.total_steps = MANY_STEPS
    progress.step = int(fraction * MANY_STEPS)
    assert trainer.next_image_scale() == scale

    for _ in range(3):
        trainer.train_step(batch)  # the first ones set up what is set up once
    seconds, peaks = [], []
    for _ in range(rounds):
        seconds.append(time_work(lambda: trainer.train_step(batch), device, timed_seconds))
        matrix_seconds = time_work(lambda: factors[0] @ factors[1], device, timed_seconds)
        peaks.append(matrix_operations / matrix_seconds)
    rates = [operations / each for each in seconds]
    shares = [rate / peak for rate, peak in zip(rates, peaks, strict=True)]
    return Utilisation(scale, seconds, rates, peaks, shares)


def table_row(found: Utilisation, image_size: int, batch_size: int) -> list[str]:
    """The medians of a size of images, as a row of the table."""
    seconds = statistics.median(found.seconds)
    share = statistics.median(found.shares)
    return [
        str(int(image_size * found.scale)),
        f"{1000 * seconds:.1f}",
        f"{batch_size / seconds:.0f}",
        f"{statistics.median(found.rates) / 1e12:.2f}",
        f"{statistics.median(found.peaks) / 1e12:.2f}",
        f"{100 * share:.0f} % ({100 * min(found.shares):.0f} to {100 * max(found.shares):.0f})",
    ]


def parse_options() -> argparse.Namespace:
    parser = harness.new_parser(__doc__)
    for flag, default in (("--recipe", "default"), ("--dataset", "cifar10"), ("--device", "auto")):
        help_text = f"as the program's (default: {default})"
        parser.add_argument(flag, default=default, metavar="NAME", help=help_text)
    harness.add_data_dir(parser)
    seconds = f"for which the same work is repeated (default: {TIMED_SECONDS:g})"
    parser.add_argument("--seconds", type=float, default=TIMED_SECONDS, metavar="S", help=seconds)
    rounds = f"of steps and matrices in turns (default: {ROUNDS})"
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=rounds)
    name = "of the result file (default: utilisation)"
    parser.add_argument("--name", default="utilisation", help=name)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    device = devices.choose_device(options.device)
    config = resolve.configure(
        recipe=options.recipe, dataset=options.dataset, data_dir=options.data_dir
    )
    data = ic.load_data(config)
    config = resolve.resolve_defaults(config, data, ic.DEFAULT_RECIPE)
    hardware = devices.hardware_name(device)
    matrix_size = CPU_MATRIX_SIZE if device.type == "cpu" else GPU_MATRIX_SIZE
    devices.keep_freed_memory()

    with devices.training_process(device, config.deterministic):
        trainer = ic.Trainer(config, data, device)
        image_size, batch_size = data.train.images.shape[-1], trainer.batch_slices[0].stop
        precision = str(trainer.dtype).removeprefix("torch.")
        print(f"{hardware}, {precision}, {batch_size} images a step\n")
        scales = [1.0, 0.75, 0.5] if config.progressive_resizing else [1.0]
        rounds, seconds = options.rounds, options.seconds
        found = [measure(trainer, scale, matrix_size, rounds, seconds) for scale in scales]

    rows = [table_row(each, image_size, batch_size) for each in found]
    print(harness.markdown_table(HEAD, rows))
    content = {"recipe": options.recipe, "hardware": hardware, "versions": ic.VERSIONS}
    steps = [each._asdict() for each in found]
    harness.write_results(options.name, content | {"steps": steps})


if __name__ == "__main__":
    main()
