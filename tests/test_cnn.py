"""The default network: whitening, the identity at the beginning, shapes and widths."""

import pytest
import torch
from torch import nn

import image_classification as ic

FILTERS = 12  # of 2×2 patches of 3 channels; each comes with both signs


def correlated_images(count=300):
    """Images whose neighbouring pixels and channels depend on each other, with mean 0."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, 17, 17, generator=generator)
    smooth = noise[:, :, 1:, 1:] + 0.5 * noise[:, :, :-1, 1:] + 0.4 * noise[:, :, 1:, :-1]
    mixed = smooth + 0.5 * smooth.roll(1, dims=1)
    return 10 * mixed  # beside which the 0.01 that whitening adds to variances is nothing


def second_moments(features):
    """E[y yᵀ] over all positions: (N, C, H, W) to (C, C)."""
    vectors = features.transpose(0, 1).flatten(1)
    return vectors @ vectors.T / vectors.shape[1]


def whitened(images):
    layer = nn.Conv2d(3, 2 * FILTERS, 2, bias=False)
    ic.set_whitening(layer, images)
    with torch.no_grad():
        return layer, layer(images)


# ---- whitening ----


def test_only_a_layer_with_such_filters_is_set():
    class Other(nn.Module):
        def __init__(self, whiten):
            super().__init__()
            self.whiten = whiten

    airbench = ic.instantiate(ic.Config(model="airbench94"), 10, [0.5] * 3, [0.25] * 3, 32)
    assert ic.whitening_layer(ic.CNN()) is not None
    assert ic.whitening_layer(ic.CNN(channels=1)) is not None
    assert ic.whitening_layer(airbench) is airbench.whiten
    for layer in (nn.Conv2d(3, 32, 3), nn.Conv2d(3, 24, 3), nn.Conv2d(3, 12, 2), nn.Linear(2, 2)):
        assert ic.whitening_layer(Other(layer)) is None
    assert ic.whitening_layer(nn.Linear(2, 2)) is None


def test_filtered_patches_are_uncorrelated_and_of_equal_variance():
    images = correlated_images()
    patches = nn.functional.unfold(images, 2).unflatten(2, (15, 15))
    correlation = torch.corrcoef(patches.transpose(0, 1).flatten(1))
    assert (correlation - torch.eye(FILTERS)).abs().max() > 0.3  # or there would be nothing to do

    _, features = whitened(images)
    moments = second_moments(features[:, :FILTERS])
    torch.testing.assert_close(moments, torch.eye(FILTERS), rtol=0, atol=0.01)


def test_filters_come_with_both_signs():
    layer, _ = whitened(correlated_images())
    assert torch.equal(layer.weight[:FILTERS], -layer.weight[FILTERS:])


def test_direction_of_largest_variance_comes_first():
    layer, _ = whitened(correlated_images())
    norms = layer.weight[:FILTERS].flatten(1).norm(dim=1)
    assert torch.equal(
        norms, norms.sort().values
    )  # the larger the variance, the smaller the filter


def test_directions_without_variance_are_not_magnified_without_bound():
    grey = correlated_images()[:, :1].expand(-1, 3, -1, -1)
    layer, features = whitened(grey)
    norms = layer.weight.flatten(1).norm(dim=1)
    assert norms.max() < 11  # 1 / sqrt(0.01) and some rounding
    variances = second_moments(features[:, :FILTERS]).diagonal()
    torch.testing.assert_close(variances[:4], torch.ones(4), rtol=0, atol=0.02)
    assert variances[4:].max() < 1e-3


def test_build_model_whitens_with_the_training_images():
    config = ic.Config(dataset="digits", model="cnn", width=0.25)
    data = ic.load_data(config)
    model = ic.build_model(config, data)
    layer = nn.Conv2d(3, 2 * FILTERS, 2, bias=False)
    every_second = data.train.images[::2]  # 500 to 999 of 1294
    ic.set_whitening(layer, ic.normalise(every_second, model))
    torch.testing.assert_close(model.whiten.weight, layer.weight, rtol=1e-4, atol=1e-4)


def test_whitening_is_not_trained_and_has_no_bias():
    model = ic.CNN()
    assert model.whiten.bias is None
    assert not model.whiten.weight.requires_grad
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert model.whiten.weight.grad is None
    trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert len(trained) == len(list(model.parameters())) - 1


# ---- the identity at the beginning ----


@pytest.mark.parametrize("width", [0.25, 1.0, 2.0])
def test_convolutions_begin_by_passing_their_input_through(width):
    for stage in ic.CNN(width=width).stages:
        for convolution in (stage.conv1, stage.conv2):
            images = torch.randn(2, convolution.in_channels, 9, 9)
            passed = min(convolution.in_channels, convolution.out_channels)
            with torch.no_grad():
                features = convolution(images)
            assert features.shape == (2, convolution.out_channels, 9, 9)
            torch.testing.assert_close(features[:, :passed], images[:, :passed])


def test_further_channels_begin_at_random():
    stage = ic.CNN().stages[1]
    further = stage.conv1.weight[stage.conv1.in_channels :]
    assert len(further) == 96 - 32
    assert further.std() > 0.01


def test_second_convolution_adds_to_its_input():
    stage = ic.CNN(width=0.25).stages[0].eval()
    nn.init.zeros_(stage.norm2.weight)  # it adds silu(0) = 0
    images = torch.randn(2, 24, 10, 10)
    pooled = nn.functional.max_pool2d(stage.conv1(images), 2)
    expected = nn.functional.silu(stage.norm1(pooled))
    torch.testing.assert_close(stage(images), expected)

    nn.init.ones_(stage.norm2.weight)
    added = nn.functional.silu(stage.norm2(stage.conv2(expected)))
    torch.testing.assert_close(stage(images), expected + added)


# ---- shapes and width ----


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [16, 32, 45])
def test_shapes(channels, image_size):
    model = ic.CNN(classes=7, channels=channels, image_size=image_size, width=0.25)
    sizes = []
    for module in [model.whiten, *model.stages]:
        module.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[2]))
    logits = model(torch.randn(2, channels, image_size, image_size))
    assert logits.shape == (2, 7)
    whitened_size = image_size - 1
    assert sizes == [whitened_size, whitened_size // 2, whitened_size // 4, whitened_size // 8]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (0.05, [8, 8, 8]),
        (0.25, [8, 24, 48]),
        (1.0, [32, 96, 192]),
        (1.1, [32, 104, 208]),  # multiples of 8
        (2.0, [64, 192, 384]),
    ],
)
def test_width_multiplies_the_channels(width, expected):
    model = ic.CNN(width=width)
    assert [stage.conv1.out_channels for stage in model.stages] == expected
    assert [stage.conv2.out_channels for stage in model.stages] == expected
    assert [stage.norm2.num_features for stage in model.stages] == expected
    assert model.stages[0].conv1.in_channels == 2 * FILTERS
    assert model.classifier.in_features == expected[-1]
    assert model.classifier.bias is None


def test_number_of_parameters_of_the_default_network():
    assert sum(weight.numel() for weight in ic.CNN().parameters()) == 627_872


def test_batch_norm_averages_quickly():
    """Short runs would end before a momentum of 0.1 has averaged."""
    norms = [module for module in ic.CNN().modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.momentum for norm in norms] == [0.4] * 6


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    model = ic.CNN(width=0.25, dropout=0.5).eval()
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        for module in model.modules():
            if not isinstance(module, nn.BatchNorm2d):
                module.training = True
        assert not torch.equal(model(images), model(images))


def test_logits_are_those_of_the_mean_over_all_positions():
    model = ic.CNN(width=0.25).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.stages(nn.functional.silu(model.whiten(images)))
        expected = model.classifier(features.mean(dim=(2, 3)))
        torch.testing.assert_close(model(images), expected)
