"""See what a trained network sees.

    python explain.py                                galleries, Grad-CAM, filters, feature maps,
                                                     confused classes
    python explain.py --image cat.jpg                feature maps and Grad-CAM of your own picture
    python explain.py --animate runs/CIFAR10/NAME    Grad-CAM through the epochs of a run made with
                                                     --keep-epochs
    python explain.py --label-issues                 training images with a label that is probably
                                                     wrong

Everything goes into the folder explained/. Grad-CAM (Selvaraju et al., 2017) shows where the
network found evidence for a class: the gradient of the class's logit weights the last feature maps.
It is computed by Captum.
"""

import argparse
import contextlib
import functools
import gc
import io
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":  # PYTHONSAFEPATH and python -P leave out the folder of this file
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from captum.attr import LayerAttribution, LayerGradCam
    from matplotlib import colormaps
    from PIL import Image, ImageDraw
    from torch import nn
    from tqdm import tqdm

    import image_classification as ic
    from classifier import plots, seen_images
    from classifier.checkpoints import check_weights
    from classifier.cli import end_process, run_tool, tool_parser
    from classifier.config import Config
    from classifier.datasets import checks, splits
    from classifier.datasets.dataset import Dataset, Split
    from classifier.datasets.splits import ImageIds
    from classifier.devices import choose_device, keep_freed_memory, training_process
    from classifier.errors import UserError
    from classifier.files import prepare_folder, write_atomically, write_csv
    from classifier.foreign_paths import is_network_path
    from classifier.heartbeat import Heartbeat
    from classifier.networks.build import read_weights
    from classifier.networks.pretrained import last_layer_weights
    from classifier.text import URL_REFUSED, escape_control_characters, is_url, percent
    from inference import Classifier, load_dataset_of, load_model, read_image, top_classes
except (ImportError, OSError) as error:  # OSError: a library that cannot be loaded
    if __name__ != "__main__":
        raise
    sys.exit(
        f"error: {error}: pip install -r requirements-extras.txt, and keep classifier/ and the "
        "other tools beside this file"
    )
except KeyboardInterrupt:
    sys.exit(130)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GALLERY_SIZE = 40  # images
GALLERY_COLUMNS = 8
NUM_FOLDS = 3  # networks that --label-issues trains, each without a third of the images
IMAGENET_CLASSES = 1000
NUM_MAPS = 8  # feature maps that are drawn of a stage
NUM_PAIRS = 10  # pairs of confused classes that are printed
CAM_BATCH_SIZE = 50
FRAME_SIZE = 160  # pixels, of the picture in a frame of an animation
CAPTION_HEIGHT = 16
FRAME_MS = 200
LAST_FRAME_MS = 1500


# ---- Feature maps and Grad-CAM -------------------------------------------------------------------


class Stage(NamedTuple):
    """The last layer that gives feature maps of a size.

    Attributes:
        name: its name in the network.
        layer: the layer.
        output: what it gives for an image, float (1, C, H, W).
    """

    name: str
    layer: nn.Module
    output: torch.Tensor


class Call(NamedTuple):
    """What a layer has given for an image.

    Attributes:
        name: the layer's name in the network.
        layer: the layer.
        shape: of its output.
    """

    name: str
    layer: nn.Module
    shape: torch.Size

    @property
    def is_of_maps(self) -> bool:
        """Whether the output is feature maps, (1, C, S, S).

        Images are square, and so are their maps: (1, S, S, C) has the channels last.
        """
        return len(self.shape) == 4 and self.shape[2] == self.shape[3] > 1

    @property
    def is_of_other_places(self) -> bool:
        """Whether the output tells places apart in another form, such as tokens (1, L, C)."""
        return len(self.shape) > 2 and self.shape[1:].numel() > max(self.shape[1:])


