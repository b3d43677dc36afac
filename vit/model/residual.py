"""What scales a residual branch before it is added."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """A learned factor for every channel of a residual branch: (B, N, D) → (B, N, D).

    Source: Touvron et al. 2021, CaiT (arXiv:2103.17239), section 2.
    """

    def __init__(self, hidden_size: int, initial: float):
        super().__init__()
        self.factor = nn.Parameter(torch.full((hidden_size,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def drop_path(branch: Tensor, keep: Tensor | None) -> Tensor:
    """Stochastic depth: scale each image's residual branch (B, N, D) by its own factor.

    keep: (B,), 0 or 1 / keep rate; None leaves every branch as it is.
    """
    return branch if keep is None else branch * keep[:, None, None].to(branch.dtype)
