"""Whole runs: what is learned, printed and written, and that every option does its work."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from conftest import (
    QUICK,
    SCRIPT,
    SMALL,
    Program,
    beforehand,
    events_of,
    only_run,
    report_of,
    rows_of,
    same,
    save,
    shared_folder,
    table_of,
    trainer_of,
    weights,
    without_time,
)
from test_named import WRITERS

import image_classification as ic
from classifier.datasets import named
from classifier.datasets.dataset import Split
from classifier.datasets.folder_layout import UNSAFE
from classifier.heartbeat import Heartbeat
from classifier.progress import COLUMNS

FILES = {
    "config.json",
    "metrics.csv",
    "last.pth",
    "best.pth",
    "training_results.png",
    "confusion_matrix.png",
    "samples.png",
    "test_predictions.csv",
    "report.json",
    "model_cnn_digits.pth",
}


def learn(**settings):
    """Train a narrow network on the digits, from Python."""
    usual = {"dataset": "digits", "subset": 600, "epochs": 3, "width": 0.25, "image_size": 16}
    return ic.train(ic.Config(**(usual | settings)))


def digits(image_size=16, **settings):
    return ic.load_data(ic.Config(dataset="digits", image_size=image_size, **settings))


# ---- What a run prints and writes ----------------------------------------------------------------


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """A run on the digits, as a user does it: (current folder, run folder, printed).

    Script and package lie alone in one folder, and it runs in another.
    """
    with shared_folder(tmp_path_factory, "default_run") as folder:
        printed = folder / "printed.txt"
        if not printed.exists():
            program = folder / "program"
            without_caches = shutil.ignore_patterns("__pycache__")
            shutil.copytree(
                SCRIPT.with_name("classifier"), program / "classifier", ignore=without_caches
            )
            script = shutil.copy(SCRIPT, program / SCRIPT.name)
            (folder / "current").mkdir()
            options = ["--dataset", "digits", "--width", "0.5"]
            out, err = Program(folder / "current", script)(*options, timeout=300)
            assert "%|" not in err  # no bar: this is no terminal
            printed.write_text(out, encoding="utf-8")
    current = folder / "current"
    return current, only_run(current), printed.read_text(encoding="utf-8")


@pytest.mark.slow
def test_script_and_package_do_the_whole_job_from_another_folder(default_run):
    folder, run, out = default_run
    assert {path.name for path in run.iterdir()} >= FILES
    assert {path.name for path in folder.iterdir()} == {"runs", "model_cnn_digits.pth"}
    assert not list(folder.rglob("*.tmp"))
    assert not [path.name for path in folder.rglob("*") if UNSAFE.search(path.name)]  # on Windows
    assert "\nStart Training  " in out
    assert "tensorboard --logdir runs" in out
    assert "inference.py" not in out  # it is not there
    assert re.search(r"\nDone in \d\d:\d\d\n\Z", out)


@pytest.mark.slow
def test_report_agrees_with_what_was_printed(default_run):
    _, run, out = default_run
    report = report_of(run)
    matrix = torch.tensor(report["confusion_matrix"])
    hits = matrix.trace().item()
    accuracy = hits / 359
    closing = out.partition("\nFinished Training\n")[2].splitlines()
    line = f"Accuracy of the network on the 359 test images: {100 * hits // 359} % ("
    assert closing[0].startswith(line)
    assert matrix.sum() == 359 and accuracy >= 0.97
    assert report["test_accuracy"] == pytest.approx(accuracy)
    for index, name in enumerate("0123456789"):
        recall = (matrix[index, index] / matrix[index].sum()).item()
        precision = (matrix[index, index] / matrix[:, index].sum()).item()
        assert report["class_accuracy"][name] == report["recall"][name] == pytest.approx(recall)
        assert report["precision"][name] == pytest.approx(precision)
        f1 = 2 * precision * recall / (precision + recall)
        assert report["f1"][name] == pytest.approx(f1)
        line = f"Accuracy for class {name}     is: {100 * recall:.1f} %  (precision "
        assert closing[1 + index].startswith(f"{line}{100 * precision:.1f} %, F1 ")
    best, worst = re.search(r"Best class: (\d); worst class: (\d)", out).groups()
    assert report["recall"][best] == max(report["recall"].values())
    assert report["recall"][worst] == min(report["recall"].values())
    assert {"test_loss", "seconds", "commit", "hardware", "versions"} <= report.keys()
    assert report["dataset"] == "digits" and report["train_images"] == 1295
    assert report["substituted_for"] is None and report["commit"] is None
    digest = hashlib.sha256(SCRIPT.read_text(encoding="utf-8").encode()).hexdigest()
    assert report["versions"]["script"] == digest[:12]


@pytest.mark.slow
def test_metrics_agree_with_what_was_printed(default_run):
    folder, run, out = default_run
    rows, seconds = rows_of(run), report_of(run)["seconds"]
    assert list(rows[0]) == COLUMNS
    printed = re.findall("^Epoch .*", out, re.MULTILINE)
    for index, (row, line) in enumerate(zip(rows, printed, strict=True)):
        train_loss, valid_loss = float(row["train_loss"]), float(row["valid_loss"])
        losses = f"train loss {train_loss:.4f}, valid loss {valid_loss:.4f}, "
        assert line.startswith(f"Epoch {index:04d}: {losses}")
        assert 0 < float(row["seconds"]) < seconds / 2
    assert sum(float(row["seconds"]) for row in rows) == pytest.approx(seconds)
    losses = [float(row["valid_loss"]) for row in rows]
    content = torch.load(folder / "model_cnn_digits.pth", weights_only=True)
    assert content["metrics"]["epoch"] == losses.index(min(losses))


@pytest.mark.slow
def test_model_file_reproduces_the_report(default_run):
    folder, run, _ = default_run
    model, content = ic.load_checkpoint(folder / "model_cnn_digits.pth")
    data, report = digits(image_size=32), report_of(run)
    result = ic.evaluate(model, *data.test)
    assert result.accuracy == pytest.approx(report["test_accuracy"])
    assert result.loss == pytest.approx(report["test_loss"], rel=1e-4)
    assert content["classes"] == data.classes and content["mean"] == pytest.approx(data.mean)


@pytest.mark.slow
def test_model_file_holds_plain_types_only(default_run):
    def check(value):
        if isinstance(value, dict):
            for key, each in value.items():
                assert type(key) is str
                check(each)
        elif isinstance(value, list):
            for each in value:
                check(each)
        else:
            assert type(value) in (str, int, float, bool, type(None), torch.Tensor)

    check(torch.load(default_run[0] / "model_cnn_digits.pth", weights_only=True))


@pytest.mark.slow
def test_tensorboard_has_it_all(default_run):
    run = default_run[1]
    train, valid = events_of(run), events_of(run / "valid")
    scalars = {"loss", "accuracy", "learning rate", "images per second", "test accuracy"}
    assert scalars <= set(train.Tags()["scalars"])
    assert {"loss", "accuracy"} == set(valid.Tags()["scalars"])
    assert {"training images", "confusion matrix"} <= set(train.Tags()["images"])
    assert train.Tags()["graph"]
    assert "_hparams_/session_start_info" in train.summary_metadata
    losses = [float(row["valid_loss"]) for row in rows_of(run)]
    assert [event.value for event in valid.Scalars("loss")] == pytest.approx(losses)


@pytest.mark.slow
def test_learning_on_real_images(cifar10, inside, tool_inside, folder):
    """Fails for shuffled labels, wrong gradients, a dead schedule, images not normalised."""
    options = ["--subset", "3000", "--batch-size", "125", "--epochs", "4", "--width", "0.25"]
    inside("--dataset", "cifar10", "--data-dir", cifar10, *options)
    run = only_run(folder)
    rows = rows_of(run)
    assert float(rows[-1]["valid_accuracy"]) > 0.45
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) - 0.5
    first = ic.load_data(ic.Config(dataset="cifar10", data_dir=str(cifar10))).test
    save(first.images[0], folder / "first.png")
    out, _ = tool_inside("inference")("first.png", "--format", "csv", "--reject", "0")
    (predicted,) = table_of(out)
    of_run = table_of((run / "test_predictions.csv").read_text())[0]
    assert predicted["class_1"] == of_run["prediction"]


@pytest.mark.parametrize("name", named.NAMES)
def test_data_set_by_name_trains_an_epoch(inside, folder, monkeypatch, name):
    WRITERS[name](folder)
    # these are not the published files
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_: True)
    options = ["--data-dir", folder, "--width", "0.25", "--epochs", "1"]
    inside("--dataset", name, *options)
    data_name = "FashionMNIST" if name == "fashion-mnist" else name.upper()
    run = only_run(folder)
    assert report_of(run)["dataset"] == data_name
    assert (folder / f"model_cnn_{data_name}.pth").exists()
    config = json.loads((run / "config.json").read_text())
    assert ("flip" in config["augment"]) == (name not in ("mnist", "svhn"))


@pytest.mark.slow
def test_overfitting_is_said_and_worst_mistakes_are_drawn(inside, folder):
    options = ["--width", "0.5", "--subset", "30", "--epochs", "15", "--batch-size", "10"]
    out, _ = inside(*QUICK, *options)
    assert re.search("^Overfitting: .* --init-from", out, re.MULTILINE)
    run = only_run(folder)
    assert "worst mistakes" in events_of(run).Tags()["images"]
    assert (run / "worst_mistakes.png").exists()


def test_all_training_images_without_validation(inside, folder):
    out, _ = inside(*QUICK, "--val-fraction", "0", "--scheduler", "plateau")
    assert "valid loss -" in out and "valid acc" not in out
    last = weights(only_run(folder) / "last.pth")
    assert same(weights(folder / "model_cnn_digits.pth"), last)


@pytest.mark.slow
def test_replacing_a_model_is_said(inside, folder):
    (folder / "mine.pth").write_text("old")
    briefly = [*QUICK, "--subset", "100", "--epochs", "1"]
    assert "mine.pth (replaced)" in inside(*briefly, "--out", "mine.pth")[0]
    assert weights(folder / "mine.pth")
    assert "(replaced" not in inside(*briefly)[0]
    assert "model_cnn_digits.pth (replaced; runs" in inside(*briefly)[0]


@pytest.mark.slow
def test_console_that_knows_only_cp1252(program):
    env = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    briefly = [*QUICK, "--subset", "100", "--epochs", "1"]
    program(*briefly, "--out", "модель.pth", env=env)


@pytest.mark.slow
def test_bar_is_drawn_on_a_terminal(program):
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    if not hasattr(termios, "tcsetwinsize"):
        pytest.skip("Python 3.10")
    terminal, of_program = pty.openpty()
    termios.tcsetwinsize(of_program, (24, 120))
    # a fast machine is through an epoch before tqdm draws again
    every_step = {"TQDM_MININTERVAL": "0"}
    process = program.start(*QUICK, stdout=subprocess.DEVNULL, stderr=of_program, env=every_step)
    os.close(of_program)
    drawn = b""
    with contextlib.suppress(OSError):  # when the other end is closed
        while piece := os.read(terminal, 65536):
            drawn += piece
    assert process.wait() == 0
    assert re.search(rb"Epoch 0000:.*loss \d\.\d{3}, run \d\d:\d\d left", drawn)
    assert b"img/s" in drawn


NO_SLOW_IMPORTS = """
import atexit
train_step = ic.Trainer.train_step

