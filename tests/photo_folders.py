"""Folders of images that a split can get wrong: near copies, random labels, folders that grow."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def scene(random: np.random.Generator, size=(48, 36)) -> Image.Image:
    """A picture with large shapes, unlike all others."""
    coarse = random.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def photographed_again(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """The same picture with noise of ±3."""
    pixels = np.asarray(picture).astype(int)
    noisy = pixels + random.integers(-3, 4, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def compressed(picture: Image.Image, quality: int) -> bytes:
    """A picture as a JPEG."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_scenes(folder: Path, num_scenes: int, shots=5, seed=0, classes=("a", "b")) -> None:
    """Scenes that were photographed several times, each in a class by chance.

    Shots of a scene have names that say so: 7-0.png, 7-1.png and so on.
    """
    random = np.random.default_rng(seed)
    for number in range(num_scenes):
        picture = scene(random)
        place = folder / classes[random.integers(len(classes))]
        place.mkdir(parents=True, exist_ok=True)
        for shot in range(shots):
            photographed_again(picture, random).save(place / f"{number}-{shot}.png")


def write_cards(folder: Path, num_cards: int, shots=5, seed=0, size=(48, 36)) -> None:
    """Plain cards with one disc, photographed several times; named as by `write_scenes`."""
    random = np.random.default_rng(seed)
    radius = size[1] // 7
    for number in range(num_cards):
        card = Image.new("RGB", size, tuple(random.integers(60, 256, 3).tolist()))
        x, y = (int(random.integers(radius, side - radius)) for side in size)
        color = tuple(random.integers(0, 256, 3).tolist())
        corners = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(card).ellipse(corners, fill=color)
        place = folder / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        for shot in range(shots):
            photographed_again(card, random).save(place / f"{number}-{shot}.png")


def write_jpegs(folder: Path, num_scenes=200, qualities=(95, 80, 60), seed=0) -> None:
    """Scenes that are there as JPEGs of several qualities, each in one of two classes by chance."""
    random = np.random.default_rng(seed)
    for number in range(num_scenes):
        picture = scene(random)
        place = folder / "ab"[random.integers(2)]
        place.mkdir(parents=True, exist_ok=True)
        for quality in qualities:
            (place / f"{number}-{quality}.jpg").write_bytes(compressed(picture, quality))


def write_noise(folder: Path, counts: dict[str, int], seed=0, name="{}.png") -> None:
    """Pictures of noise, in which nothing tells the classes apart.

    name: of a file; {} is its number in its class.
    """
    random = np.random.default_rng(seed)
    for label, count in counts.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = random.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / name.format(number))


def scene_of(path: str) -> str:
    """The class and number of the scene in a file's path."""
    return str(Path(path).parent / Path(path).stem.partition("-")[0])
