"""The device a run is computed on, its settings, its speed and its memory."""

import os
import resource
import sys
import time

import torch

from vit.errors import ConfigError

# Matrix products that measure a device's rate: (rows, inner, columns), large enough to reach it
CPU_PRODUCT = (2048, 1024, 1024)
GPU_PRODUCT = (8192, 8192, 8192)
PRODUCT_TRIES = 8


def choose_device(name: str) -> torch.device:
    """auto, cuda, mps or cpu → a device. Raises ConfigError where the machine has no such
    device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, usable in available.items() if usable)
    if not available[name]:
        usable = ", ".join(kind for kind, usable in available.items() if usable)
        raise ConfigError(
            f"runtime.device={name}: this machine has none that PyTorch can use; it has {usable}"
        )
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    """The device for people: a GPU's name, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return device.type


def use_threads(threads: int | None) -> None:
    """Let torch use so many threads on the CPU; None leaves the number to torch."""
    if threads is not None:
        torch.set_num_threads(threads)


def use_deterministic_kernels(deterministic: bool) -> None:
    """On a GPU: refuse kernels whose bits differ from run to run. CPU kernels repeat at a fixed
    thread count.
    """
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Nothing here reads uninitialized memory, and filling it takes time
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products in a type, the best of some tries: a quarter of a second or
    so.

    No model on this device can surpass it; a training step's speed is given as a fraction of it
    (MFU).
    """
    rows, inner, columns = GPU_PRODUCT if device.type == "cuda" else CPU_PRODUCT
    a = torch.ones(rows, inner, dtype=dtype, device=device)
    b = torch.ones(inner, columns, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(PRODUCT_TRIES):
        start = time.perf_counter()
        product = a @ b
        if device.type != "cpu":
            product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns / best


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the GPU's allocator has held, or else the most that the process has
    held.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB
