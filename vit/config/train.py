"""The group `train`: conf/train/default.yaml."""

from dataclasses import dataclass

from vit.config.settings import (
    BELOW_ONE,
    BITS_MAY_DIFFER,
    FREE,
    POSITIVE,
    one_of,
    setting,
)


@dataclass
class TrainConfig:
    """What is optimized, how long, and how often to look at it."""

    epochs: float = setting(POSITIVE)
    steps: int | None = setting(POSITIVE)  # wins over epochs
    batch_size: int = setting(POSITIVE)  # global: over all processes and micro-batches
    # null: the whole batch
    micro_batch_size: int | None = setting(POSITIVE, on_resume=BITS_MAY_DIFFER)
    precision: str = setting(one_of("auto", "bf16", "fp16", "fp32"))
    loss: str = setting(one_of("cross_entropy", "bce"))
    label_smoothing: float = setting(BELOW_ONE)
    drop_path_schedule: str = setting(one_of("linear", "constant"))
    clip_norm: float | None = setting(POSITIVE)  # of the whole gradient; null: no clipping
    whiten_patches: bool = setting()
    freeze: str = setting(one_of("none", "backbone"))
    ema_decay: float = setting(BELOW_ONE)  # of the averaged weights; 0: no average
    eval_every: float = setting(POSITIVE)  # epochs
    attention_every: float | None = setting(POSITIVE, on_resume=FREE)  # epochs
    log_every: int = setting(POSITIVE, on_resume=FREE)  # steps
    save_every: int | None = setting(POSITIVE, on_resume=FREE)  # steps; null: every ten minutes
