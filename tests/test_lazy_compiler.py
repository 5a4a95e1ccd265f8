"""Optimisers that import no compiler do the same as those that do."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY

TRAIN = """
import sys
import torch
from classifier import lazy_compiler

is_spared = sys.argv[1] == "spared"
torch.manual_seed(0)
start = torch.randn(5, 3)
for name in ("SGD", "Adam", "AdamW", "RMSprop"):
    weight = torch.nn.Parameter(start.clone())
    if is_spared:
        lazy_compiler.spare_optimizers()
        lazy_compiler.spare_optimizers()  # as main() that is called twice
    optimizer = getattr(torch.optim, name)([weight], 0.1)
    for step in range(3):
        if is_spared:
            lazy_compiler.spare_optimizers()
        (weight ** 4).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    assert weight.requires_grad and torch.is_grad_enabled()
    print(name, weight.tolist())
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""


def train(how):
    """What is printed: the weights after a few steps of each optimiser, and the modules."""
    command = [sys.executable, "-c", TRAIN, how]
    result = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return result.stdout.splitlines()


@pytest.mark.slow
def test_optimizers_do_the_same_without_importing_the_compiler():
    *spared_weights, spared_modules = train("spared")
    *weights, _ = train("as it is")
    assert spared_weights == weights
    assert len(weights) == 4 and len(set(weights)) == 4
    assert spared_modules == "[]"
