"""Where every image lies in the tar shards of a data set (written by vit/shards.py).

An image in a shard has a path, "FILE.tar!OFFSET+SIZE", by which vit/data/image_files.py opens it
like a file. Finding all of them takes reading every shard's headers, so the index is kept in a
file.
"""

import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from vit.data.image_files import EXTENSIONS
from vit.errors import DataError
from vit.files import atomic_write, require_end

CLASSES = "classes.txt"  # class names, one a line, in the order of the labels
SPLITS = ("train", "val", "test")
WRITING = ".writing"  # the folder that holds new shards until all of them are whole


def require_finished(root: Path) -> None:
    """Raise DataError for a folder whose shards are not all there yet."""
    if os.path.exists(root / WRITING):  # False, too, where the folder may not be opened
        raise DataError(
            f"{root.absolute()}: python -m vit.shards is still writing there, or was ended before "
            "it was done; wait for it, or remove the folder and write the shards again"
        )


def read_class_names(folder: Path) -> list[str] | None:
    """The names of the shards' classes in the order of the labels, or None where no file has them.

    Raises DataError for a file that can't be read.
    """
    file = folder / CLASSES
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: can't read the names of the classes ({error})") from None


def index_split(root: Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(paths, bytes (n,); labels, int64 (n,)) of all shards of a split, or None without any shard.

    Kept in root/.index-<split>.npz as long as the shards' names, sizes and times stay as they are.
    Raises DataError as require_finished and index_shard do.
    """
    require_finished(root)
    shards = sorted(root.glob(f"{split}-*.tar"))
    if not shards:
        return None
    # The time of a shard changes even where one of the same size is written in its place
    state = np.array([f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in shards])
    index_file = root / f".index-{split}.npz"
    kept = read_index(index_file, state)
    if kept is not None:
        return kept

    print(f"{root}: looking up the images in {len(shards)} {split} shards", flush=True)
    all_paths: list[bytes] = []
    all_labels: list[int] = []
    for shard in shards:
        paths, labels = index_shard(shard)
        all_paths += paths
        all_labels += labels
    index = np.array(all_paths), np.array(all_labels, dtype=np.int64)
    write_index(index_file, state, *index)
    return index


def read_index(index_file: Path, state: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The index in a file, or None where there is none yet, or one of other shards."""
    try:
        with np.load(index_file) as index:
            if np.array_equal(index["state"], state):
                return index["places"], index["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return None


def write_index(index_file: Path, state: np.ndarray, paths: np.ndarray, labels: np.ndarray) -> None:
    """Keep an index for the next start, if the folder can be written."""
    try:
        # An open file, since savez appends .npz to a name that lacks it
        with atomic_write(index_file) as temporary, open(temporary, "wb") as file:
            np.savez(file, state=state, places=paths, labels=labels)
    except OSError:
        pass  # a read-only disk is indexed at each start


def index_shard(path: Path) -> tuple[list[bytes], list[int]]:
    """(paths, labels) of the images of one shard, in its order.

    Raises DataError where the file is no tar or cut short, or an image has no label that is a
    number.
    """
    # By the name without its extension, which the files of a sample have in common
    images: dict[str, bytes] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = os.path.splitext(member.name)
                if extension.lower() in EXTENSIONS:
                    images[key] = os.fsencode(f"{path}!{member.offset_data}+{member.size}")
                elif extension == ".cls":
                    file = tar.extractfile(member)
                    labels[key] = int(file.read()) if file else -1
            # Cut between two samples, it would be taken for a shard of fewer
            require_end(tar)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: not a shard of images and labels ({error}); write it again or remove it"
        ) from None
    incomplete = sorted(images.keys() ^ labels.keys())
    if incomplete:
        raise DataError(
            f"{path}: {incomplete[0]} lacks its image or its label (.cls); write the shard again"
        )
    return list(images.values()), [labels[key] for key in images]
