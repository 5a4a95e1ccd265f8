"""Find better settings with Optuna, by validation images; the test images are never read.

    python tune.py --trials 20                       optimiser, learning rate, batch size and more
    python tune.py --dataset photos --epochs 5 --optimizer sgd --minutes 30 --workers 2
    python tune.py --find-lr                         draw the loss over rising learning rates

An option of image_classification.py fixes that setting; a recipe is where the search starts.
Everything is in runs/tune/<study>/, and the same command resumes a search that was stopped.
"""

import time

START = time.perf_counter()  # before the slow imports, which --minutes counts as well

import argparse
import contextlib
import inspect
import io
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if __name__ == "__main__":  # PYTHONSAFEPATH and python -P leave out the folder of this file
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

try:
    import torch
    from optuna import Trial

    import image_classification as ic
    from classifier import seen_images
    from classifier.cli import (
        build_parser,
        command_line,
        end_process,
        parse_settings,
        program,
        python_command,
        run_tool,
    )
    from classifier.config import Config, flag, is_custom_model
    from classifier.datasets.dataset import Dataset
    from classifier.devices import choose_device, keep_freed_memory, training_process
    from classifier.errors import Diverged, Stopped, UsageError, UserError
    from classifier.files import write_json
    from classifier.heartbeat import Heartbeat
    from classifier.lr_sweep import draw_sweep, sweep_rates
    from classifier.networks.build import network_factory
    from classifier.plots import save_figure
    from classifier.recipes import NOT_IN_RECIPES, Settings
    from classifier.reports import model_name
    from classifier.resolve import check_before_data, configure, resolve_defaults
    from classifier.runs import StopRequest
    from classifier.search_space import BATCH_SIZES, SEARCHED, SearchSpace
    from classifier.study import SETTINGS, Study, accuracy_of, is_default, trial_settings
    from classifier.text import percent
except (ImportError, OSError) as error:  # OSError: a library that cannot be loaded
    if __name__ != "__main__":
        raise
    sys.exit(
        f"error: {error}: pip install -r requirements-extras.txt, and keep classifier/ and "
        "image_classification.py beside this file"
    )
except KeyboardInterrupt:
    sys.exit(130)

if TYPE_CHECKING:  # TensorBoard is slow to import
    from torch.utils.tensorboard import SummaryWriter

TRIALS = 20
OF_ONE_RUN = NOT_IN_RECIPES | {"minutes"}
NOT_FOR_TRIALS = ["fast_dev_run", "out", "run_dir", "repeat", "keep_epochs"]
OF_ONE_MACHINE = {"data_dir", "mirror", "device"}  # may change when a search is resumed


class Options(NamedTuple):
    """The options of this program that image_classification.py lacks, or gives another meaning.

    Attributes:
        trials: how many the study is to have in all.
        minutes: the time for the search; 0: by trials.
        workers: number of processes.
        study: name of the folder in runs/tune/; empty: by the data set.
        learning_rates, batch_sizes: [lowest, highest] to search; None: the defaults.
        find_lr: only sweep the learning rate.
        worker: whether this is a process that another tune.py has started.
    """

    trials: int
    minutes: float
    workers: int
    study: str
    learning_rates: list[float] | None
    batch_sizes: list[int] | None
    find_lr: bool
    worker: bool


@dataclass
class Search:
    """What all trials of a search share.

    Attributes:
        options: the options of this program.
        fixed: the settings that no trial changes.
        start: the settings that the search starts with, complete.
        data: the data set.
        device: where the trials train.
        folder: runs/tune/<study>.
    """

    options: Options
    fixed: Settings
    start: Config
    data: Dataset
    device: torch.device
    folder: Path


class SearchLimit:
    """Stops a search, also within a trial, at a signal or when its time is over.

    deadline: on time.perf_counter(); infinite without --minutes.
    """

    def __init__(self, stop: StopRequest, deadline: float):
        self.stop = stop
        self.deadline = deadline

    @property
    def requested(self) -> bool:
        return self.stop.requested or time.perf_counter() >= self.deadline

    @property
    def signum(self) -> int:
        """The signal; 0 if the time is over."""
        return self.stop.signum if self.stop.requested else 0


