"""The networks of the references: sizes, tables, state dicts and initial weights."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from classifier import recipes
from classifier.errors import UserError
from classifier.networks.build import print_summary
from classifier.networks.references import FACTORIES, RESNETS, GlobalFilter

# SHA-256 of the names and shapes of a network's weights for CIFAR-10. Finished models and runs keep
# these names: a change needs a translation in classifier/legacy.py.
STATE_DICTS = {
    "beginner-cnn": "b3197ca4dc5d",
    "coursework-cnn": "59c93ad4192d",
    "notebook-cnn": "24874ed75a01",
    "fcn": "d2dac7d91a6c",
    "fftnet": "0a3b09bc3f21",
    "convnet": "dead31faf641",
    "resnet18": "b1a881057b4c",
    "resnet34": "1552b8e68900",
    "resnet50": "3c276ca4b5b6",
    "resnet101": "3f95f5f40573",
    "resnet152": "098a5008b3a4",
    "resnet18-dropout": "ec03abade7b9",
    "airbench94": "b52ff7528aeb",
}

# the deepest take seconds for what the others show as well
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("resnet101", "resnet152") else name
    for name in FACTORIES
]


def num_parameters(network):
    return sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize("name", FACTORIES)
def test_state_dict_has_the_names_and_shapes_of_the_files_that_exist(name):
    state = FACTORIES[name]().state_dict()
    lines = [f"{key} {list(value.shape)}" for key, value in state.items()]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest.startswith(STATE_DICTS[name])


def test_every_network_has_default_settings():
    assert set(FACTORIES) == set(recipes.NETWORK_DEFAULTS)


def test_sizes_of_the_networks_that_have_no_table():
    sizes = {"beginner-cnn": 545_290, "coursework-cnn": 685_962, "notebook-cnn": 1_059_306}
    for name, size in sizes.items():
        assert num_parameters(FACTORIES[name]()) == size, name
    kinds = {type(layer) for layer in FACTORIES["fcn"]().modules()}
    assert nn.Conv2d not in kinds and nn.Linear in kinds


@pytest.mark.parametrize("name", NAMES)
def test_table_counts_every_weight(name, capsys):
    network = FACTORIES[name]()
    print_summary(network, (3, 32, 32))
    total = re.search(r"Total params: ([\d,]+)", capsys.readouterr().out).group(1)
    assert int(total.replace(",", "")) == num_parameters(network)


def test_coursework_network_has_the_footer_of_the_reference(capsys):
    """Input 0.01, forward/backward 1.54, parameters 2.62, total 4.17 MB, as in its README."""
    print_summary(FACTORIES["coursework-cnn"](), (3, 32, 32))
    numbers = re.findall(r"\(MB\): (\S+)", capsys.readouterr().out)
    assert numbers == ["0.01", "1.54", "2.62", "4.17"]


def test_resnet18_dropout_has_the_table_of_the_reference(capsys):
    """Row by row the torchsummary table in the README of reference 003."""
    print_summary(FACTORIES["resnet18-dropout"](), (3, 32, 32))
    row = re.compile(r" *(\w+-\d+) +(\[.*?\]) +([\d,]+)")
    expected = row.findall(Path(__file__).with_name("reference_003.txt").read_text())
    assert len(expected) == 69
    assert row.findall(capsys.readouterr().out) == expected


@pytest.mark.parametrize("name", NAMES)
def test_network_takes_other_classes_channels_and_sizes(name):
    network = FACTORIES[name](classes=7, channels=1, image_size=28)
    logits = network(torch.rand(4, 1, 28, 28))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    for weight in network.parameters():
        if weight.requires_grad:
            assert weight.grad is not None and weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "smallest"),
    [
        ("beginner-cnn", 4),
        ("coursework-cnn", 16),
        ("notebook-cnn", 4),
        ("fftnet", 4),
        ("convnet", 8),
        ("resnet18-dropout", 8),
        ("airbench94", 9),
    ],
)
def test_network_says_which_images_are_too_small(name, smallest):
    network = FACTORIES[name](image_size=smallest).eval()
    assert network(torch.zeros(2, 3, smallest, smallest)).shape == (2, 10)
    with pytest.raises(UserError, match=f"--model {name} .* {smallest} pixels .*--image-size"):
        FACTORIES[name](image_size=smallest - 1)


@pytest.mark.parametrize("name", [name for name in FACTORIES if "bench" not in name])
def test_dropout_is_where_the_name_or_the_reference_has_it(name):
    rates = {layer.p for layer in FACTORIES[name]().modules() if isinstance(layer, nn.Dropout)}
    with_dropout = {
        "beginner-cnn": {0.5},
        "coursework-cnn": {0.5},
        "notebook-cnn": {0.25},
        "fcn": {0.25},
        "resnet18-dropout": {0.1},
    }
    assert rates == with_dropout.get(name, set())
    if name in with_dropout:
        changed = FACTORIES[name](dropout=0.4)
        assert {layer.p for layer in changed.modules() if isinstance(layer, nn.Dropout)} == {0.4}


def test_convnet_has_two_convolutions_a_stage():
    convolutions = [layer for layer in FACTORIES["convnet"]() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 64, 128, 128, 256, 256]


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_have_the_stem_for_small_images(name):
    network = FACTORIES[name]().eval()
    final_sizes = []
    network.avgpool.register_forward_pre_hook(
        lambda layer, inputs: final_sizes.append(inputs[0].shape[-1])
    )
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    assert final_sizes == [4]
    assert network.conv1.stride == (1, 1)
    depth = 1  # the classifier
    for label, weight in network.named_parameters():
        if weight.ndim == 4 and "downsample" not in label:
            depth += 1
    assert depth == int(name.removeprefix("resnet"))


def test_fftnet_filters_spectra_in_fp32_under_autocast():
    layer = GlobalFilter(4, 8).eval()
    mixed = []
    layer.mix.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0]))
    x = torch.randn(2, 4, 8, 8).bfloat16()  # as a convolution under autocast returns it
    impulse = torch.zeros(4, 8, 10)
    impulse[:, :, ::2] = 1  # the spectrum of a single point: a convolution that changes nothing
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.weight.zero_()
        layer(x)
        layer.weight.copy_(impulse)
        layer(x)
    assert mixed[0].abs().max() == 0
    assert mixed[1].dtype == torch.float32
    torch.testing.assert_close(mixed[1], x.float() / (1 + 1e-5) ** 0.5, atol=1e-5, rtol=0)


def test_airbench_starts_by_passing_its_input_through():
    network = FACTORIES["airbench94"]()
    convolutions = [layer for layer in network.body if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 64, 256, 256, 256, 256]
    for layer in convolutions:
        inputs = min(layer.in_channels, layer.out_channels)
        x = torch.randn(2, layer.in_channels, 5, 5)
        torch.testing.assert_close(layer(x)[:, :inputs], x[:, :inputs])
    frozen = {name for name, weight in network.named_parameters() if not weight.requires_grad}
    norms = [name for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert frozen == {"whiten.weight", *(f"{name}.weight" for name in norms)}
    assert {network.get_submodule(name).momentum for name in norms} == {0.4}


def test_airbench_takes_the_maximum_and_divides_by_9():
    network = FACTORIES["airbench94"]().eval()
    images = torch.randn(2, 3, 32, 32)
    features = network.body(network.whiten(images)).amax((2, 3))
    torch.testing.assert_close(network(images), network.head(features) / 9)


# ---- the order in which layers draw their weights: another one would change every result ----


def test_fftnet_draws_filters_then_classifier_then_patches():
    torch.manual_seed(0)
    first_filter = 0.02 * torch.randn(128, 16, 18)
    torch.manual_seed(0)
    network = FACTORIES["fftnet"]()
    assert torch.equal(network[1].weight, first_filter)

    torch.manual_seed(0)
    [GlobalFilter(128, 16) for _ in range(6)]
    classifier = nn.Linear(128, 10)
    patches = nn.Conv2d(3, 128, 2, stride=2)
    assert torch.equal(network[-1].weight, classifier.weight)
    assert torch.equal(network[0].weight, patches.weight)


def test_resnet_draws_its_stem_last():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    original = resnet18(num_classes=10)
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    torch.manual_seed(0)
    network = FACTORIES["resnet18"]()
    assert torch.equal(network.fc.weight, original.fc.weight)
    assert torch.equal(network.conv1.weight, stem.weight)


def test_airbench_draws_from_first_to_last_layer():
    torch.manual_seed(0)
    whiten = nn.Conv2d(3, 24, 2)
    first = nn.Conv2d(24, 64, 3, padding=1, bias=False)
    second = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    third = nn.Conv2d(64, 256, 3, padding=1, bias=False)
    del second  # all of its filters are set
    torch.manual_seed(0)
    network = FACTORIES["airbench94"]()
    convolutions = [layer for layer in network.body if isinstance(layer, nn.Conv2d)]
    assert torch.equal(network.whiten.weight, whiten.weight)
    assert torch.equal(convolutions[0].weight[24:], first.weight[24:])
    assert torch.equal(convolutions[2].weight[64:], third.weight[64:])
