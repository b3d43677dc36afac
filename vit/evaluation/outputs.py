"""Where evaluate.py writes."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from vit.errors import writing_to

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
            folder = Path(checkpoint).parent
            if folder.name == "checkpoints":
                run = folder = folder.parent
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


def make_writable(folder: Path) -> None:
    """Make a folder. Raises ConfigError where files can't be written to it."""
    with writing_to(folder, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
