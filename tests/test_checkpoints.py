"""Model files: written whole, never trusted, and refused in one line."""

import errno
import os
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import classifier
from classifier.checkpoints import (
    check_weights,
    load_model,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    without_wrapper,
)
from classifier.cli import command_line
from classifier.config import Config
from classifier.errors import UserError

CLASSES = ["cat", "dog", "frog"]


def build(config, num_classes, mean, std, image_size, skip_check=False):
    """A network for images of any size from 3 pixels on; `width` is the number of its channels."""
    torch.manual_seed(config.seed)
    channels = round(8 * (config.width or 1))
    network = nn.Sequential(
        nn.Conv2d(len(mean), channels, 3),
        nn.BatchNorm2d(channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, num_classes),
    )
    if not skip_check:
        try:
            with torch.no_grad():
                network.eval()(torch.zeros(2, len(mean), image_size, image_size))
        except RuntimeError as error:
            raise UserError(f"--model {config.model}: {error}") from error
    return network.train()


def make_content(**settings):
    """What a model file holds."""
    config = Config(**settings)
    return {
        "model": build(config, len(CLASSES), [0.5] * 3, [0.25] * 3, 32).state_dict(),
        "config": asdict(config),
        "classes": CLASSES,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "image_size": 32,
        "metrics": {"epoch": 3},
        "versions": {"image_classification": classifier.__version__},
    }


@pytest.fixture
def model_file(folder):
    save_checkpoint(folder / "model.pth", make_content())
    return folder / "model.pth"


class Malicious:
    def __reduce__(self):
        return (open, ("owned", "w"))


def test_finished_model_comes_back_as_it_was_saved(model_file):
    network, content = load_model(model_file, build)
    expected = make_content()
    assert not network.training
    assert all(not tensor.is_meta for tensor in network.state_dict().values())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, expected["model"][name])
    for name in expected.keys() - {"model"}:
        assert content[name] == expected[name]


def damaged_files(content):
    """Bytes that are no checkpoint, and things that torch.save can write but that are none."""
    whole = make_content()
    for name in ("model", "config", "classes", "mean", "std", "image_size", "metrics", "versions"):
        yield {key: value for key, value in whole.items() if key != name}
    yield from [content[: len(content) // 2], b"hello", b"", content[:-30]]
    yield from [{"weights": torch.zeros(3)}, [1, 2], {**whole, "model": Malicious()}]
    yield {**whole, "model": {"a": 3}}
    yield {**whole, "model": {3: torch.zeros(3)}}
    yield {**whole, "classes": ["cat", 3, "dog"]}
    yield {**whole, "mean": [0.5, "0.5", 0.5]}
    yield {**whole, "std": [1, 1, 1]}


def test_bad_checkpoint_is_refused_in_one_line(model_file, folder):
    path = folder / "bad.pth"
    torch.save({"model": Malicious()}, path, _use_new_zipfile_serialization=False)
    old_format = path.read_bytes()
    for bad in [*damaged_files(model_file.read_bytes()), old_format]:
        if isinstance(bad, bytes):
            path.write_bytes(bad)
        else:
            torch.save(bad, path)
        with pytest.raises(UserError) as caught:
            load_model(path, build)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert not (folder / "owned").exists()


def test_missing_file_is_an_os_error(folder):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(folder / "nowhere.pth")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_disk_or_memory_that_fails_is_no_damaged_file(model_file, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)) as caught:
        read_checkpoint(model_file)
    if isinstance(error, OSError):
        assert caught.value.filename == str(model_file)


def test_file_that_claims_to_need_much_memory_is_damaged(folder, monkeypatch):
    """In the old format a damaged file may ask for any amount."""

    def fail(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(torch, "load", fail)
    (folder / "old.pth").write_bytes(b"no zip file")
    with pytest.raises(UserError, match="old.pth is damaged"):
        read_checkpoint(folder / "old.pth")


def test_advice_is_quoted_for_the_shell(folder):
    content = make_content()
    content["config"]["model"] = "a.py:f; rm -rf x"
    save_checkpoint(folder / "it's.pth", content)
    with pytest.raises(UserError) as caught:
        load_model(folder / "it's.pth", build)
    assert command_line(["--model", "a.py:f; rm -rf x"]) in str(caught.value)
    torch.save(content["model"], folder / "it's.pth")
    with pytest.raises(UserError) as caught:
        load_model(folder / "it's.pth", build)
    assert command_line(["--init-from", str(folder / "it's.pth")]) in str(caught.value)


def test_compressed_checkpoint_is_refused(model_file, folder):
    compressed = folder / "zip.pth"
    with (
        zipfile.ZipFile(model_file) as source,
        zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name) + bytes(10_000))
    with pytest.raises(UserError, match=r"zip\.pth"):
        read_checkpoint(compressed)


def test_state_dict_is_called_one(folder):
    """And what can be done with it is said."""
    weights = make_content()["model"]
    prefixed = {f"module.{name}": tensor for name, tensor in weights.items()}
    for content in (weights, prefixed, {"state_dict": weights}, {"model": weights, "epoch": 3}):
        torch.save(content, folder / "plain.pth")
        with pytest.raises(UserError, match=rf"plain\.pth .*{len(weights)} tensors.*--init-from"):
            load_model(folder / "plain.pth", build, "mine.py:network")
    for content in ({}, {"state_dict": {}}, {"state_dict": {"a": 1}}, {"classes": [], **weights}):
        torch.save(content, folder / "plain.pth")
        with pytest.raises(UserError, match="damaged"):
            load_model(folder / "plain.pth", build)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapped_network_are_its_own(folder, prefix):
    content = make_content()
    weights = content["model"]
    content["model"] = {prefix + name: tensor for name, tensor in weights.items()}
    save_checkpoint(folder / "wrapped.pth", content)
    network, _ = load_model(folder / "wrapped.pth", build)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_network_whose_own_names_begin_like_a_wrapper(folder):
    weights = {"module.weight": torch.ones(2), "module.bias": torch.ones(2)}
    assert without_wrapper(weights, weights) == weights
    assert without_wrapper(weights, ["weight"]).keys() == {"weight", "bias"}
    assert without_wrapper(weights, ["other"]) == weights
    mixed = weights | {"other": torch.ones(2)}
    assert without_wrapper(mixed, ["weight"]) == mixed


def test_other_classes_are_named(model_file):
    assert read_checkpoint(model_file, CLASSES)["classes"] == CLASSES
    with pytest.raises(UserError, match="cat, dog, frog"):
        read_checkpoint(model_file, ["cat", "dog"])


def test_weights_of_another_network_change_nothing(model_file):
    content = make_content()
    other = build(Config(width=2.0), 3, [0.5] * 3, [0.25] * 3, 32)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(other, content["model"], model_file)
    # 7 tensors have a channel dimension: all but the counter of batch norm and the last bias
    assert "7 tensors" in str(caught.value) and "[8, 3, 3, 3]" in str(caught.value)
    assert str(model_file) in str(caught.value)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name])
    content["model"].pop("4.bias")
    with pytest.raises(UserError, match=r"4\.bias is missing there, \[3\] here"):
        check_weights(build(Config(), 3, [0.5] * 3, [0.25] * 3, 32), content["model"], model_file)


