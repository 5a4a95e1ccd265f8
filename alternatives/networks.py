"""Networks that `--model` takes besides the script's own `cnn`: `factory(classes=10, channels=3, image_size=32)`.

A factory may take `width`, `depth` and `dropout` as well: the options of these names.
"""

import contextlib
import difflib
import functools
import importlib.util
import itertools
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
# Validation accuracy after 4 epochs with Muon and with AdamW (0.001 to 0.003): notebook 77.0 and 67.1 %, beginner 77.0
# and 68.2, coursework 83.5 and 75.1. Only fcn does as well with AdamW in less time: 58.3 in 76 s, 59.6 in 57 s.
MUON = {"optimizer": "muon", "lr": 0.12}
SETTINGS: dict[str, dict[str, Any]] = {
    "beginner-cnn": MUON | {"epochs": 10},
    "coursework-cnn": MUON | {"epochs": 10},
    "notebook-cnn": MUON | {"epochs": 10},
    "fcn": {"optimizer": "adamw", "lr": 1e-3, "epochs": 15},
    "fftnet": MUON | {"epochs": 10},
    "convnet": MUON | {"epochs": 8, "depth": 2},
    **{name: MUON | {"epochs": 10} for name in RESNETS},
    "resnet18-dropout": MUON | {"epochs": 10, "dropout": 0.1},
    "airbench94": MUON | {"epochs": 8},
}
# With the data set's epochs, and its batches if they are smaller. ImageNet weights would not survive Muon, and networks
# without batch norm not 0.002: squeezenet1_1 on the digits 9.7 % with it, 79.7 with 0.001 (validation images).
TORCHVISION: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "batch_size": 64}


def settings(name: str, suggest: Callable[..., str], pretrained: bool = False) -> dict[str, Any]:
    """The default settings of a network; ValueError for an unknown one, with what suggest(name, known, others) says.

    pretrained: gentler ones, for torchvision:NAME with its ImageNet weights.
    """
    if ":" not in name and name not in SETTINGS:
        raise ValueError(suggest(name, ["cnn", *SETTINGS], ", torchvision:NAME or FILE.py:FACTORY"))
    usual = MUON
    if name.startswith("torchvision:"):
        known(name.partition(":")[2])
        usual = TORCHVISION | ({"lr": 5e-4} if pretrained else {})
    elif ":" in name:
        python_file(name)
    return {"low_res": 0.0} | SETTINGS.get(name, usual)  # not every network takes images of other sizes


def factory(name: str) -> Callable[..., nn.Module]:
    """The factory that one of SETTINGS, torchvision:NAME or FILE.py:FACTORY stands for; else raises ValueError."""
    if name.startswith("torchvision:"):
        return functools.partial(from_torchvision, name.partition(":")[2])
    if name in SETTINGS:
        return globals()[name.replace("-", "_")]
    return from_file(name)


def head_of(network: nn.Module) -> tuple[str, nn.Module]:
    """The classifier, the last layer that has weights, and its name."""
    return [(name, layer) for name, layer in network.named_modules() if list(layer.parameters(recurse=False))][-1]


