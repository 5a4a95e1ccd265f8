"""benchmarks/: the variants change what they name, and the figures are read and summed up right.

same_as.py as a whole needs another checkout, and is not tested here.
"""

import json
import os
import random
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ablations
import beside
import duplicates
import finetune
import fit
import gpu_parts
import gpu_runs
import gpu_session
import growth
import harness
import imbalance
import large
import learning_ideas
import numpy as np
import pytest
import records
import same_as
import scaling
import startup
import survival
import time_to_accuracy
import torch
import torch.nn.functional as F
import utilisation
from conftest import QUICK, REPOSITORY, rows_of, same, trainer_of

import image_classification as ic
from classifier.datasets import folder as folder_module
from classifier.progress import COLUMNS
from classifier.sampling import imbalanced_indices

# Snippets that take time or memory only, or act between epochs: their steps learn the same.
SAME_STEPS = {
    "images prepared one by one",
    "colours one after the other in memory",
    "memory given back to the system",
    "validation after the last epoch only",
    "one thread",
    "Newton-Schulz in fp32",  # the tests compute in fp32
    "first stage fixed in the last 30 %",  # the test stops before
}
SNIPPETS = {name: each.snippet for name, each in ablations.VARIANTS.items() if each.snippet}
IDEAS = {name: each.snippet for name, each in learning_ideas.VARIANTS.items() if each.snippet}
DIGITS = "default --dataset digits --width 0.25 --image-size 16"


@pytest.fixture
def apply_snippet():
    """A function that executes a snippet in this process, until the end of the test.

    Fails if the snippet changed a name of the script otherwise than by `replace`, for later tests
    would go on with the change.
    """
    before = dict(vars(ic))
    with pytest.MonkeyPatch.context() as patch:

        def apply(snippet):
            names = {"ic": ic, "torch": torch, "F": F, "replace": patch.setattr}
            exec(snippet, names)

        yield apply
    changed = [name for name, value in vars(ic).items() if before.get(name) is not value]
    assert not changed


def train_two_steps():
    """The weights and buffers after two steps of the default recipe on some digits, in fp32."""
    settings = {"width": 0.25, "batch_size": 20, "augment": "flip,crop=2"}
    trainer = trainer_of(precision="fp32", progressive_resizing=0.0, **settings)
    trainer.state.progress.total_steps = 10
    plan = trainer.plan(0)
    for batch_slice in trainer.batch_slices[:2]:
        trainer.train_step(plan.take(batch_slice))
    return trainer.state.model.state_dict()


@pytest.fixture(scope="module")
def base_weights():
    return train_two_steps()


# ---- What variants change ----


def test_text_of_every_variant_is_a_program():
    snippets = [*SNIPPETS.values(), *IDEAS.values(), scaling.SILENT, gpu_parts.LITTLE_MEMORY]
    snippets.append(imbalance.LOAD_IMBALANCED.format(share=0.05))
    classes = {"first": 5, "end": 10, "count": 50, "on_test_images": False}
    snippets.append(finetune.LOAD_CLASSES.format(**classes))
    snippets.append(finetune.NOT_ENLARGED.format(size=96))
    snippets.append(large.MAX_BYTES.format(max_bytes=0))
    snippets.append(survival.SAVE_EVERY.format(seconds=0.0))
    for snippet in snippets:
        text = harness.variant_program(snippet)
        compile(text, snippet, "exec")
        assert "{" not in snippet
        assert text.startswith(harness.BEFORE_SNIPPET)
        assert text.endswith(harness.AFTER_SNIPPET)


@pytest.mark.parametrize("benchmark", [ablations, learning_ideas])
def test_options_of_every_variant_exist(benchmark):
    variants = benchmark.VARIANTS
    parser = ic.cli.build_parser("", ic.DEFAULT_RECIPE, "")
    for name, variant in variants.items():
        given = ic.cli.parse_settings(parser, variant.options.split())
        ic.configure(**given)
        assert variant.options or variant.snippet or variant.environment or name == ablations.BASE
    assert variants[ablations.BASE] == ablations.Variant()


def test_names_of_variants_stay_those_of_the_result_files():
    for name in ("ablations.json", "ablations_more.json"):
        results = json.loads((harness.RESULTS / name).read_text())
        gone = {each["variant"] for each in results} - ablations.VARIANTS.keys()
        assert gone <= {"mean over what remains", "the easiest fifth of the images left out"}


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_changes_what_is_learned(name, apply_snippet, base_weights):
    if name == "one thread":
        pytest.skip("the tests have one thread anyway")
    apply_snippet(SNIPPETS[name])
    weights = train_two_steps()
    if name in SAME_STEPS:
        for key in base_weights:
            torch.testing.assert_close(weights[key], base_weights[key], rtol=0.02, atol=1e-3)
    else:
        assert not same(weights, base_weights)


def train_eleven_steps():
    """The weights after a whole run, of eleven steps on digits that become larger."""
    trainer = trainer_of(precision="fp32", progressive_resizing=0.7, width=0.25, batch_size=20)
    trainer.state.progress.total_steps = 11
    plan = trainer.plan(0)
    for batch_slice in trainer.batch_slices[:11]:
        trainer.train_step(plan.take(batch_slice))
    assert trainer.state.progress.done
    return trainer.state.model.state_dict()


@pytest.fixture(scope="module")
def weights_without_ideas():
    return train_eleven_steps()


# These choose images before the first step, or from the third epoch on: they have their own tests.
BEFORE_TRAINING = "a narrow network leaves out the easiest fifth"
CHOSEN_ONCE = "the easiest third left out, chosen once"
CHOOSING = {BEFORE_TRAINING, CHOSEN_ONCE}

# The later an image comes in the data set, the larger its loss.
LATER_IS_HARDER = """
def evaluate(model, images, labels, **options):
    classes = model.classifier.out_features
    logits = F.one_hot(labels, classes) * -torch.arange(float(len(labels)))[:, None]
    return ic.Evaluation(0.0, 0.0, logits)

replace(ic, "evaluate", evaluate)
"""


@pytest.mark.parametrize("name", sorted(IDEAS.keys() - CHOOSING))
def test_idea_changes_what_is_learned(name, apply_snippet, weights_without_ideas):
    apply_snippet(IDEAS[name])
    changed = train_eleven_steps()
    assert all(value.isfinite().all() for value in changed.values())
    assert not same(changed, weights_without_ideas)