# ---- Settings in recipe files and commands -------------------------------------------------------


def non_default_settings(config: Config) -> Settings:
    """The settings that differ from the program's defaults, as a recipe file holds them."""
    defaults = asdict(Config())
    for name in ("scheduler", "label_smoothing"):  # their defaults are the same for everything
        defaults[name] = ic.DEFAULT_RECIPE[name]
    settings = {}
    for name, value in asdict(config).items():
        if value is None or value == defaults[name] or name in OF_ONE_RUN:
            continue
        settings[name] = value
    return settings


def train_command(settings: Settings) -> str:
    """The command that trains with these settings, as one types it."""
    words = program("image_classification.py") or ["python", "image_classification.py"]
    for name, value in settings.items():
        words.append(flag(name))
        if value is not True:
            words.append(str(value))
    return command_line(words)


def format_settings(settings: Settings) -> str:
    words = [f"{name.replace('_', ' ')} {value}" for name, value in settings.items()]
    return ", ".join(words) or "the defaults"


# ---- One trial -----------------------------------------------------------------------------------


def train_trial(
    trial: Trial, config: Config, search: Search, limit: SearchLimit
) -> tuple[float | None, str]:
    """Train with the settings of one trial, logged to TensorBoard in a folder of its own.

    Returns the validation accuracy, in [0, 1], of the epoch whose weights a run would keep (None if
    none was finished), and "", or why the trial ended early: "stopped early" or "diverged". Raises
    Stopped.
    """
    from torch.utils.tensorboard import SummaryWriter

    log_folder = search.folder / f"trial-{trial.number:04d}"
    with training_process(search.device, config.deterministic):
        with contextlib.redirect_stdout(io.StringIO()):  # its notes were printed at the start
            config = resolve_defaults(config, search.data, ic.DEFAULT_RECIPE)
            trainer = ic.Trainer(config, search.data, search.device)
        progress = trainer.state.progress
        with SummaryWriter(str(log_folder)) as log:
            ended_early = train_epochs(trial, trainer, limit, log)
            accuracy = None
            results = {}
            if progress.history:
                accuracy = progress.history[progress.best_epoch()]["valid_accuracy"]
                results["validation accuracy"] = accuracy
            settings = {name: getattr(config, name) for name in SEARCHED}
            log.add_hparams(settings, results, run_name=".", global_step=len(progress.history))
    return accuracy, ended_early


def train_epochs(
    trial: Trial, trainer: ic.Trainer, limit: SearchLimit, log: "SummaryWriter"
) -> str:
    """Train a trial; returns "", or why it ended early.

    Each epoch's validation accuracy goes to TensorBoard, and on whole images to the trial, which
    may then end early. Raises Stopped.
    """
    state, progress, config = trainer.state, trainer.state.progress, trainer.config
    heartbeat = Heartbeat(state, trainer.group, config.progressive_resizing, stop=limit)
    try:
        while not progress.done and not progress.stalled(config.early_stopping):
            heartbeat.stop_between_epochs()
            ic.train_one_epoch(trainer, heartbeat)
            row, _ = ic.validate(trainer)
            log.add_scalar("accuracy", row["valid_accuracy"], row["epoch"])
            if row["image_scale"] == 1:  # trials may differ in their share of smaller images
                trial.report(row["valid_accuracy"], row["epoch"])
            if not progress.done and not is_default(trial) and trial.should_prune():
                return "stopped early"
    except Diverged:
        return "diverged"
    return ""


# ---- The search ----------------------------------------------------------------------------------


def run_search(study: Study, search: Search) -> int:
    """Run trials, in this process or in workers, until there are enough or the time is over.

    Returns the exit status: 1 if a worker failed, 128 + N after signal N.
    """
    options = search.options
    failed = False
    with StopRequest(on_second_interrupt=lambda: os._exit(130)) as stop:
        if options.workers > 1 and not options.worker:
            failed = run_workers(search, stop)
        else:
            deadline = START + 60 * options.minutes if options.minutes else math.inf
            with contextlib.suppress(Stopped):
                run_trials(study, search, SearchLimit(stop, deadline))
    if stop.requested:
        return 128 + stop.signum
    return 1 if failed else 0


