"""TODO: say what this file is for."""

import os
import shutil

import torch
from torch import nn

# Compiling takes about a minute. On a GPU it wins a third or more; on CPUs 15 % at a width of 384, nothing at 192
# (benchmarks/README.md). The run must be long enough to win the minute back.
COMPILE_MIN_FLOPS = {"cuda": 2e16, "cpu": 5e14}


CPU_COMPILE_MIN_WIDTH = 384


def worth_compiling(device: torch.device, width: int, run_flops: float) -> bool:
    """What runtime.compile=auto decides, from the device, the model's width and the run's length in FLOPs alone."""
    wide_enough = device.type == "cuda" or width >= CPU_COMPILE_MIN_WIDTH
    return wide_enough and run_flops > COMPILE_MIN_FLOPS.get(device.type, float("inf"))


def compile_model(
    model: nn.Module, wanted: bool | str, device: torch.device, width: int, run_flops: float
) -> tuple[nn.Module, str | None]:
    """The model, compiled where asked for or, with auto, where it pays; and a line for the user where asking was in vain.

    width, run_flops: see worth_compiling; auto decides from them and the device alone, so that a resumed run decides the same.
    """
    if wanted is False or (wanted == "auto" and not worth_compiling(device, width, run_flops)):
        return model, None
    compilers = (os.environ.get("CXX", "g++"), "c++", "clang++")
    if device.type == "cpu" and not any(shutil.which(compiler) for compiler in compilers):
        return model, "runtime.compile: no C++ compiler was found, so the model runs uncompiled"
    if device.type == "cuda" and not has_triton():
        return model, "runtime.compile: Triton is not installed, so the model runs uncompiled"
    return torch.compile(model), None  # pyright: ignore[reportReturnType]


def has_triton() -> bool:
    from torch.utils._triton import has_triton as found

    return found()
