"""Take a trained model elsewhere: ONNX, for phones, browsers and any language, or torch.export.

    python export.py                                      the newest model, beside it as .onnx
    python export.py --checkpoint model_cnn.pth --int8    also a smaller, faster 8-bit model
    python export.py --format pt2                         for torch.export.load
    python export.py --format safetensors --card          to publish it, with a model card
    python export.py --raw                                takes a photograph of any size

Input: `images`, float32 (N, 3, H, W) in [0, 1], RGB, any N. Output: `logits`, float32 (N, classes).
The network normalises the images itself. The file's metadata hold what else is needed: classes,
image size, how to resize, temperature of the confidence. With --raw the input is `image`, uint8
(H, W, 3), RGB, of any height and width, and the network resizes it, too: `logits` is (1, classes).
A safetensors file holds what the .pth does, and all tools read it.

An ONNX file in float32 has a second output, `ood_score`, float32 (N,): how unlike the training
images each image is. Where it is above `ood_threshold` in the metadata, the answer is unknown.
"""

import argparse
import io
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # PYTHONSAFEPATH and python -P leave out the folder of this file
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

try:
    import numpy as np
    import onnx
    import torch
    from onnxruntime import quantization
    from PIL import Image
    from torch import nn

    import image_classification as ic
    from classifier import checkpoints, model_card, ood_score, rejection
    from classifier.cli import command_line, end_process, program, run_tool, tool_parser
    from classifier.config import is_custom_model
    from classifier.datasets import decode, pixel_range
    from classifier.datasets.dataset import Dataset
    from classifier.errors import UserError
    from classifier.files import prepare_file, write_atomically
    from classifier.foreign_paths import without_folders
    from classifier.raw_network import RawNetwork, odd_photographs
    from classifier.text import escape_control_characters
    from inference import (
        ONNX_BATCH_SIZE,
        Classifier,
        dataset_available,
        load_dataset_of,
        load_model,
    )
except (ImportError, OSError) as error:  # OSError: a library that cannot be loaded
    if __name__ != "__main__":
        raise
    sys.exit(
        f"error: {error}: pip install -r requirements-extras.txt, and keep classifier/ and the "
        "other tools beside this file"
    )
except KeyboardInterrupt:
    sys.exit(130)

NUM_COMPARED = 1000  # images for which an export is compared with PyTorch
TOLERANCE = 1e-3  # largest difference of logits
NUM_PHOTOGRAPHS = 40  # for which --raw is compared, and as many of the data set's folder
# Of --raw: a logit that is this far above the others has to stay the largest. Where Pillow rounds a
# pixel up and the file rounds it down, logits differ by more than TOLERANCE.
RAW_MARGIN = 0.05
NUM_CALIBRATION = 500  # images that the ranges of 8-bit activations are taken from
CALIBRATION_BATCH_SIZE = 100
MAX_SCORED = 10_000  # images on which 8 bits are compared with float32
MAX_ACCURACY_LOSS = 0.01  # that 8 bits may cost
TIMED_RUNS = 200
DYNAMIC_SHAPES = {"images": {0: torch.export.Dim("batch")}}  # N may be any number
RAW_SHAPES = {"image": {0: torch.export.Dim("height"), 1: torch.export.Dim("width")}}
RESIZE = {  # by --fit
    "crop": "the middle square of the image, resized bicubically to image_size x image_size; RGB, "
    "divided by 255",
    "pad": "all of the image, its longer side resized bicubically to image_size, in the middle of "
    "image_size x image_size pixels of grey (114, 114, 114); RGB, divided by 255",
    "stretch": "all of the image, whatever its shape, resized bicubically to image_size x "
    "image_size; RGB, divided by 255",
}


# ---- Exports -------------------------------------------------------------------------------------


