"""Run folders: who gets which, what is written when, resuming, and signals that stop a run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from filelock import FileLock
from torch import nn

from classifier import distributed, runs
from classifier.checkpoints import read_checkpoint, save_checkpoint
from classifier.config import Config
from classifier.datasets import dataset
from classifier.datasets.dataset import Dataset, Split
from classifier.datasets.splits import ImageIds
from classifier.errors import Stopped, UsageError, UserError
from classifier.runs import Run, StopRequest, resume_config
from classifier.seen_images import digests_for_file

REPOSITORY = Path(runs.__file__).parent.parent
CLASSES = ["cat", "dog"]


def make_network():
    return nn.Linear(3, 2)


def make_content(network, **more):
    """What a model file holds; with more, what last.pth holds."""
    return {
        "model": network.state_dict(),
        "config": {},
        "classes": CLASSES,
        "mean": [0.5],
        "std": [0.25],
        "image_size": 8,
        "metrics": {},
        "versions": {"image_classification": "0.10.0"},
        **more,
    }


@pytest.fixture
def data():
    split = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    return Dataset(
        name="photos",
        classes=CLASSES,
        train=split,
        valid=split,
        load_test=lambda: split,
        num_test_images=4,
        flip_keeps_label=True,
        mean=[0.5, 0.4, 0.3],
        std=[0.25] * 3,
    )


@pytest.fixture
def run(folder):
    (folder / "run").mkdir()
    return Run(folder / "run")


# ---- folders and locks ----


def test_run_folders_are_distinct(folder):
    for name in "abcdef":  # one round misses a race about half the time
        with ThreadPoolExecutor(100) as pool:
            made = list(pool.map(lambda _, name=name: runs.new_run_folder("", name), range(100)))
        assert len(set(made)) == 100
        assert all(path.is_dir() and path.parent == Path("runs", name) for path in made)


def test_named_run_folder_is_not_taken_twice(folder):
    path = runs.new_run_folder("some/where", "digits")
    assert path == Path("some/where") and path.is_dir()
    (path / "samples.png").touch()
    assert runs.new_run_folder("some/where", "digits") == path  # it holds no run
    for name in ("config.json", "last.pth"):  # the latter of a run whose config.json is gone
        (path / name).touch()
        with pytest.raises(UserError, match="--run-dir"):
            runs.new_run_folder("some/where", "digits")
        (path / name).unlink()


HOLD_LOCK = """
import sys
sys.path.insert(0, {repository!r})
from pathlib import Path
from classifier.runs import Run
with Run(Path("run")):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_run_is_locked_against_other_processes(run):
    code = HOLD_LOCK.format(repository=str(REPOSITORY))
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process is training in"), run:
            pytest.fail("locked twice")
        with Run(run.path, is_main=False):  # a process that trains together with the other one
            pass
    with run:
        pass


def test_lock_is_released_after_an_error(run):
    with contextlib.suppress(ZeroDivisionError), run:
        raise ZeroDivisionError
    with FileLock(run.path / ".lock").acquire(timeout=0):
        pass


# ---- what is written, and when ----


def test_beginning_marks_a_run_as_unfinished(run, data):
    seed = run.path / "seed-3"
    seed.mkdir()
    other_run = run.path / "other"
    other_run.mkdir()
    digits = 32 * "a"  # as write_atomically makes them up
    leftovers = [run.path / f".last.pth.{digits}.tmp", seed / f".best.pth.{digits}.tmp"]
    others = [run.path / "metrics.csv", run.path / ".mine.tmp", other_run / f".x.{digits}.tmp"]
    for path in [*leftovers, *others, run.report_file]:
        path.touch()
    data.fallback_reason = "no network"
    run.begin(Config(lr=0.3, resume="somewhere"), data)
    assert not run.report_file.exists() and not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others)
    saved = json.loads(run.config_file.read_text())
    assert saved == asdict(Config(lr=0.3)) | {"resume": "", "substitution": "no network"}
    assert not (run.path / "data_report.json").exists()
    data.report = {"images": 4}
    run.begin(Config(), data)
    assert json.loads((run.path / "data_report.json").read_text()) == {"images": 4}


