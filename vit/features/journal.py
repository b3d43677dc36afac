"""The rows of a file of features while it is being made: a folder that survives a kill.

    OUT.partial/features.f32    float32, little-endian, row after row
    OUT.partial/images.jsonl    ["path", "label"] of each row, one a line
    OUT.partial/state.json      how much of both is whole, and what it was made of

Rows are appended batch by batch. What a killed command has appended behind the last state is cut
off when it is started again, so the rows are those of a command that was never killed: the batches
are the same, and therefore the bits. The finished file is written from here in one go.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vit.data.image_files import file_of
from vit.data.labeled_sources import LabeledImage, Source
from vit.errors import ConfigError, DataError
from vit.files import atomic_write, lock

# Seconds of work that a kill may cost
COMMIT_SECONDS = 1.0

FEATURES, IMAGES, STATE = "features.f32", "images.jsonl", "state.json"

# Advice at the end of messages
ANEW = "start anew with --overwrite, or choose another --out"


@dataclass(frozen=True)
class State:
    """How far a file of features is, after whole batches.

    settings        what the features depend on beside the images: plain values
    batches         of images that were taken, with those that could not be read
    rows, left_out  images that have features, and that could not be read
    digest          of all images that were taken, see chain()
    text_size       bytes of images.jsonl
    longest_path, longest_label   in characters
    """

    settings: dict[str, Any] = field(default_factory=dict)
    batches: int = 0
    rows: int = 0
    left_out: int = 0
    digest: str = ""
    text_size: int = 0
    longest_path: int = 0
    longest_label: int = 0

    @property
    def width(self) -> int:
        """The length of a feature vector."""
        return self.settings["width"]


def chain(digest: str, sources: Iterable[Source]) -> str:
    """The digest of images followed by one more batch: SHA-256 of names, labels, sizes and times.

    The contents are not read, which would take as long as decoding them.
    """
    sha = hashlib.sha256(digest.encode())
    # The images of a tar shard or a parquet file share one
    stamps: dict[str, tuple[int, int] | None] = {}
    for path, label in sources:
        file = "" if isinstance(path, DataError) else file_of(path)
        if file not in stamps:
            stamps[file] = stamp_of(file)
        sha.update(json.dumps([str(path), label, stamps[file]]).encode())
    return sha.hexdigest()


def chain_all(sources: Iterator[Source], batch_size: int) -> str:
    """The digest of all images of a stream, as chain() makes it of their batches."""
    digest = ""
    while batch := list(islice(sources, batch_size)):
        digest = chain(digest, batch)
    return digest


def stamp_of(file: str) -> tuple[int, int] | None:
    """Size and time of change of a file; None where there is none."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def skip_finished(sources: Iterator[Source], state: State, batch_size: int) -> bool:
    """Take the images that are done from the stream; return whether they are the same as then."""
    done = islice(sources, state.batches * batch_size)
    return chain_all(done, batch_size) == state.digest


def refuse_other_settings(name: Path, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ConfigError, naming the first, where settings of a file differ from the expected."""
    for key, value in expected.items():
        if settings.get(key) == value:
            continue
        if key == "checkpoint":
            raise ConfigError(f"{name}: holds features of another checkpoint; {ANEW}")
        raise ConfigError(
            f"{name}: holds features with {key.replace('_', ' ')} {settings.get(key)}, not "
            f"{value}; {ANEW}"
        )


class Journal:
    """The folder, locked by one process at a time.

    anew: what is in it counts for nothing.

    Raises ConfigError where another process has locked it, or it holds something else; OSError
    where it can't be written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], anew: bool = False):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.lock()
        # A caller who goes on after an error has nothing to close
        with contextlib.ExitStack() as opened:
            opened.enter_context(self.lock_file)
            if anew:
                (folder / STATE).unlink(missing_ok=True)
            self.state = self.read_state(settings)
            rows_size = 4 * self.state.width * self.state.rows
            self.features = opened.enter_context(self.open_at(FEATURES, rows_size))
            self.images = opened.enter_context(self.open_at(IMAGES, self.state.text_size))
            self.files = opened.pop_all()
        self.committed = time.monotonic()

    def lock(self) -> None:
        """Lock the folder until this process ends, however it ends."""
        self.lock_file = open(self.folder / ".lock", "a")  # noqa: SIM115
        try:
            lock(self.lock_file)
        except BlockingIOError:
            raise ConfigError(
                f"{self.folder}: another command is writing there; wait for it, or choose "
                "another --out"
            ) from None
        # Processes that decode images inherit the open file, and would keep the lock after a kill
        os.register_at_fork(after_in_child=self.lock_file.close)

    def read_state(self, settings: dict[str, Any]) -> State:
        """The state in the folder, or a new one. Raises ConfigError for one of other settings."""
        path = self.folder / STATE
        if not path.exists():
            return State(settings)
        try:
            state = State(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError):
            raise ConfigError(f"{path}: not the state of vit.embed; {ANEW}") from None
        refuse_other_settings(self.folder, state.settings, settings)
        return state

    def open_at(self, name: str, size: int) -> Any:
        """Open a file to append to, without what stands behind its first `size` bytes."""
        file = open(self.folder / name, "ab")  # noqa: SIM115
        if file.tell() < size:
            raise ConfigError(f"{self.folder / name}: cut short; {ANEW}")
        file.truncate(size)
        file.seek(size)
        return file

    def append(
        self, features: np.ndarray, images: Sequence[LabeledImage], sources: list[Source]
    ) -> None:
        """Append one batch.

        features: float32 (n, D) of the n images that could be read; sources: all that were taken.
        Raises OSError where the disk is full; what stands in state.json stays whole.
        """
        text = "".join(json.dumps(image) + "\n" for image in images).encode()
        self.features.write(features.astype("<f4", copy=False).tobytes())
        self.images.write(text)
        # At once, so that processes which are forked inherit nothing to write
        self.features.flush()
        self.images.flush()

        state = self.state
        self.state = replace(
            state,
            batches=state.batches + 1,
            rows=state.rows + len(images),
            left_out=state.left_out + len(sources) - len(images),
            digest=chain(state.digest, sources),
            text_size=state.text_size + len(text),
            longest_path=max([state.longest_path, *(len(image.path) for image in images)]),
            longest_label=max([state.longest_label, *(len(image.label) for image in images)]),
        )
        if time.monotonic() - self.committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make sure that what was appended survives a kill, and a power cut."""
        os.fsync(self.features.fileno())
        os.fsync(self.images.fileno())
        with atomic_write(self.folder / STATE, durable=True) as temporary:
            temporary.write_text(json.dumps(asdict(self.state)), encoding="utf-8")
        self.committed = time.monotonic()

    def feature_blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Yield the features, float32 (rows, D), the last block maybe shorter."""
        with open(self.folder / FEATURES, "rb") as file:
            while block := file.read(4 * self.state.width * rows):
                yield np.frombuffer(block, "<f4").reshape(-1, self.state.width)

    def image_blocks(self, rows: int) -> Iterator[list[LabeledImage]]:
        """Yield the images, so many at a time."""
        with open(self.folder / IMAGES, encoding="utf-8") as file:
            while lines := list(islice(file, rows)):
                yield [LabeledImage(*json.loads(line)) for line in lines]

    def close(self) -> None:
        # What the last flush could not write has been reported
        with contextlib.suppress(OSError):
            self.files.close()

    def remove(self) -> None:
        """Remove the folder, the state first: without it the rest counts for nothing."""
        self.close()
        (self.folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(self.folder)