def run_trials(study: Study, search: Search, limit: SearchLimit) -> None:
    """Run trials in this process.

    Raises Stopped if the limit is reached within a trial, which then counts as failed.
    """
    threads = torch.get_num_threads() // search.options.workers
    torch.set_num_threads(max(1, threads))
    if search.device.type == "cpu":
        keep_freed_memory()
    space = SearchSpace(
        search.fixed,
        search.start,
        factory_options(search.start.model),
        search.data,
        search.options.learning_rates,
        search.options.batch_sizes,
    )
    with study.worker() as worker:
        # a resumed search would draw the same settings again from the same seed
        study.seed_sampler(search.start.seed + worker + 1000 * study.num_trials_ever())
        while not limit.requested:
            trial = study.ask(worker, search.options.trials)
            if trial is None:
                break
            try:
                settings = {} if is_default(trial) else space.draw(trial)
                trial.set_user_attr(SETTINGS, settings)
                accuracy, ended_early = try_settings(trial, settings, search, limit)
            except BaseException:
                study.fail(trial)
                raise
            if ended_early or accuracy is None:
                study.prune(trial)
                result = ended_early
            else:
                study.complete(trial, accuracy)
                result = percent(accuracy)
            print_trial(trial.number, result, settings, study)


def try_settings(
    trial: Trial, settings: Settings, search: Search, limit: SearchLimit
) -> tuple[float | None, str]:
    """As train_trial, but drawn settings that do not fit the others only end the trial."""
    try:
        config = configure(**{**search.fixed, **settings})
        return train_trial(trial, config, search, limit)
    except UsageError as error:
        if is_default(trial):
            raise
        return None, f"does not fit ({error})"


def factory_options(model: str) -> list[str]:
    """Names of the options, such as dropout, that a network has."""
    factory = network_factory(model, ic.CNN)
    return list(inspect.signature(factory).parameters)


def print_trial(number: int, result: str, settings: Settings, study: Study) -> None:
    best = study.best_trial()
    best_so_far = ""
    if best is not None:
        best_so_far = f" (best {percent(accuracy_of(best))}, trial {best.number})"
    print(f"Trial {number}: {result}{best_so_far}  {format_settings(settings)}")


def run_workers(search: Search, stop: StopRequest) -> bool:
    """Run trials in processes of their own, and pass on a signal to them; True if one failed."""
    options = search.options
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    command += ["--study", search.folder.name, "--dataset", search.start.dataset]
    if options.minutes:
        minutes_left = options.minutes - (time.perf_counter() - START) / 60
        command += ["--minutes", f"{max(0.001, minutes_left):.3f}"]
    workers = []
    for number in range(options.workers):
        environment = os.environ | {"TQDM_POSITION": str(number)}  # progress bars on separate lines
        workers.append(subprocess.Popen(command, env=environment))

    passed_on = False
    while any(worker.poll() is None for worker in workers):
        if stop.requested and not passed_on:
            passed_on = True
            if os.name == "posix":  # on Windows, Ctrl-C reaches all processes of a console
                for worker in workers:
                    worker.terminate()
        time.sleep(0.1)
    return any(worker.returncode != 0 for worker in workers)


def report(study: Study, search: Search) -> bool:
    """Print the best settings and write them to best.json; False if no trial is complete."""
    best = study.best_trial()
    if best is None:
        return False
    best_accuracy = accuracy_of(best)
    best_settings = trial_settings(best)
    config = configure(**{**search.fixed, **best_settings})
    recipe = non_default_settings(config)
    recipe_file = search.folder / "best.json"
    write_json(recipe_file, recipe)

    complete = study.complete_trials()
    num_pruned = len(study.pruned_trials())
    tensorboard = command_line(["tensorboard", "--logdir", str(search.folder)])
    print(f"\nTrials: {len(complete)} complete, {num_pruned} ended early: {tensorboard}")
    num_images = len(search.data.valid.labels)
    print(
        f"Best: trial {best.number}, {percent(best_accuracy)} of the {num_images} validation "
        f"images: {format_settings(best_settings)}"
    )
    started_with = "the recipe" if "recipe" in search.fixed else "the defaults"
    if is_default(best):
        print(f"No trial was better than {started_with}: train with {train_command(recipe)}")
        return True

    for trial in complete:
        if is_default(trial):
            default_accuracy = accuracy_of(trial)
            gain = 100 * (best_accuracy - default_accuracy)
            print(
                f"That is {gain:.1f} percentage points better than {started_with} "
                f"({percent(default_accuracy)})"
            )
            print(
                "The best of many trials looks better than it is: to be sure, train with both on "
                f"other seeds, --seed {config.seed + 1} --repeat 5"
            )
            break
    with_recipe: Settings = {"recipe": recipe_file}
    if is_custom_model(config.model):  # a recipe never makes the program execute a file
        with_recipe["model"] = config.model
    print(f"Train with it: {train_command(with_recipe)}")
    print(f"The same: {train_command(recipe)}")
    return True


