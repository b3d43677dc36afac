"""The groups `optimizer` and `schedule`: conf/optimizer/*.yaml and conf/schedule/*.yaml."""

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
    """Which keys below weight and layer decay an optimizer takes is told by the parameters of its
    builder in vit/training/optimizers.py; null is "not given".
    """

    name: str = setting()
    lr: float = setting(POSITIVE)  # at the schedule's peak, for the batch size as it is
    # of the weights of linear layers and convolutions alone
    weight_decay: float = setting(NOT_NEGATIVE)
    # learning rate of a layer relative to the one above it
    layer_decay: float | None = setting(FRACTION)
    betas: list[float] | None = setting(BETAS)
    eps: float | None = setting(POSITIVE)
    momentum: float | None = setting(BELOW_ONE)
    nesterov: bool | None = setting()
    adamw_lr: float | None = setting(POSITIVE)  # Muon: of everything but the blocks' matrices


@dataclass
class ScheduleConfig:
    """The learning rate over the run."""

    name: str = setting(one_of("cosine", "linear", "constant"))
    warmup: Any = setting(DURATION)  # linear, from 0
    final: float | None = setting(PROBABILITY)  # learning rate at the end, relative to the peak
    # linear, at the end
    cooldown: Any = setting(DURATION, belongs=belongs_to("schedule.name", "constant"))
