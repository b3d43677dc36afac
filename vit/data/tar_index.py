"""TODO: say what this file is for."""

import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from vit.data.image_files import EXTENSIONS
from vit.errors import DataError

CLASSES = "classes.txt"  # names, one a line, in the order of the labels


SPLITS = ("train", "val", "test")


def index_shard(path: Path) -> tuple[list[bytes], list[int]]:
    """(places of the pictures as vit.data.image_files.open_member takes them, labels) of one shard, in its order.

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
        raise DataError(
            f"{path}: not a shard of pictures and labels ({error}); write it anew or remove it"
        ) from None
    if pictures.keys() != labels.keys():
        raise DataError(
            f"{path}: {sorted(pictures.keys() ^ labels.keys())[0]} has not both a picture and a label (.cls)"
        )
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
