"""The networks of the projects that this one replaces, and airbench94's: --model NAME.

Each factory takes `classes`, `channels` and `image_size`, and some take `dropout`. Its network
turns normalised images, float (N, channels, image_size, image_size), into logits (N, classes).

Layers draw their initial weights when they are created: another order would change every result.
"""

import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from classifier.errors import UserError


def require_size(model: str, smallest: int, image_size: int) -> None:
    """Raise UserError for images of less than `smallest` pixels."""
    if image_size < smallest:
        raise UserError(
            f"--model {model} needs images of {smallest} pixels or more, not {image_size}: "
            "try a larger --image-size"
        )


def conv_blocks(widths: list[int]) -> list[nn.Module]:
    """3×3 convolution, batch norm, ReLU, 2×2 max-pooling, for each pair of neighbouring widths."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return layers


def beginner_cnn(
    classes: int = 10, channels: int = 3, image_size: int = 32, dropout: float = 0.5
) -> nn.Module:
    """Reference 002's network: blocks of 32 and 64 channels, a hidden layer of 128.

    545,290 parameters for CIFAR-10.
    """
    require_size("beginner-cnn", 4, image_size)
    return nn.Sequential(
        *conv_blocks([channels, 32, 64]),
        nn.Flatten(),
        nn.Linear(64 * (image_size // 4) ** 2, 128),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(128, classes),
    )


def coursework_cnn(
    classes: int = 10, channels: int = 3, image_size: int = 32, dropout: float = 0.5
) -> nn.Module:
    """Reference 000's network, rebuilt from the sizes under its table of layers.

    685,962 parameters for CIFAR-10.
    """
    require_size("coursework-cnn", 16, image_size)
    return nn.Sequential(
        *conv_blocks([channels, 32, 64, 128, 256]),
        nn.Flatten(),
        nn.Linear(256 * (image_size // 16) ** 2, 256),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(128, classes),
    )


def notebook_cnn(
    classes: int = 10, channels: int = 3, image_size: int = 32, dropout: float = 0.25
) -> nn.Module:
    """Reference 004's network: convolutions of 16 and 32 channels, a hidden layer of 512."""
    require_size("notebook-cnn", 4, image_size)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(32 * (image_size // 4) ** 2, 512),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(512, classes),
    )


def fcn(
    classes: int = 10, channels: int = 3, image_size: int = 32, dropout: float = 0.25
) -> nn.Module:
    """Reference 000's `model_fcn`: fully connected, without a convolution."""
    widths = [channels * image_size**2, 1024, 512]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [
            nn.Linear(inputs, outputs, bias=False),
            nn.BatchNorm1d(outputs),
            nn.ReLU(),
            nn.Dropout(dropout),
        ]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


class GlobalFilter(nn.Module):
    """Multiply the spectrum of each channel by a learned filter, then mix the channels; residual.

    A product of spectra is a circular convolution over the whole image (Rao et al., 2021, Global
    Filter Networks).

    Attributes:
        weight: the filters, (width, size, 2 * (size // 2 + 1)): real and imaginary parts in turns.
            In three dimensions, because Muon takes a tensor of four for a convolution.
        norm: batch norm of the input.
        mix: two 1×1 convolutions.
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(width, size, (size // 2 + 1) * 2))
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, width, size, size) to the same shape."""
        with torch.autocast(x.device.type, enabled=False):  # no FFT in bf16
            filters = torch.view_as_complex(self.weight.unflatten(2, (-1, 2)))
            spectrum = torch.fft.rfft2(self.norm(x.float()), norm="ortho")
            filtered = torch.fft.irfft2(spectrum * filters, s=x.shape[-2:], norm="ortho")
        return x + self.mix(filtered)


def fftnet(classes: int = 10, channels: int = 3, image_size: int = 32) -> nn.Module:
    """Reference 000's `fftnet`: 2×2 patches, then six filters in the frequency domain."""
    require_size("fftnet", 4, image_size)
    filters = [GlobalFilter(128, image_size // 2) for _ in range(6)]
    classifier = nn.Linear(128, classes)
    patches = nn.Conv2d(channels, 128, 2, stride=2)
    return nn.Sequential(
        patches,
        *filters,
        nn.BatchNorm2d(128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        classifier,
    )


def convnet(classes: int = 10, channels: int = 3, image_size: int = 32) -> nn.Module:
    """Reference 000's `convnet`: stages of 64, 128 and 256 channels, of two convolutions each."""
    require_size("convnet", 8, image_size)
    widths = [channels, 64, 128, 256]
    layers: list[nn.Module] = []
    for inputs, width in itertools.pairwise(widths):
        layers += [
            nn.Conv2d(inputs, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)
    )


def resnet(name: str, classes: int = 10, channels: int = 3, image_size: int = 32) -> nn.Module:
    """torchvision's ResNet (He et al., 2015) with a stem for small images: 3×3, no downsampling.

    It takes images of any size.
    """
    from torchvision import models

    network = models.get_model(name, num_classes=classes)
    network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


class BasicBlock(nn.Module):
    """Reference 003's residual block, with dropout after the first of two convolutions.

    Attributes:
        body: the two convolutions.
        shortcut: empty, or a 1×1 convolution where the block halves the size.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18_dropout(
    classes: int = 10, channels: int = 3, image_size: int = 32, dropout: float = 0.1
) -> nn.Module:
    """Reference 003's ResNet-18 with dropout.

    Its last layer is a 1×1 convolution, whose output is averaged over the image.
    """
    require_size("resnet18-dropout", 8, image_size)
    layers: list[nn.Module] = [
        nn.Conv2d(channels, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Dropout(dropout),
    ]
    for inputs, outputs, stride in [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]:
        layers.append(BasicBlock(inputs, outputs, stride, dropout))
        layers.append(BasicBlock(outputs, outputs, 1, dropout))
    final_size = math.ceil(image_size / 8)
    return nn.Sequential(
        *layers, nn.Conv2d(512, classes, 1), nn.AvgPool2d(final_size), nn.Flatten()
    )


class Airbench(nn.Module):
    """The network of KellerJordan/cifar10-airbench's airbench94_muon.py (Jordan, 2024).

    2×2 patches, whitened by fixed filters of both signs; three blocks of two convolutions, 64, 256
    and 256 channels wide, with GELU and with batch norm that has no scale; the maximum over what
    remains of the image; a linear layer, whose output is divided by 9, as in the paper.

    Attributes:
        whiten: the whitening filters: not trained, the caller sets them from the training images.
        body: the three blocks.
        head: the linear layer.
    """

    def __init__(self, classes: int = 10, channels: int = 3, image_size: int = 32):
        super().__init__()
        require_size("airbench94", 9, image_size)
        self.whiten = nn.Conv2d(channels, 8 * channels, 2)
        self.whiten.weight.requires_grad_(False)
        widths = [8 * channels, 64, 256, 256]
        layers: list[nn.Module] = [nn.GELU()]
        for inputs, width in itertools.pairwise(widths):
            layers += [dirac_conv(inputs, width), nn.MaxPool2d(2), unscaled_norm(width), nn.GELU()]
            layers += [dirac_conv(width, width), unscaled_norm(width), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images, float (N, C, H, W), to logits (N, classes)."""
        features = self.body(self.whiten(images)).amax((2, 3))
        return self.head(features) / 9


def dirac_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3×3 convolution whose first `inputs` filters pass the input through at first."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[:inputs])
    return convolution


def unscaled_norm(width: int) -> nn.BatchNorm2d:
    """Batch norm whose scale stays 1."""
    norm = nn.BatchNorm2d(width, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
FACTORIES: dict[str, Callable[..., nn.Module]] = {
    "beginner-cnn": beginner_cnn,
    "coursework-cnn": coursework_cnn,
    "notebook-cnn": notebook_cnn,
    "fcn": fcn,
    "fftnet": fftnet,
    "convnet": convnet,
    **{name: functools.partial(resnet, name) for name in RESNETS},
    "resnet18-dropout": resnet18_dropout,
    "airbench94": Airbench,
}
