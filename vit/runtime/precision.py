"""TODO: say what this file is for."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# bfloat16 on CPUs that multiply it in hardware: 0.4 times the speed of float32 at a width of 128 (converting costs more
# than the small products win), 1.6 times at 192; benchmarks/README.md has the figures.
CPU_BF16_MIN_WIDTH = 192


# Fused attention's kernels in the order of preference by compute capability: cuDNN's is about twice as fast as the default on
# Hopper (9.0) in training shapes and slower elsewhere, as published; benchmarks/gpu.py compares them. Others: torch's choice.
ATTENTION_KERNELS: dict[tuple[int, int] | None, list[SDPBackend]] = {
    (9, 0): [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
}


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 matrix products in hardware (AVX512_BF16 or AMX)."""
    capabilities = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # torch 2.11 may lack it: then float32
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
            capability = (
                torch.cuda.get_device_capability(self.device)
                if self.device.type == "cuda"
                else None
            )
            if capability in ATTENTION_KERNELS:
                stack.enter_context(sdpa_kernel(ATTENTION_KERNELS[capability], set_priority=True))
            if self.name != "fp32":
                stack.enter_context(
                    torch.autocast(
                        self.device.type, torch.bfloat16 if self.name == "bf16" else torch.float16
                    )
                )
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
