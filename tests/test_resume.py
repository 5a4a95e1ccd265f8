"""Runs that are stopped, killed or extended, and go on as if nothing had happened."""

import functools
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import (
    QUICK,
    SMALL,
    beforehand,
    epochs_of,
    events_of,
    only_run,
    report_of,
    rows_of,
    same,
    shared_folder,
    state_of,
    wait_for,
    weights,
    without_time,
    write_images,
)
from filelock import FileLock

import image_classification as ic
from classifier import cuda_graphs, reports, runs
from classifier.datasets import download, load
from classifier.run_log import RunLog
from classifier.time_budget import TimeBudget

FIXTURES = Path(__file__).with_name("fixtures") / "0.9.1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())

LONGER = [*QUICK, "--epochs", "4", "--batch-size", "10", "--device", "cpu"]  # 20 steps an epoch

NETWORK = """
from torch import nn

def small(classes=10, channels=3, image_size=32):
    inputs = channels * image_size**2 // 16
    hidden = nn.Linear(inputs, 32)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), hidden, nn.ReLU(), nn.Linear(32, classes))
"""

no_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")


@pytest.fixture
def stopped(inside):
    """A function that runs the program with Ctrl-C in step number `step`; returns its output."""

    def run(step, *arguments):
        steps = itertools.count(1)

        def interrupt(*_):
            if next(steps) == step:
                signal.raise_signal(signal.SIGINT)

        with beforehand(ic.Trainer, "train_step", interrupt):
            return inside(*arguments, status=130)[0]

    return run


def as_if_killed(run):
    """Make a finished run an unfinished one, of which only the report is missing."""
    (run / "report.json").unlink()


# ---- Bit for bit ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The final state of an undisturbed run with the settings LONGER."""
    with shared_folder(tmp_path_factory, "unbroken") as folder:
        if not (folder / "model_cnn_digits.pth").exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                assert ic.main(LONGER) == 0
    return state_of(only_run(folder))


def check_same_state(first, second):
    assert without_time(first["history"]) == without_time(second["history"])
    assert same(first["model"], second["model"])


@no_signals
@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_stopped_run_goes_on_bit_for_bit(program, inside, folder, unbroken, signum, status):
    process = program.start(*LONGER)
    next(line for line in process.stdout if line.startswith("Epoch 0000"))
    time.sleep(0.1)  # into the next epoch
    process.send_signal(signum)
    out, _ = program.finish(process, status, timeout=60)
    command = re.search(r"Resume with: .+image_classification.py\"? (--resume \S+)", out).group(1)
    state = state_of(only_run(folder))
    assert 20 <= state["step"] < 4 * 20
    out, _ = inside(*command.split())
    assert f"Resuming after step {state['step']} of {state['total_steps']}\n" in out
    check_same_state(state_of(only_run(folder)), unbroken)
    assert (folder / "model_cnn_digits.pth").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no SIGKILL")
@pytest.mark.parametrize(
    "moment", [pytest.param("config.json", marks=pytest.mark.slow), "last.pth"]
)
def test_killed_run_goes_on_bit_for_bit(program, inside, folder, unbroken, moment):
    # last.pth comes after the first step
    process = program.start(*LONGER, patch="from classifier import runs; runs.SAVE_EVERY = 0.0")
    wait_for(lambda: list(folder.glob(f"runs/*/*/{moment}")))
    process.kill()
    process.communicate()
    inside("--resume", "last")
    check_same_state(state_of(only_run(folder)), unbroken)


@pytest.mark.parametrize("step", [30, pytest.param(40, marks=pytest.mark.slow)])
def test_run_stopped_at_any_step_goes_on_bit_for_bit(inside, folder, stopped, unbroken, step):
    """Amid an epoch, and in its last step."""
    stopped(step, *LONGER)
    assert state_of(only_run(folder))["step"] == step
    inside("--resume", "last")
    check_same_state(state_of(only_run(folder)), unbroken)