@pytest.mark.parametrize("is_best", [True, False])
@pytest.mark.parametrize("keep_epoch", [True, False])
def test_models_of_an_epoch(run, is_best, keep_epoch):
    run.save_epoch(3, make_content(make_network()), is_best, keep_epoch)
    expected = {"best.pth"} if is_best else set()
    if keep_epoch:
        expected.add("epoch-0003.pth")
    assert {path.name for path in run.path.iterdir()} == expected
    for name in expected:
        assert read_checkpoint(run.path / name)


def test_best_weights_come_back(run):
    best, latest = make_network(), make_network()
    content = make_content(best, epoch=1)
    run.save_epoch(0, content, is_best=True, keep_epoch=False)
    run.save_epoch(1, make_content(latest), is_best=False, keep_epoch=False)
    model = make_network()
    assert run.load_best(model)["epoch"] == 1
    assert torch.equal(model.weight, best.weight)
    with pytest.raises(UserError, match="another network"):
        run.load_best(nn.Linear(3, 5))


def test_other_processes_write_nothing(folder, data):
    (folder / "run").mkdir()
    other = Run(folder / "run", is_main=False)
    (folder / "run" / "report.json").touch()
    before = list(folder.rglob("*"))
    content = make_content(make_network())
    with other:
        other.begin(Config(), data)
        other.save_epoch(0, content, is_best=True, keep_epoch=True)
        other.save_last(content)
        other.seed_run(3)
        other.finish({})
    assert list(folder.rglob("*")) == before


def test_each_seed_has_its_own_folder(run):
    seed = run.seed_run(12)
    assert run.seed_run(12).path == seed.path == run.path / "seed-12" and seed.path.is_dir()
    seed.save_last(make_content(make_network()))
    seed.finish({"test_accuracy": 0.5})
    assert json.loads((run.path / "seed-12" / "report.json").read_text()) == {"test_accuracy": 0.5}
    assert runs.saved_states(run.path) == [run.path / "seed-12" / "last.pth"]
    assert not run.report_file.exists()


@pytest.mark.parametrize(
    ("error", "state", "is_kept"),
    [
        (ValueError("boom"), None, False),
        (UserError("boom"), None, False),
        (OSError(28, "No space left on device"), None, True),
        (ValueError("boom"), "last.pth", True),
        (ValueError("boom"), "seed-0/last.pth", True),
    ],
)
def test_run_that_failed_at_once_is_not_resumed(run, data, error, state, is_kept):
    run.begin(Config(), data)
    if state:
        (run.path / state).parent.mkdir(exist_ok=True)
        (run.path / state).touch()
    run.forget_if_nothing_saved(error)
    run.forget_if_nothing_saved(error)
    assert run.config_file.exists() == is_kept


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        (None, True),
        (ValueError("boom"), False),
        (OSError(28, "No space left on device"), True),
        (Stopped(signal.SIGINT), True),
        (KeyboardInterrupt(), True),
    ],
)
def test_error_while_the_lock_is_held_discards_a_run_without_a_state(run, data, error, is_kept):
    with contextlib.suppress(ValueError, OSError, Stopped, KeyboardInterrupt), run:
        run.begin(Config(), data)
        if error is not None:
            raise error
    assert run.config_file.exists() == is_kept


