"""What the program takes when asked for by name: networks, augmentations, recipes and the rest of alternatives/."""

import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK, SMALL, only_run, report_of, same, state_of, trainer_of, weights
from PIL import Image
from torch import nn

import image_classification as ic
from alternatives import augmentations, networks, recipes, sampling

STATED = {  # by the references' READMEs, or by the issue that they are rebuilt from
    "coursework": {"model": "coursework-cnn", "epochs": 10},
    "resnet-augmented": {
        "model": "resnet18", "optimizer": "adam", "scheduler": "plateau",
        "augment": "flip,rotate=20,brightness=0.2,contrast=0.2,saturation=0.2,sharpness,erase=0.75",
    },
    "beginner": {"model": "beginner-cnn", "epochs": 10, "batch_size": 32, "optimizer": "adam", "lr": 0.001,
                 "augment": "flip,crop=4"},
    "resnet-dropout": {"model": "resnet18-dropout", "epochs": 25},
    "notebook": {"model": "notebook-cnn", "batch_size": 20, "val_fraction": 0.2, "optimizer": "sgd", "lr": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("recipe", STATED)
def test_recipe_is_what_its_reference_states(recipe):
    config = ic.asdict(ic.configure(recipe=recipe))
    assert config.items() >= (STATED[recipe] | {"precision": "fp32", "label_smoothing": 0.0}).items()
    if recipe == "resnet-augmented":
        assert config["grad_clip"] > 0 and config["weight_decay"] > 0


def test_recipe_with_another_network_leaves_out_what_was_for_its_own():
    assert ic.configure(recipe="beginner", model="resnet18").dropout is None
    assert ic.configure(recipe="beginner", model="beginner-cnn").dropout == 0.1
    assert ic.configure(recipe="beginner", model="fcn", dropout=0.2).dropout == 0.2


SMALL_ONES = ["beginner-cnn", "coursework-cnn", "notebook-cnn", "fcn", "convnet", "fftnet"]


@pytest.mark.parametrize("name", [*SMALL_ONES, "torchvision:resnet18"])
def test_network_learns_with_its_own_settings(name, folder):
    report = ic.train(ic.Config(dataset="digits", model=name, epochs=3, batch_size=50, image_size=16))
    assert report.results["test_accuracy"] > 0.8


def test_sizes_of_the_networks_that_have_no_table():
    sizes = {"beginner-cnn": 545_290, "coursework-cnn": 685_962, "notebook-cnn": 1_059_306}
    assert {n: sum(weight.numel() for weight in networks.factory(n)().parameters()) for n in sizes} == sizes
    kinds = [type(layer) for layer in networks.fcn().modules()]
    assert torch.nn.Conv2d not in kinds and torch.nn.Linear in kinds


def test_table_counts_every_weight(capsys):
    for name in networks.SETTINGS:
        network = networks.factory(name)()
        ic.print_summary(network, (3, 32, 32))
        total = re.search(r"Total params: ([\d,]+)", capsys.readouterr().out).group(1)
        assert int(total.replace(",", "")) == sum(weight.numel() for weight in network.parameters()), name


def test_coursework_network_has_the_footer_of_the_reference(capsys):
    """Input 0.01, forward/backward 1.54, parameters 2.62, in all 4.17 MB: the table in the coursework's README."""
    ic.print_summary(networks.coursework_cnn(), (3, 32, 32))
    numbers = re.findall(r"\(MB\): (\S+)", capsys.readouterr().out)
    assert numbers == ["0.01", "1.54", "2.62", "4.17"]


def test_resnet18_dropout_has_the_table_of_the_reference(capsys):
    """Row by row the torchsummary table in the README of reference 003."""
    ic.print_summary(networks.resnet18_dropout(), (3, 32, 32))
    row = re.compile(r" *(\w+-\d+) +(\[.*?\]) +([\d,]+)")
    theirs = row.findall(Path(__file__).with_name("reference_003.txt").read_text())
    assert len(theirs) == 69 and row.findall(capsys.readouterr().out) == theirs


@pytest.mark.parametrize("name", networks.SETTINGS)
def test_network_takes_other_classes_channels_and_sizes(name):
    network = networks.factory(name)(classes=7, channels=1, image_size=28)
    loss = F.cross_entropy(network(torch.rand(4, 1, 28, 28)), torch.arange(4))
    loss.backward()
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained)


@pytest.mark.parametrize("name", ["beginner-cnn", "coursework-cnn", "notebook-cnn", "fftnet", "convnet"])
def test_network_says_that_it_needs_larger_images(name):
    with pytest.raises(ValueError, match="needs images of .* pixels or more, not 3"):
        networks.factory(name)(classes=10, channels=3, image_size=3)


@pytest.mark.parametrize("given", [False, True], ids=["cached", "--init-from"])
def test_pretrained_network_with_only_its_head_trained(inside, folder, imagenet, given):
    path = imagenet.rename(folder / "given.pth") if given else imagenet
    more = ["--init-from", "given.pth"] if given else []
    options = ["--model", "torchvision:squeezenet1_1", "--pretrained", "--freeze", *more]
    out, _ = inside("--dataset", "digits", "--subset", "20", "--batch-size", "20", "--epochs", "2", *options)
    before = torch.load(path, weights_only=True)
    model, content = ic.load_checkpoint(folder / "model_torchvision-squeezenet1_1_digits.pth")
    changed = [name for name, value in before.items() if not torch.equal(content["model"][f"body.{name}"], value)]
    assert set(changed) == {"classifier.1.weight", "classifier.1.bias"}
    assert content["mean"] == [0.485, 0.456, 0.406]  # ImageNet's, not the digits'
    data = ic.load_data(ic.Config(dataset="digits", subset=20))
    config = ic.Config(dataset="digits", model="torchvision:squeezenet1_1", pretrained=True, init_from=str(path))
    seen_in_training = ic.build_model(config, data).get_buffer("pixel_mean").flatten() / 255
    assert seen_in_training.tolist() == pytest.approx(content["mean"])
    seen = []
    model.body.features.register_forward_pre_hook(lambda layer, given: seen.append(given[0].shape[-1]))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10) and seen == [224]


