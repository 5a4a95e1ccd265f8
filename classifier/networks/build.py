"""From the settings to a network with its initial weights.

model = instantiate(config, 10, mean, std, 32, cnn=CNN)     --model, with weights drawn from --seed
loaded = load_initial_weights(model, config, data)          --pretrained and --init-from
print_summary(model, (3, 32, 32))                           a table of its layers
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from classifier.checkpoints import (
    load_weights,
    read_checkpoint,
    read_state_dict,
    without_wrapper,
)
from classifier.config import Config, flag, is_custom_model, is_library_model
from classifier.datasets.dataset import Dataset
from classifier.errors import UsageError, UserError
from classifier.networks import custom, libraries, pretrained
from classifier.networks.pretrained import PretrainedNetwork
from classifier.networks.references import FACTORIES
from classifier.text import OTHER_MODELS, did_you_mean


def network_factory(model: str, cnn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The factory that --model names.

    It is called as `factory(classes=10, channels=3, image_size=32)`; some factories also take
    `width`, `dropout` or `pretrained`.

    cnn: the factory of the default network, which is in the script.

    Raises UsageError for an unknown model, UserError for a FILE.py that fails.
    """
    if model == "cnn":
        return cnn
    if model in FACTORIES:
        return FACTORIES[model]
    if is_library_model(model):
        return libraries.factory(model)
    if is_custom_model(model):
        return custom.load_factory(model)
    suggestion = did_you_mean(model, ["cnn", *FACTORIES], OTHER_MODELS)
    raise UsageError(f"unknown model {model}: {suggestion}")


def instantiate(
    config: Config,
    num_classes: int,
    mean: list[float],
    std: list[float],
    image_size: int,
    cnn: Callable[..., nn.Module],
    skip_check: bool = False,
) -> nn.Module:
    """Build the network of `config.model`, its weights drawn from `config.seed`.

    It holds `pixel_mean` and `pixel_scale`, which normalise its images, as buffers that move with
    it to a device but are no part of its state dict.

    Args:
        mean, std: of the training images, per channel, in [0, 1]. A PretrainedNetwork takes
            those that its published weights are made for.
        image_size: width and height of the images, in pixels.
        cnn: the factory of the default network.
        skip_check: do not try the network on two empty images.

    Raises UsageError for an option that this network does not have, UserError for a network that
    does not work.
    """
    torch.manual_seed(config.seed)
    channels = len(mean)
    try:
        factory = network_factory(config.model, cnn)
        options = _factory_options(config, factory)
        network = factory(classes=num_classes, channels=channels, image_size=image_size, **options)
        if not isinstance(network, nn.Module):
            kind = type(network).__name__
            raise UserError(f"--model {config.model} returns a {kind}, not a torch.nn.Module")
        if not skip_check:
            _check_forward(network, config, num_classes, channels, image_size)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's factory may raise anything
        raise _network_error(error, config, image_size) from error
    if config.pretrained:
        assert isinstance(network, PretrainedNetwork)  # no other network has this option
        mean, std = network.published.mean, network.published.std
    pixel_mean = torch.tensor(mean).view(1, -1, 1, 1) * 255
    pixel_std = torch.tensor(std).view(1, -1, 1, 1) * 255
    network.register_buffer("pixel_mean", pixel_mean, persistent=False)
    network.register_buffer("pixel_scale", 1 / pixel_std, persistent=False)
    return network.train()


def _factory_options(config: Config, factory: Callable[..., nn.Module]) -> dict[str, Any]:
    """Keyword arguments from --width, --dropout and --pretrained, where they are given.

    Raises UsageError for one that the factory does not take.
    """
    if config.pretrained and not is_library_model(config.model):
        raise UsageError(
            f"--pretrained works only with torchvision:NAME and timm:NAME, not with {config.model}"
        )
    options: dict[str, Any] = {}
    if config.width is not None:
        options["width"] = config.width
    if config.dropout is not None:
        options["dropout"] = config.dropout
    if config.pretrained:
        options["pretrained"] = True
    accepted = inspect.signature(factory).parameters
    for name in options:
        if name not in accepted:
            raise UsageError(f"the network {config.model} has no option {flag(name)}")
    return options


