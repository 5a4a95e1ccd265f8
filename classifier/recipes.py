"""Tables of defaults, and the recipes: named sets of settings.

The default recipe, for the network cnn on CIFAR-10 with Muon, stands in image_classification.py.
"""

import json
from pathlib import Path
from typing import Any

from classifier.config import FIELD_TYPES
from classifier.errors import UsageError, UserError
from classifier.legacy import translate_settings
from classifier.text import URL_REFUSED, did_you_mean, is_url

Settings = dict[str, Any]  # some of Config's fields by name

# ---- Defaults, by data set, optimiser and network ------------------------------------------------

# Chosen on validation images. The digits were enlarged from 8×8 pixels: 16×16 loses nothing.
DATASET_DEFAULTS: dict[str, Settings] = {
    "digits": {
        "epochs": 8,
        "batch_size": 50,
        "augment": "crop=2",
        "progressive_resizing": 0.7,
        "drop_easiest": 0.0,
    },
}

# Adam's rate was chosen on validation images, the others are customary. Muon's settings are in the
# default recipe; whoever gives that another optimiser adds Muon here.
OPTIMIZER_DEFAULTS: dict[str, Settings] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    "adam": {"lr": 0.005, "momentum": 0.9, "weight_decay": 0.0},
    "adamw": {"lr": 0.005, "momentum": 0.9, "weight_decay": 0.05},
    "rmsprop": {"lr": 0.0005, "momentum": 0.9, "weight_decay": 0.0},
}

# Validation accuracy after 4 epochs with Muon and with AdamW (lr 0.001 to 0.003): notebook-cnn 77.0
# and 67.1 %, beginner-cnn 77.0 and 68.2, coursework-cnn 83.5 and 75.1. Only fcn does as well with
# AdamW in less time: 58.3 % in 76 s and 59.6 % in 57 s.
MUON: Settings = {"optimizer": "muon", "lr": 0.12}

NETWORK_DEFAULTS: dict[str, Settings] = {
    "beginner-cnn": {**MUON, "epochs": 10},
    "coursework-cnn": {**MUON, "epochs": 10},
    "notebook-cnn": {**MUON, "epochs": 10},
    "fcn": {"optimizer": "adamw", "lr": 1e-3, "epochs": 15},
    "fftnet": {**MUON, "epochs": 10},
    "convnet": {**MUON, "epochs": 8},
    "resnet18": {**MUON, "epochs": 10},
    "resnet34": {**MUON, "epochs": 10},
    "resnet50": {**MUON, "epochs": 10},
    "resnet101": {**MUON, "epochs": 10},
    "resnet152": {**MUON, "epochs": 10},
    "resnet18-dropout": {**MUON, "epochs": 10, "dropout": 0.1},
    "airbench94": {**MUON, "epochs": 8},
}

# For torchvision:NAME and timm:NAME, with the epochs of the data set, and its batch size if that is
# smaller.
# Networks without batch norm fail at 0.002: squeezenet1_1 reached 9.7 % on the digits with it and
# 79.7 % with 0.001 (validation images).
LIBRARY_DEFAULTS: Settings = {"optimizer": "adamw", "lr": 1e-3, "batch_size": 64}
# ImageNet weights would not survive Muon, nor a rate as high as that of a new network.
PRETRAINED_DEFAULTS: Settings = {**LIBRARY_DEFAULTS, "lr": 5e-4}
CUSTOM_MODEL_DEFAULTS: Settings = MUON


