"""timm's networks, with new weights and those of its hub, and files of safetensors."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from safetensors.torch import save_file
from torch import nn

import image_classification as ic
import inference
from classifier.checkpoints import read_state_dict
from classifier.config import Config
from classifier.errors import UsageError, UserError
from classifier.networks import build, libraries, timm_models
from classifier.networks.pretrained import download_weights, last_layers
from classifier.resolve import check_before_data, network_defaults

NETWORK = "timm:test_efficientnet"  # the smallest kinds that timm has
TRANSFORMER = "timm:test_vit"
PRETRAINED = {"model": NETWORK, "pretrained": True}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def network(num_classes=10, image_size=32, mean=MEAN, **settings):
    config = Config(**{"model": NETWORK, **settings})
    return ic.instantiate(config, num_classes, mean, STD[: len(mean)], image_size)


def load(into, **settings):
    classes = [f"class {i}" for i in range(10)]
    config = Config(**{"model": NETWORK, **settings})
    return build.load_initial_weights(into, config, SimpleNamespace(classes=classes))


def published(name="test_efficientnet", seed=1):
    """Weights such as timm publishes: its names and shapes, random values."""
    import timm

    torch.manual_seed(seed)
    return timm.create_model(name).state_dict()


@pytest.fixture
def hub(folder, monkeypatch):
    """timm's hub with a file for each network that is asked for; returns the names asked for."""
    asked = []

    def download(repo_id, filename, **_):
        asked.append(repo_id)
        name = repo_id.removeprefix("timm/").partition(".")[0]
        save_file(published(name), folder / "hub.safetensors")
        return str(folder / "hub.safetensors")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return asked


# ---- names ----


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k"])
def test_networks_that_timm_has(name):
    libraries.check_name(f"timm:{name}")
    assert network_defaults(f"timm:{name}") == network_defaults("torchvision:resnet18")


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("resnet81", "resnet18"),
        ("resnet18.a9_in1k", "resnet18.a1_in1k"),
        ("hf-hub:timm/resnet18", "timm.list_models"),  # a file could name it, and load it so
        ("local-dir:.", "timm.list_models"),
        ("", "timm.list_models"),
    ],
)
def test_unknown_name_is_refused_with_close_ones(name, suggested):
    with pytest.raises(UsageError, match=f"timm:{name}") as caught:
        network_defaults(f"timm:{name}")
    assert suggested in str(caught.value)


def test_missing_package_is_named(monkeypatch, inside):
    monkeypatch.setitem(sys.modules, "timm", None)
    error = inside.error(*SMALL, "--model", NETWORK)
    assert "timm" in error and "pip install -r requirements-extras.txt" in error


@pytest.mark.parametrize("model", ["cnn", "resnet18", "torchvision:squeezenet1_1"])
def test_timm_is_imported_only_for_its_networks(monkeypatch, model):
    for package in ("timm", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)  # an import would fail
    config = Config(model=model, pretrained=model.startswith("torchvision:"))
    check_before_data(config)
    ic.instantiate(config, 10, MEAN, STD, 32)


# ---- networks with new weights ----


@pytest.mark.parametrize("model", [NETWORK, TRANSFORMER, "timm:vit_tiny_patch16_224"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_classes_channels_and_image_size(model, channels):
    made = network(7, 48, mean=MEAN[:channels], model=model).eval()
    with torch.no_grad():
        assert made(torch.zeros(2, channels, 48, 48)).shape == (2, 7)


def test_dropout_reaches_the_network_and_width_is_refused():
    assert network(dropout=0.4).drop_rate == 0.4
    with pytest.raises(UsageError, match="--width"):
        network(width=0.5)


def test_size_that_a_network_does_not_take_is_named():
    with pytest.raises(UserError, match=f"--model {TRANSFORMER} does not work on images of 20"):
        network(model=TRANSFORMER, image_size=20)  # it divides images into squares of 16 pixels


def test_short_runs_are_enough_for_batch_norm(monkeypatch):
    slow = nn.BatchNorm2d(3, momentum=0.01)
    monkeypatch.setattr("timm.create_model", lambda *_, **__: slow)
    assert timm_models.new_network("test_resnet", 10, 3, 32).momentum == 0.1


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (NETWORK, {"classifier"}),
        ("timm:levit_128s", {"head.linear", "head_dist.linear", "head.bn", "head_dist.bn"}),
        ("timm:deit_tiny_distilled_patch16_224", {"head", "head_dist"}),
        ("timm:convnext_atto", {"head.fc"}),
    ],
)
def test_last_layer_is_the_one_that_timm_names(model, names):
    with torch.device("meta"):
        made = build.network_factory(model, ic.CNN)(image_size=224)
    assert last_layers(made).keys() == names


# ---- published weights ----


def test_size_and_normalisation_are_those_of_the_weights():
    assert libraries.published_size("timm:inception_v4") == 299
    made = network(model="timm:test_resnet", pretrained=True)
    assert made.published.mean == [0.5, 0.5, 0.5]
    assert torch.equal(made.pixel_mean.flatten(), torch.full((3,), 127.5))


