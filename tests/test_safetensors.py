"""Model files as safetensors: the same model as in the .pth, and as little trusted."""

import json
import pickle
import sys
from dataclasses import asdict

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import save
from test_checkpoints import CLASSES, Malicious, build, make_content

import export
import image_classification as ic
import inference
from classifier import checkpoints, seen_images
from classifier.checkpoints import (
    load_model,
    read_checkpoint,
    read_safetensors,
    read_state_dict,
    save_checkpoint,
    to_safetensors,
)
from classifier.config import FIELD_TYPES, Config
from classifier.errors import UserError
from classifier.foreign_paths import without_folders

NETWORK = """
from torch import nn

def small(classes, channels, image_size):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
"""


def full_content():
    """The content of a model file with all that one may hold."""
    content = make_content(dataset="photos")
    content |= {
        "mean": [1 / 3, 0.1, 1.0],
        "dataset": "Übung|数据",
        "train_images": 7,
        "fingerprint": [7.0, 0.1 + 0.2],
        "split_rules": 2,
        "pixel_ranges": {"integers": [0.0, 4095.0]},
        "report": {"macro_f1": None, "class_images": {"cat": 3}},
        "metrics": {"epoch": 3, "test_accuracy": 2 / 3, "temperature": None},
        "train_digests": torch.tensor([-(2**63), 2**63 - 1, 0]),
        "earlier_digests": torch.tensor([], dtype=torch.int64),
    }
    return content


def write(content, path):
    path.write_bytes(to_safetensors(content))
    return path


def write_raw(path, weights=None, **metadata):
    """A safetensors file with these texts in its metadata, beside those of a whole model file."""
    file = safetensors.torch.save
    whole = {name: json.dumps(value) for name, value in make_content().items() if name != "model"}
    path.write_bytes(file(weights or make_content()["model"], {**whole, **metadata}))
    return path


# ---- what is written and read ----


def test_content_comes_back_as_it_was(folder):
    content = full_content()
    network, loaded = load_model(write(content, folder / "a.safetensors"), build)
    assert not network.training and loaded.keys() == content.keys()
    for name in ("model", "train_digests", "earlier_digests"):
        found, expected = loaded.pop(name), content.pop(name)
        found = found if isinstance(found, dict) else {"": found}
        for key, tensor in found.items():
            other = expected[key] if key else expected
            assert tensor.dtype == other.dtype and torch.equal(tensor, other), name
    assert loaded == content


def test_all_that_a_model_file_holds_is_written():
    from conftest import trainer_of

    content = trainer_of(width=0.25).state.model_file()
    known = {*checkpoints.REQUIRED, *checkpoints.OPTIONAL, *checkpoints.DIGESTS}
    assert content.keys() <= known  # and ood_score, which a finished run adds
    assert set(checkpoints.DIGESTS) == {seen_images.TRAIN_DIGESTS, seen_images.EARLIER_DIGESTS}


def test_score_of_unlike_images_is_kept(model, folder):
    content = read_checkpoint(model.path)
    path = write(content, folder / "a.safetensors")
    saved, read = content[checkpoints.SCORE], read_checkpoint(path)[checkpoints.SCORE]
    assert saved["quantiles"] == read["quantiles"] and saved["stages"] == read["stages"]
    assert saved["tensors"].keys() == read["tensors"].keys()
    assert all(
        torch.equal(saved["tensors"][name], read["tensors"][name]) for name in read["tensors"]
    )
    assert read_checkpoint(path)["model"].keys() == content["model"].keys()


def test_other_programs_find_the_weights_under_their_names(folder):
    content = full_content() | {"optimizers": [torch.zeros(3)], "step": 3}
    # neither shared memory nor strides are a reason to refuse it
    shared = torch.arange(6.0).reshape(2, 3)
    content["model"] = {"one": shared, "two": shared, "columns": shared.T}
    path = write(content, folder / "a.safetensors")
    found = safetensors.torch.load_file(path)
    assert found.keys() == content["model"].keys()
    assert all(torch.equal(found[name], content["model"][name]) for name in found)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and json.loads(metadata["classes"]) == CLASSES
    assert not {"model", "optimizers", "step"} & metadata.keys()
    assert read_safetensors(path)[1] == metadata


