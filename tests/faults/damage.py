"""A real last checkpoint, cut at many lengths and with single bits flipped."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from faults.trials import RUN, Effort, Row, finish, must_finish
from helpers import make_images

from vit.checkpoints.file import read_checkpoint
from vit.checkpoints.run import LAST, PREVIOUS, read_last
from vit.errors import CheckpointError


class LastCheckpoint:
    """The last checkpoint of a run, beside the whole one before it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / LAST
        self.whole = self.path.read_bytes()
        tensors, self.header = read_checkpoint(self.path)
        # Tensors that were read lie in the file itself, which is going to be damaged
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self.step_before = read_checkpoint(folder / PREVIOUS)[1]["progress"]["step"]

    @property
    def header_end(self) -> int:
        return 8 + int.from_bytes(self.whole[:8], "little")

    def survives(self, damaged: bytes) -> bool:
        """What is read has not changed, or the checkpoint before is taken with a warning."""
        self.path.write_bytes(damaged)
        try:
            return self.is_unchanged()
        except CheckpointError:
            _, header, warning = read_last(self.folder)
            return header["progress"]["step"] == self.step_before and LAST in str(warning)

    def is_unchanged(self) -> bool:
        tensors, header = read_checkpoint(self.path)
        if header != self.header or tensors.keys() != self.tensors.keys():
            return False
        return all(torch.equal(tensor, self.tensors[name]) for name, tensor in tensors.items())


def damage(work: Path, effort: Effort) -> Iterator[Row]:
    make_images(work / "images", {"train": 20, "test": 8})
    must_finish(work, *RUN, "train.steps=14", "train.batch_size=8", "hydra.run.dir=run")
    checkpoint = LastCheckpoint(work / "run" / "checkpoints")
    dice = random.Random(1)
    yield cuts(checkpoint, dice, 16 if effort.quick else 96)
    yield flips(checkpoint, dice, 60 if effort.quick else 1200)
    yield both_damaged(work, checkpoint)


def cuts(checkpoint: LastCheckpoint, dice: random.Random, count: int) -> Row:
    row = Row("last checkpoint cut short: seen, the one before is taken")
    size, header_end = len(checkpoint.whole), checkpoint.header_end
    lengths = {0, 1, 7, 8, 9, header_end - 1, header_end, header_end + 1, size - 1}
    while len(lengths) < count:
        lengths.add(dice.randrange(size))
    for length in sorted(lengths):
        survives = checkpoint.survives(checkpoint.whole[:length])
        row.count(survives, f"cut to {length} of {size} bytes")
    return row


def flips(checkpoint: LastCheckpoint, dice: random.Random, count: int) -> Row:
    row = Row("a bit flipped in it: seen, or without effect")
    size = len(checkpoint.whole)
    for number in range(count):
        # A third of them in the header, which is small
        position = dice.randrange(checkpoint.header_end if number % 3 == 0 else size)
        changed = bytearray(checkpoint.whole)
        changed[position] ^= 1 << dice.randrange(8)
        row.count(checkpoint.survives(bytes(changed)), f"byte {position} of {size}")
    return row


def both_damaged(work: Path, checkpoint: LastCheckpoint) -> Row:
    row = Row("both damaged: exit 2, never a silent restart")
    checkpoint.path.write_bytes(checkpoint.whole[:1000])
    (checkpoint.folder / PREVIOUS).write_bytes(checkpoint.whole[:2000])
    code, errors = finish(work, "resume=run")
    named = LAST in errors and PREVIOUS in errors
    row.count(code == 2 and named and "Traceback" not in errors, errors[-300:])
    return row