def run_with_hooks(
    network: nn.Module,
    image: torch.Tensor,
    hook: Callable[[str, nn.Module, torch.Tensor], None],
) -> None:
    """Classify an image, uint8 (1, C, H, W), and call `hook` after each layer within the network.

    hook: takes the layer's name, the layer, and its output, where that is a tensor.
    """

    def call_hook(name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            hook(name, layer, output)

    device = next(network.parameters()).device
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, layer in network.named_modules():
            if layer is network:
                continue
            handle = layer.register_forward_hook(functools.partial(call_hook, name))
            hooks.enter_context(handle)
        network(ic.normalise(image.to(device), network))


def trace(network: nn.Module, image: torch.Tensor) -> list[Call]:
    """The calls of all layers for an image, uint8 (1, C, H, W), in their order."""
    calls: list[Call] = []
    run_with_hooks(
        network,
        image,
        lambda name, layer, output: calls.append(Call(name, layer, output.shape)),
    )
    return calls


def last_of_each_size(calls: list[Call]) -> list[Call]:
    """The last layer that gives feature maps of a size, for each size, in the order of the calls.

    Layers that are called several times are left out: what is asked for later, a layer's output or
    gradient, is that of its last call.
    """
    times_called = Counter(call.layer for call in calls)
    last: dict[torch.Size, Call] = {}
    for call in calls:
        if call.is_of_maps and times_called[call.layer] == 1:
            size = call.shape[2:]
            last.pop(size, None)  # a later layer moves the size to the end of the order
            last[size] = call
    return list(last.values())


def find_stages(network: nn.Module, image: torch.Tensor) -> list[Stage]:
    """The last layer of each size of feature maps, in the order in which they are computed.

    image: uint8 (1, C, H, W). Empty for a network without feature maps.
    """
    layers = [call.layer for call in last_of_each_size(trace(network, image))]
    stages: list[Stage] = []

    def record(name: str, layer: nn.Module, output: torch.Tensor) -> None:
        if layer in layers:
            stages.append(Stage(name, layer, output.detach().clone()))

    run_with_hooks(network, image, record)
    return stages


def find_grad_cam_layer(network: nn.Module, image: torch.Tensor) -> nn.Module:
    """The layer that gives the last feature maps.

    image: uint8 (1, C, H, W). Raises UserError for a network without feature maps, or in which they
    are only an intermediate form, as in transformers.
    """
    calls = trace(network, image)
    last = last_of_each_size(calls)
    if not last:
        raise UserError("this network has no feature maps, and so no Grad-CAM")
    later_calls = calls[calls.index(last[-1]) + 1 :]
    if any(call.is_of_other_places and not call.is_of_maps for call in later_calls):
        raise UserError("this network does not end in feature maps, and so has no Grad-CAM")
    return last[-1].layer


def grad_cam(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Where a network in eval mode finds what speaks for a class.

    images: uint8 (N, C, H, W). labels: int64 (N,), the class for each image.

    Returns float32 (N, H, W) on the CPU, in [0, 1], where 1 is what speaks for the class most.
    Raises UserError for a network that does not end in feature maps, TypeError and ValueError for
    other images.
    """
    checks.check_images(images, network.get_buffer("pixel_mean").shape[1])
    checks.check_labels(labels, len(images))
    layer = find_grad_cam_layer(network, images[:1])
    device = next(network.parameters()).device
    size = tuple(images.shape[2:])
    method = LayerGradCam(network, layer)
    heat_maps = []
    for start in range(0, len(images), CAM_BATCH_SIZE):
        batch = slice(start, start + CAM_BATCH_SIZE)
        inputs = ic.normalise(images[batch].to(device), network)
        inputs.requires_grad_()  # through frozen layers alone there would be no gradient
        maps = method.attribute(inputs, target=labels[batch].to(device), relu_attributions=True)
        maps = LayerAttribution.interpolate(maps, size, "bilinear")
        heat_maps.append(maps.detach().float().cpu()[:, 0])
    heat = torch.cat(heat_maps)
    hottest = heat.amax((1, 2), keepdim=True)
    return heat / hottest.clamp(min=1e-12)


def overlay(images: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Put a heat map over images: the hotter a place, the more of the image it hides.

    images: uint8 (N, 3, H, W). heat: float (N, H, W) in [0, 1]. Returns uint8 (N, 3, H, W).
    """
    rgba = colormaps["turbo"](heat.numpy())
    colors = torch.from_numpy(rgba[..., :3]).permute(0, 3, 1, 2) * 255
    opacity = 0.15 + 0.4 * heat[:, None]
    return ((1 - opacity) * images + opacity * colors).byte()


# ---- Pictures of a network -----------------------------------------------------------------------


def save_grid(images: torch.Tensor, titles: list[str], columns: int, path: Path) -> None:
    """Write images, uint8 (N, 3, S, S), as a PNG file, each below its title."""
    plots.save_figure(plots.draw_images(images.cpu(), titles, columns), path)
    print(f"{path}: {len(images)} images")


def save_table(header: list[str], rows: list[list[Any]], path: Path) -> None:
    """Write rows as a CSV file."""
    write_csv(path, [header, *rows])
    print(f"{path}: {len(rows)} rows")


def draw_galleries(
    model: Classifier, test: Split, out: Path, files: list[str] | None = None
) -> torch.Tensor:
    """Draw right and wrong predictions, the most confident first, with and without Grad-CAM.

    files: paths of the test images, if they are files; their names are then in the pictures.

    Returns the predictions, int64 (N,).
    """
    network = model.require_network()
    logits = ic.evaluate(network, *test).logits / (model.temperature or 1)
    confidences, predictions = logits.softmax(1).max(1)
    is_correct = predictions == test.labels
    for kind, is_shown in (("correct", is_correct), ("incorrect", ~is_correct)):
        count = min(GALLERY_SIZE, int(is_shown.sum()))
        if count == 0:
            num_images = len(test.labels)
            print(f"No gallery_{kind}.png: there is no such prediction among {num_images}")
            continue
        indices = (confidences * is_shown).argsort(descending=True)[:count]
        images = test.images[indices]
        titles = []
        for i in indices.tolist():
            label, prediction = model.classes[test.labels[i]], model.classes[predictions[i]]
            title = gallery_title(label, prediction, confidences[i].item())
            titles.append(f"{plots.file_title(files[i])}\n{title}" if files else title)
        save_grid(images, titles, GALLERY_COLUMNS, out / f"gallery_{kind}.png")
        try:
            heat = grad_cam(network, images, predictions[indices])
        except UserError as error:
            print(f"No gallery_{kind}_cam.png: {error}")
            continue
        path = out / f"gallery_{kind}_cam.png"
        save_grid(overlay(images, heat), titles, GALLERY_COLUMNS, path)
    return predictions


def gallery_title(label: str, prediction: str, confidence: float) -> str:
    """The title of an image with this label and this prediction."""
    if label == prediction:
        return f"{label}\n{percent(confidence)}"
    return f"{label}, taken for\n{prediction}, {percent(confidence)}"


def list_confused_classes(
    classes: list[str], labels: torch.Tensor, predictions: torch.Tensor, out: Path
) -> None:
    """Print and write the pairs of classes that are mistaken for each other, most frequent first.

    labels, predictions: int64 (N,).
    """
    num_classes = len(classes)
    pairs = labels * num_classes + predictions
    counts = torch.bincount(pairs, minlength=num_classes**2)
    matrix = counts.view(num_classes, num_classes).tolist()  # rows: labels
    rows: list[list[Any]] = []
    for a, b in itertools.combinations(range(num_classes), 2):
        a_as_b, b_as_a = matrix[a][b], matrix[b][a]
        confused = a_as_b + b_as_a
        if confused:
            num_images = sum(matrix[a]) + sum(matrix[b])
            share = round(confused / num_images, 4)
            rows.append([classes[a], classes[b], confused, a_as_b, b_as_a, share])

    rows.sort(key=lambda row: row[2], reverse=True)
    for name_a, name_b, confused, a_as_b, b_as_a, share in rows[:NUM_PAIRS]:
        print(
            f"{name_a} and {name_b}: {confused} confused, {percent(share)} of both "
            f"({a_as_b} {name_a} as {name_b}, {b_as_a} {name_b} as {name_a})"
        )
    header = ["class", "other", "confused", "class_as_other", "other_as_class", "share_of_both"]
    save_table(header, rows, out / "confused.csv")


def draw_filters(network: nn.Module, out: Path) -> None:
    """Draw the filters of the first convolution: in color if it sees colors, else their mean."""
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    if not convolutions:
        print("No filters.png: this network has no convolution")
        return
    weights = convolutions[0].weight.detach().float().cpu()  # (filters, channels, H, W)
    if weights.shape[1] != 3:
        weights = weights.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    low = weights.amin((1, 2, 3), keepdim=True)
    high = weights.amax((1, 2, 3), keepdim=True)
    images = ((weights - low) / (high - low).clamp(min=1e-12) * 255).byte()
    height, width = images.shape[2:]
    size = max(height, width)
    images = F.pad(images, (0, size - width, 0, size - height))
    titles = [str(i) for i in range(len(images))]
    save_grid(images, titles, 12, out / "filters.png")


def draw_feature_maps(model: Classifier, image: torch.Tensor, path: Path) -> None:
    """Draw an image, its Grad-CAM, and for each stage of the network the strongest feature maps.

    image: uint8 (1, 3, H, W).
    """
    network = model.require_network()
    stages = find_stages(network, image)
    (classes,) = top_classes(model, image.numpy(), top_k=1)
    prediction, confidence = classes[0]
    answer = "unknown, closest: " if classes.is_unknown else ""
    columns = 1 + NUM_MAPS
    figure = plots.new_figure(len(stages) + 1, columns, 1.3, 1.5)
    for axes in figure.axes:
        axes.axis("off")

    # the first row: the image and its Grad-CAM
    title = f"{answer}\n{prediction} {percent(confidence)}".strip()
    draw_image(figure.axes[0], image, title)
    label = torch.tensor([model.classes.index(prediction)])
    with contextlib.suppress(UserError):  # a network without it: the feature maps alone
        draw_image(figure.axes[1], overlay(image, grad_cam(network, image, label)), "Grad-CAM")

    # a row for each stage
    for row, stage in enumerate(stages, 1):
        draw_stage(figure.axes[columns * row : columns * (row + 1)], stage)
    plots.save_figure(figure, path)
    shown_path = escape_control_characters(str(path))
    print(f"{shown_path}: {answer}{prediction} {percent(confidence)}, {len(stages)} stages")


def draw_image(axes: "Axes", image: torch.Tensor, title: str) -> None:
    """Draw an image, uint8 (1, 3, H, W), below its title."""
    axes.imshow(image[0].permute(1, 2, 0).numpy())
    axes.set_title(title, fontsize=8, parse_math=False)


def draw_stage(row: "list[Axes]", stage: Stage) -> None:
    """Fill a row with the name of a stage and its strongest feature maps."""
    maps = stage.output[0].float().cpu()  # (C, H, W)
    strength = maps.abs().mean((1, 2))
    strongest = strength.argsort(descending=True)[:NUM_MAPS].tolist()
    size = f"{maps.shape[2]} x {maps.shape[1]}"
    text = f"{stage.name}\n{type(stage.layer).__name__}\n{size}"
    row[0].text(0, 0.5, text, fontsize=7, va="center")
    for axes, channel in zip(row[1:], strongest, strict=False):  # there may be fewer channels
        axes.imshow(maps[channel].numpy(), cmap="viridis")
        axes.set_title(str(channel), fontsize=7)


# ---- Animations of a run -------------------------------------------------------------------------


def animate(run: str, model: str, device: torch.device, data_dir: str | None, out: Path) -> None:
    """Write cam_<class>.gif: Grad-CAM of a test image of each class, one frame an epoch.

    run: the folder of a run made with --keep-epochs. model: FILE.py:FACTORY of a custom network.
    Raises UserError for a run without the models of its epochs.
    """
    paths = find_epochs(run)
    last = load_model(paths[-1], device, model)
    data = load_dataset_of(last, data_dir)
    indices = choose_examples(last.require_network(), data.test)
    examples = Split(data.test.images[indices], data.test.labels[indices])
    names = [data.classes[label] for label in examples.labels]
    frames: list[list[Image.Image]] = [[] for _ in names]
    progress_bar = tqdm(paths, "Grad-CAM", unit="epoch", leave=False, disable=None)
    for path in progress_bar:
        epoch = int(path.stem.removeprefix("epoch-"))  # some may have been deleted
        network = load_model(path, device, model).require_network()
        probabilities = ic.evaluate(network, *examples).logits.softmax(1)
        heat = grad_cam(network, *examples)
        for i, picture in enumerate(overlay(examples.images, heat)):
            share = 100 * probabilities[i, examples.labels[i]]
            frames[i].append(draw_frame(picture, f"epoch {epoch}: {share:.0f} % {names[i]}"))

    for name, class_frames in zip(names, frames, strict=True):
        file_name = re.sub(r'[<>:"/\\|?*]', "-", name)  # a name in somebody's data set
        save_animation(class_frames, out / f"cam_{file_name}.gif")
    print(f"{out}: cam_<class>.gif of {len(names)} classes, {len(paths)} epochs")


def find_epochs(run: str) -> list[Path]:
    """The models of a run's epochs, in order. Raises UserError if there are none."""
    if is_url(run):
        raise UserError(f"--animate {run}: {URL_REFUSED}")
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"--animate {run}: there is no such folder")
    paths = [path for path in folder.glob("epoch-*.pth") if path.stem[6:].isdecimal()]
    if paths:
        return sorted(paths)
    advice = "train with --keep-epochs"
    if list(folder.glob("seed-*/epoch-*.pth")):
        advice = "name one of its seeds"
    raise UserError(f"{run} has no epoch-*.pth: {advice}")


def choose_examples(network: nn.Module, test: Split) -> torch.Tensor:
    """An image of each class, preferably one that is classified correctly: int64 (classes,)."""
    predictions = ic.evaluate(network, *test).logits.argmax(1)
    is_correct = predictions == test.labels
    correct_first = is_correct.int().argsort(descending=True, stable=True)
    _, first_of_class = np.unique(test.labels[correct_first].numpy(), return_index=True)
    return correct_first[torch.from_numpy(first_of_class)]


def draw_frame(picture: torch.Tensor, caption: str) -> Image.Image:
    """A frame of an animation: a picture, uint8 (3, H, W), above its caption."""
    size = (FRAME_SIZE, FRAME_SIZE)
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    frame = Image.new("RGB", (FRAME_SIZE, FRAME_SIZE + CAPTION_HEIGHT), "white")
    frame.paste(image.resize(size, Image.Resampling.BICUBIC))
    ImageDraw.Draw(frame).text((4, FRAME_SIZE + 2), caption, "black")
    return frame


def save_animation(frames: list[Image.Image], path: Path) -> None:
    """Write a GIF file that plays in a loop, with a longer pause at its end."""
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
    )
    write_atomically(path, buffer.getvalue())