def head_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The classifier's part of a network's state."""
    name, layer = head_of(network)
    return layer.state_dict(prefix=f"{name}.")


def freeze(network: nn.Module) -> None:
    """Leave only the classifier to be trained."""
    network.requires_grad_(False)
    head_of(network)[1].requires_grad_(True)


def blocks(widths: list[int], image_size: int) -> list[nn.Module]:
    """Conv 3×3, batch norm, ReLU and max-pooling to half the size, once for each width after the first."""
    at_least(2 ** (len(widths) - 1), image_size)
    parts: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        parts += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return parts


def at_least(size: int, image_size: int) -> None:
    """ValueError for images below `size` pixels."""
    if image_size < size:
        raise ValueError(f"it needs images of {size} pixels or more, not {image_size}")


def beginner_cnn(classes: int = 10, channels: int = 3, image_size: int = 32, dropout: float = 0.5) -> nn.Module:
    """Reference 002's network: two blocks of 32 and 64 channels, one hidden layer of 128; 545,290 parameters."""
    body = blocks([channels, 32, 64], image_size)
    head = [nn.Linear(64 * (image_size // 4) ** 2, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, classes)]
    return nn.Sequential(*body, nn.Flatten(), *head)


def coursework_cnn(classes: int = 10, channels: int = 3, image_size: int = 32, dropout: float = 0.5) -> nn.Module:
    """Reference 000's network, rebuilt from the sizes in its table's footer: 685,962 parameters."""
    body = blocks([channels, 32, 64, 128, 256], image_size)
    head: list[nn.Module] = [nn.Linear(256 * (image_size // 16) ** 2, 256), nn.ReLU(), nn.Dropout(dropout)]
    head += [nn.Linear(256, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, classes)]
    return nn.Sequential(*body, nn.Flatten(), *head)


def notebook_cnn(classes: int = 10, channels: int = 3, image_size: int = 32, dropout: float = 0.25) -> nn.Module:
    """Reference 004's network: convolutions of 16 and 32 channels, a hidden layer of 512, dropout."""
    at_least(4, image_size)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(dropout),
        nn.Linear(32 * (image_size // 4) ** 2, 512), nn.ReLU(), nn.Dropout(dropout), nn.Linear(512, classes),
    )  # fmt: skip


def fcn(classes: int = 10, channels: int = 3, image_size: int = 32, dropout: float = 0.25) -> nn.Module:
    """Reference 000's `model_fcn`: fully connected, without a convolution."""
    widths = [channels * image_size**2, 1024, 512]
    parts: list[nn.Module] = [nn.Flatten()]
    for i, o in itertools.pairwise(widths):
        parts += [nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*parts, nn.Linear(widths[-1], classes))


class GlobalFilter(nn.Module):
    """Every channel times a learned filter in the 2-D frequency domain, then a mixing of the channels, added.

    A product of spectra is a circular convolution over the whole image (Rao et al., 2021, Global Filter Networks).
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        # real and imaginary parts; in three dimensions, because Muon takes four for a convolution
        self.weight = nn.Parameter(0.02 * torch.randn(width, size, (size // 2 + 1) * 2))
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, width, size, size) to the same."""
        with torch.autocast(x.device.type, enabled=False):  # no FFT in bf16
            factors = torch.view_as_complex(self.weight.unflatten(2, (-1, 2)))
            spectrum = torch.fft.rfft2(self.norm(x.float()), norm="ortho")
            filtered = torch.fft.irfft2(spectrum * factors, s=x.shape[-2:], norm="ortho")
        return x + self.mix(filtered)


def fftnet(classes: int = 10, channels: int = 3, image_size: int = 32) -> nn.Module:
    """Reference 000's `fftnet`: 2×2 patches, then layers that filter in the frequency domain."""
    at_least(4, image_size)
    layers = [GlobalFilter(128, image_size // 2) for _ in range(6)]
    head = [nn.BatchNorm2d(128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes)]
    return nn.Sequential(nn.Conv2d(channels, 128, 2, stride=2), *layers, *head)


def convnet(classes: int = 10, channels: int = 3, image_size: int = 32, depth: int = 2) -> nn.Module:
    """Reference 000's `convnet`: three stages of 64, 128 and 256 channels, `depth` convolutions in each."""
    at_least(8, image_size)
    inputs, parts = channels, list[nn.Module]()
    for width in (64, 128, 256):
        for _ in range(depth):
            parts += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def resnet(name: str, classes: int = 10, channels: int = 3, image_size: int = 32) -> nn.Module:
    """torchvision's ResNet (He et al., 2015) with the stem for small images: 3×3, stride 1, no pooling."""
    import torchvision

    network = getattr(torchvision.models, name)(num_classes=classes)
    network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


resnet18, resnet34, resnet50, resnet101, resnet152 = (functools.partial(resnet, name) for name in RESNETS)


class BasicBlock(nn.Module):
    """Reference 003's residual block: dropout after the first of two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Dropout(dropout), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.extend([nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18_dropout(classes: int = 10, channels: int = 3, image_size: int = 32, dropout: float = 0.1) -> nn.Module:
    """Reference 003's ResNet-18: dropout, a 1×1 convolution as head, then the mean over the final map."""
    at_least(8, image_size)
    parts = [nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Dropout(dropout)]
    for inputs, outputs, stride in [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]:
        parts += [BasicBlock(inputs, outputs, stride, dropout), BasicBlock(outputs, outputs, 1, dropout)]
    return nn.Sequential(*parts, nn.Conv2d(512, classes, 1), nn.AvgPool2d(math.ceil(image_size / 8)), nn.Flatten())


class Airbench(nn.Module):
    """The network of KellerJordan/cifar10-airbench's airbench94_muon.py (Jordan, 2024), as its paper describes it.

    2×2 patches whitened by fixed filters of both signs; three blocks of two convolutions, 64, 256 and 256 channels
    wide, with batch norm that has no scale, and GELU; the maximum over what remains; a linear layer, divided by 9 as
    in the paper. Its frozen first layer is set by the program, from the images.
    """

    def __init__(self, classes: int = 10, channels: int = 3, image_size: int = 32):
        super().__init__()
        at_least(9, image_size)
        self.whiten = nn.Conv2d(channels, 8 * channels, 2)
        self.whiten.weight.requires_grad_(False)
        parts: list[nn.Module] = [nn.GELU()]
        widths = [8 * channels, 64, 256, 256]
        for inputs, width in itertools.pairwise(widths):
            for i, pooling in ((inputs, [nn.MaxPool2d(2)]), (width, [])):
                convolution, norm = nn.Conv2d(i, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, momentum=0.4)
                nn.init.dirac_(convolution.weight[:i])
                norm.weight.requires_grad_(False)
                parts += [convolution, *pooling, norm, nn.GELU()]
        self.body = nn.Sequential(*parts)
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images, float (N, C, H, W), to logits (N, classes)."""
        return self.head(self.body(self.whiten(images)).amax((2, 3))) / 9


airbench94 = Airbench


def known(name: str) -> str:
    """The same name; ValueError if torchvision has no classifier of it."""
    from torchvision.models import list_models

    if name not in (names := list_models(sys.modules["torchvision.models"])):
        near = difflib.get_close_matches(name, names, n=3)
        raise ValueError(f"torchvision has no classifier {name}, but {', '.join(near or names)}")
    return name


def imagenet_weights(name: str) -> Any:
    """The best ImageNet weights that torchvision has of a classifier; ValueError for an unknown name."""
    from torchvision.models import get_model_weights

    return get_model_weights(known(name)).DEFAULT


def imagenet_size(model: str) -> int | None:
    """The width and height of images, in pixels, that the weights of torchvision:NAME are made for; of others None."""
    kind, _, name = model.partition(":")
    return imagenet_weights(name).transforms().crop_size[0] if kind == "torchvision" else None


class FromImageNet(nn.Module):
    """A torchvision classifier for images of any size, brought to the one that its ImageNet weights are made for."""

    def __init__(self, name: str, classes: int):
        super().__init__()
        self.weights = imagenet_weights(name)
        preset = self.weights.transforms()
        self.size, self.normalisation = preset.crop_size[0], (preset.mean, preset.std)
        self.body = torchvision_model(name, classes, self.size, transform_input=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images normalised as ImageNet's, float (N, 3, H, W), to logits (N, classes)."""
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return self.body(images)


def torchvision_model(name: str, classes: int, image_size: int, transform_input: bool = False) -> nn.Module:
    """A classifier of torchvision with new weights; ValueError for an unknown name.

    transform_input: from ImageNet's normalisation to that of Google's two networks, whose weights are made for it.
    """
    from torchvision.models import get_model

    options: dict[str, Any] = {"image_size": image_size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):  # these would give two or three answers in training
        options = {"aux_logits": False, "init_weights": True, "transform_input": transform_input}
    network = get_model(known(name), num_classes=classes, **options)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):  # 0.0003 to 0.01 in some: short runs would end before it has averaged
            layer.momentum = max(layer.momentum or 0.0, 0.1)
    return network


def from_torchvision(
    name: str, classes: int = 10, channels: int = 3, image_size: int = 32, pretrained: bool = False
) -> nn.Module:
    """A classifier of torchvision; `pretrained`: with room for its ImageNet weights, which load_pretrained fills."""
    if channels != 3:
        raise ValueError(f"torchvision's networks take 3 channels, not {channels}")
    return FromImageNet(name, classes) if pretrained else torchvision_model(name, classes, image_size)


def load_pretrained(network: FromImageNet, classes: list[str], path: str = "") -> None:
    """Load ImageNet weights, or those in the file `path`, into a FromImageNet.

    A file may be torchvision's own or a checkpoint of this program. The classifier stays new, except where that is for
    the same classes. Raises ValueError where there are no weights to be had.
    """
    source = path or network.weights.url
    try:
        if path:
            content = torch.load(path, weights_only=True, map_location="cpu")
        else:
            content = network.weights.get_state_dict(progress=True, check_hash=True)
        own = "classes" in content
        found = content["model"] if own else {f"body.{name}": value for name, value in content.items()}
    except OSError as error:
        if path:
            raise
        reason = getattr(error, "reason", None)  # HTTPError's is no exception but a part of its text
        why = reason if isinstance(reason, Exception) else error
        mend = f"fetch {source} elsewhere and name the file with --init-from"
        raise ValueError(f"the ImageNet weights could not be downloaded ({why}): {mend}") from None
    except Exception as error:
        raise ValueError(f"{source} is damaged or no file of weights") from error
    state = network.state_dict()
    found = {name: value for name, value in found.items() if name in state}
    if not own or content["classes"] != classes:
        found |= head_weights(network)
    if wrong := [name for name in state if name not in found or found[name].shape != state[name].shape]:
        raise ValueError(f"{source} holds another network: {wrong[0]} is missing or of another shape")
    network.load_state_dict(found)
    if own and content["classes"] != classes:
        print(f"note: {source} is for other classes: the last layer starts anew")


def python_file(name: str) -> tuple[str, str]:
    """FILE.py and FACTORY, split at the last colon: C:\\nets.py:small works. ValueError if there is no such file."""
    file, _, factory = name.rpartition(":")
    if not Path(file).is_file() or Path(file).suffix != ".py":
        raise ValueError(f"there is no Python file {file}")
    return file, factory


def from_file(name: str) -> Callable[..., nn.Module]:
    """The factory that FILE.py:FACTORY names: `factory(classes=10, channels=3, image_size=32) -> nn.Module`.

    Raises ValueError if there is no such file, if it fails, or has no such callable.
    """
    file, factory = python_file(name)
    spec: Any = importlib.util.spec_from_file_location(f"network_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in it look themselves up there
    if (beside := str(Path(file).resolve().parent)) not in sys.path:
        sys.path.insert(0, beside)  # as when Python runs the file itself
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it may have a command line of its own
        raise ValueError(f"{file} fails with {error!r}") from error
    if not callable(found := getattr(module, factory, None)):
        raise ValueError(f"{file} has no function or class {factory}")
    return found


def judge(logits: Any, classes: int) -> None:
    """ValueError unless these are what a user's own network has to give for 2 images: logits (2, classes)."""
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"it gives a {type(logits).__name__}, not a tensor with a number for each class")
    if (shape := tuple(logits.shape)) != (2, classes):
        raise ValueError(f"2 images give {shape}, not (2, {classes}): a number for each class")
    if (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-5:
        raise ValueError("it ends in a softmax, but the loss has one: leave it out")


def try_training(network: nn.Module, name: str, shape: tuple[int, ...], batch: int) -> None:
    """ValueError unless a user's own network, `name`, can be trained on images of that shape, (C, H, W)."""

    def learn(count: int) -> None:
        logits = network.train()(torch.zeros(count, *shape))
        if not isinstance(logits, torch.Tensor):
            raise ValueError(f"it gives a {type(logits).__name__}, not a tensor")
        if not logits.requires_grad:
            raise ValueError("it has no weights, all are frozen, or it computes without gradients")
        logits.sum().backward()

    before = {key: value.clone() for key, value in network.state_dict().items()}  # batch norm will have moved
    try:
        with contextlib.suppress(Exception):
            return learn(2)
        learn(batch)  # ghost batch norm, say, takes only certain numbers of images
    except Exception as error:
        if "out of memory" in str(error):  # the training finds out how much it can do at once
            return
        why = str(error) if isinstance(error, (ValueError, RuntimeError)) else repr(error)
        raise ValueError(f"{why}{hint(error, name, shape[-1])}") from error
    finally:
        network.zero_grad(set_to_none=True)
        network.load_state_dict(before)


def hint(error: BaseException, name: str, image_size: int) -> str:
    """What else there is to say when a network failed: the line of FILE.py, or the size that torchvision:NAME needs."""
    if name.startswith("torchvision:") and not isinstance(error, ValueError):  # that says what it needs
        size = imagenet_size(name) or 0
        return f" (it is made for images of {size} pixels: try a larger --image-size)" if size > image_size else ""
    file = Path(name.rpartition(":")[0]).resolve()
    places = traceback.extract_tb((error.__cause__ or error).__traceback__)
    lines = [each.lineno for each in places if Path(each.filename).resolve() == file]
    return f" ({file.name}, line {lines[-1]})" if lines else ""
