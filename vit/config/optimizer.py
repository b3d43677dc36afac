"""The groups `optimizer` and `schedule`: conf/optimizer/*.yaml and conf/schedule/*.yaml.

Those files hold the values.
"""

from dataclasses import dataclass
from typing import Any

from vit.config.settings import (
    BELOW_ONE,
    DURATION,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    Range,
    belongs_to,
    one_of,
    setting,
)

BETAS = Range(
    lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
    "two numbers, at least 0 and below 1",
)


@dataclass
class OptimizerConfig:
    """The optimizer and its settings.

    The parameters of its builder in vit/training/optimizers.py say which of the keys from betas on
    an optimizer takes; null is "not given".
    """

    name: str = setting()
    # At the schedule's peak, for the batch size as it is: nothing scales it by the batch
    lr: float = setting(POSITIVE)
    # Of the weights of linear layers and convolutions alone; multiplied by the learning rate, as
    # torch does
    weight_decay: float = setting(NOT_NEGATIVE)
    # Learning rate of a layer relative to the one above it; null: all layers learn alike
    layer_decay: float | None = setting(FRACTION)

    betas: list[float] | None = setting(BETAS)
    eps: float | None = setting(POSITIVE)
    momentum: float | None = setting(BELOW_ONE)
    nesterov: bool | None = setting()
    # Muon: the learning rate of all that AdamW updates
    adamw_lr: float | None = setting(POSITIVE)


@dataclass
class ScheduleConfig:
    """The learning rate over the run."""

    name: str = setting(one_of("cosine", "linear", "constant"))
    # Linear, from 0
    warmup: Any = setting(DURATION)
    # Learning rate at the end, relative to the peak; null: 0
    final: float | None = setting(PROBABILITY)
    # A straight line down over the last steps; null: none
    cooldown: Any = setting(DURATION, belongs=belongs_to("schedule.name", "constant"))
