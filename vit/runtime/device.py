"""The device a run is computed on, its settings, its speed and its memory."""

import os
import resource
import sys
import time

import torch
from torch import Tensor

from vit.errors import ConfigError
from vit.runtime.cores import usable_cores

# Matrix products that measure a device's rate: (rows, inner, columns), large enough to reach it.
# The first tries are slower, since libraries are loaded and clocks rise
CPU_PRODUCT = (2048, 1024, 1024)
GPU_PRODUCT = (8192, 8192, 8192)
PRODUCT_TRIES = 8
# Values of runtime.device
DEVICE_NAMES = ("auto", "cuda", "mps", "cpu")


def choose_device(name: str, key: str = "runtime.device") -> torch.device:
    """Return the device of a name: auto, cuda, mps or cpu.

    key: what the user has named it by. Raises ConfigError where the machine has no such device.
    """
    # In the order in which auto prefers them
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
            f"{key}={name}: this machine has none that PyTorch can use; it has {usable}"
        )
    return torch.device(name)


def start_device(name: str, key: str = "runtime.device") -> torch.device:
    """choose_device() for a command that computes, with what holds for all of them.

    float32 is exact, see use_exact_float32(), and torch takes no more threads than there are cores
    for it. Raises ConfigError where the machine has no such device.
    """
    use_exact_float32()
    # torch does not look at a container's quota, beyond which its threads would be suspended
    if usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())
    return choose_device(name, key)


def wide_device(device: torch.device) -> torch.device:
    """Return where float64 and 64-bit integers are computed for a device: there, or on the CPU.

    Apple's GPUs have no float64, and not every operation on 64-bit integers.
    """
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on wide_device(). Waits for a device that has none."""
    return tensor.to(wide_device(tensor.device)).double()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device, without making the host wait where that is safe."""
    # Metal reads the source later, when nobody may hold it anymore (pytorch/pytorch#189690)
    return tensor.to(device, non_blocking=device.type == "cuda")


def describe_device(device: torch.device) -> str:
    """Describe the device for people: a GPU's name, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return device.type


def use_threads(threads: int | None) -> None:
    """Set the number of torch's threads on the CPU; None leaves it to torch."""
    if threads is not None:
        torch.set_num_threads(threads)


def use_deterministic_kernels(deterministic: bool) -> None:
    """Choose whether a GPU may use kernels whose bits differ from run to run.

    CPU kernels give the same bits at a fixed number of threads in any case.
    """
    # The benchmark picks kernels by their time, which differs from run to run
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS repeats its bits only with a workspace of fixed size, set before its first call
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Nothing here reads uninitialized memory, and filling it takes time
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def use_exact_float32() -> None:
    """Compute float32 products and convolutions on a GPU in float32, and not in TF32.

    So that train.precision=fp32 means the same on every device. Whoever wants speed takes bf16,
    which is faster than TF32.
    """
    torch.set_float32_matmul_precision("highest")
    # Convolutions, such as a hybrid's, would otherwise be in TF32
    torch.backends.cudnn.allow_tf32 = False


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of large matrix products in a type, in a quarter of a second or so.

    No model on this device can surpass it; the speed of training is given as a fraction of it, the
    MFU (model FLOPs utilization; Chowdhery et al. 2022, PaLM, appendix B, which takes the data
    sheet's peak instead).
    """
    rows, inner, columns = GPU_PRODUCT if device.type == "cuda" else CPU_PRODUCT
    # Of random numbers: ones flip few bits and need less power, so a GPU multiplies them faster
    # than data. From a generator of their own: a run's random numbers stay what they are
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(rows, inner, dtype=dtype, device=device, generator=generator)
    b = torch.randn(inner, columns, dtype=dtype, device=device, generator=generator)
    best = float("inf")
    for _ in range(PRODUCT_TRIES):
        start = time.perf_counter()
        product = a @ b
        # A product is only queued on a GPU; reading one number waits for it
        if device.type != "cpu":
            product[0, 0].item()
        best = min(best, time.perf_counter() - start)
    # A multiply-add is two operations
    return 2 * rows * inner * columns / best


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that was queued, so that what comes is timed by itself."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def reset_peak_memory(device: torch.device) -> None:
    """Let peak_memory() of a GPU count from here on. That of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: tensors on a GPU, or else the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, Linux in KiB
    return peak if sys.platform == "darwin" else peak * 1024
