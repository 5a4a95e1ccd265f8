"""compare.py: on runs of the program, and on made-up runs whose statistics are known."""

import csv
import html
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import QUICK, REPOSITORY, report_of, table_of, tool
from scipy.stats import t

import compare

HEAD = ["training images", "accuracy %", "95 % low", "95 % high"]


@pytest.fixture
def compared(tool_inside):
    """compare.py in this process: it takes options and returns standard output and error."""
    return tool_inside("compare")


def write_run(path, report, **settings):
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "dataset": "digits",
        "data_dir": "data",
        "lr": 0.12,
        "seed": 0,
        "repeat": 1,
        "out": "",
        **settings,
    }
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return path


def make_report(accuracy, num_test, dataset="digits"):
    hits = round(accuracy * num_test)
    return {
        "test_accuracy": accuracy,
        "test_accuracy_interval": [max(0.0, accuracy - 0.015), min(1.0, accuracy + 0.015)],
        "confusion_matrix": [[hits, 0], [num_test - hits, 0]],
        "dataset": dataset,
        "train_images": 1295,
        "seconds": 2.5,
        "hardware": "A CPU, 2 threads",
    }


def write_predictions(path, hits, labels="0123456789", images=None):
    """Write test_predictions.csv; images: a number for each test image. None: as version 0.9."""
    header = ["label", "prediction", "confidence"]
    if images is not None:
        header += ["image", "digest"]
    lines = [",".join(header)]
    for position, (label, hit) in enumerate(zip(itertools.cycle(labels), hits, strict=False)):
        line = f"{label},{label if hit else 'other'},0.9"
        if images is not None:
            line += f",{position}.png,{images[position]:016x}"
        lines.append(line)
    (path / "test_predictions.csv").write_text("\n".join(lines) + "\n")


def make_run(path, hits, labels="0123456789", dataset="digits", images=None, **settings):
    """A run of one seed; hits: for each test image, whether it is classified correctly."""
    report = make_report(sum(hits) / len(hits), len(hits), dataset)
    write_run(path, report, **{"dataset": dataset, **settings})
    write_predictions(path, hits, labels, images)
    return path


def make_repeats(path, accuracies, num_test=1000, **settings):
    """A run of several seeds with these accuracies, the first of which was kept."""
    parts = [make_report(accuracy, num_test) for accuracy in accuracies]
    mean = sum(accuracies) / len(parts)
    report = {
        **parts[0],
        "test_accuracy_mean": mean,
        "test_accuracy_mean_interval": [mean - 0.01, mean + 0.01],
        "seconds_total": 2.5 * len(parts),
        "repeats": parts,
    }
    return write_run(path, report, repeat=len(parts), **settings)


def pair(folder, only_a=2, only_b=10, **settings):
    """Runs a and b: so many images only one of them classifies correctly, 80 both and 8 none."""
    hits_a = [True] * 80 + [True] * only_a + [False] * only_b + [False] * 8
    hits_b = [True] * 80 + [False] * only_a + [True] * only_b + [False] * 8
    return make_run(folder / "a", hits_a), make_run(folder / "b", hits_b, **settings)


def numbers(line):
    """The difference in points, and the ends of its interval."""
    match = re.search(r"(-?[\d.]+) points \(95 % interval (\S+) to ([^\s,]+),", line)
    return [float(number) for number in match.groups()]


# ---- runs of the program and of version 0.9 ----


def test_files_of_the_program_are_understood(trained, compared, folder):
    shutil.copytree(trained / "run", folder / "copy")
    out, err = compared(trained / "run", "copy")
    report = report_of(folder / "copy")
    header, row, *_, line, remark = out.splitlines()
    assert header.split()[:2] == ["run", "training"]  # no setting differs
    assert f" {100 * report['test_accuracy']:.2f} " in row and row.endswith(report["hardware"])
    assert numbers(line)[0] == 0 and "0 only run recognises, 0 only copy" in line
    assert "--repeat" in remark and not err


