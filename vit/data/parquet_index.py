"""Where every image lies in parquet files, with its label: Hugging Face's image data sets.

A split has one or more files, such as data/train-00000-of-00005.parquet or train/0000.parquet. Of
them the labels are read, and the number of rows in each row group; the images stay where they are
(vit/data/parquet_rows.py).
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vit.data.image_files import is_hidden, is_image_file
from vit.data.layouts import SPLIT_FOLDERS, folder_name, split_of
from vit.data.parquet_rows import image_columns, is_parquet, open_file
from vit.data.splits import (
    ImageSplit,
    Splits,
    check_classes,
    classes_of_numbers,
    first_names,
    positions_of,
)
from vit.data.tables import LABEL_COLUMNS
from vit.errors import DataError
from vit.text import format_bytes

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

# The number of the file and how many there are, at the end of a name
NUMBER = re.compile(r"-(\d+)-of-(\d+)$")
# A larger row group makes reading at random slow: a few images a second from a disk
LARGE_GROUP = 64 * 2**20


class Labels(NamedTuple):
    """The labels of one split: numbers, and their names where the files give them.

    values: int64 (n,), or text (n,) where the column holds names.
    """

    values: np.ndarray
    names: list[str] | None


def find_parquet(root: Path) -> list[Path]:
    """The file itself, or the parquet files in a folder and three levels below it, sorted.

    A folder in which an image comes first is left at once: a million images need not be listed.
    """
    if is_parquet(root):
        return [root]
    if not os.path.isdir(root):  # Path.is_dir raises PermissionError for some that can't be opened
        return []
    return sorted(Path(path) for path in iter_parquet(str(root), levels=3))


def iter_parquet(folder: str, levels: int) -> Iterator[str]:
    """The parquet files in a folder that is no folder of images, and so many levels below."""
    try:
        entries = os.scandir(folder)
    except PermissionError:
        return  # lost+found of a disk, say; a folder that is needed is refused when it is listed
    for entry in entries:
        if is_hidden(entry.name):
            continue
        if is_image_file(entry.name):
            return
        if is_folder(entry) and levels:
            yield from iter_parquet(entry.path, levels - 1)
        elif is_parquet(Path(entry.name)):
            yield entry.path


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder; False for a link to itself or one that may not be followed."""
    try:
        return entry.is_dir()
    except OSError:  # a folder that is needed is refused when it is listed
        return False


def list_parquet(root: Path, files: Sequence[Path], label_column: str | None = None) -> Splits:
    """The classes and splits of parquet files, with the images in the order of files and rows.

    files: as find_parquet gives them. label_column: see label_column_of. The names of the classes
    are those of Hugging Face's metadata; else the labels themselves. A split other than train
    whose labels are all -1, as those of competitions are, is left out.

    Raises DataError, naming the file, where one can't be read, is missing, or lacks a column.
    """
    by_split = group_files(root, files)
    found = {split: read_split(paths, label_column) for split, paths in by_split.items()}
    unlabeled = [split for split, (_, labels, _) in found.items() if is_unlabeled(split, labels)]
    for split in unlabeled:
        del found[split]

    classes = classes_of(by_split["train"][0], found["train"][1])
    splits = {}
    for split, (paths, labels, _) in found.items():
        numbers = numbers_of(by_split[split][0], labels, classes)
        title = f"{folder_name(root)} {split}"
        splits[split] = ImageSplit(title, torch.from_numpy(numbers), paths=paths)
    largest = max(size for _, _, size in found.values())
    layout = describe(root, splits, by_split, largest)
    if unlabeled:
        layout += f"; {' and '.join(unlabeled)} is left out, since its labels are all -1"
    return Splits(classes, **splits, layout=layout)


def describe(
    root: Path, splits: dict[str, ImageSplit], files: dict[str, list[Path]], largest: int
) -> str:
    """What was found, in one line for the screen. largest: bytes of a row group's images."""
    counts = ", ".join(f"{len(images):,} {split}" for split, images in splits.items())
    layout = f"{folder_name(root)} holds {sum(map(len, files.values()))} parquet files: {counts}"
    if largest > LARGE_GROUP:
        layout += (
            f"; an image at random costs reading a row group of up to {format_bytes(largest)}, so "
            "write shards with python -m vit.shards first"
        )
    return layout


