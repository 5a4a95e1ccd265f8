"""From the settings to a network: factory, options, initial weights, frozen layers and table."""

import lzma
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from classifier.checkpoints import save_checkpoint
from classifier.config import Config
from classifier.errors import UsageError, UserError
from classifier.networks.build import (
    freeze,
    instantiate,
    load_initial_weights,
    network_factory,
    print_summary,
    smoke_test_custom,
)
from classifier.networks.references import FACTORIES

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "0.9.1"
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
TEN = [f"class {i}" for i in range(10)]


class CNN(nn.Module):
    """In the place of the script's default network."""

    def __init__(self, classes=10, channels=3, image_size=32, width=1.0, dropout=0.0):
        super().__init__()
        self.convolution = nn.Conv2d(channels, round(8 * width), 3)
        self.norm = nn.BatchNorm2d(round(8 * width))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(round(8 * width), classes)

    def forward(self, images):
        features = self.norm(self.convolution(images)).mean((2, 3))
        return self.classifier(self.dropout(features))


def build(cnn=CNN, num_classes=10, image_size=32, skip_check=False, **settings):
    config = Config(**settings)
    return instantiate(config, num_classes, MEAN, STD, image_size, cnn, skip_check)


def same(first, second):
    return first.keys() == second.keys() and not differing(first, second)


def differing(first, second):
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


def is_new(weight):
    """Whether this may be the weight of a new last layer."""
    return bool(0.007 < weight.std() < 0.013)


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


def save(path, network, classes=TEN, **settings):
    content = {
        "model": network.state_dict(),
        "config": {"model": "cnn", **settings},
        "classes": classes,
        "mean": MEAN,
        "std": STD,
        "image_size": 32,
        "metrics": {},
        "versions": {"image_classification": "0.10.0"},
    }
    save_checkpoint(path, content)


def load(network, classes=TEN, **settings):
    return load_initial_weights(network, Config(**settings), SimpleNamespace(classes=classes))


# ---- factories ----


def test_factories_by_name(folder):
    (folder / "mine.py").write_text("def network(): pass")
    assert network_factory("cnn", CNN) is CNN
    for name, factory in FACTORIES.items():
        assert network_factory(name, CNN) is factory
    assert network_factory("mine.py:network", CNN).__name__ == "network"
    assert type(network_factory("torchvision:resnet18", CNN)()).__name__ == "ResNet"


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("cnnn", "did you mean cnn?"),
        ("cn", "did you mean cnn?"),  # not fcn
        ("resnet", "did you mean resnet18?"),
        ("xyz", "FILE.py:FACTORY"),
        ("nowhere.py:f", "nowhere.py"),
    ],
)
def test_unknown_model(name, named):
    with pytest.raises(UsageError, match=f"unknown model {name}.*{named}".replace("?", r"\?")):
        network_factory(name, CNN)


def test_unknown_torchvision_model_is_wrong_usage():
    with pytest.raises(UsageError, match="resnet19"):
        build(model="torchvision:resnet19")


# ---- instantiate ----


@pytest.mark.parametrize("name", ["cnn", "fcn", "convnet", "torchvision:squeezenet1_1"])
def test_weights_are_drawn_from_the_seed(name):
    first = build(model=name, seed=3)
    torch.rand(5)
    assert same(first.state_dict(), build(model=name, seed=3).state_dict())
    assert not same(first.state_dict(), build(model=name, seed=4).state_dict())
    assert first.training


def test_drawing_starts_with_the_network():
    torch.manual_seed(5)
    expected = CNN().state_dict()
    assert same(build(seed=5).state_dict(), expected)


def test_try_leaves_random_state_and_statistics_alone():
    first = build(skip_check=True)
    after_building = torch.get_rng_state()
    second = build(skip_check=False)
    assert torch.equal(torch.get_rng_state(), after_building)
    assert same(first.state_dict(), second.state_dict())


def test_normalisation_travels_with_the_model_but_not_in_its_file():
    model = build()
    images = torch.randint(0, 256, (5, 3, 4, 4)).float()
    normalised = (images - model.pixel_mean) * model.pixel_scale
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    torch.testing.assert_close(normalised, (images / 255 - mean) / std)
    assert "pixel_mean" not in model.state_dict() and "pixel_scale" not in model.state_dict()
    moved = model.to("meta")
    assert moved.pixel_mean.is_meta and moved.pixel_scale.is_meta


