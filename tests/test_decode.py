"""Image files of all kinds as squares of pixels."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classifier.datasets import decode
from classifier.datasets.pixel_range import PixelRange

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


# ---- damaged metadata ----

JUNK = b"no exif at all"
EXIF_ENTRIES = [
    struct.pack("<HHI4s", 0x011A, 2, 3, b"72"),  # XResolution, as text
    struct.pack("<HHII", 0x0112, 3, 1, 6),  # Orientation: to be turned by 90 degrees clockwise
]
TURNED_WITH_TEXT_AS_RESOLUTION = (
    b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(EXIF_ENTRIES) + bytes(4)
)


def png_chunk(name, data, is_sound=True):
    checksum = zlib.crc32(name + data) if is_sound else 0
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def jpeg_segment(marker, data):
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


PNG_CHUNKS = {
    "EXIF": png_chunk(b"eXIf", JUNK),
    "EXIF, checksum": png_chunk(b"eXIf", b"II*\0", is_sound=False),
    "text, checksum": png_chunk(b"tEXt", b"a\0b", is_sound=False),
    "text, method": png_chunk(b"zTXt", b"a\0\5b"),
    "text, large": png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))),
    "colour profile": png_chunk(b"iCCP", b"name"),
    "resolution": png_chunk(b"pHYs", b"\0"),
    "gamma": png_chunk(b"gAMA", b"\0"),
    "XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe"),
}
JPEG_SEGMENTS = {
    "EXIF": jpeg_segment(0xE1, b"Exif\0\0" + JUNK),
    "EXIF, short": jpeg_segment(0xE1, b"Exif\0\0II*\0"),
    "XMP": jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta junk"),
    "colour profile": jpeg_segment(0xE2, b"ICC_PROFILE\0\1"),
    "Photoshop": jpeg_segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
    "Adobe": jpeg_segment(0xEE, b"Adobe"),
    "JFIF": jpeg_segment(0xE0, b"JFIF"),
    "comment": jpeg_segment(0xFE, b"\xff\xfe"),
    "many pictures": jpeg_segment(0xE2, b"MPF\0junk"),
}


def with_metadata(format, part):
    """An image file with this part after its header, and the same image without it."""
    plain = io.BytesIO()
    Image.fromarray(upper_half(200)).save(plain, format)
    content = plain.getvalue()
    header = 33 if format == "png" else 2
    return content[:header] + part + content[header:], content


@pytest.mark.parametrize("part", PNG_CHUNKS.values(), ids=PNG_CHUNKS)
def test_png_with_damaged_metadata(folder, part):
    check_same_image(folder, *with_metadata("png", part))


@pytest.mark.parametrize("part", JPEG_SEGMENTS.values(), ids=JPEG_SEGMENTS)
def test_jpeg_with_damaged_metadata(folder, part):
    check_same_image(folder, *with_metadata("jpeg", part))


def check_same_image(folder, content, plain):
    # without an extension, a file is known by its content
    (folder / "damaged").write_bytes(content)
    (folder / "plain").write_bytes(plain)
    expected = decode.decode(folder / "plain", 32).pixels
    assert np.array_equal(decode.decode(folder / "damaged", 32).pixels, expected)
    assert decode.image_size(folder / "damaged") == (40, 60)


def test_webp_with_damaged_exif(folder):
    Image.fromarray(upper_half(200)).save(folder / "image.webp", exif=JUNK, lossless=True)
    upper, lower = brightness_of_halves(folder / "image.webp")
    assert abs(upper - 200) < 6 and lower < 5


def test_orientation_is_read_beside_damaged_metadata(folder):
    """Neither the resolution nor the colour profile is needed to turn the image."""
    plain = io.BytesIO()
    Image.fromarray(upper_half(200)).rotate(90, expand=True).save(plain, "jpeg")
    exif = jpeg_segment(0xE1, TURNED_WITH_TEXT_AS_RESOLUTION)
    for part in (exif, exif + JPEG_SEGMENTS["colour profile"]):
        (folder / "image.jpg").write_bytes(plain.getvalue()[:2] + part + plain.getvalue()[2:])
        upper, lower = brightness_of_halves(folder / "image.jpg")
        assert abs(upper - 200) < 6 and lower < 5


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_damaged_pixels_are_an_error_with_and_without_metadata(folder, format):
    part = PNG_CHUNKS["resolution"] if format == "png" else JPEG_SEGMENTS["Adobe"]
    for content in with_metadata(format, part):
        (folder / "image").write_bytes(content[: len(content) // 2])
        with pytest.raises((OSError, ValueError, SyntaxError)):
            decode.decode(folder / "image", 32)


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
    ("maximum", "expected"), [(1.0, 255), (255.0, 255), (1000.0, 249), (65535.0, 255), (1e6, 255)]
)
def test_image_without_a_data_set_decides_on_its_range(folder, maximum, expected):
    grey = (upper_half(1)[..., 0] * maximum).astype(np.float32)
    Image.fromarray(grey).save(folder / "image.tiff")
    upper, lower = brightness_of_halves(folder / "image.tiff")
    assert abs(upper - expected) < 1
    assert lower < 1


def test_range_of_a_data_set(folder):
    grey = upper_half(1)[..., 0].astype(np.float32) * 1000
    Image.fromarray(grey).save(folder / "image.tiff")
    decoded = decode.decode(folder / "image.tiff", 32, {"floats": PixelRange(0, 4000)})
    assert decoded.extrema == ("floats", 0, 1000)
    assert decoded.used_range == (0, 4000)
    assert decoded.pixels.max() == 64
    of_others = decode.decode(folder / "image.tiff", 32, {"integers": PixelRange(0, 4000)})
    assert of_others.used_range == (0, 1023)


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
    assert one.pixel_digest == other.pixel_digest == decode.hash64(one.pixels.tobytes())
    assert one.pixel_digest != near.pixel_digest


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


def test_large_file_that_is_no_image_is_not_read_whole(folder, monkeypatch):
    with (folder / "photos.tar").open("wb") as file:
        file.truncate(2**33)  # takes no space on the disk

    def read_whole(path):
        pytest.fail(f"{path} was read")

    monkeypatch.setattr(Path, "read_bytes", read_whole)
    assert not decode.is_image(folder / "photos.tar")
    assert not decode.counts_as_image(folder / "photos.tar")


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
