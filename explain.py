"""See what a trained network sees.

    python explain.py                                galleries, Grad-CAM, filters, feature maps, confused classes
    python explain.py --image cat.jpg                feature maps and Grad-CAM of a picture of your own
    python explain.py --animate runs/CIFAR10/NAME    Grad-CAM through the epochs of a run made with --keep-epochs
    python explain.py --label-issues                 training images with a label that is probably wrong

Everything goes into the folder explained/. Grad-CAM (Selvaraju et al., 2017) shows where the network found what speaks
for a class: the gradient of the class's logit weighs the last feature maps. By Captum.
"""

import contextlib
import csv
import functools
import io
import itertools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    from captum.attr import LayerAttribution, LayerGradCam
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    import image_classification as ic
    from inference import Classifier, InferenceError, load_its_data, load_model, parser, ranked, read_one, run
except ImportError as problem:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {problem}: install what this program needs with: pip install -r requirements-extras.txt")
except KeyboardInterrupt:
    sys.exit(130)

SHOWN = 40  # images in a gallery
FOLDS = 3  # networks that --label-issues trains, each without a third of the images


def stages(network: torch.nn.Module, image: torch.Tensor) -> list[tuple[str, torch.nn.Module, torch.Tensor]]:
    """Of each size of feature maps the last layer: its name, itself, what it gives of an image, uint8 (1, C, H, W).

    From the largest maps to the smallest; empty for a network that has none.
    """
    found: dict[torch.Size, tuple[str, torch.nn.Module, torch.Tensor]] = {}

    def note(name: str, layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            found.pop(output.shape[2:], None)  # the last layer of a size stands for it, at its own place in the order
            found[output.shape[2:]] = (name, layer, output.detach().clone())

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, layer in list(network.named_modules())[1:]:  # the first one is the network itself
            hooks.enter_context(layer.register_forward_hook(functools.partial(note, name)))
        network(ic.normalise(image.to(next(network.parameters()).device), network))
    return list(found.values())


def grad_cam(network: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Where a network in eval mode finds what speaks for a class.

    images: uint8 (N, C, H, W); targets: int64 (N,), the classes. Returns float32 (N, H, W) in [0, 1] on the CPU, 1
    where most speaks for it. Raises InferenceError for a network without feature maps.
    """
    if not (found := stages(network, images[:1])):
        raise InferenceError("this network has no feature maps, and so no Grad-CAM")
    device, method, heat = next(network.parameters()).device, LayerGradCam(network, found[-1][1]), []
    for some, classes in zip(images.split(50), targets.split(50), strict=True):
        inputs = ic.normalise(some.to(device), network).requires_grad_()  # frozen layers alone would give no gradient
        maps = method.attribute(inputs, target=classes.to(device), relu_attributions=True)
        large = LayerAttribution.interpolate(maps, tuple(images.shape[2:]), "bilinear")
        heat.append(large.detach().float().cpu()[:, 0])
    result = torch.cat(heat)
    return result / result.amax((1, 2), keepdim=True).clamp(min=1e-12)


def overlay(images: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Images, uint8 (N, 3, H, W), under a heat map, float (N, H, W) in [0, 1], which hides them more where it is hot.

    Returns uint8 (N, 3, H, W).
    """
    colours = torch.from_numpy(colormaps["turbo"](heat.numpy())[..., :3]).permute(0, 3, 1, 2) * 255
    share = 0.15 + 0.4 * heat[:, None]
    return ((1 - share) * images + share * colours).byte()


def save(images: torch.Tensor, titles: list[str], columns: int, path: Path) -> None:
    ic.save_figure(ic.draw_images(images, titles, columns), path)
    print(f"{path}: {len(images)} images")


def save_csv(header: list[str], rows: list[list[Any]], path: Path) -> None:
    csv.writer(text := io.StringIO(newline="")).writerows([header, *rows])
    ic.write_atomically(path, text.getvalue().encode())
    print(f"{path}: {len(rows)} rows")


def galleries(model: Classifier, data: Any, out: Path) -> torch.Tensor:
    """Right and wrong predictions on the test images, the most confident first, with and without Grad-CAM.

    Returns the predictions, int64 (N,).
    """
    images, labels = data.test
    sure, guess = (ic.evaluate(model.network, images, labels).logits / (model.temperature or 1)).softmax(1).max(1)
    for kind, chosen in (("correct", guess == labels), ("incorrect", guess != labels)):
        order = (sure * chosen).argsort(descending=True)[: min(SHOWN, int(chosen.sum()))]
        if not len(order):
            print(f"No gallery_{kind}.png: there is no such prediction among {len(labels)}")
            continue
        titles = []
        for i in order.tolist():
            true, other, surety = model.classes[labels[i]], model.classes[guess[i]], ic.percent(sure[i].item())
            titles.append(f"{true}\n{surety}" if true == other else f"{true}, taken for\n{other}, {surety}")
        save(images[order], titles, 8, out / f"gallery_{kind}.png")
        try:
            heat = grad_cam(model.network, images[order], guess[order])
            save(overlay(images[order], heat), titles, 8, out / f"gallery_{kind}_cam.png")
        except InferenceError as error:
            print(f"No gallery_{kind}_cam.png: {error}")
    return guess


def confused(classes: list[str], labels: torch.Tensor, guess: torch.Tensor, out: Path) -> None:
    """Print and write the pairs of classes that are taken for each other, the most often confused first."""
    known = len(classes)
    matrix = torch.bincount(labels * known + guess, minlength=known**2).view(known, known).tolist()
    rows = []
    for one, other in itertools.combinations(range(known), 2):
        there, back, both = matrix[one][other], matrix[other][one], sum(matrix[one]) + sum(matrix[other])
        if total := there + back:
            rows.append([classes[one], classes[other], total, there, back, round(total / both, 4)])
    rows.sort(key=lambda row: -row[2])
    for a, b, count, there, back, share in rows[:10]:
        print(f"{a} and {b}: {count} confused, {ic.percent(share)} of both ({there} {a} as {b}, {back} {b} as {a})")
    header = ["class", "other", "confused", "class_as_other", "other_as_class", "share_of_both"]
    save_csv(header, rows, out / "confused.csv")


def filters(network: torch.nn.Module, out: Path) -> None:
    """filters.png: what each filter of the first convolution looks for; in colour where it sees colours."""
    convolutions = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
    if not convolutions:
        print("No filters.png: this network has no convolution")
        return
    weights = convolutions[0].weight.detach().float().cpu()
    weights = weights if weights.shape[1] == 3 else weights.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    low, high = weights.amin((1, 2, 3), keepdim=True), weights.amax((1, 2, 3), keepdim=True)
    pictures = ((weights - low) / (high - low).clamp(min=1e-12) * 255).byte()
    save(pictures, [str(i) for i in range(len(pictures))], 12, out / "filters.png")


def feature_maps(model: Classifier, image: torch.Tensor, path: Path) -> None:
    """A picture of what each stage of the network makes of an image, uint8 (1, 3, H, W): its 8 strongest maps."""
    found = stages(model.network, image)
    label, share = ranked(model, image.numpy(), 1)[0][0]
    figure = ic.draw(len(found) + 1, 9, 1.3, 1.5)
    for axes in figure.axes:
        axes.axis("off")
    figure.axes[0].imshow(image[0].permute(1, 2, 0).numpy())
    figure.axes[0].set_title(f"{label}\n{ic.percent(share)}", fontsize=8, parse_math=False)
    if found:
        heat = grad_cam(model.network, image, torch.tensor([model.classes.index(label)]))
        figure.axes[1].imshow(overlay(image, heat)[0].permute(1, 2, 0).numpy())
        figure.axes[1].set_title("Grad-CAM", fontsize=8)
    for row, (name, layer, output) in enumerate(found, 1):
        maps = output[0].float().cpu()
        strongest = maps.abs().mean((1, 2)).argsort(descending=True)[:8].tolist()
        text = f"{name}\n{type(layer).__name__}\n{maps.shape[2]} x {maps.shape[1]}"
        figure.axes[9 * row].text(0, 0.5, text, fontsize=7, va="center")
        for axes, channel in zip(figure.axes[9 * row + 1 :], strongest, strict=False):
            axes.imshow(maps[channel].numpy(), cmap="viridis")
            axes.set_title(str(channel), fontsize=7)
    ic.save_figure(figure, path)
    print(f"{path}: {label} {ic.percent(share)}, {len(found)} stages")


def animate(run_folder: Path, model: str, device: torch.device, data_dir: str | None, out: Path) -> None:
    """cam_<class>.gif: Grad-CAM of a test image of each class, an epoch a frame, from a run made with --keep-epochs."""
    paths = sorted(run_folder.glob("epoch-*.pth"))
    if not paths:
        mend = "name one of its seeds" if list(run_folder.glob("seed-*/epoch-*.pth")) else "train with --keep-epochs"
        raise InferenceError(f"{run_folder} has no epoch-*.pth: {mend}")
    last = load_model(paths[-1], device, model)
    data = load_its_data(last, data_dir)
    labels = data.test.labels
    right = ic.evaluate(last.network, *data.test).logits.argmax(1) == labels
    order = right.int().argsort(descending=True, stable=True)
    chosen = order[np.unique(labels[order], return_index=True)[1]]  # of each class the first, if possible a right one
    images, targets = data.test.images[chosen], labels[chosen]
    names = [data.classes[target] for target in targets]
    frames: list[list[Image.Image]] = [[] for _ in names]
    for epoch, path in enumerate(ic.tqdm(paths, "Grad-CAM", unit="epoch", leave=False, disable=None)):
        network = load_model(path, device, model).network
        shares = ic.evaluate(network, images, targets).logits.softmax(1)
        pictures = overlay(images, grad_cam(network, images, targets)).permute(0, 2, 3, 1).numpy()
        for place, name in enumerate(names):
            canvas = Image.new("RGB", (160, 176), "white")
            canvas.paste(Image.fromarray(pictures[place]).resize((160, 160), Image.Resampling.BICUBIC))
            caption = f"epoch {epoch}: {100 * shares[place, targets[place]]:.0f} % {name}"
            ImageDraw.Draw(canvas).text((4, 162), caption, "black")
            frames[place].append(canvas)
    durations = [200] * (len(paths) - 1) + [1500]  # ms
    for name, (first, *rest) in zip(names, frames, strict=True):
        first.save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=rest, duration=durations, loop=0)
        ic.write_atomically(out / f"cam_{name.replace('/', '-')}.gif", buffer.getvalue())
    print(f"{out}: cam_<class>.gif of {len(frames)} classes, {len(paths)} epochs")


def held_out(config: ic.Config, data: Any, device: torch.device) -> torch.Tensor:
    """Probabilities of the training images by networks that did not train on them: float32 (N, classes)."""
    from sklearn.model_selection import StratifiedKFold

    labels = data.train.labels
    if labels.bincount().min() < FOLDS:
        raise InferenceError(f"to find wrong labels, each class needs at least {FOLDS} training images")
    shares = torch.zeros(len(labels), len(data.classes))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(np.zeros(len(labels)), labels.numpy())
    for number, (learned, asked) in enumerate(folds, 1):
        train, valid = data.train.only(learned), data.train.only(asked)
        trainer = ic.Trainer(config, replace(data, train=train, valid=valid), device)
        trainer.settle_batch()
        print(f"Network {number} of {FOLDS}: trains on {len(learned)} images, to judge the other {len(asked)}")
        with tempfile.TemporaryDirectory() as scratch:
            while trainer.step < trainer.total_steps:
                ic.train_one_epoch(trainer, Path(scratch, "last.pth"), [])
        shares[asked] = ic.evaluate(trainer.tested(), *valid).logits.softmax(1)
    return shares


def label_issues(model: Classifier, data: Any, device: torch.device, out: Path) -> None:
    """Training images whose label is probably wrong, the most suspicious first: label_issues.png and label_issues.csv.

    By confident learning (Northcutt et al., 2021, cleanlab) on predictions of networks that had not seen the image.
    """
    from cleanlab.filter import find_label_issues

    fresh = {"minutes": 0.0, "resume": "", "init_from": ""}  # weights to start from may have seen the images
    if device.type == "cpu":
        ic.keep_freed_memory()
    shares = held_out(ic.Config(**model.settings | fresh), data, device)
    images, labels = data.train
    order = find_label_issues(labels.numpy(), shares.numpy(), return_indices_ranked_by="self_confidence", n_jobs=1)
    names, rows, titles = model.classes, [], []
    for i in order.tolist():
        place, label, guess = int(data.kept[i]), names[labels[i]], names[shares[i].argmax()]
        file = Path(data.report["folder"], data.files[place]) if data.files else ""
        rows.append([file, place, label, guess, round(float(shares[i].max()), 4)])
        titles.append(f"labelled {label},\nlooks like {guess}")
    save_csv(["file", "index_in_training_set", "label", "looks_like", "confidence"], rows, out / "label_issues.csv")
    if rows:
        save(images[order[:SHOWN].copy()], titles[:SHOWN], 8, out / "label_issues.png")
    print(f"{len(rows)} of {len(labels)} labels look wrong; with some the network is wrong: look before you change one")


def main() -> int:
    """Run as from the command line; returns the exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--image", metavar="FILE", help="of which to show the feature maps (default: a test image)")
    arguments.add_argument("--animate", metavar="RUN", help="a run folder, whose epochs become animations")
    arguments.add_argument("--label-issues", action="store_true", help=f"train {FOLDS} networks to find wrong labels")
    arguments.add_argument("--data-dir", metavar="DIR", help="where its data set is (default: where it was trained)")
    folder = "folder for all of it (default: explained)"
    arguments.add_argument("--out", type=Path, default="explained", metavar="DIR", help=folder)
    options = arguments.parse_args()
    (out := options.out).mkdir(parents=True, exist_ok=True)
    device = ic.choose_device(options.device)
    if options.animate:
        animate(Path(options.animate), options.model, device, options.data_dir, out)
        return 0
    model = load_model(options.checkpoint, device, options.model)
    if not model.network:
        raise InferenceError(f"{model.path}: what a network sees is to be had from its .pth only")
    print(f"{model.path}, trained on {model.dataset}")
    if options.image:
        image = torch.from_numpy(read_one(model, options.image))[None]
        feature_maps(model, image, out / f"feature_maps_{Path(options.image).stem}.png")
    elif options.label_issues:
        label_issues(model, load_its_data(model, options.data_dir), device, out)
    else:
        data = load_its_data(model, options.data_dir)
        guess = galleries(model, data, out)
        filters(model.network, out)
        feature_maps(model, data.test.images[[0]], out / "feature_maps.png")
        confused(model.classes, data.test.labels, guess, out)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
