"""Does a run survive accidents, and the program the files that strangers send?

    python benchmarks/survival.py --kills 30 --disks 10 --checkpoints 2000 --images 10000

Small runs on the digits, on the CPU, are killed at random moments, half of them saving after each
step, and run out of disk. After an accident every file of the run is read. Then the run is resumed:
its final weights have to equal those of an undisturbed run bit for bit. A full disk needs the right
to mount a small one (Linux, root). Mutated checkpoints are loaded; mutated pictures are classified,
and read as those of a folder. Each file has to work or to be refused with a UserError, in 5 s and
1 GB of memory (Linux only). Prints Markdown tables; exit status 1 if anything went wrong.
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import math
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(harness.SCRIPT.parent))
import image_classification as ic
import inference
from classifier.datasets import decode
from classifier.errors import UserError

OPTIONS = ["--dataset", "digits", "--width", "0.5", "--epochs", "4", "--device", "cpu"]
MODEL_FILE = "model_cnn_digits.pth"
MAX_SECONDS = 5  # that a file may take
MAX_MIB = 1000  # of memory that a file may take
Weights = dict[str, torch.Tensor]

SAVE_EVERY = """
from classifier import runs

replace(runs, "SAVE_EVERY", {seconds})
"""


# ---- Accidents -----------------------------------------------------------------------------------


class Undisturbed(NamedTuple):
    """A run without accidents.

    Attributes:
        start_up: seconds from its start until it trains.
        seconds: from its start to its end.
        kilobytes: that its files take.
        weights: the final ones.
        model_file: content of the model file.
    """

    start_up: float
    seconds: float
    kilobytes: int
    weights: Weights
    model_file: bytes


def start(folder: Path, *options: str, save_every: float = 120.0) -> subprocess.Popen[str]:
    """Start the program in `folder`.

    save_every: seconds after which it saves, besides at the ends of epochs.
    """
    snippet = SAVE_EVERY.format(seconds=save_every)
    command = [sys.executable, "-c", harness.variant_program(snippet), *options]
    return harness.start(command, folder)


def run_undisturbed() -> Undisturbed:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        start_up = 0.0
        process = start(folder, *OPTIONS)
        for line in process.stdout or []:
            if line.startswith("Start Training"):
                start_up = time.perf_counter() - began
        process.communicate()
        seconds = time.perf_counter() - began
        files = [path for path in folder.rglob("*") if path.is_file()]
        kilobytes = sum(path.stat().st_size for path in files) // 1024
        model_file = folder / MODEL_FILE
        weights = torch.load(model_file, weights_only=True)["model"]
        return Undisturbed(start_up, seconds, kilobytes, weights, model_file.read_bytes())


def kill(seconds: float, save_every: float, expected: Weights) -> tuple[str, list[str]]:
    """Kill a run after so many seconds; returns how far it was, and what is wrong afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = start(folder, *OPTIONS, save_every=save_every)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.communicate()
        return stage(folder), problems(folder, expected)


def stage(folder: Path) -> str:
    """How far the run in this folder is: "none", so many epochs, or "finished"."""
    if list(folder.glob("runs/*/*/report.json")):
        return "finished"
    for metrics_file in folder.glob("runs/*/*/metrics.csv"):
        rows = metrics_file.read_text().splitlines()
        return f"{len(rows) - 1} epochs"
    return "none"


def fill_disk(kilobytes: int, expected: Weights) -> tuple[str, list[str]]:
    """Run on a disk of that size, then go on with more space.

    Returns the error that the run ended with, and what is wrong afterwards.
    """
    with tempfile.TemporaryDirectory() as name:
        size = f"size={kilobytes}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", name], check=True)
        try:
            process = start(Path(name), *OPTIONS)
            output, _ = process.communicate()
            errors = [line for line in output.splitlines() if line.startswith("error: ")]
            wrong = []
            if process.returncode and len(errors) != 1:
                wrong.append(f"{len(errors)} lines of error: {output[-300:]}")
            subprocess.run(["mount", "-o", "remount,size=200m", name], check=True)
            wrong += problems(Path(name), expected)
        finally:
            subprocess.run(["umount", name], check=True)
    return errors[0] if errors else "it sufficed", wrong