def group_files(root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """{split: its files}; files that name no split are train where none do.

    Raises DataError for a file without a split beside others, no train, and a missing number.
    """
    found: dict[str, list[Path]] = {}
    for path in files:
        found.setdefault(split_of_file(root, path) or "", []).append(path)
    if list(found) == [""]:
        found = {"train": found[""]}
    if "" in found:
        raise DataError(
            f"{found[''][0].absolute()}: names no split, as other files do; expected "
            "train-….parquet, validation-….parquet, test-….parquet"
        )
    if "train" not in found:
        raise DataError(f"{root.absolute()}: no parquet file of train, such as train-….parquet")
    for paths in found.values():
        require_all_numbers(paths)
    return {split: found[split] for split in SPLIT_FOLDERS if split in found}


def split_of_file(root: Path, path: Path) -> str | None:
    """The split that a file's name begins with, or that a folder above it is called."""
    word = re.split(r"[-_.]", path.stem)[0]
    folders = [] if path == root else list(path.relative_to(root).parts[:-1])
    splits = [split_of(name) for name in (word, *reversed(folders))]
    return next((split for split in splits if split is not None), None)


def require_all_numbers(paths: list[Path]) -> None:
    """Raise DataError where files called 0 to n of n are not all there."""
    matches = [match for path in paths if (match := NUMBER.search(path.stem))]
    totals = {int(match[2]) for match in matches}
    numbers = {int(match[1]) for match in matches}
    for total in totals:
        missing = sorted(set(range(total)) - numbers)
        if missing:
            raise DataError(
                f"{paths[0].parent.absolute()}: {len(missing)} of {total} files are missing, the "
                f"first is number {missing[0]:05}; get them too"
            )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a file that is missing or damaged into a DataError."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path.absolute()}: not a readable parquet file ({reason}); get it again"
        ) from None


def read_split(files: list[Path], label_column: str | None) -> tuple[np.ndarray, Labels, int]:
    """(paths, bytes (n,); labels; bytes of the largest row group's images) of one split.

    Raises DataError where a file can't be read, or numbers the classes in another way than others.
    """
    paths: list[bytes] = []
    values: list[np.ndarray] = []
    names = None
    largest = 0
    for path in files:
        with reading(path):
            file = open_file(str(path))
            column, own_names = label_column_of(path, file, label_column)
            require_one_image_column(path, file)
            labels = file.read(columns=[column], use_threads=False).column(0)
        # The same number would be a class here and another one there
        if names and own_names and own_names != names:
            raise DataError(
                f"{path.absolute()}: its metadata name other classes than those of a file before "
                "it; write all files of a split with the same list"
            )
        names = names or own_names
        if labels.null_count:
            raise DataError(f"{path.absolute()}: {labels.null_count} rows have no {column}")
        # Without rows there is no type, and an array of floats would make floats of whole numbers
        if len(labels):
            values.append(np.array(labels.to_pylist()))
        # With the folder's name, which is a part of the fingerprint, wherever a command is started
        absolute = path.absolute()
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            largest = max(largest, file.metadata.row_group(group).total_byte_size)
            paths += [os.fsencode(f"{absolute}!{group}+{row}") for row in range(size)]
    return np.array(paths), Labels(np.concatenate(values or [np.array([])]), names), largest


def label_column_of(
    path: Path, file: "ParquetFile", label_column: str | None
) -> tuple[str, list[str] | None]:
    """(the column with the classes, their names in Hugging Face's metadata or None).

    label_column: its exact name; None: one of LABEL_COLUMNS, or the only one that the metadata call
    a label. Raises DataError where it is missing or could be several.
    """
    columns = file.schema_arrow.names
    candidates, declared = label_candidates(file)
    if label_column is not None:
        candidates = [label_column]
    if len(candidates) > 1:
        raise DataError(
            f"{path.absolute()}: {' and '.join(candidates)} can each be the label; choose one with "
            "data.label_column (vit.shards, vit.embed: --label-column)"
        )
    if not candidates or candidates[0] not in columns:
        expected = label_column or f"{LABEL_COLUMNS[0]} (or {', '.join(LABEL_COLUMNS[1:])})"
        raise DataError(
            f"{path.absolute()}: no column {expected}; it has {', '.join(columns)}; name another "
            "with data.label_column (vit.shards, vit.embed: --label-column)"
        )
    return candidates[0], declared.get(candidates[0])


