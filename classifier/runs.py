"""Run folders: what is in them, locking, resuming, and the signals that ask a run to stop."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from filelock import FileLock, Timeout  # torch depends on it
from torch import nn

from classifier import distributed, legacy
from classifier.checkpoints import load_weights, read_checkpoint, save_checkpoint
from classifier.config import FIELD_TYPES, Config, flag
from classifier.datasets import dataset
from classifier.datasets.dataset import Dataset, same_images, same_training_images
from classifier.errors import Stopped, UsageError, UserError
from classifier.files import delete_temporary_files, despite_trials, write_json
from classifier.foreign_paths import format_option, full_path
from classifier.foreign_settings import without_foreign_places
from classifier.seen_images import describe_changes
from classifier.text import URL_REFUSED, is_url, printable

SAVE_EVERY = 120.0  # seconds between checkpoints within an epoch: what a power cut may cost
STOP_POLL_STEPS = 12  # on accelerators: steps after which processes ask each other whether to stop
RUNS = Path("runs")
# settings that may change on resuming
RESUME_OVERRIDES = {"epochs", *distributed.RESTART_OVERRIDES}


class StopRequest:
    """Records SIGINT (Ctrl-C) and SIGTERM, instead of ending the process, while it is entered.

    A second Ctrl-C calls `on_second_interrupt`, which raises KeyboardInterrupt by default. Under
    torchrun it is only recorded: it may be the first one, which the terminal has sent to this
    process, and which torchrun passes on as well. Ignored signals stay ignored. Outside of the main
    thread nothing is recorded, because Python handles signals only there.

    Attributes:
        signals: numbers of the signals so far.
    """

    def __init__(self, on_second_interrupt: Callable[[], None] | None = None):
        self.signals: list[int] = []
        self._on_second_interrupt = on_second_interrupt or _raise_keyboard_interrupt
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                previous = signal.getsignal(signum)
                # None: a handler that was not set from Python, and that Python cannot restore
                if previous is not signal.SIG_IGN and previous is not None:
                    self._previous_handlers[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
        self._previous_handlers = {}

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        is_repeated = bool(self.signals)
        self.signals.append(signum)
        if is_repeated and signum == signal.SIGINT and not distributed.LAUNCHED:
            self._on_second_interrupt()

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return bool(self.signals)

    @property
    def signum(self) -> int:
        """The first signal; SIGTERM if none came here but to another process of this run."""
        return self.signals[0] if self.signals else signal.SIGTERM


def _raise_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


class Run:
    """The folder of a run, or of one seed of it; as a context manager it holds the run's lock.

    The lock keeps other runs out of the folder. Only the main process takes it and writes files; in
    the others, methods that write do nothing.

    Attributes:
        path: the folder.
        is_main: whether this is the main process of those that train together (rank 0).
    """

    def __init__(self, path: Path, is_main: bool = True):
        self.path = path
        self.is_main = is_main
        self._lock = FileLock(path / ".lock")

    def __enter__(self) -> "Run":
        if self.is_main:
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise UserError(f"another process is training in {self.path}") from None
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, Stopped):
            # in any process: the first to fail may be another one than rank 0
            self.forget_if_nothing_saved(error)
        if self.is_main:
            self._lock.release()

    @property
    def last(self) -> Path:
        """The latest saved state, which a resumed run continues from."""
        return self.path / "last.pth"

    @property
    def best(self) -> Path:
        """The model of the best epoch."""
        return self.path / "best.pth"

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def report_file(self) -> Path:
        """The results; it exists only once the run is finished."""
        return self.path / "report.json"

    def begin(self, config: Config, data: Dataset) -> None:
        """Mark the run as unfinished and write config.json and, for a folder, data_report.json."""
        if not self.is_main:
            return
        self.report_file.unlink(missing_ok=True)
        for folder in (self.path, *self.path.glob("seed-*")):
            delete_temporary_files(folder)
        settings = asdict(config)
        settings["resume"] = ""
        settings["substitution"] = data.fallback_reason  # not a setting, but needed on resuming
        write_json(self.config_file, settings)
        if data.report:
            write_json(self.path / "data_report.json", data.report)

    def seed_run(self, seed: int) -> "Run":
        """The folder of one of several seeds, made if need be; the lock of this run covers it."""
        path = self.path / f"seed-{seed}"
        if self.is_main:
            path.mkdir(exist_ok=True)
        return Run(path, self.is_main)

    def save_epoch(
        self, epoch: int, model_file: dict[str, Any], is_best: bool, keep_epoch: bool
    ) -> None:
        """Write the model of an epoch: best.pth if it is the best, epoch-NNNN.pth if it is kept."""
        if not self.is_main:
            return
        if is_best:
            save_checkpoint(self.best, model_file)
        if keep_epoch:
            save_checkpoint(self.path / f"epoch-{epoch:04d}.pth", model_file)

    def save_last(self, state: dict[str, Any]) -> None:
        """Write last.pth. Raises OSError if that fails; the old file is then still there."""
        if self.is_main:
            save_checkpoint(self.last, state)

    def load_best(self, model: nn.Module) -> dict[str, Any]:
        """Load the weights of the best epoch into the model; returns the content of best.pth."""
        content = read_checkpoint(self.best)
        load_weights(model, content["model"], self.best)
        return content

    def finish(self, results: dict[str, Any]) -> None:
        """Write report.json, which says that the run is finished: the last thing to do."""
        if self.is_main:
            write_json(self.report_file, results)

    def forget_if_nothing_saved(self, error: Exception) -> None:
        """Remove config.json after an error, if nothing was saved that the run could resume from.

        Without it `--resume last` does not find the run. After an OSError it stays: when there is
        space on the disk again, the run can start over.
        """
        if not isinstance(error, OSError) and not saved_states(self.path):
            self.config_file.unlink(missing_ok=True)


def new_run_folder(run_dir: str, dataset_name: str) -> Path:
    """Make the folder of a new run: `run_dir`, or runs/<data set>/<time> if that is empty.

    No two processes get the same one. Raises UserError if `run_dir` holds a run already, UsageError
    for a name that is not UTF-8.
    """
    if run_dir:
        if run_dir != printable(run_dir):
            raise UsageError(f"--run-dir {run_dir}: TensorBoard takes only names in UTF-8")
        run = Path(run_dir)
        if (run / "config.json").exists():
            raise UserError(
                f"{run} holds a run: go on with {format_option('resume', str(run))}, or name "
                "another --run-dir"
            )
        states = saved_states(run)
        if states:
            raise UserError(
                f"{states[0]} is of a run whose config.json is gone: name another --run-dir"
            )
        despite_trials(partial(run.mkdir, parents=True, exist_ok=True))
        return run
    start_time = time.strftime("%Y-%m-%d_%H-%M-%S")
    for i in range(10_000):
        run = RUNS / dataset_name / (f"{start_time}-{i}" if i else start_time)
        with contextlib.suppress(FileExistsError):
            despite_trials(partial(run.mkdir, parents=True))
            return run
    raise UserError(f"{RUNS / dataset_name / start_time} exists: name another --run-dir")


def saved_states(run: Path) -> list[Path]:
    """The files that a run, or each seed of it, can be resumed from."""
    return [*run.glob("last.pth"), *run.glob("seed-*/last.pth")]


def resume_config(resume: str, **changes: Any) -> Config:
    """The settings of a run to resume.

    Args:
        resume: the run folder, a file in it, or "last" for the newest unfinished run in runs/.
        changes: settings given explicitly. Only RESUME_OVERRIDES may differ from those of the run,
            and a finished run is resumed only for more `epochs`.

    Raises UserError if there is no such run, and UsageError for a change that is not possible.
    """
    if is_url(resume):
        raise UsageError(f"--resume {resume}: {URL_REFUSED}")
    saved = _find_resumable(resume, changes.get("epochs") or 0)
    settings = asdict(Config())
    for name, value in legacy.translate_settings(saved.settings).items():
        if name in FIELD_TYPES:
            settings[name] = value
    if settings["drop_easiest"] is None:  # version 0.11 and older always took all images
        settings["drop_easiest"] = 0.0
    _check_changes(settings, changes)
    settings = without_foreign_places(settings, changes, str(saved.folder))
    if settings["micro_batch"] is None:  # version 0.9: its own numbers are in last.pth
        settings["micro_batch"] = settings["batch_size"]
    if "epochs" in changes:
        settings["minutes"] = 0.0
    if saved.is_finished:
        settings["early_stopping"] = 0
    settings.update(changes)
    settings["resume"] = str(saved.folder)
    return Config(**settings)


class _SavedRun(NamedTuple):
    """What is known of a run from its files.

    Attributes:
        folder: the run folder.
        settings: content of config.json.
        trained_epochs: how many epochs a finished run had; None if it is unfinished.
    """

    folder: Path
    settings: dict[str, Any]
    trained_epochs: int | None

    @property
    def is_finished(self) -> bool:
        return self.trained_epochs is not None

    def can_resume(self, epochs: int, is_named: bool) -> bool:
        """Whether it can go on; epochs: the new number of epochs, or 0 if that does not change.

        A finished run goes on only to more epochs; a trial run only if it is unfinished and named.
        """
        if self.settings.get("fast_dev_run"):
            return is_named and not self.is_finished
        return self.trained_epochs is None or epochs > self.trained_epochs


def _find_resumable(resume: str, epochs: int) -> _SavedRun:
    """The newest run that `resume` names and that can go on.

    epochs: --epochs, or 0 if it is not given.
    """
    is_named = resume != "last"
    if is_named:
        folder = Path(resume).parent if Path(resume).is_file() else Path(resume)
        config_files = list(folder.glob("config.json"))
    else:
        folder = RUNS
        config_files = list(folder.glob("*/*/config.json"))
    if not config_files:
        raise UserError(f"--resume {resume}: there is no run in {folder}")

    config_files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for config_file in config_files:
        saved = _read_run(config_file)
        if saved.can_resume(epochs, is_named):
            return saved
    where = str(folder) if is_named else f"{folder} (not counting trial runs)"
    raise UserError(
        f"--resume {resume}: no unfinished run in {where}; to train a finished run further, "
        "add --epochs N (not for trial runs)"
    )


def _read_run(config_file: Path) -> _SavedRun:
    """Read the settings of a run, and how many epochs it had if it is finished."""
    report_file = config_file.with_name("report.json")
    trained_epochs = None
    damaged = (ValueError, LookupError, TypeError, AttributeError)
    try:
        settings = dict(json.loads(config_file.read_text()).items())
    except damaged:
        raise UserError(f"{config_file} is damaged: start a new run") from None
    try:
        if report_file.exists():
            trained_epochs = int(json.loads(report_file.read_text())["epochs"])
    except damaged:
        raise UserError(
            f"{report_file} is damaged: delete it, and the run counts as unfinished"
        ) from None
    return _SavedRun(config_file.parent, settings, trained_epochs)


def _check_changes(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    """UsageError if a setting differs from the run's that cannot change on resuming."""
    for name in sorted(changes.keys() - RESUME_OVERRIDES):
        if changes[name] == settings[name]:
            continue
        is_path = name in ("dataset", "labels") and changes[name]
        if is_path and full_path(changes[name]) == settings[name]:
            continue
        raise UsageError(
            f"{flag(name)} {changes[name]}: a resumed run keeps its setting, {settings[name]}"
        )