def checked_step(trainer, batch):
    slow = {"matplotlib", "tensorboard", "kornia"} & set(sys.modules)
    assert not slow, slow
    return train_step(trainer, batch)

ic.Trainer.train_step = checked_step

def check_modules():
    not_needed = ["pandas", "scipy", "sklearn", "sympy", "torch._dynamo", "torchvision"]
    print("imported:", [name for name in not_needed if name in sys.modules])

atexit.register(check_modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["cifar10", "digits"])
def test_slow_imports_wait_until_they_are_needed(program, cifar10, dataset):
    options = ["--dataset", dataset, "--width", "0.25", "--fast-dev-run"]
    out, _ = program("--data-dir", cifar10, *options, patch=NO_SLOW_IMPORTS)
    assert "imported: []" in out


COUNT_FROZEN = """
import gc

gc.unfreeze()
train_one_epoch = ic.train_one_epoch

def count_frozen(*arguments):
    print("frozen:", gc.get_freeze_count())
    return train_one_epoch(*arguments)

ic.train_one_epoch = count_frozen
"""


def test_garbage_collector_passes_over_what_is_imported(program):
    out, _ = program(*QUICK, "--epochs", "1", patch=COUNT_FROZEN)
    (count,) = re.findall("^frozen: ([0-9]+)$", out, re.MULTILINE)
    assert int(count) > 100_000