def test_file_of_another_program_is_a_state_dict(folder):
    weights = {"layer.weight": torch.ones(2, 3)}
    path = folder / "other.safetensors"
    for metadata in (None, {"format": "pt"}, {"classes": "cat, dog"}):
        path.write_bytes(safetensors.torch.save(weights, metadata))
        with pytest.raises(UserError, match=r"other\.safetensors .*state dict of 1 tensors"):
            read_checkpoint(path)
        assert torch.equal(read_state_dict(path)["layer.weight"], weights["layer.weight"])


def test_without_the_package_the_error_names_it(folder, monkeypatch):
    path = write(full_content(), folder / "a.safetensors")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"a\.safetensors .*pip install safetensors"):
        read_checkpoint(path)


def test_values_that_json_lacks_are_not_written():
    for value in (torch.zeros(2), {1, 2}, b"bytes"):
        with pytest.raises(UserError, match="report"):
            to_safetensors(full_content() | {"report": {"macro_f1": value}})


# ---- files of strangers ----


def bad_files(content):
    """Bytes that are no safetensors file, or a damaged one."""
    yield from [b"", b"hello", content[: len(content) // 2], content[:-1], content + b"x"]
    yield from [b"\xff" * 16, (2**40).to_bytes(8, "little") + b"{}", bytes(100)]
    yield pickle.dumps(Malicious())
    header = {"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    yield len(text).to_bytes(8, "little") + text + bytes(4)
    text = b'{"__metadata__": {"classes": 3}}'
    yield len(text).to_bytes(8, "little") + text
    text = b"[" * 100_000
    yield len(text).to_bytes(8, "little") + text


def test_damaged_file_is_refused_in_one_line(folder):
    path = folder / "bad.safetensors"
    for content in bad_files(to_safetensors(full_content())):
        path.write_bytes(content)
        for read in (read_checkpoint, read_state_dict, read_safetensors):
            with pytest.raises(UserError) as caught:
                read(path)
            message = str(caught.value)
            assert str(path) in message and "\n" not in message and len(message) < 300
    assert [each.name for each in folder.iterdir()] == ["bad.safetensors"]  # nothing was executed


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes", "cat"),
        ("classes", '["\\u001b[2J", "dog", "frog"]'),
        ("classes", "[" * 100_000),
        ("mean", '["a"]'),
        ("image_size", "1e3"),
        ("config", "[]"),
        ("metrics", json.dumps({"x": "x" * checkpoints.MAX_JSON})),
        ("train_digests", "0123"),
        ("train_digests", "no digits"),
        ("train_digests", "é"),
    ],
    ids=lambda value: value[:20],
)
def test_metadata_that_no_model_has_are_refused(folder, name, text):
    path = write_raw(folder / "bad.safetensors", **{name: text})
    with pytest.raises(UserError, match=r"bad\.safetensors"):
        load_model(path, build)


def test_weights_are_those_of_the_file(folder):
    path = write_raw(folder / "a.safetensors", model='{"0.weight": 3}', unknown="[")
    _, content = load_model(path, build)
    assert all(isinstance(tensor, torch.Tensor) for tensor in content["model"].values())
    assert "unknown" not in content


def test_weights_of_another_network_are_refused(folder):
    config = json.dumps(asdict(Config(width=300.0)))
    with pytest.raises(UserError, match="another network"):
        load_model(write_raw(folder / "a.safetensors", config=config), build)


def test_file_never_imports_what_it_names(folder):
    (folder / "evil.py").write_text("open('owned', 'w')")
    config = json.dumps({"model": f"{folder / 'evil.py'}:network"})
    with pytest.raises(UserError, match="--model"):
        load_model(write_raw(folder / "a.safetensors", config=config), build)
    assert not (folder / "owned").exists()


def test_file_that_is_not_there_is_an_os_error(folder):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(folder / "nowhere.safetensors")


# ---- no folders of this machine ----


def test_no_folder_is_given_away():
    texts = {name for name, kind in FIELD_TYPES.items() if kind is str}
    no_places = {"optimizer", "scheduler", "augment", "class_balance", "device", "precision", "fit"}
    places = {name: f"/home/ann/{name}" for name in texts - no_places}
    places |= {"model": "/home/ann/net.py:small", "mirror": "http://ann.example/"}
    settings = without_folders({**asdict(Config()), **places, "stranger": "/home/ann"})
    assert "ann" not in json.dumps(settings) and settings.keys() <= FIELD_TYPES.keys()
    assert settings["init_from"] == "init_from" and settings["model"] == "net.py:small"
    assert Config(**settings).dataset == "./dataset"


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("cifar10", "cifar10"),
        ("/data/mnist/", "./mnist"),  # it is not MNIST
        (r"C:\Users\ann\photos", "./photos"),
        ("photos.zip", "photos.zip"),
        ("", ""),
    ],
)
def test_data_set_keeps_its_kind(path, kept):
    assert without_folders({"dataset": path, "model": "torchvision:resnet18"}) == {
        "dataset": kept,
        "model": "torchvision:resnet18",
    }


