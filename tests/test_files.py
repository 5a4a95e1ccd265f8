"""Files: never half written, never trusted, and one clear line when the disk says no."""

import os
import random
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import QUICK, beforehand, trainer_of, weights

import image_classification as ic


class Malicious:
    def __reduce__(self):
        return (open, ("owned", "w"))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    trainer = trainer_of(width=0.25)
    trainer.history.append(dict.fromkeys(ic.COLUMNS))
    path = tmp_path_factory.mktemp("model") / "model.pth"
    ic.save_checkpoint(path, trainer.finished())
    return path


def test_bad_checkpoint_is_refused_with_one_line(model_file, folder):
    path, content = folder / "bad.pth", model_file.read_bytes()
    whole = torch.load(model_file, weights_only=True)
    lacking = [{key: whole[key] for key in whole.keys() - {name}} for name in ("classes", "metrics", "versions")]
    evil = {"model": Malicious(), "config": {}, "classes": []}
    torch.save(evil, path, _use_new_zipfile_serialization=False)
    files = content[: len(content) // 2], b"hello", b"", path.read_bytes()
    for bad in (*files, evil, {"weights": torch.zeros(3)}, [1, 2], *lacking):
        path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
        with pytest.raises(ic.UserError, match="not a checkpoint of this program") as caught:
            ic.load_checkpoint(path)
        assert "\n" not in str(caught.value)
        assert not (folder / "owned").exists()


def test_checkpoint_of_another_network_or_other_classes(model_file, folder):
    data = ic.load_data(ic.Config(dataset="digits"))
    with pytest.raises(ic.UserError, match=r"another network: \d+ tensors differ.* it was made with --width 0.25$"):
        ic.build_model(ic.Config(dataset="digits", width=0.5, init_from=str(model_file)), data)
    content = torch.load(model_file, weights_only=True) | {"classes": ["cat", "dog"]}
    ic.save_checkpoint(folder / "other.pth", content)
    with pytest.raises(ic.UserError, match="for other classes: cat, dog"):
        ic.read_checkpoint(folder / "other.pth", data.classes)


@pytest.mark.parametrize("name", ["evil.pyc:f", "notes.txt:f"])
def test_checkpoint_imports_no_file_that_it_names(model_file, folder, name):
    content = torch.load(model_file, weights_only=True)
    content["config"]["model"] = str(folder / name)
    ic.save_checkpoint(folder / "other.pth", content)
    with pytest.raises(ic.UserError, match="holds a network of its own"):
        ic.load_checkpoint(folder / "other.pth")
    (folder / name.partition(":")[0]).write_text("")
    with pytest.raises(ic.UserError, match="there is no Python file"):
        ic.load_checkpoint(folder / "other.pth", model=str(folder / name))


def test_place_that_cannot_be_written_is_named_before_training(inside, folder, unwritable):
    for wrong in ("nowhere/model.pth", "."):
        assert f"cannot be written to {wrong}: name a file with --out" in inside.error(*QUICK, "--out", wrong)
    (folder / "runs").mkdir(exist_ok=True)
    unwritable(folder / "runs")
    error = inside.error(*QUICK)
    assert "runs" in error and "right to write" in error
    (folder / "elsewhere").mkdir()
    unwritable(folder)
    assert "cannot be written" in inside.error(*QUICK, "--run-dir", folder / "elsewhere")
    assert not list((folder / "elsewhere").iterdir())


def test_full_disk_while_saving(inside, folder, small_disk):
    disk = small_disk(2600)
    error = inside.error("--dataset", "digits", "--epochs", "1", "--run-dir", "disk/run", "--width", "0.8")
    assert "No space left on device" in error and ".pth" in error
    assert weights(disk / "run" / "best.pth")  # the last good one is intact
    assert not list(disk.rglob("*.tmp"))


def test_locked_metrics_do_not_stop_a_run(inside, folder, unwritable):
    run = folder / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("locked")
    unwritable(run / "metrics.csv")
    if os.name == "posix" and os.geteuid() != 0:
        pytest.skip("a file's rights do not stop it from being replaced here")
    out, _ = inside(*QUICK, "--run-dir", "run")
    assert out.count("metrics.csv is locked") == 2 and "Done in" in out
    assert (run / "metrics.csv").read_text() == "locked" and (run / "report.json").exists()


def test_writers_leave_old_or_new_but_never_half(folder):
    path, contents = folder / "file", [bytes([i]) * 300_000 for i in range(4)]
    path.write_bytes(contents[0])
    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(ic.write_atomically, path, content) for content in 10 * contents]
        while not all(writer.done() for writer in writers):
            assert path.read_bytes() in contents
    assert list(folder.iterdir()) == [path]


