"""Does time grow in a straight line with the images, and memory stay flat over the epochs?

    python benchmarks/growth.py --runs 2

Whole runs of the default recipe, as a user starts them, on 10,000 to 50,000 training images for three epochs, and on
5,000 images for more and more epochs. Prints two Markdown tables; writes results/growth.json with every run.
Start-up is until the first step. The last column is stricter: what the line says of no images at all is taken off too.
"""

import numpy as np
from time_to_accuracy import arguments, grouped, in_turns, markdown, run

IMAGES = [10_000, 20_000, 30_000, 40_000, 50_000]
EPOCHS = [4, 8, 16, 32]


def main() -> None:
    options = arguments(__doc__, runs=2).parse_args()
    images = [f"default --val-fraction 0 --epochs 3 --subset {count}" for count in IMAGES]
    epochs = [f"default --val-fraction 0 --subset 5000 --epochs {count}" for count in EPOCHS]
    own = grouped(in_turns("growth", run, [*images, *epochs], options.runs, options.data_dir), "variant")

    def means(variants: list[str], key: str) -> np.ndarray:
        """Of each variant, over its runs."""
        return np.mean([[result[key] or np.nan for result in own[variant]] for variant in variants], axis=1)

    whole, start_up = means(images, "whole_run"), means(images, "start_up")
    after = whole - start_up
    slope, rest = np.polyfit(IMAGES, after, 1)
    print(f"The straight line: {rest:.1f} s, the test among them, and {1000 * slope:.2f} s for every 1,000 images\n")
    line = rest + slope * np.array(IMAGES)
    off, without_rest = 100 * (after / line - 1), 100 * ((after - rest) / (line - rest) - 1)
    seconds = np.stack([whole, start_up, after, line], axis=1)
    rows = [
        [count, *(f"{each:.1f}" for each in took), f"{one:+.1f} %", f"{other:+.1f} %"]
        for count, took, one, other in zip(IMAGES, seconds, off, without_rest, strict=True)
    ]
    head = "training images | whole run, s | start-up, s | after it, s | the line, s | off by | without its rest"
    print(markdown(head, rows))
    peaks = [f"{peak:.0f}" for peak in means(epochs, "peak_mib")]
    print("\n" + markdown("epochs | peak memory, MiB", zip(EPOCHS, peaks, strict=True)))


if __name__ == "__main__":
    main()
