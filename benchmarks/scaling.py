"""How much faster do two processes train than one, and how much of their time goes into talking to each other?

    python benchmarks/scaling.py --runs 3

Each trains the default network on whole images for two epochs, alternating, with as many threads in all as there are
cores; the second epoch counts. The share of communication is by how much faster the same processes are when each keeps
its gradients to itself. Prints a Markdown table; writes results/scaling.json with every run.
"""

import statistics

from time_to_accuracy import arguments, changed, in_turns, markdown, run, spread

EPOCHS = "default --epochs 2 --low-res 0 --val-fraction 0"
SILENT = [  # what makes the processes talk in a step, on GPUs by batch norm too, and what takes its place
    ('alternative("torchrun", "torchrun").parallelise(self)', "pass"),
    ("agree(result, asked, look) if self.world > 1", "agree(result, asked, look) if False"),
]


def main() -> None:
    parser = arguments(__doc__, runs=2)
    parser.add_argument("--subset", type=int, default=0, help="train on N images only; 0: all (default)")
    options = parser.parse_args()
    variants = {"1": ("", 1), "2": ("", 2), "2, silent": (changed("2, silent", SILENT), 2)}

    def train(name: str, seed: int) -> dict:
        result = run(f"{EPOCHS} --subset {options.subset}", seed, options.data_dir, *variants[name])
        return result | {"processes": name}

    rates: dict[str, list[float]] = {name: [] for name in variants}
    for result in in_turns("scaling", train, variants, options.runs):
        first, second = (epoch["seconds"] for epoch in result["epochs"])
        rates[result["processes"]].append(result["train_images"] / (second - first))
    one = statistics.mean(rates["1"])
    rows = [[name, spread(found, 1, 0), f"{statistics.mean(found) / one:.2f}"] for name, found in rates.items()]
    print(markdown("processes | images/s | against one", rows))
    share = 1 - statistics.mean(rates["2"]) / statistics.mean(rates["2, silent"])
    print(f"\n{100 * share:.1f} % of the time of two processes is communication")


if __name__ == "__main__":
    main()
