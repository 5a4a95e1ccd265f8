"""How much of what the device can do does a training step use?

    python benchmarks/utilisation.py
    python benchmarks/utilisation.py --recipe accuracy94 --device cuda

Counts the operations of the network's forward and backward pass, times whole steps (images, gradients, optimisers) on
each size of images that a run uses, and compares with what multiplying large matrices reaches in the same precision,
measured in turn with the steps, five times. Prints a Markdown table; writes results/utilisation.json.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from time_to_accuracy import RESULTS, SCRIPT
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(SCRIPT.parent))
import image_classification as ic


def timed(work: Callable[[], object], device: torch.device, seconds: float = 2.0) -> float:
    """Median s that `work` takes, of as many times as fit into `seconds`, but three at least."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begun = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="default", help="as the program's (default: default)")
    parser.add_argument("--dataset", default="cifar10", help="as the program's (default: cifar10)")
    parser.add_argument("--data-dir", default=os.environ.get("CIFAR10_DIR", "data"), help="as the program's")
    parser.add_argument("--device", default="auto", help="as the program's")
    parser.add_argument("--name", default="utilisation", help="of the result file")
    options = parser.parse_args()
    device = ic.choose_device(options.device)
    config = ic.configure(recipe=options.recipe, dataset=options.dataset, data_dir=options.data_dir)
    data = ic.load_data(config)
    trainer = ic.Trainer(ic.settle(config, data), data, device)
    if device.type == "cpu":
        ic.keep_freed_memory()
    trainer.settle_batch()
    batch = [drawn[trainer.places[0]] for drawn in trainer.plan(0)]
    trainer.prepare()
    trainer.total_steps = 10**9  # more than will be done
    size = 2048 if device.type == "cpu" else 8192
    one, other = (torch.randn(size, size, device=device).to(trainer.dtype) for _ in range(2))
    print(f"{ic.describe(device)}, {str(trainer.dtype)[6:]}, {len(batch[0])} images a step\n")
    print("| images of | ms a step | images/s | TFLOP/s | matrices, TFLOP/s | share |\n" + "| --- " * 6 + "|")
    rows: list[dict] = []
    for scale in (1.0, 0.75, 0.5) if trainer.config.low_res else (1.0,):
        trainer.scale = lambda scale=scale: scale  # type: ignore[method-assign,misc]
        with FlopCounterMode(display=False) as counter:
            trainer.backward(trainer.model, batch, scale)
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()
        for _ in range(3):  # the first ones set up what is set up once
            trainer.advance(batch)
        rounds = [(timed(lambda: trainer.advance(batch), device), timed(lambda: one @ other, device)) for _ in range(5)]
        steps, products = ([each[place] for each in rounds] for place in (0, 1))
        rates = [counter.get_total_flops() / seconds for seconds in steps]
        peaks = [2 * size**3 / seconds for seconds in products]
        shares = [rate / peak for rate, peak in zip(rates, peaks, strict=True)]
        rows.append({"scale": scale, "seconds": steps, "rates": rates, "peaks": peaks, "shares": shares})
        step, rate, peak, share = map(statistics.median, (steps, rates, peaks, shares))
        spread = f"{100 * min(shares):.0f} to {100 * max(shares):.0f}"
        print(
            f"| {int(trainer.images.shape[-1] * scale)} | {1e3 * step:.1f} | {len(batch[0]) / step:.0f} "
            f"| {rate / 1e12:.2f} | {peak / 1e12:.2f} | {100 * share:.0f} % ({spread}) |"
        )
    content = {"recipe": options.recipe, "hardware": ic.describe(device), "versions": ic.VERSIONS, "steps": rows}
    (RESULTS / f"{options.name}.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
