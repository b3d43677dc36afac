"""How a new model's weights are drawn."""

import math
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.model.positions import rope_frequencies

if TYPE_CHECKING:
    from vit.model.vision_transformer import Block, VisionTransformer


NAMES = ("jax", "xavier", "trunc_normal", "local")


CUT_DEVIATION = (
    0.87962566103423978  # of a standard normal cut at two deviations; flax divides by it
)


def truncated_normal(tensor: Tensor, std: float) -> Tensor:
    """N(0, std) cut at two standard deviations, in place."""
    return nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


@torch.no_grad()
def initialize(model: "VisionTransformer", init: str, init_range: float) -> None:
    """Draw the weights of a VisionTransformer anew from torch's default generator.

    jax: as vit_jax does: lecun-normal patch embedding and pooler, Xavier-uniform attention and MLP, zero head;
    xavier: every matrix Xavier-uniform (Glorot & Bengio 2010); both: MLP biases N(0, 1e-6), other biases 0, positions
    N(0, 0.02), class token 0. trunc_normal: everything N(0, init_range) cut at 2σ, biases 0, as in DeiT.
    local: as jax, and then each head is pointed at a neighbouring patch; see point_heads_at_neighbours().
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
            elif (
                isinstance(module, nn.Conv2d) or name == "pooler.dense"
            ):  # flax's default, lecun_normal
                truncated_normal(
                    module.weight, math.sqrt(1 / module.weight[0].numel()) / CUT_DEVIATION
                )
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
    if init == "local":
        point_heads_at_neighbours(model)


LOCAL_CONTRAST, LOCAL_CONTENT = (
    2.0,
    0.5,
)  # what was measured on CIFAR-10 (benchmarks/README.md); no others were tried


def point_heads_at_neighbours(model: "VisionTransformer") -> None:
    """Let each head start by looking at one patch of the 3 x 3 around its own, as a convolution does, the head's channels being
    the filters: the idea of Zheng et al. 2024 (arXiv:2404.01139), done by the biases of query and key.

    With rope2d the product of two biases, each turned by its own patch's place, depends on the difference of the places
    alone: Σ a² cos(θ(Δ − Δ₀)) is greatest at the wanted difference Δ₀. The amplitudes a favour high frequencies θ, and make
    one patch off along one side cost LOCAL_CONTRAST in the softmax's exponent; what depends on the content is scaled by
    LOCAL_CONTENT. Raises ValueError for other positions, or without these biases.
    """
    layers = [cast("Block", block).attention for block in model.encoder.blocks]
    if model.encoder.rotation is None or layers[0].query.bias is None:
        raise ValueError(
            "init=local needs position=rope2d and qkv_bias=true: the biases point the heads at their places"
        )
    for attention in layers:
        heads, width = len(attention.heads), attention.head_size
        frequencies = rope_frequencies(width)
        squares = frequencies.square() / (frequencies.square() * (1 - frequencies.cos())).sum()
        amplitudes = (LOCAL_CONTRAST * math.sqrt(width) * squares).sqrt()
        places = torch.cat([torch.randperm(9) for _ in range(-(-heads // 9))])[
            :heads
        ]  # each of the nine equally often
        angles = (
            torch.stack([places % 3 - 1, places // 3 - 1], dim=1)[..., None] * frequencies
        )  # (heads, column and row, f)
        query = torch.stack([angles.cos(), angles.sin()], dim=-1) * amplitudes[:, None]
        key = (
            torch.stack([torch.ones_like(angles), torch.zeros_like(angles)], dim=-1)
            * amplitudes[:, None]
        )
        attention.query.bias.copy_(query.flatten())
        attention.key.bias.copy_(key.flatten())
        for matrix in (attention.query, attention.key):
            matrix.weight.mul_(LOCAL_CONTENT)


@torch.no_grad()
def whiten_patches(model: "VisionTransformer", images: Tensor) -> None:
    """Start the patch embedding as a whitening of these images' patches: each output channel has unit variance and no two are
    correlated, as far as the width allows, so that edges count as much as brightness. The first layer of Jordan 2024
    (arXiv:2404.00498, section 3.2) for patches; the weights are trained on.

    images: normalised, (n, C, height, width), of the training set. Raises ValueError for a hybrid: its patches are features.
    """
    embedding = model.embeddings.patch_embedding
    if embedding.stem is not None:
        raise ValueError("train.whiten_patches needs patches of pixels; a hybrid's are features")
    patches = (
        F.unfold(images, embedding.patch_size, stride=embedding.patch_size)
        .transpose(1, 2)
        .flatten(0, 1)
    )
    patches = patches.cpu().double()  # some devices have no float64
    patches = patches - patches.mean(0)
    variances, axes = torch.linalg.eigh(patches.T @ patches / len(patches))
    whitening = (axes / (variances + 1e-2).sqrt()).T  # a floor for axes that hold next to nothing
    hidden_size, size = len(embedding.projection.weight), len(whitening)
    turned = torch.linalg.qr(torch.randn(max(hidden_size, size), size, dtype=torch.float64)).Q[
        :hidden_size
    ]
    weight = math.sqrt(max(hidden_size, size) / size) * turned @ whitening
    embedding.projection.weight.copy_(weight.reshape(embedding.projection.weight.shape))
