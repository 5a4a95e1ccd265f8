"""A user's network: loading FILE.py:FACTORY, what is wrong with it, and in which line."""

import sys

import pytest
import torch
from torch import nn

from classifier.errors import UsageError, UserError
from classifier.networks.custom import (
    check_logits,
    error_hint,
    load_factory,
    smoke_test,
    split_custom_model,
)

MODEL = "mine.py:network"


@pytest.fixture(autouse=True)
def restored_imports(monkeypatch):
    """Files are imported under a name of their own and their folders put on sys.path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("network_")]:
        del sys.modules[name]


def write(folder, text):
    (folder / "mine.py").write_text(text, encoding="utf-8")


# ---- FILE.py:FACTORY ----


def test_file_and_factory_are_split_at_the_last_colon(folder):
    write(folder, "")
    assert split_custom_model(MODEL) == ("mine.py", "network")
    path = folder / "mine.py"
    assert split_custom_model(f"{path}:network") == (str(path), "network")


@pytest.mark.skipif(sys.platform == "win32", reason="a colon in a name stands for a stream there")
def test_path_may_hold_a_colon(folder):
    (folder / "C:nets.py").write_text("")
    assert split_custom_model("C:nets.py:small") == ("C:nets.py", "small")


@pytest.mark.parametrize("name", ["nowhere.py:f", "notes.txt:f", "evil.pyc:f", "folder.py:f"])
def test_only_a_python_file_will_do(folder, name):
    (folder / "notes.txt").write_text("")
    (folder / "evil.pyc").write_text("")
    (folder / "folder.py").mkdir()
    file = name.partition(":")[0]
    for function in (split_custom_model, load_factory):
        with pytest.raises(UsageError, match=f"{name}.*no Python file {file}"):
            function(name)


def test_network_imports_what_is_beside_it(folder):
    (folder / "widths_beside.py").write_text("WIDTH = 8")
    write(
        folder,
        """
import torch
def network(classes=10, channels=3, image_size=32):
    from widths_beside import WIDTH
    layers = torch.nn.Flatten(), torch.nn.Linear(3072, WIDTH), torch.nn.Linear(WIDTH, classes)
    return torch.nn.Sequential(*layers)
""",
    )
    factory = load_factory(f"{folder / 'mine.py'}:network")
    assert factory(classes=5)(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    del sys.modules["widths_beside"]


def test_file_may_define_dataclasses_and_annotate_lazily(folder):
    write(
        folder,
        """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class network:
    classes: int = 10
""",
    )
    assert load_factory(MODEL)(classes=3).classes == 3


def test_changed_file_is_read_again(folder):
    write(folder, "def network(): return 1")
    assert load_factory(MODEL)() == 1
    write(folder, "def network(): return 2  # of another length")
    assert load_factory(MODEL)() == 2


def test_folder_is_put_on_the_path_once(folder):
    write(folder, "def network(): pass")
    load_factory(MODEL)
    load_factory(MODEL)
    assert sys.path.count(str(folder.resolve())) == 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no function or class network"),
        ("network = 3", "no function or class network"),
        ("import nothing_like_this", "ModuleNotFoundError"),
        ("\nimport sys\nsys.exit(0)", r"SystemExit\(0\) \(mine.py, line 3\)"),
        ("x = 1\n1 / 0", r"ZeroDivisionError.* \(mine.py, line 2\)"),
        ("def network(:", "SyntaxError"),
    ],
)
def test_file_that_fails_is_named(folder, text, named):
    write(folder, text)
    with pytest.raises(UserError, match=f"--model {MODEL}.*{named}") as caught:
        load_factory(MODEL)
    assert "mine.py" in str(caught.value)
    assert not isinstance(caught.value, UsageError)  # the option itself is right


# ---- its output ----


@pytest.mark.parametrize(
    ("logits", "named"),
    [
        ((torch.zeros(2, 10), torch.zeros(2, 10)), "tuple"),
        (None, "NoneType"),
        (torch.zeros(2, 9), r"\(2, 9\)"),
        (torch.zeros(2, 10, 1, 1), r"\(2, 10, 1, 1\)"),
        (torch.zeros(1, 10), r"\(1, 10\)"),
        (torch.randn(2, 10).softmax(1), "softmax"),
        (torch.full((2, 10), 0.1), "softmax"),
    ],
)
def test_output_that_is_not_logits(logits, named):
    with pytest.raises(UserError, match=f"--model {MODEL}.*{named}"):
        check_logits(logits, 10, MODEL)


def test_output_that_is_logits():
    check_logits(torch.randn(2, 10), 10, MODEL)
    check_logits(torch.zeros(2, 10), 10, MODEL)
    check_logits(torch.tensor([[-1.0, 2.0], [0.5, 0.5]]), 2, MODEL)  # sums to 1, but not in [0, 1]


# ---- a try at training ----


WRONG_NUMBER = RuntimeError("wrong number of images")


class Network(nn.Sequential):
    """A linear classifier with batch norm; `limits` are the numbers of images it takes."""

    def __init__(self, limits=range(1, 1000), error=WRONG_NUMBER):
        super().__init__(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 10))
        self.limits = limits
        self.error = error
        self.seen = []

    def forward(self, images):
        self.seen.append((len(images), self.training))
        if len(images) not in self.limits:
            raise self.error
        return super().forward(images)


def try_training(network, batch_size=25):
    smoke_test(network, MODEL, (3, 4, 4), batch_size)


def test_try_changes_nothing(folder):
    network = Network().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    try_training(network)
    assert network.seen == [(2, True)]
    assert network[1].num_batches_tracked == 0
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert all(weight.grad is None for weight in network.parameters())


def test_network_may_take_only_whole_batches():
    network = Network(limits=[25])
    try_training(network)
    assert network.seen == [(2, True), (25, True)]


def test_failing_try_changes_nothing_either():
    network = Network(limits=[])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match=f"--model {MODEL} cannot be trained: wrong number"):
        try_training(network)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert all(weight.grad is None for weight in network.parameters())


def test_too_little_memory_is_no_mistake_of_the_network():
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    try_training(Network(limits=[], error=out_of_memory))


class Tuple(Network):
    def forward(self, images):
        return super().forward(images), 1


class Detached(Network):
    def forward(self, images):
        return super().forward(images).detach()


class InPlace(Network):
    def forward(self, images):
        return super().forward(images).exp().add_(1)


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (Tuple(), "tuple"),
        (Detached(), "without gradients"),
        (Network().requires_grad_(False), "frozen"),
        (InPlace(), "inplace operation"),
        (Network(limits=[], error=KeyError("boom")), r"KeyError\('boom'\)"),
    ],
)
def test_network_that_cannot_be_trained(network, named):
    with pytest.raises(UserError, match=f"--model {MODEL} cannot be trained.*{named}"):
        try_training(network)


# ---- the line of FILE.py ----


def test_hint_names_the_last_line_of_the_file_that_was_passed(folder):
    write(folder, "def network(f):\n    return inner(f)\n\ndef inner(f):\n    return f()\n")
    factory = load_factory(MODEL)
    with pytest.raises(ZeroDivisionError) as caught:
        factory(lambda: 1 / 0)
    assert error_hint(caught.value, MODEL) == " (mine.py, line 5)"


def test_no_hint_for_an_error_from_elsewhere(folder):
    write(folder, "")
    with pytest.raises(ZeroDivisionError) as caught:
        1 / 0  # noqa: B018
    assert error_hint(caught.value, MODEL) == ""
