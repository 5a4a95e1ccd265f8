"""Take a trained model elsewhere: ONNX, for phones, browsers and any language, or PyTorch's own exported program.

    python export.py                                      the newest model, beside it as .onnx
    python export.py --checkpoint model_cnn.pth --int8    and a smaller, faster one of 8-bit numbers
    python export.py --format pt2

Input: `images`, float32 (N, 3, H, W) in [0, 1], RGB, any N. Output: `logits`, float32 (N, classes). The normalisation
is inside. What else one has to know is in the file: classes, image size, how to resize, temperature of the confidence.
"""

import io
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnx
    import torch
    from onnxruntime import quantization

    import image_classification as ic
    from inference import Classifier, InferenceError, at_hand, load_its_data, load_model, parser, run
except ImportError as problem:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {problem}: install what this program needs with: pip install -r requirements-extras.txt")
except KeyboardInterrupt:
    sys.exit(130)

CHECKED = 1000  # images on which an export is compared with PyTorch
TOLERANCE = 1e-3  # of logits
BATCH = {"images": {0: torch.export.Dim("batch")}}  # of any size
RESIZE = "the middle square of the image, resized bicubically to image_size x image_size; RGB, divided by 255"


class Deployable(torch.nn.Module):
    """A network with its normalisation: from float32 (N, 3, H, W) in [0, 1] to logits (N, classes)."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(ic.normalise(images * 255, self.network))


def described(model: Classifier) -> dict[str, str]:
    """What a file of ours tells about itself, each value as JSON."""
    about = {
        "classes": model.classes, "image_size": model.image_size, "resize": RESIZE, "dataset": model.dataset,
        "test_accuracy": model.test_accuracy, "temperature": model.temperature,
    }  # fmt: skip
    return {key: json.dumps(value) for key, value in about.items()}


def to_onnx(model: Classifier) -> bytes:
    """The model as an ONNX file, described in its metadata."""
    example = torch.zeros(2, 3, model.image_size, model.image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            Deployable(model.network).eval(), (example,), input_names=["images"], output_names=["logits"],
            dynamic_shapes=BATCH, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    onnx.helper.set_model_props(proto := program.model_proto, described(model))
    return proto.SerializeToString()


def to_pt2(model: Classifier) -> bytes:
    """The model as a file for torch.export.load, described in classification.json among its extra files."""
    example = torch.zeros(2, 3, model.image_size, model.image_size)
    program = torch.export.export(Deployable(model.network).eval(), (example,), dynamic_shapes=BATCH)
    extra_files = {"classification.json": json.dumps(described(model))}
    torch.export.save(program, buffer := io.BytesIO(), extra_files=extra_files)
    return buffer.getvalue()


def check(expected: np.ndarray, found: np.ndarray) -> str:
    """How far two sets of logits (N, classes) are apart, in words; InferenceError if by more than TOLERANCE."""
    difference, others = float(np.abs(expected - found).max()), int((expected.argmax(1) != found.argmax(1)).sum())
    text = f"on {len(found)} images: logits differ by {difference:.1e} at most, the class of {others} images differs"
    if not difference <= TOLERANCE:  # so the class is the same where the two best differ by more than twice that
        raise InferenceError(f"the export does not compute the same as PyTorch {text}")
    return text


def quantised(path: Path, images: np.ndarray) -> bytes:
    """The ONNX file with weights and activations of 8 bits, their ranges taken from uint8 images (N, 3, S, S)."""
    logging.disable(logging.WARNING)  # that it quantises no batch norm
    parts = np.array_split(images, max(1, len(images) // 100))
    batches = ({"images": part.astype(np.float32) / 255} for part in parts)

    class Batches(quantization.CalibrationDataReader):
        def get_next(self) -> Any:
            return next(batches, None)

    about = {each.key: each.value for each in onnx.load(str(path)).metadata_props}
    with tempfile.TemporaryDirectory() as folder:
        prepared, small = Path(folder, "prepared.onnx"), Path(folder, "small.onnx")
        quantization.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared), str(small), Batches(), per_channel=True, reduce_range=True,  # 7 bits: older CPUs overflow
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        proto = onnx.load(str(small))
    onnx.helper.set_model_props(proto, about | {"test_accuracy": "null"})  # not known
    return proto.SerializeToString()


def quantise(whole: Path, small: Path, data: ic.Data) -> None:
    """Write `small`, the ONNX file `whole` in 8 bits, and print what that changes; InferenceError if it costs a lot."""
    generator = torch.Generator().manual_seed(0)
    calibration = data.train.images[torch.randperm(len(data.train.images), generator=generator)[:500]].numpy()
    part, which = (data.valid, "validation") if len(data.valid.labels) else (data.train, "training")
    new = whole.with_name("small.onnx")
    new.write_bytes(quantised(whole, calibration))
    sample = torch.randperm(len(part.labels), generator=generator)[:10_000].sort().values
    images, labels = part.images[sample].numpy(), part.labels[sample].numpy()
    paths = {"float32": whole, "int8": new}
    models = {name: load_model(path) for name, path in paths.items()}
    accuracy = {name: float((model.logits(images).argmax(1) == labels).mean()) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(200):  # in turns, for a fair race
        for name, model in models.items():
            begun = time.perf_counter()
            model.logits(images[:1])
            times[name].append(1000 * (time.perf_counter() - begun))
    print(f"\n| | accuracy on {len(labels)} {which} images | MB | ms an image |\n| --- | --- | --- | --- |")
    for name, path in paths.items():
        size, milliseconds = path.stat().st_size / 1e6, np.median(times[name])
        print(f"| {name} | {100 * accuracy[name]:.2f} % | {size:.2f} | {milliseconds:.2f} |")
    if (lost := accuracy["float32"] - accuracy["int8"]) > 0.01:
        raise InferenceError(f"8 bits cost this network {100 * lost:.1f} points of accuracy: {small} is not written")
    ic.write_atomically(small, new.read_bytes())


def main() -> int:
    """Run as from the command line; returns the exit status."""
    arguments = parser(__doc__, device=False)
    arguments.add_argument("--format", default="onnx", choices=["onnx", "pt2"], help="(default: onnx)")
    arguments.add_argument("--int8", action="store_true", help="an ONNX file of 8-bit numbers as well")
    arguments.add_argument("--out", metavar="FILE", help="(default: beside the model, with .onnx or .pt2)")
    arguments.add_argument("--data-dir", metavar="DIR", help="where its data set is (default: where it was trained)")
    options = arguments.parse_args()
    if options.int8 and options.format != "onnx":
        arguments.error("--int8 is for --format onnx")
    if options.out and not options.out.endswith(f".{options.format}"):
        arguments.error(f"--out {options.out}: the name has to end in .{options.format}")
    model = load_model(options.checkpoint, "cpu", options.model)
    if not model.network:
        raise InferenceError(f"{model.path} is exported already")
    out = Path(options.out or model.path.with_suffix(f".{options.format}"))
    data = load_its_data(model, options.data_dir) if options.int8 or at_hand(model, options.data_dir) else None
    if data:
        parts = [part.images[torch.arange(min(CHECKED, len(part.images)))] for part in (data.valid, data.train)]
        images = torch.cat(parts)[:CHECKED].numpy()
    else:
        print("note: compared on random images, because its data set is not here: --data-dir DIR names its folder")
        shape = (CHECKED, 3, model.image_size, model.image_size)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    print(f"Exporting {model.path} to {out}")
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, f"new.{options.format}")
        new.write_bytes(to_onnx(model) if options.format == "onnx" else to_pt2(model))
        if options.format == "onnx":
            found = load_model(new).logits(images)
        else:
            with torch.no_grad():
                found = torch.export.load(new).module()(torch.from_numpy(images) / 255).numpy()
        print(f"Compared with PyTorch {check(model.logits(images), found)}")
        ic.write_atomically(out, new.read_bytes())
        if options.int8 and data:
            quantise(new, small := out.with_name(f"{out.stem}-int8.onnx"), data)
            print(f"\nIn 8 bits: {small}")
    if options.format == "onnx":
        print(f'\nUse it: python inference.py --checkpoint "{out}" IMAGE')
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
