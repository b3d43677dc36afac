"""How a new model's weights are drawn."""

import math

import torch
from torch import Tensor, nn

NAMES = ("jax", "xavier", "trunc_normal")
CUT_DEVIATION = 0.87962566103423978  # of a standard normal cut at two deviations; flax divides by it


def truncated_normal(tensor: Tensor, std: float) -> Tensor:
    """N(0, std) cut at two standard deviations, in place."""
    return nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


@torch.no_grad()
def initialize(model: nn.Module, init: str, init_range: float) -> None:
    """Draw the weights of a VisionTransformer anew from torch's default generator.

    jax: as vit_jax does: lecun-normal patch embedding and pooler, Xavier-uniform attention and MLP, zero head;
    xavier: every matrix Xavier-uniform (Glorot & Bengio 2010); both: MLP biases N(0, 1e-6), other biases 0, positions
    N(0, 0.02), class token 0. trunc_normal: everything N(0, init_range) cut at 2σ, biases 0, as in DeiT.
    Raises ValueError for another name.
    """
    if init not in NAMES:
        raise ValueError(f"init must be one of {', '.join(NAMES)}, got {init}")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if init == "trunc_normal":
                truncated_normal(module.weight, init_range)
            elif init == "xavier":
                nn.init.xavier_uniform_(module.weight.flatten(1))
            elif name == "head":  # vit_jax starts from equal logits
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Conv2d) or name == "pooler.dense":  # flax's default, lecun_normal
                truncated_normal(module.weight, math.sqrt(1 / module.weight[0].numel()) / CUT_DEVIATION)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
                if ".mlp." in name and init != "trunc_normal":
                    nn.init.normal_(module.bias, std=1e-6)
    for name in ("cls_token", "registers", "position_embedding"):
        token = getattr(model.embeddings, name)
        if isinstance(token, nn.Parameter):
            if init == "trunc_normal":
                truncated_normal(token, init_range)
            elif name != "cls_token":
                nn.init.normal_(token, std=0.02)
