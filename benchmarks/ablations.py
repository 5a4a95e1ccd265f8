"""What each idea in the program gives: the program with one thing changed, several seeds.

    python benchmarks/ablations.py --runs 2
    python benchmarks/ablations.py --only ReLU "no whitening" --runs 3 --epochs 10 --name relu

The variants alternate, and are judged on validation images, never on the test set. VARIANTS has all
of them: each is options, or a snippet of Python that replaces a function of the program. Runs have
five epochs, not the ten of the default recipe: small differences show as well, and all of it takes
two hours. Prints a Markdown table; writes NAME.json with every run and NAME.png into results/.

One variant up to version 0.9.1 is not here any more, because its snippet would be a page: "the
easiest fifth of the images left out" saved 14 % of the time for 0.4 points (benchmarks/README.md).
"""

import argparse
import math
import statistics
from typing import Any, NamedTuple

import harness
from harness import mean_and_std
from matplotlib.figure import Figure


class Variant(NamedTuple):
    """What is different from the default recipe.

    options: of the program, as typed. snippet: Python that changes the program before it starts:
    see `harness.variant_program`. environment: environment variables to add.
    """

    options: str = ""
    snippet: str = ""
    environment: dict[str, str] = {}


# ---- Snippets: the network -----------------------------------------------------------------------

NOT_RESIDUAL = """
def forward(self, x):
    x = F.max_pool2d(self.conv1(x), 2)
    x = F.silu(self.norm1(x))
    return F.silu(self.norm2(self.conv2(x)))

replace(ic.Stage, "forward", forward)
"""

GLOBAL_MAX_POOLING = """
def forward(self, images):
    x = F.silu(self.whiten(images))
    x = self.stages(x)
    x = x.amax((2, 3))
    x = F.dropout(x, self.dropout, self.training)
    return self.classifier(x)

replace(ic.CNN, "forward", forward)
"""

TRAIN_FIRST_LAYER = """
instantiate = ic.instantiate

def with_trained_first_layer(*arguments, **options):
    model = instantiate(*arguments, **options)
    model.whiten.weight.requires_grad_(True)
    return model

replace(ic, "instantiate", with_trained_first_layer)
"""

# Another first layer, which whitens patches of 3×3 pixels.
FIRST_LAYER = """
instantiate, unfold = ic.instantiate, F.unfold

def with_larger_patches(*arguments, **options):
    model = instantiate(*arguments, **options)
    channels = model.whiten.in_channels
    filters = 2 * channels * 3 * 3
    model.whiten = torch.nn.Conv2d(channels, filters, 3, {stride}, {padding}, bias=False)
    model.whiten.weight.requires_grad_(False)
    model.stages[0] = ic.Stage(filters, model.stages[0].conv1.out_channels)
    return model

replace(ic, "instantiate", with_larger_patches)
replace(ic, "whitening_layer", lambda model: model.whiten)
replace(F, "unfold", lambda images, size: unfold(images, 3))
"""

# ---- Snippets: images ----------------------------------------------------------------------------

RANDOM_FLIPS = """
plan_epoch = ic.plan_epoch

def with_random_flips(num_images, seed, epoch, augment, *rest):
    plan = plan_epoch(num_images, seed, epoch, augment, *rest)
    generator = torch.Generator().manual_seed(1000 * seed + epoch + 500_000)
    flips = torch.rand(len(plan.flips), generator=generator) < 0.5
    return plan._replace(flips=flips.to(plan.flips.device) & augment.flip)

replace(ic, "plan_epoch", with_random_flips)
"""

NOT_GATHERED = """
replace(ic, "gather_augmented", lambda images, batch: images[batch.order])
"""

ONE_BY_ONE = """
gather = ic.gather_augmented

def gather_one_by_one(images, batch):
    one_image_each = batch.split(len(batch.order))
    return torch.cat([gather(images, part) for part in one_image_each])

replace(ic, "gather_augmented", gather_one_by_one)
"""

VALIDATE_ONCE = """
validate = ic.validate

def validate_once(trainer):
    valid_set = trainer.valid_set
    if not trainer.state.progress.done:
        trainer.valid_set = valid_set.first(0)
    row, logits = validate(trainer)
    trainer.valid_set = valid_set
    return row, logits

replace(ic, "validate", validate_once)
"""

# ---- Snippets: the optimiser ---------------------------------------------------------------------

# One matrix after the other, in fp32, as the script's are not; the result is the same but for
# rounding.
NEWTON_SCHULZ_FP32 = """
build_optimizers = ic.build_optimizers

def build_with_fp32(model, config, dtype, device):
    return build_optimizers(model, config, torch.float32, device)

replace(ic, "build_optimizers", build_with_fp32)
"""