def _check_forward(
    network: nn.Module, config: Config, num_classes: int, channels: int, image_size: int
) -> None:
    """Try a network on empty images of each size it will get. Lazy layers get their shapes here."""
    sizes = [image_size]
    if config.progressive_resizing:
        sizes.append(image_size // 2)
    network.eval()
    for size in sizes:
        with torch.no_grad():
            logits = network(torch.zeros(2, channels, size, size))
        if is_custom_model(config.model):
            custom.check_logits(logits, num_classes, config.model)


def _network_error(error: BaseException, config: Config, image_size: int) -> UserError:
    """What is wrong with a network that cannot be built or fails on empty images."""
    hint = ""
    if is_custom_model(config.model):
        hint = custom.error_hint(error, config.model)
    elif not isinstance(error, ValueError):  # a ValueError says itself what the network needs
        hint = libraries.size_hint(config.model, image_size)
    images = f"images of {image_size} pixels"
    if config.progressive_resizing:
        images += f", or of {image_size // 2}, with which --progressive-resizing begins"
    reason = custom.describe_error(error) + hint
    return UserError(f"--model {config.model} does not work on {images}: {reason}")


def smoke_test_custom(model: nn.Module, config: Config, image_shape: tuple[int, ...]) -> None:
    """Train a user's network on empty images of that shape, (C, H, W); it stays as it is.

    Raises UserError if that fails. Does nothing for other networks.
    """
    if is_custom_model(config.model):
        custom.smoke_test(model, config.model, image_shape, config.batch_size or 2)


def freeze(model: nn.Module, config: Config) -> None:
    """With --freeze, train only the last layer.

    Raises UsageError if the other layers would keep the weights they were drawn with.
    """
    if not config.freeze:
        return
    if not config.init_from and not config.pretrained:
        raise UsageError(
            "--freeze trains only the last layer: it needs --init-from or --pretrained"
        )
    pretrained.freeze_all_but_last_layer(model)


def load_initial_weights(model: nn.Module, config: Config, data: Dataset) -> bool:
    """Load the weights of --pretrained or --init-from; False if the settings have neither.

    The last layer of a file for other classes stays new. Raises UserError for a file that is
    damaged or holds another network, OSError for one that cannot be read.
    """
    if config.pretrained:
        assert isinstance(model, PretrainedNetwork)
        _load_pretrained(model, config.init_from, data.classes)
        return True
    if config.init_from:
        _load_from_file(model, config, data.classes)
        return True
    return False


class SavedWeights(NamedTuple):
    """The weights in a file.

    Attributes:
        weights: under the names that the network has, where they fit.
        checkpoint: the content of the file, if it is a checkpoint of this program; None for a state
            dict, which does not tell what the network was trained on.
    """

    weights: dict[str, torch.Tensor]
    checkpoint: dict[str, Any] | None


def read_weights(path: str, model: nn.Module) -> SavedWeights:
    """Read the weights for a network: a checkpoint of ours, or the state dict of another program.

    Raises UserError if the file holds neither, OSError if it cannot be read.
    """
    expected = model.state_dict()
    try:
        checkpoint = read_checkpoint(path)
    except UserError:
        weights = read_state_dict(path)
        if weights is None:
            raise
        if isinstance(model, PretrainedNetwork):  # the library's own names, or those of ours
            weights = without_wrapper(weights, {*expected, *model.body.state_dict()})
            if not any(name in expected for name in weights):
                weights = pretrained.rename_published_weights(weights)
        return SavedWeights(without_wrapper(weights, expected), None)
    return SavedWeights(without_wrapper(checkpoint["model"], expected), checkpoint)


def _load_pretrained(model: PretrainedNetwork, init_from: str, classes: list[str]) -> None:
    """Load the published weights, or those in a file: the library's own or a checkpoint of ours."""
    if not init_from:
        weights = pretrained.download_weights(model)
        pretrained.load_pretrained(model, weights, model.published.url, keep_last_layer=False)
        return
    try:
        saved = read_weights(init_from, model)
    except UserError as error:
        raise UserError(f"--pretrained: {error}") from None
    saved = _in_order(saved, model, classes)
    keep, note = _judge_last_layer(model, saved, classes)
    pretrained.load_pretrained(model, saved.weights, init_from, keep_last_layer=keep)
    _print_note(init_from, note)


def _load_from_file(model: nn.Module, config: Config, classes: list[str]) -> None:
    """Load the weights of --init-from: a checkpoint, or a state dict of another program."""
    path = config.init_from
    saved = read_weights(path, model)
    saved = _in_order(saved, model, classes)
    keep, note = _judge_last_layer(model, saved, classes)
    weights = saved.weights
    if not keep:
        weights = {**weights, **pretrained.new_last_layer_weights(model)}
    try:
        load_weights(model, weights, path)
    except UserError as error:
        settings = saved.checkpoint["config"] if saved.checkpoint else {}
        differences = _network_options_of(settings, config)
        if not differences:
            raise
        raise UserError(f"{error}; it was made with {differences}") from None
    _print_note(path, note)


def _in_order(saved: SavedWeights, model: nn.Module, classes: list[str]) -> SavedWeights:
    """The weights of a checkpoint, its last layer in the order of these classes.

    A checkpoint for other classes stays as it is, and one whose last layer does not have an output
    for each class.
    """
    checkpoint = saved.checkpoint
    if checkpoint is None or sorted(checkpoint["classes"]) != sorted(classes):
        return saved
    weights = dict(saved.weights)
    rows = [checkpoint["classes"].index(name) for name in classes]
    for name in pretrained.last_layer_weights(model):
        if name not in weights or weights[name].shape[:1] != (len(classes),):
            return saved
        weights[name] = weights[name][rows]
    return SavedWeights(weights, {**checkpoint, "classes": classes})


def _judge_last_layer(
    model: nn.Module, saved: SavedWeights, classes: list[str]
) -> tuple[bool, str]:
    """Whether to use the last layer in a file, and what to tell the user about it, if anything.

    A state dict names no classes: its last layer is used where its shape fits.
    """
    if saved.checkpoint is not None:
        if saved.checkpoint["classes"] == classes:
            return True, ""
        return False, "is for other classes: the last layer is reinitialised"
    for name, tensor in pretrained.last_layer_weights(model).items():
        if name not in saved.weights or saved.weights[name].shape != tensor.shape:
            return False, "has a last layer that does not fit here: it is reinitialised"
    return True, "names no classes: its last layer is taken for these, in this order"


def _print_note(path: str, note: str) -> None:
    """Print a note on a file whose weights have been loaded, if there is one."""
    if note:
        print(f"note: {path} {note}")


def _network_options_of(settings: dict[str, Any], config: Config) -> str:
    """The options of the network that a checkpoint was made with, where they differ from config."""
    options = []
    for name in ("model", "width"):
        value = settings.get(name)
        if value is not None and value != getattr(config, name):
            options.append(f"{flag(name)} {value}")
    if settings.get("pretrained") and not config.pretrained:
        options.append("--pretrained")
    return " ".join(options)


def print_summary(model: nn.Module, image_shape: tuple[int, ...]) -> None:
    """Print torchsummary's table of a network on the CPU.

    Where torchsummary fails, print the number of parameters. Random states and the network stay as
    they are. image_shape: (C, H, W).
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            from torchsummary import summary

            # A copy, because torchsummary leaves its hooks in a network that fails.
            summary(copy.deepcopy(model).eval(), image_shape, device="cpu")
    except Exception as error:
        num_parameters = sum(weight.numel() for weight in model.parameters())
        print(f"{num_parameters:,} parameters (no table: {error!r})")
