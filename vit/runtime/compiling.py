"""Whether and how the model is compiled.

Graphs are static, one for each shape of a micro-batch, of which a run has one, or two where the
batch leaves a rest: torch would otherwise make one of any size at the second, and use the slower
kernels of that from then on. They are of training alone; evaluations are not compiled.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from vit.errors import ConfigError
from vit.model.vision_transformer import Block
from vit.runtime.precision import Precision
from vit.text import first_line

# Compiling takes about a minute. On a GPU it saves a third or more of a step; on CPUs in bf16 10 %
# at a width of 192, 15 % at 256 and 4 to 8 % at 384 (benchmarks/README.md). In fp32 on a CPU matrix
# products are nearly all of the time, and compiling does not touch them. The run must be long
# enough to win the minute back.
#
# Compiling one block for all of them, and not the model, was tried on a ViT-S/4 in bf16 (2 cores of
# an AMD EPYC Zen 4, batch 16, seconds of CPU time): 44 to compile instead of 66, of which the first
# also loads the compiler, and 0.81 a step instead of 0.77, where uncompiled it is 0.82. So it is
# for short runs on a GPU, where compiling takes much of the time; there it is not measured.
COMPILE_MIN_FLOPS = {"cuda": 2e16, "cpu": 5e14}
CPU_COMPILE_MIN_WIDTH = 192


def worth_compiling(precision: Precision, width: int, run_flops: float) -> bool:
    """Decide runtime.compile=auto.

    precision: with the device; width: the model's hidden_size; run_flops: of the whole run. Nothing
    is measured, so that a resumed run decides the same.
    """
    device = precision.device.type
    if device == "cpu" and (precision.name != "bf16" or width < CPU_COMPILE_MIN_WIDTH):
        return False
    return run_flops > COMPILE_MIN_FLOPS.get(device, float("inf"))


class Compiled(NamedTuple):
    """forward: the model to train with; is_compiled: whether any of it is compiled; warning: for
    the user, where compiling was asked for in vain, or None."""

    forward: nn.Module
    is_compiled: bool
    warning: str | None


def compile_model(
    model: nn.Module, mode: bool | str, precision: Precision, width: int, run_flops: float
) -> Compiled:
    """Compile a model where that is asked for or, with mode "auto", where it pays.

    mode: runtime.compile. true: the whole model; blocks: every Block, of which one is compiled for
    all, in place; graphs: the whole model, and its kernels are replayed as CUDA graphs. precision,
    width, run_flops: see worth_compiling. Raises ConfigError for graphs without a GPU of CUDA.
    """
    if not mode or (mode == "auto" and not worth_compiling(precision, width, run_flops)):
        return Compiled(model, False, None)
    if mode == "graphs" and precision.device.type != "cuda":
        raise ConfigError(
            f"runtime.compile=graphs is for GPUs of CUDA, and this run is on a "
            f"{precision.device.type}; runtime.compile=true compiles without graphs"
        )

    # It says on every machine without a GPU that there is none
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

    # torch.compile compiles at the first call: a missing compiler would end the run there
    problem = missing_compiler(precision.device)
    if problem is not None:
        warning = f"runtime.compile: the model runs uncompiled, since {problem}"
        return Compiled(model, False, warning)

    if mode == "blocks":
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)
        return Compiled(model, True, None)
    if mode == "graphs":
        return Compiled(GraphedModel(model), True, None)
    return Compiled(compiled(model), True, None)


def compiled(model: nn.Module, mode: str | None = None) -> nn.Module:
    return torch.compile(model, dynamic=False, mode=mode)  # pyright: ignore[reportReturnType]


class GraphedModel(nn.Module):
    """A model whose forward and backward passes are each replayed as one CUDA graph.

    For small models, whose kernels take less time than it takes to start them one by one. What is
    random stays a function of the seed and the step: images and factors of stochastic depth are
    copied into the graph's inputs, and dropout's generator takes its seed anew at every replay.

    Prepared, and not measured. A replay overwrites what the one before has returned, gradients
    included, so that the whole batch has to be computed at once.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.compiled = compiled(model, mode="reduce-overhead")

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        # What the last step has returned was used
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(images, keep)


@contextlib.contextmanager
def without_compiling() -> Iterator[None]:
    """Run models in the block uncompiled: an evaluation is not worth graphs of its own."""
    with torch.compiler.set_stance("force_eager"):
        yield


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks on this machine, or None."""
    # The CPU's kernels are C++ and compiled where the run is; the GPU's are Triton's
    compilers = (os.environ.get("CXX", "g++"), "c++", "clang++")
    if device.type == "cpu" and not any(shutil.which(compiler) for compiler in compilers):
        return "no C++ compiler was found"
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed"
    return compiling_error(device)


def compiling_error(device: torch.device) -> str | None:
    """Compile a sum, and return why that fails, or None: seconds that the model's kernels save.

    Triton needs a C compiler, as images of containers often lack, and kernels are loaded from a
    folder that may not be written, or is mounted noexec, as clusters do with /tmp.
    """
    # A second's work, which a run that is not compiled can do without
    from torch._dynamo.exc import TorchDynamoException

    try:
        torch.compile(torch.add, dynamic=False)(torch.ones(4, device=device), 1)
    except TorchDynamoException as error:
        return f"a trial failed: {first_line(error)}"
    return None
