"""The checkpoints of one run: the last, the one before it, and the best.

`last` holds the whole state, to resume from; `previous` is the last before it, in case it gets
damaged; `best` holds only the weights that are evaluated.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vit.checkpoints.file import (
    BEST,
    read_checkpoint,
    read_header,
    require_header_keys,
    write_checkpoint,
)
from vit.checkpoints.model import load_weights
from vit.errors import CheckpointError
from vit.model.low_rank import no_change
from vit.runtime.precision import DTYPES

if TYPE_CHECKING:
    from vit.model.vision_transformer import VisionTransformer
    from vit.training.state import TrainingState

LAST, PREVIOUS = "last.safetensors", "previous.safetensors"


@dataclass(frozen=True)
class RunCheckpoints:
    """Writes and reads the checkpoints of a run.

    folder: RUN/checkpoints. header: what every file's header holds in addition to the description
    of the state: config, classes, preprocessing, `data`, a checksum of the training images, and
    with a teacher its `name` and `sha256` as `teacher`.
    writes: false in all but the first of several processes.
    """

    folder: Path
    header: dict[str, Any]
    writes: bool

    def save_last(self, state: "TrainingState") -> None:
        """Write the whole state, and keep the last checkpoint before as the previous one.

        Raises OSError where the disk refuses it.
        """
        # All processes must get here, since gathering what is sharded is a collective
        tensors = state.tensors()
        if self.writes:
            header = self.header_of("last", state)
            write_checkpoint(self.folder / LAST, tensors, header, keep=self.folder / PREVIOUS)

    def save_best(self, state: "TrainingState") -> None:
        """Write the weights that are evaluated, under their plain names.

        Raises OSError where the disk refuses it.
        """
        # By all processes, as in save_last
        tensors = state.selected_tensors()
        if self.writes:
            write_checkpoint(self.folder / BEST, tensors, self.header_of("best", state))

    def header_of(self, kind: str, state: "TrainingState") -> dict[str, Any]:
        """Return the header of a file of a kind, "last" or "best"."""
        return {
            **self.header,
            "kind": kind,
            # What `auto` chose: a resumed run on another machine must not choose again
            "precision": state.precision.name,
            "newton_schulz": state.newton_schulz,
            "progress": state.progress.to_dict(),
            "versions": {"torch": torch.__version__},
            # Sums over another number of threads differ in their last bits
            "threads": torch.get_num_threads(),
        }

    def load_best(self, state: "TrainingState") -> "VisionTransformer":
        """Return the model that is evaluated, with the weights of the best checkpoint.

        It is the state's own model, whose last weights are overwritten.
        """
        model = state.selected()
        tensors = no_change(model.state_dict()) | read_checkpoint(self.folder / BEST)[0]
        load_weights(model, tensors, str(self.folder))
        return model

    def precision(self) -> str | None:
        """Return the precision of a run that is to be resumed, before its state is read.

        None of a new run, and where no header can be read. It is not checked against damage, which
        resume() does.
        """
        for name in (LAST, PREVIOUS):
            with contextlib.suppress(CheckpointError):
                precision = read_header(self.folder / name).get("precision")
                if precision in DTYPES:
                    return precision
        return None

    def resume(self, state: "TrainingState", may_differ: bool) -> list[str]:
        """Bring the state to where the last checkpoint left it, and return warnings for the user.

        may_differ: accept other training images, or another teacher, than the run's. Raises
        CheckpointError where no checkpoint can be read, or it belongs to another model, optimizer,
        data set or teacher.
        """
        tensors, header, warning = read_last(self.folder)
        warnings = [] if warning is None else [warning]

        # All but the tensors, which restore() checks, before the state is touched
        require_header_keys(header, self.folder, "classes", "config", "precision", "progress")
        check_classes(header["classes"], self.header["classes"], self.folder)

        # The order of the samples refers to the images by index. Older headers have no checksum
        same_data = header.get("data", self.header["data"]) == self.header["data"]
        if not same_data and not may_differ:
            raise CheckpointError(
                f"resume={self.folder.parent}: the training images are not those of the run (their "
                "checksum differs); bring them back, or add resume_changed=allow"
            )

        if not may_differ:
            check_teacher(header.get("teacher"), self.header.get("teacher"), self.folder.parent)

        # A GPU's results do not depend on the CPU's threads
        threads, saved_threads = torch.get_num_threads(), header.get("threads")
        if state.precision.device.type == "cpu" and saved_threads not in (None, threads):
            warnings.append(
                f"{threads} threads where the run had {saved_threads}: last bits may differ "
                f"(runtime.threads={saved_threads} would keep them)"
            )
        state.restore(tensors, header, str(self.folder))
        if "images" not in header["progress"]:
            # Earlier versions counted steps alone
            batch_size = header["config"]["train"]["batch_size"]
            state.progress.images = batch_size * state.progress.step
        return warnings + self.adopt_best(state)

    def adopt_best(self, state: "TrainingState") -> list[str]:
        """Let a state know of the best checkpoint, where this is of a later step than the state.

        The best is written at once and the last one seldom: a run that was killed in between is
        resumed from before its best. On a GPU the steps in between may not come to it again. Where
        the best of the state can't be read any more, the state forgets it. Returns warnings.
        """
        try:
            header = read_checkpoint(self.folder / BEST)[1]
        except CheckpointError as error:
            # Before the first evaluation there is none
            if state.progress.best_step is None:
                return []
            # Or a run that never exceeds it would end without weights, and with it all its steps
            state.progress.forget_best()
            return [f"{error}; the next evaluation counts as the best"]
        if "progress" in header:
            state.adopt_best(header["progress"], str(self.folder / BEST))
        return []


def read_last(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Return (tensors, header, warning or None) of the last checkpoint of RUN/checkpoints.

    Where it is damaged, it is the one before it, and the warning says so. Raises CheckpointError
    where neither can be read: a run never starts over silently.
    """
    try:
        return *read_checkpoint(folder / LAST), None
    except CheckpointError as error:
        warning = str(error)
    try:
        return *read_checkpoint(folder / PREVIOUS), warning
    except CheckpointError as error:
        raise CheckpointError(f"nothing to resume from in {folder}: {warning}; {error}") from None


def check_teacher(saved: dict[str, str] | None, current: dict[str, str] | None, run: Path) -> None:
    """Raise CheckpointError where a run would go on with another teacher than it has learned from.

    saved, current: its name and SHA-256, see RunCheckpoints.
    """
    # Whether there is one at all is a setting, and compared with the others
    if saved is None or current is None or saved["sha256"] == current["sha256"]:
        return
    raise CheckpointError(
        f"resume={run}: train.teacher={current['name']} is not the teacher of the run, which was "
        f"{saved['name']} with SHA-256 {saved['sha256'][:16]}… (now {current['sha256'][:16]}…); "
        "bring it back, or add resume_changed=allow"
    )


def check_classes(saved: list[str], current: list[str], source: Path | str) -> None:
    """Raise CheckpointError where a checkpoint's classes are not the data set's."""
    if saved == current:
        return
    # The first class that differs, or where one list is the start of the other their lengths
    difference = f"{len(saved)} there, {len(current)} here"
    for number, (there, here) in enumerate(zip(saved, current, strict=False)):
        if there != here:
            difference = f"class {number} is '{there}' there and '{here}' here"
            break
    raise CheckpointError(
        f"{source}: its classes are not those of the data set ({difference}); "
        "a label would mean something else"
    )