def test_a_narrow_network_leaves_out_the_easiest_images(apply_snippet):
    trainer = trainer_of(precision="fp32", width=0.25, batch_size=20)
    num_images = len(trainer.train_set.labels)
    apply_snippet(LATER_IS_HARDER)
    apply_snippet('replace(ic, "train_epochs", lambda trainer, *arguments: trainer)')
    apply_snippet(IDEAS[BEFORE_TRAINING])
    trainer = ic.train_epochs(trainer, None)
    hardest = range(num_images - round(0.8 * num_images), num_images)
    assert sorted(trainer.plan(0).order.tolist()) == list(hardest)
    assert trainer.batch_slices[-1].stop == len(hardest)
    assert trainer.config.width == 0.25


def test_the_easiest_images_are_left_out_once(apply_snippet):
    trainer = trainer_of(precision="fp32", width=0.25, batch_size=20)
    num_images = len(trainer.train_set.labels)
    apply_snippet(LATER_IS_HARDER)
    apply_snippet(IDEAS[CHOSEN_ONCE])
    assert len(trainer.plan(1).order.unique()) == num_images
    order = trainer.plan(2).order
    assert len(order) == num_images
    assert sorted(order.unique().tolist()) == list(
        range(num_images - round(0.65 * num_images), num_images)
    )


def test_soap_moves_weights_as_far_as_muon_does(apply_snippet):
    weight = torch.nn.Parameter(torch.randn(4, 12))
    weight.grad = torch.randn(4, 12)
    before = weight.detach() * (2 / weight.detach().norm())
    apply_snippet(learning_ideas.SOAP)
    ic.Muon([weight], lr=0.1, momentum=0.6, dtype=torch.float32).step()
    assert (weight.detach() - before).norm().item() == pytest.approx(0.1 * 4**0.5, rel=1e-3)


def test_mean_of_the_last_weights(apply_snippet, monkeypatch):
    trainer = trainer_of(precision="fp32", width=0.25, batch_size=20)
    trainer.state.progress.total_steps = 4
    weight = trainer.state.model.classifier.weight.data.zero_()
    monkeypatch.setattr(ic.Trainer, "compute_step", lambda *arguments: weight.add_(1))
    apply_snippet(learning_ideas.LAST_WEIGHTS.format(steps=2, floor=0))
    plan = trainer.plan(0)
    for batch_slice in trainer.batch_slices[:4]:
        trainer.train_step(plan.take(batch_slice))
    assert torch.all(weight == 3.5)


@pytest.mark.parametrize("name", ["no_such_name", "set_whitenings"])
def test_snippet_that_replaces_nothing_fails(name, apply_snippet):
    with pytest.raises(AttributeError, match=name):
        apply_snippet(f'replace(ic, "{name}", None)')


@pytest.mark.slow
def test_program_whose_snippet_replaces_nothing_fails(folder):
    snippet = 'replace(ic.Stage, "no_such_name", None)'
    with pytest.raises(SystemExit, match="no_such_name"):
        harness.run(f"{DIGITS} --fast-dev-run", 0, "data", snippet)


def test_first_layers_of_variants(apply_snippet):
    apply_snippet(ablations.TRAIN_FIRST_LAYER)
    assert trainer_of().state.model.whiten.weight.requires_grad


@pytest.mark.parametrize(("stride", "padding", "size"), [(1, 0, 30), (2, 1, 16)])
def test_first_layer_of_3x3_pixels(stride, padding, size, apply_snippet):
    apply_snippet(ablations.FIRST_LAYER.format(stride=stride, padding=padding))
    layer = trainer_of(width=0.25).state.model.whiten
    outputs = layer(torch.randn(4, 3, 32, 32))
    assert outputs.shape == (4, 54, size, size)
    assert not layer.weight.requires_grad
    filters = layer.weight.flatten(1)
    assert torch.equal(filters[:27], -filters[27:])  # whitened


def test_newton_schulz_in_fp32(apply_snippet):
    model = trainer_of(width=0.25).state.model
    config = ic.Config(optimizer="muon", lr=0.1, momentum=0.6, weight_decay=0.0)
    arguments = (model, config, torch.bfloat16, torch.device("cpu"))
    assert ic.build_optimizers(*arguments)[0].dtype == torch.bfloat16
    apply_snippet(ablations.NEWTON_SCHULZ_FP32)
    assert ic.build_optimizers(*arguments)[0].dtype == torch.float32


def test_random_flips_differ_from_epoch_to_epoch(apply_snippet):
    augment = ic.parse_augment("flip,crop=2")
    arguments = (100, 3, 4, augment, torch.device("cpu"))
    alternating = ic.plan_epoch(*arguments)
    apply_snippet(ablations.RANDOM_FLIPS)
    plan = ic.plan_epoch(*arguments)
    assert torch.equal(plan.order, alternating.order)
    assert torch.equal(plan.shifts, alternating.shifts)
    assert 30 < plan.flips.sum() < 70
    assert torch.equal(plan.flips, ic.plan_epoch(*arguments).flips)
    next_plan = ic.plan_epoch(100, 3, 5, augment, torch.device("cpu"))
    flips, next_flips = plan.flips[plan.order.argsort()], next_plan.flips[next_plan.order.argsort()]
    assert 20 < (flips ^ next_flips).sum() < 80  # alternating: all 100
    without = ic.plan_epoch(100, 3, 4, ic.parse_augment("none"), torch.device("cpu"))
    assert not without.flips.any()


def test_images_of_variants(apply_snippet):
    trainer = trainer_of(augment="flip,crop=2")
    batch = trainer.plan(0).take(slice(7))
    images = trainer.train_set.images
    expected = ic.gather_augmented(images, batch)
    apply_snippet(ablations.ONE_BY_ONE)
    assert torch.equal(ic.gather_augmented(images, batch), expected)
    apply_snippet(ablations.NOT_GATHERED)
    assert torch.equal(ic.gather_augmented(images, batch), images[batch.order])


def test_first_stage_is_fixed_in_the_last_30_percent(apply_snippet):
    apply_snippet(ablations.FREEZE_FIRST_STAGE)
    trainer = trainer_of(width=0.25, batch_size=20)
    trainer.state.progress.total_steps = 10
    batch = trainer.plan(0).take(slice(20))
    for step in range(10):
        before = {name: w.clone() for name, w in trainer.state.model.named_parameters()}
        trainer.train_step(batch)
        after = dict(trainer.state.model.named_parameters())
        moved = not torch.equal(before["stages.0.conv1.weight"], after["stages.0.conv1.weight"])
        assert moved == (step < 7)
        assert not torch.equal(before["stages.1.conv1.weight"], after["stages.1.conv1.weight"])


