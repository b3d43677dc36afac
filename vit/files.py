"""Files that are whole or known to be cut short, locks on files, and JSON in and out."""

import contextlib
import fcntl
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vit.errors import writing_to

TAR_BLOCK = 512  # bytes; a tar's headers and contents begin at multiples of it


@contextlib.contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the place of `path` at the end.

    At every moment either the old file or the new one is at `path`. Where the block raises, the
    temporary file is removed and the old file stays. The permissions of the new file are those that
    the user's umask gives, however the block creates it. With `durable`, the file and its folder
    are flushed to the disk, so that the new file also survives a power cut. Raises OSError.
    """
    # In the same folder, since a rename is atomic within one file system only
    temporary = path.with_name(f".{path.name}.writing")
    try:
        # A library may create its file readable by the owner alone; an empty one shows the umask's
        # permissions without changing the process's umask, which other threads share
        temporary.write_bytes(b"")
        permissions = temporary.stat().st_mode
        yield temporary
        temporary.chmod(permissions)

        # Before the rename: after a power cut the new name must not point to missing bytes
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

    # The rename itself is an entry of the folder, which has a cache of its own
    if durable:
        sync_folder(path.parent)


def check_writable(path: Path, option: str = "--out") -> None:
    """Raise ConfigError if a file can't be written, before minutes are spent on computing it."""
    with writing_to(f"{option} {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_missing_streams() -> None:
    """Let standard input, output and error be /dev/null where a daemon was started without them.

    The run's own files would be opened in their place, and what libraries print be written to them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # It takes the lowest number, which is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def discard_output() -> None:
    """Drop what is buffered for standard output, and all that will be printed, as nobody reads it.

    Python, as it ends, would fail on it once more.
    """
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def require_end(tar: tarfile.TarFile) -> None:
    """Raise EOFError where the block of zeros that ends a tar is missing.

    tar: read to its end. tarfile takes a header that is cut off or damaged for the end.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(TAR_BLOCK) != bytes(TAR_BLOCK):
        raise EOFError(f"it breaks off or is damaged at byte {tar.offset:,}")


def lock(file: IO[Any], *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed, or its process ends; the lock is the kernel's.

    shared: beside other shared locks. wait: until nobody else has it. Returns whether the file
    system has locks: some of networks have none. Raises BlockingIOError where another process has
    the lock.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        # ENOSYS, ENOLCK, EOPNOTSUPP and others, each where another file system has none
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON for a person to read, atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} where there is no such file.

    Raises OSError where the file can't be read, and ValueError where it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file, one a line. Raises OSError."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            # A run that was killed may have left half a line
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def truncate_after_step(path: Path, step: int) -> None:
    """Cut a .jsonl file, whose rows have a `step`, back to what was known after that step.

    A resumed run writes the rest again, so that its file is the same as an uninterrupted run's.
    A file that does not exist is left alone. Raises OSError.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            # A run ends with the row of the test split, which a longer run must not keep
            if row["step"] <= step and row.get("split") != "test":
                kept.append(line + "\n")
        except ValueError:
            # The last line of a run that was killed, cut short
            break
    write_text(path, "".join(kept))
