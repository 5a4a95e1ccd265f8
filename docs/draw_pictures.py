"""Draw the pictures of docs/how-it-works.md, with a model of the default recipe.

    python image_classification.py
    python docs/draw_pictures.py --checkpoint model_cnn.pth

Writes stages.png, receptive_fields.png, learning_rate.png and whitening.png beside this file, in
some seconds.
"""

import argparse
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

import image_classification as ic
from classifier.config import Config
from classifier.datasets.dataset import Dataset

DPI = 100
BLUE, ORANGE = "#1f77b4", "#ff7f0e"
STAGE_NAMES = ("first layer", "stage 1", "stage 2", "stage 3")
NUM_MAPS = 4  # feature maps that are shown of each stage
NUM_PATCHES = 2000  # dots in the picture of whitening


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def show_image(axes: Axes, image: torch.Tensor) -> None:
    """image: uint8 (3, H, W)."""
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_axis_off()


# ---- An image through the stages -----------------------------------------------------------------


def draw_stages(model: nn.Module, image: torch.Tensor, classes: list[str]) -> Figure:
    """An image, its strongest feature maps after each stage, and the probabilities of the classes.

    model: the network cnn in eval mode. image: uint8 (3, H, W).
    """
    maps, probabilities = feature_maps(model, image)
    figure = new_figure(11, 4.4)
    widths = [1.2, 5, 1.8]
    left, middle, right = figure.subfigures(1, 3, squeeze=False, width_ratios=widths)[0]

    axes = left.subplots()
    show_image(axes, image)
    axes.set_title(f"image\n{tuple(image.shape)}", fontsize=9)

    grid = middle.subplots(NUM_MAPS, len(maps), squeeze=False)
    for column, (name, stage_maps) in enumerate(zip(STAGE_NAMES, maps, strict=True)):
        strongest = stage_maps.flatten(1).std(1).argsort(descending=True)[:NUM_MAPS]
        for row, index in enumerate(strongest.tolist()):
            grid[row, column].imshow(stage_maps[index].numpy(), cmap="gray")
            grid[row, column].set_axis_off()
        grid[0, column].set_title(f"{name}\n{tuple(stage_maps.shape)}", fontsize=9)

    axes = right.subplots()
    axes.barh(classes, 100 * probabilities.numpy(), color=BLUE)
    axes.invert_yaxis()
    axes.set_title("softmax, %", fontsize=9)
    axes.tick_params(labelsize=8)
    return figure


