"""torchvision's classifiers, their ImageNet weights, and training only the last layer."""

import errno
import os
import urllib.error
from pathlib import Path

import pytest
import torch
from conftest import same
from torch import nn

from classifier.errors import UsageError, UserError
from classifier.networks.libraries import published_size, size_hint
from classifier.networks.pretrained import (
    download_weights,
    freeze_all_but_last_layer,
    last_layer_weights,
    last_layers,
    load_pretrained,
    new_last_layer_weights,
)
from classifier.networks.torchvision_models import (
    check_name,
    factory,
    imagenet_weights,
    new_network,
    pretrained_network,
)

SMALLEST = "squeezenet1_1"
LAST_LAYER = {"body.classifier.1.weight", "body.classifier.1.bias"}


@pytest.fixture
def imagenet(folder, monkeypatch):
    """SqueezeNet's weights as if they had been downloaded: real names and shapes, random values."""
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(folder / "hub"))
    torch.manual_seed(1)
    path = folder / "hub" / "hub" / "checkpoints" / Path(SqueezeNet1_1_Weights.DEFAULT.url).name
    path.parent.mkdir(parents=True)
    torch.save(squeezenet1_1().state_dict(), path)
    return path


def differing(first, second):
    return {name for name, value in first.items() if not torch.equal(second[name], value)}


# ---- names and sizes ----


def test_unknown_name_is_refused_with_the_closest_ones():
    check_name("resnet18")
    with pytest.raises(UsageError, match="torchvision:resnet19: .*resnet18"):
        check_name("resnet19")
    with pytest.raises(UsageError, match="resnet19"):
        imagenet_weights("resnet19")
    with pytest.raises(UsageError, match="resnet19"):
        factory("resnet19")()


def test_only_classifiers_count():
    with pytest.raises(UsageError, match="maskrcnn_resnet50_fpn"):
        check_name("maskrcnn_resnet50_fpn")


def test_size_of_the_images_that_the_weights_are_made_for():
    assert published_size("torchvision:squeezenet1_1") == 224
    assert published_size("torchvision:inception_v3") == 299
    assert published_size("resnet18") is None
    assert published_size("cnn") is None
    assert published_size("mine.py:network") is None


def test_hint_for_images_that_are_too_small():
    assert "224 pixels" in size_hint("torchvision:squeezenet1_1", 223)
    assert size_hint("torchvision:squeezenet1_1", 224) == ""
    assert size_hint("cnn", 1) == ""


# ---- networks ----


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "efficientnet_b0", "vit_b_16"])
def test_new_networks(name):
    network = factory(name)(classes=7, image_size=32)
    with torch.no_grad():
        assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_googlenet_has_a_single_output_in_training():
    network = factory("googlenet")(classes=7)
    assert network.train()(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    assert not network.transform_input
    assert pretrained_network("googlenet", 7).body.transform_input


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mnasnet0_5"])
def test_short_runs_are_enough_for_batch_norm(name):
    layers = new_network(name, 7, 32).modules()  # 0.01 and 0.0003 in torchvision
    momenta = {layer.momentum for layer in layers if isinstance(layer, nn.BatchNorm2d)}
    assert momenta == {0.1}


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_than_3_channels_are_refused(channels):
    with pytest.raises(UserError, match="--model torchvision:resnet18 .* 3 channels"):
        factory("resnet18")(channels=channels)


def test_pretrained_network_resizes_its_images():
    network = factory(SMALLEST)(classes=5, image_size=32, pretrained=True).eval()
    sizes = []
    network.body.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-2:]))
    with torch.no_grad():
        for size in (32, 224, 300):
            assert network(torch.zeros(2, 3, size, size)).shape == (2, 5)
    assert sizes == [(224, 224)] * 3
    published = network.published
    assert published.size == 224
    assert published.mean == [0.485, 0.456, 0.406] and published.std == [0.229, 0.224, 0.225]


# ---- ImageNet weights ----


def test_downloaded_weights_have_the_names_of_the_network(imagenet):
    network = pretrained_network(SMALLEST, 10)
    weights = download_weights(network)
    assert weights.keys() == network.state_dict().keys()
    saved = torch.load(imagenet, weights_only=True)
    assert torch.equal(weights["body.features.0.weight"], saved["features.0.weight"])