def test_memory_format_and_threads_of_variants(apply_snippet):
    def is_channels_last():
        weight = trainer_of(width=0.25).state.model.stages[1].conv1.weight
        return weight.is_contiguous(memory_format=channels_last)

    channels_last = torch.channels_last
    assert is_channels_last()
    apply_snippet(SNIPPETS["colours one after the other in memory"])
    assert not is_channels_last()
    threads = torch.get_num_threads()
    apply_snippet(SNIPPETS["one thread"])
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)


def test_memory_is_given_back(apply_snippet, monkeypatch):
    calls = []
    monkeypatch.setattr(ic.devices, "keep_freed_memory", lambda: calls.append(1))
    apply_snippet(SNIPPETS["memory given back to the system"])
    ic.devices.keep_freed_memory()
    assert not calls


def test_validation_after_the_last_epoch_only(apply_snippet, inside, folder):
    apply_snippet(ablations.VALIDATE_ONCE)
    inside(*QUICK)
    (metrics_file,) = folder.glob("runs/*/*/metrics.csv")
    first, last = rows_of(metrics_file.parent)
    assert first["valid_loss"] == first["valid_accuracy"] == ""
    assert float(last["valid_loss"]) > 0
    assert (metrics_file.parent / "best.pth").exists()


def test_silent_processes_share_nothing(apply_snippet):
    apply_snippet(scaling.SILENT)
    group = ic.Group(rank=1, world_size=2)  # there is no process group: any message would fail
    model = torch.nn.Linear(1, 1)
    assert group.wrap(model, False) is model
    stats = torch.tensor([1.0, 2.0])
    assert group.all_reduce_and_poll(stats, stop=True, poll=True) is True
    assert group.all_reduce_and_poll(stats, stop=False, poll=True) is False
    assert stats.tolist() == [1.0, 2.0]


def test_reports_of_0_9_are_compared_in_todays_terms():
    def report(matrix, **more):
        names = ["cat", "dog", "frog"]
        zero = dict.fromkeys(names, 0.0)
        keys = ("precision", "recall", "f1", "class_accuracy")
        return {**dict.fromkeys(keys, zero), "confusion_matrix": matrix, **more}

    one = report([[1, 0, 1], [1, 0, 1], [0, 0, 0]], test_accuracy=0.25, test_loss=1.0)
    other = {**one, "test_accuracy": 0.5, "test_loss": 2.0}
    mean = {"test_accuracy": 0.375, "test_accuracy_std": 0.18, "test_accuracy_interval": [0, 1]}
    old = same_as.in_todays_terms({**other, **mean, "repeats": [one, other]})
    assert old["precision"] == {"cat": 0.0, "dog": None, "frog": None}
    assert old["recall"] == {"cat": 0.0, "dog": 0.0, "frog": None} == old["repeats"][0]["f1"]
    assert old["test_accuracy"] == 0.5 and old["test_accuracy_mean"] == 0.375
    assert old["test_accuracy_mean_interval"] == [0, 1] and "test_accuracy_interval" not in old
    assert same_as.in_todays_terms(old) == old


def test_imbalanced_data(apply_snippet):
    config = ic.Config(dataset="digits", val_fraction=0.0)
    data = ic.load_data(config)
    apply_snippet(imbalance.LOAD_IMBALANCED.format(share=0.1))
    fewer = ic.load_data(config)
    kept = imbalanced_indices(data.train.labels, 0.1)
    assert torch.equal(fewer.train.labels, data.train.labels[kept])
    assert torch.equal(fewer.train.images, data.train.images[kept])
    counts = torch.bincount(fewer.train.labels).tolist()
    assert counts[0] == (data.train.labels == 0).sum()
    assert counts[9] < counts[5] < counts[0]
    assert torch.equal(fewer.test.images, data.test.images)
    assert fewer.mean != data.mean and len(fewer.valid.labels) == 0
    assert (fewer.name, fewer.classes) == (data.name, data.classes)


def test_mean_over_classes_leaves_out_those_that_were_not_tested():
    assert imbalance.macro_mean({"cat": 0.5, "dog": None, "frog": 0.0}) == 0.25


@pytest.mark.parametrize(
    ("class_balance", "epochs"), [("none", 12), ("oversample", 4), ("undersample", 80)]
)
def test_each_class_balance_sees_as_many_images(class_balance, epochs):
    assert imbalance.num_epochs(class_balance, 0.05) == epochs


def test_constants_of_large_and_survival(apply_snippet):
    apply_snippet(large.MAX_BYTES.format(max_bytes=large.ALL_ON_DISK))
    assert folder_module.MAX_BYTES_IN_MEMORY == 0
    apply_snippet(survival.SAVE_EVERY.format(seconds=0.5))
    assert ic.runs.SAVE_EVERY == 0.5


# ---- Runs ----


@pytest.mark.slow
def test_run_tells_what_it_did(folder):
    result = harness.run(f"{DIGITS} --subset 100 --epochs 2", 3, "data")
    assert result["variant"].startswith("default") and result["seed"] == 3
    assert 0 < result["start_up"] < result["whole_run"]
    assert result["train_images"] == 100
    assert 0 <= result["test_accuracy"] <= 1 and len(result["recall"]) == 10
    assert result["test_views_accuracy"] is None
    first, last = result["epochs"]
    assert 0 < first["seconds"] < last["seconds"]
    assert last["train_loss"] > 0 and 0 <= last["valid_accuracy"] <= 1
    if os.name == "posix":
        assert 100 < result["peak_mib"] < 5000
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_ablation_with_a_snippet_and_options(cifar10):
    variant = ablations.Variant("--fast-dev-run", ablations.NOT_RESIDUAL, {"OMP_NUM_THREADS": "1"})
    result = ablations.train(variant, 0, str(cifar10), "--epochs 1 --width 0.5")
    assert result["options"] == "--epochs 1 --width 0.5" and result["seconds"] > 0
    assert 0 <= result["valid_accuracy"] <= 1
    assert result["hardware"].endswith(", 1 threads")


@pytest.mark.slow
def test_two_processes(folder):
    result = harness.run(f"{DIGITS} --fast-dev-run", 0, "data", scaling.SILENT, processes=2)
    assert result["whole_run"] > 0


def test_run_without_validation_images_has_no_validation_figures(folder):
    (folder / "metrics.csv").write_text(
        "epoch,train_loss,valid_loss,train_accuracy,valid_accuracy,learning_rate,seconds\n"
        "0,2.0,,0.5,,0.1,1.5\n"
        "1,1.0,0.9,0.5,0.75,0.1,2.5\n"
    )
    first, last = harness.read_epochs(folder / "metrics.csv")
    assert first["seconds"] == 1.5 and first["valid_accuracy"] != first["valid_accuracy"]
    expected = {"seconds": 4.0, "train_loss": 1.0, "valid_loss": 0.9, "valid_accuracy": 0.75}
    assert last == expected