def problems(folder: Path, expected: Weights) -> list[str]:
    """What is wrong after an accident, if the run in this folder is resumed.

    Damaged files, a resume that fails, no model at the end, or weights that are not as expected.
    """
    runs = [path.parent for path in folder.glob("runs/*/*/config.json")]
    wrong = []
    for run in runs:
        wrong += damaged_files(run)
    if not list(folder.glob("runs/*/*/report.json")):
        options = ["--resume", "last"] if runs else OPTIONS
        resumed = start(folder, *options)
        output, _ = resumed.communicate()
        if resumed.returncode:
            wrong.append(f"resume: {output[-300:]}")
    model_file = folder / MODEL_FILE
    if not model_file.exists():
        return [*wrong, "no model in the end"]
    found = torch.load(model_file, weights_only=True)["model"]
    for name in expected:
        if not torch.equal(expected[name], found[name]):
            wrong.append(f"{name} differs")
    return wrong


def damaged_files(run: Path) -> list[str]:
    """The files of a run that cannot be read, with the reason."""
    damaged = []
    for path in run.rglob("*"):
        try:
            read_file(path)
        except Exception as error:
            damaged.append(f"{path.name}: {error!r}")
    return damaged


def read_file(path: Path) -> None:
    """Read a file that a run has written; raises an exception if it is damaged."""
    if path.suffix == ".pth":
        torch.load(path, weights_only=True)
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            lengths = {len(row) for row in csv.reader(file)}
        if len(lengths) != 1:
            raise ValueError(f"rows of {sorted(lengths)} cells")


def print_accident(accident: str, when: str, wrong: list[str]) -> bool:
    """Print what was wrong after an accident as a row of the table; True if there was anything."""
    words = " ".join("; ".join(wrong).split())  # in one line, unlike what the program printed
    print(f"| {accident} | {when} | {words or 'nothing'} |", flush=True)
    return bool(wrong)