@pytest.mark.slow
def test_real_runs_as_a_user_compares_them(inside, compared, folder):
    briefly = [*QUICK, "--image-size", "32"]  # so that they begin with smaller images
    inside(*briefly, "--run-dir", "runs/one")
    inside(*briefly, "--lr", "0.001", "--repeat", "2", "--run-dir", "runs/more")
    make_repeats(folder / "runs" / "other", [0.7, 0.8], num_test=359, seed=5)
    (folder / "runs" / "notes").mkdir()
    one, seed, more = (report_of(folder / "runs" / name) for name in ("one", "more/seed-0", "more"))

    out, err = tool("compare", folder)("runs/one", "runs/more/seed-0", "runs/notes")
    assert len(err.splitlines()) == 1 and "notes" in err
    head, first, _, empty, line, remark = out.splitlines()
    assert head.split()[:3] == ["run", "lr", "training"]  # no other setting differs
    assert first.split()[:2] == ["one", "0.12"]
    assert f" {100 * one['test_accuracy']:.2f} " in first and one["hardware"] in first
    gain = one["test_accuracy"] - seed["test_accuracy"]
    assert numbers(line)[0] == pytest.approx(100 * abs(gain), abs=0.006)
    assert "paired over 359 test images" in line and "--repeat" in remark and not empty

    out, err = compared("runs/*r*", "--format", "csv")  # as where no shell expands it
    rows = table_of(out)
    assert [row["run"] for row in rows] == ["more", "other"]
    assert [row["seeds"] for row in rows] == ["2", "2"]
    assert [row["seed"] for row in rows] == ["0", "5"]
    mean, interval = more["test_accuracy_mean"], more["test_accuracy_mean_interval"]
    assert float(rows[0]["accuracy %"]) == pytest.approx(100 * mean, abs=0.006)
    assert float(rows[0]["95 % low"]) == pytest.approx(100 * interval[0], abs=0.006)
    assert float(rows[0]["std"]) == pytest.approx(100 * more["test_accuracy_std"], abs=0.006)
    assert float(rows[0]["seconds"]) == pytest.approx(more["seconds_total"] / 2, abs=0.06)
    assert "2 and 2 seeds, not the same ones" in err
    assert "one with --repeat 2" in compared("runs/more", "runs/one")[0]


def test_it_is_quick_because_it_needs_no_torch():
    code = "import sys, compare; sys.exit('torch' in sys.modules or 'optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_settings_that_were_renamed_are_no_difference(folder):
    fixture = REPOSITORY / "tests" / "fixtures" / "0.9.1" / "run_ema" / "config.json"
    old = json.loads(fixture.read_text())
    new = dict(old)
    new["progressive_resizing"] = new.pop("low_res")
    new["tta"] = new.pop("test_views")
    new["scheduler"] = "linear"
    del new["depth"], new["make_imbalanced"]
    hits = [True] * 9 + [False]
    runs, _ = compare.read_runs(
        [
            make_run(folder / "old", hits, **old),
            make_run(folder / "new", hits, **new),
            make_run(folder / "whole", hits, **{**old, "low_res": 0.0}),
        ]
    )
    assert compare.differing_settings(runs[:2]) == []
    header, *rows = compare.table(runs)
    assert header == ["run", "progressive_resizing", *HEAD, "seconds", "hardware"]
    assert [row[1] for row in rows] == ["0.7", "0.7", "0.0"]


def test_run_without_a_fit_has_the_one_that_was_always_used(folder):
    report = make_report(0.9, 100)
    write_run(folder / "old", report)
    write_run(folder / "new", report, fit="crop")
    runs, _ = compare.read_runs([folder / "old", folder / "new"])
    assert "fit" not in compare.table(runs)[0]
    write_run(folder / "new", report, fit="pad")
    runs, _ = compare.read_runs([folder / "old", folder / "new"])
    head, *rows = compare.table(runs)
    assert [row[head.index("fit")] for row in rows] == ["crop", "pad"]


def test_settings_that_an_older_version_lacks_are_no_difference(folder):
    report = make_report(0.9, 100)
    write_run(folder / "old", report, batch_size=500)
    write_run(folder / "new", report, batch_size=500, micro_batch=500, first_layer_lr=1.0)
    runs, _ = compare.read_runs([folder / "old", folder / "new"])
    assert compare.differing_settings(runs) == []
    write_run(folder / "new", report, batch_size=500, micro_batch=250, first_layer_lr=0.1)
    runs, _ = compare.read_runs([folder / "old", folder / "new"])
    assert set(compare.differing_settings(runs)) == {"micro_batch", "first_layer_lr"}