@pytest.mark.slow
def test_moving_average_and_scaler_go_on(inside, folder, stopped):
    settings = [*QUICK, "--batch-size", "50", "--ema", "--precision", "fp16", "--dropout", "0.2"]
    inside(*settings, "--run-dir", "unbroken")
    stopped(5, *settings, "--run-dir", "stopped")
    inside("--resume", "stopped")
    first, second = state_of(folder / "unbroken"), state_of(folder / "stopped")
    check_same_state(first, second)
    assert same(first["ema"], second["ema"])
    assert first["scaler"] == second["scaler"] and first["scaler"]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("owner", "name"), [(ic, "test"), (reports, "write_report"), (RunLog, "report")]
)
def test_stop_while_testing_is_no_finished_run(inside, folder, owner, name, signum, status):
    """The training is done; the resumed run tests, and equals the unbroken one."""
    brief = [*QUICK, "--epochs", "1"]
    inside(*brief, "--run-dir", "unbroken")
    with beforehand(owner, name, lambda *_, **__: signal.raise_signal(signum)):
        out, _ = inside(*brief, status=status)
    run = only_run(folder)
    assert not (run / "report.json").exists()
    command = re.search(r"Resume with: .+image_classification.py\"? (--resume .+)", out)[1]
    assert command.endswith(str(run.relative_to(folder)))
    (folder / "model_cnn_digits.pth").unlink()
    out, _ = inside("--resume", "last")
    assert "Epoch 0000" not in out and "Finished Training" in out
    check_same_state(state_of(run), state_of(folder / "unbroken"))
    report, unbroken = report_of(run), report_of(folder / "unbroken")
    assert {name for name in unbroken if report[name] != unbroken[name]} <= {"seconds"}
    assert (folder / "model_cnn_digits.pth").exists()


def test_stop_when_the_run_is_finished_is_said(inside, folder):
    interrupt = functools.partial(signal.raise_signal, signal.SIGINT)
    with beforehand(reports, "export_model", lambda *_: interrupt()):
        out, _ = inside(*QUICK, "--epochs", "1")
    assert "note: " in out and "complete" in out and "Done in" in out
    assert report_of(only_run(folder)) and (folder / "model_cnn_digits.pth").exists()


@pytest.mark.skipif(os.name != "posix", reason="there //folder is a folder of this machine")
def test_resume_command_of_a_run_with_network_paths_works(inside, folder):
    """Before anything was saved: the starting weights are read again."""
    write_images(folder / "my photos", {"red": 20, "green": 20})
    inside(*QUICK, "--epochs", "1", "--out", "start.pth")
    settings = ["--dataset", f"/{folder}/my photos", "--init-from", f"/{folder}/start.pth"]
    settings += ["--data-dir", f"/{folder}/decoded", "--image-size", "16", "--epochs", "1"]
    settings += ["--width", "0.25"]
    with beforehand(runs.Run, "begin", lambda *_: signal.raise_signal(signal.SIGINT)):
        out, _ = inside(*settings, "--run-dir", "run", status=130)
    shutil.rmtree(folder / "run" / "seed-0", ignore_errors=True)
    (folder / "run" / "last.pth").unlink(missing_ok=True)
    command = shlex.split(re.search(r"Resume with: (.+)", out)[1])
    inside(*command[2:])
    assert report_of(folder / "run") and not (folder / "data").exists()


@pytest.mark.slow
def test_stop_while_the_last_seed_is_tested(inside, folder):
    calls = itertools.count(1)

    def interrupt(*_):
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    with beforehand(ic, "test", interrupt):
        inside(*QUICK, "--epochs", "1", "--repeat", "2", "--run-dir", "run", status=130)
    assert not (folder / "run" / "report.json").exists()
    inside("--resume", "run")
    assert len(report_of(folder / "run")["repeats"]) == 2


@pytest.mark.slow
@no_signals
def test_second_ctrl_c_quits_at_once(program):
    patch = """
import time
train_step = ic.Trainer.train_step

def slow_step(trainer, batch):
    time.sleep(90)
    return train_step(trainer, batch)

ic.Trainer.train_step = slow_step
"""
    process = program.start(*LONGER, patch=patch)
    next(line for line in process.stdout if line.startswith("digits: "))
    time.sleep(1)  # into its first step
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it wants to finish its step
    process.send_signal(signal.SIGINT)
    program.finish(process, 130, timeout=10)


# ---- What a run goes on with ---------------------------------------------------------------------


def test_stop_at_the_end_of_an_epoch_loses_none(inside, folder, stopped):
    stopped(4, *QUICK, "--subset", "40", "--batch-size", "40", "--epochs", "6")  # one step an epoch
    run = only_run(folder)
    assert epochs_of(run) == [0, 1, 2, 3]
    inside("--resume", "last")
    assert epochs_of(run) == list(range(6))


@pytest.mark.slow
def test_interrupted_extension_goes_on(inside, folder, stopped):
    inside(*QUICK)
    stopped(3, "--resume", "last", "--epochs", "4")  # within an epoch of 4 steps
    assert state_of(only_run(folder))["step"] == 8 + 3
    inside("--resume", "last")
    assert epochs_of(only_run(folder)) == [0, 1, 2, 3]