# ---- Labels that are probably wrong --------------------------------------------------------------


def find_label_issues(model: Classifier, data: Dataset, device: torch.device, out: Path) -> None:
    """List and draw training images whose label is probably wrong, the most suspicious first.

    By confident learning (Northcutt et al., 2021, cleanlab) on predictions of networks that were
    not trained on the image.
    """
    from cleanlab import filter as cleanlab_filter

    check_class_sizes(data.train.labels, data.train_ids)
    config = settings_of_folds(model, data)
    try:
        with training_process(device, config.deterministic):
            probabilities = out_of_fold_probabilities(config, data, device)
    except UserError as error:
        raise UserError(
            f"{model.path} cannot be trained again here: {error} (options are those of "
            "image_classification.py, which it was trained with)"
        ) from None
    issues = cleanlab_filter.find_label_issues(
        data.train.labels.numpy(),
        probabilities.numpy(),
        return_indices_ranked_by="self_confidence",
        n_jobs=1,
    )
    indices = torch.from_numpy(issues.copy())  # int64, the most suspicious image first
    save_label_issues(data, indices, probabilities, out)
    print(
        f"{len(indices)} of {len(data.train.labels)} labels look wrong. Some of them are right and "
        "the networks wrong: look at each before you change it"
    )


def settings_of_folds(model: Classifier, data: Dataset) -> Config:
    """The settings of the networks that judge labels: those that the model was trained with.

    They start from the weights that the model started from, unless these are gone or may have seen
    the images. What is left then is random weights, and no layer is frozen.
    """
    settings = {**model.settings, "minutes": 0.0, "resume": "", "compile": False}
    settings["drop_easiest"] = 0.0  # wrong labels have the largest losses
    init_from = settings.get("init_from")
    problem = problem_with_weights(model, data, init_from) if init_from else ""
    if problem:
        settings["init_from"] = ""
        start = "ImageNet's weights"
        if not settings.get("pretrained"):
            # a frozen layer with random weights would learn nothing
            settings |= {"freeze": False, "head_first": 0.0, "first_layer_lr": 1.0}
            start = "random weights, and all layers are trained"
        note = escape_control_characters(f"{problem}: the networks start from {start}")
        print(f"note: {note}")  # it has a path from a file, which may be a stranger's
    return Config(**settings)