def test_options_reach_the_network():
    assert build(width=0.5).convolution.out_channels == 4
    assert build(dropout=0.4).dropout.p == 0.4
    layers = build(model="resnet18-dropout", dropout=0.0).modules()
    assert {layer.p for layer in layers if isinstance(layer, nn.Dropout)} == {0.0}


@pytest.mark.parametrize(
    ("model", "settings", "option"),
    [
        ("fcn", {"width": 2.0}, "--width"),
        ("convnet", {"dropout": 0.1}, "--dropout"),
        ("torchvision:resnet18", {"width": 2.0}, "--width"),
        ("resnet18", {"pretrained": True}, "--pretrained .*torchvision:NAME and timm:NAME"),
        ("cnn", {"pretrained": True}, "--pretrained .*torchvision:NAME"),
    ],
)
def test_option_that_a_network_does_not_have(model, settings, option):
    with pytest.raises(UsageError, match=f"{option}.*") as caught:
        build(model=model, **settings)
    assert model in str(caught.value)


def test_custom_network_cannot_be_pretrained(folder):
    text = "import torch\ndef network(pretrained=False, **given): return torch.nn.Flatten()"
    (folder / "mine.py").write_text(text)
    with pytest.raises(UsageError, match="--pretrained .* mine.py:network"):
        build(model="mine.py:network", pretrained=True)


class Recorder(CNN):
    """Keeps the shapes of the images that it is given."""

    seen: list = []

    def forward(self, images):
        self.seen.append((tuple(images.shape), self.training, torch.is_grad_enabled()))
        return super().forward(images)


def test_each_size_that_a_run_needs_is_tried(monkeypatch):
    monkeypatch.setattr(Recorder, "seen", [])
    build(cnn=Recorder)
    assert Recorder.seen == [((2, 3, 32, 32), False, False)]
    Recorder.seen.clear()
    build(cnn=Recorder, progressive_resizing=0.5, image_size=28)
    assert [shape[-1] for shape, _, _ in Recorder.seen] == [28, 14]
    Recorder.seen.clear()
    build(cnn=Recorder, progressive_resizing=0.5, skip_check=True)
    assert not Recorder.seen


def test_network_that_cannot_take_half_the_size():
    assert build(model="fcn")
    with pytest.raises(UserError, match="--model fcn .* 32 pixels.* 16.*--progressive-resizing"):
        build(model="fcn", progressive_resizing=0.5)


def test_images_that_are_too_small():
    with pytest.raises(UserError, match="--model convnet needs images of 8 pixels"):
        build(model="convnet", image_size=7)
    with pytest.raises(UserError, match="--model torchvision:squeezenet1_1 .*224 pixels"):
        build(model="torchvision:squeezenet1_1", image_size=8)


def test_lazy_layers_get_their_shapes():
    def lazy(classes, channels, image_size):
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

    model = build(cnn=lazy)
    assert model[1].weight.shape == (10, 3072)


CUSTOM = "from torch import nn\ndef network(**given): return nn.Sequential(nn.Flatten(), {})"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("def network(**given): raise KeyError('boom')", r"KeyError\('boom'\) \(mine.py, line 1\)"),
        ("def network(**given):\n    raise ValueError('x')", r"x \(mine.py, line 2\)"),
        ("def network(**given): pass", "NoneType.*torch.nn.Module"),
        ("def network(**given):\n    import sys; sys.exit(0)", r"SystemExit\(0\) .*line 2"),
        ("def network(size): pass", "unexpected keyword argument"),
        ("import nothing_like_this", "ModuleNotFoundError"),
        ("network = 3", "no function or class network"),
        (CUSTOM.format("nn.Identity()"), r"\(2, 3072\), not \(2, 10\)"),
        (CUSTOM.format("nn.LazyLinear(10), nn.Softmax(1)"), "softmax"),
        (CUSTOM.format("nn.Linear(5, 10)"), "cannot be multiplied"),
    ],
)
def test_broken_custom_network(folder, text, named):
    (folder / "mine.py").write_text(text)
    with pytest.raises(UserError, match=f"--model mine.py:network.*{named}") as caught:
        build(model="mine.py:network")
    assert not isinstance(caught.value, UsageError)


def test_output_of_our_own_networks_is_not_judged():
    assert build(cnn=lambda classes, channels, image_size: nn.Flatten())


