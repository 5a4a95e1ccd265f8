"""From what the user gave to a complete Config: recipes, resumed runs, defaults and checks.

config = configure(recipe="accuracy94", epochs=3)
check_before_data(config)
config = resolve_defaults(config, load_data(config), DEFAULT_RECIPE)
"""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from classifier import augmentations, files, finetuning, recipes, runs, sampling
from classifier.config import Config, is_custom_model, is_library_model, parse_augment
from classifier.datasets import load, named
from classifier.datasets.dataset import Dataset, same_images
from classifier.datasets.walk import is_hidden
from classifier.distributed import Group
from classifier.errors import UsageError, UserError
from classifier.foreign_paths import full_path
from classifier.foreign_settings import without_foreign_places
from classifier.networks import libraries
from classifier.networks.custom import split_custom_model
from classifier.recipes import Settings
from classifier.text import OTHER_MODELS, did_you_mean

# Progressive resizing is off by default for smaller images, as half of their size is too little for
# the network, for smaller batches, as batch norm needs several values for each channel, and for
# shorter runs, as a few steps on full-size images are too few. Such short runs do not leave out
# easy images either.
MIN_IMAGE_SIZE = 28
MIN_BATCH_SIZE = 4
MIN_STEPS = 20


def configure(**given: Any) -> Config:
    """Build a Config from these settings and those of the recipe, or of the run to resume.

    All other settings keep the defaults of Config. Raises UserError and UsageError, and OSError for
    a recipe file that cannot be read.
    """
    if given.get("resume"):
        return runs.resume_config(**given)
    settings = recipes.find_recipe(given.get("recipe", "default"))
    if given.get("recipe", "default") not in recipes.RECIPES:
        settings = without_foreign_places(settings, given, given["recipe"])
    recipe_model = settings.get("model", "cnn")
    if given.get("model", recipe_model) != recipe_model:
        for name in ("width", "dropout"):  # they are meant for the recipe's network
            settings.pop(name, None)
    settings.update(given)
    return Config(**settings)


def network_defaults(model: str, pretrained: bool = False) -> Settings:
    """Default settings of a network; none for cnn, whose defaults are in the default recipe.

    Raises UsageError for an unknown network. The file of a custom network is not executed.
    """
    if model == "cnn":
        return {}
    if model in recipes.NETWORK_DEFAULTS:
        defaults = recipes.NETWORK_DEFAULTS[model]
    elif is_library_model(model):
        libraries.check_name(model)
        defaults = recipes.PRETRAINED_DEFAULTS if pretrained else recipes.LIBRARY_DEFAULTS
    elif is_custom_model(model):
        split_custom_model(model)
        defaults = recipes.CUSTOM_MODEL_DEFAULTS
    else:
        known = ["cnn", *recipes.NETWORK_DEFAULTS]
        suggestion = did_you_mean(model, known, OTHER_MODELS)
        raise UsageError(f"unknown model {model}: {suggestion}")
    # Not every network accepts images of other sizes; easy images were left out with cnn only.
    return {"progressive_resizing": 0.0, "drop_easiest": 0.0, **defaults}


def check_before_data(config: Config) -> None:
    """Find what is wrong with these settings before a download starts, as far as that is possible.

    Raises UserError and UsageError, and OSError for an --init-from that is missing.
    """
    augmentations.build_augmentation(config.augment, 2)
    network_defaults(config.model)
    if config.init_from and not config.resume:
        os.stat(config.init_from)
    if config.out and Path(config.out).is_dir():
        raise UserError(f"--out {config.out} is a folder: name a file with --out FILE.pth")


def check_places(config: Config, reads_data: bool = True) -> None:
    """Raise UserError if a run could not write its files; it tries, and leaves nothing behind.

    reads_data: whether a data set that is not on this machine will be downloaded. Raises UsageError
    if files would be written where the next run takes them for images of a class.
    """
    if reads_data and not config.resume:
        _check_outside_dataset(config)
    places = {"--run-dir": Path(config.run_dir) if config.run_dir else runs.RUNS}
    if config.resume:
        places = {"--resume": Path(config.resume)}
    if not config.fast_dev_run:
        places["--out"] = Path(config.out).parent
    name = "cifar10" if config.dataset == "auto" else config.dataset
    is_downloaded = reads_data and (name == "cifar10" or name in named.NAMES)
    settings = {"dataset": name}
    if is_downloaded and not load.dataset_available(settings, 0, config.data_dir):
        places["--data-dir"] = Path(config.data_dir)

    problems = []
    options = []
    for option, folder in places.items():
        try:
            files.check_writable(folder)
        except OSError as error:
            problems.append(f"{folder.absolute()}: {error.strerror}")
            options.append(option)
    if problems:
        raise UserError(
            f"cannot write to {', '.join(problems)}; name another place with {', '.join(options)}"
        )