@pytest.mark.slow
def test_temperature_is_fitted_to_logits_of_the_best_weights(folder, monkeypatch):
    """They are known from the epoch's validation, and not computed again."""
    fitted = []
    fit = ic.metrics.fit_temperature

    def note_logits(logits, labels):
        fitted.append(logits)
        return fit(logits, labels)

    evaluate, evaluations = ic.evaluate, []

    def count(*arguments, **options):
        evaluations.append(1)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(ic.metrics, "fit_temperature", note_logits)
    monkeypatch.setattr(ic, "evaluate", count)
    with beforehand(ic, "validate", spoil_from_third_epoch):
        report = learn(precision="fp32", batch_size=50, epochs=4)
    assert report.results["best_epoch"] == 1
    # validation of each epoch, the score of unlike images (two to find the features), and the test
    assert len(evaluations) == 4 + 3 + 1

    model, content = ic.load_checkpoint(report.checkpoint)
    logits = evaluate(model, *digits().valid).logits
    assert torch.allclose(fitted[0], logits, atol=1e-4)
    assert content["metrics"]["temperature"] == fit(fitted[0], digits().valid.labels)


def spoil_from_third_epoch(trainer):
    """From the third epoch on, forget the classes before the validation."""
    if len(trainer.state.progress.history) >= 2:
        with torch.no_grad():
            trainer.state.model.classifier.weight.zero_()


