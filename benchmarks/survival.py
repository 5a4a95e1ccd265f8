"""Does a run survive what breaks, and the program what strangers send?

    python benchmarks/survival.py --kills 30 --disks 10 --checkpoints 2000 --images 10000

Small runs on the embedded digits, on the CPU, are killed at random moments, half of them saving after each step, and
run out of disk. After an accident every file of the run is read; then the run is resumed, and its final weights have to
equal those of an undisturbed one bit for bit. The full disk needs the right to mount a small one (Linux, root).
Mutations of a checkpoint are loaded and mutations of pictures classified and read as a folder's: each has to work or to
be refused in words, in 5 s, in 1 GB of memory. Prints Markdown tables; exit status 1 if anything went wrong.
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import time_to_accuracy
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import image_classification as ic
import inference
from alternatives import datasets

OPTIONS = ["--dataset", "digits", "--width", "0.5", "--epochs", "4", "--device", "cpu"]


def start(folder: Path, *options: str, save_every: float = 120.0) -> subprocess.Popen:
    """The program in `folder`, saving every so many seconds besides the ends of epochs."""
    code = f"import sys, image_classification as ic\nic.SAVE_EVERY = {save_every}\nsys.exit(ic.main(sys.argv[1:]))"
    return time_to_accuracy.start([sys.executable, "-c", code, *options], folder)


def damaged(run: Path) -> list[str]:
    """The files of a run that cannot be read."""
    wrong = []
    for path in run.rglob("*"):
        try:
            if path.suffix == ".pth":
                torch.load(path, weights_only=True)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".csv":
                assert len({len(row) for row in csv.reader(path.open())}) == 1
            elif path.suffix == ".png":
                Image.open(path).load()
        except Exception as error:
            wrong.append(f"{path.name}: {error!r}")
    return wrong


def compare(folder: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    """What is wrong after an accident: damaged files, a resume that fails, no model or other weights in the end."""
    runs = [path.parent for path in folder.glob("runs/*/*/config.json")]
    wrong = [problem for run in runs for problem in damaged(run)]
    if not list(folder.glob("runs/*/*/report.json")):
        resumed = start(folder, *(["--resume", "last"] if runs else OPTIONS))
        out, _ = resumed.communicate()
        wrong += [f"resume: {out[-300:]}"] if resumed.returncode else []
    if not (model := folder / "model_cnn_digits.pth").exists():
        return [*wrong, "no model in the end"]
    found = torch.load(model, weights_only=True)["model"]
    return wrong + [f"{name} differs" for name in expected if not torch.equal(expected[name], found[name])]


def killed(seconds: float, save_every: float, expected: dict[str, torch.Tensor]) -> tuple[str, list[str]]:
    """Kill a run after so many seconds; how far it was, and what is wrong then."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = start(folder, *OPTIONS, save_every=save_every)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.communicate()
        epochs = [len(path.read_text().splitlines()) - 1 for path in folder.glob("runs/*/*/metrics.csv")]
        stage = "finished" if list(folder.glob("runs/*/*/report.json")) else f"{epochs[0]} epochs" if epochs else "none"
        return stage, compare(folder, expected)