def test_settings_that_were_removed_are_shown_where_they_had_an_effect(folder):
    hits = [True] * 9 + [False]
    networks = {"two": 2, "three": 3}
    for name, depth in networks.items():
        make_run(folder / name, hits, model="convnet", depth=depth, low_res=0.5)
    make_run(folder / "new", hits, model="convnet", progressive_resizing=0.5)
    runs, _ = compare.read_runs([folder / "two", folder / "new"])
    assert compare.differing_settings(runs) == []
    runs, _ = compare.read_runs([folder / "three", folder / "new"])
    assert compare.differing_settings(runs) == ["depth"]


# ---- statistics ----


def test_paired_difference_by_hand():
    got = compare.paired_difference(2, 10, 100)
    assert got.value == pytest.approx(0.08)
    assert got.p == pytest.approx(2 * (1 + 12 + 66) / 2**12)  # at most 2 of 12 tosses
    half = 1.959964 * math.sqrt(2.5 + 10.5 - 8**2 / 102) / 102  # Agresti and Min, 2005
    assert [got.low, got.high] == pytest.approx([8 / 102 - half, 8 / 102 + half])
    back = compare.paired_difference(10, 2, 100)
    assert list(back) == pytest.approx([-got.value, -got.high, -got.low, got.p])


def test_paired_difference_where_networks_agree_or_never_do():
    value, low, high, p = compare.paired_difference(0, 0, 50)
    assert (value, p) == (0, 1) and -0.05 < low < 0 < high < 0.05
    value, low, high, p = compare.paired_difference(0, 50, 50)
    assert value == 1 and 0.85 < low < high <= 1 and p < 1e-9


@pytest.mark.parametrize(("only_a", "only_b"), [(0.05, 0.05), (0.02, 0.08)])
def test_paired_difference_is_right_as_often_as_it_says(only_a, only_b):
    draws = np.random.default_rng(0).multinomial(
        300, [0.8, only_a, only_b, 0.2 - only_a - only_b], size=400
    )
    found = [compare.paired_difference(a, b, 300) for _, a, b, _ in draws.tolist()]
    assert 0.925 < np.mean([each.low <= only_b - only_a <= each.high for each in found]) < 0.985
    if only_a == only_b:
        assert np.mean([each.p < 0.05 for each in found]) < 0.06


def test_seed_difference_by_hand():
    a, b = {0: 0.90, 1: 0.92, 2: 0.91}, {2: 0.94, 0: 0.91, 1: 0.94}  # paired: 0.01, 0.02, 0.03
    got, steps = compare.seed_difference(a, b), math.sqrt(12)  # 0.02 / (0.01 / sqrt(3))
    assert got.value == pytest.approx(0.02)
    assert [got.low, got.high] == pytest.approx(
        [0.02 - 4.302653 * 0.02 / steps, 0.02 + 4.302653 * 0.02 / steps]
    )
    assert got.p == pytest.approx(
        1 - steps / math.sqrt(12 + 2)
    )  # Student's t with 2 degrees of freedom
    assert list(compare.seed_difference(b, a)) == pytest.approx(
        [-got.value, -got.high, -got.low, got.p]
    )


def test_other_seeds_are_not_paired():
    a, b = [0.90, 0.92, 0.91, 0.93], [0.95, 0.94, 0.97]
    got = compare.seed_difference(dict(enumerate(a)), dict(enumerate(b, 7)))
    parts = [np.var(each, ddof=1) / len(each) for each in (a, b)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 2)  # Welch
    gain, error = np.mean(b) - np.mean(a), math.sqrt(sum(parts))
    half = t.ppf(0.975, freedom) * error
    assert list(got) == pytest.approx(
        [gain, gain - half, gain + half, 2 * t.sf(gain / error, freedom)]
    )


def test_seeds_that_do_not_vary():
    for other in ({0: 0.75, 1: 0.75}, {0: 0.77, 1: 0.77}, {3: 0.77, 4: 0.77, 5: 0.77}):
        got = compare.seed_difference({0: 0.75, 1: 0.75}, other)
        assert (
            math.isnan(got.p)
            and math.isnan(got.low)
            and got.value == pytest.approx(max(other.values()) - 0.75)
        )
    assert math.isnan(
        compare.seed_difference({0: 0.1, 1: 0.2, 2: 0.3}, {0: 0.3, 1: 0.4, 2: 0.5}).p
    )  # but for rounding
    got = compare.seed_difference({0: 0.75, 1: 0.75}, {3: 0.77, 4: 0.79})  # one of two varies
    assert got.low < 0.03 < got.high and 0 < got.p < 1


