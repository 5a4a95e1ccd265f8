"""Every setting of a run: its name, type, default, range and one line of help."""

import math
import os
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any, NamedTuple, get_args, get_type_hints

from classifier.errors import UsageError
from classifier.text import URL_REFUSED, did_you_mean, is_url

FITS = ("crop", "pad", "stretch")  # a model file that names none is of the first
# The settings that are paths of files and folders, and so no URLs.
PATHS = ("dataset", "labels", "data_dir", "init_from", "run_dir", "out", "resume")


def setting(
    default: Any,
    help: str,
    choices: Iterable[Any] = (),
    minimum: float = -math.inf,
    less_than: float = math.inf,
) -> Any:
    """A field of Config: its default, its line of help, and the values it accepts.

    A default of None stands for the default of the data set, the network or the optimiser, which
    `resolve.resolve_defaults` fills in. Numbers have to be in [minimum, less_than).
    """
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "minimum": minimum,
        "less_than": less_than,
    }
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """Every setting of a run. The command line, docs/options.md and config.json are made from it.

    Many settings are None until `resolve.resolve_defaults` fills in the default for the data set,
    network or optimiser; their types are those they have from then on. `recipe` and `resume` are
    only recorded here: `resolve.configure` acts on them. An invalid value raises UsageError.
    """

    # Data
    dataset: str = setting(
        "auto",
        "cifar10, digits, cifar100, mnist, fashion-mnist, svhn, stl10, a folder of images, or such "
        "a folder as a ZIP file; auto: CIFAR-10, or digits if it is not available and no recipe is "
        "given",
    )
    labels: str = setting(
        "",
        "CSV file that labels the images in the folder: columns file and label, optionally split "
        "(train, val or test); without it, each class has a folder of its own",
    )
    data_dir: str = setting("data", "folder for downloaded data sets, decoded and unpacked images")
    mirror: str = setting("", "URL of the CIFAR-10 archive, or of the folder with it, to try first")
    val_fraction: float = setting(
        0.1, "share of the training images kept for validation", minimum=0, less_than=1
    )
    skip_unreadable: bool = setting(
        False,
        "go on without the image files that cannot be read, however many (default: only if few)",
    )
    subset: int = setting(
        0, "train on N images only, the classes in the same proportions; 0: on all", minimum=0
    )
    image_size: int | None = setting(
        None,
        "width and height of the images in pixels (default: the data set's own; of a folder 32, 48 "
        "or 64, or with --pretrained the size that the weights are made for)",
        minimum=8,
    )
    fit: str = setting(
        "crop",
        "how the images of a folder become squares: crop the middle, pad the whole image with a "
        "grey border, or stretch it",
        choices=FITS,
    )

    # Network
    model: str = setting(
        "cnn", "cnn, a name such as resnet18, torchvision:NAME, timm:NAME or FILE.py:FACTORY"
    )
    width: float | None = setting(
        None, "width of the network: factor on its numbers of channels", minimum=0.05
    )
    dropout: float | None = setting(
        None, "dropout rate, for networks with dropout", minimum=0, less_than=1
    )
    pretrained: bool = setting(
        False,
        "start torchvision:NAME or timm:NAME from its published weights, mostly ImageNet's, with "
        "their image size",
    )
    init_from: str = setting(
        "",
        "model file, or state dict of another program (.pth or .safetensors), whose weights to "
        "start from; the last layer is new if the classes differ",
    )
    freeze: bool = setting(False, "train only the last layer")
    head_first: float = setting(
        0.0,
        "share of the run that trains only the last layer, before all layers are trained",
        minimum=0,
        less_than=1,
    )
    first_layer_lr: float = setting(
        1.0,
        "learning rate of the first layer as a share of the last one's; it grows geometrically "
        "over the layers between them",
        minimum=0,
    )

    # Training
    recipe: str = setting(
        "", "set of settings: a name such as accuracy94, or FILE.json; explicit options override it"
    )
    epochs: int = setting(None, "passes over the training images", minimum=1)
    minutes: float = setting(
        0.0, "wall-clock budget for the whole run, in minutes; 0: use --epochs", minimum=0
    )
    batch_size: int = setting(None, "images in one optimiser step", minimum=1)
    micro_batch: int = setting(
        None,
        "largest number of images in a forward pass of a process; batch norm computes its "
        "statistics over these",
        minimum=1,
    )
    optimizer: str = setting(None, "optimiser", choices=("muon", "sgd", "adam", "adamw", "rmsprop"))
    lr: float = setting(None, "peak learning rate", minimum=0)
    momentum: float = setting(None, "momentum of muon, sgd and rmsprop", minimum=0, less_than=1)
    weight_decay: float = setting(
        None, "weight decay; with sgd, adam and rmsprop an L2 penalty", minimum=0
    )
    scheduler: str = setting(
        None,
        "learning-rate schedule; linear: warm-up over a tenth of the run, then down to 0",
        choices=("linear", "cosine", "step", "plateau", "none"),
    )
    label_smoothing: float = setting(
        None, "share of the target spread evenly over all classes", minimum=0, less_than=1
    )
    augment: str = setting(
        None,
        "none, or a list of flip, crop=N (shift by up to N pixels), randaugment, trivialaugment "
        "and other steps",
    )
    progressive_resizing: float = setting(
        None,
        "share of the run on smaller images: first half their size, then three quarters",
        minimum=0,
        less_than=1,
    )
    drop_easiest: float = setting(
        None,
        "share of the training images to leave out after a quarter of the run, in each epoch those "
        "with the smallest losses; others come twice instead",
        minimum=0,
        less_than=1,
    )
    grad_clip: float = setting(0.0, "maximum norm of the gradient; 0: no clipping", minimum=0)
    class_balance: str = setting(
        "none",
        "for unequal classes: weight the loss, repeat rare images, or use fewer of the others",
        choices=("none", "weights", "oversample", "undersample"),
    )
    ema: bool = setting(
        False, "evaluate and save a moving average of the weights, over about an epoch"
    )
    early_stopping: int = setting(
        0,
        "stop after N epochs on full-size images without a lower validation loss; 0: never",
        minimum=0,
    )

    # Run
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting(
        "auto",
        "precision of training; auto: 16 bits where the device is fast at it, else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = setting(False, "use torch.compile, for long or repeated runs")
    seed: int = setting(0, "seed of all random numbers", minimum=0, less_than=2**40)
    deterministic: bool = setting(False, "use deterministic algorithms on GPUs as well (slower)")
    repeat: int = setting(1, "train with N seeds and report mean and spread", minimum=1)
    tta: int = setting(
        1,
        "test-time augmentation: also test on N views of the least certain quarter of the images; "
        "2: the image and its mirror image, 6: both of them shifted as well",
        choices=(1, 2, 6),
    )
    keep_epochs: bool = setting(False, "keep the model of every epoch, for explain.py --animate")
    run_dir: str = setting("", "folder of this run (default: a new one in runs/)")
    out: str = setting(
        "", "file of the finished model (default: model_MODEL.pth or model_MODEL_DATASET.pth)"
    )
    resume: str = setting(
        "", "resume the run in this folder; last: the newest unfinished one in runs/"
    )
    fast_dev_run: bool = setting(False, "run one batch through every stage, as a quick check")
    debug: bool = setting(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if FIELD_TYPES[entry.name] is float and type(value) is int:
                value = float(value)
                setattr(self, entry.name, value)
            _check_value(entry, value)
        if self.mirror and not self.mirror.startswith(("http://", "https://")):
            raise UsageError(f"--mirror {self.mirror}: must begin with http:// or https://")
        for name in PATHS:
            value = getattr(self, name)
            if is_url(value):
                raise UsageError(f"{flag(name)} {value}: {URL_REFUSED}")
            # shells expand ~ only at the start of a word: not in --out=~/model.pth
            setattr(self, name, os.path.expanduser(value))
        if self.first_layer_lr > 1:
            raise UsageError(f"--first-layer-lr {self.first_layer_lr:g}: must be at most 1")
        if self.early_stopping and not self.val_fraction:
            raise UsageError("--early-stopping needs validation images: --val-fraction above 0")


def _field_types() -> dict[str, type]:
    types = {}
    for name, hint in get_type_hints(Config).items():
        alternatives = get_args(hint)  # of int | None: int and NoneType
        types[name] = alternatives[0] if alternatives else hint
    return types


FIELD_TYPES: dict[str, type] = _field_types()


def _check_value(entry: Field[Any], value: Any) -> None:
    """UsageError for a value of the wrong type, none of the choices, or out of range."""
    if value is None and entry.default is None:
        return
    name, rules = flag(entry.name), entry.metadata
    expected = FIELD_TYPES[entry.name]
    if type(value) is not expected:
        raise UsageError(f"{name} takes a value of type {expected.__name__}, not {value!r}")
    if rules["choices"] and value not in rules["choices"]:
        known = [str(choice) for choice in rules["choices"]]
        raise UsageError(f"{name} {value}: {did_you_mean(str(value), known)}")
    if expected in (int, float) and not rules["minimum"] <= value < rules["less_than"]:
        limits = f"must be at least {rules['minimum']:g}"
        if rules["less_than"] < math.inf or value == math.inf:
            limits += f" and below {rules['less_than']:g}"
        raise UsageError(f"{name} {value}: {limits}")


def flag(name: str) -> str:
    """A setting's name as an option: progressive_resizing becomes --progressive-resizing."""
    return "--" + name.replace("_", "-")


def is_library_model(model: str) -> bool:
    """True for a network of torchvision or timm."""
    return model.startswith(("torchvision:", "timm:"))


def is_custom_model(model: str) -> bool:
    """True for a user's network, FILE.py:FACTORY."""
    return ":" in model and not is_library_model(model)


class Augment(NamedTuple):
    """The steps of --augment.

    Attributes:
        flip: mirror images left to right.
        max_shift: largest shift, in pixels, that crop=N stands for; 0: none.
        others: further steps and their strengths as typed, "" if there is none
            (see `augmentations`).
    """

    flip: bool
    max_shift: int
    others: dict[str, str]


def parse_augment(text: str | None) -> Augment:
    """Parse --augment into flip, maximal shift and other steps. Raises UsageError.

    The names and strengths of the other steps are checked where they are built, in `augmentations`.
    """
    words = [word.strip() for word in (text or "none").split(",")]
    steps = {}
    for word in words:
        name, _, value = word.partition("=")
        steps[name] = value
    if len(steps) < len(words) or ("none" in steps and len(words) > 1):
        raise UsageError(f"--augment {text}: name each step once, or none alone")
    flip = "flip" in steps
    flip_value = steps.pop("flip", "")
    none_value = steps.pop("none", "")
    if flip_value or none_value:
        raise UsageError(f"--augment {text}: flip and none take no number")
    max_shift = 0
    if "crop" in steps:
        max_shift = _parse_shift(steps.pop("crop"), text)
    return Augment(flip, max_shift, steps)


def _parse_shift(value: str, text: str | None) -> int:
    """N of crop=N in pixels; crop alone shifts by up to 4."""
    if not value:
        return 4
    if not value.isdecimal():
        raise UsageError(f"--augment {text}: crop=N takes a whole number of pixels")
    return int(value)
