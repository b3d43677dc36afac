"""What two processes agree on. Started with the variables that torchrun sets.

python agreements.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from vit.runtime.precision import Precision
from vit.runtime.processes import Processes, join_processes
from vit.training.micro_batch import agree_on_micro_batch_size

FP32 = Precision("fp32", torch.device("cpu"))
LIMITS = ((16, 4), (4, 16), (16, 16), (5, 3), (0, 16), (16, 0))


class LimitedMemory(nn.Linear):
    """Has memory for so many images."""

    def __init__(self, limit: int):
        super().__init__(4, 2)
        self.limit = limit

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.limit:
            raise torch.OutOfMemoryError
        return super().forward(images.flatten(1))


def micro_batches(processes: Processes) -> dict[str, int | str | None]:
    """The size of a micro-batch, by the images that the memory of each process holds.

    A batch is of 14 images, of which the first process has 6 and the second 8.
    """
    own = processes.batch_slice(14)
    count = len(range(14)[own])
    results: dict[str, int | str | None] = {}
    for limits in LIMITS:
        model = LimitedMemory(limits[processes.rank])
        key = ", ".join(map(str, limits))
        try:
            size = agree_on_micro_batch_size(model, (1, 2, 2), count, 14, FP32, processes)
            results[key] = size
        except torch.OutOfMemoryError as error:
            results[key] = type(error).__name__
    return results


def main(folder: str) -> None:
    processes = join_processes("cpu")
    notes = {"micro batches": micro_batches(processes)}
    Path(folder, f"{processes.rank}.json").write_text(json.dumps(notes))
    processes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
