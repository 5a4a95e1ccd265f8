"""Does time grow in a straight line with the images, and memory stay flat over the epochs?

    python benchmarks/growth.py --runs 2

Whole runs of the default recipe, as a user starts them, on 10,000 to 50,000 training images for
three epochs, and on 5,000 images for more and more epochs. Prints two Markdown tables; writes
results/growth.json with every run. Start-up is the time until the first step. A straight line is
fitted to the time after it. The last column is stricter than the one before it: there the line's
constant, the time that no images at all would take, is subtracted first.
"""

import functools

import harness
import numpy as np
from harness import markdown_table

IMAGES = [10_000, 20_000, 30_000, 40_000, 50_000]
EPOCHS = [4, 8, 16, 32]


def main() -> None:
    options = harness.new_parser(__doc__, runs=2).parse_args()
    by_images = [f"default --val-fraction 0 --epochs 3 --subset {count}" for count in IMAGES]
    by_epochs = [f"default --val-fraction 0 --subset 5000 --epochs {count}" for count in EPOCHS]
    train = functools.partial(harness.run, data_dir=options.data_dir)
    variants = [*by_images, *by_epochs]
    results = harness.run_in_turns("growth", variants, options.runs, train)
    runs = harness.group_by(results, "variant")

    def means(variants: list[str], key: str) -> np.ndarray:
        """Mean of a figure over the runs of each variant; NaN if it is not known."""
        values = [[run[key] or np.nan for run in runs[variant]] for variant in variants]
        return np.mean(values, axis=1)

    print_times(means(by_images, "whole_run"), means(by_images, "start_up"))
    rows = []
    for count, peak in zip(EPOCHS, means(by_epochs, "peak_mib"), strict=True):
        rows.append([count, f"{peak:.0f}"])
    print("\n" + markdown_table("epochs | peak memory, MiB", rows))


def print_times(whole_run: np.ndarray, start_up: np.ndarray) -> None:
    """Print the straight line through the times after start-up, and how far they are from it.

    whole_run, start_up: seconds, for each number of IMAGES.
    """
    after_start_up = whole_run - start_up
    slope, constant = np.polyfit(IMAGES, after_start_up, 1)
    print(
        f"The straight line: {constant:.1f} s, including the test, "
        f"and {1000 * slope:.2f} s for every 1,000 images\n"
    )
    line = constant + slope * np.array(IMAGES)
    deviation = 100 * (after_start_up / line - 1)
    deviation_of_slope = 100 * ((after_start_up - constant) / (line - constant) - 1)
    rows = []
    for i, count in enumerate(IMAGES):
        seconds = [whole_run[i], start_up[i], after_start_up[i], line[i]]
        row = [str(count), *(f"{each:.1f}" for each in seconds)]
        row += [f"{deviation[i]:+.1f} %", f"{deviation_of_slope[i]:+.1f} %"]
        rows.append(row)
    head = "training images | whole run, s | start-up, s | after it, s | the line, s | off by"
    print(markdown_table(f"{head} | without its constant", rows))


if __name__ == "__main__":
    main()