# ---- What each option does -----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adam", "adamw", "rmsprop"])
def test_every_optimizer_learns(folder, optimizer):
    report = learn(optimizer=optimizer, epochs=4, batch_size=25)
    assert report.results["test_accuracy"] > 0.6


@pytest.mark.slow
def test_narrow_network_on_grey_images(inside, folder):
    """It has few filters, and computes in bf16."""
    options = ["--precision", "bf16", "--progressive-resizing", "0", "--image-size", "16"]
    inside(*QUICK, "--batch-size", "25", "--epochs", "4", *options)
    assert report_of(only_run(folder))["test_accuracy"] > 0.8


@pytest.mark.slow
def test_fp16_with_scaler_and_clipping_learns(folder):
    report = learn(precision="fp16", grad_clip=10.0, batch_size=50)
    assert report.results["test_accuracy"] > 0.5


@pytest.mark.slow
def test_network_computes_the_same_in_fp32_as_in_the_bf16_that_trained_it(folder):
    """Whitening magnifies what bf16 rounds off; a network that learns from that fails without."""
    settings = {"optimizer": "adam", "epochs": 6, "batch_size": 50, "image_size": 16}
    report = learn(precision="bf16", **settings)
    assert report.results["test_accuracy"] > report.history[-1]["valid_accuracy"] - 0.05


@pytest.mark.slow
def test_deterministic_runs_are_the_same(folder):
    flags = []

    def note_flag(*_):
        flags.append(torch.are_deterministic_algorithms_enabled())

    with beforehand(ic.Trainer, "train_step", note_flag):
        first, second = (learn(deterministic=True, epochs=1) for _ in range(2))
        assert all(flags) and flags
        learn(epochs=1, subset=100)
    assert not flags[-1]
    assert same(weights(first.run / "last.pth"), weights(second.run / "last.pth"))


