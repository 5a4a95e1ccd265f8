"""What each idea in the training program gives: the program with one thing changed, several seeds, alternating.

    python benchmarks/ablations.py --runs 2
    python benchmarks/ablations.py --only ReLU "no whitening" --runs 3 --epochs 10 --name relu

Judged on validation images, never on the test set. A change is a replacement in the script's text or an option, so
this file shows what was compared. Five epochs, not the default recipe's ten: small differences show as well, and
all of it takes two hours. Prints a Markdown table; writes NAME.json with every run and NAME.png into results/.
"""

import math
import shlex
import statistics

import time_to_accuracy
from matplotlib.figure import Figure
from time_to_accuracy import RESULTS, arguments, changed, grouped, in_turns, markdown, spread

BASE = "as it is"
LARGER = [("2 * channels * 2 * 2", "2 * channels * 3 * 3"), ("F.unfold(images, 2)", "F.unfold(images, 3)")]
GATHER = "gather(self.images, chosen, flips, shifts)"
# Name: (options, replacements in the script's text).
VARIANTS: dict[str, tuple[list[str], list[tuple[str, str]]]] = {
    BASE: ([], []),
    "whole images from the start": (["--low-res", "0"], []),
    "whole images from the start, 3 of 5 epochs": (["--low-res", "0", "--epochs", "3"], []),
    "ReLU": ([], [("F.silu(", "F.relu(")]),
    "GELU": ([], [("F.silu(", "F.gelu(")]),
    "average pooling": ([], [("F.max_pool2d(", "F.avg_pool2d(")]),
    "nothing added to": ([], [("return x + F.silu(", "return F.silu(")]),
    "maximum over what remains": ([], [(".mean((2, 3))", ".amax((2, 3))")]),
    "no whitening": ([], [("        set_whitening(", "        (")]),
    "first layer trained, too": ([], [("self.whiten.weight.requires_grad_(False)", "")]),
    "first layer of 3×3 pixels": ([], [*LARGER, ("* 3 * 3, 2, bias", "* 3 * 3, 3, bias")]),
    "… and stride 2": ([], [*LARGER, ("* 3 * 3, 2, bias", "* 3 * 3, 3, 2, 1, bias")]),
    "width 0.75": (["--width", "0.75"], []),
    "width 1.25": (["--width", "1.25"], []),
    "no identity initialisation": ([], [("nn.init.dirac_(", "(")]),
    "random flips": ([], [("(first ^ bool(epoch % 2))", "(torch.rand(count, generator=generator) < 0.5)")]),
    "shifts of 4 pixels": (["--augment", "flip,crop=4"], []),
    "no augmentation": (["--augment", "none"], []),
    "label smoothing 0": (["--label-smoothing", "0"], []),
    "batch 250, lr as it is": (["--batch-size", "250"], []),
    "batch 1000, lr as it is": (["--batch-size", "1000"], []),
    "lr x 2": (["--lr", "0.24"], []),
    "lr / 2": (["--lr", "0.06"], []),
    "momentum 0.3": (["--momentum", "0.3"], []),
    "momentum 0.9": (["--momentum", "0.9"], []),
    "two Newton-Schulz steps": ([], [("in range(3)", "in range(2)")]),
    "five Newton-Schulz steps": ([], [("in range(3)", "in range(5)")]),
    "Newton-Schulz in fp32": ([], [("dtype = dtype if dtype == torch.bfloat16 else", "dtype =")]),
    "AdamW": (["--optimizer", "adamw"], []),
    "cosine": (["--scheduler", "cosine"], []),
    "moving average of the weights": (["--ema"], []),
    "first stage fixed in the last 30 %": (
        [], [("self.step += 1", "self.step += 1\n        "
              "self.model.stages[0].requires_grad_(self.step < 0.7 * self.total_steps)")],
    ),
    "the easiest fifth of the images left out": (
        [], [("config, drawn = self.config, None", "config, count = self.config, len(self.labels)\n        "
              "self.recent = getattr(self, 'recent', torch.full((count,), math.inf))\n        "
              "drawn = self.recent.topk(count * 4 // 5).indices"),
             ("hits = (logits", "self.recent[chosen] = F.cross_entropy(logits, labels, reduction='none')\n"
              + 16 * " " + "hits = (logits")],
    ),
    "validation after the last epoch only": (
        [], [("if validation:", "if validation and trainer.step == trainer.total_steps:")],
    ),
    "images taken as they are, nothing gathered": ([], [(GATHER, "self.images[chosen]")]),
    "images prepared one by one": (
        [], [(GATHER, "torch.cat([gather(self.images, *each) for each in "
              "zip(chosen.split(1), flips.split(1), shifts.split(1), strict=True)])")],
    ),
    "fp32": (["--precision", "fp32"], []),
    "colours one after the other in memory": ([], [(".to(memory_format=torch.channels_last)", "")]),
    "memory given back to the system": ([], [("        keep_freed_memory()", "        pass")]),
    "torch.compile": (["--compile"], []),
    "one thread": ([], [("def main(", "torch.set_num_threads(1)\n\n\ndef main(")]),
    "threads bound to cores": (
        [], [("    import torch\n", "    os.environ['OMP_PROC_BIND'] = 'true'\n    import torch\n")],
    ),
}  # fmt: skip


