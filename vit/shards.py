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
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vit.errors import ConfigError, DataError, run, writing
from vit.shrink import in_processes, shrunk, tell_left_out
from vit.transforms import EXTENSIONS, pictures_below

CLASSES = "classes.txt"  # names, one a line, in the order of the labels
SPLITS = ("train", "val", "test")


# --- reading ---------------------------------------------------------------------------------------------------------


def index_shard(path: Path) -> tuple[list[bytes], list[int]]:
    """(places of the pictures as vit.transforms.open_member takes them, labels) of one shard, in its order.

    Raises DataError where the file is no tar, or a picture has no label of a number.
    """
    pictures: dict[str, bytes] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = os.path.splitext(member.name)
                if extension.lower() in EXTENSIONS:
                    pictures[key] = os.fsencode(f"{path}!{member.offset_data}+{member.size}")
                elif extension == ".cls":
                    file = tar.extractfile(member)
                    labels[key] = int(file.read()) if file else -1
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a shard of pictures and labels ({error}); write it anew or remove it") from None
    if pictures.keys() != labels.keys():
        raise DataError(f"{path}: {sorted(pictures.keys() ^ labels.keys())[0]} has not both a picture and a label (.cls)")
    return list(pictures.values()), [labels[key] for key in pictures]


def index_split(root: Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(places, bytes (n,); labels, int64 (n,)) of all shards of a split, or None where there are none.

    Kept in root/.index-<split>.npz as long as the shards' names, sizes and times stay as they are.
    """
    shards = sorted(root.glob(f"{split}-*.tar"))
    if not shards:
        return None
    state = np.array([f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in shards])
    kept = root / f".index-{split}.npz"
    try:
        with np.load(kept) as index:
            if np.array_equal(index["state"], state):
                return index["places"], index["labels"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # not there yet, or of other shards
    print(f"{root}: looking up the pictures in {len(shards)} {split} shards", flush=True)
    found = [index_shard(path) for path in shards]
    places = np.array([place for part, _ in found for place in part])
    labels = np.array([label for _, part in found for label in part], dtype=np.int64)
    try:
        unfinished = kept.with_name(f"{kept.name}.{os.getpid()}.npz")
        np.savez(unfinished, state=state, places=places, labels=labels)
        os.replace(unfinished, kept)
    except OSError:
        pass  # a disk that can't be written is indexed at each start
    return places, labels


# --- writing ---------------------------------------------------------------------------------------------------------


def pictures_of(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """(picture, label) of folder/<class>/…, in an order that mixes the classes and is the same each time."""
    found = [(Path(path), label) for label, title in enumerate(classes)
             for path in pictures_below(folder / title, follow_links=True)]
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


def write_split(source: Path, out: Path, split: str, classes: list[str], per_shard: int, short_side: int | None,
                workers: int) -> tuple[int, list[str]]:
    """Write out/<split>-NNNNNN.tar; (pictures written, a line for each that was left out)."""
    unreadable: list[str] = []

    def readable(results: Iterator[tuple[str, bytes, int] | str]) -> Iterator[tuple[str, bytes, int]]:
        for result in results:
            if isinstance(result, str):
                unreadable.append(result)
            else:
                yield result

    count = 0
    tar = None
    encode = functools.partial(encoded, short_side=short_side)
    for extension, content, label in readable(in_processes(encode, pictures_of(source / split, classes), workers)):
        if count % per_shard == 0:
            if tar is not None:
                tar.close()
            tar = tarfile.open(out / f"{split}-{count // per_shard:06}.tar", "w")  # noqa: SIM115
        assert tar is not None
        for name, data in ((f"{count:09}{extension}", content), (f"{count:09}.cls", str(label).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        count += 1
    if tar is not None:
        tar.close()
    return count, unreadable


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vit.shards", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="train/<class>/…, and val/ and test/ where there are")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--per-shard", type=int, default=10_000, help="pictures in a shard (default 10,000)")
    parser.add_argument("--short-side", type=int, help="make larger pictures smaller: pixels of the shorter side")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default one a core)")
    options = parser.parse_args(given)
    if min(options.per_shard, options.workers, options.short_side or 1) < 1:
        parser.error("--per-shard, --short-side and --workers must be positive")
    train = options.folder / "train"
    if not train.is_dir():
        raise DataError(f"{options.folder}: no folder train in it; expected train/<class>/…")
    classes = sorted(entry.name for entry in os.scandir(train) if entry.is_dir() and not entry.name.startswith("."))
    if any(options.out.glob("*.tar")):
        raise ConfigError(f"{options.out}: holds shards already; choose a new folder")
    left_out: list[str] = []
    with writing(options.out, "choose another folder"):
        options.out.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            if (options.folder / split).is_dir():
                count, unreadable = write_split(options.folder, options.out, split, classes, options.per_shard,
                                                options.short_side, options.workers)
                print(f"{split}: {count:,} pictures")
                left_out += unreadable
        (options.out / CLASSES).write_text("".join(f"{name}\n" for name in classes))
    print(f"train with data=shards data.root={options.out}")
    tell_left_out(left_out)


if __name__ == "__main__":
    sys.exit(run("vit.shards", main))
