"""Take a trained model elsewhere: ONNX, for phones, browsers and any language, or PyTorch's own exported program.

    python export.py                                      the newest model, beside it as .onnx
    python export.py --checkpoint model_cnn.pth --int8    and a smaller, faster one of 8-bit numbers
    python export.py --format pt2

Input: `images`, float32 (N, 3, H, W) in [0, 1], RGB, any N. Output: `logits`, float32 (N, classes). The normalisation
is inside. What else one has to know is in the file: classes, image size, how to resize, temperature of the confidence.
"""

import io
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from inference import Classifier, InferenceError, load_its_data, load_model, newest_checkpoint, parser, run

CHECKED = 1000  # images on which an export is compared with PyTorch
TOLERANCE = 1e-3  # of logits
RESIZE = "the middle square of the image, resized bicubically to image_size x image_size; RGB, divided by 255"


def deployable(network: Any) -> Any:
    """The network with its normalisation: an nn.Module from float32 (N, 3, H, W) in [0, 1] to logits (N, classes)."""
    import torch

    import image_classification as ic

    class Deployable(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Any) -> Any:
            return self.network(ic.normalise(images * 255, self.network))

    return Deployable().eval()


def described(model: Classifier) -> dict[str, str]:
    """What a file of ours tells about itself, each value as JSON."""
    about = {
        "classes": model.classes, "image_size": model.image_size, "resize": RESIZE, "dataset": model.dataset,
        "test_accuracy": model.test_accuracy, "temperature": model.temperature,
    }  # fmt: skip
    return {key: json.dumps(value) for key, value in about.items()}


def to_onnx(module: Any, size: int, about: dict[str, str]) -> bytes:
    """An ONNX file of a deployable module for images of `size` pixels, with `about` as its metadata."""
    import onnx
    import torch

    batch = {"images": {0: torch.export.Dim("batch")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (torch.zeros(2, 3, size, size),), input_names=["images"], output_names=["logits"],
            dynamic_shapes=batch, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    assert program is not None
    onnx.helper.set_model_props(proto := program.model_proto, about)
    return proto.SerializeToString()


def to_pt2(module: Any, size: int, about: dict[str, str]) -> bytes:
    """A file for torch.export.load, with `about` as classification.json among its extra files."""
    import torch

    batch = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(module, (torch.zeros(2, 3, size, size),), dynamic_shapes=batch)
    torch.export.save(program, buffer := io.BytesIO(), extra_files={"classification.json": json.dumps(about)})
    return buffer.getvalue()


def check(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference of two sets of logits (N, classes).

    Raises InferenceError if it is above TOLERANCE, or if a class differs where the two best are further apart than
    twice that.
    """
    difference = float(np.abs(expected - found).max())
    second, best = np.sort(expected, 1)[:, -2:].T
    other = (expected.argmax(1) != found.argmax(1)) & (best - second > 2 * difference)
    if not difference <= TOLERANCE or other.any():
        raise InferenceError(f"the export does not compute the same: logits differ by {difference:.2g}")
    return difference


def quantised(path: Path, images: np.ndarray, about: dict[str, str]) -> bytes:
    """The ONNX file with weights and activations of 8 bits, their ranges taken from uint8 images (N, 3, S, S)."""
    import logging

    import onnx
    from onnxruntime import quantization

    logging.disable(logging.WARNING)  # that it quantises no batch norm

    class Batches(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(np.array_split(images, max(1, len(images) // 100)))

        def get_next(self) -> Any:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch.astype(np.float32) / 255}

    with tempfile.TemporaryDirectory() as folder:
        prepared, small = Path(folder, "prepared.onnx"), Path(folder, "small.onnx")
        quantization.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared), str(small), Batches(), per_channel=True, reduce_range=True,  # 7 bits: older CPUs overflow
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        proto = onnx.load(str(small))
    onnx.helper.set_model_props(proto, about)
    return proto.SerializeToString()


def measure(paths: list[Path], images: np.ndarray, labels: np.ndarray) -> list[tuple[float, float]]:
    """Of each ONNX file the accuracy in [0, 1], and the median ms that one image takes; in turns, for a fair race."""
    models = [load_model(path) for path in paths]
    accuracies = [float((model.logits(images).argmax(1) == labels).mean()) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for _ in range(200):
        for taken, model in zip(times, models, strict=True):
            begun = time.perf_counter()
            model.logits(images[:1])
            taken.append(1000 * (time.perf_counter() - begun))
    return list(zip(accuracies, map(statistics.median, times), strict=True))


def main() -> int:
    """Run as from the command line; returns the exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--format", default="onnx", choices=["onnx", "pt2"], help="(default: onnx)")
    arguments.add_argument("--int8", action="store_true", help="an ONNX file of 8-bit numbers as well")
    arguments.add_argument("--out", metavar="FILE", help="(default: beside the model, with .onnx or .pt2)")
    arguments.add_argument("--data-dir", metavar="DIR", help="where its data set is (default: where it was trained)")
    options = arguments.parse_args()
    if options.int8 and options.format != "onnx":
        arguments.error("--int8 is for --format onnx")
    model = load_model(options.checkpoint or newest_checkpoint(), "cpu", options.model)
    if not model.network:
        raise InferenceError(f"{model.path} is exported already")

    import torch

    import image_classification as ic

    size, module, about = model.image_size, deployable(model.network), described(model)
    out = Path(options.out or model.path.with_suffix(f".{options.format}"))
    images = labels = np.random.default_rng(0).integers(0, 256, (CHECKED, 3, size, size), dtype=np.uint8)
    try:
        data = load_its_data(model, options.data_dir)
        part, which = (data.valid, "validation") if len(data.valid.labels) else (data.test, "test")
        images, labels = part.images.numpy(), part.labels.numpy()
    except ic.UserError as error:
        if options.int8:
            raise
        print(f"note: compared on random images, because its data set is not to be had: {error}")

    print(f"Exporting {model.path} to {out}")
    ic.write_atomically(out, (to_onnx if options.format == "onnx" else to_pt2)(module, size, about))
    expected = model.logits(images[:CHECKED])
    try:
        if options.format == "onnx":
            found = load_model(out, "cpu").logits(images[:CHECKED])
        else:
            with torch.no_grad():
                found = torch.export.load(out).module()(torch.from_numpy(images[:CHECKED]) / 255).numpy()
        difference = check(expected, found)
    except InferenceError:
        out.unlink()
        raise
    print(f"Compared with PyTorch on {len(found)} images: logits differ by {difference:.1e} at most, no class does")
    if options.int8:
        small = out.with_name(f"{out.stem}-int8.onnx")
        calibration = data.train.images[torch.randperm(len(data.train.images))[:500]].numpy()
        ic.write_atomically(small, quantised(out, calibration, about | {"test_accuracy": "null"}))  # not tested
        results = measure([out, small], images, labels)
        print(f"\n| file | accuracy on {len(labels)} {which} images | MB | ms an image |\n| --- | --- | --- | --- |")
        for path, (accuracy, milliseconds) in zip([out, small], results, strict=True):
            print(f"| {path.name} | {100 * accuracy:.2f} % | {path.stat().st_size / 1e6:.2f} | {milliseconds:.2f} |")
        if (lost := results[0][0] - results[1][0]) > 0.01:
            small.unlink()
            raise InferenceError(f"8 bits cost this network {100 * lost:.1f} points of accuracy: {small} is not kept")
    print(f"\nUse it: python inference.py --checkpoint {out} IMAGE")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