def test_runs_alternate_and_are_written_one_by_one(folder, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", folder / "results")
    numbers_written = []

    def train(variant, seed):
        path = folder / "results" / "tried.json"
        numbers_written.append(len(json.loads(path.read_text())) if path.exists() else 0)
        return {"variant": variant, "seed": seed}

    results = harness.run_in_turns("tried", ["a", "b"], 2, train)
    assert [(each["variant"], each["seed"]) for each in results] == [
        ("a", 0),
        ("b", 0),
        ("a", 1),
        ("b", 1),
    ]
    assert numbers_written == [0, 1, 2, 3]
    assert list(harness.group_by(results, "variant")) == ["a", "b"]


# ---- Tables and figures ----


def result_of(variant, seed, accuracies, **more):
    """A result as harness.run returns it, of epochs of a second with these accuracies."""
    epochs = [{"seconds": i + 1.0, "valid_accuracy": a} for i, a in enumerate(accuracies)]
    figures = {"start_up": 1.0, "whole_run": 9.0, "peak_mib": 500.0, "test_accuracy": 0.5}
    figures |= {"test_views_accuracy": None, "hardware": "a CPU"}
    return {"variant": variant, "seed": seed, "epochs": epochs, **figures, **more}


def test_time_is_given_only_where_all_runs_reach_the_accuracy():
    results = [result_of("a", 0, [0.5, 0.9]), result_of("a", 1, [0.7, 0.8])]
    assert time_to_accuracy.time_to(results, 0.5) == "1 s, 1.0 epochs"
    assert time_to_accuracy.time_to(results, 0.6) == "2 s, 1.5 epochs"
    assert time_to_accuracy.time_to(results, 0.9) == "1 of 2 runs"
    assert time_to_accuracy.time_to(results, 0.95) == "no run"
    assert time_to_accuracy.time_to([result_of("a", 0, [float("nan")])], 0.5) == ""


def test_table_and_figure_of_time_to_accuracy(folder):
    results = [result_of("a", 0, [0.5]), result_of("b", 0, [0.9], test_views_accuracy=0.9)]
    table = time_to_accuracy.table(results, [0.6]).splitlines()
    assert table[0].startswith("| variant | 60 % valid | start-up, s |")
    assert table[2] == "| `a` | no run | 1.0 | 9.0 | 50.00 |  | 500 | 1 |"
    assert table[3] == "| `b` | 1 s, 1.0 epochs | 1.0 | 9.0 | 50.00 | 90.00 | 500 | 1 |"
    assert len(time_to_accuracy.draw(results).axes[0].lines) == 2


def test_table_and_figure_of_ablations():
    results = []
    for name, seconds, accuracy in [("as it is", 10.0, 0.8), ("ReLU", 11.0, 0.79)]:
        for seed in (0, 1):
            result = {"variant": name, "seed": seed, "seconds": seconds}
            results.append(result | {"valid_accuracy": accuracy + 0.01 * seed})
    summaries = ablations.summarize(results)
    table = ablations.table(summaries).splitlines()
    assert table[2] == "| as it is | 10.0 ± 0.0 | +0 % | 80.50 ± 0.71 | +0.00 | 2 |"
    assert table[3] == "| ReLU | 11.0 ± 0.0 | +10 % | 79.50 ± 0.71 | -1.00 | 2 |"
    assert len(ablations.draw(summaries).axes) == 2


@pytest.fixture
def harness_runs(monkeypatch, folder):
    """The runs that a benchmark starts, which are replaced by a result made up."""
    monkeypatch.setattr(harness, "RESULTS", folder)
    runs = []

    def run(variant, seed, data_dir, snippet="", environment=None, processes=1):
        runs.append((variant, seed, snippet, processes))
        words = variant.split()
        options = dict(zip(words[1::2], words[2::2], strict=False))
        images = int(options.get("--subset", 50_000)) or 50_000
        seconds = 5 + images / 1000 * int(options.get("--epochs", 10))
        recall = {"plane": 0.25, "car": 0.75}
        more = {"whole_run": 4 + seconds, "start_up": 4.0, "train_images": images}
        return result_of(variant, seed, [0.5, 0.5], recall=recall, f1=recall, **more)

    monkeypatch.setattr(harness, "run", run)
    return runs


def test_growth(harness_runs, tool_inside, folder):
    out, _ = tool_inside("growth")("--runs", "1")
    assert len(harness_runs) == len(growth.IMAGES) + len(growth.EPOCHS)
    assert "5.0 s, including the test, and 3.00 s for every 1,000 images" in out
    assert "| 10000 | 39.0 | 4.0 | 35.0 | 35.0 | +0.0 % | +0.0 % |" in out.replace("-0.0", "+0.0")
    assert "| 32 | 500 |" in out
    assert len(json.loads((folder / "growth.json").read_text())) == len(harness_runs)


def test_imbalance(harness_runs, tool_inside):
    out, _ = tool_inside("imbalance")("--runs", "2", "--share", "0.5")
    lines = out.splitlines()
    assert lines[2] == "| none | 25 | 75 | 50.0 ± 0.0 | 50.0 ± 0.0 | 2 ± 0 | 2 |"
    assert len(lines) == 2 + 4 and len(harness_runs) == 8
    assert all("share=0.5" in snippet for _, _, snippet, _ in harness_runs)


def test_fit(harness_runs, tool_inside, folder, monkeypatch):
    data = digits()
    monkeypatch.setattr(fit.ic, "load_data", lambda config: data)
    out, _ = tool_inside("fit")("--runs", "2", "--images", "30")
    lines = out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| `crop`", "| `pad`", "| `stretch`"]
    assert len(harness_runs) == 6
    assert all("--image-size 48" in variant for variant, *_ in harness_runs)
    assert len(json.loads((folder / "fit_anywhere.json").read_text())) == 6


def digits():
    return ic.load_data(ic.Config(dataset="digits", subset=30)).first(30)


def test_photographs_have_their_object_where_it_is_said(folder):
    data = digits()
    for where in ("anywhere", "middle"):
        fit.make_photographs(folder / where, data.train, data.classes, where, seed=0)
        assert len(list((folder / where).glob("*/*.png"))) == 30
    thing = torch.full((32, 32, 3), 255, dtype=torch.uint8).numpy()
    random = np.random.default_rng(0)
    places = {where: set() for where in ("anywhere", "middle")}
    for where, found in places.items():
        for _ in range(20):
            picture = np.asarray(fit.photograph(thing, (3, 2), where, random))
            assert picture.shape == (48, 72, 3)
            is_white = (picture == 255).all(2).sum(0) >= 32
            found.add(int(is_white.argmax()))
    assert places["middle"] == {20} and len(places["anywhere"]) > 5
    assert min(places["anywhere"]) < 8 and max(places["anywhere"]) > 32


def test_finetune(harness_runs, tool_inside, folder):
    out, _ = tool_inside("finetune")("--runs", "2", "--learning-rates", "1e-3")
    lines = out.splitlines()
    assert lines[2].startswith("| last layer only | `--freeze` | 50.0 ± 0.0 |")
    assert len(lines) == 2 + len(finetune.VARIANTS)
    first, *others = harness_runs
    assert "--init-from" not in first[0] and "--out" in first[0]
    assert len(others) == 2 * len(finetune.VARIANTS)
    assert all("--init-from" in variant and "--lr 1e-3" in variant for variant, *_ in others)
    assert len(json.loads((folder / "finetune.json").read_text())) == len(others)
    tool_inside("finetune")("--runs", "1", "--learning-rates", "1e-3", "--test")
    assert len(json.loads((folder / "finetune.json").read_text())) == len(others)
    assert (folder / "finetune_test.json").exists()


@pytest.mark.parametrize("option", [["--model", "resnet18"], ["--image-size", "64"]])
def test_finetune_refuses_options_of_weights_that_are_not_given(tool_inside, option):
    _, err = tool_inside("finetune")(*option, status=2)
    assert option[0] in err and "--weights" in err


def test_finetune_from_weights_in_a_file(harness_runs, tool_inside, folder):
    options = ["--weights", "given.pth", "--model", "timm:tiny", "--image-size", "64"]
    tool_inside("finetune")("--runs", "1", *options, "--learning-rates", "1e-3", "--name", "given")
    assert len(harness_runs) == len(finetune.VARIANTS)
    for variant, _, snippet, _ in harness_runs:
        assert "size=64" in snippet
        assert variant.startswith("finetune --model timm:tiny --image-size 64 --lr 1e-3 ")
        assert str(folder / "given.pth") in shlex.split(variant)
    results = json.loads((folder / "given.json").read_text())
    assert len(results) == len(harness_runs)
    assert all(result["variant"].endswith("--init-from given.pth") for result in results)


@pytest.mark.parametrize("on_test_images", [False, True])
def test_classes_to_fine_tune_for(apply_snippet, on_test_images):
    data = ic.load_data(ic.Config(dataset="digits", val_fraction=0.0))
    settings = {"first": 5, "end": 10, "count": 20, "on_test_images": on_test_images}
    apply_snippet(finetune.LOAD_CLASSES.format(**settings))
    first, again, other = (ic.load_data(ic.Config(dataset="digits", seed=n)) for n in (0, 0, 1))
    assert first.classes == data.classes[5:]
    assert torch.bincount(first.train.labels).tolist() == [18] * 5
    assert torch.bincount(first.valid.labels).tolist() == [2] * 5
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.train.images, other.train.images)
    test_images = data.test.images[data.test.labels >= 5]
    assert torch.equal(first.test.images, test_images) == on_test_images


