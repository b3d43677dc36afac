"""The steps since the last log: their losses, accuracies and gradient norms, and their time."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vit.errors import TrainingFailed


@dataclass(frozen=True)
class StepMeans:
    """Means over a window's steps. top1 is NaN where images are mixed, so that it is unknown."""

    loss: float
    top1: float
    grad_norm: float


class StepWindow:
    """Collects a row a step.

    saved: the window of an interrupted run, as to_dict() gave it.
    """

    def __init__(self, saved: dict[str, Any] | None = None):
        saved = saved or {"rows": [], "images": 0}
        # (loss, correct predictions, gradient norm) of each step that has been read, on the CPU
        self.read = torch.tensor(saved["rows"]).reshape(-1, 3)
        # The same of each later step, (3,). They stay on the device, so that no step waits for the
        # numbers of the one before
        self.pending: list[Tensor] = []
        self.images: int = saved["images"]
        # Of this session alone, as its time is: speeds are of these
        self.timed_images = 0
        # Seconds of waiting for batches
        self.data_seconds = 0.0
        self.started = time.perf_counter()

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows.tolist(), "images": self.images}

    def add(self, row: Tensor, images: int) -> None:
        self.pending.append(row)
        self.images += images
        self.timed_images += images

    @property
    def rows(self) -> Tensor:
        """The rows of all steps, (steps, 3) on the CPU. Waits for the device."""
        if self.pending:
            # One copy for all of them
            self.read = torch.cat([self.read, torch.stack(self.pending).cpu()])
            self.pending = []
        return self.read

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def images_per_second(self) -> float:
        return self.timed_images / self.seconds()

    def data_wait(self) -> float:
        """Return the fraction of the time that was spent waiting for batches."""
        return self.data_seconds / self.seconds()

    def means(self, step: int) -> StepMeans:
        """Return the means so far, after optimizer step `step`. Waits for the device.

        Raises TrainingFailed, naming the step, where a loss or a gradient's norm is not finite.
        """
        # In float64, so that means of many steps are exact to what is logged
        rows = self.rows.double()
        first = step - len(rows) + 1
        for offset, (loss, _, grad_norm) in enumerate(rows.tolist()):
            require_finite(loss, first + offset)
            # The loss is of the weights before the step: those after it have diverged all the same.
            # Steps that fp16 skips for their gradients leave no row
            require_finite(grad_norm, first + offset, "the norm of the gradient")

        # The mean of the steps' counts, as a fraction of the images of a step
        loss, correct, grad_norm = rows.mean(0).tolist()
        return StepMeans(loss, correct * len(rows) / self.images, grad_norm)


def require_finite(value: float, step: int, name: str = "the loss") -> None:
    """Raise TrainingFailed, naming the step, where what was measured is not a finite number."""
    if not math.isfinite(value):
        raise TrainingFailed(
            f"{name} is {value} at step {step}: training has diverged. The last good checkpoint "
            "is kept; try a lower optimizer.lr, a longer schedule.warmup, train.clip_norm=1 or "
            "train.precision=fp32"
        )
