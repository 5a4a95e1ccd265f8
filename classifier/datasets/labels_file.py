"""A table of labels: which image of a folder is of which class, and perhaps of which split.

It is a CSV file with a column for the file and one for its label, as competitions hand them out.
File names may lack their folder or their extension.
"""

import codecs
import csv
import io
import os
import posixpath
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from classifier.datasets.folder_layout import (
    SPLITS,
    UNSAFE,
    images_below,
    in_order,
    natural_order,
    to_array,
)
from classifier.errors import UserError, format_error
from classifier.text import escape_control_characters, pluralize, shorten

# Names of columns, in lower case and with _ for spaces; the first one that is there counts.
FILE_COLUMNS = (
    *("file", "filename", "file_name", "path", "filepath", "file_path", "image_path"),
    *("image", "image_name", "img", "image_id", "id"),
)
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target")
SPLIT_COLUMNS = ("split", "set", "subset")
DELIMITERS = ",;\t"
IMAGE_ORDER = ("train", "valid", "test")


class Row(NamedTuple):
    """What a row says of an image.

    Attributes:
        line: its line in the file, from 1.
        file: the image, with / between the names.
        label: its class.
        split: "train", "valid", "test", or "all" in a table without a column for it.
    """

    line: int
    file: str
    label: str
    split: str


class Columns(NamedTuple):
    """Positions of the columns; split is None if there is none."""

    file: int
    label: int
    split: int | None


def list_labelled_images(
    folder: Path, table: Path, order: list[str] | None = None
) -> tuple[np.ndarray, list[str], list[str]]:
    """The images of a folder that a table names: as `folder_layout.list_images` returns them.

    Prints a note about images that the table does not name. Raises UserError for a table that
    cannot be used.
    """
    rows = read_labels(table)
    classes = in_order(class_names(table, rows), order)
    found, others = images_below(folder, folder)
    keys = dict(found)
    row_of_image = _find_images(folder, table, rows, list(keys))

    unnamed = [path for path in keys if path not in row_of_image]
    if unnamed:
        example = escape_control_characters(unnamed[0])
        print(
            f"note: {pluralize(len(unnamed), 'image')} in {folder} that {table} does not name are "
            f"left alone, such as {example}"
        )
    members: dict[tuple[str, str], list[tuple[str, int]]] = {}  # images of a class and split
    for path, key in keys.items():
        if path in row_of_image:
            row = row_of_image[path]
            members.setdefault((row.split, row.label), []).append((path, key))
    images = []
    for split in ("all", *IMAGE_ORDER):
        for label, name in enumerate(classes):
            images.append(to_array(members.get((split, name), []), split, label))
    left_out = [str(path) for path in others if not _is_same_file(path, table)]
    return np.concatenate(images), classes, left_out


def class_names(table: Path, rows: Iterable[Row]) -> list[str]:
    """Names of the classes in the rows, in the order of their labels.

    Raises UserError for what cannot be a class, or where there is nothing to learn from.
    """
    lines: dict[str, int] = {}  # the first line with each class
    learned = set()
    for row in rows:
        lines.setdefault(row.label, row.line)
        if row.split in ("all", "train"):
            learned.add(row.label)
    if not learned:
        raise UserError(f"{table}: no row is for training: its split has to be train")
    first_spelling: dict[str, str] = {}
    for name, line in lines.items():
        if UNSAFE.search(name):
            raise UserError(
                f"{table}, line {line}: {name!r} cannot be the name of a class, because files are "
                "named after it: rename it"
            )
        earlier = first_spelling.setdefault(name.casefold(), name)
        if earlier != name:
            raise UserError(
                f"{table}, line {line}: the class {name} is called {earlier} in line "
                f"{lines[earlier]}: name them alike, as files are named after classes"
            )
        if name not in learned:
            raise UserError(f"{table}, line {line}: no row for training is of the class {name}")
    if len(learned) < 2:
        raise UserError(f"{table} has 1 class, {learned.pop()}: at least two are needed")
    return natural_order(lines)


# ---- Reading -------------------------------------------------------------------------------------


def read_labels(table: Path) -> list[Row]:
    """The rows of a table. Raises UserError for one that cannot be used."""
    text = _read_text(table)
    delimiter, columns = _find_columns(table, text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows = []
    try:
        width = len(next(reader))
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"{table}, line {reader.line_num}"
            if len(cells) != width:
                raise UserError(f"{where}: {len(cells)} columns, but {width} in the first line")
            rows.append(_to_row(where, reader.line_num, cells, columns))
    except csv.Error as error:
        raise UserError(f"{table}, line {reader.line_num}: no CSV: {error}") from None
    if not rows:
        raise UserError(f"{table} holds no rows")
    return rows


def _read_text(table: Path) -> str:
    """The text of a file in UTF-8, or UTF-16 with its mark. Raises UserError for others."""
    try:
        content = table.read_bytes()
    except OSError as error:
        raise UserError(f"--labels {table}: {format_error(error)}") from None
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{table}, line {line}: this is not in UTF-8: save the file as CSV in UTF-8"
        ) from None
    if "\0" in text:
        raise UserError(f"{table} is no text: --labels takes a CSV file")
    return text


