"""Model files from strangers and from version 0.9.1: read, or refused in one line; never executed.

classifier/checkpoints.py has tests with a small network in test_checkpoints.py; these take the
files that the program writes. benchmarks/survival.py mutates more files than these tests.
"""

import json
import lzma
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK, trainer_of

import image_classification as ic
from classifier.checkpoints import to_safetensors
from classifier.errors import UserError
from classifier.progress import COLUMNS

OLD_FILES = Path(__file__).resolve().parent / "fixtures" / "0.9.1"
OLD_MODELS = [
    "model_cnn_digits.pth",
    "model_convnet_digits.pth.xz",
    "model_airbench94_digits.pth.xz",
]


class Malicious:
    """Pickled, it asks the reader to write a file."""

    def __reduce__(self):
        return (open, ("owned", "w"))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A finished model as a run writes it."""
    trainer = trainer_of(width=0.25)
    trainer.state.progress.history.append(dict.fromkeys(COLUMNS))
    path = tmp_path_factory.mktemp("model") / "model.pth"
    ic.save_checkpoint(path, trainer.state.model_file())
    return path


def changed_copy(model_file, folder, **changes):
    """A copy of the model file with other content; returns its path."""
    content = torch.load(model_file, weights_only=True) | changes
    ic.save_checkpoint(folder / "changed.pth", content)
    return folder / "changed.pth"


def unpacked(name, folder):
    """The path of a model file of version 0.9.1."""
    path = OLD_FILES / name
    if path.suffix != ".xz":
        return path
    target = folder / path.stem
    target.write_bytes(lzma.decompress(path.read_bytes()))
    return target


# ---- what a run writes ----


def test_model_file_holds_only_plain_values(model_file):
    content = torch.load(model_file, weights_only=True, map_location="cpu")
    keys = ["model", "config", "classes", "mean", "std", "image_size", "metrics", "versions"]
    assert set(keys) <= content.keys()
    assert all(isinstance(tensor, torch.Tensor) for tensor in content["model"].values())
    json.dumps({name: value for name, value in content.items() if name != "model"})


def test_loaded_model_classifies_as_the_trained_one(model_file):
    trainer = trainer_of(width=0.25)
    model, content = ic.load_checkpoint(model_file)
    assert not model.training and content["classes"] == trainer.data.classes
    test = trainer.data.test.first(50)
    expected = ic.evaluate(trainer.state.model, *test).logits
    torch.testing.assert_close(ic.evaluate(model, *test).logits, expected)


# ---- files of strangers ----


def test_each_missing_part_is_noticed(model_file, folder):
    content = torch.load(model_file, weights_only=True)
    for name in ("model", "config", "classes", "mean", "std", "image_size", "metrics", "versions"):
        lacking = {key: value for key, value in content.items() if key != name}
        torch.save(lacking, folder / "lacking.pth")
        with pytest.raises(UserError, match=r"lacking\.pth"):
            ic.load_checkpoint(folder / "lacking.pth")


def test_nothing_in_a_file_is_executed(inside, folder):
    torch.save({"model": Malicious(), "config": {}, "classes": []}, folder / "evil.pth")
    for options in ([], ["--model", "torchvision:squeezenet1_1", "--pretrained"]):
        assert "evil.pth" in inside.error(*QUICK[:2], "--init-from", "evil.pth", *options)
    assert [path.name for path in folder.iterdir()] == ["evil.pth"]


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100)])
def test_damaged_file_stops_a_run_before_it_begins(inside, folder, content):
    (folder / "bad.pth").write_bytes(content)
    assert "bad.pth" in inside.error(*QUICK, "--init-from", "bad.pth")
    assert not (folder / "runs").exists()


def test_file_of_another_network_names_its_options(model_file, inside):
    error = inside.error(*QUICK[:2], "--width", "0.5", "--init-from", model_file)
    assert "--width 0.25" in error


@pytest.mark.parametrize("name", ["evil.py", "evil.pyc", "notes.txt"])
def test_file_never_imports_what_it_names(model_file, folder, name):
    (folder / name).write_text("open('owned', 'w')")
    config = {"model": f"{folder / name}:network"}
    path = changed_copy(model_file, folder, config=config)
    with pytest.raises(UserError, match="--model"):
        ic.load_checkpoint(path)
    assert not (folder / "owned").exists()


def test_only_python_files_can_be_named_for_a_model_file(model_file, folder):
    (folder / "notes.txt").write_text("")
    path = changed_copy(model_file, folder, config={"model": "notes.txt:network"})
    with pytest.raises(UserError, match=r"notes\.txt"):
        ic.load_checkpoint(path, model="notes.txt:network")


def test_nothing_in_a_file_decides_where_a_run_writes(model_file, inside, folder):
    config = torch.load(model_file, weights_only=True)["config"]
    elsewhere = {"run_dir": "elsewhere", "out": "elsewhere.pth", "data_dir": "elsewhere"}
    path = changed_copy(model_file, folder, config=config | elsewhere)
    inside(*QUICK, "--fast-dev-run", "--init-from", path)
    assert not list(folder.glob("elsewhere*"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_impossible_settings_are_refused(model_file, folder):
    config = torch.load(model_file, weights_only=True)["config"]
    for changes in (
        {"config": config | {"width": -1.0}},
        {"config": config | {"model": "../cnn"}},
        {"config": config | {"model": 3}},
        {"image_size": 1},
        {"image_size": -8},
        {"mean": [], "std": []},
    ):
        with pytest.raises(UserError):
            ic.load_checkpoint(changed_copy(model_file, folder, **changes))


HUGE = """
import contextlib, resource
from classifier.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in {names}:
    result = "refused"
    with contextlib.suppress(UserError):
        ic.load_checkpoint(name + ".pth")
        result = "loaded"
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(name, result, (after - before) // 1024)
sys.exit()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_files_that_claim_to_be_huge_cost_nothing(model_file, program, folder):
    content = torch.load(model_file, weights_only=True)
    changes = {
        "width": {"config": content["config"] | {"width": 300.0}},
        "size": {"image_size": 30_000},
        "classes": {"classes": [str(i) for i in range(500_000)]},
        "channels": {"mean": [0.5] * 1000, "std": [0.5] * 1000},
    }
    for name, change in changes.items():
        torch.save(content | change, folder / f"{name}.pth")
    out, _ = program(patch=HUGE.format(names=list(changes)))
    results = [line.split() for line in out.splitlines()]
    assert [name for name, _, _ in results] == list(changes)
    # the network takes images of any size
    assert [name for name, result, _ in results if result == "loaded"] == ["size"]
    assert all(int(mebibytes) < 300 for _, _, mebibytes in results), out


def count_mutants(model_file, num_files):
    """Load mutated model files and pictures; each is to work or be refused, quickly and small."""
    pytest.importorskip("resource", reason="Windows has no module resource")
    import survival

    chance = random.Random(1)
    content = model_file.read_bytes()
    files = list(survival.pictures(num_files, chance))
    for change in (survival.mutated, survival.altered):
        files += [(change(content, chance), ".pth") for _ in range(num_files)]
    other_format = to_safetensors(torch.load(model_file, weights_only=True))
    files += [(survival.mutated(other_format, chance), ".safetensors") for _ in range(num_files)]

    _, _, before = survival.load(content, ".pth", str(model_file))
    results = []
    for changed, suffix in files:
        result, seconds, peak = survival.load(changed, suffix, str(model_file))
        assert seconds < 5 and peak - before < 1000, suffix
        results.append(result)
    assert set(results) == {"worked", "refused"}


def test_mutated_files_work_or_are_refused(model_file):
    count_mutants(model_file, num_files=20)


@pytest.mark.slow
def test_many_mutated_files_work_or_are_refused(model_file):
    count_mutants(model_file, num_files=75)


# ---- version 0.9.1 ----


@pytest.mark.parametrize("name", OLD_MODELS)
def test_model_of_version_0_9_1_has_the_logits_it_had(name, folder):
    expected = json.loads((OLD_FILES / "expected.json").read_text())["logits"][name]
    model, content = ic.load_checkpoint(unpacked(name, folder))
    assert content["versions"]["image_classification"] == "0.9.1"
    data = ic.load_data(ic.Config(dataset="digits", image_size=content["image_size"]))
    logits = ic.evaluate(model, *data.test.first(20)).logits
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-3, atol=1e-3)


def test_model_that_this_version_cannot_build_names_the_version_that_can(folder):
    with pytest.raises(UserError, match=r"0\.9\.1"):
        ic.load_checkpoint(unpacked("model_convnet_3_digits.pth.xz", folder))


def test_training_goes_on_from_a_model_of_version_0_9_1(inside, folder):
    old_file = OLD_FILES / "model_cnn_digits.pth"
    out, _ = inside(*QUICK, "--epochs", "1", "--init-from", old_file)
    assert "last layer is reinitialised" not in out
    model, content = ic.load_checkpoint(folder / "model_cnn_digits.pth")
    assert content["versions"]["image_classification"] != "0.9.1"
    assert not {"low_res", "test_views", "depth", "make_imbalanced"} & content["config"].keys()