def test_only_custom_networks_are_trained_on_trial(folder):
    (folder / "mine.py").write_text(CUSTOM.format("nn.Linear(3072, 10).requires_grad_(False)"))
    config = Config(model="mine.py:network")
    model = instantiate(config, 10, MEAN, STD, 32, CNN)
    with pytest.raises(UserError, match="--model mine.py:network cannot be trained"):
        smoke_test_custom(model, config, (3, 32, 32))
    smoke_test_custom(model, Config(model="cnn"), (3, 32, 32))


def test_custom_network_is_tried_with_the_batch_size(folder):
    (folder / "mine.py").write_text(
        """
from torch import nn
class network(nn.Sequential):
    def __init__(self, **given): super().__init__(nn.Flatten(), nn.Linear(3072, 10))
    def forward(self, x):
        return super().forward(x.view(-1, 5, 3, 32, 32).flatten(0, 1) if self.training else x)
"""
    )
    model = build(model="mine.py:network")
    smoke_test_custom(model, Config(model="mine.py:network", batch_size=25), (3, 32, 32))
    with pytest.raises(UserError, match="cannot be trained"):
        smoke_test_custom(model, Config(model="mine.py:network", batch_size=24), (3, 32, 32))


# ---- --freeze ----


def test_only_the_last_layer_is_trained():
    model = build()
    freeze(model, Config())
    assert all(weight.requires_grad for weight in model.parameters())
    freeze(model, Config(freeze=True, init_from="model.pth"))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}


def test_freezing_new_weights_is_refused():
    model = build()
    with pytest.raises(UsageError, match="--freeze .*--init-from.*--pretrained"):
        freeze(model, Config(freeze=True))
    assert all(weight.requires_grad for weight in model.parameters())


# ---- --init-from ----


def test_without_an_option_the_weights_stay():
    model = build()
    before = copy_of(model.state_dict())
    assert load(model) is False
    assert same(model.state_dict(), before)


def test_weights_of_a_file_for_the_same_classes(folder, capsys):
    source = build(seed=1)
    save(folder / "ten.pth", source)
    model = build(seed=2)
    assert load(model, init_from="ten.pth") is True
    assert same(model.state_dict(), source.state_dict())
    assert "note" not in capsys.readouterr().out


def test_last_layer_starts_anew_for_other_classes(folder, capsys):
    source = build(seed=1, num_classes=7)
    save(folder / "seven.pth", source, classes=[*"abcdefg"])
    model = build(seed=2)
    assert load(model, init_from="seven.pth") is True
    after = model.state_dict()
    assert torch.equal(after["convolution.weight"], source.state_dict()["convolution.weight"])
    assert is_new(after["classifier.weight"])
    assert not after["classifier.bias"].any()
    assert "seven.pth is for other classes" in capsys.readouterr().out


def test_same_number_of_other_classes_counts_as_other(folder):
    save(folder / "other.pth", build(seed=1), classes=[*"abcdefghij"])
    model = build(seed=2)
    load(model, init_from="other.pth")
    assert is_new(model.state_dict()["classifier.weight"])


@pytest.mark.parametrize(
    ("made_with", "config", "named"),
    [
        ({"width": 0.5}, {}, "--width 0.5$"),
        ({"width": 0.5, "model": "other"}, {"width": 1.0}, "--model other --width 0.5$"),
        ({"width": 0.5, "pretrained": True}, {"width": 0.5}, "it was made with --pretrained$"),
        ({"width": 0.5, "pretrained": False}, {"width": 0.5}, r": \d+ [^;]*$"),
    ],
)
def test_file_of_another_network_names_its_options(folder, made_with, config, named):
    save(folder / "model.pth", build(width=0.5), **made_with)
    model = build()
    before = copy_of(model.state_dict())
    with pytest.raises(UserError, match=f"model.pth holds another network.*{named}"):
        load(model, init_from="model.pth", **config)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("content", [b"", b"no weights"])
def test_damaged_file_is_named(folder, content):
    (folder / "bad.pth").write_bytes(content)
    with pytest.raises(UserError, match="bad.pth is damaged"):
        load(build(), init_from="bad.pth")