def _check_outside_dataset(config: Config) -> None:
    """Raise UsageError if the run would make a folder in a folder of images that is not hidden."""
    dataset = Path(config.dataset)
    if config.dataset in ("", "auto", *load.NAMES) or config.labels or not dataset.is_dir():
        return
    places = {"--data-dir": Path(config.data_dir), "--run-dir": Path(config.run_dir or runs.RUNS)}
    for option, place in places.items():
        try:
            inside = place.resolve().relative_to(dataset.resolve()).parts
        except ValueError:  # it is elsewhere
            continue
        if inside and not is_hidden(inside[0]):
            raise UsageError(
                f"{option} {place} lies in --dataset {config.dataset}, where the next run would "
                f"take it for a class: start from another folder, or name another {option}"
            )


def resolve_defaults(config: Config, data: Dataset, default_recipe: Settings) -> Config:
    """Replace every None by the default for this data set, network and optimiser.

    default_recipe: the settings for the network cnn on CIFAR-10, and of their optimiser.

    Prints notes on settings that are changed or not advisable. Raises UsageError for settings that
    do not fit this data set.
    """
    if config.pretrained:
        config = replace(config, model=libraries.full_name(config.model))
    defaults = _default_settings(config, data, default_recipe)
    config = _limit_batch_size(config, defaults, data)
    config = _limit_tta(config, data)
    if config.fast_dev_run:
        config = replace(config, epochs=1, minutes=0.0, repeat=1)
        config = replace(config, progressive_resizing=0.0, drop_easiest=0.0)
    if config.fast_dev_run or config.freeze:  # a single step, or a single layer
        config = replace(config, head_first=0.0, first_layer_lr=1.0)
    _check_augment(config.augment, data)
    config = replace(config, dataset=_dataset_to_record(config.dataset, data))
    if config.labels:
        config = replace(config, labels=full_path(config.labels))
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    config = replace(config, **missing)
    finetuning.check(config)
    _check_progressive_resizing(config, data)
    option = _conflict_with_drop_easiest(config, "none")
    if config.drop_easiest and option:
        raise UsageError(f"--drop-easiest does not go with {option}: leave one of them out")
    return config


def _default_settings(config: Config, data: Dataset, default_recipe: Settings) -> Settings:
    """A default for each setting that the data set, the network or the optimiser decides on."""
    of_network = network_defaults(config.model, config.pretrained)
    if config.model == "cnn":
        of_network = _pick(default_recipe, "optimizer", "width")
    optimizer = config.optimizer or of_network["optimizer"]
    of_optimizer = _optimizer_defaults(optimizer, default_recipe)
    of_dataset = _dataset_defaults(data, default_recipe)
    if of_dataset is None or config.pretrained:
        of_network.pop("epochs", None)  # a network's epochs are for CIFAR-10 and the digits
        of_dataset = recipes.defaults_for_images(
            len(data.train.labels), _image_size(data), data.flip_keeps_label, config.pretrained
        )

    # Later updates override earlier ones.
    defaults = _pick(default_recipe, "scheduler", "label_smoothing", "micro_batch")
    defaults.update(of_dataset)
    if optimizer == of_network["optimizer"]:
        defaults.update(of_optimizer)
        defaults.update(of_network)
    else:  # the network's learning rate is meant for another optimiser
        defaults.update(of_network)
        defaults.update(of_optimizer)
    defaults["batch_size"] = min(defaults["batch_size"], of_dataset["batch_size"])

    batch_size = min(config.batch_size or defaults["batch_size"], len(data.train.labels))
    num_normalised = min(batch_size, config.micro_batch or batch_size)  # that batch norm sees
    epochs = config.epochs or defaults["epochs"]
    steps = _num_steps(data, batch_size, epochs, config.class_balance)
    is_short = steps < MIN_STEPS and not config.minutes
    if _image_size(data) < MIN_IMAGE_SIZE or num_normalised < MIN_BATCH_SIZE or is_short:
        defaults["progressive_resizing"] = 0.0
    if is_short or _conflict_with_drop_easiest(config, defaults["augment"]):
        defaults["drop_easiest"] = 0.0
    return defaults


