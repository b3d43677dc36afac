"""Images named by a table, a CSV or TSV file: path, label, and split where there is one.

    path,label,split
    images/1.jpg,cat,train
    images/2.jpg,dog,val

Paths are relative to the table's folder. The file is read row by row; what is kept of a row are the
bytes of its path and two small numbers.
"""

import csv
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vit.data.layouts import SPLIT_FOLDERS, split_of
from vit.data.splits import ImageSplit, Splits, first_names
from vit.errors import DataError

TABLE_SUFFIXES = (".csv", ".tsv")

# What people call the columns, in lower case
PATH_COLUMNS = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_path",
)
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target")
SPLIT_COLUMNS = ("split", "set", "subset", "partition")


class Row(NamedTuple):
    """A row of a table: its line in the file and its cells; split is None without such a column."""

    line: int
    path: str
    label: str
    split: str | None


@dataclass
class Rows:
    """The rows of a table as they are read.

    paths    of the images, absolute or relative to the table's folder
    labels   for each row, a number of `names`
    splits   for each row, a number of SPLIT_FOLDERS
    lines    for each row, its line in the file, counted from 1
    names    {label as it is written: its number, in the order in which they come}
    """

    paths: list[bytes] = field(default_factory=list)
    labels: array = field(default_factory=lambda: array("q"))
    splits: array = field(default_factory=lambda: array("b"))
    lines: array = field(default_factory=lambda: array("q"))
    names: dict[str, int] = field(default_factory=dict)


def is_table(path: Path) -> bool:
    """Whether a path is that of a CSV or TSV file, by its extension."""
    return path.suffix.lower() in TABLE_SUFFIXES and not path.is_dir()


def list_table(path: Path, label_column: str | None = None) -> Splits:
    """The classes and splits of a table, with the images in the order of the rows.

    label_column: see find_columns. Without a split column, all rows are train. The classes are the
    labels of train, sorted, by value where all of them are whole numbers.

    Raises DataError for a table that can't be read, columns that are missing or could be meant in
    two ways, a row without a path or a label, an unknown split, a label that train does not have,
    fewer than two classes, and an image that is missing or named twice.
    """
    # The name of the folder is a part of the fingerprint, from wherever the command is started
    path = path.absolute()
    rows = Rows()
    for row in read_rows(path, label_column):
        add_row(rows, path, row)
    paths = np.array(rows.paths)
    rows.paths.clear()  # a million of them take more than the array
    splits = np.array(rows.splits)
    classes, labels = sort_classes(path, rows, splits)
    lines = np.array(rows.lines)
    refuse_duplicates(path, paths, splits, lines)
    require_files(path, paths, lines)
    return make_splits(path, classes, paths, labels, splits)


def read_rows(path: Path, label_column: str | None) -> Iterator[Row]:
    """Yield the rows below the header. Raises DataError, also for a row without a path."""
    try:
        # The mark of UTF-8 that Excel writes would become part of the first column's name
        with open(path, encoding="utf-8-sig", newline="") as file:
            delimiter = delimiter_of(path, file.readline())
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            image_at, label_at, split_at = find_columns(path, header, label_column)
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                # Spreadsheets leave out empty cells at the end of a row
                cells.extend([""] * (len(header) - len(cells)))
                image, label = cells[image_at].strip(), cells[label_at].strip()
                if not image:
                    raise DataError(f"{path.absolute()}: line {reader.line_num} has no path")
                split = None if split_at is None else cells[split_at].strip()
                yield Row(reader.line_num, image, label, split)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path.absolute()}: can't read this table ({reason}); expected UTF-8 text whose "
            "first line names the columns"
        ) from None