def test_only_the_states_of_this_run_count(folder):
    for name in ("last.pth", "seed-3/last.pth", "runs/CIFAR10/another/last.pth"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert runs.saved_states(folder) == [folder / "last.pth", folder / "seed-3" / "last.pth"]


# ---- settings of a run that is resumed ----


def write_run(path, finished_after=None, **settings):
    """A run folder: of an unfinished run, or of one that finished after so many epochs."""
    path.mkdir(parents=True)
    saved = asdict(Config(**settings)) | {"substitution": ""}
    (path / "config.json").write_text(json.dumps(saved))
    if finished_after is not None:
        (path / "report.json").write_text(json.dumps({"epochs": finished_after}))
    return path


def make_newest(path):
    os.utime(path / "config.json", (time.time() + 100, time.time() + 100))


def test_unfinished_run_is_resumed_with_its_settings(folder):
    settings = {"lr": 0.3, "epochs": 7, "minutes": 2.0, "early_stopping": 3, "ema": True}
    settings["drop_easiest"] = 0.3
    run = write_run(folder / "run", **settings)
    expected = Config(**settings, resume=str(run))
    assert resume_config(str(run)) == expected
    assert resume_config(str(run / "config.json")) == expected


def test_settings_that_may_change_do(folder):
    run = str(write_run(folder / "run", minutes=2.0))
    changes = {"epochs": 9, "data_dir": "there", "out": "there.pth", "debug": True}
    config = resume_config(run, mirror="https://a.b", **changes)
    for name, value in changes.items():
        assert getattr(config, name) == value
    assert config.mirror == "https://a.b"
    assert config.minutes == 0.0  # epochs are counted now


def test_other_changes_are_refused(folder):
    run = str(write_run(folder / "run", lr=0.3))
    assert resume_config(run, lr=0.3, seed=0).lr == 0.3  # these are the run's own
    for name, value in {
        "lr": 0.2,
        "ema": True,
        "seed": 5,
        "fast_dev_run": True,
        "grad_clip": 1.0,
        "progressive_resizing": 0.5,
        "recipe": "accuracy94",
    }.items():
        with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
            resume_config(run, epochs=3, **{name: value})


def test_folder_of_images_is_found_again(folder, monkeypatch):
    (folder / "photos").mkdir()
    run = str(write_run(folder / "run", dataset=str((folder / "photos").resolve())))
    expected = resume_config(run).dataset
    assert Path(resume_config(run, dataset="photos").dataset).resolve() == Path(expected)
    with pytest.raises(UsageError, match="--dataset"):
        resume_config(run, dataset="others")


def test_custom_network_is_named_again(folder):
    run = str(write_run(folder / "run", model="mine.py:small"))
    with pytest.raises(UserError, match="--model mine.py:small"):
        resume_config(run)
    assert resume_config(run, model="mine.py:small").model == "mine.py:small"
    with pytest.raises(UsageError, match="--model"):
        resume_config(run, model="other.py:small")
    assert resume_config(str(write_run(folder / "b", model="torchvision:resnet18")))


def test_finished_run_goes_on_only_for_more_epochs(folder):
    run = write_run(folder / "run", finished_after=4, early_stopping=2)
    for changes in ({}, {"epochs": 3}, {"epochs": 4}):
        with pytest.raises(UserError, match=r"--epochs N") as caught:
            resume_config(str(run), **changes)
        assert not isinstance(caught.value, UsageError)
    config = resume_config(str(run), epochs=5)
    assert config.epochs == 5
    assert config.early_stopping == 0  # it was stopped early, and is to be trained on


def test_newest_unfinished_run_goes_on(folder):
    first = write_run(Path("runs/digits/first"))
    second = write_run(Path("runs/CIFAR10/second"))
    finished = write_run(Path("runs/digits/finished"), finished_after=4)
    make_newest(second)
    assert resume_config("last").resume == str(second)
    (second / "report.json").write_text('{"epochs": 2}')
    assert resume_config("last").resume == str(first)
    make_newest(finished)
    assert resume_config("last", epochs=5).resume == str(finished)
    assert resume_config("last", epochs=3).resume == str(second)
    (first / "report.json").write_text('{"epochs": 2}')
    with pytest.raises(UserError, match="--resume last: no unfinished run in runs"):
        resume_config("last")


def test_trial_run_goes_on_only_if_named_and_unfinished(folder):
    trial = write_run(Path("runs/digits/trial"), fast_dev_run=True)
    with pytest.raises(UserError, match="no unfinished run"):
        resume_config("last", epochs=3)
    assert resume_config(str(trial)).fast_dev_run
    (trial / "report.json").write_text('{"epochs": 1}')
    with pytest.raises(UserError, match="no unfinished run"):
        resume_config(str(trial), epochs=3)


@pytest.mark.parametrize("resume", ["last", "nowhere", "."])
def test_missing_run_is_said(folder, resume):
    with pytest.raises(UserError, match=f"--resume {resume}: there is no run in"):
        resume_config(resume)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"dataset": '),
        ("config.json", "[1]"),
        ("report.json", "{}"),
        ("report.json", '{"epochs": "many"}'),
        ("report.json", "3"),
    ],
)
def test_damaged_files_are_named(folder, name, text):
    run = write_run(Path("runs/digits/run"), finished_after=2)
    (run / name).write_text(text)
    for resume in ("last", str(run)):
        with pytest.raises(UserError, match=rf"^\S*{name} is damaged"):
            resume_config(resume, epochs=3)