def test_pretrained_weights_that_cannot_be_had(inside, folder, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(folder))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr("urllib.request._opener", None)  # it would remember the proxies of its first use
    error = inside.error("--dataset", "digits", "--model", "torchvision:squeezenet1_1", "--pretrained")
    assert "ImageNet weights could not be downloaded" in error and "squeezenet1_1-" in error and "--init-from" in error
    assert not (folder / "runs").exists()


def test_damaged_file_of_weights_is_named(inside, folder):
    (folder / "bad.pth").write_bytes(b"no weights")
    options = ["--model", "torchvision:squeezenet1_1", "--pretrained", "--init-from"]
    assert "bad.pth is damaged or no file of weights" in inside.error("--dataset", "digits", *options, "bad.pth")
    torch.save({"weight": torch.zeros(3)}, folder / "other.pth")
    assert "other.pth holds another network" in inside.error("--dataset", "digits", *options, "other.pth")


def test_tuned_network_goes_on_with_its_head(folder, imagenet, capsys):
    data = ic.load_data(ic.Config(dataset="digits", subset=20))
    config = ic.Config(dataset="digits", model="torchvision:squeezenet1_1", pretrained=True)
    model = ic.build_model(config, data)
    content = {"config": {}, "mean": [], "std": [], "image_size": 32, "classes": data.classes}
    ic.save_checkpoint("own.pth", content | {"model": model.state_dict()})
    again = ic.build_model(ic.replace(config, init_from="own.pth", seed=1), data)
    assert same(again.state_dict(), model.state_dict()) and "starts anew" not in capsys.readouterr().out
    ic.save_checkpoint("own.pth", content | {"classes": [*"abcdefghij"], "model": model.state_dict()})
    other = ic.build_model(ic.replace(config, init_from="own.pth", seed=1), data).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(other[name], value)}
    assert changed == {"body.classifier.1.weight"}  # its bias begins at 0 in both
    assert "own.pth is for other classes: the last layer starts anew" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", [name for name in recipes.RECIPES if name != "finetune"])