def problem_with_weights(model: Classifier, data: Dataset, path: str) -> str:
    """Why other networks cannot start from the weights that this model started from.

    path: the file with these weights. Empty if they can.
    """
    if is_network_path(path):
        return f"the model started from {path}, which looks like a network path and is not asked"
    if not Path(path).is_file():
        return f"the model started from {path}, which is no longer there"
    network = model.require_network()
    try:
        saved = read_weights(path, network)
        weights = {**saved.weights, **last_layer_weights(network)}
        if model.settings.get("pretrained"):  # what the network does not have is left out
            weights = {name: weights[name] for name in network.state_dict() if name in weights}
        check_weights(network, weights, path)
    except (UserError, OSError) as error:
        return f"the model started from {path}: {error}"
    if saved.checkpoint is None:
        if has_imagenets_classes(saved.weights, model):
            return ""
        return f"{path}, from which the model started, does not tell which images it has seen"
    if may_have_seen(saved.checkpoint, model, data):
        return f"{path}, from which the model started, may have seen these images"
    return ""


def has_imagenets_classes(weights: dict[str, torch.Tensor], model: Classifier) -> bool:
    """Whether these weights are for ImageNet's 1000 classes, as torchvision's own are.

    weights: under the names that the model's network has. False where the model itself is for as
    many classes: then it cannot be told.
    """
    if len(model.classes) == IMAGENET_CLASSES:
        return False
    last_layer = last_layer_weights(model.require_network())
    return all(
        name in weights and weights[name].shape[:1] == (IMAGENET_CLASSES,) for name in last_layer
    )