def test_download_that_fails_names_the_file_and_a_way_out(folder, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(folder))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr("urllib.request._opener", None)  # it remembers the proxies of its first use
    with pytest.raises(UserError) as caught:
        download_weights(pretrained_network(SMALLEST, 10))
    message = str(caught.value)
    assert "--pretrained" in message and "--init-from" in message and "squeezenet1_1-" in message
    assert "urlopen error" not in message  # but the reason that it wraps


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (urllib.error.HTTPError("https://x", 404, "Not Found", None, None), "404: Not Found"),
        (urllib.error.URLError(TimeoutError("timed out")), "timed out"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_reason_of_a_failed_download(monkeypatch, error, named):
    def fail(*args, **kwargs):
        raise error

    network = pretrained_network(SMALLEST, 10)
    monkeypatch.setattr("torchvision.models.SqueezeNet1_1_Weights.get_state_dict", fail)
    with pytest.raises(UserError, match=named):
        download_weights(network)


def test_damaged_download_is_named(imagenet):
    imagenet.write_bytes(b"no weights")
    with pytest.raises(UserError, match="--pretrained: .*squeezenet1_1-.*damaged"):
        download_weights(pretrained_network(SMALLEST, 10))


@pytest.mark.parametrize("keep_last_layer", [True, False])
def test_last_layer_is_loaded_where_it_is_for_the_same_classes(keep_last_layer):
    torch.manual_seed(0)
    source = pretrained_network(SMALLEST, 10).state_dict()
    source["body.classifier.1.bias"] = torch.ones(10)  # drawn as 0 in every network
    network = pretrained_network(SMALLEST, 10)
    load_pretrained(network, source, "own.pth", keep_last_layer)
    expected = set() if keep_last_layer else LAST_LAYER
    assert differing(source, network.state_dict()) == expected


def test_last_layer_for_other_classes_is_new():
    source = pretrained_network(SMALLEST, 1000).state_dict()
    network = pretrained_network(SMALLEST, 10)
    network.body.classifier[1].weight.data.mul_(100)
    network.body.classifier[1].bias.data.fill_(1.0)
    load_pretrained(network, {**source, "unknown": torch.ones(1)}, "x.pth", False)
    after = network.state_dict()
    expected = new_last_layer_weights(network)
    assert expected.keys() == LAST_LAYER
    for name in LAST_LAYER:
        assert after[name].shape == expected[name].shape
        assert float(after[name].std()) == pytest.approx(float(expected[name].std()), rel=0.1)
    assert not differing({name: source[name] for name in source.keys() - LAST_LAYER}, after)


@pytest.mark.parametrize("value", [None, torch.zeros(1), "text"])
def test_weights_of_another_network_are_refused_and_change_nothing(value):
    network = pretrained_network(SMALLEST, 10)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(9)
    source = pretrained_network(SMALLEST, 10).state_dict()
    source["body.features.3.squeeze.weight"] = value
    if value is None:
        del source["body.features.3.squeeze.weight"]
    with pytest.raises(UserError, match="other.pth holds another network: body.features.3.squeeze"):
        load_pretrained(network, source, "other.pth", False)
    assert not differing(before, network.state_dict())


# ---- the last layer ----


def test_last_layer_is_the_last_one_with_weights():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Linear(4, 5), nn.ReLU()))
    assert last_layers(network) == {"1.0": network[1][0]}
    assert last_layer_weights(network).keys() == {"1.0.weight", "1.0.bias"}


def test_new_last_layer_begins_near_chance():
    """EfficientNet's own initialisation gives few classes logits of ten and more."""
    network = pretrained_network("efficientnet_b0", 3)
    own = network.state_dict()
    new = new_last_layer_weights(network)
    assert new.keys() == last_layer_weights(network).keys()
    features = torch.rand(8, own["body.classifier.1.weight"].shape[1])
    own_logits = features @ own["body.classifier.1.weight"].T
    logits = features @ new["body.classifier.1.weight"].T + new["body.classifier.1.bias"]
    assert own_logits.std() > 3 and 0 < logits.std() < 0.5


def test_new_last_layer_is_drawn_from_the_seed_of_the_run():
    network = nn.Sequential(nn.Linear(4, 3))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        drawn.append(new_last_layer_weights(network))
        assert torch.equal(state, torch.get_rng_state())
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2])


@pytest.mark.parametrize(
    "last",
    [nn.BatchNorm1d(3), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))],
    ids=["no matrix", "weight of other weights"],
)
def test_last_layer_of_another_kind_stays(last):
    network = nn.Sequential(nn.Linear(4, 3), last)
    assert same(new_last_layer_weights(network), last_layer_weights(network))


def test_hidden_layer_of_the_classifier_stays(monkeypatch):
    network = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    layers = {"0": network[0], "1": network[1]}
    monkeypatch.setattr("classifier.networks.pretrained.last_layers", lambda _: layers)
    own, new = network.state_dict(), new_last_layer_weights(network)
    assert torch.equal(new["0.weight"], own["0.weight"])
    assert not torch.equal(new["1.weight"], own["1.weight"])


def test_freezing_leaves_only_the_last_layer_to_be_trained():
    network = pretrained_network(SMALLEST, 10)
    freeze_all_but_last_layer(network)
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert trained == LAST_LAYER


@pytest.mark.parametrize(
    ("number", "named", "blamed"),
    [
        (errno.ENOSPC, "TORCH_HOME", "downloaded"),
        (errno.EROFS, "TORCH_HOME", "downloaded"),
        (errno.ECONNRESET, "could not be downloaded", "TORCH_HOME"),
    ],
)
def test_disk_and_network_are_told_apart(monkeypatch, number, named, blamed):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    network = pretrained_network(SMALLEST, 3)
    monkeypatch.setattr("torchvision.models.SqueezeNet1_1_Weights.get_state_dict", fail)
    with pytest.raises(UserError, match=named) as caught:
        download_weights(network)
    assert blamed not in str(caught.value) and os.strerror(number) in str(caught.value)
