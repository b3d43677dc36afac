"""The number format of matrix products, and what `train.precision=auto` chooses.

Weights, optimizer state and averages are float32 in every precision. Choices come from tables and
the hardware, never from a measurement, so that a resumed run chooses the same.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# bfloat16 on CPUs that multiply it in hardware: measured at 0.4 times the speed of float32 at a
# width of 128 (converting costs more than the small products save), and 1.6 times at 192.
CPU_BF16_MIN_WIDTH = 192

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """The number format of a run on a device.

    bf16 or fp16: matrix products in 16 bits under autocast, weights and their updates in float32;
    fp32: no autocast. What flows from block to block is float32 where positions are added to the
    patches; with rotary ones or none it stays in 16 bits until a LayerScale.
    """

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the matrix products."""
        return DTYPES[self.name]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute forward passes in this precision."""
        if self.name == "fp32":
            yield
            return
        with torch.autocast(self.device.type, self.dtype):
            yield

    def scaler(self) -> torch.amp.GradScaler:
        """Return what scales the loss so that small gradients survive fp16.

        It does nothing in other precisions: bf16 has the exponents of float32.
        """
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def choose_precision(name: str, device: torch.device, width: int) -> Precision:
    """Return the precision of a name: bf16, fp16, fp32 or auto.

    auto is bf16 on GPUs that have it (compute capability 8.0 on) and on CPUs that have it in
    hardware where the model's width makes it pay; fp16 on older GPUs; else fp32.
    """
    if name != "auto":
        return Precision(name, device)
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8
        return Precision("bf16" if has_bf16 else "fp16", device)
    fast = device.type == "cpu" and width >= CPU_BF16_MIN_WIDTH and cpu_multiplies_bf16()
    return Precision("bf16" if fast else "fp32", device)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 matrix products in hardware (AVX512_BF16 or AMX)."""
    # torch 2.11 may lack this function; float32 is then the safe answer
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