def test_run_folders_are_distinct(folder):
    data = ic.load_data(config := ic.Config(dataset="digits"))
    for data.name in "abcdef":  # one round misses a race about half the time
        with ThreadPoolExecutor(100) as pool:
            assert len(set(pool.map(lambda _: ic.new_run_folder(config, data), range(100)))) == 100


def test_run_folder_that_vanishes(inside):
    with beforehand(ic.RunLog, "epoch", lambda log, *_: shutil.rmtree(log.run)):
        error = inside.error(*QUICK)
    assert "runs" in error and "no such file or folder" in error


@pytest.mark.skipif(os.name != "posix", reason="Windows lets few make links")
def test_links_to_nowhere(inside, folder):
    for name in ("model.pth", "run", "data"):
        (folder / name).symlink_to(folder / "nowhere" / name)
    assert "run: File exists" in inside.error(*QUICK, "--run-dir", "run")
    assert "data: File exists" in inside.error("--dataset", "cifar10", "--data-dir", "data")
    inside(*QUICK, "--out", "model.pth")  # a link is replaced, not followed
    assert weights(folder / "model.pth") and not (folder / "model.pth").is_symlink()


def test_two_runs_started_together_both_finish(program, folder):
    for process in [program.start(*QUICK) for _ in range(2)]:
        program.finish(process)
    assert len(list(folder.glob("runs/*/*/report.json"))) == 2 and weights(folder / "model_cnn_digits.pth")


# ---- what strangers send: benchmarks/survival.py counts more of them ----


def test_mutated_files_work_or_are_refused(model_file):
    """In words, in 5 s and in 1 GB of memory."""
    survival = pytest.importorskip("survival")  # Windows has no module resource
    chance, content, done = random.Random(1), model_file.read_bytes(), []
    files = [(change(content, chance), ".pth") for change in (survival.mutated, survival.altered) for _ in range(60)]
    _, _, before = survival.load(content, ".pth", "")
    for changed, suffix in [*files, *survival.pictures(120, chance)]:
        result, seconds, peak = survival.load(changed, suffix, str(model_file))
        assert seconds < 5 and peak - before < 1000, suffix
        done.append(result)
    assert {"worked", "refused"} == set(done)


def test_resume_that_fails_counts_as_a_lost_run(folder, monkeypatch, capsys):
    survival = pytest.importorskip("survival")
    monkeypatch.setattr(survival, "OPTIONS", ["--dataset", "nowhere"])  # there is no run yet
    wrong = survival.compare(folder, {"a weight": torch.zeros(1)})
    assert survival.tell("killed", "after 1 s", wrong) and not survival.tell("killed", "after 2 s", [])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("| killed | after 1 s | resume: ") and first.endswith("; no model in the end |")
    assert "unknown data set nowhere" in first and second == "| killed | after 2 s | nothing |"


def test_checkpoints_that_claim_to_be_huge_cost_nothing(model_file, program, folder):
    content = torch.load(model_file, weights_only=True)
    for name, change in {
        "width": {"config": content["config"] | {"width": 300.0}},
        "size": {"image_size": 30_000},
        "small": {"image_size": 1},
        "classes": {"classes": [str(i) for i in range(500_000)]},
        "channels": {"mean": [0.5] * 1000, "std": [0.5] * 1000},
        "whole": {"model": content["model"] | {"classifier.weight": torch.zeros(100_000_000)}},
    }.items():
        torch.save(content | change, folder / f"{name}.pth")
    with zipfile.ZipFile(folder / "whole.pth") as whole, zipfile.ZipFile(folder / "zip.pth", "w", 8) as compressed:
        for name in whole.namelist():
            compressed.writestr(name, whole.read(name))
    code = """
import contextlib, resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("width", "size", "small", "classes", "channels", "zip"):
    result = "refused"
    with contextlib.suppress(ic.UserError):
        ic.load_checkpoint(f"{name}.pth")
        result = "loaded"
    print(name, result, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
sys.exit()
"""
    out, _ = program(patch=code)
    found = [line.split() for line in out.splitlines()]
    assert [name for name, result, _ in found if result == "loaded"] == ["size"]  # any size suits this network
    assert len(found) == 6 and all(int(grown) < 300 for *_, grown in found), out
