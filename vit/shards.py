"""Write a data set as tar shards, as WebDataset lays them out.

    python -m vit.shards SOURCE OUT --short-side 288    # SOURCE: any data.root of data=folder
    python train.py data=shards data.root=OUT

SOURCE is a folder of class folders, a CSV or TSV file, a parquet file, or a folder of these.
train-000000.tar holds 000000123.jpg and its label, 000000123.cls, and so on. A few large files
instead of a million small ones suit network disks. They are read at random, not as a stream: each
start needs an index of where every image lies, which is kept beside them in .index-train.npz, and
what follows is as with single files. So the order of the samples and their augmentations are
functions of (seed, epoch) alone, and a run can be resumed anywhere, with any number of processes
and workers. The price is one seek per image; shards in an object store have to be copied first.

The shards are written into OUT/.writing and moved from there when all of them are whole. Where a
command was killed before, OUT still has that folder and is refused: remove OUT and start again.
"""

import argparse
import contextlib
import functools
import io
import os
import random
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vit.data.image_files import EXTENSIONS, JPEG, open_encoded, open_lazily
from vit.data.layouts import find_layout
from vit.data.listing import list_images
from vit.data.parquet_index import find_parquet
from vit.data.splits import ImageSplit
from vit.data.tar_index import CLASSES, WRITING
from vit.errors import ConfigError, DataError, run_command, writing_to
from vit.files import write_text
from vit.runtime.cores import usable_cores
from vit.runtime.process_pool import map_in_processes
from vit.shrink import report_unreadable, shrink_image

JPEG_QUALITY = 90  # of images that are made smaller

# Path and label of an image
Source = tuple[str, int]
# Extension, file content, label
Sample = tuple[str, bytes, int]


def samples_of(images: ImageSplit) -> Iterator[Source]:
    """Yield (path, label) of the images in the order in which they are written.

    Image files are mixed, the same way each time. Rows of parquet files keep their order, since a
    row group is read as a whole.
    """
    assert images.paths is not None
    order = list(range(len(images)))
    if order and b".parquet!" not in images.paths[0].lower():
        # Sorted first, since folders are listed in any order
        order = images.paths.argsort(kind="stable").tolist()
        random.Random(0).shuffle(order)
    for index in order:
        yield os.fsdecode(images.paths[index]), int(images.labels[index])


def encode_sample(source: Source, short_side: int | None) -> Sample | str:
    """The sample as a shard holds it, or a line about an image that cannot be read."""
    path, label = source
    try:
        jpeg = shrink_image(path, short_side, JPEG_QUALITY)
        suffix = suffix_of(path)
        if jpeg is None:
            with open_encoded(path) as file:
                return suffix, file.read(), label
    except DataError as error:
        return str(error)
    # A sample's files share their name up to the first extension, so there must be no second
    return suffix if suffix.lower() in JPEG else ".jpg", jpeg, label


def suffix_of(path: str) -> str:
    """The extension of an image's name; of one without a known extension, that of its format.

    Raises DataError for a file that is no image.
    """
    suffix = os.path.splitext(path)[1]
    if suffix.lower() in EXTENSIONS:
        return suffix
    with open_lazily(path) as image:
        name = f".{(image.format or '').lower()}"
    # Readers go by the content, so any extension of an image does for other formats
    return name if name in EXTENSIONS else ".jpg"


class ShardWriter:
    """Writes samples to out/<split>-000000.tar, -000001.tar and so on, `per_shard` to each."""

    def __init__(self, out: Path, split: str, per_shard: int):
        self.out = out
        self.split = split
        self.per_shard = per_shard
        self.count = 0  # samples written
        self.tar: tarfile.TarFile | None = None

    def add(self, sample: Sample) -> None:
        extension, content, label = sample
        if self.count % self.per_shard == 0:
            self.close()
            shard = self.count // self.per_shard
            self.tar = tarfile.open(self.out / f"{self.split}-{shard:06}.tar", "w")  # noqa: SIM115
        self.write_member(f"{self.count:09}{extension}", content)
        self.write_member(f"{self.count:09}.cls", str(label).encode())
        self.count += 1

    def write_member(self, name: str, content: bytes) -> None:
        assert self.tar is not None
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self.tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()
            self.tar = None


