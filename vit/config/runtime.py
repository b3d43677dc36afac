"""TODO: say what this file is for."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

Device = Enum("Device", {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "mps": "mps"})


Sharding = Enum("Sharding", {"none": "none", "fsdp": "fsdp"})


@dataclass
class RuntimeConfig:
    device: Device = Device.auto
    compile: Any = "auto"  # auto, true, false
    workers: int | None = None  # processes that decode pictures; null: one a core, eight at most
    threads: int | None = None  # of torch on the CPU; null: torch's own choice
    deterministic: bool = False
    activation_checkpointing: bool = (
        False  # compute the blocks' activations again in the backward pass, to save memory
    )
    processes: int | None = (
        None  # to start on this machine, each with a GPU or its share of the cores; null: this one alone
    )
    sharding: Sharding = (
        Sharding.none
    )  # fsdp: each process keeps a share of weights, averages and optimizer state


@dataclass
class EvaluateRuntimeConfig:
    """RuntimeConfig without compiling: evaluation runs the model as it is, in training too."""

    device: Device = Device.auto
    workers: int | None = None
    threads: int | None = None
    deterministic: bool = False