class NormalisedNetwork(nn.Module):
    """A network with its normalisation: float32 (N, 3, H, W) in [0, 1] to logits (N, classes)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(ic.normalise(images * 255, self.network))


class ScoredNetwork(NormalisedNetwork):
    """The same, which also gives how unlike the training images each image is, float32 (N,)."""

    def __init__(self, network: nn.Module, score: ood_score.OodScore):
        super().__init__(network)
        self.score = score

    def forward(  # type: ignore[override]
        self, images: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with ood_score.recorded(self.network, self.score) as scores:
            logits = super().forward(images)
        (values,) = scores.values
        return logits, values


def metadata(model: Classifier, scored: bool = False) -> dict[str, str]:
    """What an exported file tells about itself, each value as JSON.

    scored: whether the file computes how unlike the training images an image is.
    """
    values = {
        "classes": model.classes,
        "image_size": model.image_size,
        "fit": model.fit,
        "resize": RESIZE[model.fit],
        "dataset": model.dataset,
        "test_accuracy": model.test_accuracy,
        "temperature": model.temperature,
    }
    if scored and model.quantiles is not None:
        values["ood_quantiles"] = model.quantiles
        values["ood_threshold"] = rejection.threshold(model.quantiles, rejection.DEFAULT_REJECT)
    if model.pixel_ranges:  # images with more than 8 bits a pixel: what becomes 0 and 1
        values["pixel_ranges"] = pixel_range.to_json(model.pixel_ranges)
    return {name: json.dumps(value) for name, value in values.items()}


def exportable(model: Classifier) -> tuple[nn.Module, torch.Tensor]:
    """The network with its normalisation, in eval mode, and an example of its input."""
    network = NormalisedNetwork(model.require_network()).eval()
    return network, torch.zeros(2, 3, model.image_size, model.image_size)


def to_onnx(model: Classifier, raw: bool = False) -> bytes:
    """The model as an ONNX file, with its metadata. raw: see --raw."""
    network, example = exportable(model)
    names = ["logits"]
    if model.ood_score is not None:
        network = ScoredNetwork(model.require_network(), model.ood_score).eval()
        names.append("ood_score")
    about = metadata(model, scored=model.ood_score is not None)
    if raw:
        network = RawNetwork(network, model.image_size, model.fit)
        example = torch.zeros(37, 41, 3, dtype=torch.uint8)
        about["raw"] = json.dumps(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported: Any = torch.onnx.export(
            network,
            (example,),
            input_names=["image"] if raw else ["images"],
            output_names=names,
            dynamic_shapes=RAW_SHAPES if raw else DYNAMIC_SHAPES,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    proto = exported.model_proto
    onnx.helper.set_model_props(proto, about)
    return proto.SerializeToString()


def to_pt2(model: Classifier) -> bytes:
    """The model as a file for torch.export.load, with its metadata in classification.json."""
    network, example = exportable(model)
    exported = torch.export.export(network, (example,), dynamic_shapes=DYNAMIC_SHAPES)
    buffer = io.BytesIO()
    extra_files = {"classification.json": json.dumps(metadata(model))}
    torch.export.save(exported, buffer, extra_files=extra_files)
    return buffer.getvalue()


def to_safetensors(model: Classifier) -> bytes:
    """The model as a safetensors file, with all that its .pth tells but the user's folders."""
    content = checkpoints.read_checkpoint(model.path)
    weights = model.require_network().state_dict()
    settings = without_folders(content["config"])
    return checkpoints.to_safetensors({**content, "model": weights, "config": settings})


# ---- Comparison with PyTorch ---------------------------------------------------------------------


def export(model: Classifier, format: str, images: np.ndarray, out: Path) -> None:
    """Write the model in this format, onnx or pt2, once it is known to give the same logits.

    images: uint8 (N, 3, S, S), for which they are compared. Raises UserError if they differ.
    """
    print(f"Exporting {model.path} to {out}")
    content = to_onnx(model) if format == "onnx" else to_pt2(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"new.{format}")
        file.write_bytes(content)
        logits = onnx_logits(file, images) if format == "onnx" else pt2_logits(file, images)
        result = compare_logits(model.logits(images), logits)
        if format == "onnx" and model.ood_score is not None:
            result += f", {compare_answers(model, load_model(file), images)}"
    print(f"Compared with PyTorch {result}")
    if format == "pt2" and model.ood_score is not None:
        print("note: this file does not tell which images are unknown; an ONNX file does")
    write_atomically(out, content)


def export_safetensors(model: Classifier, images: np.ndarray, out: Path) -> None:
    """Write the model as safetensors, once it is known to give the same logits, bit for bit.

    images: uint8 (N, 3, S, S), for which they are compared. Raises UserError if they differ.
    """
    print(f"Exporting {model.path} to {out}")
    content = to_safetensors(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "new.safetensors")
        file.write_bytes(content)
        logits = load_model(file, "cpu", named_network(model)).logits(images)
    if logits.tobytes() != model.logits(images).tobytes():
        raise UserError(f"the export does not compute the same as {model.path}")
    print(f"Compared with {model.path} on {len(images)} images: the same logits, bit for bit")
    write_atomically(out, content)