# ---- export.py ----


@pytest.fixture
def run_export(tool_inside, monkeypatch):
    """export.py in this process, which compares few images and reads no data set."""
    monkeypatch.setattr(export, "NUM_COMPARED", 10)
    monkeypatch.setattr(export, "dataset_available", lambda model: False)
    return tool_inside("export")


def test_exported_model_is_the_same_everywhere(model, folder, run_export):
    out, _ = run_export(
        "--checkpoint", model.path, "--format", "safetensors", "--out", "m.safetensors"
    )
    assert "on 10 images: the same logits, bit for bit" in out and "m.safetensors IMAGE" in out
    loaded = inference.load_model("m.safetensors", "cpu")
    for name in ("classes", "image_size", "temperature", "dataset", "test_accuracy", "fingerprint"):
        assert getattr(loaded, name) == getattr(model, name), name
    names = ["1.png", "2.png"]
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        save(torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=generator), name)
    assert inference.predict(loaded, names) == inference.predict(model, names)

    # what was exported can be exported
    run_export("--checkpoint", "m.safetensors", "--format", "safetensors", "--out", "n.safetensors")
    first, second = read_checkpoint("m.safetensors"), read_checkpoint("n.safetensors")
    assert ic.load_checkpoint("n.safetensors")[1].keys() == first.keys()
    assert first["report"] == second["report"] != {}


def test_training_starts_from_it(model, folder, inside):
    (folder / "start.safetensors").write_bytes(export.to_safetensors(model))
    settings = ["--dataset", "digits", "--width", "0.25", "--fast-dev-run"]
    out, _ = inside(*settings, "--init-from", "start.safetensors")
    assert "Finished Training" in out


def test_export_that_computes_something_else_is_refused(model, folder, run_export, monkeypatch):
    (folder / "m.safetensors").write_text("an earlier one")
    original = checkpoints.to_safetensors

    def change_a_bit(content):
        weights = dict(content["model"])
        name = list(weights)[-1]
        weights[name] = torch.nextafter(weights[name], torch.tensor(9.0))
        return original({**content, "model": weights})

    monkeypatch.setattr(checkpoints, "to_safetensors", change_a_bit)
    arguments = ["--checkpoint", model.path, "--format", "safetensors", "--out", "m.safetensors"]
    assert "does not compute the same" in run_export.error(*arguments)
    assert (folder / "m.safetensors").read_text() == "an earlier one"


def test_old_model_becomes_a_safetensors_file(folder, run_export):
    from test_inference import OLD_FILES

    path = OLD_FILES / "model_cnn_digits.pth"
    arguments = ["--checkpoint", path, "--format", "safetensors", "--out", "old.safetensors"]
    run_export(*arguments)
    images = np.zeros((2, 3, 32, 32), np.uint8)
    old = inference.load_model(path, "cpu")
    images = images[:, :, : old.image_size, : old.image_size]
    new = inference.load_model("old.safetensors", "cpu")
    assert np.array_equal(new.logits(images), old.logits(images))


def test_custom_network_is_named_again(folder, run_export):
    (folder / "nets").mkdir()
    (folder / "nets" / "net.py").write_text(NETWORK)
    config = Config(dataset="digits", model="nets/net.py:small")
    network = ic.instantiate(config, 3, [0.5] * 3, [0.25] * 3, 8)
    content = make_content() | {
        "model": network.state_dict(),
        "config": asdict(config),
        "image_size": 8,
    }
    save_checkpoint("m.pth", content)
    arguments = ["--format", "safetensors", "--model", "nets/net.py:small"]
    out, _ = run_export("--checkpoint", "m.pth", *arguments)
    assert "--model nets/net.py:small IMAGE" in out
    with pytest.raises(UserError, match="--model net.py:small"):
        inference.load_model("m.safetensors", "cpu")
    inference.load_model("m.safetensors", "cpu", "nets/net.py:small")
