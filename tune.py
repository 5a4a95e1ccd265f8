"""Find better settings with Optuna. It looks at validation images only; the test images are never read.

    python tune.py --trials 20                       optimiser, learning rate, weight decay, batch size and more
    python tune.py --dataset photos --epochs 5 --optimizer sgd --minutes 30 --workers 2
    python tune.py --find-lr                         draw the loss over a sweep of learning rates, and name one

Options of image_classification.py fix a setting; those of a recipe are where the search begins. All that it finds is in
runs/tune/<study>/, and the same command goes on with a search that was stopped.
"""

import time

START = time.perf_counter()  # before the slow imports: --minutes counts them too

import argparse
import contextlib
import inspect
import io
import math
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

try:
    import optuna
    import torch
    from filelock import FileLock, Timeout
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
    from optuna.trial import TrialState
    from tqdm import tqdm

    import image_classification as ic
    from inference import run
except ImportError as problem:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {problem}: install what this program needs with: pip install -r requirements-extras.txt")
except KeyboardInterrupt:
    sys.exit(130)

TRIALS = 20
SEARCHED = ["optimizer", "lr", "weight_decay", "batch_size", "width", "dropout", "augment"]
OPTIMIZERS = ["muon", "sgd", "adamw"]
BATCHES, RATES = (8, 128), (0.0001, 0.01)  # reference 002's; these rates are for Adam and its like
OTHER_RATES = {"muon": (0.02, 0.5), "sgd": (0.01, 1.0)}  # Muon's are relative steps, SGD's multiply bare gradients
OF_ONE_RUN = {"recipe", "minutes", "resume", "run_dir", "out", "fast_dev_run", "debug"}  # in no recipe
OF_ONE_MACHINE = {"data_dir", "mirror", "device"}  # a search may go on with others
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


def changed(config: ic.Config) -> dict[str, Any]:
    """The settings that differ from the program's own, as a recipe file holds them."""
    usual = asdict(ic.Config())
    return {name: value for name, value in asdict(config).items() if value != usual[name] and name not in OF_ONE_RUN}


