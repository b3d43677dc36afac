"""From tokens to one vector an image: pooling by attention, and the layer before the head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.model.mlp import MLP


class Pooler(nn.Module):
    """A dense layer and tanh before the head: (B, D) → (B, representation_size).

    It is the paper's head in pre-training (section 3.1: "a MLP with one hidden layer"), and the
    pooler of BERT and Hugging Face.
    """

    def __init__(self, hidden_size: int, representation_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, representation_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


class AttentionPool(nn.Module):
    """A learned query that attends to all patches, then a residual MLP: (B, R·S, D) → (B, D).

    Source: Zhai et al. 2022 (arXiv:2106.04560), section 3.2, "MAP head"; SigLIP's image tower
    (arXiv:2303.15343) has it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        activation: str = "gelu",
        layer_norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.probe = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = MLP(hidden_size, intermediate_size, activation)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(self.probe.to(x.dtype)).expand(len(x), -1, -1)  # (B, 1, D)
        heads = [
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, 1 or R·S, K)
            for part in (query, self.key(x), self.value(x))
        ]
        context = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)  # (B, 1, D)
        x = self.projection(context)
        return (x + self.mlp(self.norm(x)))[:, 0]
