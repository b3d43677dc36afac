"""Images that a user names, each with its label where one is known, as a stream.

A name is what `vit.data.image_stream.find_images` takes, or a table, a parquet file, a tar shard,
or a folder of the latter two. The order is that of the names, and within one that of its rows; a
folder is sorted. All splits are taken. Nothing is collected, so a million images need no memory.
"""

import collections
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from vit.data.image_stream import find_images, stream_batches
from vit.data.layouts import split_of
from vit.data.parquet_index import find_parquet, iter_labels
from vit.data.preprocessing import Preprocessing
from vit.data.tables import is_table, read_rows
from vit.data.tar_index import index_shard, read_class_names, require_finished
from vit.errors import DataError


class Source(NamedTuple):
    """An image's path, see vit/data/image_files.py, or the error in its place.

    label: the name of its class, empty where nothing says it.
    """

    path: str | DataError
    label: str


class LabeledImage(NamedTuple):
    """The path of an image that could be read, and the name of its class, or nothing."""

    path: str
    label: str


@dataclass(frozen=True)
class LabeledBatch:
    """One batch of a stream: all that was taken, and of it the images that could be read.

    pixels: of these, uint8 (len(images), C, *image_size), or None where there are none.
    errors: of the others.
    """

    sources: list[Source]
    images: list[LabeledImage]
    pixels: Tensor | None
    errors: list[DataError]


def find_sources(names: Sequence[str], label_column: str | None = None) -> Iterator[Source]:
    """Yield the images of all names. An image that is not there is a `DataError` in its place.

    label_column: of tables and parquet files, as vit.data.listing.list_images takes it. Raises
    DataError where a table, a parquet file or a shard can't be read.
    """
    for name in names:
        path = Path(name)
        if is_table(path):
            yield from sources_in_table(path, label_column)
        elif files := find_parquet(path):
            yield from sources_in_parquet(files, label_column)
        elif shards := find_shards(path):
            yield from sources_in_shards(shards)
        else:
            for found in find_images([name]):
                yield Source(found, class_folder(found, name))


def takes_label_column(name: str) -> bool:
    """Whether a name is of images whose labels stand in a column."""
    return is_table(Path(name)) or bool(find_parquet(Path(name)))


def class_folder(path: str | DataError, folder: str) -> str:
    """The folder below the named one that an image lies in, at any depth; empty for none.

    Below the folder of a split, such as train/cat/1.jpg, it is the next one.
    """
    if isinstance(path, DataError) or not path.startswith(folder):
        return ""
    folders = path[len(folder) :].strip(os.sep).split(os.sep)[:-1]
    if folders and split_of(folders[0]) is not None:
        folders = folders[1:]
    return folders[0] if folders else ""


def sources_in_table(table: Path, label_column: str | None) -> Iterator[Source]:
    """The rows of a CSV or TSV file; paths are relative to its folder."""
    for row in read_rows(table, label_column):
        yield Source(os.path.normpath(table.parent / row.path), row.label)


def sources_in_parquet(files: Sequence[Path], label_column: str | None) -> Iterator[Source]:
    """The rows of parquet files, one row group after another."""
    for file in files:
        for group, labels in enumerate(iter_labels(file, label_column)):
            for row, label in enumerate(labels):
                yield Source(f"{file}!{group}+{row}", label)


def find_shards(path: Path) -> list[Path]:
    """The tar file itself, or those in a folder, sorted. Raises DataError as require_finished."""
    if path.suffix == ".tar" and not path.is_dir():
        return [path]
    require_finished(path)
    return sorted(path.glob("*.tar")) if os.path.isdir(path) else []


def sources_in_shards(shards: Sequence[Path]) -> Iterator[Source]:
    """The images of tar shards, one shard after another."""
    for shard in shards:
        names = dict(enumerate(read_class_names(shard.parent) or []))
        for path, label in zip(*index_shard(shard), strict=True):
            yield Source(os.fsdecode(path), names.get(label, str(label)))


def labeled_batches(
    sources: Iterator[Source], preprocessing: Preprocessing, batch_size: int, workers: int | None
) -> Iterator[LabeledBatch]:
    """Yield images batch by batch, decoded ahead of their use as stream_batches() does it."""
    # The stream decodes paths; what was taken waits here for its batch
    taken: collections.deque[Source] = collections.deque()

    def paths() -> Iterator[str | DataError]:
        for source in sources:
            taken.append(source)
            yield source.path

    for batch in stream_batches(paths(), preprocessing, batch_size, workers):
        of_batch = [taken.popleft() for _ in range(len(batch.paths) + len(batch.errors))]
        images = [
            LabeledImage(path, of_batch[position].label)
            for path, position in zip(batch.paths, batch.positions, strict=True)
        ]
        yield LabeledBatch(of_batch, images, batch.pixels, batch.errors)
