"""The device, the precision, compiling and determinism: how a run is computed, not what."""

import os
import time

import torch

from vit.errors import ConfigError
from vit.runtime.precision import Precision


def choose_device(name: str) -> torch.device:
    """auto, cuda, mps or cpu → a device; raises ConfigError where it isn't there."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        there = ", ".join(kind for kind, there in available.items() if there)
        raise ConfigError(
            f"runtime.device={name}: this machine has none that PyTorch can use; it has {there}"
        )
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    )


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def product_rate(precision: Precision) -> float:
    """FLOP/s of large matrix products in a precision, the best of some tries that take a quarter of a second or so together:
    what no model on this device can surpass, and what its speed is told as a share of."""
    device = precision.device
    rows, inner, columns = (8192, 8192, 8192) if device.type == "cuda" else (2048, 1024, 1024)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision.name, torch.float32)
    a, b = (
        torch.ones(rows, inner, dtype=dtype, device=device),
        torch.ones(inner, columns, dtype=dtype, device=device),
    )
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
