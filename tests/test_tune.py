"""tune.py: as users run it, in processes of its own, and what is quick in this process."""

import itertools
import json
import math
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import optuna
import pytest
from conftest import REPOSITORY, SCRIPT, events_of, only_run, rows_of, tool, wait_for, write_images
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState

import image_classification as ic
import tune
from classifier import lr_sweep, search_space
from classifier.cli import build_parser, parse_settings
from classifier.config import Config
from classifier.datasets.dataset import Dataset
from classifier.errors import Diverged, UsageError, UserError
from classifier.recipes import find_recipe
from classifier.resolve import configure, resolve_defaults
from classifier.runs import StopRequest
from classifier.search_space import SearchSpace
from classifier.study import DEFAULTS, FIXED, SETTINGS, Study, trial_settings
from classifier.text import percent

QUICK = ["--dataset", "digits", "--subset", "200", "--epochs", "2", "--width", "0.25"]
QUICK += ["--image-size", "16"]
# Optimiser, rate, decay, dropout and augmentation remain to be searched.
FAST = [*QUICK, "--batch-size", "100", "--device", "cpu"]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
FINGERPRINT = [100, 0.5, 0.5, 0.5, 7.0]  # of a data set
STUDY = Path("runs", "tune", "digits-cnn")


def trials_of(folder):
    """What the study's journal holds at this moment."""
    path = folder / STUDY / "journal.log"
    if not path.exists() or not path.stat().st_size:
        return []
    storage = JournalStorage(JournalFileBackend(str(path)))
    return optuna.load_study(study_name=STUDY.name, storage=storage).trials


def states_of(folder):
    return [trial.state for trial in trials_of(folder)]


def line_after(out, words):
    """What follows these words, to the end of the line."""
    return out.rpartition(words)[2].partition("\n")[0]