FREEZE_FIRST_STAGE = """
train_step = ic.Trainer.train_step

def train_step_then_freeze(self, *arguments, **options):
    stats = train_step(self, *arguments, **options)
    is_trained = self.state.progress.fraction < 0.7
    self.state.model.stages[0].requires_grad_(is_trained)
    return stats

replace(ic.Trainer, "train_step", train_step_then_freeze)
"""

# ---- The variants --------------------------------------------------------------------------------

BASE = "as it is"
VARIANTS = {
    BASE: Variant(),
    "whole images from the start": Variant("--progressive-resizing 0"),
    "whole images from the start, 3 of 5 epochs": Variant("--progressive-resizing 0 --epochs 3"),
    "ReLU": Variant(snippet='replace(F, "silu", F.relu)'),
    "GELU": Variant(snippet='replace(F, "silu", F.gelu)'),
    "average pooling": Variant(snippet='replace(F, "max_pool2d", F.avg_pool2d)'),
    "nothing added to": Variant(snippet=NOT_RESIDUAL),
    "maximum over what remains": Variant(snippet=GLOBAL_MAX_POOLING),
    "no whitening": Variant(snippet='replace(ic, "set_whitening", lambda layer, images: None)'),
    "first layer trained, too": Variant(snippet=TRAIN_FIRST_LAYER),
    "first layer of 3×3 pixels": Variant(snippet=FIRST_LAYER.format(stride=1, padding=0)),
    "… and stride 2": Variant(snippet=FIRST_LAYER.format(stride=2, padding=1)),
    "width 0.75": Variant("--width 0.75"),
    "width 1.25": Variant("--width 1.25"),
    "no identity initialisation": Variant(
        snippet='replace(torch.nn.init, "dirac_", lambda weight: weight)'
    ),
    "random flips": Variant(snippet=RANDOM_FLIPS),
    "shifts of 4 pixels": Variant("--augment flip,crop=4"),
    "no augmentation": Variant("--augment none"),
    "label smoothing 0": Variant("--label-smoothing 0"),
    "batch 250, lr as it is": Variant("--batch-size 250"),
    "batch 1000, lr as it is": Variant("--batch-size 1000"),
    "lr x 2": Variant("--lr 0.24"),
    "lr / 2": Variant("--lr 0.06"),
    "momentum 0.3": Variant("--momentum 0.3"),
    "momentum 0.9": Variant("--momentum 0.9"),
    "two Newton-Schulz steps": Variant(snippet='replace(ic, "NEWTON_SCHULZ_STEPS", 2)'),
    "five Newton-Schulz steps": Variant(snippet='replace(ic, "NEWTON_SCHULZ_STEPS", 5)'),
    "rows not balanced": Variant(snippet='replace(ic, "balance_rows", lambda update, _: update)'),
    "all images to the end": Variant("--drop-easiest 0"),
    "Newton-Schulz in fp32": Variant(snippet=NEWTON_SCHULZ_FP32),
    "AdamW": Variant("--optimizer adamw"),
    "cosine": Variant("--scheduler cosine"),
    "moving average of the weights": Variant("--ema"),
    "first stage fixed in the last 30 %": Variant(snippet=FREEZE_FIRST_STAGE),
    "validation after the last epoch only": Variant(snippet=VALIDATE_ONCE),
    "images taken as they are, nothing gathered": Variant(snippet=NOT_GATHERED),
    "images prepared one by one": Variant(snippet=ONE_BY_ONE),
    "fp32": Variant("--precision fp32"),
    "colours one after the other in memory": Variant(
        snippet='replace(torch, "channels_last", torch.contiguous_format)'
    ),
    "memory given back to the system": Variant(
        snippet='replace(ic.devices, "keep_freed_memory", lambda: None)'
    ),
    "torch.compile": Variant("--compile"),
    "one thread": Variant(snippet="torch.set_num_threads(1)"),
    "threads bound to cores": Variant(environment={"OMP_PROC_BIND": "true"}),
}


# ---- Runs, table and figure ----------------------------------------------------------------------


def train(variant: Variant, seed: int, data_dir: str, options: str) -> dict[str, Any]:
    """Train once: seconds of training, and the validation accuracy after the last epoch.

    options: of all variants; those of this one come after them.
    """
    command = f"default {options} {variant.options}"
    result = harness.run(command, seed, data_dir, variant.snippet, variant.environment)
    last_epoch = result["epochs"][-1]
    return {
        "options": options,
        "seed": seed,
        "seconds": last_epoch["seconds"],
        "valid_accuracy": last_epoch["valid_accuracy"],
        "hardware": result["hardware"],
        "versions": result["versions"],
        "commit": result["commit"],
    }


