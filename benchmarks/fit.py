"""Which --fit is best for photographs whose object stands anywhere, or in the middle?

    python benchmarks/fit.py --runs 3
    python benchmarks/fit.py --runs 3 --where middle

Makes photographs of 3:2, 2:3, 16:9 and 1:1, about as many of each: an image of CIFAR-10 on a larger
canvas with a texture that says nothing. Its place along the longer side is by chance, or with
--where middle the middle, as a photographer puts it. Trains with each --fit, several seeds,
alternating. Prints a Markdown table; writes results/fit_WHERE.json with every run.
"""

import functools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import mean_and_std
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(harness.SCRIPT.parent))
import image_classification as ic
from classifier.config import FITS
from classifier.datasets.dataset import Split

SHORTER_SIDE = 48  # pixels, of a photograph; its object has 32
SHAPES = [(3, 2), (2, 3), (16, 9), (1, 1)]  # width to height
TRAINING = "default --width 0.5 --image-size 48 --epochs 12"


def size_of(shape: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels of a photograph of this shape."""
    width, height = (SHORTER_SIDE * side // min(shape) for side in shape)
    return width, height


def photograph(
    thing: np.ndarray, shape: tuple[int, int], where: str, random: np.random.Generator
) -> Image.Image:
    """An object on a canvas with a texture.

    thing: uint8 (32, 32, 3). where: "anywhere" along the longer side, or in the "middle" of it.
    """
    size = size_of(shape)
    coarse = random.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    canvas = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    noise = random.integers(-25, 26, (size[1], size[0], 3))
    noisy = (np.asarray(canvas) + noise).clip(0, 255).astype(np.uint8)
    canvas = Image.fromarray(noisy)

    free = [side - len(thing) for side in size]
    place = [int(random.integers(0, pixels + 1)) for pixels in free]
    if where == "middle":
        longer = int(np.argmax(size))
        place[longer] = free[longer] // 2
    canvas.paste(Image.fromarray(thing), (place[0], place[1]))
    return canvas


def make_photographs(
    folder: Path, images: Split, classes: list[str], where: str, seed: int
) -> None:
    """Write a photograph of each image, uint8 (N, 3, 32, 32), into the folder of its class."""
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
    things = images.images.permute(0, 2, 3, 1).numpy()
    labels = images.labels.tolist()
    for i, thing in enumerate(tqdm(things, "Drawing", leave=False, disable=None)):
        shape = SHAPES[int(random.integers(len(SHAPES)))]
        picture = photograph(thing, shape, where, random)
        picture.save(folder / classes[labels[i]] / f"{i:05d}.png", compress_level=1)


def train(fit: str, seed: int, photos: Path, decoded: Path) -> dict[str, Any]:
    """Train and test once. decoded: a folder for the decoded images."""
    variant = f"{TRAINING} --dataset {photos} --fit {fit}"
    return {"fit": fit, **harness.run(variant, seed, str(decoded))}


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, with a row for each --fit."""
    rows = []
    for fit, runs in harness.group_by(results, "fit").items():
        accuracies = [run["test_accuracy"] for run in runs]
        seconds = statistics.mean(run["epochs"][-1]["seconds"] for run in runs)
        rows.append([f"`{fit}`", mean_and_std(accuracies, 100), f"{seconds:.0f}", str(len(runs))])
    return harness.markdown_table("`--fit` | test accuracy, % | training, s | runs", rows)


def main() -> None:
    parser = harness.new_parser(__doc__, runs=3)
    where = "where the object is along the longer side: anywhere (default) or middle"
    parser.add_argument("--where", default="anywhere", choices=["anywhere", "middle"], help=where)
    images = "photographs to train on (default: 3000); there are 2,000 to test with"
    parser.add_argument("--images", type=int, default=3000, metavar="N", help=images)
    options = parser.parse_args()
    config = ic.Config(dataset="cifar10", data_dir=options.data_dir, subset=options.images)
    data = ic.load_data(config)
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name, "photos")
        test = data.test.first(2000)
        make_photographs(photos / "train", data.train, data.classes, options.where, seed=0)
        make_photographs(photos / "test", test, data.classes, options.where, seed=1)
        run = functools.partial(train, photos=photos, decoded=Path(name, "decoded"))
        results = harness.run_in_turns(f"fit_{options.where}", FITS, options.runs, run)
    print(table(results))


if __name__ == "__main__":
    main()
