"""The group `train`: conf/train/default.yaml, which holds the values."""

import re
from dataclasses import dataclass

from vit.config.settings import (
    BELOW_ONE,
    BITS_MAY_DIFFER,
    FRACTION,
    FREE,
    POSITIVE,
    Range,
    one_of,
    setting,
)

PRECISION = one_of("auto", "bf16", "fp16", "fp32")
SELECT = one_of("top1", "balanced_top1", "macro_f1", "loss")


def frozen_blocks(freeze: str) -> int | None:
    """Return N of train.freeze=blocks:N, None for its other values."""
    match = re.fullmatch(r"blocks:(\d+)", freeze)
    return int(match[1]) if match else None


def freezes_all_blocks(freeze: str, num_layers: int) -> bool:
    """Whether train.freeze leaves nothing in the blocks that is trained."""
    return freeze == "backbone" or frozen_blocks(freeze) == num_layers


FREEZE = Range(
    lambda value: value in ("none", "backbone") or frozen_blocks(value) is not None,
    "none, backbone or blocks:N",
)


@dataclass
class TrainConfig:
    """What is optimized, how long, and how often to look at it."""

    # The length of the run; steps wins over epochs
    epochs: float = setting(POSITIVE)
    steps: int | None = setting(POSITIVE)

    # Global: the images of one optimizer step, over all processes and micro-batches
    batch_size: int = setting(POSITIVE)
    # Images of one forward and backward pass, to save memory; null: the whole batch
    micro_batch_size: int | None = setting(POSITIVE, on_resume=BITS_MAY_DIFFER)
    # Here and not in `runtime`, since it changes the result
    precision: str = setting(PRECISION)

    loss: str = setting(one_of("cross_entropy", "bce"))
    label_smoothing: float = setting(BELOW_ONE)
    # balanced: the images of rare classes count more, see vit.training.losses
    class_weights: str = setting(one_of("none", "balanced"))
    # Of model.drop_path: rising over the blocks, or the same in all
    drop_path_schedule: str = setting(one_of("linear", "constant"))
    # Largest norm of the whole gradient; null: no clipping
    clip_norm: float | None = setting(POSITIVE)

    # A trained model to learn from as well: a file, or a name as pretrained= takes it
    teacher: str | None = setting()
    # What is learned of it, its probabilities or its most likely class; null: hard
    distillation: str | None = setting(one_of("soft", "hard"))
    # Of its part in the loss, which is the labels' otherwise; null: 0.5
    distill_weight: float | None = setting(FRACTION)
    # By which both models' logits are divided; null: 3
    distill_temperature: float | None = setting(POSITIVE)

    # Start the patch embedding from the principal axes of the training images' patches
    whiten_patches: bool = setting()
    # backbone: only the head is trained (a linear probe); blocks:N: all but the embeddings and the
    # first N blocks
    freeze: str = setting(FREEZE)
    # LoRA: of the changes of the attention's matrices, which are trained with the head; null: none
    lora_rank: int | None = setting(POSITIVE)
    # Of the averaged weights, which are then evaluated and saved as best; 0: no average
    ema_decay: float = setting(BELOW_ONE)

    # Epochs. Not free on a resume: the times of evaluation decide which checkpoint is the best
    eval_every: float = setting(POSITIVE)
    # What the best checkpoint is best in, on the validation split; see vit.runs.selection
    select: str = setting(SELECT)
    # Evaluations in a row without improvement that end the run; null: all steps are made. Free on a
    # resume: it decides where a run ends, and changes no step that is made
    patience: int | None = setting(POSITIVE, on_resume=FREE)
    # Epochs; null: never
    attention_every: float | None = setting(POSITIVE, on_resume=FREE)
    # Steps
    log_every: int = setting(POSITIVE, on_resume=FREE)
    # Steps; null: every ten minutes
    save_every: int | None = setting(POSITIVE, on_resume=FREE)
