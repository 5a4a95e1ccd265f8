"""The parts of gpu_session.py: functions that get a Session and return a Result."""

import shlex
import statistics
import sys
from pathlib import Path

import harness
import torch
from gpu_runs import Result, Session, Trained, as_many_as_fit, benchmark, run, train
from harness import mean_and_std

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
LOSS_TOLERANCE = 0.01  # by which fp32 losses of CPU and GPU may differ, as a share

# A variant of the program that has 4 GiB of the GPU's memory.
LITTLE_MEMORY = """
memory = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(4 * 2**30 / memory)
"""


def cuda_tests(session: Session) -> Result:
    command = [sys.executable, "-m", "pytest", "-m", "", "-k", "cuda"]
    ended = run(session, command, harness.SCRIPT.parent)
    summary = ended.lines[-1][1]  # 30 passed, 2 skipped in 20.15s
    return Result(summary, "passed" in summary, summary)


def default_run(session: Session) -> Result:
    train(session)  # reads the files for the first time
    seeds = range(1 if session.quick else 3)
    runs = as_many_as_fit(session, seeds, lambda seed: train(session, "--seed", str(seed)))
    seconds = [trained.ended.seconds for trained in runs.values()]
    training = mean_and_std([trained.report["seconds"] for trained in runs.values()], digits=2)
    accuracy = mean_and_std([trained.accuracy() for trained in runs.values()], 100, 2)
    figure = f"{mean_and_std(seconds, digits=2)} s, of which training {training} s; {accuracy} %; "
    figure += f"runs: {len(runs)}"
    raw = {seed: trained.figures() for seed, trained in runs.items()}
    return Result(figure, statistics.mean(seconds) <= 8, raw)


def accuracy94(session: Session) -> Result:
    variant = shlex.join(["accuracy94", "--device", session.device, *session.data_options()])
    variants = [variant] if session.quick else [variant, f"{variant} --compile"]
    options = ["--rounds", "1", "--runs", "1" if session.quick else "4"]
    options += ["--data-dir", str(session.data_dir), "--variant", *variants]
    raw = benchmark(session, "records", *map(str, session.scripts), *options)

    words, ours, theirs = [], [], []
    for start in raw:
        seconds = [run["seconds"] for run in start["runs"]]
        accuracies = [run["accuracy"] for run in start["runs"]]
        means = statistics.mean(seconds), statistics.mean(accuracies)
        name = Path(start["contender"]).name
        if start["contender"] in variants:
            ours.append(means)
            name = "accuracy94" if start["contender"] == variant else "accuracy94 --compile"
        else:
            theirs.append(means)
        accuracy = mean_and_std(accuracies, 100, 2)
        words.append(f"{name} {mean_and_std(seconds, digits=2)} s, {accuracy} %")
    return Result("; ".join(words), beats_records(ours, theirs), raw)


def beats_records(
    ours: list[tuple[float, float]], theirs: list[tuple[float, float]]
) -> bool | None:
    """Whether a variant of this program is accurate enough and faster than every record script.

    ours, theirs: mean seconds and accuracy of each. None: there is nothing to compare with.
    """
    accurate = [seconds for seconds, accuracy in ours if accuracy >= 0.94]
    if not accurate:
        return False
    if not theirs:
        return None
    return min(accurate) <= 0.9 * min(seconds for seconds, _ in theirs)


def without_compiler(session: Session) -> Result:
    trained = train(session, "--recipe", "accuracy94")
    (saved,) = trained.ended.times_of("Model: ")
    raw = {"saved": saved, **trained.figures()}
    scripts = {str(script) for script in session.scripts}
    starts = session.earlier["accuracy94"].raw if "accuracy94" in session.earlier else []
    theirs = [start["runs"][0]["since"] for start in starts if start["contender"] in scripts]
    if not theirs:
        return Result(f"{saved:.1f} s; no script beside it", None, raw)
    figure = f"{saved:.1f} s; the fastest script's first result after {min(theirs):.1f} s"
    return Result(figure, saved <= min(theirs) / 3, raw)


def out_of_memory(session: Session) -> Result:
    options = ["--epochs", "2", "--batch-size", "45000", "--micro-batch", "45000"]
    trained = train(session, *options, snippet=LITTLE_MEMORY)
    notes = [line for _, line in trained.ended.lines if "out of memory" in line]
    return Result(notes[-1] if notes else "no note", bool(notes), {"notes": notes})


