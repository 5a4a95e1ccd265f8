"""Tables of labels for folders of loose images."""

import csv
import shutil
from pathlib import Path

import pytest
from conftest import report_of, state_of, write_images

import image_classification as ic
import inference
from classifier.datasets.load import dataset_available
from classifier.errors import UsageError, UserError

COUNTS = {"cat": 24, "dog": 20, "10": 12, "2": 12}
CLASSES = ["2", "10", "cat", "dog"]
BRIEF = ["--dataset", "photos", "--labels", "labels.csv", "--epochs", "1", "--width", "0.25"]
BRIEF += ["--image-size", "16", "--val-fraction", "0.2"]


@pytest.fixture(autouse=True)
def home(monkeypatch, folder):
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("USERPROFILE", str(folder / "home"))


@pytest.fixture
def rows(folder):
    """photos/, with loose images of four classes; returns name and label of each."""
    write_images(folder / "by_class", COUNTS)
    (folder / "photos").mkdir()
    rows = []
    for path in sorted((folder / "by_class").glob("*/*")):
        name = f"{path.parent.name}-{path.stem}.png"
        shutil.copy(path, folder / "photos" / name)
        rows.append((name, path.parent.name))
    return rows


def write_table(rows, header=("file", "label"), delimiter=",", encoding="utf-8", path="labels.csv"):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def load(dataset="photos", **settings):
    settings = {"labels": "labels.csv", "val_fraction": 0.2} | settings
    return ic.load_data(ic.Config(dataset=dataset, **settings))


def labels_of(data):
    """The label of each image that is used, by its name in photos/."""
    names = [data.files[i] for i in data.train_indices.tolist()] + data.test_files
    labels = data.train.labels.tolist() + data.test.labels.tolist()
    return {name: data.classes[label] for name, label in zip(names, labels, strict=True)}


def check(data, rows):
    assert data.classes == CLASSES
    assert data.name == "photos"
    found = labels_of(data)
    assert found.items() <= dict(rows).items()
    assert len(found) + len(data.valid.labels) == len(rows)


# ---- what is read ----


def test_table_is_what_class_folders_are(rows, folder):
    write_table(rows)
    data = load()
    check(data, rows)
    of_folders = ic.load_data(ic.Config(dataset="by_class", val_fraction=0.2))
    assert data.classes == of_folders.classes
    for name in ("train", "valid", "test"):
        first, second = getattr(data, f"{name}_ids"), getattr(of_folders, f"{name}_ids")
        assert sorted(first.digests.tolist()) == sorted(second.digests.tolist())


@pytest.mark.parametrize(
    "header",
    [
        ("Filename", "Class"),
        ("IMAGE", "category"),
        ("image_id", "Target"),
        ("Image ID", "LABEL"),
        ("path", "class name"),
        ("id", "breed"),
        ("img", "anything"),
    ],
)
def test_usual_names_of_columns(rows, header):
    write_table(rows, header)
    check(load(), rows)


def test_order_of_columns_and_others(rows):
    mixed = [(number, label, name, "x, y") for number, (name, label) in enumerate(rows)]
    write_table(mixed, ("id", "label", "file", "note"))
    check(load(), rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_encodings_and_delimiters(rows, encoding, delimiter):
    renamed = [(name, label.replace("cat", "Kätzchen, 猫")) for name, label in rows]
    write_table(renamed, delimiter=delimiter, encoding=encoding)
    assert "Kätzchen, 猫" in load().classes


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.removesuffix(".png"),
        lambda name: f"photos/{name}",
        lambda name: f"C:\\data\\photos\\{name}",
        lambda name: f"./{name}",
        lambda name: f"photos/{name.removesuffix('.png')}",
    ],
)
def test_names_without_extension_and_with_folders(rows, change):
    write_table([(change(name), label) for name, label in rows])
    check(load(), rows)


def test_images_in_folders_within(rows, folder):
    for half in ("a", "b"):
        (folder / "photos" / half).mkdir()
    listed = []
    for number, (name, label) in enumerate(rows):
        half = "ab"[number % 2]
        (folder / "photos" / name).rename(folder / "photos" / half / f"{number // 2}.png")
        listed.append((f"{half}/{number // 2}.png", label))
    write_table(listed)
    check(load(), listed)
    write_table([("1.png", "cat"), *listed[4:]])
    with pytest.raises(UserError, match=r"labels.csv, line 2: 1.png .*a/1.png.*b/1.png"):
        load()
    write_table([("c/1.png", "cat"), *listed[4:]])
    with pytest.raises(UserError, match=r"labels.csv, line 2: there is no image c/1.png"):
        load()


def test_splits(rows):
    names = ["Train", "TEST", "val", "training", "valid"]
    split = [(*row, names[number % 5]) for number, row in enumerate(rows)]
    for header in (("file", "label", "split"), ("file", "label", "Set"), ("id", "label", "subset")):
        write_table(split, header)
        data = load()
        assert data.classes == CLASSES and data.drawn == ()
        counts = [len(each.labels) for each in (data.train, data.valid, data.test)]
        assert sum(counts) == len(rows)
        expected = {name for name, _, split in split if split == "TEST"}
        assert set(data.test_files) == expected
        assert set(data.files) == {row[0] for row in split if row[2].lower()[:5] == "train"}


def test_other_images_are_left_alone_with_a_word(rows, capsys):
    write_table(rows[5:])
    shutil.move("labels.csv", "photos/labels.csv")
    data = load(labels="photos/labels.csv")
    out = capsys.readouterr().out
    assert f"5 images in photos that {Path('photos/labels.csv')} does not name" in out
    assert rows[0][0] in out and "no format" not in out
    assert not labels_of(data).keys() & {name for name, _ in rows[:5]}