@pytest.mark.filterwarnings("error")
def test_verdict_names_the_better_one_in_either_order(compared, folder):
    pair(folder)
    for order in (["a", "b"], ["b", "a"]):
        out, err = compared(*order)
        line, remark = out.splitlines()[-2:]
        assert line.startswith(
            "b is better than a by 8.00 points (95 % interval 1.08 to 14.60, p = 0.0386; "
        )
        assert (
            "paired over 100 test images: " in line and "2 only a" in line and "10 only b" in line
        )
        assert "these two networks" in remark and "--repeat" in remark and not err


@pytest.mark.filterwarnings("error")
def test_verdict_where_none_is_better(compared, folder):
    a, _ = pair(folder, only_a=9, only_b=8)
    line = compared("a", "b")[0].splitlines()[-2]
    assert line.startswith(
        "No difference that these runs can show: a is ahead of b by 0.95 points (95 % interval -"
    )
    assert numbers(line)[1] < 0 < numbers(line)[2]
    shutil.copytree(a, folder / "copy")
    line = compared("a", "copy")[0].splitlines()[-2]
    assert line.startswith("No difference that these runs can show: 0.00 points (95 % interval -")
    assert "p = 1; " in line and "0 only a recognises, 0 only copy" in line
    pair(folder, only_a=0, only_b=5)  # test and interval disagree
    assert (
        compared("a", "b")[0].splitlines()[-2].startswith("Too close to call: b is ahead of a by ")
    )


@pytest.mark.filterwarnings("error")
def test_verdict_over_seeds(compared, folder):
    a = [0.900, 0.920, 0.940, 0.910]
    make_repeats(folder / "a", a)
    make_repeats(folder / "b", [0.903, 0.924, 0.943, 0.914], lr=0.2)
    make_repeats(folder / "later", [each + 0.003 for each in a], seed=4)
    make_repeats(folder / "shifted", [each + 0.002 for each in a])
    make_repeats(folder / "two", [0.95, 0.96])
    make_repeats(folder / "other two", [0.93, 0.95])
    out, err = compared("a", "b")
    line = out.splitlines()[-1]
    assert line.startswith(
        "b is better than a by 0.35 points (95 % interval 0.26 to 0.44, p = 0.001"
    )
    assert "paired over 4 seeds" in line and not err and "test images" not in line
    line = compared("a", "later")[0].splitlines()[-1]
    assert line.startswith(
        "No difference that these runs can show: later is ahead of a by 0.30 points"
    )
    assert "Welch's test over 4 and 4 seeds, not the same ones" in line
    line = compared("a", "shifted")[0].splitlines()[-1]
    assert line.startswith(compare.NO_VERDICT) and "--repeat" in line
    assert "shifted minus a is 0.20 points with every seed" in line
    line = compared("two", "other two")[0].splitlines()[-1]
    assert line.startswith(
        "No difference that these runs can show: two is ahead of other two by 1.50 points"
    )


def test_one_seed_against_several(compared, folder):
    pair(folder)
    make_repeats(folder / "many", [0.8, 0.9, 0.85], num_test=100)
    out, err = compared("many", "a")
    assert out.splitlines()[-1].endswith(
        "many is of 3 seeds, a of one: train a with --repeat 3 too"
    )
    assert "over the seeds if a run has several" in err


def test_no_verdict_without_the_same_test_images(compared, folder):
    a, b = pair(folder)
    make_run(folder / "others", [True] * 82 + [False] * 18, labels="012345678")
    make_run(folder / "fewer", [True] * 50)
    make_run(folder / "mnist", [True] * 100, dataset="mnist")
    for name in ("others", "fewer", "mnist"):
        out, err = compared("a", name)
        last_line = out.splitlines()[-1]
        assert last_line.startswith(compare.NO_VERDICT) and "different images" in last_line
        assert ("note: accuracies on different test images cannot be compared" in err) == (
            name != "others"
        )
    (b / "test_predictions.csv").unlink()
    out, err = compared("a", "b")
    last_line = out.splitlines()[-1]
    assert last_line.startswith(compare.NO_VERDICT) and not err
    assert "b has no test_predictions.csv" in last_line