@pytest.mark.slow
def test_run_that_stopped_early_is_trained_on(inside, folder):
    still = ["--lr", "0", "--optimizer", "sgd"]
    inside(*QUICK, *still, "--epochs", "9", "--early-stopping", "1")
    done = len(epochs_of(only_run(folder)))
    assert done < 9
    # fewer than it was to have, more than it had
    inside("--resume", "last", "--epochs", str(done + 2))
    assert epochs_of(only_run(folder)) == list(range(done + 2))


@pytest.mark.slow
def test_finished_run_is_extended_and_other_changes_are_refused(inside, folder):
    inside(*QUICK)
    run, longer = only_run(folder), ["--resume", "last", "--epochs", "4"]
    assert "--resume last" in inside.error("--resume", "last")
    error = inside.error(*longer, "--lr", "0.3", status=2)
    assert "--lr 0.3" in error and "0.12" in error
    before = [(run / name).read_bytes() for name in ("report.json", "config.json")]
    for change in (["--seed", "5"], ["--ema"], ["--grad-clip", "1"], ["--fast-dev-run"]):
        assert change[0] in inside.error(*longer, *change, status=2)
    assert before == [(run / name).read_bytes() for name in ("report.json", "config.json")]
    out, _ = inside("--resume", run / "last.pth", "--epochs", "4", "--seed", "0")
    assert "Epoch 0001" not in out and "Epoch 0002" in out and "Epoch 0003" in out
    assert epochs_of(run) == [0, 1, 2, 3]
    for path in (run, run / "valid"):
        assert [event.step for event in events_of(path).Scalars("loss")] == [0, 1, 2, 3]


@pytest.mark.slow
def test_resumed_epoch_is_once_in_tensorboard(inside, folder):
    def disk_is_full(run, state):
        if len(state["history"]) == 2:
            raise OSError(28, "No space left on device", str(run.last))

    with beforehand(runs.Run, "save_last", disk_is_full):
        inside.error(*QUICK, "--epochs", "3")
    time.sleep(1.1)  # event files are named by the second
    inside("--resume", "last")
    for path in (only_run(folder), only_run(folder) / "valid"):
        assert [event.step for event in events_of(path).Scalars("loss")] == [0, 1, 2]


def test_run_with_minutes_goes_on_with_its_number_of_steps(inside, folder, stopped):
    stopped(7, *QUICK, "--minutes", "1000", "--progressive-resizing", "0")
    total_steps = state_of(only_run(folder))["total_steps"]
    assert total_steps > 8
    path = only_run(folder) / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"minutes": 0.001}))  # not so long here
    out, _ = inside("--resume", "last")
    assert f"Resuming after step 7 of {total_steps}\n" in out
    assert state_of(only_run(folder))["step"] < total_steps


def test_epoch_that_minutes_ended_early_goes_on_and_counts_all_its_steps(
    inside, folder, monkeypatch
):
    monkeypatch.setattr(TimeBudget, "total_steps", lambda *_: 10)
    inside(*QUICK, "--minutes", "1", "--batch-size", "50")  # epochs are 4 steps here
    assert len(rows_of(only_run(folder))) == 3
    stats = []

    def note_stats(run, state):
        stats.append(state["step_stats"].clone())

    with beforehand(runs.Run, "save_last", note_stats):
        inside("--resume", "last", "--epochs", "4")
    assert epochs_of(only_run(folder)) == [0, 1, 2, 3] and len(stats) == 2
    assert all((each[:, 0] != 0).all() for each in stats)


def test_state_from_a_gpu_goes_on_on_a_cpu(inside, folder):
    """There the learning rate of Muon is a tensor, and AdamW is capturable."""
    inside(*QUICK, "--run-dir", "run")
    state = state_of(folder / "run")
    for optimizer in state["optimizers"]:
        for group in optimizer["param_groups"]:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    state["optimizers"][-1]["param_groups"][0]["capturable"] = True
    torch.save(state, folder / "run" / "last.pth")
    inside("--resume", "run", "--epochs", "3")
    assert epochs_of(folder / "run") == [0, 1, 2]


def test_run_from_another_machine_goes_on_as_suits_this_one_and_says_so(inside, folder):
    inside(*QUICK)
    run = only_run(folder)
    state = state_of(run)
    state["environment"]["hardware"] = "another machine"
    state["micro_batches"] = {0.5: 77, 0.75: 77, 1.0: 77}
    del state["fingerprint"]  # as in version 0.9.0
    torch.save(state, run / "last.pth")
    settings = json.loads((run / "config.json").read_text())
    del settings["ema"]
    (run / "config.json").write_text(json.dumps(settings | {"unknown": 1}))
    out, _ = inside("--resume", "last", "--epochs", "3")
    assert "note: hardware was another machine, is " in out
    assert max(state_of(run)["micro_batches"].values()) < 77 and epochs_of(run) == [0, 1, 2]


