"""Networks and recipes that are asked for by name, pretrained ones, and a user's: whole runs."""

import pytest
import torch
from conftest import QUICK, SMALL, only_run, report_of, same

import image_classification as ic
from classifier.errors import UserError
from classifier.recipes import RECIPES

DIGITS = ["--dataset", "digits"]
SQUEEZENET = ["--model", "torchvision:squeezenet1_1", "--pretrained"]

# Networks that a processor trains in seconds, and one of torchvision's.
SMALL_NETWORKS = ["beginner-cnn", "coursework-cnn", "notebook-cnn", "fcn", "convnet", "fftnet"]
SMALL_NETWORKS += ["airbench94"]

# Recipes that a processor computes in seconds, one for each kind of settings, and a slow one.
QUICK_RECIPES = ["accuracy94", "beginner", "coursework", "notebook"]
SLOW_RECIPES = ["resnet-augmented"]

CUSTOM_NETWORK = """
import torch
from torch import nn

class network(nn.Sequential):
    def __init__(self, classes=10, channels=3, image_size=32):
        size = channels * image_size**2
        super().__init__(nn.Flatten(), nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, x):
        if self.training:  # five images at a time, so that only whole batches will do
            x = x.view(-1, 5, *x.shape[1:]).flatten(0, 1)
        return super().forward(x)
"""


def slow_unless(quick, names):
    """Parameters for these names, marked as slow except the quick ones."""
    slow = pytest.mark.slow
    return [name if name in quick else pytest.param(name, marks=slow) for name in names]


# ---- networks and recipes by name ----


def test_small_run_with_another_network(inside, folder):
    """It has its own optimiser and learning rate, and its name is in the name of the file."""
    out, _ = inside(*SMALL, "--model", "fcn", "--image-size", "8")
    assert "smaller images" not in out  # progressive resizing is for the default network
    model, content = ic.load_checkpoint(folder / "model_fcn_digits.pth")
    assert content["config"]["optimizer"] == "adamw" and content["image_size"] == 8
    test = ic.load_data(ic.Config(dataset="digits", image_size=8)).test
    accuracy = report_of(only_run(folder))["test_accuracy"]
    assert ic.evaluate(model, *test).accuracy == pytest.approx(accuracy)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_network_learns_with_its_default_settings(name, folder):
    settings = {"subset": 300, "epochs": 4, "batch_size": 25, "image_size": 16}
    report = ic.train(ic.Config(dataset="digits", model=name, **settings))
    assert report.results["test_accuracy"] > 0.7


@pytest.mark.parametrize("recipe", slow_unless(QUICK_RECIPES, QUICK_RECIPES + SLOW_RECIPES))
def test_every_recipe_runs(inside, folder, recipe):
    options = [*DIGITS, "--subset", "64", "--batch-size", "8", "--fast-dev-run"]
    if recipe == "accuracy94":
        options += ["--width", "0.25"]
    inside("--recipe", recipe, *options)
    model = RECIPES[recipe].get("model", "cnn")
    (path,) = only_run(folder).glob("model_*.pth")
    assert path.name == f"model_{model}_digits.pth"
    content = torch.load(path, weights_only=True)
    set_by_recipe = {
        name: value for name, value in RECIPES[recipe].items() if name in ("optimizer", "scheduler")
    }
    assert content["config"].items() >= set_by_recipe.items()


def test_option_that_a_network_does_not_take(inside, folder):
    assert "--dropout" in inside.error(*DIGITS, "--model", "convnet", "--dropout", "0.1", status=2)
    assert not (folder / "runs").exists()


def test_network_of_one_image_size_and_progressive_resizing(inside, folder):
    options = ["--model", "notebook-cnn", "--progressive-resizing", "0.5"]
    error = inside.error(*DIGITS, *options)
    assert "--progressive-resizing" in error and "16" in error
    assert not (folder / "runs").exists()


def test_images_that_are_too_small_for_a_network(inside, folder):
    error = inside.error(*DIGITS, "--model", "torchvision:squeezenet1_1", "--image-size", "8")
    assert "--model torchvision:squeezenet1_1" in error and "--image-size" in error
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_model_that_no_meta_device_can_build_is_loaded(inside, folder):
    options = ["--model", "torchvision:regnet_x_400mf", "--fast-dev-run", "--batch-size", "8"]
    inside(*DIGITS, *options)
    path = only_run(folder) / "model_torchvision-regnet_x_400mf_digits.pth"
    network, content = ic.load_checkpoint(path)
    assert same(network.state_dict(), content["model"])