def test_rows_that_agree_are_one(rows):
    write_table([*rows, *rows[:9], ("", ""), (rows[3][0].removesuffix(".png"), rows[3][1])])
    check(load(), rows)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [*rows[:3], ("gone.png", "cat"), *rows[4:]], ["line 5", "gone.png"]),
        (lambda rows: [*rows, ("g1", "cat"), ("g2", "cat")], ["line 70", "g1", "1 other"]),
        (lambda rows: [("../secret.png", "cat"), *rows], ["line 2", "../secret.png"]),
        (lambda rows: [(rows[0][0], " "), *rows], ["line 2", "label", "10-0.png"]),
        (lambda rows: [("", "cat"), *rows], ["line 2", "file"]),
        (lambda rows: [*rows, (rows[0][0], "cat")], ["line 70", "10-0.png", "line 2", "cat"]),
        (lambda rows: [*rows, ("10-0", "dog")], ["line 70", "10-0", "line 2"]),
        (lambda rows: [*rows[:2], ("only",), *rows[2:]], ["line 4", "1 column"]),
        (lambda rows: [*rows[:2], (*rows[2], "more"), *rows[3:]], ["line 4", "3 columns"]),
        (lambda rows: [(rows[0][0], "a/b"), *rows[1:]], ["line 2", "'a/b'"]),
        (lambda rows: [(rows[0][0], "Cat"), *rows[1:]], ["Cat", "cat"]),
        (lambda rows: [(name, "cat") for name, _ in rows], ["1 class"]),
        (lambda rows: [], ["no rows"]),
    ],
)
def test_rows_that_cannot_be_used(rows, change, words):
    write_table(change(rows))
    with pytest.raises(UserError, match="labels.csv") as caught:
        load()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_splits_that_cannot_be_used(rows):
    header = ("file", "label", "split")
    for cell, words in (("later", "line 2: .*later"), ("", "line 2: "), ("test", "line 2: ")):
        write_table([(*rows[0], cell), *((*row, "train") for row in rows)], header)
        with pytest.raises(UserError, match=words if cell != "test" else "train.*test in line 2"):
            load()
    write_table([(*row, "test") for row in rows], header)
    with pytest.raises(UserError, match="train"):
        load()
    write_table([(*row, "test" if row[1] == "cat" else "train") for row in rows], header)
    with pytest.raises(UserError, match="line .*cat"):
        load()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name,kind,size\n", ["name, kind, size", "label"]),
        (b"", ["nothing"]),
        ("file,label\n1.png,Kätzchen\n".encode("latin-1"), ["line 2", "UTF-8"]),
        (b"file,label\n1.png,c\0t\n", ["no text"]),
        (b"\x89PNG\r\n\x1a\n\0\0", ["UTF-8"]),
        (b"file,label\n" + b"x" * 200_000 + b",cat\n", ["line 2"]),
        (b"file,label\n" + b'"never closed,cat\n', ["line 2", "1 column"]),
        (b"\x1b[2Jname,kind,x\n", ["\\x1b[2Jname"]),
    ],
)
def test_files_that_cannot_be_used(rows, inside, content, words):
    Path("labels.csv").write_bytes(content)
    error = inside.error(*BRIEF)
    with pytest.raises(UserError) as caught:
        load()
    assert "\x1b" not in str(caught.value)
    assert "labels.csv" in error
    assert all(word in error for word in words), error


def test_labels_of_what_is_no_folder(rows, inside):
    assert "gone.csv" in inside.error(*BRIEF, "--labels", "gone.csv")
    assert "--labels" in inside.error(*BRIEF, "--labels", "photos")
    for dataset in ("digits", "auto", "mnist"):
        with pytest.raises(UsageError, match="--labels.*--dataset"):
            load(dataset)


def test_loose_images_are_told_of_labels(rows):
    with pytest.raises(UserError, match="--labels"):
        load(labels="")


# ---- a table and a trained model ----


@pytest.mark.slow
def test_run_goes_on_and_tools_find_the_labels(rows, inside, tool_inside, folder, monkeypatch):
    write_table(rows)
    inside(*BRIEF, "--run-dir", "run")
    settings = state_of(folder / "run")["config"]
    assert settings["labels"] == str(folder / "labels.csv")
    Path("elsewhere").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir("elsewhere")
        inside("--resume", "../run", "--epochs", "2")
        inside("--resume", "../run", "--epochs", "3", "--labels", "../labels.csv")
        assert "--labels" in inside.error(
            *("--resume", "../run", "--epochs", "4", "--labels", "other.csv"), status=2
        )
    (path,) = folder.glob("elsewhere/model_*.pth")
    model = inference.load_model(path, "cpu")
    assert model.classes == CLASSES
    data = inference.load_dataset_of(model)
    tested = sum(sum(row) for row in report_of(folder / "run")["confusion_matrix"])
    assert len(data.test.labels) == tested
    out, _ = tool_inside("explain")("--checkpoint", path)
    assert "gallery" in out

    shutil.move("labels.csv", "elsewhere")
    assert not dataset_available(model.settings, 16)
    assert "labels.csv" in tool_inside("explain").error("--checkpoint", path)
    shutil.move("photos", "elsewhere")
    moved = inference.load_dataset_of(model, "elsewhere/photos")  # with the table beside it
    assert moved.fingerprint() == data.fingerprint()


def test_labels_for_a_zip(rows, inside, folder):
    write_table(rows)
    shutil.make_archive("photos", "zip", ".", "photos")
    check(load("photos.zip"), [(f"photos/{name}", label) for name, label in rows])
