"""Optimisers that import no compiler do the same as those that do."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY

TRAIN = """
import sys
import torch
from classifier import lazy_compiler

name, is_spared = sys.argv[1], sys.argv[2] == "spared"
if is_spared:
    lazy_compiler.spare_optimizers()
    lazy_compiler.spare_optimizers()  # as main() that is called twice
torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(5, 3))
optimizer = getattr(torch.optim, name)([weight], 0.1)
for step in range(3):
    if is_spared:
        lazy_compiler.spare_optimizers()
    (weight ** 4).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert weight.requires_grad and torch.is_grad_enabled()
print(weight.tolist())
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""


def train(*arguments):
    command = [sys.executable, "-c", TRAIN, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_optimizer_does_the_same_without_importing_the_compiler(name):
    spared_weights, spared_modules = train(name, "spared").stdout.splitlines()
    weights, _ = train(name, "as it is").stdout.splitlines()
    assert spared_weights == weights
    assert spared_modules == "[]"