def may_have_seen(content: dict[str, Any], model: Classifier, data: Dataset) -> bool:
    """Whether the network in a model file may have been trained on images of a model's data set.

    content: of the file. If it does not list its images, it is judged by its data set and classes.
    """
    digests = seen_images.digests_in_file(content)
    if digests is not None and data.train_ids is not None:
        return bool(seen_images.is_seen(data, data.train_ids, digests).any())
    same_dataset = content["config"].get("dataset") == model.settings.get("dataset")
    return same_dataset or sorted(content["classes"]) == sorted(model.classes)


def save_label_issues(
    data: Dataset, indices: torch.Tensor, probabilities: torch.Tensor, out: Path
) -> None:
    """Write label_issues.csv, and label_issues.png if there are any.

    indices: int64, of training images. probabilities: float32 (N, classes), of all of them.
    """
    images, labels = data.train
    confidences, predictions = probabilities.max(1)
    assert data.train_indices is not None  # every data set has them once it is loaded
    rows: list[list[Any]] = []
    titles = []
    for i in indices.tolist():
        index = int(data.train_indices[i])
        label, prediction = data.classes[labels[i]], data.classes[predictions[i]]
        confidence = round(float(confidences[i]), 4)
        rows.append([file_of(data, index), index, label, prediction, confidence])
        title = f"labelled {label},\nlooks like {prediction}"
        file_line = f"{plots.file_title(data.files[index])}\n" if data.files else ""
        titles.append(file_line + title)

    header = ["file", "index_in_training_set", "label", "looks_like", "confidence"]
    save_table(header, rows, out / "label_issues.csv")
    if rows:
        shown = images[indices[:GALLERY_SIZE]]
        save_grid(shown, titles[:GALLERY_SIZE], GALLERY_COLUMNS, out / "label_issues.png")


