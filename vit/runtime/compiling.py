"""Whether and how the model is compiled."""

import logging
import os
import shutil

import torch
from torch import nn
from torch.utils._triton import has_triton

from vit.runtime.precision import Precision

# Compiling takes about a minute. On a GPU it saves a third or more of a step; on CPUs 15 % in bf16
# at a width of 384 and nothing at 192 (benchmarks/README.md). In fp32 on a CPU matrix products are
# nearly all of the time, and compiling does not touch them. The run must be long enough to win the
# minute back.
COMPILE_MIN_FLOPS = {"cuda": 2e16, "cpu": 5e14}
CPU_COMPILE_MIN_WIDTH = 384


def worth_compiling(precision: Precision, width: int, run_flops: float) -> bool:
    """Decide runtime.compile=auto.

    precision: with the device; width: the model's hidden_size; run_flops: of the whole run. Nothing
    is measured, so that a resumed run decides the same.
    """
    device = precision.device.type
    if device == "cpu" and (precision.name != "bf16" or width < CPU_COMPILE_MIN_WIDTH):
        return False
    return run_flops > COMPILE_MIN_FLOPS.get(device, float("inf"))


def compile_model(
    model: nn.Module, mode: bool | str, precision: Precision, width: int, run_flops: float
) -> tuple[nn.Module, str | None]:
    """Compile a model where that is asked for or, with mode "auto", where it pays.

    mode: runtime.compile; precision, width, run_flops: see worth_compiling. Returns (the model, a
    warning for the user where compiling was asked for in vain, or None).
    """
    if mode is False or (mode == "auto" and not worth_compiling(precision, width, run_flops)):
        return model, None

    # torch.compile compiles at the first call: a missing compiler would end the run there
    problem = missing_compiler(precision.device)
    if problem is not None:
        return model, f"runtime.compile: {problem}, so the model runs uncompiled"
    # It says on every machine without a GPU that there is none
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return torch.compile(model), None  # pyright: ignore[reportReturnType]


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks on this machine, or None."""
    # The CPU's kernels are C++ and compiled where the run is; the GPU's are Triton's
    compilers = (os.environ.get("CXX", "g++"), "c++", "clang++")
    if device.type == "cpu" and not any(shutil.which(compiler) for compiler in compilers):
        return "no C++ compiler was found"
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed"
    return None
