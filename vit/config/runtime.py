"""The group `runtime`: conf/runtime/default.yaml. Nothing here may change the result of a run."""

from dataclasses import dataclass
from typing import Any

from vit.config.settings import (
    BITS_MAY_DIFFER,
    FREE,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    one_of,
    setting,
)

DEVICE = one_of("auto", "cpu", "cuda", "mps")
COMPILE = Range(
    lambda value: value in ("auto", True, False, "blocks", "graphs"),
    "auto, true, false, blocks or graphs",
)


@dataclass
class RuntimeConfig:
    """How a run is computed."""

    # Another device differs in the last bits too, but a run may move to another machine without a
    # warning; so may it with another number of workers, which leaves every bit as it is
    device: str = setting(DEVICE, on_resume=FREE)
    # See vit/runtime/compiling.py
    compile: Any = setting(COMPILE, on_resume=BITS_MAY_DIFFER)
    # Processes that decode image files; null: one a core, eight at most, 32 beside a GPU
    workers: int | None = setting(NOT_NEGATIVE, on_resume=FREE)
    # Of torch on the CPU; null: torch's choice
    threads: int | None = setting(POSITIVE, on_resume=BITS_MAY_DIFFER)
    deterministic: bool = setting(on_resume=BITS_MAY_DIFFER)
    activation_checkpointing: bool = setting(on_resume=BITS_MAY_DIFFER)
    # To start on this machine; null: this one alone, or those that torchrun has started
    processes: int | None = setting(POSITIVE, on_resume=BITS_MAY_DIFFER)
    # fsdp: each process keeps a part of the weights, their averages and the optimizer's state
    sharding: str = setting(one_of("none", "fsdp"), on_resume=BITS_MAY_DIFFER)
    # From each start of the command, after which it has saved and ended; null: no limit
    max_minutes: float | None = setting(POSITIVE, on_resume=FREE)


@dataclass
class EvaluateRuntimeConfig:
    """RuntimeConfig without what only training needs.

    The model is never compiled here: the evaluations of a run do not compile it either.
    """

    device: str = setting(DEVICE)
    workers: int | None = setting(NOT_NEGATIVE)
    threads: int | None = setting(POSITIVE)
    deterministic: bool = setting()