# ---- weights from elsewhere ----


@pytest.mark.slow
@pytest.mark.parametrize("source", ["downloaded", "given"])
def test_pretrained_network_of_which_only_the_last_layer_is_trained(
    inside, folder, imagenet, source
):
    path = imagenet
    options = [*SQUEEZENET, "--freeze"]
    if source == "given":
        path = imagenet.rename(folder / "given.pth")
        options += ["--init-from", "given.pth"]
    inside(*DIGITS, "--fast-dev-run", "--batch-size", "20", *options)

    before = torch.load(path, weights_only=True)
    (saved,) = only_run(folder).glob("model_*.pth")
    model, content = ic.load_checkpoint(saved)
    changed = {
        name
        for name, weight in before.items()
        if not torch.equal(content["model"][f"body.{name}"], weight)
    }
    assert changed == {"classifier.1.weight", "classifier.1.bias"}
    assert content["mean"] == [0.485, 0.456, 0.406]  # of ImageNet, not of the digits
    sizes = []
    model.body.features.register_forward_pre_hook(
        lambda layer, inputs: sizes.append(inputs[0].shape[-1])
    )
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert sizes == [224]


def test_pretrained_weights_that_are_not_available(inside, folder, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(folder))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr("urllib.request._opener", None)  # it would remember its first proxies
    error = inside.error(*DIGITS, *SQUEEZENET)
    assert "squeezenet1_1-" in error and "--init-from" in error
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("content", [b"no weights", {"weight": torch.zeros(3)}])
def test_file_without_weights_for_a_pretrained_network(inside, folder, content):
    if isinstance(content, bytes):
        (folder / "bad.pth").write_bytes(content)
    else:
        torch.save(content, folder / "bad.pth")
    assert "bad.pth" in inside.error(*DIGITS, *SQUEEZENET, "--init-from", "bad.pth")
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_model_is_tuned_to_other_classes(inside, folder):
    inside(*QUICK, "--epochs", "1", "--out", "ten.pth")
    content = torch.load(folder / "ten.pth", weights_only=True)
    content["classes"] = [*"abcdefg"]
    content["model"]["classifier.weight"] = content["model"]["classifier.weight"][:7]
    ic.save_checkpoint(folder / "seven.pth", content)

    options = ["--epochs", "1", "--init-from", "seven.pth", "--freeze", "--out", "tuned.pth"]
    out, _ = inside(*QUICK, *options)
    assert "seven.pth is for other classes" in out
    tuned = ic.load_checkpoint("tuned.pth")[1]["model"]
    changed = {
        name for name, weight in content["model"].items() if not torch.equal(tuned[name], weight)
    }
    assert changed == {"classifier.weight"}  # not even batch norm's statistics
    assert tuned["classifier.weight"].shape[0] == 10


# ---- a user's network ----


def test_custom_network_from_training_to_its_file(inside, folder):
    (folder / "mine.py").write_text(CUSTOM_NETWORK)
    inside(*SMALL, "--epochs", "1", "--model", "mine.py:network", "--batch-size", "25")
    (path,) = folder.glob("model_*.pth")
    with pytest.raises(UserError, match=r"--model mine\.py:network"):
        ic.load_checkpoint(path)
    model, _ = ic.load_checkpoint(path, model="mine.py:network")
    assert model(torch.zeros(3, 3, 16, 16)).shape == (3, 10)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("network = None", "network"),
        ("def network(**options): raise SystemExit(3)", "mine.py"),
        ("def network(**options): return 3", "mine.py:network"),
    ],
)
def test_custom_network_that_fails_is_one_line(inside, folder, line, named):
    (folder / "mine.py").write_text(line)
    assert named in inside.error(*DIGITS, "--model", "mine.py:network")
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_network_that_refuses_weights_without_versions_is_trained_and_resumed(inside, folder):
    """torchvision's MNASNet looks at the version that PyTorch keeps beside the names of weights."""
    model = ["--model", "torchvision:mnasnet0_5", "--image-size", "16", "--lr", "0.0001"]
    inside(*SMALL, *model, "--epochs", "1", "--ema", "--run-dir", "run")
    inside("--resume", "run", "--epochs", "2")
    (path,) = folder.glob("model_*.pth")
    network, content = ic.load_checkpoint(path)
    assert same(network.state_dict(), content["model"])
    inside(*SMALL, *model, "--epochs", "1", "--init-from", path)
