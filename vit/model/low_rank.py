"""Low-rank changes of the attention's matrices: LoRA (Hu et al. 2021, arXiv:2106.09685).

A trained matrix W (out, in) stays as it is, and a product of two small ones is learned beside it:
h = W x + B A x, with A (rank, in) and B (rank, out)ᵀ (equation 3; its factor α / rank is 1 here, as
where α is the rank). A starts from random numbers and B from 0, so the model starts as it was.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from vit.model.vision_transformer import VisionTransformer

MATRICES = ("query", "key", "value", "projection")
DOWN, UP = ".down.weight", ".up.weight"


class LowRankLinear(nn.Linear):
    """A linear layer with a low-rank change: (…, in) → (…, out).

    It takes over the weight and the bias of another one. down is A, up is B; a new nn.Linear is
    initialized as the authors' code initializes A. In evaluation the sum W + B A is multiplied by,
    so that the result is that of the merged layer to the bit.
    """

    def __init__(self, base: nn.Linear, rank: int):
        # Without nn.Linear's own, which would make and fill a weight that is not used
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        # On the CPU, so that the same seed gives the same numbers on any device
        self.down = nn.Linear(base.in_features, rank, bias=False, device="cpu")
        self.up = nn.Linear(rank, base.out_features, bias=False, device="cpu")
        nn.init.zeros_(self.up.weight)
        self.to(base.weight)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.linear(input, self.merged(), self.bias)
        return super().forward(input) + self.up(self.down(input))

    def merged(self) -> Tensor:
        """Return W + B A, (out, in)."""
        return merge_weight(self.weight, self.down.weight, self.up.weight)


def merge_weight(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return W + B A, (out, in), in the type of the weights whatever products are computed in."""
    # The change is small beside W: 16 bits would round much of it away
    with torch.autocast(weight.device.type, enabled=False):
        return weight + up @ down


def multiply_as_one(layers: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """Apply several layers to the same input: (…, in) → (…, all their outputs, one after another).

    As one product, because that is faster.
    """
    changed = [layer for layer in layers if isinstance(layer, LowRankLinear)]
    merge = bool(changed) and not changed[0].training
    weights = [layer.merged() for layer in changed] if merge else [layer.weight for layer in layers]
    bias = None
    if layers[0].bias is not None:
        bias = torch.cat([layer.bias for layer in layers])
    product = F.linear(x, torch.cat(weights), bias)
    if not changed or merge:
        return product

    low = F.linear(x, torch.cat([layer.down.weight for layer in changed]))
    parts = low.chunk(len(changed), dim=-1)
    changes = [layer.up(part) for layer, part in zip(changed, parts, strict=True)]
    return product + torch.cat(changes, dim=-1)


def add_low_rank(model: "VisionTransformer", rank: int, first_block: int = 0) -> None:
    """Give the attention's matrices low-rank changes, in place, from block `first_block` on.

    These and the heads are trained, everything else is frozen.
    """
    model.requires_grad_(False)
    for head in (model.head, model.head_distill):
        if head is not None:
            head.requires_grad_(True)
    for block in list(model.encoder.blocks)[first_block:]:
        attention = block.get_submodule("attention")
        for name in MATRICES:
            base = attention.get_submodule(name)
            assert isinstance(base, nn.Linear)
            setattr(attention, name, LowRankLinear(base, rank))


def merge_low_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors by name as those of a plain model: the changes in the weights.

    Tensors without such changes are returned as they are.
    """
    merged = {name: value for name, value in tensors.items() if not name.endswith((DOWN, UP))}
    for name, up in tensors.items():
        if name.endswith(UP):
            layer = name.removesuffix(UP)
            weight = tensors[f"{layer}.weight"]
            merged[f"{layer}.weight"] = merge_weight(weight, tensors[layer + DOWN], up)
    return merged


def no_change(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros for the low-rank changes among a model's tensors, with which merging adds 0."""
    return {
        name: torch.zeros(value.shape)
        for name, value in tensors.items()
        if name.endswith((DOWN, UP))
    }


def count_plain_parameters(model: "VisionTransformer") -> int:
    """Count the parameters of the model that merging gives."""
    named = model.named_parameters()
    return sum(item.numel() for name, item in named if not name.endswith((DOWN, UP)))