def _find_columns(table: Path, text: str) -> tuple[str, Columns]:
    """The delimiter with which the first line has the needed columns, and these."""
    headers = {}
    for delimiter in DELIMITERS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise UserError(f"{table}, line 1: no CSV: {error}") from None
        columns = _columns_of(header)
        if columns is not None:
            return delimiter, columns
        headers[delimiter] = header
    longest = max(headers.values(), key=len)
    listed = shorten(escape_control_characters(", ".join(longest)), 200)
    raise UserError(
        f"{table}: the first line has to name the columns, such as file and label: it has "
        f"{listed or 'nothing'} (known: {', '.join(FILE_COLUMNS)}; {', '.join(LABEL_COLUMNS)}; "
        f"optional: {', '.join(SPLIT_COLUMNS)})"
    )


def _columns_of(header: list[str]) -> Columns | None:
    """The columns of a table, by its first line; None if it lacks file or label.

    Of two columns, of which one is the file, the other is the label, whatever it is called.
    """
    names = [name.strip().lower().replace(" ", "_").replace("-", "_") for name in header]
    file = _first_of(FILE_COLUMNS, names)
    label = _first_of(LABEL_COLUMNS, names)
    if file is not None and label is None and len(names) == 2:
        label = 1 - file
    if file is None or label is None:
        return None
    return Columns(file, label, _first_of(SPLIT_COLUMNS, names))


def _first_of(known: tuple[str, ...], names: list[str]) -> int | None:
    """Position of the first of the known names."""
    for name in known:
        if name in names:
            return names.index(name)
    return None


def _to_row(where: str, line: int, cells: list[str], columns: Columns) -> Row:
    """What the cells of a row say. Raises UserError, which says where."""
    file = cells[columns.file].strip().replace("\\", "/")
    label = unicodedata.normalize("NFC", cells[columns.label].strip())
    if not file:
        raise UserError(f"{where}: the name of the file is empty")
    if not label:
        raise UserError(f"{where}: the label of {file} is empty")
    split = "all"
    if columns.split is not None:
        cell = cells[columns.split].strip()
        if cell.lower() not in SPLITS:
            raise UserError(f"{where}: the split of {file} is {cell!r}, not train, val or test")
        split = SPLITS[cell.lower()]
    return Row(line, posixpath.normpath(file), label, split)


# ---- Finding the images --------------------------------------------------------------------------


def _find_images(folder: Path, table: Path, rows: list[Row], paths: list[str]) -> dict[str, Row]:
    """The row of each image that a table names, by its path in the folder.

    Raises UserError for a row whose image is missing or not certain, and for two rows that say
    different things of one image.
    """
    by_name: dict[str, list[str]] = {}  # by name with and without extension
    for path in paths:
        name = os.path.basename(path)
        for key in {name, os.path.splitext(name)[0]}:
            by_name.setdefault(unicodedata.normalize("NFC", key), []).append(path)

    found: dict[str, Row] = {}
    missing: list[Row] = []
    for row in rows:
        candidates = _candidates(row.file, by_name)
        if len(candidates) > 1:
            raise UserError(
                f"{table}, line {row.line}: {row.file} may be {candidates[0]} or {candidates[1]} "
                f"in {folder}: give its path"
            )
        if not candidates:
            missing.append(row)
            continue
        earlier = found.setdefault(candidates[0], row)
        if earlier[2:] != row[2:]:
            before = f"{_describe(earlier)} in line {earlier.line}"
            raise UserError(
                f"{table}, line {row.line}: {row.file} is {_describe(row)}, but {before}"
            )
    if missing:
        first = missing[0]
        others = f", nor those of {len(missing) - 1} other rows" if len(missing) > 1 else ""
        raise UserError(
            f"{table}, line {first.line}: there is no image {first.file} in {folder}{others}"
        )
    return found


def _describe(row: Row) -> str:
    return row.label if row.split == "all" else f"{row.label} in {row.split}"


def _candidates(file: str, by_name: dict[str, list[str]]) -> list[str]:
    """Paths that the name of a file in a table may stand for; the best ones only.

    Both are paths of which one may begin further up: photos/cats/1.jpg, cats/1.jpg and 1.jpg.
    by_name: paths by their names with and without extension.
    """
    wanted = PurePosixPath(unicodedata.normalize("NFC", file))
    exact: list[str] = []
    without_extension: list[str] = []
    same_end: list[str] = []
    for path in by_name.get(wanted.name, []):
        known = PurePosixPath(unicodedata.normalize("NFC", Path(path).as_posix()))
        if known == wanted:
            exact.append(path)
        elif known.with_suffix("") == wanted:
            without_extension.append(path)
        elif _ends_alike(known.parent, wanted.parent):
            same_end.append(path)
    return exact or without_extension or same_end


def _ends_alike(first: PurePosixPath, second: PurePosixPath) -> bool:
    """Whether one of two paths is the end of the other."""
    length = min(len(first.parts), len(second.parts))
    return not length or first.parts[-length:] == second.parts[-length:]


def _is_same_file(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False
