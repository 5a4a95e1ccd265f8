"""Muon against a plain implementation of its description, and which weights it takes."""

import pytest
import torch
from torch import nn

import image_classification as ic

LR, MOMENTUM = 0.12, 0.6


def reference_step(weight, gradient, buffer, mean_squares):
    """One step of Muon: returns the new weight and the new state."""
    buffer = MOMENTUM * buffer + gradient
    nesterov = gradient + MOMENTUM * buffer
    update = nesterov.flatten(1) / nesterov.norm()
    for _ in range(3):  # Newton-Schulz
        gram = update @ update.T
        update = 3.4445 * update - 4.7750 * gram @ update + 2.0315 * gram @ gram @ update
    mean_squares = 0.95 * mean_squares + 0.05 * (update**2).mean(1)
    balanced = update / mean_squares.sqrt()[:, None]
    update = balanced * update.norm() / balanced.norm()
    weight = weight * len(weight) ** 0.5 / weight.norm()
    weight = weight - LR * update.reshape(weight.shape)
    return weight, buffer, mean_squares


@pytest.fixture
def weights():
    """Wide, tall and square weights; of some, the smaller side is equally long."""
    torch.manual_seed(0)
    shapes = [(8, 3, 3, 3), (24, 8), (8, 24), (8, 8), (16, 4, 2, 2)]
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def singular_values(matrix):
    return torch.linalg.svdvals(matrix.flatten(1).double())


# ---- steps ----


def test_five_steps_are_those_of_the_reference(weights):
    optimizer = ic.Muon(weights, LR, MOMENTUM, torch.float32)
    expected = [weight.detach().double() for weight in weights]
    buffers = [torch.zeros_like(weight) for weight in expected]
    mean_squares = [torch.zeros(len(weight)).double() for weight in expected]
    for _ in range(5):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape)
            gradient = weight.grad.double()
            expected[i], buffers[i], mean_squares[i] = reference_step(
                expected[i], gradient, buffers[i], mean_squares[i]
            )
        optimizer.step()
        for weight, wanted, buffer in zip(weights, expected, buffers, strict=True):
            torch.testing.assert_close(weight.detach().double(), wanted, rtol=0, atol=2e-5)
            momentum_buffer = optimizer.state[weight]["momentum_buffer"]
            torch.testing.assert_close(momentum_buffer.double(), buffer, rtol=1e-5, atol=1e-5)


def test_bf16_steps_are_nearly_those_of_fp32(weights):
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    for weight, copy in zip(weights, copies, strict=True):
        weight.grad = torch.randn(weight.shape)
        copy.grad = weight.grad.clone()
    ic.Muon(weights, LR, MOMENTUM, torch.float32).step()
    ic.Muon(copies, LR, MOMENTUM, torch.bfloat16).step()
    for weight, copy in zip(weights, copies, strict=True):
        assert copy.dtype == torch.float32
        torch.testing.assert_close(copy, weight, rtol=0, atol=0.03 * LR)
        assert not torch.equal(copy, weight)


def test_rows_learn_at_one_speed(weights):
    """Also the rows whose gradients are small, but the step as a whole is as large as before."""
    tall = weights[1]  # Newton-Schulz steps cannot make the rows of a tall matrix equal
    sizes = torch.linspace(0.1, 1, len(tall))[:, None]
    optimizer = ic.Muon([tall], LR, MOMENTUM, torch.float32)
    for _ in range(20):
        tall.grad = sizes * torch.randn(tall.shape)
        (update,) = ic.newton_schulz([tall.grad])
        rescaled = tall.detach() * len(tall) ** 0.5 / tall.detach().norm()
        optimizer.step()
    rows = (tall.detach() - rescaled).norm(dim=1)
    assert rows.max() < 4 * rows.min()
    assert update.norm(dim=1).max() > 8 * update.norm(dim=1).min()


def test_neuron_without_gradient_stays_where_it_is(weights):
    weight = weights[0]
    weight.grad = torch.randn(weight.shape)
    weight.grad[3] = 0
    rescaled = weight.detach() * len(weight) ** 0.5 / weight.detach().norm()
    ic.Muon([weight], LR, MOMENTUM, torch.float32).step()
    torch.testing.assert_close(weight.detach()[3], rescaled[3])
    weight.grad = torch.zeros_like(weight)
    ic.Muon([weight], LR, MOMENTUM, torch.float32).step()
    assert weight.isfinite().all()


