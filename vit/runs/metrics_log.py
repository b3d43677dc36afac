"""metrics.jsonl and timing.jsonl: a run's numbers, one JSON object a line.

metrics.jsonl holds what a repeated run would write again to the byte; what depends on the clock is
in timing.jsonl.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from vit.files import truncate_after_step

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
KEPT_METRICS = ("n", "loss", "top1", "top5")


class MetricsLog:
    """Appends to both files. `step` counts finished optimizer steps.

    On a resume the files are cut back to first_step. writes: false in all but the first of several
    processes, which compute the same numbers.
    """

    def __init__(self, folder: Path, first_step: int, writes: bool = True):
        self.metrics = self.open(folder / METRICS, first_step, writes)
        self.timing = self.open(folder / TIMING, first_step, writes)

    @staticmethod
    def open(path: Path, first_step: int, writes: bool) -> TextIO:
        """Open a file of rows to append to, or one that swallows them."""
        if not writes:
            return open(os.devnull, "a")
        # Steps after the checkpoint are made again and would be in the file twice
        truncate_after_step(path, first_step)
        # Buffered by the line, so that a kill loses no whole row
        return open(path, "a", buffering=1)

    def train(self, step: int, loss: float, top1: float, lr: float, grad_norm: float) -> None:
        """Write means over the steps since the last row.

        top1: NaN where images are mixed, so that it is unknown; lr: of the fastest group.
        """
        values = {"loss": loss}
        # JSON has no NaN
        if not math.isnan(top1):
            values["top1"] = top1
        self.write(step, "train", **values, lr=lr, grad_norm=grad_norm)

    def evaluation(
        self, step: int, split: str, metrics: Mapping[str, float], beside: Sequence[str] = ()
    ) -> None:
        """Write what vit.evaluation.accuracy.evaluate measured on a split.

        beside: names of further metrics to write, see vit.runs.selection.logged_beside.
        """
        self.write(step, split, **{name: metrics[name] for name in (*KEPT_METRICS, *beside)})

    def write(self, step: int, split: str, **values: float) -> None:
        self.metrics.write(json.dumps({"step": step, "split": split, **values}) + "\n")

    def speed(
        self, step: int, images_per_second: float, mfu: float, data_wait: float, memory: int
    ) -> None:
        """Write how fast the steps since the last row were.

        mfu: see vit.runs.timing.Speed; data_wait: fraction of the time spent waiting for batches;
        memory: the peak, in bytes.
        """
        row = {
            "step": step,
            "images_per_second": round(images_per_second, 2),
            "mfu": round(mfu, 4),
            "data_wait": round(data_wait, 4),
            "memory_bytes": memory,
        }
        self.timing.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self.metrics.close()
        self.timing.close()
