"""How somebody who gets a model file uses it: the section "Use" of a model card."""

from pathlib import Path
from typing import Any

from classifier.cli import command_line
from classifier.config import is_custom_model
from classifier.datasets.fitting import GREY
from classifier.foreign_paths import without_folders
from classifier.markup import code_block
from classifier.text import escape_control_characters

# Prepares an image as the program does, and turns logits into confidences.
ONNX_EXAMPLE = """
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession({file})
metadata = session.get_modelmeta().custom_metadata_map
classes, size, temperature = (
    json.loads(metadata[name]) for name in ("classes", "image_size", "temperature")
)
image = ImageOps.exif_transpose(Image.open("cat.jpg")).convert("RGB")
{prepare}
powers = np.exp((logits[0] - logits.max()) / (temperature or 1))
for i in (-powers).argsort()[:3]:
    print(classes[i], powers[i] / powers.sum())
"""

# How images become squares, by --fit: in words, and in the example.
FITS = {
    "crop": (
        "the middle square, resized bicubically to {size} × {size} pixels",
        "image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)  # the middle square",
    ),
    "pad": (
        f"all of it, resized bicubically until it fits into {{size}} × {{size}} pixels, with a "
        f"border of grey ({GREY} of 255)",
        f"image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, ({GREY},) * 3)",
    ),
    "stretch": (
        "all of it, resized bicubically to {size} × {size} pixels, whatever its shape",
        "image = image.resize((size, size), Image.Resampling.BICUBIC)",
    ),
}
RUN_ON_BATCH = """
images = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255  # (1, 3, size, size)
(logits,) = session.run(["logits"], {"images": images})
"""
RUN_ON_PHOTOGRAPH = """
(logits,) = session.run(["logits"], {"image": np.asarray(image)})  # uint8 (H, W, 3)
"""


def shell_command(words: list[str]) -> str:
    return escape_control_characters(command_line(words))


def fit_of(content: dict[str, Any]) -> str:
    """How images become squares; a file of an older version does not tell, and means crop."""
    fit = content["config"].get("fit")
    return fit if fit in FITS else "crop"


def usage_section(content: dict[str, Any], file: Path, raw: bool) -> str:
    """How to classify an image: with the program, and with ONNX Runtime."""
    name = file.name
    settings = without_folders(content["config"])
    options = []
    if is_custom_model(settings.get("model") or ""):
        options = ["--model", settings["model"]]
    parts = ["## Use"]
    if file.suffix.lower() == ".pt2":
        code = f"import torch\n\nnetwork = torch.export.load({name!r}).module()"
        parts += [
            "Without the program, with PyTorch. The network takes float32 `(N, 3, H, W)` in "
            "[0, 1], and returns logits, `(N, classes)`.",
            code_block(code, "python"),
        ]
        return "\n\n".join(parts)
    command = shell_command(["python", "inference.py", "--checkpoint", name, *options, "cat.jpg"])
    parts += ["With the program that trained it:", code_block(command)]
    onnx_file = name
    if file.suffix.lower() != ".onnx":
        onnx_file = f"{file.stem}.onnx"
        command = shell_command(["python", "export.py", "--checkpoint", name, *options])
        parts += [
            "Without the program, with ONNX Runtime, the model has to be an ONNX file. This makes "
            "one:",
            code_block(command),
        ]
    prepare = RUN_ON_PHOTOGRAPH.strip()
    if not raw:
        _, to_square = FITS[fit_of(content)]
        prepare = to_square + RUN_ON_BATCH.rstrip()
    parts += [
        "With ONNX Runtime (`pip install onnxruntime pillow`):",
        code_block(ONNX_EXAMPLE.format(file=repr(onnx_file), prepare=prepare), "python"),
    ]
    return "\n\n".join(parts)
