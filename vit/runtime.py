"""The device, the precision, compiling and determinism: how a run is computed, not what."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit.errors import ConfigError

# bfloat16 on CPUs that multiply it in hardware: 0.4 times the speed of float32 at a width of 128 (converting costs more
# than the small products win), 1.6 times at 192; benchmarks/README.md has the figures.
CPU_BF16_MIN_WIDTH = 192
# Fused attention's kernels in the order of preference by compute capability: cuDNN's is about twice as fast as the default on
# Hopper (9.0) in training shapes and slower elsewhere, as published; benchmarks/gpu.py compares them. Others: torch's choice.
ATTENTION_KERNELS: dict[tuple[int, int] | None, list[SDPBackend]] = {
    (9, 0): [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]}
# Compiling takes about a minute. On a GPU it wins a third or more; on CPUs 15 % at a width of 384, nothing at 192
# (benchmarks/README.md). The run must be long enough to win the minute back.
COMPILE_MIN_FLOPS = {"cuda": 2e16, "cpu": 5e14}
CPU_COMPILE_MIN_WIDTH = 384


def choose_device(name: str) -> torch.device:
    """auto, cuda, mps or cpu → a device; raises ConfigError where it isn't there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        there = ", ".join(kind for kind, there in available.items() if there)
        raise ConfigError(f"runtime.device={name}: this machine has none that PyTorch can use; it has {there}")
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 matrix products in hardware (AVX512_BF16 or AMX)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may lack it: then float32
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass(frozen=True)
class Precision:
    """bf16 or fp16: matrix products in 16 bits under autocast, weights and sums in float32; fp32: no autocast."""

    name: str
    device: torch.device

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Around a forward pass: its precision, and the kernels of attention that are fast on the device."""
        with contextlib.ExitStack() as stack:
            capability = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else None
            if capability in ATTENTION_KERNELS:
                stack.enter_context(sdpa_kernel(ATTENTION_KERNELS[capability], set_priority=True))
            if self.name != "fp32":
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16 if self.name == "bf16" else torch.float16))
            yield

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss so that small gradients survive fp16; does nothing for the others."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def choose_precision(name: str, device: torch.device, width: int) -> Precision:
    """auto: bf16 on GPUs that have it (compute capability 8.0) and on CPUs that have it where `width` makes it pay; fp16 on
    older GPUs; else fp32. Other names as they are."""
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
        else:
            fast = device.type == "cpu" and width >= CPU_BF16_MIN_WIDTH and cpu_multiplies_bf16()
            name = "bf16" if fast else "fp32"
    return Precision(name, device)


def worth_compiling(device: torch.device, width: int, run_flops: float) -> bool:
    """What runtime.compile=auto decides, from the device, the model's width and the run's length in FLOPs alone."""
    wide_enough = device.type == "cuda" or width >= CPU_COMPILE_MIN_WIDTH
    return wide_enough and run_flops > COMPILE_MIN_FLOPS.get(device.type, float("inf"))


def compile_model(model: nn.Module, wanted: bool | str, device: torch.device, width: int,
                  run_flops: float) -> tuple[nn.Module, str | None]:
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


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def product_rate(precision: Precision) -> float:
    """FLOP/s of large matrix products in a precision, the best of some tries that take a quarter of a second or so together:
    what no model on this device can surpass, and what its speed is told as a share of."""
    device = precision.device
    rows, inner, columns = (8192, 8192, 8192) if device.type == "cuda" else (2048, 1024, 1024)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision.name, torch.float32)
    a, b = torch.ones(rows, inner, dtype=dtype, device=device), torch.ones(inner, columns, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        product = a @ b
        if device.type != "cpu":
            product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * rows * inner * columns / best


def loader_workers(wanted: int | None, processes: int = 1) -> int:
    """Processes that decode pictures: as many as wanted, or one a core this process may use, eight at most; the cores are
    shared by so many processes."""
    if wanted is not None:
        return wanted
    return min(8, max(1, usable_cores() // processes))


def use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def use_deterministic_kernels(wanted: bool) -> None:
    """On a GPU: refuse kernels whose bits differ from run to run. CPU kernels repeat at a fixed thread count anyway."""
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # Nothing here reads such memory, and filling it takes time
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most the GPU's allocator held, or the most the process held, up to now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
