"""Fifty optimizer steps of a small model in float64, as one of any number of processes.

Started by torchrun, or with the variables that torchrun sets; rank 0 writes the loss, the number
of correct predictions and the gradient norm of every step.

python distributed_steps.py LOSSES.json MICRO_BATCH_SIZE
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from vit.model.vision_transformer import VisionTransformer
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes, join_processes
from vit.runtime.signals import StopSignal
from vit.training.agreement import Agreement
from vit.training.losses import build_loss
from vit.training.optimizers import build_optimizer
from vit.training.state import Progress, TrainingState
from vit.training.step import OptimizerStep

STEPS = 50
BATCH_SIZE = 14  # seven pairs: no number of processes above one splits them evenly
CLASSES = 3
CPU = torch.device("cpu")


def batches(own: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part of every global batch: noise around the label."""
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(0, CLASSES, (BATCH_SIZE,), generator=generator)
        noise = torch.randn(BATCH_SIZE, 3, 8, 8, generator=generator, dtype=torch.float64)
        images = noise + labels[:, None, None, None]
        yield images[own], labels[own]


def make_step(processes: Processes, micro_batch_size: int) -> OptimizerStep:
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_classes=CLASSES,
        drop_path=0.3,
    ).double()
    optimizer = build_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.05, settings={})
    synchronized = processes.data_parallel(model, CPU)
    return OptimizerStep(
        state=TrainingState(model, None, optimizer, Precision("fp32", CPU), Progress()),
        forward=synchronized,
        synchronized=synchronized,
        loss=build_loss("cross_entropy", 0.1),
        processes=processes,
        stop=StopSignal(),
        batch_size=BATCH_SIZE,
        micro_batch_size=micro_batch_size,
        clip_norm=1.0,
        drop_path_schedule="linear",
        seed=0,
    )


def main(out: str, micro_batch_size: str) -> None:
    processes = join_processes("cpu")
    step = make_step(processes, int(micro_batch_size))
    rows, agreement = [], Agreement(processes)
    for images, labels in batches(processes.batch_slice(BATCH_SIZE)):
        row = step(images, labels)
        assert row is not None
        agreement.add(row)
        rows.append(row)
        step.state.progress.step += 1
    agreement.sum_losses()
    if processes.rank == 0:
        Path(out).write_text(json.dumps([row.tolist() for row in rows]))
    processes.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