def test_scaling(harness_runs, tool_inside, folder):
    out, _ = tool_inside("scaling")("--runs", "2", "--subset", "300")
    assert "| 2, silent | 300 ± 0 | 1.00 |" in out
    assert "0.0 % of the time of two processes is communication" in out
    assert [processes for _, _, _, processes in harness_runs] == [1, 2, 2] * 2
    results = json.loads((folder / "scaling.json").read_text())
    assert [each["processes"] for each in results] == ["1", "2", "2, silent"] * 2


# ---- Large folders ----


def test_too_few_images_for_a_large_folder_are_refused(tool_inside):
    error = tool_inside("large").error("--images", "9999", status=2)
    assert "--images 9999" in error and "10000" in error


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_of_a_process():
    assert 100_000 < harness.read_kilobytes("/proc/self/status", "RssAnon") < 10_000_000
    assert harness.read_kilobytes("/proc/self/status", "Nothing") == 0
    assert harness.read_kilobytes("/proc/nothing/status", "RssAnon") == 0
    resident = harness.read_kilobytes("/proc/self/status", "VmRSS") / 1024
    assert survival.peak_mib() > 0.99 * resident
    available = harness.read_kilobytes("/proc/meminfo", "MemAvailable") / 2**20
    assert len(large.occupy_memory(available + 1)) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_large_folder(folder, monkeypatch, tool_inside):
    """The first of the four trainings is a real one; it is as large as the others."""
    trained = []

    def train_once(*arguments):
        if not trained:
            trained.append(train(*arguments))
        limits.append(arguments[-1])
        return trained[0]

    train, limits = large.train, []
    monkeypatch.setattr(large, "train", train_once)
    monkeypatch.setattr(harness, "RESULTS", folder)
    monkeypatch.setattr(large, "IMAGES_PER_PIECE", 20)
    free = str(harness.read_kilobytes("/proc/meminfo", "MemAvailable") / 2**20 + 1)
    out, _ = tool_inside("large")("--images", "200", "--folder", "drawn", "--leave", free)
    results = json.loads((folder / "large.json").read_text())
    assert [each["name"] for each in results[:3]] == [
        "decoded first",
        "from the map",
        "held in memory",
    ]
    assert len(results) == 4 and "| held in memory |" in out
    assert limits == [0, 0, large.ALL_IN_MEMORY, 0]
    assert 0 < results[0]["until_training"] < results[0]["whole_run"]
    assert results[0]["peak_mib"] > 50 and results[0]["images_per_second"] > 0
    assert len(list((folder / "drawn" / "images-200").rglob("*.png"))) == 200


# ---- Records ----

RECORD = """
import time

print("|  run     |  epoch  |  val_acc  |  tta_val_acc  |  time_seconds  |", flush=True)
for run in range(200):
    print(f"|  {run:6d}  |      0  |   0.8000  |               |        0.1000  |", flush=True)
    eval_row = f"|   0.9300  |       0.940{run}  |        {2 + run / 10:.4f}  |"
    print(f"|          |   eval  {eval_row}", flush=True)
    time.sleep(0.2)
"""


