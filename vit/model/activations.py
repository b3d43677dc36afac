"""The activation functions of the MLP, by the names that the configuration uses."""

from functools import partial

import torch
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x σ(1.702 x), the approximation of GELU that CLIP's weights were trained with.

    Source: Hendrycks & Gimpel 2016 (arXiv:1606.08415), section 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SquaredReLU(nn.Module):
    """The square of ReLU, which needs no exponential.

    Source: So et al. 2021, Primer (arXiv:2109.08668), section 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "silu": nn.SiLU,
}


def build_activation(name: str) -> nn.Module:
    """A new module for one of ACTIVATIONS; raises ValueError for another name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name}")
    return ACTIVATIONS[name]()
