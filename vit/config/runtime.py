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
AUTO_OR_BOOL = Range(lambda value: value in ("auto", True, False), "auto, true or false")


@dataclass
class RuntimeConfig:
    """How a run is computed."""

    device: str = setting(DEVICE, on_resume=FREE)
    compile: Any = setting(AUTO_OR_BOOL, on_resume=BITS_MAY_DIFFER)
    workers: int | None = setting(NOT_NEGATIVE, on_resume=FREE)  # processes that decode image files
    threads: int | None = setting(POSITIVE, on_resume=BITS_MAY_DIFFER)  # of torch on the CPU
    deterministic: bool = setting(on_resume=BITS_MAY_DIFFER)
    activation_checkpointing: bool = setting(on_resume=BITS_MAY_DIFFER)
    processes: int | None = setting(POSITIVE, on_resume=BITS_MAY_DIFFER)  # to start on this machine
    sharding: str = setting(one_of("none", "fsdp"), on_resume=BITS_MAY_DIFFER)


@dataclass
class EvaluateRuntimeConfig:
    """RuntimeConfig without compiling: evaluation runs the model as it is, in training too."""

    device: str = setting(DEVICE)
    workers: int | None = setting(NOT_NEGATIVE)
    threads: int | None = setting(POSITIVE)
    deterministic: bool = setting()