def explain_no_result(study: Study) -> str:
    """Why there is no best trial, and what to do."""
    if study.pruned_trials():
        return (
            "no trial was trained to its end, for the reasons above: try lower rates, --lr or "
            "--learning-rates"
        )
    return "no trial is complete: give it more --minutes, or fewer --epochs"


# ---- The sweep -----------------------------------------------------------------------------------


def find_lr(search: Search) -> float:
    """The learning rate at which the loss falls fastest; draws find-lr.png in the study's folder.

    The sweep goes over --learning-rates, by default from a thousandth of the usual rate to ten
    times the usual rate. Raises UserError if the loss never falls.
    """
    usual_lr = search.start.lr or 0.1
    low, high = search.options.learning_rates or (usual_lr / 1000, usual_lr * 10)
    config = replace(search.start, lr=usual_lr, progressive_resizing=0.0, head_first=0.0)
    with training_process(search.device, config.deterministic):
        trainer = ic.Trainer(config, search.data, search.device)
        trainer.state.model.train(not config.freeze)  # frozen layers keep their statistics
        batches = endless_batches(trainer)

        def train_step(lr: float) -> float:
            batch = next(batches)
            stats = trainer.train_step(batch, factor=lr / usual_lr)
            return float(stats[0].mean())

        steps = min(100, max(30, 3 * len(trainer.batch_slices)))
        sweep = sweep_rates(train_step, low, high, steps)
    save_figure(draw_sweep(sweep), search.folder / "find-lr.png")
    return sweep.best_rate()


def endless_batches(trainer: ic.Trainer) -> Iterator[ic.Batch]:
    """The batches of one epoch after another."""
    for epoch in itertools.count():
        plan = trainer.plan(epoch)
        for batch_slice in trainer.batch_slices:
            yield plan.take(batch_slice)


# ---- From the command line -----------------------------------------------------------------------


def parse_options() -> tuple[Settings, Options]:
    """The settings given for all trials, and the options of this program.

    Ends the program with status 2 if they are wrong.
    """
    version = ", ".join(f"{name} {number}" for name, number in ic.VERSIONS.items())
    parser = build_parser(str(__doc__), ic.DEFAULT_RECIPE, version, prog="tune.py")
    add_tuning_options(parser)
    given = parse_settings(parser)
    if given["trials"] is None:
        given["trials"] = sys.maxsize if given["minutes"] else TRIALS
    options = Options(**{name: given.pop(name) for name in Options._fields})
    problem = find_problem(given, options)
    if problem:
        parser.error(problem)
    return {**given, "minutes": 0.0}, options


def add_tuning_options(parser: argparse.ArgumentParser) -> None:
    parser.conflict_handler = "resolve"  # --minutes means something else here
    group = parser.add_argument_group("tuning")
    group.add_argument(
        "--trials",
        type=int,
        default=None,
        metavar="N",
        help=f"trials of the study in all (default: {TRIALS}, or with --minutes as many as fit)",
    )
    group.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        metavar="F",
        help="time for the whole search, in minutes; 0: by --trials",
    )
    group.add_argument(
        "--workers", type=int, default=1, metavar="N", help="number of processes (default: 1)"
    )
    group.add_argument(
        "--study",
        default="",
        metavar="NAME",
        help="its folder in runs/tune/ (default: by data set and network)",
    )
    group.add_argument(
        "--learning-rates",
        type=float,
        default=None,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="range to search (default: by the optimiser)",
    )
    group.add_argument(
        "--batch-sizes",
        type=int,
        default=None,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"range to search (default: {BATCH_SIZES[0]} {BATCH_SIZES[1]})",
    )
    group.add_argument(
        "--find-lr",
        action="store_true",
        default=False,
        help="only sweep the learning rate: draw the loss and name a good rate",
    )
    group.add_argument("--worker", action="store_true", default=False, help=argparse.SUPPRESS)