def named_network(model: Classifier) -> str:
    """FILE.py:FACTORY of a custom network, else "": what --model has to name."""
    network = model.settings.get("model", "")
    return network if is_custom_model(network) else ""


def export_raw(model: Classifier, photographs: list[np.ndarray], out: Path) -> None:
    """Write an ONNX file that takes photographs, once it is known to recognise the same in them.

    photographs: uint8 (H, W, 3), of any sizes. Raises UserError if it does not.
    """
    print(f"Exporting {model.path} to {out}, for photographs of any size")
    content = to_onnx(model, raw=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "new.onnx")
        file.write_bytes(content)
        logits = load_model(file).logits([image.transpose(2, 0, 1) for image in photographs])
    squares = []
    for image in photographs:
        square = decode.square(Image.fromarray(image), model.image_size, fit=model.fit)
        squares.append(square.transpose(2, 0, 1))
    result = compare_raw_logits(model.logits(np.stack(squares)), logits)
    print(f"Compared with inference.py {result}")
    write_atomically(out, content)


def compare_raw_logits(expected: np.ndarray, found: np.ndarray) -> str:
    """How far the logits of photographs, (N, classes), are apart, in words.

    Raises UserError if a class differs whose logit is more than RAW_MARGIN above the others, or
    if they are not numbers.
    """
    difference = float(np.abs(expected - found).max())
    best_two = np.sort(expected, axis=1)[:, -2:]
    is_clear = best_two[:, 1] - best_two[:, 0] > RAW_MARGIN
    is_changed = expected.argmax(1) != found.argmax(1)
    num_wrong = int((is_clear & is_changed).sum())
    result = (
        f"on {len(found)} photographs of odd sizes: logits differ by {difference:.1e} at most, "
        f"predictions for {int(is_changed.sum())} of them"
    )
    if np.isnan(difference) or num_wrong:
        raise UserError(f"the export does not recognise the same as inference.py {result}")
    return result