def full_disk(kilobytes: int, expected: dict[str, torch.Tensor]) -> tuple[str, list[str]]:
    """Run on a disk of that size, then go on with more space; the error, and what is wrong then."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", name], check=True)
        try:
            process = start(Path(name), *OPTIONS)
            out, _ = process.communicate()
            errors = [line for line in out.splitlines() if line.startswith("error: ")]
            wrong = [f"{len(errors)} lines of error: {out[-300:]}"] if process.returncode and len(errors) != 1 else []
            subprocess.run(["mount", "-o", "remount,size=200m", name], check=True)
            return (errors or ["it sufficed"])[0], wrong + compare(Path(name), expected)
        finally:
            subprocess.run(["umount", name], check=True)


def tell(accident: str, when: str, wrong: list[str]) -> bool:
    """Print what was wrong after an accident as a row; was there anything?"""
    words = " ".join("; ".join(wrong).split())  # in one line, unlike what the program printed
    print(f"| {accident} | {when} | {words or 'nothing'} |", flush=True)
    return bool(wrong)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A file with a few bytes changed, a piece lost, repeated or blanked, or its end cut off."""
    changed, start = bytearray(content), chance.randrange(len(content))
    end = min(len(content), start + chance.choice([1, 10, 100, 10_000]))
    kind = chance.choice(["bytes", "bytes", "lost", "repeated", "blank", "cut"])
    if kind == "bytes":
        for _ in range(chance.choice([1, 3, 30])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    elif kind == "cut":
        del changed[start:]
    else:
        changed[start:end] = {"lost": b"", "repeated": 2 * content[start:end], "blank": bytes(end - start)}[kind]
    return bytes(changed)


def altered(content: bytes, chance: random.Random) -> bytes:
    """A checkpoint whose file is whole, with a strange value somewhere in it."""
    place = whole = torch.load(io.BytesIO(content), weights_only=True)
    key = chance.choice(list(place))
    while isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.8:
        place = place[key]
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    strange: list = [None, -1, 0, 10**6, 10**12, 1e308, float("nan"), "", "../x", [], {}, [1], torch.zeros(3),
               torch.zeros(1).expand(10**6, 10**6)]  # fmt: skip
    place[key] = chance.choice(strange)
    torch.save(whole, changed := io.BytesIO())
    return changed.getvalue()


classifier = functools.cache(inference.load_model)


def load(content: bytes, suffix: str, model: str) -> tuple[str, float, float]:
    """What becomes of a mutated file, in words; the seconds that takes; and the process's peak memory, MiB."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        path, began = Path(name, f"mutant{suffix}"), time.perf_counter()
        path.write_bytes(content)
        try:
            if suffix == ".pth":
                ic.load_checkpoint(path)
            else:
                inference.predict(classifier(model, "cpu"), [path])
                datasets.decode(path, 64)
            done = "worked"
        except (ic.UserError, inference.InferenceError):
            done = "refused"
    return done, time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def fuzz(name: str, files: Iterator[tuple[bytes, str]], count: int, model: str) -> bool:
    """Load all of these in a process of its own; prints a row, and tells whether anything went wrong."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        _, _, before = pool.submit(load, Path(model).read_bytes(), ".pth", model).result()
        done, slowest, peak = Counter[str](), 0.0, before
        for content, suffix in tqdm(files, name, count, unit="file", disable=None):
            try:
                result, seconds, peak = pool.submit(load, content, suffix, model).result()
                slowest = max(slowest, seconds)
            except Exception as error:  # a crash of the process among them
                result = f"{type(error).__name__}: {error}"[:200]
            done[result] += 1
    words = ", ".join(f"{number} {result}" for result, number in done.most_common())
    print(f"| {name} | {words} | {slowest:.2f} | {peak - before:.0f} |", flush=True)
    return bool(done.keys() - {"worked", "refused"} or slowest > 5 or peak - before > 1000)


def pictures(count: int, chance: random.Random) -> Iterator[tuple[bytes, str]]:
    """Mutated JPEG, PNG, GIF and WebP files of a photograph."""
    from sklearn.datasets import load_sample_image

    photo, whole = Image.fromarray(load_sample_image("china.jpg")).resize((160, 107)), {}
    for kind in ("JPEG", "PNG", "GIF", "WEBP"):
        photo.save(buffer := io.BytesIO(), kind)
        whole[kind] = buffer.getvalue()
    for number in range(count):
        kind = list(whole)[number % 4]
        yield mutated(whole[kind], chance), f".{kind.lower()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="runs that are killed (default: 30)")
    parser.add_argument("--disks", type=int, default=10, help="runs on a disk that is too small (default: 10)")
    parser.add_argument("--checkpoints", type=int, default=2000, help="mutated checkpoints (default: 2000)")
    parser.add_argument("--images", type=int, default=10_000, help="mutated pictures (default: 10000)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        began, model = time.perf_counter(), Path(name, "model_cnn_digits.pth")
        process = start(Path(name), *OPTIONS)
        begin = next(time.perf_counter() - began for line in process.stdout or [] if line.startswith("Start Training"))
        process.communicate()
        whole = time.perf_counter() - began
        expected = torch.load(model, weights_only=True)["model"]
        used = sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file()) // 1024
        chance, content, failed = random.Random(0), model.read_bytes(), 0
        if options.checkpoints + options.images:
            print("| mutated | what became of them | slowest, s | memory, MiB |\n| --- | --- | --- | --- |")
        if options.checkpoints:
            changed = (((mutated, altered)[i % 2](content, chance), ".pth") for i in range(options.checkpoints))
            failed += fuzz(f"{options.checkpoints} checkpoints", changed, options.checkpoints, str(model))
        if options.images:
            failed += fuzz(f"{options.images} pictures", pictures(options.images, chance), options.images, str(model))
    if options.kills + options.disks:
        print("\n| accident | when | what was wrong after it |\n| --- | --- | --- |")
    lost = 0
    for number in tqdm(range(options.kills), "Killing", unit="run", disable=None):
        while True:
            seconds = chance.uniform(begin, whole)
            stage, wrong = killed(seconds, 0.0 if number % 2 else 120.0, expected)
            if stage != "finished" or wrong:  # a run that had ended by then does not count
                break
        lost += tell("killed", f"after {seconds:.1f} s ({stage})", wrong)
    for _ in tqdm(range(options.disks), "Filling", unit="run", disable=None):
        kilobytes = chance.randrange(used // 10, used)
        stage, wrong = full_disk(kilobytes, expected)
        lost += tell("full disk", f"{kilobytes} KiB ({stage[:90]})", wrong)
    runs = options.kills + options.disks
    print(f"\n{runs - lost} of {runs} runs went on as if undisturbed")
    return int(bool(failed + lost))


if __name__ == "__main__":
    sys.exit(main())
