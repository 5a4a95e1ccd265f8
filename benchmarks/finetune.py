"""What --freeze, --head-first and --first-layer-lr give with 50 images of each of five classes.

    python benchmarks/finetune.py --runs 3
    python benchmarks/finetune.py --runs 5 --only "all layers" "last layer first" --test
    python benchmarks/finetune.py --runs 3 --weights tf_efficientnet_lite0.pth

Trains a narrow cnn on 2,500 images of each of CIFAR-10's first five classes, then fine-tunes it for
the last five with 50 images of each, several seeds, in turns; each seed draws other images. With
--weights it is the recipe finetune, from a network that somebody trained on ImageNet; to save time
it sees images of --image-size pixels, not the larger ones that its weights are made for. A tenth of
the images is for validation, as in the program. By default the accuracy is that on 500 other
training images of each class, on which settings are chosen; with --test it is that on the test
images. Prints a Markdown table; writes results/finetune.json (finetune_test.json) with every run.
"""

import functools
import shlex
import statistics
import tempfile
from pathlib import Path
from typing import Any

import harness
from harness import mean_and_std

CLASS_SIZE = 50
PRETRAIN = "default --width 0.25 --epochs 6"
# The settings that the program gives a pretrained network for so few images, and of the recipe
# finetune those that do not differ between the variants.
FINETUNE = (
    "default --width 0.25 --optimizer adamw --weight-decay 0.01 --label-smoothing 0.1 "
    "--epochs 23 --batch-size 17 --augment flip,crop=2 --progressive-resizing 0"
)
VARIANTS = {
    "last layer only": "--freeze",
    "all layers": "",
    "last layer first": "--head-first 0.3",
    "rates by layer": "--first-layer-lr 0.1",
    "both": "--head-first 0.3 --first-layer-lr 0.1",
}
LEARNING_RATES = ["3e-4", "1e-3", "3e-3"]
DEFAULT_MODEL = "timm:tf_efficientnet_lite0"  # with --weights
DEFAULT_IMAGE_SIZE = 96  # pixels, with --weights

# Loads CIFAR-10 as the program does and leaves the images of some classes, `count` of each. What is
# tested on are 500 others of each class, or the test images of these classes.
LOAD_CLASSES = """
import dataclasses
from classifier.datasets.dataset import Split, build_dataset

load_data = ic.load_data

def of_classes(split):
    chosen = split.select((split.labels >= {first}) & (split.labels < {end}))
    return Split(chosen.images, chosen.labels - {first})

def load_classes(config):
    data = load_data(dataclasses.replace(config, val_fraction=0.0, image_size=None))
    images = of_classes(data.train)
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(config.seed))
    used, others = [], []
    for label in range({end} - {first}):
        members = order[images.labels[order] == label]
        used.append(members[:{count}])
        others.append(members[{count}:{count} + 500])
    judged = images.select(torch.cat(others))
    if {on_test_images}:
        judged = of_classes(data.load_test())
    return build_dataset(
        config,
        images.select(torch.cat(used)),
        name=data.name,
        classes=data.classes[{first}:{end}],
        load_test=lambda: judged,
        num_test_images=len(judged.labels),
        flip_keeps_label=data.flip_keeps_label,
    )

replace(ic, "load_data", load_classes)
"""

# A pretrained network enlarges images to the size that its weights are made for, 224 pixels as a
# rule; here it computes on images of --image-size pixels.
NOT_ENLARGED = """
from classifier.networks import pretrained

begin = pretrained.PretrainedNetwork.__init__

def begin_with_small_images(self, body, published):
    begin(self, body, published._replace(size={size}))

replace(pretrained.PretrainedNetwork, "__init__", begin_with_small_images)
"""


def pretrain(weights: Path, data_dir: str) -> None:
    """Train on the first five classes, and write the model file."""
    snippet = LOAD_CLASSES.format(first=0, end=5, count=2500, on_test_images=False)
    harness.run(f"{PRETRAIN} --out {shlex.quote(str(weights))}", 0, data_dir, snippet)


def train(
    variant: str, seed: int, data_dir: str, settings: str, weights: Path, snippet: str
) -> dict[str, Any]:
    """Fine-tune and test once.

    Args:
        variant: a name in VARIANTS and a learning rate.
        settings: a recipe and the options that do not differ between the variants.
        weights: the file to start from.
        snippet: loads the images: see `harness.variant_program`.
    """
    name, _, lr = variant.partition(", ")
    options = f"{settings} --lr {lr} {VARIANTS[name]}"
    init_from = f"--init-from {shlex.quote(str(weights))}"
    result = harness.run(f"{options} {init_from}", seed, data_dir, snippet)
    # what is kept names the file alone: its folder may be a temporary one
    return {"name": name, "lr": lr, **result, "variant": f"{options} --init-from {weights.name}"}


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, with a row for each variant and a column for each learning rate."""
    rates = list(harness.group_by(results, "lr"))
    rows = []
    for name, runs in harness.group_by(results, "name").items():
        row = [name, f"`{VARIANTS[name]}`" if VARIANTS[name] else ""]
        for of_rate in harness.group_by(runs, "lr").values():
            row.append(mean_and_std([run["test_accuracy"] for run in of_rate], 100))
        seconds = statistics.mean(run["epochs"][-1]["seconds"] for run in runs)
        rows.append([*row, f"{seconds:.1f}", str(len(runs) // len(rates))])
    accuracies = [f"accuracy with `--lr {lr}`, %" for lr in rates]
    head = ["trained", "options", *accuracies, "training, s", "seeds"]
    return harness.markdown_table(" | ".join(head), rows)


def main() -> None:
    parser = harness.new_parser(__doc__, runs=3)
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="these variants"
    )
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        default=LEARNING_RATES,
        metavar="LR",
        help="of the last layer",
    )
    parser.add_argument("--test", action="store_true", help="on the test images: once, at the end")
    parser.add_argument("--weights", metavar="FILE", help="weights of --model, from ImageNet")
    parser.add_argument("--model", help=f"with --weights (default: {DEFAULT_MODEL})")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help=f"with --weights (default: {DEFAULT_IMAGE_SIZE})",
    )
    default_name = "finetune, with --test finetune_test"
    parser.add_argument("--name", help=f"of the result file (default: {default_name})")
    options = parser.parse_args()
    if not options.weights and (options.model or options.image_size):
        parser.error("--model and --image-size need --weights")
    result_name = options.name or ("finetune_test" if options.test else "finetune")
    variants = [f"{name}, {lr}" for name in options.only for lr in options.learning_rates]
    snippet = LOAD_CLASSES.format(first=5, end=10, count=CLASS_SIZE, on_test_images=options.test)
    with tempfile.TemporaryDirectory() as folder:
        if options.weights:
            weights = Path(options.weights).resolve()
            model = shlex.quote(options.model or DEFAULT_MODEL)
            image_size = options.image_size or DEFAULT_IMAGE_SIZE
            settings = f"finetune --model {model} --image-size {image_size}"
            snippet += NOT_ENLARGED.format(size=image_size)
        else:
            weights = Path(folder, "first_classes.pth")
            pretrain(weights, options.data_dir)
            settings = FINETUNE
        run = functools.partial(
            train,
            data_dir=options.data_dir,
            settings=settings,
            weights=weights,
            snippet=snippet,
        )
        print(table(harness.run_in_turns(result_name, variants, options.runs, run)))


if __name__ == "__main__":
    main()