@pytest.mark.slow
def test_records_are_run_in_turns_and_their_first_run_does_not_count(
    tool_inside, folder, monkeypatch
):
    (folder / "record.py").write_text(RECORD)
    ours = f"{DIGITS} --epochs 1 --subset 100 --width 0.25 --image-size 16"
    options = ["--variant", ours, "--runs", "2", "--rounds", "2", "--name", "records_tried"]
    monkeypatch.setattr(harness, "RESULTS", folder)
    table, _ = tool_inside("records")(folder / "record.py", *options)
    assert f"| `{folder / 'record.py'}` | 4 | 2.150 ± 0.092 |" in table
    assert f"| `{ours}` | 4 |" in table

    results = json.loads((folder / "records_tried.json").read_text())
    contenders = [result["contender"] for result in results]
    assert contenders == [str(folder / "record.py"), ours] * 2
    theirs = [(run["seconds"], run["accuracy"]) for run in results[0]["runs"]]
    assert theirs == [(2.1, 0.9401), (2.2, 0.9402)]
    for run in results[1]["runs"] + results[3]["runs"]:
        assert 0 < run["seconds"] < run["with_test"] < 30
        assert run["since"] > 0 and 0 <= run["accuracy"] <= 1
    assert results[1]["runs"] != results[3]["runs"]  # other seeds


def test_time_of_our_runs_includes_the_last_test(monkeypatch):
    def two_runs(command, where):
        """What a repeated run prints, at which second; and the report that it leaves."""
        (where / "run").mkdir()
        results = {"seconds": 2.0, "test_accuracy": 0.9}
        report = {"repeats": [results, results | {"test_views_accuracy": 0.95}]}
        (where / "run" / "report.json").write_text(json.dumps(report))
        seconds = {"Start Training": 1, "Accuracy of the network": 4}
        seconds |= {"Accuracy with 6 views": 5, "Accuracy for class": 9}
        for number in (1, 2):
            for line, since in seconds.items():
                yield 10.0 * number + since, line

    monkeypatch.setattr(records, "output_lines", two_runs)
    (run,) = records.train_ours("default", 1, 0, "data")
    assert run == {"seconds": 2.0, "accuracy": 0.95, "since": 15.0, "with_test": 4.0}


def test_record_script_that_fails_is_an_error(folder):
    (folder / "record.py").write_text("print('hello')\nraise SystemExit(3)")
    with pytest.raises(SystemExit, match="3.*hello"):
        records.train_theirs(folder / "record.py", 1)
    (folder / "record.py").write_text("print('hello')")
    with pytest.raises(SystemExit, match="0 of 2 runs"):
        records.train_theirs(folder / "record.py", 1)


def test_records_are_not_overwritten(folder, monkeypatch, tool_inside):
    monkeypatch.setattr(harness, "RESULTS", folder)
    (folder / "records.json").write_text("[]")
    assert "--name" in tool_inside("records").error(status=2)
    assert "gone.py" in tool_inside("records").error("gone.py", status=2)


# ---- A session with a GPU ----


@pytest.fixture
def session(folder):
    """What a part is told; ten seconds are left."""
    return gpu_runs.Session(
        device="cpu",
        data_dir=folder,
        scripts=[Path("record.py")],
        quick=True,
        folder=folder,
        deadline=time.monotonic() + 10,
        earlier={},
    )


def test_parts_of_a_session_have_their_time_and_do_not_end_each_other(session, monkeypatch):
    now = 1000.0
    deadlines, folders, rows = [], [], []

    def part(name, seconds, takes, error=None, **facts):
        def do(told):
            nonlocal now
            now += takes
            deadlines.append((name, told.deadline))
            folders.append(told.folder)
            assert told.folder.is_dir()
            if error:
                raise error
            return gpu_runs.Result(f"{name} done", True, {"takes": takes})

        return gpu_session.Part(name, seconds, do, f"{name} works", **facts)

    parts = [
        part("first", seconds=40, takes=30),
        part("broken", seconds=40, takes=1, error=RuntimeError("no | such\nfile")),
        part("on a GPU", seconds=40, takes=1, needs_cuda=True),
        part("long", seconds=40, takes=28, error=TimeoutError("out of time")),
        part("late", seconds=40, takes=1),
    ]
    monkeypatch.setattr(gpu_session, "time", SimpleNamespace(monotonic=lambda: now))
    gpu_session.do_parts(parts, session, 60, rows.append)

    assert deadlines == [("first", 1040), ("broken", 1060), ("long", 1060)]
    assert not any(path.exists() for path in folders)
    found = {row["part"]: (row["status"], row["seconds"]) for row in rows}
    assert found == {
        "first": ("done", 30),
        "broken": ("failed", 1),
        "on a GPU": ("skipped", 0),
        "long": ("failed", 28),
        "late": ("skipped", 0),
    }
    assert list(session.earlier) == ["first"]
    table = [gpu_session.table_row(row) for row in rows]
    assert table[0] == ["first", "first done", "first works", "yes", "30"]
    assert "RuntimeError: no such file" in table[1][1] and table[1][3] == ""
    assert rows[1]["raw"].endswith("no | such\nfile")
    assert "CUDA" in table[2][1] and "time" in table[4][1]


@pytest.mark.skipif(sys.platform == "win32", reason="groups of processes are ended")
def test_program_of_a_session_is_ended_when_its_time_is_over(session, folder):
    program = "import os, time; print('process', os.getpid(), flush=True); time.sleep({})"
    ended = gpu_runs.run(session, [sys.executable, "-c", program.format(0.3)])
    (since,) = ended.times_of("process")
    assert 0 < since < ended.seconds - 0.2

    late = session._replace(deadline=time.monotonic() + 1)
    with pytest.raises(TimeoutError):
        gpu_runs.run(late, [sys.executable, "-c", program.format(60)])
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "output.txt").read_text().split()[1]), 0)

    saves_at_sigterm = "import signal; signal.signal(15, lambda *_: open('saved', 'w')); "
    command = [sys.executable, "-c", saves_at_sigterm + program.format(60)]
    killed = gpu_runs.run(session, command, kill_after="process")
    assert killed.seconds < 9 and not (folder / "saved").exists()
    with pytest.raises(RuntimeError, match="(?s)3.*a reason"):
        gpu_runs.run(session, [sys.executable, "-c", "print('a reason'); raise SystemExit(3)"])


def test_benchmark_of_a_session_that_takes_too_long_keeps_its_results(session, monkeypatch):
    def write_and_go_on(told, command, environment):
        Path(environment["BENCHMARK_RESULTS"], "records.json").write_text("[1]")
        raise TimeoutError

    monkeypatch.setattr(gpu_runs, "run", write_and_go_on)
    assert gpu_runs.benchmark(session, "records") == [1]
    with pytest.raises(TimeoutError):
        gpu_runs.benchmark(session, "startup")