def defaults_for_images(
    count: int, size: int, flip_keeps_label: bool, pretrained: bool
) -> Settings:
    """Defaults for `count` training images of `size` pixels: a run sees some 400,000 images.

    Small data sets get smaller batches and more epochs, up to 60; large ones at least 11 epochs. A
    pretrained network takes some 300 steps, in 5 to 30 epochs.
    """
    largest_batch = 64 if pretrained else 500
    batch_size = min(largest_batch, max(16, count // 13))

    min_epochs, max_epochs, steps = (5, 30, 300) if pretrained else (11, 60, 800)
    epochs = round(steps * batch_size / count)
    epochs = min(max_epochs, max(min_epochs, epochs))

    augment = f"crop={max(1, size // 16)}"
    if flip_keeps_label:
        augment = f"flip,{augment}"
    return {
        "epochs": epochs,
        "batch_size": batch_size,
        "augment": augment,
        "progressive_resizing": 0.7 if size >= 28 else 0.0,
        "drop_easiest": 0.0,  # among the images with the largest losses are all wrong labels
    }


# ---- Recipes -------------------------------------------------------------------------------------

# Plain training, which most of the references have in common.
PLAIN: Settings = {
    "scheduler": "none",
    "label_smoothing": 0.0,
    "augment": "none",
    "precision": "fp32",
}

# The references are the systems that this project replaces, as their READMEs describe them. Where a
# README is silent, a choice that comes near its figures, marked "chosen". "Different here" is what
# this program does otherwise.
RECIPES: dict[str, Settings] = {
    "default": {},
    "accuracy94": {
        "width": 2.0,
        "epochs": 15,
        "drop_easiest": 0.0,  # with 0.35, this wide network learns the hardest images by heart
        "val_fraction": 0.0,
        "tta": 6,
    },
    # Reference 002: a beginner's CNN, Adam at 0.001, batches of 32, 10 epochs, random crops and
    # flips; it claims 75 to 80 %. Chosen: dropout of 0.1 (validation: 75.6 %; with 0 75.8 %, with
    # 0.25 74 %, with 0.5 69 %). Different here: crops reflect the border, and flips alternate.
    "beginner": {
        **PLAIN,
        "model": "beginner-cnn",
        "dropout": 0.1,
        "epochs": 10,
        "batch_size": 32,
        "optimizer": "adam",
        "lr": 1e-3,
        "augment": "flip,crop=4",
    },
    # Reference 000: coursework of 10 epochs, training loss 2.23 to 1.69, validation loss 2.10 to
    # 1.64. Chosen: all but the network and the epochs, so that the losses come near: 2.25 to 1.69
    # and 2.18 to 1.61 (docs/references.md).
    "coursework": {
        **PLAIN,
        "model": "coursework-cnn",
        "dropout": 0.3,
        "epochs": 10,
        "batch_size": 64,
        "optimizer": "sgd",
        "lr": 9e-4,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "scheduler": "cosine",
    },
    # Reference 001: a ResNet, Adam, ReduceLROnPlateau, clipping, decay and all seven of its
    # augmentations. Chosen: the numbers that its README leaves open. Different here: a tenth of the
    # training images is for validation, and flips alternate.
    "resnet-augmented": {
        **PLAIN,
        "model": "resnet18",
        "epochs": 20,
        "batch_size": 128,
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 1e-4,
        "scheduler": "plateau",
        "grad_clip": 1.0,
        "augment": "flip,rotate=20,brightness=0.2,contrast=0.2,saturation=0.2,sharpness,erase=0.75",
    },
    # Reference 003: ResNet-18 with dropout, 25 epochs as its animations show. Chosen: all else.
    # Different here: as in 002.
    "resnet-dropout": {
        **PLAIN,
        "model": "resnet18-dropout",
        "epochs": 25,
        "batch_size": 128,
        "optimizer": "sgd",
        "scheduler": "linear",
        "augment": "flip,crop=4",
    },
    # Reference 004: batches of 20, a fifth for validation, weights kept at the lowest validation
    # loss. Chosen: SGD, of its "Adam at 0.01, or SGD", and 10 epochs: it shows 3.
    "notebook": {
        **PLAIN,
        "model": "notebook-cnn",
        "epochs": 10,
        "batch_size": 20,
        "val_fraction": 0.2,
        "optimizer": "sgd",
        "lr": 0.01,
        "momentum": 0.0,
        "weight_decay": 0.0,
    },
    # A network that knows ImageNet, for other images; their number determines the epochs.
    "finetune": {
        "model": "torchvision:resnet18",
        "pretrained": True,
        "lr": 3e-4,
        "weight_decay": 0.01,
        "label_smoothing": 0.1,
    },
    # KellerJordan/cifar10-airbench's 94 %: its network, rate, augmentation and epochs, on all
    # training images, tested on six views. Different here: batches half as large, AdamW for what
    # Muon does not train, a tenth of warm-up, and six views of the least certain quarter only.
    "airbench94": {
        "model": "airbench94",
        "epochs": 8,
        "batch_size": 1000,
        "micro_batch": 1000,
        "lr": 0.24,
        "val_fraction": 0.0,
        "tta": 6,
    },
}

# Settings of a single run, which no recipe may hold.
NOT_IN_RECIPES = {"recipe", "resume", "run_dir", "out", "fast_dev_run", "debug"}


def find_recipe(name: str) -> Settings:
    """The settings of a recipe of this name, or in this .json file.

    Raises UsageError for an unknown name, UserError for a file that holds something else, and
    OSError for one that cannot be read.
    """
    if name in RECIPES:
        return dict(RECIPES[name])
    if name.endswith(".json"):
        if is_url(name):
            raise UsageError(f"--recipe {name}: {URL_REFUSED}")
        return read_recipe(name)
    raise UsageError(f"unknown recipe {name}: {did_you_mean(name, RECIPES)}")


def read_recipe(path: str | Path) -> Settings:
    """The settings in a JSON file, such as tune.py writes.

    Files of version 0.9 are read as well. Raises UserError for a file that holds something else,
    and OSError for one that cannot be read.
    """
    raw = Path(path).read_bytes()
    try:
        content = json.loads(raw)
    except ValueError as error:
        reason = f": {error}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{_not_a_recipe(path)}{reason}") from None
    if not isinstance(content, dict):
        raise UserError(_not_a_recipe(path))

    settings = translate_settings(content)
    known = sorted(FIELD_TYPES.keys() - NOT_IN_RECIPES)
    for name in sorted(settings):
        if name not in known:
            suggestion = did_you_mean(name, known)
            raise UserError(f"--recipe {path}: there is no setting {name}: {suggestion}")
    return settings


def _not_a_recipe(path: str | Path) -> str:
    return f'--recipe {path}: it must hold settings and values, such as {{"epochs": 5}}'