def saved_classes(config: Config) -> list[str] | None:
    """The classes of the run to resume, in the order of the network's outputs.

    None for a new run, one that has saved nothing yet, or a file that cannot be read, about which
    `check_resumable` complains.
    """
    if not config.resume:
        return None
    for path in saved_states(Path(config.resume)):
        with contextlib.suppress(UserError, OSError):
            return read_checkpoint(path)["classes"]
    return None


def check_resumable(run: Path, data: Dataset, build_untrained: Callable[[], nn.Module]) -> Dataset:
    """Raise UserError, before anything is changed, unless the run can go on with these images.

    build_untrained: builds the run's network, with any weights. Returns the data with the run's
    own reason for using them.
    """
    states = saved_states(run)
    if not states and (run / "report.json").exists():
        raise UserError(f"{run} is finished, and its last.pth is gone: start a new run")
    for path in states:
        content = read_checkpoint(path, data.classes)
        load_weights(build_untrained(), content["model"], path)
        _check_images(run, content, data)
    saved_settings = json.loads((run / "config.json").read_text())
    return replace(data, fallback_reason=saved_settings.get("substitution", ""))


def _check_images(run: Path, content: dict[str, Any], data: Dataset) -> None:
    """Raise UserError unless the images are those of a saved state.

    content: of last.pth. Version 0.9.0 saved nothing of the images, 0.9.1 only number and mean.
    """
    saved = content.get("fingerprint", [])
    fingerprint = data.fingerprint()
    if saved and same_images(fingerprint, saved):
        return
    if data.drawn and content.get("split_rules", 1) < dataset.SPLIT_RULES:
        raise UserError(
            f"{run} was begun by an older version of this program, which chose the images for "
            f"{' and '.join(data.drawn)} in another way: start a new run"
        )
    if saved:
        changes = describe_changes(content, data)
        has_checksums = len(saved) == len(fingerprint)
        if has_checksums and same_training_images(saved, fingerprint):
            changes = " (the training images are; the validation or test images differ)"
        raise UserError(f"the images are not those that {run} began with{changes}: start a new run")