def test_learning_rates_of_the_schedule_are_recorded(folder):
    history = learn(scheduler="step", epochs=4, lr=0.1, subset=200).history
    rates = [row["learning_rate"] for row in history]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001])


@pytest.mark.slow
def test_images_are_small_at_first(folder):
    sizes = []

    def note_size(network, images):
        sizes.append((network.training, int(images.shape[-1])))

    with beforehand(ic.CNN, "forward", note_size):
        learn(progressive_resizing=0.5, epochs=2, image_size=32, device="cpu")  # of 12 steps
    in_training = [size for training, size in sizes if training]
    assert in_training == [16] * 6 + [24] * 6 + [32] * 12
    begun = sizes.index((True, 16))  # before it the network was tried
    in_evaluation = [size for training, size in sizes[begun:] if not training]
    assert set(in_evaluation) == {24, 32}  # validation is on images as large as in training


@pytest.mark.slow
def test_early_stopping(folder):
    history = learn(early_stopping=2, epochs=40, subset=400).history
    losses = [row["valid_loss"] for row in history]
    assert len(losses) < 40 and len(losses) == losses.index(min(losses)) + 1 + 2


def test_recorded_loss_is_plain_cross_entropy(folder):
    """At a learning rate of 0 smoothing changes nothing else that is recorded."""
    losses = []
    for label_smoothing in (0.0, 0.5):
        still = {"lr": 0.0, "optimizer": "sgd", "epochs": 1, "subset": 200}
        report = learn(label_smoothing=label_smoothing, **still)
        losses.append(report.history[0]["train_loss"])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_label_smoothing_makes_predictions_less_confident(folder):
    confidences = []
    for label_smoothing in (0.0, 0.5):
        report = learn(label_smoothing=label_smoothing, batch_size=50)
        model, _ = ic.load_checkpoint(report.checkpoint)
        logits = ic.evaluate(model, *digits().test).logits
        confidences.append(logits.softmax(1).amax(1).mean())
    assert confidences[1] < confidences[0] - 0.1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_grad_clip_bounds_the_step(folder, precision):
    start = ic.build_model(ic.Config(width=0.25), digits(subset=600))
    plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "scheduler": "none"}
    report = learn(**plain, lr=1.0, grad_clip=1e-4, precision=precision, batch_size=50, epochs=1)
    trained = weights(report.checkpoint)
    squares = 0.0
    for name, value in start.named_parameters():
        squares += (trained[name] - value).square().sum().item()
    assert 1e-4 < squares**0.5 <= 12 * 1e-4 + 1e-6  # an epoch is 12 steps


@pytest.mark.slow
def test_class_balance_helps_the_rare_class(folder):
    data = digits()
    every_12th = torch.arange(len(data.train.labels)) % 12 == 0
    data.train = data.train.select((data.train.labels != 8) | every_12th)
    recalls = {}
    for class_balance in ("none", "weights", "oversample"):
        config = ic.Config(dataset="digits", width=0.25, epochs=4, batch_size=50, image_size=16)
        report = ic.train(replace(config, class_balance=class_balance), data)
        recalls[class_balance] = report.results["recall"]["8"]
    assert recalls["weights"] > recalls["none"]
    assert recalls["oversample"] > recalls["none"]


def test_undersampled_epoch_takes_as_many_images_of_each_class(folder):
    trainer = trainer_of(class_balance="undersample")
    rarest = int(trainer.train_set.labels.bincount().min())
    counts = trainer.train_set.labels[trainer.plan(0).order].bincount()
    assert counts.tolist() == [rarest] * 10
    assert trainer.batch_slices[-1].stop == 10 * rarest


@pytest.mark.slow
def test_model_of_every_epoch_is_kept_when_asked_for(folder):
    run = learn(epochs=3, subset=200, keep_epochs=True).run
    first, _, last = sorted(run.glob("epoch-*.pth"))
    assert [first.name, last.name] == ["epoch-0000.pth", "epoch-0002.pth"]
    assert same(weights(last), weights(run / "last.pth"))
    assert not same(weights(first), weights(last))
    assert not list(learn(epochs=1, subset=200).run.glob("epoch-*"))


