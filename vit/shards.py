"""Data sets in tar shards, as WebDataset lays them out: train-000000.tar holds 000123.jpg and its label, 000123.cls.

    python -m vit.shards FOLDER OUT --short-side 288       # write them from a folder of pictures (train/<class>/…, val/, test/)
    python train.py data=shards data.root=OUT

A few large files instead of a million small ones suit network disks. They are read at random, not as a stream: each start
needs an index of where every picture lies, kept beside them in .index-train.npz, and what follows is as with single files. So
the order of the samples and their augmentations are functions of (seed, epoch) alone, and a run can be resumed anywhere, with
any number of processes and workers. The price is a seek a picture; shards in an object store are to be copied first.
"""

import argparse
import functools
import io
import os
import random
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from vit.data.image_files import iter_image_files
from vit.data.tar_index import CLASSES, SPLITS
from vit.errors import ConfigError, DataError, run_command, writing_to
from vit.shrink import in_processes, shrunk, tell_left_out


def pictures_of(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """(picture, label) of folder/<class>/…, in an order that mixes the classes and is the same each time."""
    found = [
        (Path(path), label)
        for label, title in enumerate(classes)
        for path in iter_image_files(folder / title, follow_links=True)
    ]
    found.sort(key=lambda pair: str(pair[0]))
    random.Random(0).shuffle(found)
    return found


def encoded(pair: tuple[Path, int], short_side: int | None) -> tuple[str, bytes, int] | str:
    """(extension, file, label) of a picture, or a line about one that can't be read."""
    path, label = pair
    try:
        return *shrunk(path, short_side, quality=90), label
    except DataError as error:
        return str(error)


def write_split(
    source: Path,
    out: Path,
    split: str,
    classes: list[str],
    per_shard: int,
    short_side: int | None,
    workers: int,
) -> tuple[int, list[str]]:
    """Write out/<split>-NNNNNN.tar; (pictures written, a line for each that was left out)."""
    unreadable: list[str] = []

    def readable(
        results: Iterator[tuple[str, bytes, int] | str],
    ) -> Iterator[tuple[str, bytes, int]]:
        for result in results:
            if isinstance(result, str):
                unreadable.append(result)
            else:
                yield result

    count = 0
    tar = None
    encode = functools.partial(encoded, short_side=short_side)
    for extension, content, label in readable(
        in_processes(encode, pictures_of(source / split, classes), workers)
    ):
        if count % per_shard == 0:
            if tar is not None:
                tar.close()
            tar = tarfile.open(out / f"{split}-{count // per_shard:06}.tar", "w")  # noqa: SIM115
        assert tar is not None
        for name, data in (
            (f"{count:09}{extension}", content),
            (f"{count:09}.cls", str(label).encode()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        count += 1
    if tar is not None:
        tar.close()
    return count, unreadable


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vit.shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, help="train/<class>/…, and val/ and test/ where there are"
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument(
        "--per-shard", type=int, default=10_000, help="pictures in a shard (default 10,000)"
    )
    parser.add_argument(
        "--short-side", type=int, help="make larger pictures smaller: pixels of the shorter side"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default one a core)"
    )
    options = parser.parse_args(given)
    if min(options.per_shard, options.workers, options.short_side or 1) < 1:
        parser.error("--per-shard, --short-side and --workers must be positive")
    train = options.folder / "train"
    if not train.is_dir():
        raise DataError(f"{options.folder}: no folder train in it; expected train/<class>/…")
    classes = sorted(
        entry.name
        for entry in os.scandir(train)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if any(options.out.glob("*.tar")):
        raise ConfigError(f"{options.out}: holds shards already; choose a new folder")
    left_out: list[str] = []
    with writing_to(options.out, "choose another folder"):
        options.out.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            if (options.folder / split).is_dir():
                count, unreadable = write_split(
                    options.folder,
                    options.out,
                    split,
                    classes,
                    options.per_shard,
                    options.short_side,
                    options.workers,
                )
                print(f"{split}: {count:,} pictures")
                left_out += unreadable
        (options.out / CLASSES).write_text("".join(f"{name}\n" for name in classes))
    print(f"train with data=shards data.root={options.out}")
    tell_left_out(left_out)


if __name__ == "__main__":
    sys.exit(run_command("vit.shards", main))