class Summary(NamedTuple):
    """The runs of a variant.

    Attributes:
        seconds: of training, of each run.
        accuracies: on the validation images, of each run, in [0, 1].
    """

    seconds: list[float]
    accuracies: list[float]

    def mean_seconds(self) -> float:
        return statistics.mean(self.seconds)

    def mean_accuracy(self) -> float:
        return statistics.mean(self.accuracies)


def summarize(results: list[dict[str, Any]]) -> dict[str, Summary]:
    """The runs of each variant."""
    summaries = {}
    for name, runs in harness.group_by(results, "variant").items():
        seconds = [run["seconds"] for run in runs]
        accuracies = [run["valid_accuracy"] for run in runs]
        summaries[name] = Summary(seconds, accuracies)
    return summaries


def table(summaries: dict[str, Summary]) -> str:
    """A Markdown table, with a row for each variant."""
    base = summaries[BASE]
    rows = []
    for name, summary in summaries.items():
        slower = 100 * (summary.mean_seconds() / base.mean_seconds() - 1)
        better = 100 * (summary.mean_accuracy() - base.mean_accuracy())
        row = [name, mean_and_std(summary.seconds), f"{slower:+.0f} %"]
        row += [mean_and_std(summary.accuracies, 100, 2), f"{better:+.2f}"]
        row.append(str(len(summary.seconds)))
        rows.append(row)
    head = "change | training, s | against as it is | validation accuracy, % | against as it is"
    return harness.markdown_table(f"{head} | runs", rows)


def draw(summaries: dict[str, Summary]) -> Figure:
    """Bars of seconds and accuracy, with a dot for each run."""
    figure = Figure(figsize=(9, 1 + 0.3 * len(summaries)), layout="constrained")
    seconds_axes, accuracy_axes = figure.subplots(1, 2, sharey=True)
    for row, (name, summary) in enumerate(summaries.items()):
        color = "C7" if name == BASE else "C0"
        dots = [row] * len(summary.seconds)
        accuracies = [100 * accuracy for accuracy in summary.accuracies]
        seconds_axes.barh(row, summary.mean_seconds(), color=color)
        seconds_axes.plot(summary.seconds, dots, "k.", markersize=4)
        accuracy_axes.barh(row, 100 * summary.mean_accuracy(), color=color)
        accuracy_axes.plot(accuracies, dots, "k.", markersize=4)

    base = summaries[BASE]
    seconds_axes.axvline(base.mean_seconds(), color="C7", linewidth=1)
    accuracy_axes.axvline(100 * base.mean_accuracy(), color="C7", linewidth=1)
    for axes in (seconds_axes, accuracy_axes):
        axes.grid(axis="x", alpha=0.3)
    lowest = 100 * min(min(summary.accuracies) for summary in summaries.values())
    seconds_axes.set(xlabel="seconds of training")
    seconds_axes.set(yticks=range(len(summaries)), yticklabels=list(summaries))
    accuracy_axes.set(xlabel="validation accuracy, %", xlim=(math.floor(lowest - 1), None))
    seconds_axes.invert_yaxis()
    return figure


def parse_options(
    description: str | None, variants: dict[str, Variant], results_name: str
) -> argparse.Namespace:
    parser = harness.new_parser(description, runs=2)
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(variants),
        choices=list(variants),
        metavar="NAME",
        help=f"variants to run besides {BASE!r} (default: all)",
    )
    epochs = "of each run (default: 5)"
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help=epochs)
    options = 'further options of each run: --options "--width 0.5"'
    parser.add_argument("--options", default="", metavar="OPTIONS", help=options)
    name = f"of the result files (default: {results_name})"
    parser.add_argument("--name", default=results_name, help=name)
    return parser.parse_args()


def main(description: str | None, variants: dict[str, Variant], results_name: str) -> None:
    """Run variants in turns, print a table and write results/NAME.json and NAME.png.

    description: for --help. results_name: the default of --name.
    """
    options = parse_options(description, variants, results_name)
    names = [BASE, *(name for name in options.only if name != BASE)]

    def train_variant(name: str, seed: int) -> dict[str, Any]:
        common = f"--epochs {options.epochs} {options.options}"
        return {"variant": name, **train(variants[name], seed, options.data_dir, common)}

    results = harness.run_in_turns(options.name, names, options.runs, train_variant)
    summaries = summarize(results)
    print(table(summaries))
    draw(summaries).savefig(harness.RESULTS / f"{options.name}.png", dpi=110)


if __name__ == "__main__":
    main(__doc__, VARIANTS, "ablations")