def find_problem(given: Settings, options: Options) -> str:
    """What is wrong with these options; empty if nothing is."""
    for name in ("learning_rates", "batch_sizes"):
        bounds = getattr(options, name)
        if bounds is None:
            continue
        low, high = bounds
        if not 0 < low < high < math.inf:  # NaN fails as well
            return f"{flag(name)} {low} {high}: LOW must be above 0 and below HIGH"
    if options.workers < 1 or options.trials < 1:
        return "--workers and --trials must be at least 1"
    if not 0 <= options.minutes < math.inf:
        return f"--minutes {options.minutes} is not 0 or more"
    if Path(options.study).name != options.study or options.study == "..":
        return f"--study {options.study} is not the name of a folder"
    if "resume" in given:
        return "--resume is for a training run; the same command resumes a search"
    for name in NOT_FOR_TRIALS:
        if name in given:
            return f"{flag(name)} is for a training run: leave it out"
    return ""


def check_validation(fixed: Settings, config: Config) -> None:
    """Raise UsageError for settings without validation images."""
    if config.val_fraction:
        return
    if "val_fraction" in fixed:
        raise UsageError("tuning needs validation images: leave --val-fraction above 0")
    raise UsageError(
        f"--recipe {config.recipe} has no validation images, and tuning needs them: add "
        "--val-fraction 0.1"
    )


def prepare(fixed: Settings, options: Options) -> Search:
    """Load the data set, fill in all defaults and check the network; makes the study's folder."""
    config = configure(**fixed)
    check_validation(fixed, config)
    check_before_data(config)
    # workers repeat what the first process has printed already
    output = io.StringIO() if options.worker else sys.stdout
    with contextlib.redirect_stdout(output):
        device = choose_device(config.device)
        data = seen_images.note_initial_weights(ic.load_data(config), config)
        start = resolve_defaults(config, data, ic.DEFAULT_RECIPE)
        if not options.worker:
            ic.build_model(start, data)  # fails here if it is wrong, not in each worker
    network = model_name(config.model)
    folder = Path("runs", "tune", options.study or f"{data.name}-{network}")
    folder.mkdir(parents=True, exist_ok=True)
    fixed = {**fixed, "dataset": start.dataset}
    if start.labels:
        fixed["labels"] = start.labels
    return Search(options, fixed, start, data, device, folder)


def main() -> int:
    """Run as from the command line; returns the exit status."""
    fixed, options = parse_options()
    search = prepare(fixed, options)
    if options.find_lr:
        lr = find_lr(search)
        picture = search.folder / "find-lr.png"
        print(f"Learning rate: {lr:g}, where the loss falls fastest; drawn in {picture}")
        settings = non_default_settings(configure(**{**search.fixed, "lr": lr}))
        print(f"Train with it: {train_command(settings)}")
        return 0

    study = Study(search.folder, search.start.epochs)
    if options.worker:
        return run_search(study, search)
    settings = non_default_settings(configure(**search.fixed))
    for name in OF_ONE_MACHINE:
        settings.pop(name, None)
    study.begin(settings, search.data.fingerprint())
    num_trials = study.num_trials()
    known = f", which has {num_trials} of the trials already" if num_trials else ""
    print(f"Searching in {search.folder}{known}")
    status = run_search(study, search)
    if not report(study, search) and status == 0:
        raise UserError(explain_no_result(study))
    if status >= 128:
        print(f"\nStopped. Resume with: {command_line([python_command(), *sys.argv])}")
    return status


if __name__ == "__main__":
    end_process(run_tool(main))