def run(name: str, seed: int, data_dir: str, epochs: int) -> dict:
    """Train once: seconds of training, and the validation accuracy after the last epoch."""
    options, replacements = VARIANTS[name]
    variant = shlex.join(["default", "--epochs", str(epochs), *options])
    result = time_to_accuracy.run(variant, seed, data_dir, changed(name, replacements))
    figures = {name: result["epochs"][-1][name] for name in ("seconds", "valid_accuracy")}
    return {"variant": name, "seed": seed, **figures, "hardware": result["hardware"], "versions": result["versions"]}


def main() -> None:
    parser = arguments(__doc__, runs=2)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--epochs", type=int, default=5, help="of each run (default: 5)")
    parser.add_argument("--name", default="ablations", help="of the result files (default: ablations)")
    options = parser.parse_args()
    names = list(dict.fromkeys([BASE, *options.only]))
    results = in_turns(options.name, run, names, options.runs, options.data_dir, options.epochs)
    own = grouped(results, "variant")
    base = {key: statistics.mean(result[key] for result in own[BASE]) for key in ("seconds", "valid_accuracy")}
    rows = []
    for name, found in own.items():
        seconds, accuracy = ([result[key] for result in found] for key in base)
        slower = 100 * (statistics.mean(seconds) / base["seconds"] - 1)
        better = 100 * (statistics.mean(accuracy) - base["valid_accuracy"])
        rows.append([name, spread(seconds), f"{slower:+.0f} %", spread(accuracy, 100, 2), f"{better:+.2f}", len(found)])
    print(markdown("change | training, s | against as it is | validation accuracy, % | against as it is | runs", rows))
    figure = Figure(figsize=(9, 1 + 0.3 * len(own)), layout="constrained")
    for axes, key, unit in zip(figure.subplots(1, 2, sharey=True), base, (1, 100), strict=True):
        for row, found in enumerate(own.values()):
            values = [unit * result[key] for result in found]
            axes.barh(row, statistics.mean(values), color="C0" if row else "C7")
            axes.plot(values, [row] * len(values), "k.", markersize=4)  # each run
        axes.grid(axis="x", alpha=0.3)
        axes.axvline(unit * base[key], color="C7", linewidth=1)
    seconds_axes, accuracy_axes = figure.axes
    seconds_axes.set(xlabel="seconds of training", yticks=range(len(own)), yticklabels=list(own))
    low = 100 * min(result["valid_accuracy"] for result in results)
    accuracy_axes.set(xlabel="validation accuracy, %", xlim=(math.floor(low - 1), None))
    seconds_axes.invert_yaxis()
    figure.savefig(RESULTS / f"{options.name}.png", dpi=110)


if __name__ == "__main__":
    main()