def test_runs_of_a_part_are_as_many_as_fit(session):
    trained = gpu_runs.Trained(gpu_runs.Ended([], seconds=60.0), {}, [])
    runs = gpu_runs.as_many_as_fit(session, ["bf16", "fp16"], lambda value: trained)
    assert runs == {"bf16": trained}
    more_time = session._replace(deadline=session.deadline + 60)
    assert len(gpu_runs.as_many_as_fit(more_time, range(2), lambda value: trained)) == 2


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([(1.8, 0.941)], [(2.0, 0.94), (3.0, 0.94)], True),
        ([(1.9, 0.941)], [(2.0, 0.94), (3.0, 0.94)], False),
        ([(1.0, 0.939), (5.0, 0.95)], [(2.0, 0.94)], False),  # the faster one is not as accurate
        ([(1.0, 0.941)], [], None),
        ([(1.0, 0.939)], [], False),
    ],
)
def test_what_is_to_be_reached_beside_the_records(ours, theirs, expected):
    assert gpu_parts.beats_records(ours, theirs) is expected


@pytest.mark.parametrize(("first_result", "reached"), [(45.0, True), (44.0, False)])
def test_time_without_a_compiler_is_compared_with_that_of_the_records(
    session, monkeypatch, first_result, reached
):
    def records_of(told, name, *options):
        their_runs = [{"seconds": 2.0, "accuracy": 0.94, "since": first_result}]
        our_runs = [{"seconds": 1.0, "accuracy": 0.95, "since": 12.0}]
        variant = options[options.index("--variant") + 1]
        assert "record.py" in options
        return [
            {"contender": "record.py", "runs": their_runs},
            {"contender": variant, "runs": our_runs},
        ]

    ended = gpu_runs.Ended([(2.0, "Start Training"), (15.0, "Model: model_cnn.pth")], 16.0)
    trained = gpu_runs.Trained(ended, {"seconds": 5.0, "test_accuracy": 0.94}, [])
    monkeypatch.setattr(gpu_parts, "benchmark", records_of)
    monkeypatch.setattr(gpu_parts, "train", lambda *options: trained)
    assert gpu_parts.without_compiler(session).reached is None
    session.earlier["accuracy94"] = gpu_parts.accuracy94(session)
    assert session.earlier["accuracy94"].reached is True
    found = gpu_parts.without_compiler(session)
    assert found.reached is reached and found.raw["saved"] == 15


