"""--repeat: train with several seeds, and sum up their results."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from classifier.config import Config
from classifier.distributed import Group
from classifier.errors import Stopped
from classifier.reports import Report
from classifier.runs import Run, StopRequest


def train_seeds(
    train_seed: Callable[[Config, Run, float], Report],
    config: Config,
    run: Run,
    started: float,
    group: Group,
    stop: StopRequest,
) -> Report:
    """Train with each seed of --repeat, one after the other, and return what they found together.

    Args:
        train_seed: trains with the seed of a Config, in a run folder, until a deadline on
            time.perf_counter(), and reports.
        run: the folder of the whole run; each of several seeds gets a folder in it.
        started: when the run began; the seeds share the --minutes since then.

    Raises Stopped.
    """
    reports: list[Report] = []
    for seeds_left in range(config.repeat, 0, -1):
        now = time.perf_counter()
        seconds_left = started + 60 * config.minutes - now
        deadline = now + seconds_left / seeds_left
        if config.repeat == 1:
            report = train_seed(config, run, deadline)
            gc.collect()
            return report

        seed = config.seed + len(reports)
        print(f"\nSeed {seed}, {seeds_left} to go\n")
        seed_run = run.seed_run(seed)
        report = train_seed(replace(config, seed=seed, repeat=1), seed_run, deadline)
        gc.collect()  # torch's optimisers keep the frames that made them, and so all of a trainer
        seed_run.finish(report.results)
        reports.append(report)
        if seeds_left > 1 and group.broadcast_from_rank0(lambda: stop.requested):
            raise Stopped(stop.signum)
    return summarize(reports, run.path)


def summarize(reports: list[Report], run: Path) -> Report:
    """Combine the reports of several seeds, and print mean and spread of their accuracies.

    The model with the lowest validation loss is kept (the first one without validation images).
    All results have the names and values of this model's report. What is about all seeds has names
    of its own: `test_accuracy_mean`, `test_accuracy_std` and `test_accuracy_mean_interval` (95 %,
    Student's t), the same of `test_views_accuracy`, `seconds_total`, `kept` and `repeats`.

    reports: of at least two seeds. run: the folder that holds those of the seeds.
    """
    kept = min(reports, key=_loss_of_kept_weights)
    results = dict(kept.results)
    print()
    for key in ("test_accuracy", "test_views_accuracy"):
        if key not in kept.results:
            continue
        accuracies = [report.results[key] for report in reports]
        mean = statistics.fmean(accuracies)
        std = statistics.stdev(accuracies)
        low, high = _student_interval(mean, std, len(accuracies))
        results[f"{key}_mean"] = mean
        results[f"{key}_std"] = std
        results[f"{key}_mean_interval"] = [low, high]

        seeds = f"{len(reports)} seeds"
        if key == "test_views_accuracy":
            seeds += f" with {results['test_views']} views"
        interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f} %"
        spread = f"standard deviation {100 * std:.2f}, {interval}"
        print(f"Mean test accuracy of {seeds}: {100 * mean:.2f} %, {spread}")
    print(f"All results below are those of the kept model: {kept.run.name}")
    results["seconds_total"] = sum(report.results["seconds"] for report in reports)
    results["kept"] = kept.run.name
    results["repeats"] = [report.results for report in reports]
    return replace(kept, results=results, run=run)


def _loss_of_kept_weights(report: Report) -> float:
    """Validation loss of the epoch whose weights a seed has kept.

    Infinity if it is not known, as without validation images.
    """
    loss = report.history[report.results["best_epoch"]]["valid_loss"]
    return math.inf if loss is None else loss


def _student_interval(mean: float, std: float, count: int) -> tuple[float, float]:
    """95 % interval of the mean of `count` accuracies (Student's t), within [0, 1]."""
    from scipy.stats import t

    quantile = float(t.ppf(0.975, count - 1))
    half_width = quantile * std / math.sqrt(count)
    return max(0.0, mean - half_width), min(1.0, mean + half_width)