def file_of(data: Dataset, index: int) -> Path | str:
    """The file of a training image; empty for a data set that is not a folder of images."""
    if data.files is None or data.report is None:
        return ""
    return Path(data.report["folder"], data.files[index])


def out_of_fold_probabilities(config: Config, data: Dataset, device: torch.device) -> torch.Tensor:
    """Probabilities of each training image by a network that was not trained on it.

    Returns float32 (N, classes).
    """
    probabilities = torch.zeros(len(data.train.labels), len(data.classes))
    folds = stratified_folds(data.train.labels, data.train_ids)
    for number, (train_indices, held_out) in enumerate(folds, 1):
        print(
            f"Network {number} of {NUM_FOLDS}: trains on {len(train_indices)} images, to judge "
            f"the other {len(held_out)}"
        )
        train, valid = data.train.select(train_indices), data.train.select(held_out)
        fold = replace(data, train=train, valid=valid, checksums=None)
        if data.train_ids is not None:
            train_ids, valid_ids = (data.train_ids.select(i) for i in (train_indices, held_out))
            fold = replace(fold, train_ids=train_ids, valid_ids=valid_ids)
        probabilities[held_out] = train_and_predict(config, fold, device)
        gc.collect()  # torch's optimisers keep what refers to them, and so the whole trainer
    return probabilities