def photographs_to_compare(model: Classifier, data: Dataset | None) -> list[np.ndarray]:
    """Photographs of odd sizes, generated and of the data set's folder, uint8 (H, W, 3) each."""
    photographs = list(odd_photographs(NUM_PHOTOGRAPHS))
    if data is not None and data.report is not None and data.files is not None:
        folder = Path(data.report["folder"])
        for name in data.files[:: max(1, len(data.files) // NUM_PHOTOGRAPHS)][:NUM_PHOTOGRAPHS]:
            path = folder / name
            photographs.append(decode.decode_rgb(path, model.image_size, model.pixel_ranges))
    return photographs


def onnx_logits(file: Path, images: np.ndarray) -> np.ndarray:
    """Logits by an ONNX file, on the CPU."""
    return load_model(file).logits(images)


def pt2_logits(file: Path, images: np.ndarray) -> np.ndarray:
    """Logits by a file of torch.export."""
    network = torch.export.load(file).module()
    outputs = []
    with torch.no_grad():
        for batch in torch.from_numpy(images).split(ONNX_BATCH_SIZE):
            outputs.append(network(batch / 255))
    return torch.cat(outputs).numpy()


def compare_logits(expected: np.ndarray, found: np.ndarray) -> str:
    """How far two sets of logits, (N, classes), are apart, in words.

    Raises UserError if it is more than TOLERANCE, or not a number.
    """
    difference = float(np.abs(expected - found).max())
    num_changed = int((expected.argmax(1) != found.argmax(1)).sum())
    result = (
        f"on {len(found)} images: logits differ by {difference:.1e} at most, "
        f"predictions for {num_changed} of them"
    )
    # where classes differ, the logits of the best two are within twice the tolerance
    if np.isnan(difference) or difference > TOLERANCE:
        raise UserError(f"the export does not compute the same as PyTorch {result}")
    return result


def compare_answers(model: Classifier, exported: Classifier, images: np.ndarray) -> str:
    """For how many images only one of two models says unknown, in words."""
    _, expected = model.score(images)
    _, found = exported.score(images)
    assert expected is not None and found is not None  # both have scores
    is_unknown = [rejection.is_unknown(each, model.reject) for each in (expected, found)]
    return f"and whether they are unknown for {int((is_unknown[0] != is_unknown[1]).sum())}"


def data_to_compare(model: Classifier, data_dir: str | None) -> Dataset | None:
    """The model's data set, or None if it cannot be read; nothing is downloaded.

    data_dir: where the user says that it is, if anywhere. Raises UserError if it is not there.
    """
    try:
        return load_dataset_of(model, data_dir, may_download=False)
    except UserError as error:
        if data_dir:
            raise
        print(f"note: {escape_control_characters(str(error))}")  # it has paths from the file
        return None


def images_to_compare(model: Classifier, data: Dataset | None) -> np.ndarray:
    """Images of the model's data set, validation images first, or random ones without it.

    Returns uint8 (N, 3, S, S).
    """
    if data is None:
        print("note: compared on random images: --data-dir DIR names the folder of the data set")
        shape = (NUM_COMPARED, 3, model.image_size, model.image_size)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    parts = []
    for split in (data.valid, data.train):
        count = min(NUM_COMPARED, len(split.labels))
        parts.append(split.images[torch.arange(count)])
    return torch.cat(parts)[:NUM_COMPARED].numpy()


# ---- 8 bits --------------------------------------------------------------------------------------


class CalibrationBatches(quantization.CalibrationDataReader):
    """Hands out images, uint8 (N, 3, S, S), in batches as a network takes them."""

    def __init__(self, images: np.ndarray):
        num_batches = max(1, len(images) // CALIBRATION_BATCH_SIZE)
        self.batches = iter(np.array_split(images, num_batches))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        if batch is None:
            return None
        return {"images": batch.astype(np.float32) / 255}


def quantise(path: Path, images: np.ndarray) -> bytes:
    """An ONNX file with weights and activations of 8 bits.

    path: the file in float32. images: uint8 (N, 3, S, S), from which the ranges of activations are
    taken.
    """
    whole = onnx.load(str(path))
    about = {entry.key: entry.value for entry in whole.metadata_props}
    about["test_accuracy"] = "null"  # not known
    # distances between features in 8 bits are not those in float32
    without_score(whole)
    for name in ("ood_quantiles", "ood_threshold"):
        about.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        prepared, small = Path(folder, "prepared.onnx"), Path(folder, "small.onnx")
        logging.disable(logging.WARNING)  # about batch norm, which is not quantised
        try:
            # ONNX Runtime takes no path that is not UTF-8
            float32_file = Path(folder, "float32.onnx")
            float32_file.write_bytes(whole.SerializeToString())
            quantization.quant_pre_process(
                str(float32_file), str(prepared), skip_symbolic_shape=True
            )
            quantization.quantize_static(
                str(prepared),
                str(small),
                CalibrationBatches(images),
                per_channel=True,
                reduce_range=True,  # to 7 bits: on older CPUs sums of 8 bits overflow
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
        proto = onnx.load(str(small))
    onnx.helper.set_model_props(proto, about)
    return proto.SerializeToString()


def without_score(proto: onnx.ModelProto) -> None:
    """Take the second output, and all that only it needs, out of an ONNX file."""
    graph = proto.graph
    logits = [output for output in graph.output if output.name == "logits"]
    del graph.output[:]
    graph.output.extend(logits)
    needed = {"logits"}
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    nodes.reverse()
    weights = [each for each in graph.initializer if each.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(weights)


def export_int8(float32_file: Path, out: Path, data: Dataset) -> None:
    """Write an ONNX file in 8 bits and print what that changes.

    float32_file: the ONNX file to quantise. Raises UserError, and writes nothing, if it costs more
    than MAX_ACCURACY_LOSS.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.train.images), generator=generator)
    calibration = data.train.images[order[:NUM_CALIBRATION]].numpy()
    content = quantise(float32_file, calibration)

    # test images are used once, after training, and so not here
    scored, kind = data.valid, "validation"
    if len(scored.labels) == 0:
        scored, kind = data.train, "training"
    sample = torch.randperm(len(scored.labels), generator=generator)[:MAX_SCORED].sort().values
    images, labels = scored.images[sample].numpy(), scored.labels[sample].numpy()

    with tempfile.TemporaryDirectory() as folder:
        int8_file = Path(folder, "int8.onnx")
        int8_file.write_bytes(content)
        files = {"float32": float32_file, "int8": int8_file}
        models = {name: load_model(file) for name, file in files.items()}
    accuracies = {}
    for name, model in models.items():
        predictions = model.logits(images).argmax(1)
        accuracies[name] = float((predictions == labels).mean())
    milliseconds = time_one_image(models, images[:1])

    print(f"\n| | accuracy on {len(labels)} {kind} images | MB | ms an image |")
    print("| --- | --- | --- | --- |")
    sizes = {"float32": float32_file.stat().st_size, "int8": len(content)}
    for name, accuracy in accuracies.items():
        size = sizes[name] / 1e6
        print(f"| {name} | {100 * accuracy:.2f} % | {size:.2f} | {milliseconds[name]:.2f} |")
    loss = accuracies["float32"] - accuracies["int8"]
    if loss > MAX_ACCURACY_LOSS:
        raise UserError(
            f"8 bits cost this network {100 * loss:.1f} points of accuracy: {out} is not written"
        )
    write_atomically(out, content)


def time_one_image(models: dict[str, Classifier], image: np.ndarray) -> dict[str, float]:
    """Median time in ms that each model takes for an image, uint8 (1, 3, S, S).

    The models take turns, so that they are disturbed alike.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(TIMED_RUNS):
        for name, model in models.items():
            started = time.perf_counter()
            model.logits(image)
            times[name].append(time.perf_counter() - started)
    return {name: 1000 * float(np.median(seconds)) for name, seconds in times.items()}


# ---- The command line ----------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    """The options of this process; ends it with status 2 if they are wrong."""
    parser = tool_parser(__doc__, device=False)
    parser.add_argument(
        "--format", default="onnx", choices=["onnx", "pt2", "safetensors"], help="(default: onnx)"
    )
    parser.add_argument("--int8", action="store_true", help="also an ONNX file of 8-bit numbers")
    parser.add_argument(
        "--raw", action="store_true", help="an ONNX file that takes a photograph of any size"
    )
    parser.add_argument(
        "--card",
        action="store_true",
        help=f"also {model_card.CARD_FILE}, beside the export: what the model is and how good",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="(default: beside the model, with the format's extension, or -raw.onnx)",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where the data set is (default: data/, else where it was in training)",
    )
    options = parser.parse_args()
    if options.int8 and options.format != "onnx":
        parser.error("--int8 is for --format onnx")
    if options.raw and (options.int8 or options.format != "onnx"):
        parser.error("--raw is for --format onnx, without --int8")
    if options.out and Path(options.out).suffix.lower() != f".{options.format}":
        parser.error(f"--out {options.out}: the name has to end in .{options.format}")
    return options


def default_out(checkpoint: Path, format: str, raw: bool) -> Path:
    """The file that is written if none is named: beside the model."""
    ending = "-raw" if raw else ""
    return checkpoint.with_name(f"{checkpoint.stem}{ending}.{format}")


def main() -> int:
    """Run as from the command line; returns the exit status."""
    options = parse_options()
    model = load_model(options.checkpoint, "cpu", options.model)
    model.require_network()
    out = Path(options.out or default_out(model.path, options.format, options.raw))
    prepare_file(out)
    card = out.with_name(model_card.CARD_FILE)
    if options.card and card.exists():
        raise UserError(f"{card} exists, perhaps with words of yours: move it, or omit --card")
    data = None
    if options.int8:
        data = load_dataset_of(model, options.data_dir)
    elif options.data_dir or dataset_available(model):
        data = data_to_compare(model, options.data_dir)
    if options.raw:
        export_raw(model, photographs_to_compare(model, data), out)
    elif options.format == "safetensors":
        export_safetensors(model, images_to_compare(model, data), out)
    else:
        export(model, options.format, images_to_compare(model, data), out)
    if options.int8 and data is not None:
        int8_out = out.with_name(f"{out.stem}-int8.onnx")
        export_int8(out, int8_out, data)
        print(f"\nIn 8 bits: {int8_out}")
        if model.ood_score is not None:
            print("note: the file in 8 bits does not tell which images are unknown")
    if options.card:
        text = model_card.model_card(checkpoints.read_checkpoint(model.path), out, options.raw)
        write_atomically(card, text.encode())
        print(f"\nModel card: {card}: fill in its licence and its intended use")
    if options.format != "pt2":
        inference = program("inference.py") or ["python", "inference.py"]
        words = [*inference, "--checkpoint", str(out)]
        if options.format == "safetensors" and named_network(model):
            words += ["--model", named_network(model)]
        print(f"\nUse it: {command_line([*words, 'IMAGE'])}")
    return 0


if __name__ == "__main__":
    end_process(run_tool(main))