def test_moving_average_is_evaluated_and_kept(folder):
    report = learn(ema=True, epochs=2, subset=400)
    last = torch.load(report.run / "last.pth", weights_only=True)
    average = {}
    for name, tensor in last["ema"].items():
        if name.startswith("module."):
            average[name.removeprefix("module.")] = tensor
    kept = weights(report.run / "best.pth")  # the second epoch is the better one
    assert kept.keys() == average.keys()
    assert same(kept, average) and not same(kept, last["model"])
    model, content = ic.load_checkpoint(report.checkpoint)
    valid = ic.evaluate(model, *digits(subset=400).valid)
    assert content["metrics"]["epoch"] == 1
    assert valid.loss == pytest.approx(report.history[-1]["valid_loss"], rel=0.02)


def test_confidence_is_calibrated_on_validation_images(folder):
    report = learn(epochs=1, batch_size=50, subset=800, val_fraction=0.3)
    model, content = ic.load_checkpoint(report.checkpoint)
    data = digits(subset=800, val_fraction=0.3)
    temperature = content["metrics"]["temperature"]
    assert temperature == report.results["temperature"]
    valid_logits = ic.evaluate(model, *data.valid).logits
    test_logits = ic.evaluate(model, *data.test).logits

    def loss(temperature):
        logits = valid_logits / temperature
        loss = torch.nn.functional.cross_entropy(logits, data.valid.labels, reduction="sum")
        # as if one more image had been of any class
        return loss.item() - logits.log_softmax(1).mean().item()

    assert 0.1 < temperature < 0.9  # trained with smoothed labels: too unsure
    assert loss(temperature) < min(loss(1.1 * temperature), loss(temperature / 1.1), loss(1.0))

    def error(temperature):
        confidences, predictions = (test_logits / temperature).softmax(1).max(1)
        gaps = confidences - (predictions == data.test.labels).float()
        bins = (15 * confidences).floor()
        return sum(abs(gaps[bins == low].sum().item()) for low in range(15)) / len(gaps)

    results = report.results
    assert results["calibration_error_before"] == pytest.approx(error(1.0), abs=1e-5)
    assert results["calibration_error"] == pytest.approx(error(temperature), abs=1e-5)
    assert error(temperature) < error(1.0)


def test_views_of_tta_are_mirrored_and_shifted():
    torch.manual_seed(0)
    config = ic.Config(width=0.25)
    model = ic.instantiate(config, 10, [0.5] * 3, [0.25] * 3, 32).eval()
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(6)

    padded = torch.nn.functional.pad(images.float(), (1, 1, 1, 1), "reflect").byte()
    up_left, down_right = padded[:, :, :32, :32], padded[:, :, 2:, 2:]
    views = [images, up_left, down_right]
    views += [view.flip(3) for view in views]
    logits = [ic.evaluate(model, view, labels).logits for view in views]
    plain, up_left, down_right, mirrored, mirrored_up, mirrored_down = logits
    two = ic.evaluate(model, images, labels, tta=2).logits
    torch.testing.assert_close(two, (plain + mirrored) / 2)
    six = ic.evaluate(model, images, labels, tta=6).logits
    shifted = up_left + mirrored_up + down_right + mirrored_down
    torch.testing.assert_close(six, (plain + mirrored) / 4 + shifted / 8)


@pytest.mark.slow
def test_test_labels_change_nothing_but_the_report(folder):
    config = ic.Config(dataset="digits", width=0.25, epochs=2, image_size=16, device="cpu")
    honest, wrong = ic.load_data(config), ic.load_data(config)
    wrong_labels = (honest.test.labels + 1) % 10
    wrong.load_test = lambda: Split(honest.test.images, wrong_labels)
    finished_when_opened = []

    def note_finished():
        finished_when_opened.append(len(list(folder.rglob("last.pth"))))

    with beforehand(wrong, "load_test", note_finished):
        first, second = ic.train(config, honest), ic.train(config, wrong)
    assert finished_when_opened == [2]  # once, after the second run's training
    assert without_time(first.history) == without_time(second.history)
    assert same(weights(first.run / "best.pth"), weights(second.run / "best.pth"))
    assert first.results["test_accuracy"] > 0.3
    assert second.results["test_accuracy"] < 0.2