def test_session_is_refused_without_a_gpu_or_with_a_name_that_exists(
    folder, monkeypatch, tool_inside
):
    monkeypatch.setattr(harness, "RESULTS", folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in tool_inside("gpu_session").error(status=2)
    assert "gone.py" in tool_inside("gpu_session").error("gone.py", status=2)
    (folder / "gpu_session.json").write_text("{}")
    assert "--name" in tool_inside("gpu_session").error("--device", "cpu", status=2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="groups of processes are ended")
def test_session_can_be_tried_without_a_gpu(folder, monkeypatch, tool_inside):
    monkeypatch.setattr(harness, "RESULTS", folder)
    options = ["--device", "cpu", "--quick", "--only", "cpu-and-gpu", "nccl"]
    out, _ = tool_inside("gpu_session")(*options)
    content = json.loads((folder / "gpu_session_quick.json").read_text())
    assert content["versions"] == ic.VERSIONS and "--quick" in content["command"]
    on_gpu, compared = content["parts"]
    assert (on_gpu["part"], on_gpu["status"]) == ("nccl", "skipped")
    assert (compared["part"], compared["status"]) == ("cpu-and-gpu", "done")
    assert compared["reached"] is True and len(compared["raw"]["cpu"]) == 2
    assert [row.split(" | ")[0] for row in out.splitlines()[-2:]] == ["| nccl", "| cpu-and-gpu"]


# ---- Survival; test_model_files.py mutates files ----


@pytest.mark.slow
def test_resume_that_fails_counts_as_a_lost_run(folder, monkeypatch, capsys):
    monkeypatch.setattr(survival, "OPTIONS", ["--dataset", "nowhere"])  # there is no run yet
    wrong = survival.problems(folder, {"a weight": torch.zeros(1)})
    assert survival.print_accident("killed", "after 1 s", wrong)
    assert not survival.print_accident("killed", "after 2 s", [])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("| killed | after 1 s | resume: ")
    assert "nowhere" in first and first.endswith("; no model in the end |")
    assert second == "| killed | after 2 s | nothing |"


def test_damaged_files_are_found(folder):
    ic.save_checkpoint(folder / "good.pth", {"weight": torch.zeros(3)})
    (folder / "good.json").write_text("{}")
    (folder / "good.csv").write_text("a,b\n1,2\n")
    assert survival.damaged_files(folder) == []
    (folder / "bad.pth").write_bytes((folder / "good.pth").read_bytes()[:-30])
    (folder / "bad.json").write_text("{")
    (folder / "bad.csv").write_text("a,b\n1\n")
    (folder / "bad.png").write_bytes(b"\x89PNG")
    damaged = {line.partition(":")[0] for line in survival.damaged_files(folder)}
    assert damaged == {"bad.pth", "bad.json", "bad.csv", "bad.png"}


def test_mutations_change_files():
    chance = random.Random(0)
    content = bytes(range(256)) * 10
    changed = [survival.mutated(content, chance) for _ in range(50)]
    assert sum(each != content for each in changed) > 45
    files = list(survival.pictures(8, chance))
    assert [suffix for _, suffix in files[:4]] == [".jpeg", ".png", ".gif", ".webp"]


@pytest.mark.slow
def test_run_that_is_killed_goes_on(monkeypatch):
    monkeypatch.setattr(survival, "OPTIONS", [*QUICK, "--device", "cpu"])
    undisturbed = survival.run_undisturbed()
    assert 0 < undisturbed.start_up < undisturbed.seconds and undisturbed.kilobytes > 100
    moment = (undisturbed.start_up + undisturbed.seconds) / 2
    _, wrong = survival.kill(moment, 0.0, undisturbed.weights)
    assert wrong == []


@pytest.mark.slow
def test_mutated_files_are_counted(capsys, folder):
    trainer = trainer_of(width=0.25)
    trainer.state.progress.history.append(dict.fromkeys(COLUMNS))
    ic.save_checkpoint("model.pth", trainer.state.model_file())
    content = (folder / "model.pth").read_bytes()
    files = survival.mutated_checkpoints(content, 6, random.Random(0))
    assert survival.load_all("checkpoints", files, 6, "model.pth") is False
    row = capsys.readouterr().out
    assert row.startswith("| 6 checkpoints | ")
    good = iter([(content, ".pth"), (content, ".strange")])
    assert survival.load_all("files", good, 2, "model.pth") is False
    assert not survival.load_all("files", iter([]), 0, "model.pth")


# ---- Utilisation ----


@pytest.mark.parametrize("progressive_resizing", [0.0, 0.4, 0.7])
def test_phases_of_a_run(progressive_resizing):
    for scale in (1.0, 0.75, 0.5) if progressive_resizing else (1.0,):
        fraction = utilisation.middle_of_phase(scale, progressive_resizing)
        assert ic.scale_schedule(fraction, progressive_resizing) == scale


@pytest.mark.slow
def test_utilisation(folder, monkeypatch, tool_inside):
    monkeypatch.setattr(harness, "RESULTS", folder)
    monkeypatch.setattr(utilisation, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(utilisation, "ROUNDS", 2)
    monkeypatch.setattr(utilisation, "CPU_MATRIX_SIZE", 512)
    monkeypatch.setattr(ic.devices, "keep_freed_memory", lambda: None)
    out, _ = tool_inside("utilisation")("--dataset", "digits", "--device", "cpu")
    result = json.loads((folder / "utilisation.json").read_text())
    assert [step["scale"] for step in result["steps"]] == [1.0, 0.75, 0.5]
    assert result["recipe"] == "default" and result["versions"] == ic.VERSIONS
    rows = out.splitlines()[-3:]
    assert [row.split()[1] for row in rows] == ["32", "24", "16"]
    for step in result["steps"]:
        assert len(step["seconds"]) == len(step["peaks"]) == 2
        for seconds, rate, share, peak in zip(
            step["seconds"], step["rates"], step["shares"], step["peaks"], strict=True
        ):
            assert seconds > 0 and share > 0
            assert share == pytest.approx(rate / peak)


def test_stages_before_the_first_step_and_after_the_last():
    spans = [
        startup.Span("import torch", 0.5, 2.0),
        startup.Span("a:load", 2.0, 3.0),
        startup.Span("a:read", 2.2, 2.7),
        startup.Span(startup.STEP, 3.5, 5.0),
        startup.Span("a:validate", 5.0, 6.0),
        startup.Span(startup.STEP, 6.0, 7.0),
        startup.Span("a:test", 7.0, 9.0),
    ]
    rows = startup.rows_of_run(spans, ended=10.5)
    indent = startup.INDENT
    assert [(row.stage, row.seconds) for row in rows] == [
        ("until the first step", [3.5]),
        (f"{indent}import torch", [1.5]),
        (f"{indent}load", [1.0]),
        (f"{2 * indent}read", [pytest.approx(0.5)]),
        ("the first step, longer than the second by", [0.5]),
        ("after the last step", [3.5]),
        (f"{indent}test", [2.0]),
        (f"{indent}until the process is gone", [1.5]),
    ]


def test_epochs_alone_and_beside_another_program():
    results = [
        {"beside": False, "seconds": 2.0},
        {"beside": True, "seconds": 3.0},
        {"beside": False, "seconds": 2.0},
        {"beside": True, "seconds": 5.0},
    ]
    assert beside.table_row("this", results) == ["this", "2.00, 2.00", "3.00, 5.00", "2.00"]


@pytest.mark.slow
def test_beside(folder, monkeypatch, tool_inside):
    monkeypatch.setattr(harness, "RESULTS", folder)
    options = "--dataset digits --subset 200 --width 0.25 --epochs 2 --image-size 16"
    out, _ = tool_inside("beside")("--runs", "1", "--options", options)
    results = json.loads((folder / "beside.json").read_text())
    assert [(result["program"], result["beside"]) for result in results] == [
        ("this", False),
        ("this", True),
    ]
    assert all(result["seconds"] > 0 for result in results)
    assert "| this |" in out


@pytest.mark.slow
def test_startup(folder, monkeypatch, tool_inside):
    monkeypatch.setattr(harness, "RESULTS", folder)
    monkeypatch.setattr(startup, "SUBSET", 200)
    options_of = startup.training_options
    small = ["--width", "0.25", "--image-size", "16"]
    monkeypatch.setattr(startup, "training_options", lambda options: options_of(options) + small)
    out, _ = tool_inside("startup")("--dataset", "digits", "--device", "cpu", "--runs", "1")
    rows = json.loads((folder / "startup.json").read_text())
    stages = [row["stage"].replace(startup.INDENT, "") for row in rows]
    for stage in ("import torch", "load_data", "Trainer.__init__", "test", "RunLog._add_graph"):
        assert (stage in stages) == (stage != "RunLog._add_graph")  # that is between two epochs
    assert all(len(row["seconds"]) == 1 for row in rows)
    assert "until the first step" in out
    options = ["--dataset", "digits", "--device", "cpu", "--runs", "1", "--old", REPOSITORY]
    out, _ = tool_inside("startup")(*options)
    runs = json.loads((folder / "startup.json").read_text())
    for until, after, after_last_line, whole in (*runs["this"], *runs["old"]):
        assert 0 < until < whole and 0 <= after_last_line < after < whole - until
    assert [line.split(" | ")[0] for line in out.splitlines()[-4:]] == [
        f"| {part}" for part in startup.PARTS
    ]


def test_operations_are_those_of_the_layers():
    trainer = trainer_of(width=0.25, batch_size=20)
    batch = trainer.plan(0).take(slice(20))
    whole = utilisation.count_operations(trainer, batch, 1.0)
    half = utilisation.count_operations(trainer, batch, 0.5)
    assert 0.2 < half / whole < 0.3
    assert all(weight.grad is None for weight in trainer.state.model.parameters())


# ---- duplicates.py ----


def test_copies_of_images_are_counted():
    originals = [duplicates.draw_image(number) for number in range(12)]
    counts = duplicates.count_found(originals, duplicates.mirror)
    assert counts == {"found": 12, "others": 0}
    assert duplicates.count_found(originals, lambda image: image.rotate(90))["found"] == 0
    labels = np.arange(24) % 12
    images = [*originals, *map(duplicates.mirror, originals)]
    assert duplicates.count_pairs(images, labels) == {"images": 24, "pairs": 12, "two_classes": 0}


def test_copies_are_what_their_names_say():
    image = duplicates.draw_image(0)
    sizes = {name: change(image).size for name, change in duplicates.COPIES.items()}
    assert sizes["half the width"] == (16, 16) and sizes["a quarter of the width"] == (8, 8)
    assert sizes["80 % of the area, from a corner"] == (29, 29)
    corner = duplicates.crop(image, 0.25, 1, 0)
    assert np.array_equal(np.asarray(corner), np.asarray(image)[:16, 16:])