@pytest.mark.slow
def test_newest_unfinished_run_goes_on(inside, folder):
    briefly = [*QUICK, "--subset", "100", "--epochs", "1"]
    for name in ("first", "second"):
        inside(*briefly, "--run-dir", f"runs/digits/{name}")
        as_if_killed(folder / "runs" / "digits" / name)
        time.sleep(0.05)
    for name in ("second", "first"):
        out, _ = inside("--resume", "last")
        assert f"Writing to {os.path.join('runs', 'digits', name)}" in out


@pytest.mark.slow
def test_trial_run_is_resumed_only_by_name_and_not_extended(inside, folder):
    inside(*QUICK, "--run-dir", "runs/digits/real")
    inside(*QUICK[:2], "--fast-dev-run", "--run-dir", "runs/digits/trial")
    trial = folder / "runs" / "digits" / "trial"
    out, _ = inside("--resume", "last", "--epochs", "3")
    assert "Writing to runs/digits/real" in out.replace(os.sep, "/")
    assert str(trial) in inside.error("--resume", trial, "--epochs", "3")
    as_if_killed(trial)
    assert "--resume last" in inside.error("--resume", "last")
    inside("--resume", trial)


def test_run_that_failed_at_once_is_not_resumed(inside, folder):
    inside(*QUICK, "--epochs", "1")
    as_if_killed(only_run(folder))
    with mock.patch.object(ic.Trainer, "compute_step", side_effect=ValueError("boom")):
        assert "boom" in inside.error(*QUICK)
    out, _ = inside("--resume", "last")
    assert f"Writing to {only_run(folder).relative_to(folder)}" in out


@pytest.mark.slow
def test_offline_trains_on_digits_and_stays_with_them(inside, folder, monkeypatch):
    monkeypatch.setattr(download, "SOURCES", ["http://127.0.0.1:9/a.tar.gz"])  # nobody listens
    out, _ = inside(*QUICK[2:])
    outs = [out]
    assert out.index("*** CIFAR-10 ") < out.index("Start Training")
    run = only_run(folder)
    assert run.parent.name == "digits" and (folder / "model_cnn_digits.pth").exists()
    monkeypatch.setattr(load, "find_cifar10", lambda *_: pytest.fail("asked for again"))
    as_if_killed(run)
    for path in run.glob("*.pth"):  # before its first checkpoint
        path.unlink()
    outs.append(inside("--resume", "last")[0])
    outs.append(inside("--resume", "last", "--epochs", "3")[0])
    for out in outs:
        assert "digits, because CIFAR-10 " in re.search("Accuracy of the network.*", out)[0]
        assert out.index("*** This model knows digits") > out.index("Trained on")
    reason = report_of(run)["substituted_for"]
    assert reason.startswith("CIFAR10: ") and epochs_of(run) == [0, 1, 2]
    refused = "actively refused" if sys.platform == "win32" else "Connection refused"
    assert refused in reason


def test_custom_network_is_named_in_the_resume_command(inside, folder, stopped):
    (folder / "mine.py").write_text(NETWORK)
    out = stopped(5, *SMALL, "--model", "mine.py:small")
    command = out.rpartition("Resume with: ")[2]
    options = command.partition("image_classification.py")[2].split()
    assert options[2:] == ["--model", "mine.py:small"]
    inside(*options)
    assert epochs_of(only_run(folder)) == [0, 1]


# ---- What cannot be resumed ----------------------------------------------------------------------


def test_run_that_cannot_go_on_is_named(inside, folder):
    run = folder / "runs" / "digits" / "run"
    briefly = [*QUICK, "--subset", "100", "--epochs", "1"]
    inside(*briefly, "--run-dir", run)
    assert str(run) in inside.error(*briefly, "--run-dir", run)
    state, settings, report = (run / name for name in ("last.pth", "config.json", "report.json"))
    whole = {path: path.read_bytes() for path in (state, settings)}
    state.unlink()
    error = inside.error("--resume", run, "--epochs", "9")
    assert str(run) in error and "last.pth" in error and report.exists()
    report.unlink()
    for path, damaged in {state: whole[state][:2000], settings: b'{"dataset": '}.items():
        path.write_bytes(damaged)
        error = inside.error("--resume", "last")
        assert path.name in error and "damaged" in error
        path.write_bytes(whole[path])
    with FileLock(run / ".lock"):
        assert os.path.join("runs", "digits", "run") in inside.error("--resume", "last")
    inside("--resume", "last")