def command(settings: dict[str, Any]) -> str:
    """The line that trains with these settings."""
    words = ["python", "image_classification.py"]
    for name, value in settings.items():
        words += [ic.option(name)] if value is True else [ic.option(name), str(value)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def describe(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items()) or "the defaults"


def new_trainer(config: ic.Config, data: ic.Data, device: torch.device) -> ic.Trainer:
    """All that a step changes, in batches that fit into memory."""
    trainer = ic.Trainer(config, data, device)
    trainer.settle_batch()
    trainer.prepare()
    return trainer


# ==== The search ======================================================================================================


def suggest(
    trial: optuna.Trial, given: dict[str, Any], config: ic.Config, data: ic.Data, options: argparse.Namespace
) -> dict[str, Any]:
    """Values for the settings in SEARCHED that are not given and that the network has, rounded to what gets printed.

    config: the settings that the search begins with, settled; options: learning_rates and batch_sizes, each
    [LOW, HIGH] or None.
    """
    count, side, model = len(data.train.labels), data.train.images.shape[-1], config.model
    factory = ic.CNN if model == "cnn" else ic.alternative("networks", f"--model {model}").factory(model)
    found: dict[str, Any] = {}
    if "optimizer" not in given:  # ImageNet weights would not survive Muon
        found["optimizer"] = trial.suggest_categorical("optimizer", OPTIMIZERS[config.pretrained :])
    if "lr" not in given:
        name = str(found.get("optimizer", config.optimizer))
        low, high = options.learning_rates or OTHER_RATES.get(name, RATES)
        found["lr"] = float(f"{trial.suggest_float(f'lr of {name}', low, high, log=True):.3g}")
    if "weight_decay" not in given:
        found["weight_decay"] = float(f"{trial.suggest_float('weight_decay', 1e-5, 0.1, log=True):.3g}")
    if "batch_size" not in given:  # a power of 2, or an end of the range
        least, most = (min(count, size) for size in options.batch_sizes or BATCHES)
        size = 2 ** round(math.log2(trial.suggest_int("batch_size", least, most, log=True)))
        found["batch_size"] = min(max(least, size), most)
    if "width" not in given and model == "cnn":
        found["width"] = float(trial.suggest_float("width", 0.5, 2.0, step=0.25))
    if "dropout" not in given and "dropout" in inspect.signature(factory).parameters:
        found["dropout"] = round(float(trial.suggest_float("dropout", 0.0, 0.5, step=0.05)), 2)
    if "augment" not in given:
        shifts = sorted({max(1, side // 16), max(1, side // 8)})
        lists = [f"{flip}crop={shift}" for flip in ["", "flip,"][: 1 + data.mirrored] for shift in shifts]
        found["augment"] = trial.suggest_categorical("augment", ["none", *lists])
    return found


def train_trial(
    trial: optuna.Trial, config: ic.Config, data: ic.Data, device: torch.device, folder: Path, signals: list[int]
) -> tuple[float, str]:
    """Train with one set of settings, logged to TensorBoard in a folder below `folder`.

    Returns the validation accuracy of the epoch whose weights a run would keep, in [0, 1], and "", or why it ended
    before its time: "stopped early" or "diverged". Raises ic.Stopped when `signals` is no longer empty.
    """
    from torch.utils.tensorboard import SummaryWriter

    with contextlib.redirect_stdout(io.StringIO()):  # its notes were printed at the start
        config = ic.settle(config, data)
        trainer = new_trainer(config, data, device)
    history, why, board_folder = trainer.history, "", str(folder / f"trial-{trial.number:04d}")
    with tempfile.TemporaryDirectory() as temporary, SummaryWriter(board_folder) as board:
        try:
            while trainer.step < trainer.total_steps and not trainer.stalled() and not why:
                if signals:
                    raise ic.Stopped(signals[0])
                ic.train_one_epoch(trainer, Path(temporary, "last.pth"), signals)
                with trainer.autocast():
                    valid = ic.evaluate(trainer.tested(), *trainer.valid)
                trainer.check_finite(0, valid_loss=valid.loss)
                board.add_scalar("accuracy", valid.accuracy, len(history))
                trial.report(valid.accuracy, len(history))
                history.append({"epoch": len(history), "valid_loss": valid.loss, "valid_accuracy": valid.accuracy})
                if trainer.step < trainer.total_steps and "defaults" not in trial.user_attrs and trial.should_prune():
                    why = "stopped early"
        except ic.UserError as error:
            if "no longer finite" not in str(error):
                raise
            why = "diverged"
        accuracy: float = history[trainer.best()]["valid_accuracy"] if history else 0.0
        settings = {name: getattr(config, name) for name in SEARCHED}
        board.add_hparams(settings, {"validation accuracy": accuracy}, run_name=".", global_step=len(history))
    return accuracy, why


def open_study(folder: Path, epochs: int) -> optuna.Study:
    """The study in this folder, or a new one; several processes may work on it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = str(folder / "journal.log")
    storage = JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
    pruner = optuna.pruners.MedianPruner(n_warmup_steps=epochs // 3)  # the first epochs say little
    return optuna.create_study(
        storage=storage, study_name=folder.name, direction="maximize", pruner=pruner, load_if_exists=True
    )


def prepare(study: optuna.Study, folder: Path, config: ic.Config) -> None:
    """Before the search: give up the trials that a killed process left, and line up one with the program's defaults.

    config: the settings that all trials share. Raises UsageError where those of the study are others.
    """
    fixed = {name: value for name, value in changed(config).items() if name not in OF_ONE_MACHINE}
    with FileLock(folder / ".ask.lock"):
        known = study.user_attrs.get("fixed", fixed)
        if other := [name for name in known | fixed if known.get(name) != fixed.get(name)]:
            its = known.get(other[0], "the default")
            raise ic.UsageError(f"{folder} is a search with {ic.option(other[0])} {its}: name a new one, --study NAME")
        study.set_user_attr("fixed", fixed)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lock = FileLock(folder / f".worker-{trial.user_attrs.get('worker')}.lock", timeout=0)
            with contextlib.suppress(Timeout), lock:  # else that worker is alive
                study.tell(trial.number, state=TrialState.FAIL)
        tried = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
        if not any("defaults" in trial.user_attrs for trial in tried):
            study.enqueue_trial({}, user_attrs={"defaults": True})


def free_number(folder: Path) -> tuple[int, Any]:
    """The lowest number that no living worker of the study has, and the lock that keeps it."""
    number = 0
    while True:
        try:
            return number, FileLock(folder / f".worker-{number}.lock").acquire(timeout=0)
        except Timeout:
            number += 1


def best_of(study: optuna.Study) -> Any:
    """The trial with the highest validation accuracy, of equals that with the defaults; None if none is complete."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(done, key=lambda trial: (trial.value or 0.0, "defaults" in trial.user_attrs), default=None)


def search(
    study: optuna.Study, folder: Path, given: dict[str, Any], config: ic.Config, data: ic.Data, device: torch.device,
    options: argparse.Namespace, signals: list[int],
) -> None:  # fmt: skip
    """Run trials until the study has options.trials of them; ic.Stopped if `signals` ends one, which counts as failed.

    given: the settings that are fixed; config: those that the search begins with, settled.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() // options.workers))
    if device.type == "cpu":
        ic.keep_freed_memory()
    number, held = free_number(folder)
    with held:
        seed = config.seed + number + 1000 * len(study.get_trials(deepcopy=False))  # or it would draw the same again
        study.sampler = optuna.samplers.TPESampler(seed=seed % 2**32, multivariate=False)
        while not signals:
            with FileLock(folder / ".ask.lock"):
                if len(study.get_trials(deepcopy=False, states=COUNTED)) >= options.trials:
                    break
                trial = study.ask()
                trial.set_user_attr("worker", number)
            try:
                settings = {} if "defaults" in trial.user_attrs else suggest(trial, given, config, data, options)
                trial.set_user_attr("settings", settings)
                accuracy, why = train_trial(trial, ic.configure(**given | settings), data, device, folder, signals)
            except BaseException:
                study.tell(trial, state=TrialState.FAIL)
                raise
            study.tell(trial, None if why else accuracy, TrialState.PRUNED if why else TrialState.COMPLETE)
            best = best_of(study)
            known = f" (best {ic.percent(best.value)}, trial {best.number})" if best else ""
            print(f"Trial {trial.number}: {why or ic.percent(accuracy)}{known}  {describe(settings)}")


def supervise(folder: Path, dataset: str, options: argparse.Namespace, signals: list[int]) -> bool:
    """Run the workers, each in a process of its own, and pass on to them what asks to stop; did one of them fail?"""
    line = [sys.executable, __file__, *sys.argv[1:], "--worker", "--study", folder.name, "--dataset", dataset]
    if options.minutes:
        line += ["--minutes", f"{max(0.001, options.minutes - (time.perf_counter() - START) / 60):.3f}"]
    bars = [{"TQDM_POSITION": str(number)} for number in range(options.workers)]  # each on a line of its own
    workers = [subprocess.Popen(line, env=os.environ | bar) for bar in bars]
    told = False
    while None in [worker.poll() for worker in workers]:
        if signals and not told and os.name == "posix":  # on Windows, Ctrl-C reaches all by itself
            for worker in workers:
                worker.terminate()
        told = bool(signals)
        time.sleep(0.1)
    return not signals and any(worker.returncode for worker in workers)


def report(study: optuna.Study, folder: Path, given: dict[str, Any], data: ic.Data) -> bool:
    """Print the best settings and write them to best.json; False if no trial is complete."""
    if not (best := best_of(study)):
        return False
    config = ic.configure(**given | best.user_attrs["settings"])
    ic.write_json(folder / "best.json", changed(config))
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ended = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    board = subprocess.list2cmdline(["tensorboard", "--logdir", str(folder)])
    print(f"\nTrials: {len(complete)} complete, {len(ended)} stopped early or diverged: {board}")
    where = f"{ic.percent(best.value)} of the {len(data.valid.labels)} validation images"
    print(f"Best: trial {best.number}, {where}: {describe(best.user_attrs['settings'])}")
    if "defaults" in best.user_attrs:
        print(f"No trial was better than the defaults: train with these, {command(changed(config))}")
        return True
    usual = next((trial.value for trial in complete if "defaults" in trial.user_attrs), None)
    if usual is not None:
        gain = 100 * (best.value - usual)
        print(f"That is {gain:.1f} percentage points better than the defaults ({ic.percent(usual)})")
        again = f"--seed {config.seed + 1} --repeat 5"
        print(f"The best of many looks better than it is: to know, train with both on other seeds, {again}")
    print(f"Train with it: {command({'recipe': folder / 'best.json'})}\nThe same: {command(changed(config))}")
    return True


# ==== The sweep =======================================================================================================


def find_lr(config: ic.Config, data: ic.Data, device: torch.device, folder: Path, ends: list[float] | None) -> float:
    """Raise the learning rate step by step; the rate at which the loss fell fastest (Smith, 2015), to two digits.

    config: settled; ends: the lowest and the highest rate, or None for a thousandth and ten times that of `config`.
    Draws find-lr.png in `folder`. Raises UserError if the loss never falls.
    """
    usual = config.lr or 0.1
    low, high = ends or (usual / 1000, usual * 10)
    trainer = new_trainer(replace(config, lr=usual, scheduler="none", low_res=0.0), data, device)
    trainer.total_steps = steps = min(100, max(30, 3 * len(trainer.places)))
    trainer.model.train(not config.freeze)
    usual_peaks, lowest = trainer.peaks, math.inf
    rates, losses = list[float](), list[float]()
    for step in tqdm(range(steps), "Learning rates", unit="step", leave=False, disable=None):
        epoch, index = divmod(step, len(trainer.places))
        if not index:
            plan = trainer.plan(epoch)
        place, rate = trainer.places[index], low * (high / low) ** (step / (steps - 1))
        trainer.peaks = [peak * rate / usual for peak in usual_peaks]
        loss = float(trainer.advance([drawn[place] for drawn in plan])[0]) / (place.stop - place.start)
        recent = fmean([*losses[-4:], loss])
        if not recent <= 4 * lowest:  # it diverges, or is not a number any more
            break
        lowest = min(lowest, recent)
        rates.append(rate)
        losses.append(loss)
    reach, smoothed = max(2, steps // 20), losses
    for _ in range(2):
        smoothed = [fmean(smoothed[max(0, i - reach) : i + reach + 1]) for i in range(len(smoothed))]
    bottom = smoothed.index(min(smoothed)) if smoothed else 0
    if not bottom:
        raise ic.UserError(f"the loss does not fall at any rate from {low:g} to {high:g}: try lower --learning-rates")
    steepest = max(range(bottom), key=lambda i: smoothed[i] - smoothed[i + 1])
    named = float(f"{math.sqrt(rates[steepest] * rates[steepest + 1]):.2g}")
    (axes,) = ic.draw(1, 1, 7, 4).axes
    axes.semilogx(rates, losses, alpha=0.3, label="each step")
    axes.semilogx(rates, smoothed, color="C0", label="smoothed")
    axes.axvline(named, color="C3", linestyle="--", label=f"falls fastest: {named:g}")
    axes.set(xlabel="learning rate", ylabel="training loss (cross-entropy)", ylim=(0, 1.5 * max(smoothed[:bottom])))
    axes.legend()
    ic.save_figure(axes.figure, folder / "find-lr.png")
    return named


# ==== Command line ====================================================================================================


def parse() -> tuple[dict[str, Any], argparse.Namespace]:
    """The settings given for all trials, and all options; ends the program with status 2 for wrong ones."""
    parser = argparse.ArgumentParser(
        prog="tune.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s [options]", parents=[ic.parse([])[0]], conflict_handler="resolve",
    )  # fmt: skip
    group = parser.add_argument_group("tuning")
    ends: dict[str, Any] = {"nargs": 2, "metavar": ("LOW", "HIGH")}
    many = f"trials of the study in all (default: {TRIALS}, or with --minutes as many as fit)"
    group.add_argument("--trials", type=int, metavar="N", help=many)
    group.add_argument("--minutes", type=float, default=0.0, metavar="F", help="end after F minutes; 0: by trials")
    group.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    group.add_argument("--study", default="", metavar="NAME", help="its folder in runs/tune/ (default: by the data)")
    group.add_argument("--learning-rates", type=float, help="range to search (default: by the optimiser)", **ends)
    group.add_argument("--batch-sizes", type=int, help="range to search (default: {} {})".format(*BATCHES), **ends)
    group.add_argument("--find-lr", action="store_true", help="only sweep the learning rate, draw and name one")
    group.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for low, high in filter(None, [options.learning_rates, options.batch_sizes]):  # also wrong: not a number
        if not 0 < low < high < math.inf:
            parser.error(f"a range of {low} to {high}: LOW has to be above 0 and below HIGH")
    if options.workers < 1 or options.trials is not None and options.trials < 1:
        parser.error("--workers and --trials have to be at least 1")
    if not 0 <= options.minutes < math.inf:
        parser.error(f"--minutes {options.minutes} is not 0 or more")
    if Path(options.study).name != options.study or options.study == "..":
        parser.error(f"--study {options.study} is not the name of a folder")
    given = {name: value for name, value in vars(options).items() if name in ic.KINDS} | {"minutes": 0.0}
    if "resume" in given:
        parser.error("--resume is for a training; a search goes on with the same command")
    options.trials = options.trials or (sys.maxsize if options.minutes else TRIALS)
    return given, options


def main() -> int:
    """Run as from the command line; returns the exit status."""
    given, options = parse()
    config = ic.configure(**given)
    if not config.val_fraction:
        raise ic.UsageError("tuning looks at validation images: leave --val-fraction above 0")
    ic.batch_augmentation(config.augment, 2)  # if this or the network is wrong, then rather before a download
    ic.network_settings(config.model)
    with contextlib.redirect_stdout(io.StringIO() if options.worker else sys.stdout):
        device = ic.choose_device(config.device)
        data = ic.load_data(config)
        settled = ic.settle(config, data)
        if not options.worker:
            ic.build_model(settled, data)  # what is wrong with it is said once, not by each worker
    given["dataset"] = settled.dataset
    kind = config.model.replace("torchvision:", "torchvision-").rpartition(":")[2]
    folder = Path("runs", "tune", options.study or f"{data.name}-{kind}")
    folder.mkdir(parents=True, exist_ok=True)
    if options.find_lr:
        rate = find_lr(settled, data, device, folder, options.learning_rates)
        print(f"Learning rate: {rate:g}, where the loss falls fastest; drawn in {folder / 'find-lr.png'}")
        print(f"Train with it: {command(changed(ic.configure(**given | {'lr': rate})))}")
        return 0
    study = open_study(folder, settled.epochs or 1)
    if not options.worker:
        prepare(study, folder, ic.configure(**given))
        there = len(study.get_trials(deepcopy=False, states=COUNTED))
        print(f"Searching in {folder}" + f", which has {there} of the trials already" * bool(there))
    failed = False
    with ic.stop_requests() as signals:
        if options.workers > 1 and not options.worker:
            failed = supervise(folder, settled.dataset, options, signals)
        else:
            left = START + 60 * options.minutes - time.perf_counter()
            timer = threading.Timer(max(0.0, left), signals.append, [0])  # ends a trial as a signal would
            timer.daemon = True
            if options.minutes:
                timer.start()
            with contextlib.suppress(ic.Stopped):
                search(study, folder, given, settled, data, device, options, signals)
            timer.cancel()
    status = next((128 + signum for signum in signals if signum), int(failed))
    if options.worker:
        return status
    if not report(study, folder, given, data) and not status:
        raise ic.UserError("no trial is complete: give it more --minutes, or fewer --epochs")
    if status >= 128:
        print(f"\nStopped. Go on with: {subprocess.list2cmdline(['python', *sys.argv])}")
    return status


if __name__ == "__main__":
    sys.exit(run(main))
