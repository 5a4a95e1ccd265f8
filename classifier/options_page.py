"""The text of docs/options.md: every option with its default, and all recipes."""

from collections.abc import Iterable
from dataclasses import Field
from typing import Any

from classifier import recipes
from classifier.cli import format_default, format_value, grouped_fields, metavar
from classifier.config import FIELD_TYPES, flag
from classifier.recipes import Settings

INTRODUCTION = """\
# Options

After reading this page you know every option, what it does and what it is if you leave it out.

`python image_classification.py --help` prints them in short. This page is generated from
`classifier/config.py` and `classifier/recipes.py`. The defaults in these tables are for the network
`cnn` on CIFAR-10. N stands for a whole number, F for a number such as 0.1.
"""
# What the page says beyond the help, by setting.
DETAILS = {
    "mirror": "For a classroom without internet, for example.",
    "fit": "The model file keeps it, and the tools obey it. `pad` fills with (114, 114, 114).",
    "width": "For `cnn`, and for custom networks that take it.",
    "dropout": "Default for `cnn` 0, for `beginner-cnn` and `coursework-cnn` 0.5, for "
    "`notebook-cnn` and `fcn` 0.25, for `resnet18-dropout` 0.1; for `timm:NAME` its `drop_rate`.",
    "pretrained": "Images are normalised as the weights expect.",
    "init_from": "With `--pretrained`, it may be a file that torchvision or timm publishes.",
    "freeze": "After `--pretrained` or `--init-from`.",
    "minutes": "Downloads are included.",
    "batch_size": "At most all training images.",
    "micro_batch": "At every resolution; fewer if memory is short. With several GPUs, batch norm "
    "sees the images of all processes.",
    "lr": "With Muon, the weights that it leaves to AdamW get a twelfth of it.",
    "momentum": "Adam and AdamW keep PyTorch's betas.",
    "weight_decay": "With Muon, it affects only AdamW's weights.",
    "scheduler": "`cosine`: half a cosine wave down to 0. `step`: divided by 10 at 50 and at 75 % "
    "of the run. `plateau`: divided by 10 after three epochs without a lower validation loss. "
    "`none`: constant.",
    "class_balance": "`weights`: rare classes count more in the loss. `oversample`: their images "
    "are repeated within an epoch. `undersample`: an epoch uses as many images of each class as "
    "the rarest has.",
    "drop_easiest": "Images with wrong labels have large losses, so they are kept.",
    "device": "`auto`: CUDA, then MPS, then the CPU.",
    "precision": "`auto`: bf16 where it is fast, fp16 on older NVIDIA GPUs, else fp32.",
    "compile": "Takes a minute first, and needs a C++ compiler on a CPU.",
    "repeat": "Each seed has a folder seed-N in the run folder. The model with the lowest "
    "validation loss is kept; without validation images, the first. report.json has the results of "
    "this model, and the mean over the seeds as `test_accuracy_mean`.",
    "tta": "The prediction is that of the mean logits. Ignored, with a note, where mirroring "
    "changes what an image shows.",
    "out": "An older file of that name is replaced.",
    "resume": "`last` ignores runs with `--fast-dev-run`.",
    "fast_dev_run": "It replaces no model.",
}


def options_page(default_recipe: Settings) -> str:
    """docs/options.md in Markdown.

    default_recipe: the settings for the network cnn on CIFAR-10.
    """
    parts = [INTRODUCTION]
    for title, entries in grouped_fields().items():
        parts.append(f"## {title.capitalize()}\n")
        parts.append(_options_table(entries, default_recipe))
    parts += _defaults_section(default_recipe)
    parts.append("## Recipes\n")
    parts.append(
        "`--recipe default` sets nothing: all defaults hold. For `cnn` on CIFAR-10 they are\n"
        f"`{_options(default_recipe)}`.\n"
    )
    others = {name: settings for name, settings in recipes.RECIPES.items() if settings}
    parts.append(_settings_table("recipe", others))
    return "\n".join(parts)


def _defaults_section(default_recipe: Settings) -> list[str]:
    names = ("lr", "momentum", "weight_decay")
    of_optimizers = {default_recipe["optimizer"]: {name: default_recipe[name] for name in names}}
    for name, settings in recipes.OPTIMIZER_DEFAULTS.items():
        of_optimizers[name] = dict(settings)
        if name in ("adam", "adamw"):  # they do not use it
            del of_optimizers[name]["momentum"]
    of_networks = {
        **recipes.NETWORK_DEFAULTS,
        "torchvision:NAME or timm:NAME": recipes.LIBRARY_DEFAULTS,
        "torchvision:NAME or timm:NAME, --pretrained": recipes.PRETRAINED_DEFAULTS,
        "FILE.py:FACTORY": recipes.CUSTOM_MODEL_DEFAULTS,
    }
    return [
        "## Defaults\n",
        "Each of these overrides those after it: an option, the recipe, the defaults of the\n"
        "network, of the optimiser, of the data set. With another optimiser than the network's\n"
        "own, the optimiser's defaults override the network's. A network's epochs hold for the\n"
        "digits and CIFAR-10 only; the batch size is the smaller of the network's and the data\n"
        "set's.\n",
        _settings_table("data set", recipes.DATASET_DEFAULTS),
        "For other data sets, batch size and epochs depend on the number of images, and `crop` is\n"
        "a sixteenth of their size.\n",
        _settings_table("optimiser", of_optimizers),
        _settings_table("network", of_networks),
        "The default is `--progressive-resizing 0` for all networks but `cnn`, for images below\n"
        "28 pixels, for batches or micro-batches of fewer than 4 images and, without `--minutes`,\n"
        "for runs of fewer than 20 steps.\n",
        "The default is `--drop-easiest 0` for all networks but `cnn` and all data sets but\n"
        "CIFAR-10, for runs of fewer than 20 steps without `--minutes`, with `--class-balance\n"
        "oversample` or `undersample`, and with `mixup` or `cutmix` in `--augment`.\n",
    ]


def _options_table(entries: Iterable[Field[Any]], default_recipe: Settings) -> str:
    lines = ["| option | meaning | default |", "| --- | --- | --- |"]
    for entry in entries:
        option, default = flag(entry.name), ""
        if FIELD_TYPES[entry.name] is not bool:
            option += f" {metavar(entry.name)}"
            default = format_default(entry, default_recipe)
        meaning = entry.metadata["help"]
        if entry.metadata["choices"]:
            choices = ", ".join(f"`{choice}`" for choice in entry.metadata["choices"])
            meaning += f" ({choices})"
        if entry.name in DETAILS:
            meaning += f". {DETAILS[entry.name]}"
        lines.append(f"| `{option}` | {_escape(meaning)} | {_escape(default)} |")
    return "\n".join(lines) + "\n"


def _settings_table(title: str, table: dict[str, Settings]) -> str:
    lines = [f"| {title} | settings |", "| --- | --- |"]
    for key, settings in table.items():
        lines.append(f"| `{key}` | `{_escape(_options(settings))}` |")
    return "\n".join(lines) + "\n"


def _options(settings: Settings) -> str:
    """Settings as they are typed on the command line."""
    return " ".join(_option(name, value) for name, value in settings.items())


def _option(name: str, value: Any) -> str:
    return flag(name) if value is True else f"{flag(name)} {format_value(value)}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