def test_a_changed_script_and_an_unfinished_run_are_remarked(compared, folder):
    a, b = pair(folder)
    changed = "note: image_classification.py was changed between these runs"
    known = [["x", ""], ["x", None], ["x", "x"]]
    for digests, said in [*((each, False) for each in known), (["x", "y"], True)]:
        for run, digest in zip((a, b), digests, strict=True):
            (run / "report.json").write_text(
                json.dumps(report_of(run) | {"versions": {"script": digest}})
            )
        assert (changed in compared("a", "b")[1]) == said
    (b / "report.json").unlink()
    _, err = compared("a", "b", status=1)
    assert f"unfinished or no run: {b.name};" in err


# ---- the table ----


def test_table_has_the_settings_that_differ(folder):
    right = [True] * 9 + [False]
    paths = [
        make_run(
            folder / "a",
            right,
            seed=1,
            data_dir="x",
            out="x.pth",
            device="cpu",
            augment="flip,crop=2",
        ),
        make_run(
            folder / "b",
            right,
            seed=1,
            data_dir="y",
            lr=0.2,
            device="cuda",
            augment=None,
            recipe="",
            new=0.0,
        ),
        make_run(folder / "c", right, seed=1, keep_epochs=True, augment="flip", newer=0.5),
    ]
    runs, others = compare.read_runs(paths)
    head, *rows = compare.table(runs)
    assert not others and compare.notes(runs) == []
    assert head == [
        "run",
        "lr",
        "augment",
        "newer",
        *HEAD,
        "seconds",
        "hardware",
    ]  # what is off by default may lack
    rest = ["1295", "90.00", "88.50", "91.50", "2.5", "A CPU, 2 threads"]
    assert rows[0] == ["a", "0.12", "flip,crop=2", "", *rest]
    assert rows[1] == ["b", "0.2", "", "", *rest]
    assert rows[2] == ["c", "0.12", "flip", "0.5", *rest]


def test_table_of_repeats_and_data_sets(compared, folder):
    make_repeats(folder / "a", [0.90, 0.92, 0.94])
    make_run(folder / "b", [True] * 10, dataset="photos")
    make_run(folder / "c", [True] * 10, dataset="photos")
    out, err = compared("a", "b", "c", "--format", "csv")
    rows = table_of(out)
    assert list(rows[0]) == ["run", "dataset", *HEAD, "seeds", "std", "seconds", "hardware"]
    several = {
        "dataset": "digits",
        "accuracy %": "92.00",
        "seeds": "3",
        "std": "2.00",
        "seconds": "2.5",
    }
    assert rows[0].items() >= several.items()
    assert rows[1].items() >= {"dataset": "photos", "seeds": "1", "std": ""}.items()
    assert "digits: 1,000, photos: 10" in err and len(err.splitlines()) == 2


def test_formats_hold_the_same(compared, folder):
    pair(folder, model="my|net.py:make, a")
    cells = list(csv.reader(compared("a", "b", "--format", "csv")[0].splitlines()))
    assert len(cells) == 3 and cells[2][1] == "my|net.py:make, a"
    out, err = compared("a", "b", "--format", "markdown")
    lines = [line.strip("| ").split(" | ") for line in out.splitlines()]
    assert set(lines.pop(1)) == {"---"}
    assert [[html.unescape(cell) for cell in line] for line in lines] == cells
    assert (
        err.startswith("b is better than a by 8.00 points") and "better" not in out
    )  # a file gets the table only
    text = compared("a", "b")[0].splitlines()
    for cell in ("training images", "accuracy %"):
        end = text[0].index(cell) + len(cell)
        assert all(line[end - 1].isdigit() for line in text[1:3]) and all(
            line[end] == " " for line in text[:3]
        )


def test_names_in_files_of_a_stranger_are_only_shown(compared, folder):
    dangerous = "<img src=x>`\\|\x1b[2J\n"
    _, b = pair(folder, model=dangerous)
    report = report_of(b)
    (b / "report.json").write_text(
        json.dumps(report | {"hardware": dangerous, "dataset": "\x1b]0;"})
    )
    for format in ("text", "markdown"):
        out, err = compared("a", "b", "--format", format)
        assert "\x1b" not in out + err and r"\x1b[2J" in html.unescape(out)
        assert len([line for line in out.splitlines() if "2.5" in line]) == 2
    assert "<" not in out and "`" not in out
    cells = list(csv.reader(io.StringIO(compared("a", "b", "--format", "csv")[0], newline="")))
    assert dangerous in cells[2]  # data is what it is