def cause_accidents(
    undisturbed: Undisturbed, num_kills: int, num_disks: int, chance: random.Random
) -> int:
    """Kill runs and fill disks, and print a row for each; returns how many runs were lost."""
    lost = 0
    for number in tqdm(range(num_kills), "Killing", unit="run", disable=None):
        save_every = 120.0 if number % 2 == 0 else 0.0
        while True:
            seconds = chance.uniform(undisturbed.start_up, undisturbed.seconds)
            reached, wrong = kill(seconds, save_every, undisturbed.weights)
            if reached != "finished" or wrong:
                break  # a run that had ended by then does not count
        lost += print_accident("killed", f"after {seconds:.1f} s ({reached})", wrong)
    for _ in tqdm(range(num_disks), "Filling", unit="run", disable=None):
        kilobytes = chance.randrange(undisturbed.kilobytes // 10, undisturbed.kilobytes)
        error, wrong = fill_disk(kilobytes, undisturbed.weights)
        lost += print_accident("full disk", f"{kilobytes} KiB ({error[:90]})", wrong)
    return lost


# ---- Mutated files -------------------------------------------------------------------------------


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A file with a few bytes changed, a piece lost, repeated or blanked, or its end cut off."""
    changed = bytearray(content)
    start = chance.randrange(len(content))
    end = min(len(content), start + chance.choice([1, 10, 100, 10_000]))
    kind = chance.choice(["bytes", "bytes", "lost", "repeated", "blank", "cut"])
    if kind == "bytes":
        for _ in range(chance.choice([1, 3, 30])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    elif kind == "lost":
        del changed[start:end]
    elif kind == "repeated":
        changed[start:end] = 2 * content[start:end]
    elif kind == "blank":
        changed[start:end] = bytes(end - start)
    else:
        del changed[start:]
    return bytes(changed)


def altered(content: bytes, chance: random.Random) -> bytes:
    """A checkpoint whose file is whole, with a strange value somewhere in it."""
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    place: Any = checkpoint
    key = chance.choice(list(place))
    while isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.8:
        place = place[key]
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    place[key] = chance.choice(strange_values())
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def strange_values() -> list[Any]:
    """Values that a checkpoint should not hold."""
    values: list[Any] = [None, -1, 0, 10**6, 10**12, 1e308, math.nan, "", "../x", [], {}, [1]]
    values.append(torch.zeros(3))
    values.append(torch.zeros(1).expand(10**6, 10**6))
    return values


def mutated_checkpoints(
    content: bytes, count: int, chance: random.Random
) -> Iterator[tuple[bytes, str]]:
    """Mutations of a checkpoint: (content, suffix) of each file."""
    for number in range(count):
        change = altered if number % 2 else mutated
        yield change(content, chance), ".pth"


def pictures(count: int, chance: random.Random) -> Iterator[tuple[bytes, str]]:
    """Mutations of a photograph in several formats: (content, suffix) of each file."""
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image("china.jpg")).resize((160, 107))
    formats = ["JPEG", "PNG", "GIF", "WEBP"]
    originals = []
    for name in formats:
        buffer = io.BytesIO()
        photo.save(buffer, name)
        originals.append(buffer.getvalue())
    for number in range(count):
        place = number % len(formats)
        yield mutated(originals[place], chance), f".{formats[place].lower()}"


load_classifier = functools.cache(inference.load_model)


def load(content: bytes, suffix: str, model: str) -> tuple[str, float, float]:
    """Load a file as the program does.

    content, suffix: of the file. model: path of a model file, which classifies pictures.
    Returns "worked" or "refused", how many seconds that took, and the peak memory of this process
    in MiB.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        path = Path(name, f"mutant{suffix}")
        path.write_bytes(content)
        began = time.perf_counter()
        try:
            if suffix in (".pth", ".safetensors"):
                ic.load_checkpoint(path)
            else:
                inference.predict(load_classifier(model, "cpu"), [path])
                decode.decode(path, 64)
            result = "worked"
        except UserError:
            result = "refused"
        seconds = time.perf_counter() - began
    return result, seconds, peak_mib()


def peak_mib() -> float:
    """Largest memory of this process so far, in MiB; 0 if the system does not tell.

    Linux's ru_maxrss would not do: a process inherits that of the one that started it.
    """
    return harness.read_kilobytes("/proc/self/status", "VmHWM") / 1024


def load_all(name: str, files: Iterator[tuple[bytes, str]], count: int, model: str) -> bool:
    """Load mutated files in another process and print a row; True if anything went wrong.

    files: (content, suffix) of each; count: how many they are. model: path of a model file.
    """
    if not count:
        return False
    results: Counter[str] = Counter()
    slowest = 0.0
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        whole_file = Path(model).read_bytes()
        _, _, before = pool.submit(load, whole_file, ".pth", model).result()
        peak = before
        for content, suffix in tqdm(files, name, count, unit="file", disable=None):
            try:
                result, seconds, peak = pool.submit(load, content, suffix, model).result()
                slowest = max(slowest, seconds)
            except Exception as error:  # also if the process has crashed
                result = f"{type(error).__name__}: {error}"[:200]
            results[result] += 1
    words = ", ".join(f"{number} {result}" for result, number in results.most_common())
    memory = peak - before
    print(f"| {count} {name} | {words} | {slowest:.2f} | {memory:.0f} |", flush=True)
    has_failed = bool(results.keys() - {"worked", "refused"})
    return has_failed or slowest > MAX_SECONDS or memory > MAX_MIB


# ---- Both ----------------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = harness.new_parser(__doc__)
    counts = [
        ("--kills", 30, "runs that are killed"),
        ("--disks", 10, "runs on a disk that is too small"),
        ("--checkpoints", 2000, "mutated checkpoints"),
        ("--images", 10_000, "mutated pictures"),
    ]
    for flag, default, words in counts:
        help_text = f"{words} (default: {default})"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=help_text)
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    undisturbed = run_undisturbed()
    chance = random.Random(0)

    failed = False
    if options.checkpoints + options.images:
        print("| mutated | what became of them | slowest, s | memory, MiB |")
        print("| --- | --- | --- | --- |")
        content = undisturbed.model_file
        checkpoints = mutated_checkpoints(content, options.checkpoints, chance)
        images = pictures(options.images, chance)
        with tempfile.TemporaryDirectory() as name:
            model = Path(name, MODEL_FILE)
            model.write_bytes(content)
            failed |= load_all("checkpoints", checkpoints, options.checkpoints, str(model))
            failed |= load_all("pictures", images, options.images, str(model))

    if options.kills + options.disks:
        print("\n| accident | when | what was wrong after it |\n| --- | --- | --- |")
    lost = cause_accidents(undisturbed, options.kills, options.disks, chance)
    num_runs = options.kills + options.disks
    print(f"\n{num_runs - lost} of {num_runs} runs went on as if undisturbed")
    return 1 if failed or lost else 0


if __name__ == "__main__":
    sys.exit(main())