def test_settings_of_version_0_9_are_translated(folder):
    run = write_run(folder / "run")
    settings = json.loads((run / "config.json").read_text())
    old = {"low_res": 0.7, "test_views": 2, "scheduler": "onecycle", "label_smoothing": 0.2}
    new = {"progressive_resizing": 0.7, "tta": 2, "scheduler": "linear", "label_smoothing": 0.2}
    new["drop_easiest"] = 0.0  # it took all images
    for name in new.keys() | {"ema"}:
        del settings[name]  # ema: an even older version had no such setting
    settings |= old | {"depth": None, "make_imbalanced": 0.0, "long_gone": 1}
    (run / "config.json").write_text(json.dumps(settings))
    config = resume_config(str(run), tta=2)
    assert config == Config(**new, resume=str(run))
    (run / "config.json").write_text(json.dumps(settings | {"make_imbalanced": 0.1}))
    with pytest.raises(UserError, match=r"make_imbalanced.*0\.9\.1"):
        resume_config(str(run))


def test_finished_run_of_version_0_9_with_a_setting_that_is_gone_is_passed_over(folder):
    unfinished = write_run(Path("runs/digits/unfinished"))
    old = write_run(Path("runs/digits/old"), finished_after=3)
    settings = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(settings | {"depth": 4}))
    make_newest(old)
    assert resume_config("last").resume == str(unfinished)


# ---- can it go on with these images? ----


@pytest.fixture
def saved_run(run, data):
    data.fallback_reason = "no network"
    run.begin(Config(), data)
    run.save_last(make_content(make_network(), fingerprint=data.fingerprint()))
    data.fallback_reason = ""
    return run


def test_run_with_the_same_images_can_go_on(saved_run, data):
    before = {path.name: path.read_bytes() for path in saved_run.path.iterdir()}
    resumed = runs.check_resumable(saved_run.path, data, make_network)
    assert resumed.fallback_reason == "no network"
    assert data.fallback_reason == ""
    assert before == {path.name: path.read_bytes() for path in saved_run.path.iterdir()}


def test_run_without_a_state_starts_over_unless_it_is_finished(saved_run, data):
    saved_run.last.unlink()
    runs.check_resumable(saved_run.path, data, make_network)
    saved_run.finish({"epochs": 3})
    with pytest.raises(UserError, match=r"last\.pth"):
        runs.check_resumable(saved_run.path, data, make_network)


def test_run_of_another_network_or_classes_cannot_go_on(saved_run, data):
    with pytest.raises(UserError, match="another network"):
        runs.check_resumable(saved_run.path, data, lambda: nn.Linear(3, 5))
    data.classes = ["cat", "cow"]
    with pytest.raises(UserError, match="cat, dog"):
        runs.check_resumable(saved_run.path, data, make_network)


@pytest.mark.parametrize("where", ["last.pth", "seed-2/last.pth"])
def test_run_with_other_images_cannot_go_on(saved_run, data, where):
    content = make_content(make_network(), fingerprint=[4, 0.5, 0.4, 0.31])
    (saved_run.path / "seed-2").mkdir()
    save_checkpoint(saved_run.path / where, content)
    with pytest.raises(UserError, match="images"):
        runs.check_resumable(saved_run.path, data, make_network)
    assert data.fallback_reason == ""
    content["fingerprint"] = data.fingerprint()[:-1]  # version 0.9.1 knew number and mean
    save_checkpoint(saved_run.path / where, content)
    runs.check_resumable(saved_run.path, data, make_network)
    del content["fingerprint"]  # an older version saved none
    save_checkpoint(saved_run.path / where, content)
    runs.check_resumable(saved_run.path, data, make_network)


@pytest.mark.parametrize("fingerprint", [[4, 0.5, 0.4, 0.31], None])
def test_run_of_a_version_that_drew_otherwise_cannot_go_on(saved_run, data, fingerprint):
    """Version 0.9.0 saved no fingerprint."""
    content = make_content(make_network())
    if fingerprint is not None:
        content["fingerprint"] = fingerprint
    save_checkpoint(saved_run.path / "last.pth", content)
    drawn = replace(data, drawn=("testing", "validation"))
    with pytest.raises(UserError, match="older version.* testing and validation"):
        runs.check_resumable(saved_run.path, drawn, make_network)
    # the same images, as where --subset holds all of them
    content["fingerprint"] = data.fingerprint()[:4]
    save_checkpoint(saved_run.path / "last.pth", content)
    runs.check_resumable(saved_run.path, drawn, make_network)