def trial_numbers(out):
    """Numbers of the trials whose end was printed."""
    return [int(number) for number in re.findall(r"^Trial (\d+): ", out, re.MULTILINE)]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with a study of four trials, and what the search printed."""
    folder = tmp_path_factory.mktemp("searched")
    out, _ = tool("tune", folder)(*FAST, "--trials", "4")
    return folder, out


@pytest.fixture
def here(tool_inside):
    """tune.py in this process: it takes options and returns standard output and error."""
    return tool_inside("tune")


@pytest.fixture
def study(folder):
    """A study without trials."""
    (folder / STUDY).mkdir(parents=True)
    return Study(folder / STUDY, epochs=3)


# ---- a search ----


@pytest.mark.slow
def test_best_settings_are_named(searched):
    folder, out = searched
    assert trial_numbers(out) == [0, 1, 2, 3]
    assert re.search(
        r"^Trial 0: \d+\.\d % \(best .* %, trial 0\)  the defaults$", out, re.MULTILINE
    )
    recipe = json.loads((folder / STUDY / "best.json").read_text())
    fixed = {"dataset": "digits", "subset": 200, "epochs": 2, "width": 0.25, "batch_size": 100}
    assert recipe.items() >= fixed.items() and "minutes" not in recipe

    trials = trials_of(folder)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    best = max(complete, key=lambda trial: trial.value)
    assert trials[0].user_attrs[DEFAULTS] and not trials[0].params
    assert f"Best: trial {best.number}, {percent(best.value)} of the " in out
    if best.number:
        gain = 100 * (best.value - trials[0].value)
        assert f"That is {gain:.1f} percentage points better" in out
        *command, option, recipe_file = shlex.split(line_after(out, "Train with it: "))
        assert Path(command[1]).samefile(SCRIPT)
        assert [option, recipe_file] == ["--recipe", str(STUDY / "best.json")]
    else:
        assert "No trial was better than the defaults" in out

    # the last line is a command with the same settings
    options = shlex.split(out.rpartition("image_classification.py ")[2])
    parser = build_parser("", ic.DEFAULT_RECIPE, "")
    assert configure(**parse_settings(parser, options)) == configure(**recipe)


@pytest.mark.slow
def test_the_program_trains_best_json_as_the_trial_was_trained(searched, inside, folder):
    path = searched[0] / STUDY / "best.json"
    recipe = json.loads(path.read_text())
    best_value = max(trial.value or 0.0 for trial in trials_of(searched[0]))
    inside("--recipe", path)
    run = only_run(folder)
    assert json.loads((run / "config.json").read_text()).items() >= recipe.items()
    kept = min(rows_of(run), key=lambda row: float(row["valid_loss"]))
    assert float(kept["valid_accuracy"]) == pytest.approx(best_value)


def test_trials_are_in_the_hparams_tab(searched):
    from tensorboard.plugins.hparams import metadata

    folder, _ = searched
    for trial in trials_of(folder):
        if trial.state != TrialState.COMPLETE:
            continue
        events = events_of(folder / STUDY / f"trial-{trial.number:04d}")
        start = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
        values = metadata.parse_session_start_info_plugin_data(start).hparams
        for name, value in trial.user_attrs[SETTINGS].items():
            kind = "string_value" if isinstance(value, str) else "number_value"
            assert getattr(values[name], kind) == value
        assert values["batch_size"].number_value == 100
        assert events.Scalars("validation accuracy")[-1].value == pytest.approx(trial.value)
        assert len(events.Scalars("accuracy")) == len(trial.intermediate_values) == 2


def test_a_search_goes_on_and_refuses_other_settings(searched, here, folder):
    shutil.copytree(searched[0], folder, dirs_exist_ok=True)
    out, _ = here(*FAST, "--trials", "6", "--data-dir", "elsewhere")
    assert trial_numbers(out) == [4, 5]
    assert "which has 4 of the trials already" in out
    drawn = {tuple(trial.user_attrs[SETTINGS].items()) for trial in trials_of(folder)}
    assert len(drawn) == 6  # nothing is drawn twice
    _, err = here(*FAST, "--epochs", "3", status=2)
    assert "--epochs 2" in err and "--study" in err


@pytest.mark.slow
def test_the_same_seed_draws_the_same_trials(searched, here, folder):
    here(*FAST, "--trials", "3")
    for first, second in zip(trials_of(searched[0])[:3], trials_of(folder), strict=True):
        assert first.params == second.params
        assert first.intermediate_values == second.intermediate_values


@pytest.mark.slow
def test_test_images_are_never_read(here, monkeypatch):
    fail = property(lambda data: pytest.fail("the test images were read"))
    monkeypatch.setattr(Dataset, "test", fail)
    here(*FAST, "--trials", "2")
    here(*FAST, "--find-lr")


def test_diverging_trials_do_not_end_the_search(here, folder):
    options = ["--optimizer", "sgd", "--learning-rates", "1e30", "1e31", "--trials", "3"]
    out, _ = here(*FAST, *options)
    assert len(re.findall(r"^Trial [12]: diverged \(best .*, trial 0\)", out, re.MULTILINE)) == 2
    assert "Trials: 1 complete, 2 ended early" in out
    assert "Best: trial 0, " in out and "No trial was better than the defaults" in out
    assert states_of(folder) == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]


def test_drawn_settings_that_do_not_fit_only_end_their_trial(here, folder, monkeypatch):
    monkeypatch.setattr(SearchSpace, "draw", lambda space, trial: {"micro_batch": -1})
    out, _ = here(*FAST, "--trials", "2")
    assert re.search(r"^Trial 1: does not fit \(.*--micro-batch", out, re.MULTILINE)
    assert states_of(folder) == [TrialState.COMPLETE, TrialState.PRUNED]
    assert trials_of(folder)[1].user_attrs[SETTINGS] == {"micro_batch": -1}


def test_defaults_that_do_not_fit_end_the_search(here, folder, monkeypatch):
    def refuse(*arguments):
        raise UsageError("--width 0.25: too narrow")

    monkeypatch.setattr(tune, "train_trial", refuse)
    assert "--width" in here.error(*FAST, "--trials", "2", status=2)
    assert states_of(folder) == [TrialState.FAIL]


def test_other_errors_end_the_search(here, folder, monkeypatch):
    def fail(trainer, heartbeat):
        raise UserError("the disk is full")

    monkeypatch.setattr(ic, "train_one_epoch", fail)
    assert "the disk is full" in here.error(*FAST)
    assert states_of(folder) == [TrialState.FAIL]


@pytest.mark.slow
def test_bad_trials_end_early(here, folder, monkeypatch):
    # six good ones, that with the defaults included, and two bad ones
    drawn = iter([*[{"lr": 0.1}] * 5, *[{"lr": 1e-9}] * 2])
    monkeypatch.setattr(SearchSpace, "draw", lambda space, trial: next(drawn))
    fixed = ["--epochs", "4", "--optimizer", "muon", "--batch-size", "100"]
    out, _ = here(*QUICK, *fixed, "--trials", "8")
    states = states_of(folder)
    assert states[0] == TrialState.COMPLETE and states[6:] == [TrialState.PRUNED] * 2
    assert all(len(trial.intermediate_values) < 4 for trial in trials_of(folder)[6:])
    assert "Trial 7: stopped early (best " in out


@pytest.mark.slow
def test_only_accuracies_on_whole_images_are_compared(here, folder):
    """With the default share of small images, 14 of 20 epochs are on these."""
    here(*QUICK, "--image-size", "32", "--epochs", "20", "--trials", "1")
    (trial,) = trials_of(folder)
    assert sorted(trial.intermediate_values) == list(range(14, 20))


def test_too_little_time_is_said(here):
    assert "--minutes" in here.error(*FAST, "--minutes", "0.001")


def test_time_limit_and_signals_stop_a_search():
    stop = StopRequest()
    limit = tune.SearchLimit(stop, math.inf)
    assert not limit.requested
    over = tune.SearchLimit(stop, time.perf_counter())
    assert over.requested and over.signum == 0
    stop.signals.append(signal.SIGINT)
    assert limit.requested and limit.signum == over.signum == signal.SIGINT


# ---- several processes, and processes that end before their time ----


@POSIX
@pytest.mark.slow
def test_stopped_search_goes_on(here, folder):
    settings, program = [*FAST, "--epochs", "8"], tool("tune", folder)
    process = program.start(*settings, "--trials", "1000")
    wait_for(lambda: sum(state.is_finished() for state in states_of(folder)) > 1, 120)
    time.sleep(0.2)  # into the next trial
    process.send_signal(signal.SIGINT)
    out, _ = program.finish(process, status=130, timeout=60)
    assert "Best: trial " in out
    assert Path(shlex.split(line_after(out, "Resume with: "))[1]).samefile(REPOSITORY / "tune.py")
    assert (folder / STUDY / "best.json").exists()
    states = states_of(folder)
    assert TrialState.RUNNING not in states
    done = trial_numbers(out)
    again, _ = here(*settings, "--trials", len(done) + 2)
    assert len(trial_numbers(again)) == 2 and min(trial_numbers(again)) >= len(states)
    assert f"which has {len(done)} of the trials already" in again


@POSIX
@pytest.mark.slow
def test_workers_share_a_study_and_stop_together(folder):
    program = tool("tune", folder)
    process = program.start(*FAST, "--trials", "1000", "--workers", "2")
    wait_for(lambda: {trial.user_attrs.get("worker") for trial in trials_of(folder)} >= {0, 1}, 120)
    wait_for(lambda: TrialState.COMPLETE in states_of(folder))
    process.send_signal(signal.SIGTERM)  # to the first process alone, as `kill` does
    out, _ = program.finish(process, status=143, timeout=60)
    assert "Resume with: " in out and trial_numbers(out)
    states = states_of(folder)
    assert TrialState.RUNNING not in states and TrialState.WAITING not in states
    done = len(states) - states.count(TrialState.FAIL)
    program(*FAST, "--trials", done + 3, "--workers", "2")
    trials = [trial for trial in trials_of(folder) if trial.state != TrialState.FAIL]
    assert len(trials) == done + 3  # not one more
    assert sum(DEFAULTS in trial.user_attrs for trial in trials) == 1


@POSIX
@pytest.mark.slow
def test_trial_of_a_killed_process_is_given_up(here, folder):
    settings = [*FAST, "--epochs", "60", "--trials", "1"]
    process = tool("tune", folder).start(*settings)
    wait_for(lambda: any(trial.intermediate_values for trial in trials_of(folder)), 120)
    process.kill()
    process.communicate()
    assert states_of(folder) == [TrialState.RUNNING]
    out, _ = here(*settings)
    assert trial_numbers(out) == [1]
    first, second = trials_of(folder)
    assert first.state == TrialState.FAIL and second.state == TrialState.COMPLETE
    assert DEFAULTS in second.user_attrs


@pytest.mark.slow
def test_minutes_end_a_search(here, folder, monkeypatch):
    started = time.perf_counter()
    monkeypatch.setattr(tune, "START", started)
    out, _ = here(*FAST, "--minutes", "0.2")
    assert 10 < time.perf_counter() - started < 40
    assert "Best: trial " in out and "Stopped" not in out
    assert TrialState.RUNNING not in states_of(folder)


# ---- the study ----


def test_a_worker_has_a_number_of_its_own(study):
    with study.worker() as first, Study(study.folder, 3).worker() as second:
        assert (first, second) == (0, 1)
    with study.worker() as third:
        assert third == 0


def test_trials_are_counted_and_handed_out(study):
    study.begin({"epochs": 3}, FINGERPRINT)
    study.begin({"epochs": 3}, FINGERPRINT)
    first = study.ask(worker=5, max_trials=2)
    assert first.user_attrs == {DEFAULTS: True, "worker": 5}
    second = study.ask(worker=0, max_trials=2)
    assert second.user_attrs == {"worker": 0}
    assert study.ask(worker=0, max_trials=2) is None
    study.fail(second)  # does not count
    third = study.ask(worker=0, max_trials=2)
    assert study.num_trials() == 2 and study.num_trials_ever() == 3
    assert study.best_trial() is None
    study.complete(third, 0.5)
    study.complete(first, 0.5)
    assert study.best_trial().number == first.number  # of equals, the one with the defaults
    fourth = study.ask(worker=0, max_trials=4)
    study.complete(fourth, 0.6)
    assert study.best_trial().number == fourth.number
    fifth = study.ask(worker=0, max_trials=4)
    study.prune(fifth)
    assert [trial.number for trial in study.pruned_trials()] == [fifth.number]


def test_abandoned_trials_fail_but_not_those_of_living_workers(study):
    study.begin({}, FINGERPRINT)
    with study.worker() as number:
        study.ask(number, 10)
        study.ask(number + 1, 10)  # of a process that was killed
        study.begin({}, FINGERPRINT)
    assert [trial.state for trial in study._trials()] == [TrialState.RUNNING, TrialState.FAIL]


def test_study_with_other_settings_is_refused(study):
    study.begin({"epochs": 3, "subset": 100}, FINGERPRINT)
    for other in ({"epochs": 4, "subset": 100}, {"epochs": 3}, {"epochs": 3, "subset": 1, "lr": 1}):
        with pytest.raises(UsageError, match="--study"):
            study.begin(other, FINGERPRINT)
    study.begin({"subset": 100, "epochs": 3}, FINGERPRINT)


def test_study_of_other_images_is_refused(study):
    study.begin({"epochs": 3}, FINGERPRINT)
    study.begin({"epochs": 3}, FINGERPRINT)
    with pytest.raises(UsageError, match="--study"):
        study.begin({"epochs": 3}, [*FINGERPRINT[:-1], 8.0])


def test_study_that_did_not_record_its_images_says_so(study, capsys):
    study.optuna_study.set_user_attr(FIXED, {"epochs": 3})  # as version 0.9 did, without images
    study.optuna_study.enqueue_trial({}, user_attrs={DEFAULTS: True})
    study.complete(study.ask(worker=0, max_trials=9), 0.5)
    study.begin({"epochs": 3}, FINGERPRINT)
    assert "--study" in capsys.readouterr().out
    study.begin({"epochs": 3}, FINGERPRINT)
    assert not capsys.readouterr().out


def test_search_does_not_go_on_when_its_folder_has_changed(here, folder):
    """Accuracies on other validation images are not comparable."""
    write_images(folder / "photos", {"red": 30, "blue": 30}, size=(16, 16))
    fixed = ["--dataset", "photos", "--epochs", "1", "--width", "0.25", "--batch-size", "20"]
    here(*fixed, "--trials", "1")
    out, _ = here(*fixed, "--trials", "2")
    assert trial_numbers(out) == [1]
    names = [folder / "photos" / label / "3.png" for label in ("red", "blue")]
    pictures = [path.read_bytes() for path in names]
    for path, picture in zip(names, reversed(pictures), strict=True):  # two labels corrected
        path.write_bytes(picture)
    line = here.error(*fixed, "--trials", "3", status=2)
    assert "--study" in line and "images" in line
    out, _ = here(*fixed, "--trials", "1", "--study", "corrected")
    assert trial_numbers(out) == [0]


def test_trial_that_finished_no_epoch_has_no_accuracy(here, folder, monkeypatch):
    def diverge(trainer, batch):
        raise Diverged("training diverged")

    monkeypatch.setattr(ic.Trainer, "train_step", diverge)
    error = here.error(*FAST, "--trials", "1")
    assert "--lr" in error and "--minutes" not in error
    assert states_of(folder) == [TrialState.PRUNED]
    events = events_of(folder / STUDY / "trial-0000")
    assert "validation accuracy" not in events.Tags()["scalars"]


def test_study_of_version_0_9_goes_on(here, study, folder):
    settings = {"dataset": "digits", "subset": 200, "epochs": 2, "width": 0.25}
    settings |= {"image_size": 32, "batch_size": 100}
    old_names = {"low_res": 0.5, "test_views": 2, "depth": None, "make_imbalanced": 0.0}
    study.optuna_study.set_user_attr(FIXED, {**settings, **old_names})
    trial = study.ask(worker=0, max_trials=1)
    trial.set_user_attr(SETTINGS, {"lr": 0.1, "low_res": 0.25})
    study.complete(trial, 1.0)

    renamed = ["--progressive-resizing", "0.5", "--tta", "2"]
    default = ["--scheduler", "linear", "--label-smoothing", "0.2"]  # 0.9 did not record them
    large = [*FAST, "--image-size", "32"]  # or there would be no smaller images to begin with
    out, _ = here(*large, *renamed, *default, "--trials", "2")
    assert trial_numbers(out) == [1]
    recipe = json.loads((folder / STUDY / "best.json").read_text())
    best = {"lr": 0.1, "progressive_resizing": 0.25, "tta": 2}
    assert recipe == {**settings, **best, "device": "cpu"}
    assert trial_settings(study.best_trial()) == {"lr": 0.1, "progressive_resizing": 0.25}
    _, err = here(*large, "--tta", "2", "--trials", "2", status=2)
    assert "--progressive-resizing" in err


def test_removed_settings_of_version_0_9_are_refused(study):
    study.optuna_study.set_user_attr(FIXED, {"model": "convnet", "depth": 3})
    with pytest.raises(UserError, match="depth"):
        study.begin({"model": "convnet"}, FINGERPRINT)


def test_best_json_of_version_0_9_is_a_recipe(here, folder):
    content = {"dataset": "digits", "low_res": 0.0, "scheduler": "onecycle", "test_views": 2}
    (folder / "best.json").write_text(json.dumps(content))
    assert find_recipe("best.json")["scheduler"] == "linear"
    here(*FAST, "--recipe", "best.json", "--trials", "1")
    recipe = json.loads((folder / STUDY / "best.json").read_text())
    assert recipe["progressive_resizing"] == 0.0 and recipe["tta"] == 2
    assert "recipe" not in recipe and "scheduler" not in recipe


# ---- what is searched ----


def digits_space(fixed=(), learning_rates=None, batch_sizes=None, **settings):
    """The search space on the digits; fixed: names of the settings that are given."""
    config = Config(dataset="digits", subset=300, **settings)
    data = ic.load_data(config)
    start = resolve_defaults(config, data, ic.DEFAULT_RECIPE)
    options = tune.factory_options(config.model)
    given = dict.fromkeys(fixed)
    return SearchSpace(given, start, options, data, learning_rates, batch_sizes)


@pytest.fixture
def random_study():
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))


def test_ranges_of_what_is_searched(random_study):
    space = digits_space()
    drawn = [space.draw(random_study.ask()) for _ in range(60)]
    assert all(list(settings) == search_space.SEARCHED for settings in drawn)
    assert {settings["batch_size"] for settings in drawn} == {8, 16, 32, 64, 128}
    augments = {settings["augment"] for settings in drawn}
    assert augments == {"none", "crop=2", "crop=4"}  # no flip: these are digits
    assert {settings["optimizer"] for settings in drawn} == set(search_space.OPTIMIZERS)
    ranges = {"adamw": (0.0001, 0.01), "muon": (0.02, 0.5), "sgd": (0.01, 1.0)}
    for settings in drawn:
        low, high = ranges[settings["optimizer"]]
        assert low <= settings["lr"] <= high
        assert settings["width"] % 0.25 == 0 and 0 <= settings["dropout"] <= 0.5
        configure(dataset="digits", **settings)  # which takes plain Python numbers only


def test_ranges_can_be_given(random_study):
    fixed = ["optimizer", "augment", "width", "weight_decay"]
    space = digits_space(fixed, learning_rates=[0.3, 0.4], batch_sizes=[100, 1000])
    for _ in range(20):
        settings = space.draw(random_study.ask())
        assert settings.keys() == {"lr", "batch_size", "dropout"}
        assert 0.3 <= settings["lr"] <= 0.4
        assert 100 <= settings["batch_size"] <= 300  # there are no more images


@pytest.mark.parametrize(
    ("model", "names"),
    [("beginner-cnn", {"lr", "batch_size", "dropout"}), ("resnet18", {"lr", "batch_size"})],
)
def test_only_options_of_the_network_are_searched(random_study, model, names):
    space = digits_space(["optimizer", "augment", "weight_decay"], model=model)
    assert space.draw(random_study.ask()).keys() == names


def test_width_of_weights_to_start_from_is_not_searched(random_study):
    space = digits_space()
    space.start.init_from = "model.pth"
    assert "width" not in space.draw(random_study.ask())


def test_flips_and_pretrained_networks(random_study):
    space = digits_space()
    space.data.flip_keeps_label = True
    space.start.pretrained = True
    drawn = [space.draw(random_study.ask()) for _ in range(40)]
    assert {settings["optimizer"] for settings in drawn} == {"sgd", "adamw"}
    flipped = {"flip,crop=2", "flip,crop=4"}
    assert {settings["augment"] for settings in drawn} == {"none", "crop=2", "crop=4", *flipped}


# ---- the sweep ----


@pytest.mark.parametrize("bounds", [[], ["--learning-rates", "0.001", "0.5"]])
def test_sweep_draws_and_names_a_rate(here, folder, bounds):
    out, err = here(*QUICK, "--find-lr", *bounds)
    match = re.search(r"^Learning rate: (\S+), where the loss falls fastest", out, re.MULTILINE)
    rate = float(match[1])
    low, high = map(float, bounds[1:]) if bounds else (0.12 / 1000, 0.12 * 10)
    assert low < rate < high
    assert (folder / STUDY / "find-lr.png").read_bytes().startswith(b"\x89PNG")
    command = line_after(out, "Train with it: ")
    assert f"--lr {rate}" in command and "--dataset digits" in command
    assert not err and not list(folder.glob("runs/tune/*/journal.log"))


def test_sweep_without_descent_says_so(here):
    options = ["--find-lr", "--optimizer", "sgd", "--learning-rates", "1e30", "1e31"]
    assert "--learning-rates" in here.error(*FAST, *options)


@pytest.mark.slow
def test_sweep_takes_the_batches_of_the_epochs_and_keeps_the_peak(here, monkeypatch):
    steps = []
    train_step = ic.Trainer.train_step

    def record(trainer, batch, factor=None):
        stats = train_step(trainer, batch, factor)
        steps.append((batch, trainer.next_image_scale(), trainer.state.param_groups()[0]))
        return stats

    monkeypatch.setattr(ic.Trainer, "train_step", record)
    here(*FAST, "--find-lr", "--learning-rates", "0.001", "0.01")
    batches, scales, groups = zip(*steps, strict=True)
    assert len(batches) == 30 and set(scales) == {1.0}
    seen = [sorted(batches[i].order.tolist() + batches[i + 1].order.tolist()) for i in (0, 2)]
    assert seen[0] == seen[1] == list(range(200))
    assert not batches[0].order.equal(batches[2].order)  # another epoch
    assert groups[0]["initial_lr"] == 0.12 and float(groups[0]["lr"]) == pytest.approx(0.01)


def test_rate_at_which_the_loss_falls_fastest():
    def train_step(rate):  # a logistic curve, steepest at 0.01
        return 2 / (1 + (rate / 0.01) ** 2)

    sweep = lr_sweep.sweep_rates(train_step, 0.0001, 1.0, 100)
    assert len(sweep.rates) == len(sweep.losses) == len(sweep.smoothed) == 100
    assert sweep.rates[0] == 0.0001 and sweep.rates[-1] == pytest.approx(1.0)
    assert 0.008 < sweep.best_rate() < 0.0125
    assert float(f"{sweep.best_rate():.2g}") == sweep.best_rate()


@pytest.mark.parametrize("last", [math.nan, math.inf, 1000.0])
def test_sweep_ends_where_training_diverges(last):
    losses = itertools.chain([3.0, 2.9, 2.5, 2.0, 1.6, 1.5, 1.4, last], itertools.repeat(math.nan))
    sweep = lr_sweep.sweep_rates(lambda rate: next(losses), 0.001, 1.0, 30)
    assert sweep.losses == [3.0, 2.9, 2.5, 2.0, 1.6, 1.5, 1.4]
    assert math.isfinite(sweep.best_rate())


@pytest.mark.parametrize("losses", [[math.nan], [1.0, 2.0, 3.0, 4.0], [math.inf, math.nan]])
def test_sweep_of_a_loss_that_does_not_fall(losses):
    rest = itertools.chain(losses, itertools.repeat(100.0))
    with pytest.raises(UserError, match="--learning-rates"):
        lr_sweep.sweep_rates(lambda rate: next(rest), 0.001, 1.0, 30)


def test_smoothing_is_a_mean_over_neighbours():
    assert lr_sweep.smooth([1.0, 2.0, 6.0, 7.0], 1) == [1.5, 3.0, 5.0, 6.5]
    assert lr_sweep.smooth([], 2) == []


# ---- the command line ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["--trials", "0"],
        ["--workers", "0"],
        ["--minutes", "-1"],
        ["--minutes", "nan"],
        ["--batch-sizes", "64", "8"],
        ["--learning-rates", "0", "1"],
        ["--learning-rates", "nan", "1"],
        ["--study", "../mine"],
        ["--study", ".."],
        ["--resume", "last"],
        ["--fast-dev-run"],
        ["--out", "model.pth"],
        ["--run-dir", "mine"],
        ["--repeat", "3"],
        ["--keep-epochs"],
        ["--recipe", "accuracy94"],
        ["--val-fraction", "0"],
        ["--optimizer", "mine"],
        ["--model", "cnm"],
        ["--augment", "flop"],
    ],
)
def test_wrong_options_end_with_status_2(here, folder, arguments):
    line = here.error(*FAST, *arguments, status=2)
    assert line.startswith("tune.py: error: ")
    assert any(word in line for word in arguments)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--low-res", "0.5"], "--progressive-resizing"),
        (["--test-views", "2"], "--tta"),
        (["--scheduler", "onecycle"], "linear"),
        (["--depth", "3"], "0.9.1"),
        (["--learning-rate", "3"], "--lr"),
        (["--trial", "3"], "--trials"),
        (["--recipe", "accuracy94"], "--val-fraction"),
    ],
)
def test_options_that_were_renamed_or_removed_are_explained(here, old, new):
    assert new in here.error(*FAST, *old, status=2)


def test_options_of_both_programs_are_explained(here):
    out, _ = here("--help")
    for option in ("--trials", "--find-lr", "--label-smoothing", "--optimizer"):
        assert option in out
    assert out.count("--minutes F") == 1 and "--minutes MINUTES" not in out
    assert "--worker " not in out


def test_settings_that_equal_the_defaults_are_left_out():
    default = Config(scheduler="linear", label_smoothing=0.2, momentum=None, minutes=3.0, out="x")
    assert tune.non_default_settings(default) == {}
    other = Config(scheduler="none", label_smoothing=0.0, ema=True, progressive_resizing=0.0)
    assert tune.non_default_settings(other) == {
        "scheduler": "none",
        "label_smoothing": 0.0,
        "progressive_resizing": 0.0,
        "ema": True,
    }


@POSIX
def test_command_is_quoted():
    settings = {"dataset": "my photos", "ema": True, "lr": 0.1}
    command = tune.train_command(settings)
    words = ["--dataset", "my photos", "--ema", "--lr", "0.1"]
    _, script, *options = shlex.split(command)
    assert Path(script).samefile(SCRIPT) and options == words


def test_custom_networks_can_be_tuned(here, folder):
    code = "import torch\ndef make(classes, channels, image_size):\n"
    code += "    layers = torch.nn.Flatten(), torch.nn.LazyLinear(classes)\n"
    (folder / "mine.py").write_text(code + "    return torch.nn.Sequential(*layers)\n")
    fixed = ["--dataset", "digits", "--subset", "200", "--epochs", "1", "--optimizer", "adamw"]
    out, _ = here(*fixed, "--model", "mine.py:make", "--trials", "2")
    assert trial_numbers(out) == [0, 1] and Path("runs", "tune", "digits-make").is_dir()