def test_every_recipe_runs(inside, folder, recipe):
    out, _ = inside("--recipe", recipe, "--dataset", "digits", "--subset", "64", "--batch-size", "8", "--fast-dev-run")
    assert "Done in" in out and (recipe not in STATED or "float32" in out)
    assert (only_run(folder) / f"model_{recipes.RECIPES[recipe]['model']}_digits.pth").exists()


def test_small_images_are_not_made_smaller(inside, monkeypatch):
    monkeypatch.setitem(ic.FOR_DATASET["digits"], "low_res", 0.7)
    assert "70 % of the run on smaller images" in inside(*QUICK)[0]
    config = ic.Config(dataset="digits", image_size=16)
    assert ic.settle(config, ic.load_data(config)).low_res == 0


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "efficientnet_b0", "googlenet", "vit_b_16"])
def test_torchvision_networks(name):
    size = 224 if name == "googlenet" else 32
    network = networks.factory(f"torchvision:{name}")(classes=7, image_size=size)
    assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_short_runs_are_enough_for_torchvisions_batch_norm():
    for name in ("mobilenet_v3_small", "mnasnet0_5"):  # 0.01 and 0.0003 there
        norms = [each for each in networks.torchvision_model(name, 7, 32).modules() if isinstance(each, nn.BatchNorm2d)]
        assert norms and all(each.momentum == 0.1 for each in norms)


def test_size_that_a_torchvision_network_needs_is_named(inside):
    error = inside.error("--dataset", "digits", "--model", "torchvision:squeezenet1_1", "--image-size", "8")
    assert error.endswith("(it is made for images of 224 pixels: try a larger --image-size)")


def test_model_that_no_meta_device_can_build_is_loaded(inside, folder):
    inside("--dataset", "digits", "--model", "torchvision:regnet_x_400mf", "--fast-dev-run")
    network, content = ic.load_checkpoint(only_run(folder) / "model_torchvision-regnet_x_400mf_digits.pth")
    assert same(network.state_dict(), content["model"])


def test_own_model_is_tuned_to_other_classes(inside, folder):
    inside(*QUICK, "--out", "ten.pth")
    content = torch.load(folder / "ten.pth", weights_only=True)
    config = ic.Config(dataset="digits", width=0.25, init_from="ten.pth")
    assert same(ic.build_model(config, ic.load_data(config)).state_dict(), content["model"])
    content["classes"] = [*"abcdefg"]
    content["model"]["classifier.weight"] = content["model"]["classifier.weight"][:7]
    ic.save_checkpoint(folder / "seven.pth", content)
    out, _ = inside(*QUICK, "--init-from", "seven.pth", "--freeze", "--out", "tuned.pth")
    assert "seven.pth is for other classes: the last layer starts anew" in out
    tuned = ic.load_checkpoint("tuned.pth")[1]["model"]
    changed = {name for name, value in content["model"].items() if not torch.equal(tuned[name], value)}
    assert changed == {"classifier.weight"} and tuned["classifier.weight"].shape[0] == 10


@pytest.mark.parametrize("name", augmentations.STRENGTHS)
def test_each_image_gets_its_own_draw(name):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    images = torch.cat([image, image, 255 - image, 255 - image] * 16)
    changed, _ = augmentations.build({name: ""}, 10)(images, torch.arange(64) % 10)
    assert changed.shape == images.shape and changed.min() >= 0 and changed.max() <= 255.01
    kinds = len({tuple(one.flatten().tolist()) for one in changed[::4]})
    assert kinds > 5  # of 16 equal ones
    still = (changed[::4] == image).flatten(1).all(1).float().mean()
    assert still < 0.9 and (name not in ("sharpness", "erase") or still > 0)


def test_strength_of_an_augmentation_counts():
    grey = torch.full((50, 3, 8, 8), 100, dtype=torch.uint8)
    spread = [augmentations.build({"brightness": f}, 2)(grey, torch.zeros(50))[0].std() for f in ("0.1", "0.4")]
    assert spread[1] > 2 * spread[0] > 0


