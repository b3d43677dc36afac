"""Room, checksums and errors of files that are downloaded."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vit.errors import CheckpointError
from vit.runtime.faults import DISK_ERRORS
from vit.text import format_bytes

CHUNK = 2**20


def hash_file(path: Path, algorithm: str, header: bytes = b"") -> str:
    """The hexadecimal hash of a header and a file's content. Raises OSError."""
    digest = hashlib.new(algorithm, header, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def require_room(name: str, needed: int, folder: Path) -> None:
    """Raise CheckpointError where a folder's disk has less room than a download needs, in bytes.

    The folder need not be there yet.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{name}: needs {format_bytes(needed)}, and {format_bytes(free)} are free in {folder}; "
            "make room, or set HF_HOME to a folder on another disk"
        )


def is_of_disk(error: BaseException) -> bool:
    """Whether an error says that the disk is full or may not be written to."""
    if isinstance(error, PermissionError):
        return True
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


@contextmanager
def disk_errors(name: str, folder: Path) -> Iterator[None]:
    """Turn an OSError of a disk that is full or may not be written to into CheckpointError."""
    try:
        yield
    except OSError as error:
        if not is_of_disk(error):
            raise
        raise CheckpointError(
            f"{name}: can't be written to {folder} ({error.strerror}); make room, or set HF_HOME "
            "to a folder on another disk"
        ) from None