def test_trial_run_does_everything_and_replaces_no_model(inside, folder):
    (folder / "model_cnn_digits.pth").write_text("precious")
    out, _ = inside("--dataset", "digits", "--fast-dev-run", "--repeat", "3", "--minutes", "5")
    assert (folder / "model_cnn_digits.pth").read_text() == "precious"
    run = only_run(folder)
    assert {path.name for path in run.iterdir()} >= FILES
    assert len(rows_of(run)) == 1 and "trial run" in out


@pytest.mark.parametrize("balance", ["none", "weights"])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(balance):
    gradients = []
    for parts in (1, 3):
        # without batch norm, which sees the micro-batch
        trainer = trainer_of(model="beginner-cnn", precision="fp32", class_balance=balance)
        trainer.state.model.eval()
        batch = trainer.plan(0).take(trainer.batch_slices[0])
        stats = trainer.forward_backward(trainer.state.model, batch, 1.0, parts)
        grads = [weight.grad.flatten() for weight in trainer.state.model.parameters()]
        gradients.append(torch.cat([*grads, stats.flatten()]))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.0])
def test_batch_norm_sees_micro_batches_of_one_size_at_every_resolution(scale):
    trainer = trainer_of(width=0.25, batch_size=100, micro_batch=30, precision="fp32")
    sizes = []
    model = trainer.state.model
    model.stages[0].norm1.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    trainer.compute_step(trainer.plan(0).take(slice(100)), scale)
    assert sizes == [25] * 4


def test_small_run_prints_a_note_on_its_batch_size(inside, folder):
    out, _ = inside(*SMALL, "--width", "0.25", "--subset", "40", "--batch-size", "60")
    assert re.search("^note: .*batch size is 40", out, re.MULTILINE)
    assert json.loads((only_run(folder) / "config.json").read_text())["batch_size"] == 40


# ---- What is compared over epochs ----------------------------------------------------------------

# With progressive resizing, more than 8 of these 12 epochs are on smaller images.
LONG = ["--dataset", "digits", "--epochs", "12", "--subset", "500", "--width", "0.25"]
LONG += ["--batch-size", "25"]


@pytest.mark.slow
def test_early_stopping_waits_for_whole_images(inside, folder):
    inside(*LONG, "--early-stopping", "1")
    run = only_run(folder)
    assert report_of(run)["test_accuracy"] > 0.9
    assert report_of(run)["epochs"] > 8
    scales = [float(row["image_scale"]) for row in rows_of(run)]
    assert scales == sorted(scales) and set(scales) == {0.5, 0.75, 1.0}


@pytest.mark.slow
def test_plateau_keeps_its_learning_rate_until_the_images_are_whole(inside, folder):
    inside(*LONG, "--scheduler", "plateau")
    run = only_run(folder)
    rates = [float(row["learning_rate"]) for row in rows_of(run)]
    assert rates[:8] == [rates[0]] * 8
    assert report_of(run)["test_accuracy"] > 0.9


@pytest.mark.slow
def test_images_in_validation_are_as_large_as_in_training(monkeypatch):
    sizes = []
    trainer = trainer_of(epochs=4, subset=400, width=0.25)
    forward = trainer.state.model.forward

    def note_size(images):
        sizes.append((trainer.state.model.training, images.shape[-1]))
        return forward(images)

    monkeypatch.setattr(trainer.state.model, "forward", note_size)
    heartbeat = Heartbeat(trainer.state, trainer.group, 0.7)
    for _ in range(4):
        sizes.clear()
        ic.train_one_epoch(trainer, heartbeat)
        trained_last = sizes[-1][1]
        sizes.clear()
        row, _ = ic.validate(trainer)
        assert {size for _, size in sizes} == {trained_last}
        assert row["image_scale"] == trained_last / 32
