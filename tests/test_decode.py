"""Image files of all kinds as squares of pixels."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classifier.datasets import decode

REPOSITORY = Path(__file__).resolve().parent.parent


def upper_half(brightness):
    """An image, uint8 (60, 40, 3), whose upper half is bright."""
    pixels = np.zeros((60, 40, 3), np.uint8)
    pixels[:30] = brightness
    return pixels


def brightness_of_halves(path):
    """Mean brightness of the upper and the lower half, without the edge between them."""
    pixels = decode.decode(path, 32).pixels
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    return pixels[4:14].mean(), pixels[18:].mean()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "LA", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(folder, mode):
    path = folder / "image.tiff"
    image = Image.fromarray(upper_half(255)).convert(mode)
    image.save(path if mode != "P" else path.with_suffix(".png"))
    upper, lower = brightness_of_halves(path if mode != "P" else path.with_suffix(".png"))
    assert upper > 250
    assert lower < 5


def test_exif_orientation_is_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = Image.fromarray(upper_half(200)).rotate(90, expand=True)
    turned.save(folder / "image.jpg", exif=exif)
    upper, lower = brightness_of_halves(folder / "image.jpg")
    assert abs(upper - 200) < 6
    assert lower < 5


def test_middle_square_of_a_wide_image_is_used(folder):
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255
    Image.fromarray(pixels).save(folder / "image.png")
    decoded = decode.decode(folder / "image.png", 20)
    assert decoded.size == (120, 40)  # width, height
    assert decoded.pixels.mean() > 250


def test_size_is_that_of_the_file_though_a_jpeg_is_read_smaller(folder):
    Image.new("RGB", (800, 600), "red").save(folder / "image.jpg")
    decoded = decode.decode(folder / "image.jpg", 16)
    assert decoded.size == (800, 600)
    assert decoded.pixels.shape == (16, 16, 3)


def test_16_bits_a_pixel(folder):
    grey = upper_half(200)[..., 0].astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "image.tiff")
    upper, lower = brightness_of_halves(folder / "image.tiff")
    assert abs(upper - 200) < 6
    assert lower < 5


@pytest.mark.parametrize(
    ("maximum", "expected"), [(1.0, 255), (255.0, 255), (1000.0, 4), (65535.0, 255), (1e6, 255)]
)
def test_range_of_floats_is_guessed(folder, maximum, expected):
    grey = (upper_half(1)[..., 0] * maximum).astype(np.float32)
    Image.fromarray(grey).save(folder / "image.tiff")
    upper, lower = brightness_of_halves(folder / "image.tiff")
    assert abs(upper - expected) < 1
    assert lower < 1


def test_what_is_no_number_is_black(folder):
    grey = upper_half(200)[..., 0].astype(np.float32)
    grey[0, :2] = np.nan, np.inf
    Image.fromarray(grey).save(folder / "image.tiff")
    upper, lower = brightness_of_halves(folder / "image.tiff")
    assert abs(upper - 200) < 6
    assert lower < 5


def test_transparent_parts_are_white(folder):
    pixels = upper_half(200)
    grey = pixels[..., 0]
    alpha = np.where(grey > 0, 255, 0).astype(np.uint8)[..., None]
    Image.fromarray(np.dstack([pixels, alpha])).save(folder / "alpha.webp", lossless=True)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "16 bits.png", transparency=0)
    Image.fromarray(grey).convert("P").save(folder / "palette.png", transparency=0)
    Image.fromarray(grey).save(folder / "grey.png", transparency=0)
    for path in folder.iterdir():
        upper, lower = brightness_of_halves(path)
        assert abs(upper - 200) < 6, path
        assert lower > 250, path


def test_digest_is_of_the_pixels(folder):
    image = Image.fromarray(upper_half(200))
    image.save(folder / "one.png")
    image.save(folder / "other.bmp")
    image.save(folder / "near.jpg", quality=70)
    one, other, near = (
        decode.decode(folder / name, 32) for name in ("one.png", "other.bmp", "near.jpg")
    )
    assert one.digest == other.digest == decode.hash64(one.pixels.tobytes())
    assert one.digest != near.digest


def test_difference_hash_is_similar_for_similar_images():
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((80, 60))
    other = Image.fromarray(255 - small).resize((80, 60))

    def different_bits(first, second):
        first_bits = np.unpackbits(decode.difference_hash(first))
        second_bits = np.unpackbits(decode.difference_hash(second))
        return int((first_bits != second_bits).sum())

    assert decode.difference_hash(image).shape == (32,)
    assert different_bits(image, image.resize((240, 180))) < 20
    assert different_bits(image, other) > 100


def test_hash64_stays_the_same():
    """It is part of the format on disk."""
    assert decode.hash64(b"") == 13020603013274838756
    assert decode.hash64(b"abc") == 6455300059550759896


def test_images_are_known_by_their_content(folder):
    image = Image.new("RGB", (30, 20))
    image.save(folder / "picture", format="png")
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    assert decode.is_image(folder / "picture")
    assert decode.image_size(folder / "picture") == (30, 20)
    for name in ("text.png", "empty.png", "missing.png", "."):
        assert not decode.is_image(folder / name)


def test_image_that_would_fill_the_memory_is_none(folder, monkeypatch):
    Image.new("RGB", (100, 100)).save(folder / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # twice as many are refused
    assert decode.image_size(folder / "image.png") is None


def test_extensions_are_of_formats_that_are_read():
    extensions = decode.extensions()
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tiff"} <= extensions
    assert not {".eps", ".ps", ".wmf", ".mpeg", ".h5", ".txt"} & extensions
    assert "EPS" not in decode.formats()


def test_decode_needs_no_torch():
    code = "import sys; from classifier.datasets import decode; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