def test_finished_run_whose_network_changed_keeps_its_report(inside, folder):
    (folder / "mine.py").write_text(NETWORK)
    inside(*SMALL, "--model", "mine.py:small")
    report = (only_run(folder) / "report.json").read_bytes()
    more = ["--resume", "last", "--epochs", "4"]
    (folder / "mine.py").write_text("raise SystemError('executed')")
    assert "--model mine.py:small" in inside.error(*more)  # and does not import it
    (folder / "mine.py").write_text(NETWORK.replace("nn.ReLU()", "nn.Linear(32, 32)"))
    assert "last.pth" in inside.error(*more, "--model", "mine.py:small")
    assert (only_run(folder) / "report.json").read_bytes() == report


# ---- Runs of version 0.9.1 -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("run_ema", marks=pytest.mark.slow),
        pytest.param("run_adamw", marks=pytest.mark.slow),
        "run_micro_batches",
    ],
)
def test_run_of_version_0_9_1_goes_on_to_its_losses(inside, folder, name):
    shutil.copytree(FIXTURES / name, folder / name)
    out, _ = inside("--resume", name)
    expected = EXPECTED["metrics"][name]
    first_trained = 1 if name == "run_micro_batches" else 2
    assert f"Epoch {first_trained - 1:04d}" not in out and f"Epoch {first_trained:04d}" in out
    rows = rows_of(folder / name)
    assert len(rows) == len(expected)
    for row, old in zip(rows, expected, strict=True):
        for column, value in old.items():
            if column.startswith("valid_") and float(row["image_scale"]) < 1:
                continue  # version 0.9 validated on full-size images
            # an image or two may fall on the other side of a decision
            tolerance = 0.02 if "accuracy" in column else 1e-3
            assert float(row[column]) == pytest.approx(value, abs=tolerance), column
    report, old_report = report_of(folder / name), EXPECTED["report"][name]
    assert report["test_loss"] == pytest.approx(old_report["test_loss"], abs=1e-3)
    assert report["test_accuracy"] == pytest.approx(old_report["test_accuracy"], abs=0.01)
    settings = json.loads((folder / name / "config.json").read_text())
    assert settings["scheduler"] == "linear" and settings["progressive_resizing"] == 0.7
    assert "low_res" not in settings


@pytest.mark.parametrize(("name", "setting"), [("depth", "depth"), ("imbalanced", "imbalanced")])
def test_run_of_version_0_9_1_with_a_setting_that_is_gone_is_refused(inside, folder, name, setting):
    shutil.copytree(FIXTURES / f"run_{name}", folder / "run")
    before = {path.name: path.read_bytes() for path in (folder / "run").iterdir()}
    error = inside.error("--resume", "run")
    assert setting in error and "0.9.1" in error
    after = {path.name: path.read_bytes() for path in (folder / "run").iterdir()}
    assert before == after


# ---- Recorded steps ------------------------------------------------------------------------------


@pytest.mark.slow
def test_recordings_are_made_anew_in_a_resumed_run(inside, folder, stopped, monkeypatch, unbroken):
    """In place of CUDA's recordings, a function repeats the work."""

    def capture(work, pool):
        result = torch.zeros(0)

        def replay():
            replays.append(1)
            output = work()
            result.resize_(output.shape).copy_(output)

        return replay, result

    replays = []
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda *_: True)
    stopped(30, *LONGER)
    assert len(replays) > 10
    inside("--resume", "last")
    assert len(replays) > 25
    check_same_state(state_of(only_run(folder)), unbroken)


def test_best_model_of_a_resumed_run_is_the_one_of_all_its_epochs(inside, folder, stopped):
    """A network that gets worse after it was resumed keeps the weights of before."""
    still = ["--optimizer", "sgd", "--lr", "1e-9", "--scheduler", "none"]
    stopped(5, *QUICK, *still)
    run = only_run(folder)
    best = weights(run / "best.pth")
    with mock.patch.object(ic, "validate", worse(ic.validate)):
        inside("--resume", "last")
    assert same(weights(run / "best.pth"), best)
    assert epochs_of(run) == [0, 1]


def worse(validate):
    """A validation with a loss that is 1 higher than it was."""

    def validate_worse(trainer):
        row, logits = validate(trainer)
        row["valid_loss"] += 1
        return row, logits

    return validate_worse