def check_class_sizes(labels: torch.Tensor, ids: ImageIds | None = None) -> None:
    """Raise UserError if a class has too few images for NUM_FOLDS folds.

    labels: int64 (N,). ids: what the images of a folder are known by.
    """
    different = labels
    if ids is not None:
        different = torch.stack([labels, ids.groups]).unique(dim=1)[0]  # the label of each group
    if different.bincount().min() < NUM_FOLDS:
        raise UserError(
            f"to find wrong labels, each class needs at least {NUM_FOLDS} training images that "
            "are not alike"
        )


def stratified_folds(
    labels: torch.Tensor, ids: ImageIds | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Indices to train on and indices held out, for each fold; every class is in every fold.

    Identical and near-identical images of a folder are held out together.

    labels: int64 (N,). ids: what the images of a folder are known by.
    """
    from sklearn.model_selection import StratifiedKFold

    if ids is not None:
        fold_of_image = splits.folds(labels.numpy(), ids.groups.numpy(), NUM_FOLDS)
        for fold in range(NUM_FOLDS):
            is_held_out = torch.from_numpy(fold_of_image == fold)
            yield (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]
        return
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0)
    no_features = np.zeros(len(labels))
    for train_indices, held_out in folds.split(no_features, labels.numpy()):
        yield torch.from_numpy(train_indices), torch.from_numpy(held_out)


def train_and_predict(config: Config, data: Dataset, device: torch.device) -> torch.Tensor:
    """Train a network; nothing is validated or written.

    Returns its probabilities of the validation images, float32 (N, classes).
    """
    trainer = ic.Trainer(config, data, device)
    heartbeat = Heartbeat(trainer.state, trainer.group, config.progressive_resizing)
    while not trainer.state.progress.done:
        ic.train_one_epoch(trainer, heartbeat)
        # --scheduler plateau reads the losses
        trainer.state.end_epoch(valid_loss=None, valid_accuracy=None)
    return ic.evaluate(trainer.state.eval_model(), *data.valid).logits.softmax(1)


# ---- The command line ----------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    """The options of this process; ends it with status 2 if they are wrong."""
    parser = tool_parser(__doc__)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--image",
        metavar="FILE",
        help="the image whose feature maps are drawn (default: a test image)",
    )
    modes.add_argument(
        "--animate", metavar="RUN", help="a run folder, whose epochs become animations"
    )
    modes.add_argument(
        "--label-issues",
        action="store_true",
        help=f"train {NUM_FOLDS} networks to find wrong labels",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where the data set is (default: data/, else where it was in training)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default="explained",
        metavar="DIR",
        help="folder for everything (default: explained)",
    )
    options = parser.parse_args()
    if options.animate and options.checkpoint != parser.get_default("checkpoint"):
        parser.error("--checkpoint: not with --animate, which takes the models of a run")
    if options.image and options.data_dir:
        parser.error("--data-dir: not with --image, which needs no other images")
    return options


def main() -> int:
    """Run as from the command line; returns the exit status."""
    options = parse_options()
    out = options.out
    prepare_folder(out)
    device = choose_device(options.device)
    if options.animate:
        animate(options.animate, options.model, device, options.data_dir, out)
        return 0

    model = load_model(options.checkpoint, device, options.model)
    network = model.require_network()
    print(f"{escape_control_characters(str(model.path))}, trained on {model.dataset}")
    if options.image:
        image = torch.from_numpy(read_image(model, options.image))[None]
        name = Path(options.image).stem
        draw_feature_maps(model, image, out / f"feature_maps_{name}.png")
        return 0

    data = load_dataset_of(model, options.data_dir)
    if options.label_issues:
        if device.type == "cpu":
            keep_freed_memory()
        find_label_issues(model, data, device, out)
        return 0

    predictions = draw_galleries(model, data.test, out, data.test_files)
    draw_filters(network, out)
    first_image = data.test.images[torch.tensor([0])]
    draw_feature_maps(model, first_image, out / "feature_maps.png")
    list_confused_classes(model.classes, data.test.labels, predictions, out)
    return 0


if __name__ == "__main__":
    end_process(run_tool(main))