def test_steps_of_colour_change_what_their_names_say():
    torch.manual_seed(0)
    grey, red = (torch.tensor(each).view(1, 3, 1, 1).expand(50, 3, 8, 8).byte() for each in ([120] * 3, [200, 99, 99]))
    both = grey.clone()
    both[..., :4] = 60

    def after(name, images):
        return augmentations.build({name: "0.4"}, 2)(images, torch.zeros(50))[0]

    def spread(values):
        return values.std(0).max()

    assert spread(after("brightness", grey)) > 15
    assert spread(after("contrast", grey)) < 1 and spread(after("contrast", both).diff(dim=3)[..., 3]) > 5
    assert spread(after("saturation", grey)) < 1 and spread(after("hue", grey)) < 1
    less = after("saturation", red)
    assert spread(less.amin(1)) > 5 and torch.allclose(less[:, 1], less[:, 2], atol=1)  # still red
    turned = after("hue", red)
    assert spread(turned.amin(1)) < 1 and spread(turned.median(1).values) > 15 and spread(turned.amax(1)) < 1


@pytest.mark.parametrize("most", [20, 60])
def test_images_are_turned_by_up_to_so_many_degrees(most):
    torch.manual_seed(0)
    images = torch.zeros(200, 3, 33, 33, dtype=torch.uint8)
    images[:, :, 14:19, 24:29] = 255  # right of the middle
    turned = augmentations.build({"rotate": str(most)}, 2)(images, torch.zeros(200))[0].mean(1)
    shares, places = turned / turned.sum((1, 2), keepdim=True), torch.arange(33.0) - 16
    angles = torch.atan2((shares.sum(2) * places).sum(1), (shares.sum(1) * places).sum(1)).rad2deg()
    assert -most - 1 < angles.min() < -0.9 * most and 0.9 * most < angles.max() < most + 1


def test_pieces_are_greyed_as_often_and_as_widely_as_asked():
    torch.manual_seed(0)
    white = torch.full((300, 3, 32, 32), 255, dtype=torch.uint8)
    grey = [augmentations.build(step, 2)(white, torch.zeros(300))[0][:, 0] < 200 for step in (
        {"erase": "0.3"}, {"cutout": "0.5"}, {"cutout": "0.25"})]  # fmt: skip
    assert grey[0].any((1, 2)).float().mean() == pytest.approx(0.3, abs=0.1)
    areas = [each.float().mean((1, 2)) for each in grey]
    assert 0.01 < areas[0][areas[0] > 0].min() < 0.1 < 0.2 < areas[0].max() < 0.36
    assert areas[1].max() == pytest.approx(0.25, abs=0.02) and areas[2].max() == pytest.approx(0.0625, abs=0.01)


def test_sharpness_varies_both_ways():
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(1, 3, 6, 6), 32, mode="bicubic").clamp(0.2, 0.8).expand(64, -1, -1, -1) * 255
    changed, _ = augmentations.build({"sharpness": ""}, 2)(images.byte(), torch.zeros(64))
    edges, plain = (each.diff(dim=3).abs().mean((1, 2, 3)) for each in (changed, images.byte().float()))
    assert (edges > 1.01 * plain).sum() > 5 and (edges < 0.99 * plain).sum() > 5


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_labels_are_the_shares_of_the_images(name):
    labels = torch.arange(10).repeat(20)
    images = (20 * labels).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).byte()  # so bright as their label says
    mixed, shares = augmentations.build({name: ""}, 10)(images, labels)
    assert torch.allclose(mixed.mean((1, 2, 3)) / 20, shares @ torch.arange(10.0), atol=1e-3)
    assert 0.05 < 1 - shares.max(1).values.mean() < 0.4


def test_run_with_augmentations_learns_and_shows_them(inside, folder):
    steps = "crop=2,rotate=10,brightness,contrast,erase=0.3,mixup,cutmix"
    options = ["--dataset", "digits", "--width", "0.5", "--epochs", "6", "--batch-size", "50", "--image-size", "16"]
    inside(*options, "--augment", steps)
    assert report_of(only_run(folder))["test_accuracy"] > 0.85
    rows = Image.open(only_run(folder) / "samples.png").height
    inside(*options, "--fast-dev-run", "--run-dir", "plain")
    plain = Image.open(folder / "plain" / "samples.png").height  # images, crop, augmented
    assert rows == pytest.approx((3 + len(steps.split(",")) - 1) / 3 * plain, rel=0.05), (rows, plain)


