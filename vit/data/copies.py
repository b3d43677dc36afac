"""Images that are held out and trained on too: a folder was copied instead of moved."""

import contextlib
import filecmp
import os
from collections.abc import Iterator

from vit.data.splits import ImageSplit

# Files that are compared byte by byte: enough to tell, and read in a moment from any disk
COMPARED = 50


def describe_copies(train: ImageSplit, held_out: ImageSplit) -> str | None:
    """Say that images of a held-out split are also in train, or None where none was found.

    Looked at are images that have the class and the file name of a training image. Both splits are
    of files.
    """
    pairs = same_names(train, held_out)
    # Evenly from all classes
    looked_at = pairs[:: -(-len(pairs) // COMPARED)] if pairs else []
    same = sum(are_equal(*pair) for pair in looked_at)
    if not same:
        return None
    return (
        f"{held_out.title} has {len(pairs):,} images with the class and name of a training image; "
        f"{len(looked_at)} were compared, and {same} are the same file, which flatters the "
        "accuracy: take them out of train"
    )


def same_names(train: ImageSplit, held_out: ImageSplit) -> list[tuple[bytes, bytes]]:
    """The (training image, held-out image) of one class and one file name, in train's order."""
    by_name = dict(named_paths(held_out))
    return [(path, by_name[key]) for key, path in named_paths(train) if key in by_name]


def named_paths(images: ImageSplit) -> Iterator[tuple[tuple[int, bytes], bytes]]:
    """The ((label, file name), path) of each image."""
    assert images.paths is not None
    for label, path in zip(images.labels.tolist(), images.paths.tolist(), strict=True):
        yield (label, os.path.basename(path)), path


def are_equal(first: bytes, second: bytes) -> bool:
    """Whether two files have the same bytes; False where one can't be read."""
    with contextlib.suppress(OSError):
        return filecmp.cmp(first, second, shallow=False)
    return False
