"""Where evaluate.py writes."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit.checkpoints.file import best_in_folder
from vit.errors import writing_to
from vit.files import read_json

ADVICE = "choose another folder with out=FOLDER"


@dataclass(frozen=True)
class Outputs:
    """The files of one evaluation.

    folder: out=, or else the run folder, the checkpoint's, or for foreign weights the current one.
    run: the run folder that the checkpoint lies in; None where it lies elsewhere.
    """

    folder: Path
    run: Path | None
    split: str

    @classmethod
    def of(cls, checkpoint: str | None, out: str | None, split: str) -> "Outputs":
        """checkpoint: None for foreign weights."""
        run = None
        folder = Path()
        if checkpoint is not None:
            folder = best_in_folder(Path(checkpoint)).parent
            # The current folder has no name of its own, and may be that of the checkpoints
            if folder.absolute().name == "checkpoints":
                run = folder = folder.parent if folder.name else Path("..")
        return cls(Path(out) if out else folder, run, split)

    @property
    def suffix(self) -> str:
        return "" if self.split == "test" else f"_{self.split}"

    @property
    def file(self) -> Path:
        return self.folder / f"evaluation{self.suffix}.json"

    @property
    def report_folder(self) -> Path:
        return self.folder / f"report{self.suffix}"


def of_another_protocol(file: Path, protocol: dict[str, Any]) -> list[str]:
    """Say that a file's numbers are about to be replaced; nothing if they were measured alike."""
    # A damaged file holds nothing to keep, and older versions did not say how they measured
    try:
        earlier = read_json(file).get("protocol", protocol)
    except (OSError, ValueError):
        return []
    if earlier == protocol:
        return []
    parts = [key for key in ("images", "classes", "views", "input") if key in earlier]
    words = "; ".join(earlier[key] for key in parts if earlier[key] != protocol[key])
    return [f"note: numbers of another protocol were there ({words}); out=FOLDER keeps both"]


def make_writable(folder: Path) -> None:
    """Make a folder. Raises ConfigError where files can't be written to it."""
    with writing_to(folder, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