def state_dicts(network):
    """A network's weights as other programs write them."""
    weights = network.state_dict()
    yield weights
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        yield {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    yield {"n_averaged": torch.tensor(3)} | {f"module.{n}": t for n, t in weights.items()}
    yield {"state_dict": weights, "epoch": 3}
    yield {"model": {f"module.{n}": t for n, t in weights.items()}, "optimizer": {"state": {}}}
    yield {"model_state_dict": weights}


def test_state_dict_of_another_program(folder, capsys):
    source = build(seed=1)
    for content in state_dicts(source):
        for is_zip in (True, False):
            torch.save(content, "plain.pth", _use_new_zipfile_serialization=is_zip)
            model = build(seed=2)
            assert load(model, init_from="plain.pth") is True
            assert same(model.state_dict(), source.state_dict())
            assert "plain.pth names no classes" in capsys.readouterr().out


def test_state_dict_for_other_classes_gets_a_new_last_layer(folder, capsys):
    source = build(seed=1, num_classes=7)
    torch.save({f"module.{n}": t for n, t in source.state_dict().items()}, "plain.pth")
    model = build(seed=2)
    load(model, init_from="plain.pth")
    after = model.state_dict()
    assert torch.equal(after["convolution.weight"], source.state_dict()["convolution.weight"])
    assert is_new(after["classifier.weight"])
    note = capsys.readouterr().out
    assert "plain.pth" in note and "last layer" in note and "other classes" not in note


def test_state_dict_of_another_network_is_refused(folder, capsys):
    model = build()
    before = copy_of(model.state_dict())
    for content in ({"weight": torch.zeros(3)}, build(width=0.5).state_dict()):
        torch.save(content, "plain.pth")
        with pytest.raises(UserError, match="plain.pth holds another network"):
            load(model, init_from="plain.pth")
        assert capsys.readouterr().out == ""  # nothing on the last layer, which is not the matter
    assert same(model.state_dict(), before)


def test_checkpoint_with_the_names_of_a_wrapped_network(folder):
    source = build(seed=1)
    save(folder / "ten.pth", source)
    content = torch.load("ten.pth", weights_only=True)
    content["model"] = {f"_orig_mod.{name}": t for name, t in content["model"].items()}
    torch.save(content, "ten.pth")
    model = build(seed=2)
    load(model, init_from="ten.pth")
    assert same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("pretrained", [False, True])
def test_missing_file_is_named(folder, pretrained):
    settings = {"model": "torchvision:squeezenet1_1", "pretrained": pretrained}
    model = build(**settings)
    with pytest.raises(FileNotFoundError) as caught:
        load(model, init_from="nothere.pth", **settings)
    assert caught.value.filename == "nothere.pth"


def test_model_of_version_0_9_is_loaded(folder):
    packed = (FIXTURES / "model_convnet_digits.pth.xz").read_bytes()
    (folder / "old.pth").write_bytes(lzma.decompress(packed))
    content = torch.load(folder / "old.pth", weights_only=True)
    model = build(model="convnet")
    load(model, classes=content["classes"], model="convnet", init_from="old.pth")
    assert same(model.state_dict(), content["model"])


def test_model_with_an_option_of_version_0_9_names_that_version(folder):
    packed = (FIXTURES / "model_convnet_3_digits.pth.xz").read_bytes()
    (folder / "deep.pth").write_bytes(lzma.decompress(packed))
    with pytest.raises(UserError, match="0.9.1"):
        load(build(model="convnet"), model="convnet", init_from="deep.pth")


# ---- --pretrained ----


PRETRAINED = {"model": "torchvision:squeezenet1_1", "pretrained": True}


@pytest.fixture
def imagenet(folder):
    """A file as torchvision publishes it, with random values."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(1)
    torch.save(squeezenet1_1().state_dict(), folder / "imagenet.pth")
    return "imagenet.pth"


def test_pretrained_network_normalises_as_imagenet_does():
    model = build(**PRETRAINED)
    mean = model.pixel_mean.flatten() / 255
    assert mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    std = 1 / (model.pixel_scale.flatten() * 255)
    assert std.tolist() == pytest.approx([0.229, 0.224, 0.225])


def test_torchvisions_own_file(imagenet, capsys):
    model = build(**PRETRAINED)
    model.body.classifier[1].weight.data.fill_(1.0)
    assert load(model, init_from=imagenet, **PRETRAINED) is True
    after = model.state_dict()
    published = torch.load(imagenet, weights_only=True)
    for name, value in published.items():
        if not name.startswith("classifier"):
            assert torch.equal(after[f"body.{name}"], value)
    assert is_new(after["body.classifier.1.weight"])
    assert "note: imagenet.pth" in capsys.readouterr().out  # on its last layer of 1000 classes


def test_fine_tuned_state_dict_keeps_its_last_layer_where_that_fits(folder, capsys):
    """As without --pretrained: it names no classes."""
    source = build(seed=1, **PRETRAINED)
    for content in (source.state_dict(), source.body.state_dict()):
        torch.save(content, "tuned.pth")
        model = build(seed=2, **PRETRAINED)
        load(model, init_from="tuned.pth", **PRETRAINED)
        assert same(model.state_dict(), source.state_dict())
        assert "tuned.pth names no classes" in capsys.readouterr().out


def test_torchvisions_weights_as_others_write_them(imagenet):
    published = torch.load(imagenet, weights_only=True)
    model = build(**PRETRAINED)
    body = {f"body.{name}": tensor for name, tensor in published.items()}
    wrapped = {f"module.{name}": tensor for name, tensor in published.items()}
    for content in (body, wrapped, {"state_dict": wrapped}):
        torch.save(content, "other.pth")
        model = build(**PRETRAINED)
        assert load(model, init_from="other.pth", **PRETRAINED) is True
        first = published["features.0.weight"]
        assert torch.equal(model.state_dict()["body.features.0.weight"], first)


def test_torchvisions_file_in_the_format_of_older_versions(imagenet):
    content = torch.load(imagenet, weights_only=True)
    torch.save(content, imagenet, _use_new_zipfile_serialization=False)
    model = build(**PRETRAINED)
    assert load(model, init_from=imagenet, **PRETRAINED) is True
    first = content["features.0.weight"]
    assert torch.equal(model.state_dict()["body.features.0.weight"], first)


def test_cached_imagenet_weights(imagenet, folder, monkeypatch):
    model = build(**PRETRAINED)
    monkeypatch.setenv("TORCH_HOME", str(folder / "hub"))
    cache = folder / "hub" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    published = torch.load(imagenet, weights_only=True)
    (folder / imagenet).rename(cache / Path(model.published.url).name)
    assert load(model, **PRETRAINED) is True
    state = model.state_dict()
    assert torch.equal(state["body.features.0.weight"], published["features.0.weight"])


def test_fine_tuned_network_goes_on_with_its_last_layer(folder, capsys):
    source = build(seed=0, **PRETRAINED)
    source.body.classifier[1].bias.data.fill_(1.0)  # drawn as 0 in every network
    save(folder / "own.pth", source, **PRETRAINED)
    model = build(seed=1, **PRETRAINED)
    load(model, init_from="own.pth", **PRETRAINED)
    assert same(model.state_dict(), source.state_dict())
    assert "note" not in capsys.readouterr().out

    save(folder / "own.pth", source, classes=[*"abcdefghij"], **PRETRAINED)
    model = build(seed=1, **PRETRAINED)
    load(model, init_from="own.pth", **PRETRAINED)
    changed = differing(source.state_dict(), model.state_dict())
    assert changed == {"body.classifier.1.weight", "body.classifier.1.bias"}
    assert "own.pth is for other classes" in capsys.readouterr().out


def test_files_that_hold_no_weights_for_a_pretrained_network(folder):
    (folder / "text.pth").write_bytes(b"no weights")
    torch.save([1, 2], folder / "list.pth")
    torch.save({"classes": TEN, "model": {}}, folder / "part.pth")
    torch.save({"weight": torch.zeros(3)}, folder / "other.pth")
    save(folder / "ours.pth", build())
    for name, named in {
        "text.pth": "damaged",
        "list.pth": "damaged",
        "part.pth": "damaged",
        "other.pth": "another network",
        "ours.pth": "another network",
    }.items():
        with pytest.raises(UserError, match=f"--pretrained: {name} .*{named}"):
            load(build(**PRETRAINED), init_from=name, **PRETRAINED)


def test_nothing_in_a_file_is_executed(folder):
    class Malicious:
        def __reduce__(self):
            return (open, (str(folder / "owned"), "w"))

    torch.save({"body": Malicious()}, folder / "evil.pth")
    for settings in ({}, PRETRAINED):
        with pytest.raises(UserError, match="evil.pth"):
            load(build(**settings), init_from="evil.pth", **settings)
    assert not (folder / "owned").exists()


# ---- the table ----


def test_table_changes_nothing(capsys):
    model = build()
    before, random_state = copy_of(model.state_dict()), torch.get_rng_state()
    print_summary(model, (3, 32, 32))
    assert "Total params" in capsys.readouterr().out
    assert same(model.state_dict(), before)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_network_without_a_table_gets_its_number_of_parameters(capsys):
    model, random_state = nn.LSTM(3, 4), torch.get_rng_state()  # it takes no images
    print_summary(model, (3, 32, 32))
    assert "144 parameters" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model._forward_hooks
