"""The checkpoints of one run: the last, the one before it, and the best."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vit.checkpoints.file import read_checkpoint, require_header_keys, write_checkpoint
from vit.checkpoints.model import load_weights
from vit.errors import CheckpointError

if TYPE_CHECKING:
    from vit.model.vision_transformer import VisionTransformer
    from vit.training.state import TrainingState

LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"


@dataclass(frozen=True)
class RunCheckpoints:
    """Writes and reads the checkpoints of a run.

    folder: RUN/checkpoints; header: what every file's header holds beside what the state tells:
    config, classes, preprocessing, and `data`, a checksum of the training images; writes: false in
    all but the first of several processes.
    """

    folder: Path
    header: dict[str, Any]
    writes: bool

    def save_last(self, state: "TrainingState") -> None:
        """Write the whole state; the last checkpoint before stays as the previous one. Raises
        OSError.
        """
        tensors = state.tensors()  # by all processes, which gather what is sharded
        if self.writes:
            header = self.header_of("last", state)
            write_checkpoint(self.folder / LAST, tensors, header, keep=self.folder / PREVIOUS)

    def save_best(self, state: "TrainingState") -> None:
        """Write the weights that are evaluated, under their plain names. Raises OSError."""
        tensors = state.selected_tensors()
        if self.writes:
            write_checkpoint(self.folder / BEST, tensors, self.header_of("best", state))

    def header_of(self, kind: str, state: "TrainingState") -> dict[str, Any]:
        return {
            **self.header,
            "kind": kind,
            "precision": state.precision.name,
            "progress": state.progress.to_dict(),
            "versions": {"torch": torch.__version__},
            "threads": torch.get_num_threads(),
        }

    def load_best(self, state: "TrainingState") -> "VisionTransformer":
        """The state's evaluated model with the best checkpoint's weights. Raises CheckpointError."""
        model = state.selected()
        load_weights(model, read_checkpoint(self.folder / BEST)[0], str(self.folder))
        return model

    def resume(self, state: "TrainingState", data_may_differ: bool) -> list[str]:
        """Bring the state to where the last checkpoint left it; warnings for the user.

        Raises CheckpointError where no checkpoint can be read, or it is of another model, optimizer
        or data set.
        data_may_differ: take other training images than the run's.
        """
        tensors, header, warning = read_last(self.folder)
        warnings = [] if warning is None else [warning]
        require_header_keys(header, self.folder, "classes", "config", "precision", "progress")
        check_classes(header["classes"], self.header["classes"], self.folder)
        same_data = header.get("data", self.header["data"]) == self.header["data"]
        if not same_data and not data_may_differ:
            raise CheckpointError(
                f"resume={self.folder.parent}: the training images are not those of the run (their "
                "checksum differs); bring them back, or add resume_changed=allow"
            )
        threads, saved_threads = torch.get_num_threads(), header.get("threads")
        if state.precision.device.type == "cpu" and saved_threads not in (None, threads):
            warnings.append(
                f"{threads} threads where the run had {saved_threads}: last bits may differ "
                f"(runtime.threads={saved_threads} would keep them)"
            )
        state.restore(tensors, header, str(self.folder))
        return warnings


def read_last(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """The last checkpoint of RUN/checkpoints, or where it is damaged the one before and a warning
    that says so.

    Raises CheckpointError where neither can be read.
    """
    try:
        return *read_checkpoint(folder / LAST), None
    except CheckpointError as error:
        warning = str(error)
    try:
        return *read_checkpoint(folder / PREVIOUS), warning
    except CheckpointError as error:
        raise CheckpointError(f"nothing to resume from in {folder}: {warning}; {error}") from None


def check_classes(saved: list[str], current: list[str], source: Path | str) -> None:
    """Raise CheckpointError where a checkpoint's classes are not the data set's."""
    if saved == current:
        return
    difference = f"{len(saved)} there, {len(current)} here"
    for number, (there, here) in enumerate(zip(saved, current, strict=False)):
        if there != here:
            difference = f"class {number} is '{there}' there and '{here}' here"
            break
    raise CheckpointError(
        f"{source}: its classes are not those of the data set ({difference}); "
        "a label would mean something else"
    )
