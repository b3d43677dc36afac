"""Fifty steps of a small model in float64, to be run by torchrun with any number of processes; rank 0 writes the losses.

torchrun --nproc-per-node=2 tests/distributed_steps.py adamw losses.json MICRO_BATCH
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from vit.model.vision_transformer import VisionTransformer
from vit.runs.metrics_log import Tracker
from vit.runtime.precision import Precision
from vit.runtime.processes import join_processes
from vit.runtime.signals import StopSignal
from vit.training.loop import Trainer
from vit.training.losses import build_loss
from vit.training.optimizers import build_optimizer
from vit.training.state import Progress, TrainingState

STEPS, BATCH = 50, 14  # seven pairs: no number of processes above one splits them evenly


def batches(part: slice):
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(0, 3, (BATCH,), generator=generator)
        images = (
            torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
            + labels[:, None, None, None]
        )
        yield images[part], labels[part]


def main(optimizer: str, out: str, micro_batch: str) -> None:
    group = join_processes("cpu")
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_classes=3,
        drop_path=0.3,
    ).double()
    built = build_optimizer(
        model,
        name=optimizer,
        lr=1e-3 if optimizer == "adamw" else 0.05,
        weight_decay=0.05,
        momentum=None if optimizer == "adamw" else 0.9,
        nesterov=None if optimizer == "adamw" else True,
    )
    shared = group.wrap(model, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(Path(folder), 0, STEPS, 10.0, BATCH)
        trainer = Trainer(
            state=TrainingState(model, None, built, Progress()),
            forward=shared,
            shared=shared,
            total_steps=STEPS,
            batch_size=BATCH,
            precision=Precision("fp32", torch.device("cpu")),
            batches=batches(group.part(BATCH)),
            schedule=lambda step: 1.0,
            group=group,
            micro_batch_size=int(micro_batch),
            loss=build_loss("cross_entropy", 0.1),
            clip_norm=1.0,
            drop_path_schedule="linear",
            seed=0,
            tracker=tracker,
            stop=StopSignal(),
            evaluate=None,
            evaluation_due=lambda step: False,
            save_best=lambda: None,
            save_last=lambda: None,
            forecast=lambda seconds: None,
            draw_attention=lambda model, step: None,
            drawing_due=lambda step: False,
            log_every=1,
            save_every=None,
            step_share=lambda rate: 0.0,
        )
        trainer.fit()
        tracker.close()
        rows = [
            json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()
        ]
    if group.rank == 0:
        Path(out).write_text(
            json.dumps(
                {
                    "loss": [row["loss"] for row in rows],
                    "top1": [row["top1"] for row in rows],
                    "norm": [row["grad_norm"] for row in rows],
                }
            )
        )
    group.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
