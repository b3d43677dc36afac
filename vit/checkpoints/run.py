"""TODO: say what this file is for."""

from pathlib import Path
from typing import Any

from torch import Tensor

from vit.checkpoints.file import read_checkpoint
from vit.errors import CheckpointError

LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"


def read_last(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """The last checkpoint of RUN/checkpoints, or the one before where it is damaged, and then a line that says so.

    Raises CheckpointError where neither can be read.
    """
    warning = None
    for name in (LAST, PREVIOUS):
        try:
            return *read_checkpoint(folder / name), warning
        except CheckpointError as error:
            if warning is not None:
                raise CheckpointError(
                    f"nothing to resume from in {folder}: {warning}; {error}"
                ) from None
            warning = str(error)
    raise AssertionError("unreachable")


def check_classes(saved: list[str], found: list[str], source: Path | str) -> None:
    """Raise CheckpointError where a checkpoint's classes are not the data set's."""
    if saved != found:
        first = next(
            (
                f"class {i} is '{a}' there and '{b}' here"
                for i, (a, b) in enumerate(zip(saved, found))
                if a != b
            ),  # noqa: B905
            f"{len(saved)} there, {len(found)} here",
        )
        raise CheckpointError(
            f"{source}: its classes are not those of the data set ({first}); a label would mean another "
            "thing"
        )