@contextlib.contextmanager
def moved_when_whole(out: Path) -> Iterator[Path]:
    """Give a folder in `out` to write to; its files move to `out` at the end.

    Where the block raises, the folder is removed. As long as it is there, also because this process
    was killed, readers refuse `out`, so that a part of a data set is never taken for all of it.
    Raises ConfigError where there is one already, and OSError.
    """
    writing = out / WRITING
    try:
        writing.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"{out}: another command is writing shards there, or was ended before it was done; "
            "remove the folder if none is, or choose a new one"
        ) from None
    try:
        yield writing
    except BaseException:  # also Ctrl+C
        shutil.rmtree(writing, ignore_errors=True)
        raise
    for file in sorted(writing.iterdir()):
        file.rename(out / file.name)
    writing.rmdir()


def write_split(
    samples: Iterable[Source],
    out: Path,
    split: str,
    *,
    per_shard: int,
    short_side: int | None,
    workers: int,
) -> tuple[int, list[str]]:
    """Write the shards of one split: (number of images, a line for each that was left out)."""
    encode = functools.partial(encode_sample, short_side=short_side)
    unreadable: list[str] = []
    with contextlib.closing(ShardWriter(out, split, per_shard)) as writer:
        for sample in map_in_processes(encode, samples, workers):
            if isinstance(sample, str):
                unreadable.append(sample)
            else:
                writer.add(sample)
    return writer.count, unreadable


def parse_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vit.shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        type=Path,
        help="a folder with train/<class>/…, and val/ and test/ where they exist, or <class>/… "
        "alone; a CSV or TSV file; a parquet file, or a folder of some",
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument(
        "--per-shard", type=int, default=10_000, help="images in a shard (default 10,000)"
    )
    parser.add_argument(
        "--short-side", type=int, help="make larger images smaller: pixels of the shorter side"
    )
    parser.add_argument(
        "--label-column", help="of a table or of parquet files: the column with the classes"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        help="processes (default: one for each core that it may use)",
    )
    options = parser.parse_args(given)
    short_side = 1 if options.short_side is None else options.short_side
    if min(options.per_shard, options.workers, short_side) < 1:
        parser.error("--per-shard, --short-side and --workers must be positive")
    return options


def lines_of_classes(classes: Sequence[str]) -> str:
    """The text of classes.txt. Raises DataError for a name that is not one line of UTF-8."""
    for name in classes:
        # Read as two lines, it would move the names of all classes that follow
        line = f"{name}\n".encode(errors="replace")
        if line.decode().splitlines() != [name]:
            raise DataError(
                f"class {name!r}: {CLASSES} cannot hold this name, which is not one line of UTF-8; "
                "rename the class"
            )
    return "".join(f"{name}\n" for name in classes)


def refuse_class_folder(source: Path, out: Path) -> None:
    """Raise ConfigError where the new folder would lie among or in class folders."""
    if not source.is_dir() or not out.absolute().is_relative_to(source.absolute()):
        return
    if not find_parquet(source) and find_layout(source).is_flat:
        raise ConfigError(f"{out}: would be a class folder; choose a folder elsewhere")


def main(given: Sequence[str] | None = None) -> None:
    options = parse_arguments(given)
    # Shards of two data sets would be read as one
    if any(options.out.glob("*.tar")):
        raise ConfigError(f"{options.out}: already holds shards; choose a new folder")
    refuse_class_folder(options.source, options.out)
    # All splits are listed before the first shard is written
    splits = list_images(options.source, options.label_column)
    names = lines_of_classes(splits.classes)

    unreadable: list[str] = []
    with writing_to(options.out, "choose another folder"), moved_when_whole(options.out) as folder:
        print(splits.layout)
        write_text(folder / CLASSES, names)
        for split, images in splits.named().items():
            count, left_out = write_split(
                samples_of(images),
                folder,
                split,
                per_shard=options.per_shard,
                short_side=options.short_side,
                workers=options.workers,
            )
            print(f"{split}: {count:,} images")
            unreadable += left_out
    print(f"train with data=shards data.root={options.out}")
    report_unreadable(unreadable)


if __name__ == "__main__":
    sys.exit(run_command("vit.shards", main))
