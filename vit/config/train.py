"""TODO: say what this file is for."""

from dataclasses import dataclass
from enum import Enum

PrecisionName = Enum(
    "PrecisionName", {"auto": "auto", "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
)


Loss = Enum("Loss", {"cross_entropy": "cross_entropy", "bce": "bce"})


DropPathSchedule = Enum("DropPathSchedule", {"linear": "linear", "constant": "constant"})


Freeze = Enum("Freeze", {"none": "none", "backbone": "backbone"})


@dataclass
class TrainingConfig:
    epochs: float = 100.0
    steps: int | None = None  # wins over epochs
    batch_size: int = 64  # global: over all processes and micro-steps
    micro_batch_size: int | None = (
        None  # images per forward and backward pass, to save memory; null: the whole batch
    )
    precision: PrecisionName = PrecisionName.auto
    loss: Loss = Loss.cross_entropy
    label_smoothing: float = 0.0
    drop_path_schedule: DropPathSchedule = (
        DropPathSchedule.linear
    )  # of model.drop_path over the blocks
    clip_norm: float | None = 1.0  # of the whole gradient; null: no clipping
    whiten_patches: bool = (
        False  # start the patch embedding from the axes of the training images' patches
    )
    freeze: Freeze = Freeze.none  # backbone: only the head is trained (a linear probe)
    ema_decay: float = 0.0  # of the averaged weights, which are then the ones evaluated and saved as best; 0: no average
    eval_every: float = 1.0  # epochs
    attention_every: float | None = (
        None  # epochs between pictures of attention in TensorBoard; null: none
    )
    log_every: int = 50  # steps
    save_every: int | None = None  # steps; null: every ten minutes