@pytest.mark.parametrize("name", ["evil.py:f", "evil.pyc:f", "notes.txt:f"])
def test_checkpoint_never_names_the_file_to_import(folder, name):
    content = make_content()
    content["config"]["model"] = str(folder / name)
    save_checkpoint(folder / "custom.pth", content)
    built = []

    def record(config, *rest, **options):
        built.append((config.model, torch.empty(0).device.type, options["skip_check"]))
        return build(config, *rest, **options)

    with pytest.raises(UserError, match="--model"):
        load_model(folder / "custom.pth", record)
    assert built == []
    load_model(folder / "custom.pth", record, model="mine.py:f")
    assert built == [("mine.py:f", "cpu", False)]  # a user's network is never built twice


def test_invalid_setting_in_a_checkpoint_is_refused(folder):
    content = make_content()
    content["config"] |= {"width": "wide", "no_longer": 1}
    save_checkpoint(folder / "bad.pth", content)
    with pytest.raises(UserError, match="--width"):
        load_model(folder / "bad.pth", build)


# ---- the check on the meta device ----


@pytest.mark.parametrize(
    ("fails_on_meta", "expected"),
    [
        (lambda skip_check: False, [("meta", False), ("cpu", True)]),
        # an operation unknown to meta tensors: the real network is checked instead
        (lambda skip_check: not skip_check, [("meta", False), ("meta", True), ("cpu", False)]),
        # torchvision's RegNets cannot be built there at all
        (lambda skip_check: True, [("meta", False), ("meta", True), ("cpu", True)]),
    ],
)
def test_network_is_compared_before_it_takes_memory(model_file, fails_on_meta, expected):
    calls = []

    def record(*arguments, skip_check):
        device = torch.empty(0).device.type
        calls.append((device, skip_check))
        if device == "meta" and fails_on_meta(skip_check):
            raise UserError("not on the meta device")
        return build(*arguments, skip_check=skip_check)

    network, _ = load_model(model_file, record)
    assert calls == expected
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_network_that_does_not_fit_its_image_size_is_refused(folder):
    save_checkpoint(folder / "small.pth", make_content() | {"image_size": 1})
    with pytest.raises(UserError, match="--model cnn"):
        load_model(folder / "small.pth", build)


