"""TODO: say what this file is for."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

OptimizerName = Enum(
    "OptimizerName", {"adamw": "adamw", "lamb": "lamb", "sgd": "sgd", "muon": "muon"}
)


ScheduleName = Enum(
    "ScheduleName", {"cosine": "cosine", "linear": "linear", "constant": "constant"}
)


@dataclass
class OptimizerConfig:
    name: OptimizerName = MISSING
    lr: float = MISSING  # at the schedule's peak, for the batch size as it is
    weight_decay: float = 0.0  # of matrices and convolutions alone
    layer_decay: float | None = (
        None  # each layer learns at this share of the rate of the layer above it
    )
    betas: list[float] | None = None  # adamw, lamb, muon
    eps: float | None = None  # adamw, lamb, muon
    momentum: float | None = None  # sgd, muon
    nesterov: bool | None = None  # sgd, muon
    adamw_lr: float | None = None  # muon: of all but the blocks' matrices


@dataclass
class ScheduleConfig:
    name: ScheduleName = MISSING
    warmup: Any = 0.0  # linear, from 0: a share of the run (0.05), steps (500) or epochs (5ep)
    final: float | None = None  # learning rate at the end, as a share of the peak
    cooldown: Any = None  # constant: a straight line down at the end, as long as this; null: none
