"""torch's optimisers by name, the moving average of the weights, and gradient clipping."""

import copy
import math

import pytest
import torch
from torch import nn

from classifier.optimizers import build_optimizer, clip_gradients, moving_average

NAMES = ["sgd", "adam", "adamw", "rmsprop"]


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def disabled_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def total_norm(network):
    gradients = [parameter.grad for parameter in network.parameters()]
    return float(torch.nn.utils.get_total_norm(gradients))


# ---- optimisers ----


@pytest.mark.parametrize("name", NAMES)
def test_settings_reach_the_optimiser(name):
    weights = list(small_network().parameters())
    optimizer = build_optimizer(name, weights, lr=0.3, momentum=0.4, weight_decay=0.01)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.3
    assert group["weight_decay"] == 0.01
    assert all(ours is theirs for ours, theirs in zip(weights, group["params"], strict=True))
    if name in ("sgd", "rmsprop"):
        assert group["momentum"] == 0.4
    else:
        assert group["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sgd", torch.optim.SGD),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_name_stands_for_its_class(name, kind):
    assert type(build_optimizer(name, [torch.zeros(2)], 0.1, 0.0, 0.0)) is kind


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_takes_nesterovs_momentum_only_with_momentum(momentum):
    optimizer = build_optimizer("sgd", [torch.zeros(2)], 0.1, momentum, 0.0)
    assert optimizer.param_groups[0]["nesterov"] == (momentum > 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_finds_the_minimum_of_a_parabola(name):
    weight = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = build_optimizer(name, [weight], lr=0.05, momentum=0.5, weight_decay=0.0)
    for _ in range(200):
        weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weight.abs().max() < 0.2


def test_unknown_optimiser():
    with pytest.raises(ValueError, match="lion"):
        build_optimizer("lion", [torch.zeros(2)], 0.1, 0.0, 0.0)


# ---- moving average ----


def test_average_is_a_plain_mean_at_first_and_then_forgets():
    model = small_network()
    average = moving_average(model, steps=4)
    seen = []
    for value in range(1, 8):
        with torch.no_grad():
            model[0].weight.fill_(value)
        average.update_parameters(model)
        seen.append(average.module[0].weight[0, 0].item())
    assert seen[:4] == pytest.approx([1, 1.5, 2, 2.5])
    assert seen[4] == pytest.approx(2.5 + 2.5 / 4)
    assert seen[6] < 5


def test_average_takes_the_running_statistics_of_batch_norm_too():
    model = small_network()
    average = moving_average(model, steps=10)
    for value in (2.0, 4.0):
        model[1].running_mean.fill_(value)
        average.update_parameters(model)
    assert average.module[1].running_mean.tolist() == [3.0] * 3


def test_average_leaves_the_model_alone():
    model = small_network()
    before = copy.deepcopy(model.state_dict())
    average = moving_average(model, steps=10)
    with torch.no_grad():
        average.module[0].weight.zero_()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_average_goes_on_from_its_saved_state():
    model = small_network()
    whole, first_part = moving_average(model, 3), moving_average(model, 3)
    for value in (1.0, 2.0):
        model[0].weight.data.fill_(value)
        whole.update_parameters(model)
        first_part.update_parameters(model)
    second_part = moving_average(model, 3)
    second_part.load_state_dict(first_part.state_dict())
    for value in (5.0, 7.0):
        model[0].weight.data.fill_(value)
        whole.update_parameters(model)
        second_part.update_parameters(model)
    for name, value in whole.state_dict().items():
        assert torch.equal(second_part.state_dict()[name], value), name


# ---- clipping ----


def test_clipping_scales_all_gradients_by_one_factor():
    network = small_network()
    network(torch.randn(8, 4)).square().sum().backward()
    before = [parameter.grad.clone() for parameter in network.parameters()]
    norm = total_norm(network)
    optimizer = build_optimizer("sgd", list(network.parameters()), 0.1, 0.0, 0.0)
    clip_gradients(network.parameters(), [optimizer], disabled_scaler(), norm / 10)
    assert total_norm(network) == pytest.approx(norm / 10, rel=1e-3)
    for parameter, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, old / 10, rtol=1e-3, atol=1e-7)


def test_smaller_gradients_are_not_changed():
    network = small_network()
    network(torch.randn(8, 4)).square().sum().backward()
    before = [parameter.grad.clone() for parameter in network.parameters()]
    clip_gradients(network.parameters(), [], disabled_scaler(), 2 * total_norm(network))
    for parameter, old in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, old)


def test_frozen_weights_have_no_gradient_to_clip():
    network = small_network()
    network[0].requires_grad_(False)
    network(torch.randn(8, 4)).square().sum().backward()
    clip_gradients(network.parameters(), [], disabled_scaler(), 1e-3)
    assert network[0].weight.grad is None
    assert float(network[2].weight.grad.norm()) <= 1e-3


def test_clipping_counts_the_gradients_without_the_scale_of_fp16():
    network = small_network()
    optimizer = build_optimizer("sgd", list(network.parameters()), 1.0, 0.0, 0.0)
    scaler = torch.amp.GradScaler("cpu")
    before = [parameter.detach().clone() for parameter in network.parameters()]
    scaler.scale(network(torch.randn(8, 4)).square().sum()).backward()
    clip_gradients(network.parameters(), [optimizer], scaler, 1e-3)
    scaler.step(optimizer)
    moved = 0.0
    for parameter, old in zip(network.parameters(), before, strict=True):
        moved += (parameter.detach() - old).square().sum().item()
    assert math.sqrt(moved) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_overflow_in_one_optimiser_does_not_spread_to_the_other(value):
    network = small_network()
    first = build_optimizer("sgd", list(network[0].parameters()), 0.1, 0.0, 0.0)
    others = [*network[1].parameters(), *network[2].parameters()]
    second = build_optimizer("adamw", others, 0.1, 0.0, 0.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(network(torch.randn(8, 4)).square().sum()).backward()
    network[0].weight.grad[0, 0] = value
    before = network[0].weight.detach().clone()

    clip_gradients(network.parameters(), [first, second], scaler, 1.0)
    scaler.step(first)
    scaler.step(second)

    assert torch.equal(network[0].weight, before)  # skipped by the scaler
    assert all(parameter.isfinite().all() for parameter in network.parameters())