def _conflict_with_drop_easiest(config: Config, default_augment: str) -> str:
    """The option that rules out --drop-easiest; "" if there is none."""
    if config.class_balance in sampling.RESAMPLED:  # chooses the images itself
        return f"--class-balance {config.class_balance}"
    augment = config.augment or default_augment
    steps = parse_augment(augment).others
    if any(name in steps for name in augmentations.MIXING):  # the loss is of two images
        return f"--augment {augment}"
    return ""


def _num_steps(data: Dataset, batch_size: int, epochs: int, class_balance: str) -> int:
    """Steps of a run without a time budget."""
    epoch_size = sampling.epoch_size(data.train.labels, class_balance)
    return math.ceil(epoch_size / batch_size) * epochs


def _optimizer_defaults(optimizer: str, default_recipe: Settings) -> Settings:
    if optimizer == default_recipe["optimizer"]:
        return _pick(default_recipe, "lr", "momentum", "weight_decay")
    return recipes.OPTIMIZER_DEFAULTS[optimizer]


def _dataset_defaults(data: Dataset, default_recipe: Settings) -> Settings | None:
    """Defaults of CIFAR-10 and the digits; None for other data sets."""
    if data.name == "CIFAR10":
        names = ("epochs", "batch_size", "augment", "progressive_resizing", "drop_easiest")
        return _pick(default_recipe, *names)
    return recipes.DATASET_DEFAULTS.get(data.name)


def _pick(settings: Settings, *names: str) -> Settings:
    return {name: settings[name] for name in names}


def _image_size(data: Dataset) -> int:
    return data.train.images.shape[-1]


def _limit_batch_size(config: Config, defaults: Settings, data: Dataset) -> Config:
    """Use the whole training set as the batch if it is smaller than the batch size."""
    num_images = len(data.train.labels)
    batch_size = config.batch_size or defaults["batch_size"]
    if batch_size <= num_images:
        return config
    print(f"note: the batch size is {num_images}, all training images, not {batch_size}")
    return replace(config, batch_size=num_images)


def _limit_tta(config: Config, data: Dataset) -> Config:
    """Do without test-time augmentation where a mirrored image means something else."""
    if config.tta == 1 or data.flip_keeps_label:
        return config
    print(f"note: no test-time augmentation: mirroring changes what the images of {data.name} show")
    return replace(config, tta=1)


def _check_augment(text: str | None, data: Dataset) -> None:
    flip, max_shift, _ = parse_augment(text)
    if flip and not data.flip_keeps_label:
        print(
            f"note: mirroring changes what the images of {data.name} show: "
            "better leave flip out of --augment"
        )
    size = _image_size(data)
    if max_shift >= size:
        raise UsageError(f"--augment {text} shifts images of {size} pixels out of sight")


def _check_progressive_resizing(config: Config, data: Dataset) -> None:
    """Raise UsageError if no step is left for full-size images, on which the network is tested."""
    if config.minutes or config.resume:
        return
    steps = _num_steps(data, config.batch_size, config.epochs, config.class_balance)
    if (steps - 1) / steps < config.progressive_resizing:
        raise UsageError(
            f"--progressive-resizing {config.progressive_resizing:g} leaves none of the {steps} "
            "steps for full-size images: use a smaller share, or 0"
        )


def _dataset_to_record(dataset: str, data: Dataset) -> str:
    """The name under which a resumed run finds the same data set, wherever it is resumed from."""
    if dataset == "auto":
        return data.name.lower()
    if data.report:  # a folder of images
        return full_path(dataset)
    return dataset


def check_processes(config: Config, data: Dataset, group: Group) -> None:
    """Check that processes which train together have the same images, and enough of each batch.

    config: with all defaults. Raises UserError and UsageError.
    """
    fingerprint = data.fingerprint()
    of_rank_0 = group.broadcast_from_rank0(data.fingerprint)
    if not same_images(fingerprint, of_rank_0):
        raise UserError("the processes have different images: give all machines the same data set")
    if group.world_size == 1:
        return
    needed = f"{group.world_size} processes need {MIN_BATCH_SIZE * group.world_size} at least"
    if config.batch_size < MIN_BATCH_SIZE * group.world_size:
        raise UsageError(f"--batch-size {config.batch_size} is too small: {needed}")
    epoch_size = sampling.epoch_size(data.train.labels, config.class_balance)
    if epoch_size < MIN_BATCH_SIZE * group.world_size:
        raise UsageError(f"{epoch_size} training images in an epoch are too few: {needed}")
