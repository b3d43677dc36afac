"""Where evaluate.py writes."""

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit.errors import writing_to

ADVICE = "choose another folder with out=FOLDER"

# Keys that change which images are measured, or how; data.root alone says where they are now
OF_PROTOCOLS = (
    "data",
    "data.root",
    "data.limit",
    "data.val_fraction",
    "data.test_fraction",
    "data.eval_crop",
    "model.image_size",
    "views",
)
# Characters of a value in a file's name, of a path the last; file systems allow 255 bytes for all
MAX_LENGTH = 40


@dataclass(frozen=True)
class Outputs:
    """The files of one evaluation.

    folder: out=, or else the run folder, the checkpoint's, or for foreign weights the current one.
    run: the run folder that the checkpoint lies in; None where it lies elsewhere.
    protocol: what was measured otherwise than in the run, for the names of the files; empty for
        nothing.
    """

    folder: Path
    run: Path | None
    split: str
    protocol: str = ""

    @classmethod
    def of(
        cls, checkpoint: str | None, out: str | None, split: str, changes: Mapping[str, Any]
    ) -> "Outputs":
        """checkpoint: None for foreign weights. changes: {key: value} of the command line."""
        run = None
        folder = Path()
        if checkpoint is not None:
            folder = Path(checkpoint).parent
            if folder.name == "checkpoints":
                run = folder = folder.parent
        if out is not None:
            return cls(Path(out), run, split)
        # The run's own numbers must not be lost to those of another protocol, nor taken for them.
        # Foreign weights have no protocol of their own
        return cls(folder, run, split, "" if checkpoint is None else name_of_protocol(changes))

    @property
    def suffix(self) -> str:
        split = "" if self.split == "test" else f"_{self.split}"
        return split + self.protocol

    @property
    def file(self) -> Path:
        return self.folder / f"evaluation{self.suffix}.json"

    @property
    def report_folder(self) -> Path:
        return self.folder / f"report{self.suffix}"


def name_of_protocol(changes: Mapping[str, Any]) -> str:
    """The changes of the run's own protocol as a part of a file's name, `_views=mirrored`."""
    parts = []
    for key in OF_PROTOCOLS:
        if key not in changes or (key == "data.root" and "data" not in changes):
            continue
        value = changes[key]["name"] if key == "data" else changes[key]
        if (key, value) not in (("views", "one"), ("model.image_size", None)):
            # A path, such as night/test, becomes night-test
            words = re.sub(r"[^\w.]+", "-", str(value)).strip("-")
            parts.append(f"_{key.rpartition('.')[2]}={words[-MAX_LENGTH:]}")
    return "".join(parts)


def make_writable(folder: Path) -> None:
    """Make a folder. Raises ConfigError where files can't be written to it."""
    with writing_to(folder, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