def nccl(session: Session) -> Result:
    trained = train(session, "--epochs", "2", launcher=TORCHRUN)
    figure = f"{100 * trained.accuracy():.1f} % after two epochs"
    return Result(figure, True, trained.figures())


def resume(session: Session) -> Result:
    """Compare the weights of an unbroken run with those of one that was killed."""
    command = [sys.executable, str(harness.SCRIPT)]
    start = [*command, "--device", session.device, "--deterministic", *session.data_options()]
    run(session, [*start, "--run-dir", "whole", "--out", "whole.pth"])
    new_run = [*start, "--run-dir", "killed", "--out", "resumed.pth"]
    run(session, new_run, kill_after="Epoch 0000")
    resumed = run(session, [*command, "--resume", "killed", "--data-dir", str(session.data_dir)])
    if not resumed.times_of("Resuming after step"):
        raise RuntimeError("the killed run did not go on, but began anew")
    files = [session.folder / name for name in ("whole.pth", "resumed.pth")]
    expected, found = (_load_weights(path) for path in files)
    largest = max((expected[name] - found[name]).abs().max().item() for name in expected)
    figure = "bit for bit" if largest == 0 else f"weights differ by up to {largest:.2g}"
    return Result(f"{figure}, with --deterministic", largest == 0, {"largest_difference": largest})


def _load_weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True, map_location="cpu")["model"]


def cpu_and_gpu(session: Session) -> Result:
    losses = {}
    for device in ("cpu", session.device):
        options = ["--device", device, "--precision", "fp32", "--subset", "2000", "--epochs", "2"]
        trained = train(session, *options, "--progressive-resizing", "0")
        losses[device] = [epoch["train_loss"] for epoch in trained.epochs]
    pairs = zip(losses["cpu"], losses[session.device], strict=True)
    largest = max(abs(ours / cpu - 1) for cpu, ours in pairs)
    figure = f"training losses differ by up to {100 * largest:.2g} %"
    return Result(figure, largest <= LOSS_TOLERANCE, losses)


def repeat(session: Session) -> Result:
    trained = train(session, "--repeat", "2" if session.quick else "8")
    began = trained.ended.times_of("Start Training")
    hourly = 3600 * (len(began) - 1) / (began[-1] - began[0])
    accuracies = [results["test_accuracy"] for results in trained.report["repeats"]]
    raw = {"trainings_an_hour": hourly, "began": began, "test_accuracies": accuracies}
    return Result(f"{hourly:.0f} trainings an hour", None, raw)


def start_up(session: Session) -> Result:
    dataset = "digits" if session.quick else "cifar10"
    options = ["--runs", "1" if session.quick else "2", "--dataset", dataset]
    options += ["--device", session.device, "--data-dir", str(session.data_dir)]
    raw = benchmark(session, "startup", *options)
    seconds = {row["stage"]: statistics.median(row["seconds"]) for row in raw}
    stages = ("until the first step", "after the last step")
    return Result(", ".join(f"{seconds[stage]:.1f} s {stage}" for stage in stages), None, raw)


def compare_trainings(session: Session, flags: list[str], values: list[str]) -> Result:
    """Train `accuracy94` with each of these values of some options."""

    def train_with(value: str) -> Trained:
        options = [word for flag in flags for word in (flag, value)]
        return train(session, "--recipe", "accuracy94", *options)

    runs = as_many_as_fit(session, values, train_with)
    words = []
    for value, trained in runs.items():
        accuracy = 100 * trained.accuracy()
        words.append(f"{value}: {trained.report['seconds']:.2f} s, {accuracy:.2f} %")
    words += [f"{value}: no time left" for value in values if value not in runs]
    raw = {value: trained.figures() for value, trained in runs.items()}
    return Result("; ".join(words), None, raw)


def precisions(session: Session) -> Result:
    return compare_trainings(session, ["--precision"], ["bf16", "fp16"])


def batch_sizes(session: Session) -> Result:
    values = ["25", "50"] if session.quick else ["500", "1000", "1536", "2000"]
    return compare_trainings(session, ["--batch-size", "--micro-batch"], values)


def utilisation(session: Session) -> Result:
    options = ["--device", session.device, "--data-dir", str(session.data_dir)]
    if session.quick:
        options += ["--dataset", "digits", "--seconds", "0", "--rounds", "1"]
    else:
        options += ["--recipe", "accuracy94", "--seconds", "0.5"]
    raw = benchmark(session, "utilisation", *options)
    share = statistics.median(raw["steps"][0]["shares"])
    return Result(f"{100 * share:.0f} % of the matrices' rate, on full-size images", None, raw)