def delimiter_of(path: Path, header: str) -> str:
    """The tab of a TSV; in a CSV the comma, or the semicolon or tab where there is no comma."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    return next((character for character in ",;\t" if character in header), ",")


def find_columns(
    path: Path, names: Sequence[str], label_column: str | None
) -> tuple[int, int, int | None]:
    """The positions of path, label and split (None without one), by names in upper or lower case.

    label_column: the exact name of the column with the classes; None: one of LABEL_COLUMNS.
    Raises DataError for a column that is missing, or where two could be meant.
    """
    names = [name.strip() for name in names]
    image = find_column(path, names, PATH_COLUMNS)
    split = find_column(path, names, SPLIT_COLUMNS)
    if label_column is None:
        label = find_column(path, names, LABEL_COLUMNS)
    elif label_column in names:
        label = names.index(label_column)
    else:
        raise DataError(
            f"{path.absolute()}: no column {label_column} (data.label_column); it has "
            f"{', '.join(names)}"
        )
    for column, known in ((image, PATH_COLUMNS), (label, LABEL_COLUMNS)):
        if column is None:
            raise DataError(
                f"{path.absolute()}: no column {known[0]} (or {', '.join(known[1:])}); its first "
                f"line has {', '.join(names) or 'no names'}"
            )
    assert image is not None
    assert label is not None
    return image, label, split


def find_column(path: Path, names: list[str], known: tuple[str, ...]) -> int | None:
    """The position of the column with one of the known names, or None; DataError for two."""
    found = [position for position, name in enumerate(names) if name.lower() in known]
    # The first of the known names goes before the others
    exact = [position for position in found if names[position].lower() == known[0]]
    found = exact or found
    if len(found) > 1:
        both = " and ".join(names[position] for position in found)
        raise DataError(f"{path.absolute()}: {both} can each be the column {known[0]}; rename one")
    return found[0] if found else None


def add_row(rows: Rows, table: Path, row: Row) -> None:
    """Add one row. Raises DataError for one without a label, and for an unknown split."""
    if not row.label:
        raise DataError(f"{table.absolute()}: line {row.line} has no label")
    split = "train" if row.split is None else split_of(row.split)
    if split is None:
        known = ", ".join(names[0] for names in SPLIT_FOLDERS.values())
        raise DataError(
            f"{table.absolute()}: line {row.line} has an unknown split {row.split!r}; expected "
            f"{known}"
        )
    # Two ways to write one path are one image
    rows.paths.append(os.fsencode(os.path.normpath(os.path.join(table.parent, row.path))))
    rows.labels.append(rows.names.setdefault(row.label, len(rows.names)))
    rows.splits.append(list(SPLIT_FOLDERS).index(split))
    rows.lines.append(row.line)


def sort_classes(table: Path, rows: Rows, splits: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(the labels of train, sorted; the label of each row as a number of that list, int64 (n,)).

    Raises DataError for fewer than two classes, and for a label of another split that train lacks.
    """
    written = list(rows.names)
    numbers = np.array(rows.labels, dtype=np.int64)
    of_train = [written[number] for number in np.unique(numbers[splits == 0])]
    # "10" comes after "9"
    whole = all(name.isdecimal() for name in of_train)
    classes = sorted(of_train, key=lambda name: (int(name) if whole else 0, name))
    if len(classes) < 2:
        found = f"the class {classes[0]!r} alone" if classes else "no images"
        raise DataError(f"{table.absolute()}: train has {found}; expected two classes at least")
    positions = {name: position for position, name in enumerate(classes)}
    ranks = np.array([positions.get(name, -1) for name in written], dtype=np.int64)
    labels = ranks[numbers]
    if (labels < 0).any():
        row = int((labels < 0).argmax())
        raise DataError(
            f"{table.absolute()}: line {rows.lines[row]} has the label "
            f"{written[rows.labels[row]]!r}, which no image of train has; its classes are "
            f"{first_names(classes)}"
        )
    return classes, labels


def refuse_duplicates(
    table: Path, paths: np.ndarray, splits: np.ndarray, lines: np.ndarray
) -> None:
    """Raise DataError for a path that is named twice, which could be trained and tested on."""
    order = np.argsort(paths, kind="stable")
    same = paths[order[1:]] == paths[order[:-1]]
    if not same.any():
        return
    position = int(same.argmax())
    first, second = order[position], order[position + 1]
    names = list(SPLIT_FOLDERS)
    raise DataError(
        f"{table.absolute()}: lines {lines[first]} ({names[splits[first]]}) and {lines[second]} "
        f"({names[splits[second]]}) name the same image, "
        f"{os.fsdecode(bytes(paths[first]))}; remove one"
    )


def require_files(table: Path, paths: np.ndarray, lines: np.ndarray) -> None:
    """Raise DataError, naming the first, where images are missing.

    Each folder is listed once: on a network disk that is much faster than a look at each file.
    """
    folders: dict[bytes, int] = {}
    folder_of = np.fromiter(
        (folders.setdefault(os.path.dirname(path), len(folders)) for path in paths.tolist()),
        dtype=np.int64,
        count=len(paths),
    )
    # Folder by folder, so that the names of one alone are held at a time
    order = np.argsort(folder_of, kind="stable")
    ends = np.bincount(folder_of).cumsum()
    missing: list[int] = []
    for number, folder in enumerate(folders):
        rows = order[ends[number - 1] if number else 0 : ends[number]]
        names = files_in(folder)
        missing += [row for row in rows if os.path.basename(bytes(paths[row])) not in names]
    if missing:
        first = min(missing)
        others = f" (and {len(missing) - 1:,} others)" if len(missing) > 1 else ""
        path = os.fsdecode(bytes(paths[first]))
        # As Windows writes paths
        backslashes = ", with / between folders and not a backslash" if "\\" in path else ""
        raise DataError(
            f"{table.absolute()}: line {lines[first]}: no file {path}{others}; paths are relative "
            f"to the folder of the table{backslashes}"
        )


def files_in(folder: bytes) -> set[bytes]:
    """The names in a folder, none where it can't be listed."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def make_splits(
    table: Path, classes: list[str], paths: np.ndarray, labels: np.ndarray, splits: np.ndarray
) -> Splits:
    """The splits of a table, and what was found in one line for the screen."""
    found: dict[str, ImageSplit] = {}
    for number, split in enumerate(SPLIT_FOLDERS):
        chosen = splits == number
        if chosen.any():
            title = f"{table.name} {split}"
            labels_of_split = torch.from_numpy(labels[chosen])
            found[split] = ImageSplit(title, labels_of_split, paths=paths[chosen])
    counts = ", ".join(f"{len(images):,} {split}" for split, images in found.items())
    layout = f"{table.name} names {len(paths):,} images of {len(classes)} classes: {counts}"
    return Splits(classes, **found, layout=layout)