def test_order(compared, folder):
    for name, right in {"a": 5, "b": 9, "c": 7}.items():
        make_run(folder / name, [True] * right + [False] * (10 - right))
    for options, names in ([], "cab"), (["--sort", "accuracy"], "bca"):
        out, _ = compared(*"cab", *options, "--format", "csv")
        assert [row["run"] for row in table_of(out)] == [*names]


def test_which_runs_are_meant(compared, folder):
    for name in ("runs/x/first", "runs/x/second", "runs/y/first"):
        make_run(folder / name, [True] * 10)
    (folder / "runs" / "x" / "unfinished").mkdir()
    (folder / "runs" / "x" / "README.md").write_text("mine")
    out, err = compared(
        "runs/*/*", "runs/x/first", folder / "runs" / "x" / "second", "--format", "csv"
    )
    assert [row["run"] for row in table_of(out)] == ["x/first", "second", "y/first"]
    assert len(err.splitlines()) == 1 and "unfinished" in err and "README.md" in err
    out, err = compared("runs/x", "runs/x/unfinished", status=1)
    assert (
        not out
        and len(err.splitlines()) == 2
        and err.splitlines()[1].startswith("error: no finished run")
    )
    for name in ("runs/none", "none/*"):
        out, err = compared("runs/x/first", name, status=1)
        assert not out and err == f"error: {name}: there is no such folder\n"


def test_a_seed_of_repeats_is_a_run(compared, folder):
    outer = make_repeats(folder / "many", [0.9, 0.8], num_test=10, seed=3)
    for k, right in ((3, 9), (4, 8)):
        make_run(outer / f"seed-{k}", [True] * right + [False] * (10 - right))
        (outer / f"seed-{k}" / "config.json").unlink()
    out, _ = compared("many/seed-3", "many/seed-4")
    head, first, second, *_ = out.splitlines()
    assert head.split()[:2] == ["run", "seed"] and second.split()[:2] == ["seed-4", "4"]
    assert "1 only seed-3 recognises, 0 only seed-4" in out


# ---- damage ----


@pytest.mark.parametrize(
    "content",
    [b"", b'{"seed"', b"[1]", b"7", b"{}", b"\xff\xfe\x00", b'{"seed": "x"}', 100_000 * b"["],
    ids=lambda content: content[:9],
)
@pytest.mark.parametrize("name", ["report.json", "config.json"])
def test_damaged_file(compared, folder, name, content):
    pair(folder)
    (folder / "b" / name).write_bytes(content)
    out, err = compared("a", "b", status=1)
    assert not out and len(err.splitlines()) == 1
    assert err.startswith("error: b") and name in err and "leave this run out" in err


def test_report_of_another_kind_and_missing_config(compared, folder):
    _, b = pair(folder)
    whole = report_of(b)
    others = {
        "test_accuracy": None,
        "test_accuracy_interval": [0.5],
        "confusion_matrix": 5,
        "train_images": math.inf,
    }
    for name, value in (others | {"repeats": [3]}).items():
        (b / "report.json").write_text(json.dumps(whole | {name: value}))
        error = compared.error("a", "b")
        assert error.startswith("error: b") and "report.json" in error, name
    (b / "config.json").unlink()
    assert "config.json" in compared.error("a", "b")


def test_damaged_predictions(compared, folder):
    path = pair(folder)[1] / "test_predictions.csv"
    whole = path.read_bytes()
    for content in (
        b"",
        whole[: len(whole) // 2],
        whole.replace(b"label", b"l"),
        b"\xff" + whole,
        whole + whole[-9:],
    ):
        path.write_bytes(content)
        out, err = compared("a", "b", status=1)
        assert (
            "test_predictions.csv" in err
            and "leave this run out" in err
            and len(err.splitlines()) == 1
        ), content
        assert len(out.splitlines()) == 3  # the table does not need it


def test_wrong_usage(compared):
    for arguments in ([], ["a", "--format", "pdf"], ["a", "--sort", "size"]):
        compared(*arguments, status=2)
