"""tune.py: as a user runs it, in processes of its own; what only fails or is quick also in this one."""

import argparse
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import optuna
import pytest
from conftest import QUICK, events_of, only_run, rows_of, tool, wait_for
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState

import image_classification as ic
import tune

# Optimiser, rate, decay, dropout and augmentation remain to be searched.
FAST = [*QUICK, "--batch-size", "100", "--device", "cpu"]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")
STUDY = Path("runs", "tune", "digits-cnn")


def trials_of(folder):
    """What the study's journal holds at this moment."""
    path = folder / STUDY / "journal.log"
    if not path.exists() or not path.stat().st_size:
        return []
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.load_study(study_name=STUDY.name, storage=storage).trials


def numbers(out):
    return [int(number) for number in re.findall(r"^Trial (\d+): ", out, re.MULTILINE)]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with a study of four trials, and what the search printed."""
    folder = tmp_path_factory.mktemp("searched")
    return folder, tool("tune", folder)(*FAST, "--trials", "4")[0]


@pytest.fixture
def here(tool_inside):
    """tune.py in this process: a function that takes its options and returns (standard output, standard error)."""
    return tool_inside("tune")


def test_best_is_named_and_is_what_the_program_then_trains(searched, inside, monkeypatch):
    folder, out = searched
    monkeypatch.chdir(folder)
    assert numbers(out) == [0, 1, 2, 3]
    assert re.search(r"^Trial 0: \d+\.\d % \(best \d+\.\d %, trial 0\)  the defaults$", out, re.MULTILINE)
    recipe = json.loads((folder / STUDY / "best.json").read_text())
    fixed = {"dataset": "digits", "subset": 400, "epochs": 2, "width": 0.25, "batch_size": 100}
    assert recipe.items() >= fixed.items() and "minutes" not in recipe
    trials = trials_of(folder)
    best = max((trial for trial in trials if trial.state == TrialState.COMPLETE), key=lambda trial: trial.value)
    assert trials[0].user_attrs["defaults"] and not trials[0].params
    assert f"Best: trial {best.number}, {ic.percent(best.value)} of the " in out
    gain = 100 * (best.value - trials[0].value)
    better, none = f"That is {gain:.1f} percentage points better", "No trial was better than the defaults: train with"
    assert (better if best.number else none) in out
    assert f"python image_classification.py --recipe {STUDY / 'best.json'}" in out
    options = out.partition("The same: python image_classification.py ")[2].split("\n")[0].split()
    assert ic.configure(**ic.parse(options)[1]) == ic.configure(**recipe)
    inside("--recipe", STUDY / "best.json")
    assert json.loads((only_run(folder) / "config.json").read_text()).items() >= recipe.items()
    kept = min(rows_of(only_run(folder)), key=lambda row: float(row["valid_loss"]))
    assert float(kept["valid_accuracy"]) == pytest.approx(best.value)


def test_trials_are_in_the_hparams_tab(searched):
    from tensorboard.plugins.hparams import metadata

    folder, _ = searched
    for trial in [trial for trial in trials_of(folder) if trial.state == TrialState.COMPLETE]:
        events = events_of(folder / STUDY / f"trial-{trial.number:04d}")
        start = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
        values = metadata.parse_session_start_info_plugin_data(start).hparams
        for name, value in trial.user_attrs["settings"].items():
            kind = "string_value" if isinstance(value, str) else "number_value"
            assert getattr(values[name], kind) == value
        assert values["batch_size"].number_value == 100
        assert events.Scalars("validation accuracy")[-1].value == pytest.approx(trial.value)
        assert len(events.Scalars("accuracy")) == len(trial.intermediate_values) == 2


def test_more_trials_go_on_and_other_settings_are_refused(searched, here, folder):
    shutil.copytree(searched[0], folder, dirs_exist_ok=True)
    out, _ = here(*FAST, "--trials", "6")
    assert numbers(out) == [4, 5]
    assert "which has 4 of the trials already" in out
    params = [tuple(trial.user_attrs["settings"].items()) for trial in trials_of(folder)]
    assert len(set(params)) == 6  # nothing is drawn twice
    _, err = here(*FAST, "--epochs", "3", status=2)
    assert "--epochs 2" in err and "--study" in err


@POSIX
def test_stopped_search_goes_on(here, folder):
    settings, program = [*FAST, "--epochs", "8"], tool("tune", folder)
    process = program.start(*settings, "--trials", "1000")
    wait_for(lambda: sum(trial.state.is_finished() for trial in trials_of(folder)) > 1, 120)
    time.sleep(0.2)  # into the next trial
    process.send_signal(signal.SIGINT)
    out, _ = program.finish(process, status=130, timeout=60)
    assert "Best: trial " in out and "Go on with: python " in out
    assert (folder / STUDY / "best.json").exists()
    states = [trial.state for trial in trials_of(folder)]
    assert TrialState.RUNNING not in states
    done = numbers(out)
    again, _ = here(*settings, "--trials", len(done) + 2)
    assert len(numbers(again)) == 2 and min(numbers(again)) >= len(states)
    assert f"which has {len(done)} of the trials already" in again


@POSIX
def test_workers_share_a_study_and_stop_together(folder):
    program = tool("tune", folder)
    process = program.start(*FAST, "--trials", "1000", "--workers", "2")
    wait_for(lambda: {trial.user_attrs.get("worker") for trial in trials_of(folder)} >= {0, 1}, 120)
    wait_for(lambda: any(trial.state == TrialState.COMPLETE for trial in trials_of(folder)))
    process.send_signal(signal.SIGTERM)  # to the first process alone, as `kill` would
    out, _ = program.finish(process, status=143, timeout=60)
    assert "Go on with: " in out and numbers(out)
    states = [trial.state for trial in trials_of(folder)]
    assert TrialState.RUNNING not in states and TrialState.WAITING not in states
    done = len(states) - states.count(TrialState.FAIL)
    program(*FAST, "--trials", done + 3, "--workers", "2")
    trials = [trial for trial in trials_of(folder) if trial.state != TrialState.FAIL]
    assert len(trials) == done + 3  # not one more
    assert sum("defaults" in trial.user_attrs for trial in trials) == 1


@POSIX
def test_trial_of_a_killed_process_is_given_up(here, folder):
    settings = [*FAST, "--epochs", "30", "--trials", "1"]
    process = tool("tune", folder).start(*settings)
    wait_for(lambda: any(trial.intermediate_values for trial in trials_of(folder)), 120)
    process.kill()
    process.communicate()
    assert [trial.state for trial in trials_of(folder)] == [TrialState.RUNNING]
    out, _ = here(*settings)
    assert numbers(out) == [1]
    first, second = trials_of(folder)
    assert first.state == TrialState.FAIL and second.state == TrialState.COMPLETE
    assert "defaults" in second.user_attrs


def test_test_images_are_never_read(here, monkeypatch):
    monkeypatch.setattr(ic.Data, "test", property(lambda data: pytest.fail("the test images were read")))
    here(*FAST, "--trials", "2")
    here(*FAST, "--find-lr")


def test_diverging_trials_do_not_end_the_search(here, folder):
    out, _ = here(*FAST, "--optimizer", "sgd", "--learning-rates", "1e30", "1e31", "--trials", "3")
    assert len(re.findall(r"^Trial [12]: diverged \(best .*, trial 0\)  lr \d[.\d]*e\+3", out, re.MULTILINE)) == 2
    assert "Trials: 1 complete, 2 stopped early or diverged" in out
    assert "Best: trial 0, " in out and "No trial was better than the defaults" in out
    assert [trial.state for trial in trials_of(folder)] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]


def test_bad_trials_end_early(here, folder, monkeypatch):
    drawn = iter([*[{"lr": 0.1}] * 5, *[{"lr": 1e-9}] * 2])  # six good ones with that of the defaults, two bad ones
    monkeypatch.setattr(tune, "suggest", lambda *rest: next(drawn))
    out, _ = here(*QUICK, "--epochs", "4", "--optimizer", "muon", "--trials", "8")
    states = [trial.state for trial in trials_of(folder)]
    assert states[0] == TrialState.COMPLETE and states[6:] == [TrialState.PRUNED] * 2
    assert all(len(trial.intermediate_values) < 4 for trial in trials_of(folder)[6:])
    assert "Trial 7: stopped early (best " in out


def test_ranges_and_what_is_searched():
    data = ic.load_data(ic.Config(dataset="digits", subset=300))
    config = ic.settle(ic.Config(dataset="digits", subset=300), data)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    options = argparse.Namespace(learning_rates=None, batch_sizes=None)
    found = [tune.suggest(study.ask(), {}, config, data, options) for _ in range(60)]
    assert all(list(each) == tune.SEARCHED for each in found)
    assert {each["batch_size"] for each in found} == {8, 16, 32, 64, 128}
    assert {each["augment"] for each in found} == {"none", "crop=2", "crop=4"}  # no flip: these are digits
    rates = {name: [each["lr"] for each in found if each["optimizer"] == name] for name in tune.OPTIMIZERS}
    assert all(0.0001 <= rate <= 0.01 for rate in rates["adamw"])  # reference 002
    assert all(0.02 <= rate <= 0.5 for rate in rates["muon"]) and all(0.01 <= rate <= 1 for rate in rates["sgd"])
    assert all(each["width"] % 0.25 == 0 and 0 <= each["dropout"] <= 0.5 for each in found)
    for each in found:
        ic.configure(dataset="digits", **each)  # takes plain Python numbers only
    own = argparse.Namespace(learning_rates=[0.3, 0.4], batch_sizes=[100, 1000])
    given = dict.fromkeys(["optimizer", "augment", "width", "weight_decay"])
    for _ in range(20):
        each = tune.suggest(study.ask(), given, config, data, own)
        assert each.keys() == {"lr", "batch_size", "dropout"}
        assert 0.3 <= each["lr"] <= 0.4 and 100 <= each["batch_size"] <= 300  # there are no more images
    for model, names in {"beginner-cnn": {"lr", "batch_size", "dropout"}, "resnet18": {"lr", "batch_size"}}.items():
        settled = ic.settle(ic.Config(dataset="digits", subset=300, model=model), data)
        given = dict.fromkeys(["optimizer", "augment", "weight_decay"])
        assert tune.suggest(study.ask(), given, settled, data, options).keys() == names


@pytest.mark.parametrize("ends", [[], ["--learning-rates", "0.001", "0.5"]])
def test_sweep_draws_and_names_a_rate(here, folder, ends):
    out, err = here(*QUICK, "--find-lr", *ends)
    rate = re.search(r"^Learning rate: (\S+), where the loss falls fastest", out, re.MULTILINE).group(1)
    low, high = map(float, ends[1:]) if ends else (0.12 / 1000, 0.12 * 10)
    assert low < float(rate) < high
    assert (folder / STUDY / "find-lr.png").read_bytes().startswith(b"\x89PNG")
    assert f"--lr {float(rate)}" in out and "Train with it: python image_classification.py --dataset digits" in out
    assert not err and not list(folder.glob("runs/tune/*/journal.log"))


def test_sweep_without_descent_says_so(here):
    error = here.error(*FAST, "--find-lr", "--optimizer", "sgd", "--learning-rates", "1e30", "1e31")
    assert error.startswith("error: the loss does not fall at any rate from 1e+30 to 1e+31")


@pytest.mark.parametrize("arguments", [
    ["--nonsense"], ["--trials", "0"], ["--workers", "0"], ["--minutes", "-1"], ["--minutes", "nan"],
    ["--batch-sizes", "64", "8"], ["--learning-rates", "0", "1"], ["--learning-rates", "nan", "1"],
    ["--study", "../mine"], ["--study", ".."], ["--resume", "last"], ["--val-fraction", "0"],
    ["--optimizer", "mine"], ["--model", "cnm"], ["--augment", "flop"],
])  # fmt: skip
def test_wrong_options_end_with_status_2(here, folder, arguments):
    _, err = here(*FAST, *arguments, status=2)
    assert err.count("error: ") == 1
    assert not list(folder.iterdir())


def test_options_of_both_programs_are_explained(here):
    out, _ = here("--help")
    assert all(option in out for option in ("--trials", "--find-lr", "--label-smoothing", "--optimizer"))
    assert out.count("--minutes F") == 1 and "--worker " not in out


def test_too_little_time_is_said(here):
    assert "no trial is complete" in here.error(*FAST, "--minutes", "0.001")
