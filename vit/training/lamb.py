"""LAMB: Adam whose steps are scaled to the size of what they change (You et al. 2020).

Algorithm 2 of arXiv:1904.00962. On a GPU the tensors of a group are computed together by torch's
_foreach functions: one by one they take eighteen kernels each, which is longer than the forward and
backward pass of a small model.
"""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

# pyright: reportPrivateImportUsage=false


class LAMB(torch.optim.Optimizer):
    """LAMB for parameter groups.

    Adam's step of every decayed tensor, decay included, is scaled to the norm of the tensor itself;
    tensors that are not decayed take Adam's step, as in NVIDIA's and timm's LAMB.
    """

    def __init__(self, params: list[dict], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            parameters = [item for item in group["params"] if item.grad is not None]
            for together in in_parts(parameters):
                self.update(together, group)

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Make one step of a group's parameters, which are sorted by their shape."""
        updates = self.adam_updates(parameters, group)
        if group["weight_decay"]:
            # In two kernels, since a fused one would round the product differently
            decays = torch._foreach_mul(parameters, group["weight_decay"])
            torch._foreach_add_(updates, decays)
            updates = scale_each(updates, trust_ratios(parameters, updates))
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def adam_updates(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Take the gradients into the moving averages; Adam's steps, at learning rate 1."""
        states = [self.state_of(parameter) for parameter in parameters]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        gradients = [item.grad for item in parameters if item.grad is not None]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - beta2)

        # The averages start at zero, which is corrected for. Steps are counted on the CPU, so that
        # no GPU is waited for
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        counts = [int(step) for step in steps]
        updates = torch._foreach_div(means, [1 - beta1**count for count in counts])
        deviations = torch._foreach_div(squares, [1 - beta2**count for count in counts])
        torch._foreach_sqrt_(deviations)
        torch._foreach_add_(deviations, group["eps"])
        torch._foreach_div_(updates, deviations)
        return list(updates)

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's count of steps and moving averages, which start at zero."""
        state = self.state[parameter]
        if not state:
            # Tensors all of them, since a checkpoint holds nothing else
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def in_parts(parameters: list[Tensor]) -> list[list[Tensor]]:
    """The parameters that are computed together, those of one shape in a row.

    All of them; on a CPU each by itself, since one stays in its cache and all do not.
    """
    if not parameters or parameters[0].device.type == "cpu":
        return [[parameter] for parameter in parameters]
    return [sorted(parameters, key=shape_of)]


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def trust_ratios(parameters: list[Tensor], updates: list[Tensor]) -> Tensor:
    """Each parameter's norm over its update's, (n,); 1 where either is 0, as a new head's is."""
    targets = torch.stack(torch._foreach_norm(parameters))
    lengths = torch.stack(torch._foreach_norm(updates))
    return torch.where((lengths > 0) & (targets > 0), targets / lengths, 1.0)


def scale_each(tensors: list[Tensor], factors: Tensor) -> list[Tensor]:
    """Multiply tensors, which are sorted by their shape, by a factor each; factors (n,).

    The tensors themselves may change.
    """
    scaled: list[Tensor] = []
    for _, group in groupby(tensors, key=shape_of):
        alike = list(group)
        batch = torch.stack(alike) if len(alike) > 1 else alike[0][None]
        own = factors[len(scaled) : len(scaled) + len(batch)]
        # One axis for every axis of the tensors
        batch *= own.reshape(-1, *[1] * (batch.ndim - 1))
        scaled += batch.unbind()
    return scaled
