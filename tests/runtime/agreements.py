"""What two processes agree on. Started with the variables that torchrun sets.

python agreements.py FOLDER
"""

import json
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from small_training import (
    BATCH_SIZE,
    Batch,
    MadeUpBatches,
    batch,
    make_plan,
    make_state,
    make_step,
    make_trainer,
)

from vit.errors import Stopped, TrainingFailed
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes, join_processes
from vit.training.agreement import Agreement
from vit.training.loop import Trainer
from vit.training.micro_batch import agree_on_micro_batch_size

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
# Of a run that may be stopped, or diverge
STEPS = 60
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


class CountedProcesses(Processes):
    """Counts the exchanges of numbers on the CPU, and those of tensors on the device."""

    looks = sums = 0

    def largest(self, *numbers: float) -> list[float]:
        self.looks += 1
        return super().largest(*numbers)

    def sum(self, tensor: Tensor) -> Tensor:
        self.sums += 1
        return super().sum(tensor)


def trainer_of(processes: Processes, folder: Path, source) -> Trainer:
    """A run of both processes. source: the batch of a step, global."""
    own = processes.batch_slice(BATCH_SIZE)

    def own_part(step: int) -> Batch:
        images, labels = source(step)
        return images[own], labels[own]

    state = make_state()
    batches, plan = MadeUpBatches(source=own_part), make_plan(STEPS, log_every=20)
    trainer = make_trainer(folder / str(processes.rank), state=state, batches=batches, plan=plan)
    trainer.step = make_step(state, stop=trainer.stop)
    trainer.step.processes = trainer.processes = processes
    trainer.step.forward = trainer.step.synchronized = processes.data_parallel(state.model, CPU)
    trainer.agreement = Agreement(processes)
    return trainer


def whole_run(processes: Processes, folder: Path) -> dict[str, int | float]:
    """How often they exchange numbers in a run, and its last loss."""
    counted = CountedProcesses(**vars(processes))
    trainer = trainer_of(counted, folder / "whole", batch)
    trainer.fit()
    return {"looks": counted.looks, "sums": counted.sums, "step": trainer.state.progress.step}


def stopped_run(processes: Processes, folder: Path) -> dict[str, int]:
    """Of a run in which a signal comes to the second process within its 25th step."""

    def source(step: int) -> Batch:
        if step == 24 and processes.rank == 1:
            trainer.stop.receive(signal.SIGTERM, None)
        return batch(step)

    trainer = trainer_of(processes, folder / "stopped", source)
    try:
        trainer.fit()
    except Stopped:
        return {"stopped after": trainer.state.progress.step}
    return {}


def diverging_run(processes: Processes, folder: Path) -> str:
    """How a run fails in which an image of the second process is not a number in the 25th step.

    The first process alone wants to show numbers after each.
    """

    def source(step: int) -> Batch:
        images, labels = batch(step)
        if step == 24:
            images[-1] = torch.nan
        return images, labels

    trainer = trainer_of(processes, folder / "diverging", source)
    trainer.observer.console.wants_numbers = lambda step: processes.rank == 0
    try:
        trainer.fit()
    except TrainingFailed as error:
        step = trainer.state.progress.step
        return f"{str(error).partition(':')[0]}, seen after {step}"
    return ""


def main(folder: str) -> None:
    processes = join_processes("cpu")
    notes = {
        "micro batches": micro_batches(processes),
        "whole": whole_run(processes, Path(folder)),
        "diverging": diverging_run(processes, Path(folder)),
        # Last, since they leave the group together
        "stopped": stopped_run(processes, Path(folder)),
    }
    Path(folder, f"{processes.rank}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main(*sys.argv[1:])