def test_augmented_run_resumes_bit_for_bit(inside, folder):
    options = [*QUICK, "--subset", "200", "--augment", "crop,rotate,mixup", "--ema", "--class-balance", "oversample"]
    options += ["--scheduler", "none", "--low-res", "0", "--device", "cpu"]  # which would depend on the epochs to come
    inside(*options, "--epochs", "3", "--run-dir", "whole")
    inside(*options, "--epochs", "1", "--run-dir", "parts")
    inside("--resume", "parts", "--epochs", "3")
    whole, parts = (state_of(folder / name) for name in ("whole", "parts"))
    assert same(parts["model"], whole["model"]) and same(parts["average"], whole["average"])


def test_missing_kornia_is_named(inside, monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.delitem(sys.modules, "alternatives.augmentations")
    error = inside.error(*QUICK, "--augment", "rotate")
    assert "kornia" in error and "pip install -r requirements-extras.txt" in error


@pytest.mark.parametrize("how", ["oversample", "undersample"])
def test_each_epoch_takes_other_images(how):
    labels = torch.tensor([0] * 500 + [1] * 20)
    drawn = [sampling.balanced(labels, how, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert not torch.equal(*drawn)


def test_an_image_drawn_twice_is_mirrored_alike():
    drawn = torch.tensor([3, 3, 3, 7, 7, 9])
    plans = [ic.plan_epoch(10, 0, epoch, "flip", torch.device("cpu"), drawn) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == drawn.tolist() for order, *_ in plans)
    views = [set(zip(order.tolist(), flips.tolist(), strict=True)) for order, flips, *_ in plans]
    assert len(views[0]) == len(views[1]) == 3 and not views[0] & views[1]


@pytest.mark.parametrize("how", ["oversample", "undersample"])
def test_run_with_balanced_epochs(inside, folder, how):
    data = ["--dataset", "digits", "--make-imbalanced", "0.1", "--width", "0.25", "--batch-size", "10"]
    out, _ = inside(*data, "--class-balance", how, "--epochs", "2")
    configs = [ic.Config(dataset="digits", make_imbalanced=share) for share in (0.0, 0.1)]
    whole, counts = (ic.load_data(config).train.labels.bincount().tolist() for config in configs)
    assert counts == pytest.approx([count * 0.1 ** (label / 9) for label, count in enumerate(whole)], abs=1)
    epoch = 10 * (max(counts) if how == "oversample" else min(counts))
    assert f"{-(-epoch // 10)} steps an epoch" in out
    assert report_of(only_run(folder))["train_images"] == sum(counts)


def test_average_is_a_plain_mean_at_first_and_then_forgets():
    trainer = trainer_of(width=0.25, ema=True, batch_size=324)  # 4 steps an epoch
    seen = []
    for value in range(1, 8):
        trainer.model.classifier.weight.data.fill_(value)
        trainer.average.update_parameters(trainer.model)
        seen.append(trainer.tested().classifier.weight[0, 0].item())
    assert seen[:4] == pytest.approx([1, 1.5, 2, 2.5])
    assert seen[4] == pytest.approx(2.5 + 2.5 / 4) and seen[6] < 5


def test_average_of_the_weights_is_tested_and_kept(inside, folder):
    inside(*QUICK, "--ema", "--epochs", "1", "--scheduler", "none", "--batch-size", "40")
    last = state_of(only_run(folder))
    kept = weights(folder / "model_cnn_digits.pth")
    assert not torch.equal(last["model"]["classifier.weight"], kept["classifier.weight"])
    assert torch.equal(last["average"]["module.classifier.weight"], kept["classifier.weight"])
    valid = ic.load_data(ic.Config(dataset="digits")).valid
    model, _ = ic.load_checkpoint(folder / "model_cnn_digits.pth")
    with torch.autocast("cpu", enabled="bfloat16" in last["environment"]["precision"]):
        loss = ic.evaluate(model, *valid).loss
    assert loss == pytest.approx(last["history"][0]["valid_loss"], rel=0.02)


def test_dropout_and_depth_reach_the_network():
    data = ic.load_data(ic.Config(dataset="digits"))
    dropping = ic.build_model(ic.Config(dropout=0.4), data)
    images = torch.randn(8, 3, 32, 32)
    assert not torch.equal(dropping(images), dropping(images))
    dropping.eval()
    assert torch.equal(dropping(images), dropping(images))
    without = ic.build_model(ic.Config(model="resnet18-dropout", dropout=0.0), data)
    assert {layer.p for layer in without.modules() if isinstance(layer, torch.nn.Dropout)} == {0.0}
    for depth in (1, 4):
        layers = ic.build_model(ic.Config(model="convnet", depth=depth), data).modules()
        assert sum(isinstance(layer, torch.nn.Conv2d) for layer in layers) == 3 * depth


def test_every_network_has_settings_of_its_own():
    for name, settings in networks.SETTINGS.items():
        assert {"optimizer", "lr", "epochs"} <= settings.keys(), name


@pytest.mark.parametrize("name", networks.RESNETS)
def test_resnets_have_the_stem_for_small_images(name):
    network = networks.factory(name)()
    seen = []
    network.avgpool.register_forward_pre_hook(lambda layer, given: seen.append(given[0].shape[-1]))
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, 32, 32))
    in_a_row = [label for label, weight in network.named_parameters() if weight.ndim == 4 and "downsample" not in label]
    assert seen == [4] and network.conv1.stride == (1, 1)
    assert len(in_a_row) + 1 == int(name.removeprefix("resnet"))  # and the classifier


def test_fftnet_filters_spectra_in_fp32_under_autocast():
    layer = networks.GlobalFilter(4, 8)
    with torch.no_grad():
        layer.weight.zero_()
        layer.mix[-1].bias.zero_()
        x, impulse = torch.randn(2, 4, 8, 8), torch.zeros(4, 8, 10)
        impulse[:, :, ::2] = 1  # the spectrum of a single point: a convolution that changes nothing
        seen = []
        layer.mix.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        with torch.autocast("cpu", torch.bfloat16):
            layer.eval()(x)
            layer.weight.copy_(impulse)
            layer(x)
    assert seen[0].abs().max() == 0 and torch.allclose(seen[1], x / (1 + 1e-5) ** 0.5, atol=1e-5)
    assert seen[1].dtype == torch.float32


def test_own_network_imports_what_is_beside_it(folder, monkeypatch):
    (folder / "blocks.py").write_text("WIDTH = 8")
    (folder / "mine.py").write_text("""
import torch
def network(classes=10, channels=3, image_size=32):
    from blocks import WIDTH
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, WIDTH), torch.nn.Linear(WIDTH, classes))""")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert networks.factory(f"{folder / 'mine.py'}:network")()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_own_network_may_take_only_whole_batches(inside, folder):
    (folder / "mine.py").write_text("""from torch import nn
class network(nn.Sequential):
    def __init__(self, **given): super().__init__(nn.Flatten(), nn.Linear(3072, 10))
    def forward(self, x):
        return super().forward(x.view(-1, 5, 3, 32, 32).flatten(0, 1) if self.training else x)
""")
    inside(*SMALL, "--model", "mine.py:network", "--batch-size", "25")


def test_network_of_one_image_size_and_low_res(inside, folder):
    error = inside.error("--dataset", "digits", "--model", "notebook-cnn", "--low-res", "0.5")
    assert "images of 32 pixels, which become 16 in the first --low-res of a run" in error
    assert not (folder / "runs").exists()


def test_torch_and_torchvision_that_do_not_fit(inside, monkeypatch):
    misfit = RuntimeError("operator torchvision::nms does not exist")
    monkeypatch.setattr(networks, "torchvision_model", Mock(side_effect=misfit))
    assert "pip install --force-reinstall" in inside.error("--dataset", "digits", "--model", "torchvision:resnet18")
