"""The MLP of a block, plain or gated."""

from torch import Tensor, nn

from vit.model.activations import build_activation


class MLP(nn.Module):
    """Two linear layers, an activation between, dropout after each: (B, N, D) → (B, N, D).

    gated: the first layer gives two halves of intermediate_size each, and the activation of one
    multiplies the other (Shazeer 2020, arXiv:2002.05202; with silu it is SwiGLU).
    Raises ValueError for an activation of another name than those in vit/model/activations.py.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "gelu",
        dropout: float = 0.0,
        gated: bool = False,
    ):
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(hidden_size, intermediate_size * (2 if gated else 1))
        self.activation = build_activation(activation)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * hidden
        else:
            hidden = self.activation(hidden)
        return self.dropout(self.fc2(self.dropout(hidden)))