def label_candidates(file: "ParquetFile") -> tuple[list[str], dict[str, list[str]]]:
    """(columns that may hold the classes, {column: their names} of Hugging Face's metadata)."""
    columns = file.schema_arrow.names
    declared = {
        name: feature["names"]
        for name, feature in features_of(file).items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and "names" in feature
    }
    known = [name for name in LABEL_COLUMNS if name in columns]
    return known[:1] or list(declared), declared


def iter_labels(path: Path, label_column: str | None = None) -> Iterator[list[str]]:
    """Yield the names of the classes of each row group's rows; empty where a row has no label.

    Unlike list_parquet it also takes files without any label. Raises DataError as read_split does.
    """
    with reading(path):
        file = open_file(str(path))
        require_one_image_column(path, file)
        column, names = None, None
        if label_column is not None or label_candidates(file)[0]:
            column, names = label_column_of(path, file, label_column)
        for group in range(file.num_row_groups):
            if column is None:
                yield [""] * file.metadata.row_group(group).num_rows
                continue
            values = file.read_row_group(group, columns=[column], use_threads=False).column(0)
            yield [label_text(value, names) for value in values.to_pylist()]


def label_text(value: object, names: list[str] | None) -> str:
    """A label as text: its name where there are names, empty for None and for -1, "unlabeled"."""
    if value is None or value == -1:
        return ""
    if names is not None and isinstance(value, int) and value < len(names):
        return names[value]
    return str(value)


def features_of(file: "ParquetFile") -> dict:
    """The columns as Hugging Face's metadata describe them, {} where there are none."""
    text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        return json.loads(text).get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        return {}


def require_one_image_column(path: Path, file: "ParquetFile") -> None:
    """Raise DataError where no column holds images, or several do."""
    found = image_columns(file.schema_arrow)
    if len(found) != 1:
        problem = f"{' and '.join(found)} each hold bytes" if found else "no column holds bytes"
        raise DataError(
            f"{path.absolute()}: {problem} of images; expected one such column; it has "
            f"{', '.join(file.schema_arrow.names)}"
        )


def is_unlabeled(split: str, labels: Labels) -> bool:
    return (
        split != "train" and labels.values.dtype.kind == "i" and bool((labels.values == -1).all())
    )


def classes_of(path: Path, labels: Labels) -> list[str]:
    """The names of the classes in order. Raises DataError for labels that name no classes."""
    if labels.names is not None:
        classes = labels.names
    elif labels.values.dtype.kind in "iu":
        classes = classes_of_numbers(labels.values)
    elif labels.values.dtype.kind == "U":
        classes = np.unique(labels.values).tolist()
    else:
        raise DataError(f"{path.absolute()}: its labels are neither whole numbers nor names")
    if len(classes) < 2:
        raise DataError(f"{path.absolute()}: found {len(classes)} classes; expected two at least")
    return classes


def numbers_of(path: Path, labels: Labels, classes: list[str]) -> np.ndarray:
    """The labels as positions in the list of classes, int64 (n,).

    Raises DataError for a label that is not in that list.
    """
    if labels.names is not None:
        check_classes(classes, labels.names, path)
    if labels.names is None or labels.values.dtype.kind == "U":
        numbers = positions_of(labels.values, classes)
    else:
        numbers = labels.values.astype(np.int64)
    wrong = (numbers < 0) | (numbers >= len(classes))
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{path.absolute()}: image {row} of this split has the label {labels.values[row]}, "
            f"which is not among the {len(classes)} classes ({first_names(classes)})"
        )
    return numbers