def test_learning_rate_is_read_in_each_step(weights):
    optimizer = ic.Muon(weights[:1], LR, MOMENTUM, torch.float32)
    weight = weights[0]
    weight.grad = torch.randn(weight.shape)
    optimizer.param_groups[0]["lr"] = 0.0
    rescaled = weight.detach() * len(weight) ** 0.5 / weight.detach().norm()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), rescaled)


def test_weight_without_gradient_stays_as_it_is(weights):
    before = weights[1].detach().clone()
    weights[0].grad = torch.randn(weights[0].shape)
    optimizer = ic.Muon(weights[:2], LR, MOMENTUM, torch.float32)
    optimizer.step()
    assert torch.equal(weights[1].detach(), before)
    assert weights[1] not in optimizer.state


# ---- orthogonality ----


@pytest.mark.parametrize("shape", [(64, 27), (8, 288), (10, 40), (40, 10), (30, 30)])
def test_newton_schulz_evens_out_the_singular_values(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    (result,) = ic.newton_schulz([matrix])
    before, after = singular_values(matrix), singular_values(result)
    assert result.shape == matrix.shape
    assert after.max() < 1.3
    assert after.median() > 0.6
    assert after.max() / after.median() < before.max() / before.median()


def test_newton_schulz_keeps_the_directions():
    torch.manual_seed(0)
    matrix = torch.randn(12, 30)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    (result,) = ic.newton_schulz([matrix])
    in_their_basis = left.T @ result @ right.T
    assert in_their_basis.diagonal().min() > 0.3
    off_diagonal = in_their_basis - in_their_basis.diagonal().diag()
    assert off_diagonal.abs().max() < 1e-4


def test_newton_schulz_of_many_matrices_is_that_of_each(weights):
    matrices = [weight.detach().flatten(1) for weight in weights]
    together = ic.newton_schulz(matrices)
    assert len(together) == len(matrices)
    for matrix, result in zip(matrices, together, strict=True):
        (alone,) = ic.newton_schulz([matrix])
        torch.testing.assert_close(result, alone)


# ---- which weights it takes ----


def build_optimizers(model, dtype=torch.float32):
    config = ic.Config(optimizer="muon", lr=LR, momentum=MOMENTUM, weight_decay=0.01)
    return ic.build_optimizers(model, config, dtype, torch.device("cpu"))


def names_of(optimizer, model):
    """The names of the weights that an optimiser has."""
    ids = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    return {name for name, weight in model.named_parameters() if id(weight) in ids}


def test_muon_takes_the_convolutions_of_the_cnn_and_adamw_the_rest():
    model = ic.CNN(width=0.25)
    muon, adamw = build_optimizers(model)
    assert isinstance(muon, ic.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    convolutions = {f"stages.{i}.conv{j}.weight" for i in range(3) for j in (1, 2)}
    norms = {
        f"stages.{i}.norm{j}.{part}"
        for i in range(3)
        for j in (1, 2)
        for part in ("weight", "bias")
    }
    assert names_of(muon, model) == convolutions
    assert names_of(adamw, model) == norms | {"classifier.weight"}  # whiten is not trained


def test_settings_of_both_optimisers():
    muon, adamw = build_optimizers(ic.CNN(width=0.25))
    assert muon.param_groups[0]["lr"] == pytest.approx(LR)
    assert muon.param_groups[0]["momentum"] == MOMENTUM
    assert adamw.param_groups[0]["lr"] == pytest.approx(LR / 12)
    assert adamw.param_groups[0]["weight_decay"] == 0.01


def test_muon_takes_hidden_matrices_but_not_the_last_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(5, 2))
    muon, adamw = build_optimizers(model)
    assert names_of(muon, model) == {"0.weight", "1.weight"}
    assert names_of(adamw, model) == {"0.bias", "1.bias", "2.weight", "2.bias"}


def test_frozen_network_leaves_nothing_to_muon():
    model = ic.CNN(width=0.25).requires_grad_(False)
    model.classifier.requires_grad_(True)
    (adamw,) = build_optimizers(model)
    assert isinstance(adamw, torch.optim.AdamW)
    assert names_of(adamw, model) == {"classifier.weight"}


@pytest.mark.parametrize(
    ("computed_in", "expected"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),  # its range is too small for Newton-Schulz
    ],
)
def test_dtype_of_the_newton_schulz_steps(computed_in, expected):
    muon, _ = build_optimizers(ic.CNN(width=0.25), computed_in)
    assert muon.dtype == expected