def test_images_are_resized():
    made = network(image_size=32, **PRETRAINED).eval()
    sizes = []
    made.body.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    with torch.no_grad():
        for size in (32, 160):
            assert made(torch.zeros(2, 3, size, size)).shape == (2, 10)
    assert sizes == [160, 160] and made.published.size == 160


def test_weights_for_colours_refuse_grey_images():
    with pytest.raises(UserError, match="--pretrained: .*test_efficientnet .*not 1"):
        network(mean=[0.5], **PRETRAINED)


def test_download(hub):
    model = network(**PRETRAINED)
    random_state = torch.get_rng_state()
    assert load(model, pretrained=True) is True
    assert torch.equal(torch.get_rng_state(), random_state)
    expected = published()
    assert torch.equal(model.body.conv_stem.weight, expected["conv_stem.weight"])
    weight = model.body.classifier.weight.detach()
    assert len(weight) == 10 and float(weight.std()) == pytest.approx(0.01, rel=0.1)
    assert hub == ["timm/test_efficientnet.r160_in1k"]


def test_download_that_fails_names_the_repository_and_a_way_out(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
    with pytest.raises(UserError) as caught:
        download_weights(network(**PRETRAINED))
    message = str(caught.value)
    for word in ("--pretrained", "nobody answers", "timm/test_efficientnet.", "--init-from"):
        assert word in message
    assert "\n" not in message


def test_network_without_weights(monkeypatch):
    monkeypatch.setattr("timm.models.PretrainedCfg.has_weights", False)
    with pytest.raises(UsageError, match="timm has no weights for test_efficientnet"):
        download_weights(network(**PRETRAINED))


# ---- files of weights ----


@pytest.mark.parametrize("file", ["own.safetensors", "own.pth"])
@pytest.mark.parametrize("pretrained", [True, False])
def test_file_with_timms_names(folder, capsys, file, pretrained):
    write = save_file if file.endswith("safetensors") else torch.save
    write(published(), file)
    model = network(pretrained=pretrained)
    load(model, init_from=file, pretrained=pretrained)
    body = model.body if pretrained else model
    assert torch.equal(body.conv_stem.weight, published()["conv_stem.weight"])
    assert file in capsys.readouterr().out  # its last layer is for 1000 classes


@pytest.mark.parametrize("pretrained", [True, False])
def test_file_of_another_network(folder, pretrained):
    save_file(published("test_resnet"), "other.safetensors")
    with pytest.raises(UserError, match="other.safetensors holds another network"):
        load(network(pretrained=pretrained), init_from="other.safetensors", pretrained=pretrained)


def test_safetensors_for_the_default_network(folder):
    model = network(model="cnn")
    save_file(network(model="cnn", seed=1).state_dict(), "cnn.safetensors")
    load(model, model="cnn", init_from="cnn.safetensors")
    expected = read_state_dict("cnn.safetensors")
    assert torch.equal(model.classifier.weight, expected["classifier.weight"])


@pytest.mark.parametrize("content", [b"", b"no weights", b"\xff" * 99], ids=len)
def test_damaged_safetensors(folder, content):
    Path("bad.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="bad.safetensors is damaged"):
        load(network(model="cnn"), model="cnn", init_from="bad.safetensors")
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        load(network(model="cnn"), model="cnn", init_from="gone.safetensors")


def test_missing_safetensors_is_named(folder, monkeypatch):
    save_file({"weight": torch.zeros(1)}, "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"a.safetensors .*safetensors: pip install"):
        load(network(model="cnn"), model="cnn", init_from="a.safetensors")


# ---- a whole run ----


@pytest.mark.slow
def test_pretrained_model_is_used_without_a_download(inside, folder, hub):
    brief = ["--dataset", "digits", "--subset", "60", "--epochs", "1"]
    options = ["--model", NETWORK, "--pretrained", "--image-size", "16", "--freeze"]
    out, _ = inside(*brief, *options, "--out", "m.pth")
    assert hub == ["timm/test_efficientnet.r160_in1k"]
    _, content = ic.load_checkpoint("m.pth")
    assert content["config"]["model"] == f"{NETWORK}.r160_in1k"  # the weights that it began with
    assert content["mean"] == [0.485, 0.456, 0.406]

    hub.clear()
    model = inference.load_model("m.pth", "cpu")
    images = ic.load_data(Config(dataset="digits", image_size=16)).test.images[:4]
    assert len(inference.predict(model, images)) == 4
    weights = model.network.state_dict()
    assert torch.equal(weights["body.conv_stem.weight"], published()["conv_stem.weight"])
    assert hub == []


def test_hub_of_a_name_without_weights_is_named():
    assert timm_models.full_name("test_efficientnet") == "test_efficientnet.r160_in1k"
    assert libraries.full_name(f"{NETWORK}.r160_in1k") == f"{NETWORK}.r160_in1k"
    assert libraries.full_name("torchvision:resnet18") == "torchvision:resnet18"
    assert libraries.full_name("cnn") == "cnn"