@pytest.mark.parametrize(
    ("digests", "labels", "said"),
    [
        ([1, 2, 3, 9], [0, 1, 0, 1], "1 of 4 .*1 are new"),
        ([1, 2, 3, 4], [1, 0, 0, 1], "classes"),
    ],
)
def test_how_the_images_differ_is_said(saved_run, data, digests, labels, said):
    def with_digests(digests, labels):
        ids = ImageIds(torch.tensor(digests), torch.tensor(digests))
        images = torch.tensor(digests, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
        train = Split(images, torch.tensor(labels))
        return replace(data, train=train, train_ids=ids, drawn=("testing",))

    then = with_digests([1, 2, 3, 4], [0, 1, 0, 1])
    content = make_content(
        make_network(),
        fingerprint=then.fingerprint(),
        split_rules=dataset.SPLIT_RULES,
        **digests_for_file(then),
    )
    save_checkpoint(saved_run.path / "last.pth", content)
    runs.check_resumable(saved_run.path, then, make_network)
    with pytest.raises(UserError, match=f"images are not those .*{said}"):
        runs.check_resumable(saved_run.path, with_digests(digests, labels), make_network)
    valid = Split(data.valid.images, 1 - data.valid.labels)
    with pytest.raises(UserError, match="images are not those .*validation"):
        runs.check_resumable(saved_run.path, replace(then, valid=valid), make_network)


def test_rules_of_splitting_are_read_when_they_are_needed(saved_run, data, monkeypatch):
    content = make_content(make_network(), fingerprint=[1.0], split_rules=dataset.SPLIT_RULES)
    save_checkpoint(saved_run.last, content)
    drawn = replace(data, drawn=("testing",))
    for rules, said in ((dataset.SPLIT_RULES, "not those"), (99, "older version")):
        monkeypatch.setattr(dataset, "SPLIT_RULES", rules)
        with pytest.raises(UserError, match=said):
            runs.check_resumable(saved_run.path, drawn, make_network)


def test_damaged_state_is_named(saved_run, data):
    saved_run.last.write_bytes(saved_run.last.read_bytes()[:500])
    with pytest.raises(UserError, match=r"last\.pth is damaged"):
        runs.check_resumable(saved_run.path, data, make_network)


# ---- signals ----


def handlers():
    return [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_recorded_and_handlers_are_restored(signum):
    before = handlers()
    with contextlib.suppress(ZeroDivisionError), StopRequest() as stop:
        assert not stop.requested and stop.signals == []
        signal.raise_signal(signum)
        assert stop.requested and stop.signum == signum and stop.signals == [signum]
        raise ZeroDivisionError
    assert handlers() == before


def test_second_ctrl_c_interrupts():
    before = handlers()
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # more of these only ask again
        assert stop.signals == [signal.SIGTERM] * 2
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not interrupted")
    assert handlers() == before


def test_second_ctrl_c_calls_what_was_given():
    calls = []
    with StopRequest(lambda: calls.append("second")) as stop:
        signal.raise_signal(signal.SIGINT)
        assert calls == []
        signal.raise_signal(signal.SIGINT)
        assert calls == ["second"] and stop.signum == signal.SIGINT


def test_second_ctrl_c_under_torchrun_may_be_the_first_passed_on(monkeypatch):
    monkeypatch.setattr(distributed, "LAUNCHED", True)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert len(stop.signals) == 2


def test_stop_that_came_to_another_process_counts_as_sigterm():
    assert StopRequest().signum == signal.SIGTERM


def test_ignored_signals_stay_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's background jobs have it
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
            signal.raise_signal(signal.SIGTERM)
            assert stop.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_change_no_handler():
    before, entered = handlers(), []

    def enter():
        with StopRequest() as stop:
            entered.append((stop.requested, handlers() == before))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [(False, True)]


WAIT = """
import os, sys, time
sys.path.insert(0, {repository!r})
from classifier.runs import StopRequest
with StopRequest(lambda: os._exit(130)) as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("stopping after", stop.signum, flush=True)
    time.sleep({seconds})
print("stopped", flush=True)
"""


def start_waiting(seconds):
    code = WAIT.format(repository=str(REPOSITORY), seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_real_signal_ends_a_process_in_its_own_time(signum):
    process = start_waiting(seconds=0.2)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert out.splitlines() == [f"stopping after {int(signum)}", "stopped"]
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_second_real_ctrl_c_quits_at_once():
    process = start_waiting(seconds=90)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline().startswith("stopping")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 130 and out == ""