HUGE = """
import contextlib, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_checkpoints import UserError, build, load_model

def peak_memory():  # in KiB; ru_maxrss would include the peak of the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])

before = peak_memory()
for name in {names!r}:
    result = "refused"
    with contextlib.suppress(UserError):
        load_model(f"{{name}}.pth", build)
        result = "loaded"
    print(name, result, (peak_memory() - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_checkpoints_that_claim_to_be_huge_cost_nothing(folder):
    content = make_content()
    large_weights = content["model"] | {"4.weight": torch.zeros(100_000_000)}
    changes = {
        "width": {"config": content["config"] | {"width": 3_000_000.0}},
        "size": {"image_size": 30_000},
        "classes": {"classes": [str(i) for i in range(500_000)]},
        "channels": {"mean": [0.5] * 1_000_000, "std": [0.5] * 1_000_000},
        "whole": {"model": large_weights},
    }
    for name, change in changes.items():
        torch.save(content | change, folder / f"{name}.pth")
    with (
        zipfile.ZipFile(folder / "whole.pth") as whole,
        zipfile.ZipFile(folder / "zip.pth", "w", zipfile.ZIP_DEFLATED, True, 1) as compressed,
    ):
        for name in whole.namelist():
            compressed.writestr(name, whole.read(name))

    tests = Path(__file__).parent
    names = ["width", "size", "classes", "channels", "zip"]
    code = HUGE.format(paths=[str(tests.parent), str(tests)], names=names)
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True
    )
    results = [line.split() for line in process.stdout.splitlines()]
    assert [name for name, _, _ in results] == names
    # this network takes images of any size
    assert [name for name, result, _ in results if result == "loaded"] == ["size"]
    # importing what meta tensors need takes some 160 MiB, a network as described 400 and more
    assert all(int(mebibytes) < 400 for _, _, mebibytes in results), process.stdout


# ---- files of version 0.9 ----


def test_file_of_version_0_9_comes_in_new_names(folder):
    content = make_content()
    settings = {"model": "cnn", "low_res": 0.7, "test_views": 6, "scheduler": "onecycle"}
    content["config"] = settings | {"depth": None, "make_imbalanced": 0.0}
    content["versions"] = {"image_classification": "0.9.1"}
    content["model"] = {"stages.0.first.weight": torch.ones(2)}
    content["average"] = {"module.stages.0.second_norm.bias": torch.ones(2)}
    save_checkpoint(folder / "old.pth", content)
    read = read_checkpoint(folder / "old.pth")
    expected = {"progressive_resizing": 0.7, "tta": 6, "scheduler": "linear"}
    assert expected.items() <= read["config"].items()
    assert list(read["model"]) == ["stages.0.conv1.weight"]
    assert list(read["ema"]) == ["module.stages.0.norm2.bias"]


def test_old_setting_that_is_gone_is_refused(folder):
    content = make_content()
    content["versions"] = {"image_classification": "0.9.1"}
    content["config"] |= {"model": "convnet", "depth": 4}
    save_checkpoint(folder / "old.pth", content)
    with pytest.raises(UserError, match=r"0\.9\.1"):
        load_model(folder / "old.pth", build)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizers": 3},
        {"optimizers": [{}]},
        {"average": [1]},
        {"config": {"depth": torch.zeros(2)}},
    ],
)
def test_damaged_file_of_version_0_9_is_refused(folder, change):
    content = make_content() | {"versions": {"image_classification": "0.9.1"}} | change
    torch.save(content, folder / "old.pth")
    with pytest.raises(UserError, match=r"old\.pth is damaged"):
        read_checkpoint(folder / "old.pth")


# ---- writing ----


def test_full_disk_leaves_the_old_file(small_disk):
    disk = small_disk(200)
    save_checkpoint(disk / "model.pth", make_content())
    large = make_content() | {"model": {"large": torch.zeros(100_000)}}
    with pytest.raises(OSError, match=r"No space left on device.*model\.pth"):
        save_checkpoint(disk / "model.pth", large)
    assert read_checkpoint(disk / "model.pth")["classes"] == CLASSES
    assert [path.name for path in disk.iterdir()] == ["model.pth"]


@pytest.mark.skipif(os.name != "posix", reason="Windows lets few users make links")
def test_link_is_replaced_and_not_followed(folder):
    (folder / "model.pth").symlink_to(folder / "nowhere" / "model.pth")
    save_checkpoint(folder / "model.pth", make_content())
    assert not (folder / "model.pth").is_symlink()
    assert read_checkpoint(folder / "model.pth")["classes"] == CLASSES
