"""Files that are written whole or not at all, and JSON in and out."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the place of `path` at the end.

    At every moment either the old file or the new one stands at `path`. Where the block raises, the
    temporary file is removed and the old file stays. The new file is readable by whom the user's
    umask allows, however the block creates it. With `durable`, the file and its folder are flushed
    to the disk, so that the new file also survives a power cut. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_bytes(b"")
        permissions = temporary.stat().st_mode
        yield temporary
        temporary.chmod(permissions)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON for a person to read, atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} where there is no such file. Raises OSError and
    ValueError.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that are whole; a run that was killed may have left half a line
    at its end.
    """
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def truncate_after_step(path: Path, step: int) -> None:
    """Drop what a resumed run will write again from a .jsonl file whose rows have a `step`.

    Those are the rows after `step`, the row of the test split, which a run ends with, and a last
    line that was cut short. A file that does not exist is left alone.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= step and row.get("split") != "test":
                kept.append(line + "\n")
        except ValueError:
            break
    write_text(path, "".join(kept))
