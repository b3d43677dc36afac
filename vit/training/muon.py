"""Muon: momentum whose updates are made orthogonal, for the matrices inside a network.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). torch.optim.Muon goes through the
matrices one by one and multiplies in bfloat16 whatever the processor. Here matrices of one shape
are multiplied as a batch, with the same bits in a fraction of the kernels, and the number format is
chosen: a CPU without bfloat16 in hardware multiplies it thirty times more slowly than float32.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vit.runtime.precision import DTYPES, cpu_multiplies_bf16

# Of the quintic iteration x → a x + b x³ + c x⁵, which five times maps singular values from 0..1 to
# about 0.7..1.2: chosen for a steep start, not for converging to 1
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
EPSILON = 1e-7  # keeps a gradient of zeros from dividing by zero


class Muon(torch.optim.Optimizer):
    """Muon for matrices, (rows, columns) each.

    The kernel of a convolution (out, in, height, width) is the matrix (out, in · height · width)
    that it is for a patch.

    params: parameter groups; lr: of a square matrix, see learning_rate_scale; newton_schulz: the
    number format of its products, bf16 or fp32.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        newton_schulz: str = "bf16",
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "newton_schulz": newton_schulz,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            parameters = [item for item in group["params"] if item.grad is not None]
            if parameters:
                self.update(parameters, group)

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of a group's parameters."""
        lr = group["lr"]
        dtype = DTYPES[group["newton_schulz"]]
        directions = self.accelerate(parameters, group["momentum"], group["nesterov"])
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        for shape, indices in indices_by_shape(parameters).items():
            batch = torch.stack([directions[index] for index in indices])
            matrices = orthogonalize(batch.flatten(2), dtype)
            # In float32 before scaling, or bfloat16 would round the update once more
            updates = list(matrices.float().reshape(batch.shape).unbind())
            same_shape = [parameters[index] for index in indices]
            scale = learning_rate_scale(shape)
            torch._foreach_add_(same_shape, updates, alpha=-lr * scale)  # pyright: ignore[reportPrivateImportUsage]

    def accelerate(self, parameters: list[Tensor], momentum: float, nesterov: bool) -> list[Tensor]:
        """Take the gradients into their moving averages; the directions of the step."""
        gradients: list[Tensor] = []
        averages: list[Tensor] = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
            averages.append(state["momentum_buffer"])
        torch._foreach_lerp_(averages, gradients, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
        if not nesterov:
            return averages
        return list(torch._foreach_lerp(gradients, averages, momentum))  # pyright: ignore[reportPrivateImportUsage]


def indices_by_shape(parameters: list[Tensor]) -> dict[torch.Size, list[int]]:
    """{shape: the indices of the parameters that have it}."""
    indices: dict[torch.Size, list[int]] = defaultdict(list)
    for index, parameter in enumerate(parameters):
        indices[parameter.shape].append(index)
    return indices


def learning_rate_scale(shape: torch.Size) -> float:
    """The factor on the learning rate of a matrix (rows, columns), as in Jordan's Muon."""
    rows, columns = shape[0], shape[1:].numel()
    return math.sqrt(max(1.0, rows / columns))


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of matrices (n, rows, columns) near 1; products are in `dtype`."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    if tall:  # the products are of the shorter side's size
        x = x.mT
    # The iteration needs singular values of at most 1, and the norm is at least the largest
    norms = torch.linalg.matrix_norm(x).clamp(min=EPSILON)
    x = x / norms[:, None, None]
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return x.mT if tall else x


def choose_newton_schulz(device: torch.device) -> str:
    """The number format for a device: bf16 where it has that in hardware, else fp32.

    From the hardware's capabilities alone; a checkpoint keeps the choice, so that a run that is
    resumed on another machine computes alike.
    """
    if device.type == "cpu":
        return "bf16" if cpu_multiplies_bf16() else "fp32"
    return "bf16" if device.type == "cuda" else "fp32"
