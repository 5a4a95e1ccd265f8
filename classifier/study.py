"""A search for better settings: an Optuna study in a folder, where several processes may work.

Only tune.py imports this module: it needs Optuna, which is slow to import.
"""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from classifier.config import PATHS, flag
from classifier.datasets.dataset import same_images
from classifier.errors import UsageError
from classifier.legacy import translate_settings
from classifier.recipes import NOT_IN_RECIPES, Settings

# User attributes of the study and its trials.
FIXED = "fixed"  # of the study: the settings that all its trials share
FINGERPRINT = "fingerprint"  # of the study: tells its images from others
DEFAULTS = "defaults"  # of the trial with the program's defaults
SETTINGS = "settings"  # of a trial: the settings that the search chose
WORKER = "worker"  # of a trial: number of the worker that runs or ran it
# Settings that would name a place, or a file to execute.
NEVER_SEARCHED = {*NOT_IN_RECIPES, *PATHS, "mirror", "model"}


class Study:
    """The trials of a search, in the file journal.log of its folder.

    Lock files in that folder keep processes that share a study apart: a worker holds the lock of
    its number as long as it lives, and .ask.lock while it adds a trial.

    Attributes:
        folder: the folder of the study, which exists; its name is the name of the study.
        optuna_study: the study itself.
    """

    def __init__(self, folder: Path, epochs: int):
        """Open the study in this folder, or create it. epochs: of a trial."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal = str(folder / "journal.log")
        backend = JournalFileBackend(journal, lock_obj=JournalFileOpenLock(journal))
        # the first epochs say little about the last one
        pruner = optuna.pruners.MedianPruner(n_warmup_steps=epochs // 3)
        self.folder = folder
        self.optuna_study = optuna.create_study(
            storage=JournalStorage(backend),
            study_name=folder.name,
            direction="maximize",
            pruner=pruner,
            load_if_exists=True,
        )

    # ---- before the search ----

    def begin(self, fixed: Settings, fingerprint: list[float]) -> None:
        """Fail the trials of processes that were killed, and queue a trial with the defaults.

        Args:
            fixed: the settings that all trials share.
            fingerprint: of the data set.

        Raises UsageError if the study has other settings or images.
        """
        with self._ask_lock():
            self._check_fixed(fixed)
            self._check_images(fingerprint)
            self.optuna_study.set_user_attr(FIXED, fixed)
            self.optuna_study.set_user_attr(FINGERPRINT, fingerprint)
            self._fail_abandoned_trials()
            if not self._has_default_trial():
                self.optuna_study.enqueue_trial({}, user_attrs={DEFAULTS: True})

    def _check_fixed(self, fixed: Settings) -> None:
        known = translate_settings(self.optuna_study.user_attrs.get(FIXED, fixed))
        for name in [*known, *fixed]:
            if known.get(name) != fixed.get(name):
                value = known.get(name, "the default")
                raise UsageError(
                    f"{self.folder} is a search with {flag(name)} {value}: "
                    "name a new one with --study NAME"
                )

    def lacks_fingerprint(self) -> bool:
        """Whether it has trials and does not tell on which images, as in version 0.9."""
        return FINGERPRINT not in self.optuna_study.user_attrs and self.num_trials() > 0

    def _check_images(self, fingerprint: list[float]) -> None:
        known = self.optuna_study.user_attrs.get(FINGERPRINT, fingerprint)
        if not same_images(known, fingerprint):
            raise UsageError(
                f"{self.folder} is a search on other images than the data set has now, and their "
                "accuracies cannot be compared: name a new one with --study NAME"
            )

    def _fail_abandoned_trials(self) -> None:
        for trial in self._trials(TrialState.RUNNING):
            worker = trial.user_attrs.get(WORKER)
            if (
                type(worker) is not int
            ):  # killed before it wrote that, or a stranger's: no file name
                self.optuna_study.tell(trial.number, state=TrialState.FAIL)
                continue
            lock = self._worker_lock(worker)
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):  # else its worker is alive
                self.optuna_study.tell(trial.number, state=TrialState.FAIL)

    def _has_default_trial(self) -> bool:
        """Whether a trial with the defaults is queued, running or done."""
        for trial in self._trials():
            if DEFAULTS in trial.user_attrs and trial.state != TrialState.FAIL:
                return True
        return False

    # ---- trials of a worker ----

    @contextlib.contextmanager
    def worker(self) -> Iterator[int]:
        """Take the lowest number that no living worker of the study has."""
        for number in itertools.count():
            lock = self._worker_lock(number)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield number
            finally:
                lock.release()
            return

    def seed_sampler(self, seed: int) -> None:
        """Draw the settings of further trials from this seed, by the TPE sampler."""
        self.optuna_study.sampler = optuna.samplers.TPESampler(
            seed=seed % 2**32, multivariate=False
        )

    def ask(self, worker: int, max_trials: int) -> Trial | None:
        """A new trial for this worker, or the queued one; None if the study has enough of them."""
        with self._ask_lock():
            if self.num_trials() >= max_trials:
                return None
            trial = self.optuna_study.ask()
            trial.set_user_attr(WORKER, worker)
            return trial

    def complete(self, trial: Trial, accuracy: float) -> None:
        """Record a trial that was trained to its end."""
        self.optuna_study.tell(trial, accuracy)

    def prune(self, trial: Trial) -> None:
        """Record a trial that ended before its time, because it was bad."""
        self.optuna_study.tell(trial, state=TrialState.PRUNED)

    def fail(self, trial: Trial) -> None:
        """Record a trial that was interrupted; it does not count."""
        self.optuna_study.tell(trial, state=TrialState.FAIL)

    # ---- what is known so far ----

    def num_trials(self) -> int:
        """How many trials are complete, pruned or running."""
        return len(self._trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING))

    def num_trials_ever(self) -> int:
        """How many trials there are, interrupted and queued ones included."""
        return len(self._trials())

    def complete_trials(self) -> list[FrozenTrial]:
        return self._trials(TrialState.COMPLETE)

    def pruned_trials(self) -> list[FrozenTrial]:
        return self._trials(TrialState.PRUNED)

    def best_trial(self) -> FrozenTrial | None:
        """The trial with the highest accuracy; the one with the defaults if others equal it.

        None if no trial is complete.
        """

        def rank(trial: FrozenTrial) -> tuple[float, bool]:
            return accuracy_of(trial), is_default(trial)

        return max(self.complete_trials(), key=rank, default=None)

    # ---- helpers ----

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials in one of these states; without any: all."""
        return self.optuna_study.get_trials(deepcopy=False, states=states or None)

    def _ask_lock(self) -> FileLock:
        return FileLock(self.folder / ".ask.lock")

    def _worker_lock(self, number: int) -> FileLock:
        return FileLock(self.folder / f".worker-{number}.lock")


def is_default(trial: Trial | FrozenTrial) -> bool:
    """Whether this is the trial with the program's defaults."""
    return DEFAULTS in trial.user_attrs


def accuracy_of(trial: FrozenTrial) -> float:
    """Validation accuracy, in [0, 1], of a complete trial."""
    assert trial.value is not None, trial.state
    return trial.value


def trial_settings(trial: FrozenTrial) -> Settings:
    """The settings that the search chose for this trial; version 0.9 may have made it."""
    settings = translate_settings(trial.user_attrs[SETTINGS])
    # the best settings become a recipe, and the journal may be somebody else's
    return {name: value for name, value in settings.items() if name not in NEVER_SEARCHED}
