"""Images that a user names on a command line or through a pipe, found and decoded as a stream.

Neither the paths nor the pixels are collected, so any number of images needs the memory of a few
batches. Whatever can't be found or read takes its position in the stream as a `DataError`: one
damaged file among a million should not cost the answers to the others.

`vit.data.loader` differs in both respects: it knows all its images beforehand, and an unreadable
one ends the run or is replaced.
"""

import glob
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from vit.data.image_files import (
    file_of,
    is_image_file,
    is_unsupported,
    no_images,
    unsupported_image,
    walk_folders,
)
from vit.data.loader import init_worker
from vit.data.preprocessing import Preprocessing
from vit.errors import DataError
from vit.runtime.cores import loader_workers
from vit.runtime.faults import from_workers

# Up to this many images are decoded in less time than worker processes take to start
FEW_IMAGES = 64


def find_images(names: Sequence[str]) -> Iterator[str | DataError]:
    """Yield the paths of image files in the order in which their names were given.

    names: files, folders (their own files first, sorted, then those of each subfolder), glob
    patterns (`**` reaches into subfolders; matches are sorted), or "-" for the lines of standard
    input. What is not there is yielded as a `DataError` that says so.
    """
    for name in names:
        if name != "-":
            yield from expand_name(name)
            continue
        for line in sys.stdin.buffer:
            if line.strip():
                yield from expand_name(os.fsdecode(line.rstrip(b"\r\n")))


def expand_name(name: str) -> Iterator[str | DataError]:
    """Yield a file itself, the images in a folder, or what a pattern matches."""
    if os.path.isdir(name):
        yield from images_in_folder(name)
        return
    # A file may be called "a*.jpg". A missing one is reported by whoever opens it.
    if os.path.lexists(name) or not glob.has_magic(name):
        yield name
        return

    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        yield DataError(f"{name}: no file matches this pattern")
    for match in matches:
        if os.path.isdir(match):
            yield from images_in_folder(match)
        else:
            yield match


def images_in_folder(folder: str) -> Iterator[str | DataError]:
    """Yield the images in a folder at any depth, then an error for each unreadable folder."""
    found_any = False
    refused: list[OSError] = []
    for parent, files in walk_folders(folder, onerror=refused.append):
        for file in sorted(files):
            if is_image_file(file):
                found_any = True
                yield os.path.join(parent, file)
            elif is_unsupported(file):
                found_any = True
                yield DataError(unsupported_image(os.path.join(parent, file)))

    for error in refused:
        yield DataError(f"{error.filename}: can't open this folder ({error.strerror})")
    if not found_any and not refused:
        yield DataError(f"{folder}: {no_images()}")


@dataclass(frozen=True)
class ImageBatch:
    """One batch of the stream, in its order.

    paths: of the images that could be read.
    pixels: of those images, uint8 (B, C, *image_size), or None where there are none.
    errors: one for every item that could not be found or read.
    positions: among all items of the batch, those of the images that could be read.
    """

    paths: list[str]
    pixels: Tensor | None
    errors: list[DataError]
    positions: list[int]


class PathDataset(Dataset):
    """Decodes images for evaluation; an item is the path itself, so no list of paths is needed."""

    def __init__(self, preprocessing: Preprocessing):
        self.preprocessing = preprocessing

    def __getitem__(self, path: str | DataError) -> tuple[str, Tensor] | DataError:
        """Return (path, pixels), or the error: raised, it would take the whole batch with it."""
        if isinstance(path, DataError):
            return path
        try:
            return path, self.decode(path)
        except DataError as error:
            return error

    def decode(self, path: str) -> Tensor:
        """Return the pixels, uint8 (C, *image_size). Raises DataError."""
        file = file_of(path)
        if not os.path.exists(file):
            raise DataError(f"{path}: no such file or folder")
        # Opening a named pipe would block until somebody writes to it
        if not os.path.isfile(file):
            raise DataError(f"{path}: not a regular file")
        return self.preprocessing.read_pixels(path)


def collate(items: list[tuple[str, Tensor] | DataError]) -> ImageBatch:
    errors = [item for item in items if isinstance(item, DataError)]
    decoded = [item for item in items if not isinstance(item, DataError)]
    paths = [path for path, _ in decoded]
    pixels = default_collate([pixels for _, pixels in decoded]) if decoded else None
    positions = [n for n, item in enumerate(items) if not isinstance(item, DataError)]
    return ImageBatch(paths, pixels, errors, positions)


def stream_batches(
    paths: Iterator[str | DataError],
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int | None,
) -> Iterator[ImageBatch]:
    """Decode images batch by batch, ahead of their use by no more than two batches a worker.

    paths: as `find_images` yields them.
    workers: the number of decoding processes. 0 decodes in this process; None starts workers only
    where there are more than a few images.
    """
    if workers is None:
        first = list(itertools.islice(paths, FEW_IMAGES + 1))
        workers = loader_workers(None) if len(first) > FEW_IMAGES else 0
        paths = itertools.chain(first, paths)
    loader = DataLoader(
        PathDataset(preprocessing),
        batch_sampler=split_into_batches(paths, batch_size),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=init_worker,
        prefetch_factor=2 if workers else None,
    )
    return from_workers(iter(loader))


def split_into_batches(
    paths: Iterable[str | DataError], batch_size: int
) -> Iterator[list[str | DataError]]:
    """Yield lists of `batch_size` paths; the last may be shorter."""
    paths = iter(paths)
    while batch := list(itertools.islice(paths, batch_size)):
        yield batch