def feature_maps(model: nn.Module, image: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the first layer and each stage make of an image, and the probabilities.

    Returns float32 (channels, H, W) for each, and float32 (classes,).
    """
    with torch.no_grad():
        x = ic.normalise(image[None], model)
        logits = model(x)
        x = F.silu(model.get_submodule("whiten")(x))
        maps = [x[0]]
        for stage in model.get_submodule("stages").children():
            x = stage(x)
            maps.append(x[0])
    return maps, logits.softmax(1)[0]


# ---- Receptive fields ----------------------------------------------------------------------------


def receptive_fields(num_stages: int = 3) -> list[int]:
    """Width in pixels of what one value has seen, after the first layer and after each stage.

    A convolution of k pixels sees k - 1 steps further, max-pooling one step further; then a step is
    twice as long.
    """
    size = 2  # the first layer's filters
    step = 1
    sizes = [size]
    for _ in range(num_stages):
        size += 2 * step  # convolution of 3 pixels
        size += step  # max-pooling of 2 pixels
        step *= 2
        size += 2 * step  # convolution of 3 pixels
        sizes.append(size)
    return sizes


def draw_receptive_fields(image: torch.Tensor) -> Figure:
    """An image with a frame around what a value in its middle has seen, for each stage."""
    sizes = receptive_fields()
    figure = new_figure(9, 2.7)
    middle = image.shape[-1] / 2 - 0.5
    for axes, name, size in zip(figure.subplots(1, len(sizes)), STAGE_NAMES, sizes, strict=True):
        show_image(axes, image)
        corner = (middle - size / 2, middle - size / 2)
        frame = Rectangle(corner, size, size, fill=False, edgecolor=ORANGE, linewidth=2.5)
        axes.add_patch(frame)
        reach = max(sizes) / 2 + 1
        axes.set_xlim(middle - reach, middle + reach)
        axes.set_ylim(middle + reach, middle - reach)
        axes.set_title(f"{name}: {size} × {size}", fontsize=10)
    return figure


# ---- The learning rate ---------------------------------------------------------------------------


def draw_learning_rate() -> Figure:
    """The learning rate over the default run, and how large the images are."""
    recipe = ic.DEFAULT_RECIPE
    fractions = [step / 1000 for step in range(1000)]
    rates = [recipe["lr"] * ic.lr_factor(recipe["scheduler"], each, []) for each in fractions]
    scales = [ic.scale_schedule(each, recipe["progressive_resizing"]) for each in fractions]

    figure = new_figure(7, 3)
    axes = figure.subplots()
    axes.plot([recipe["epochs"] * each for each in fractions], rates, color=BLUE, linewidth=2)
    for scale in sorted(set(scales)):
        first = recipe["epochs"] * fractions[scales.index(scale)]
        side = round(32 * scale)
        axes.axvline(first, color="gray", linestyle=":")
        axes.text(first + 0.1, 0.127, f"{side} × {side} pixels", fontsize=9, color="gray")
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    axes.set_xlim(0, recipe["epochs"])
    axes.set_ylim(0, 0.137)
    return figure


# ---- Whitening -----------------------------------------------------------------------------------


def draw_whitening(images: torch.Tensor) -> Figure:
    """Neighbouring pixels before whitening, two components after it, and the filters.

    images: normalised, float (N, 3, H, W).
    """
    layer = nn.Conv2d(3, 24, 2, bias=False)
    ic.set_whitening(layer, images)
    filters = layer.weight.detach()[:12]  # the others are the same with the opposite sign
    patches = F.unfold(images, 2).transpose(1, 2).flatten(0, 1)  # (number of patches, 12)
    patches = patches[:: len(patches) // NUM_PATCHES]
    whitened = patches @ filters.flatten(1).T

    figure = new_figure(10, 3.3)
    before, after, right = figure.subfigures(1, 3, squeeze=False)[0]
    green = 4  # of the 12 numbers of a patch: its upper left pixel's green, then the upper right's
    scatter(before.subplots(), patches[:, green], patches[:, green + 1])
    before.suptitle("two neighbouring pixels (green)", fontsize=10)
    scatter(after.subplots(), whitened[:, 0], whitened[:, 1])
    after.suptitle("the first two components", fontsize=10)

    grid = right.subplots(3, 4)
    for axes, weights in zip(grid.flat, filters, strict=True):
        show_image(axes, (127.5 + 127.5 * weights / weights.abs().max()).round().to(torch.uint8))
    right.suptitle("the filters: 12 patches of 2 × 2 pixels", fontsize=10)
    return figure


def scatter(axes: Axes, x: torch.Tensor, y: torch.Tensor) -> None:
    axes.scatter(x.numpy(), y.numpy(), s=2, color=BLUE, alpha=0.5)
    axes.set_aspect("equal")
    axes.set_xlim(-4, 4)
    axes.set_ylim(-4, 4)
    axes.grid(alpha=0.3)


# ---- All of them ---------------------------------------------------------------------------------


def draw_all(model: nn.Module, data: Dataset, number: int) -> dict[str, Figure]:
    """The figures by the names of their files. number: of the test image that they show."""
    image = data.test.images[number]
    sample = ic.normalise(data.train.images[:500], model)
    return {
        "stages": draw_stages(model, image, data.classes),
        "receptive_fields": draw_receptive_fields(image),
        "learning_rate": draw_learning_rate(),
        "whitening": draw_whitening(sample),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="model_cnn.pth", help="(default: model_cnn.pth)")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is (default: data)")
    parser.add_argument("--image", type=int, default=0, help="number of a test image (default: 0)")
    options = parser.parse_args()

    model, _ = ic.load_checkpoint(options.checkpoint)
    data = ic.load_data(Config(dataset="cifar10", data_dir=options.data_dir))
    for name, figure in draw_all(model, data, options.image).items():
        figure.savefig(DOCS / f"{name}.png")


if __name__ == "__main__":
    main()
