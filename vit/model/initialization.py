"""How the weights of a new model are initialized.

All random numbers come from torch's default generator, in the order of the model's modules: a model
built after the same torch.manual_seed has the same weights.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.model.head_pruning import attention_modules
from vit.model.positions import rope_frequencies
from vit.model.stems import pixel_filters

if TYPE_CHECKING:
    from vit.model.vision_transformer import VisionTransformer

NAMES = ("jax", "xavier", "trunc_normal", "local")

# The standard deviation of trunc_normal in DeiT
INIT_RANGE = 0.02
# DeiT and Hugging Face cut it at ±2, which at 0.02 is no cut: cut at 2σ it would be 12 % narrower.
# At 5σ the widest numbers, once in millions, are left out
INIT_CUT = 5.0

# The standard deviation of a standard normal cut at two deviations; flax divides by it.
CUT_DEVIATION = 0.87962566103423978

# How sharply `local` heads look at their neighbor, and how much the content still counts. These
# were measured on CIFAR-10 (benchmarks/README.md); no others were tried.
LOCAL_CONTRAST = 2.0
LOCAL_CONTENT = 0.5

# Added to the variances in whitening: a floor for directions in which patches hardly vary.
WHITENING_FLOOR = 1e-2


def truncated_normal(tensor: Tensor, std: float, cut: float = 2.0) -> Tensor:
    """Fill with N(0, std) cut at so many standard deviations, in place."""
    return nn.init.trunc_normal_(tensor, std=std, a=-cut * std, b=cut * std)


@torch.no_grad()
def initialize(model: "VisionTransformer", init: str, init_range: float | None) -> None:
    """Initialize all weights of a VisionTransformer, in place.

    init           matrices and convolutions             MLP biases   positions, registers
    jax            Xavier-uniform attention and MLP,     N(0, 1e-6)   N(0, 0.02)
                   lecun-normal patch embedding and
                   pooler, zero head, as in vit_jax
    xavier         Xavier-uniform                        N(0, 1e-6)   N(0, 0.02)
    trunc_normal   N(0, init_range) cut at 5σ, where     0            as the matrices
                   None stands for 0.02, as in DeiT
    local          as jax, and then each head is pointed at a neighboring patch

    Other biases are 0. The class token is 0, with trunc_normal it is drawn as the positions are.
    Norms keep their ones and zeros. Raises ValueError for another name, and for an init_range that
    is not positive or given with one that has no such range.

    Sources: the code of Dosovitskiy et al. 2021 (github.com/google-research/vision_transformer);
    Glorot & Bengio 2010; Touvron et al. 2021 (DeiT, arXiv:2012.12877).
    """
    if init not in NAMES:
        raise ValueError(f"init must be one of {', '.join(NAMES)}, got {init}")
    if init_range is None:
        init_range = INIT_RANGE
    elif init != "trunc_normal":
        raise ValueError(f"init_range belongs to init=trunc_normal; leave it out with init={init}")
    elif init_range <= 0:
        raise ValueError(f"init_range must be positive, got {init_range}")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            initialize_weight(name, module, init, init_range)
            initialize_bias(name, module, init)
    for name in ("cls_token", "registers", "position_embedding", "distill_token"):
        token = getattr(model.embeddings, name)
        if isinstance(token, nn.Parameter):  # None without, a buffer where positions are fixed
            initialize_token(name, token, init, init_range)
    if model.attention_pool is not None:
        initialize_probe(model.attention_pool.probe, init, init_range)
    if init == "local":
        point_heads_at_neighbors(model)


def initialize_weight(
    name: str, module: nn.Linear | nn.Conv2d, init: str, init_range: float
) -> None:
    """Initialize the matrix or kernel of the module that has this name in the model."""
    weight = module.weight
    if init == "trunc_normal":
        truncated_normal(weight, init_range, INIT_CUT)
    elif init == "xavier":
        # A kernel counts as the matrix that it is for a patch, (out, in · height · width).
        nn.init.xavier_uniform_(weight.flatten(1))
    elif name in ("head", "head_distill"):
        nn.init.zeros_(weight)  # vit_jax starts from equal logits
    elif isinstance(module, nn.Conv2d) or name == "pooler.dense":
        # lecun_normal, the default of flax
        fan_in = weight[0].numel()
        truncated_normal(weight, math.sqrt(1 / fan_in) / CUT_DEVIATION)
    else:
        nn.init.xavier_uniform_(weight)


def initialize_bias(name: str, module: nn.Linear | nn.Conv2d, init: str) -> None:
    """Initialize the bias, if any, of the module that has this name in the model."""
    if module.bias is None:
        return
    nn.init.zeros_(module.bias)
    if ".mlp." in name and init != "trunc_normal":
        nn.init.normal_(module.bias, std=1e-6)


def initialize_token(name: str, token: nn.Parameter, init: str, init_range: float) -> None:
    """Initialize the class token, which stays 0 but with trunc_normal, registers or positions."""
    if init == "trunc_normal":
        truncated_normal(token, init_range, INIT_CUT)
    elif name != "cls_token":
        nn.init.normal_(token, std=0.02)


def initialize_probe(probe: nn.Parameter, init: str, init_range: float) -> None:
    """Initialize the query (1, 1, D) of an AttentionPool, Xavier-uniform as in big_vision."""
    if init == "trunc_normal":
        truncated_normal(probe, init_range, INIT_CUT)
    else:
        nn.init.xavier_uniform_(probe[0])


def point_heads_at_neighbors(model: "VisionTransformer") -> None:
    """Make each head look at one of the 3 × 3 patches around its own at the start.

    So attention begins as a convolution does, with the head's channels as the filters: the idea of
    Zheng et al. 2024 (arXiv:2404.01139), done here by the biases of query and key. With rope2d the
    product of two biases, each rotated by its own patch's position, depends only on the offset Δ
    between the two patches: Σ a² cos(θ(Δ − Δ₀)) is greatest at the chosen offset Δ₀. What depends
    on the content is scaled by LOCAL_CONTENT.

    Raises ValueError for other positions, or without these biases.
    """
    layers = attention_modules(model)
    if model.position != "rope2d" or layers[0].query.bias is None:
        raise ValueError(
            "init=local needs position=rope2d and qkv_bias=true: "
            "the biases of query and key point the heads at their neighbors"
        )
    for attention in layers:
        offsets = neighbor_offsets(len(attention.heads))
        query_bias, key_bias = pointing_biases(offsets, attention.head_size)
        attention.query.bias.copy_(query_bias)
        attention.key.bias.copy_(key_bias)
        attention.query.weight.mul_(LOCAL_CONTENT)
        attention.key.weight.mul_(LOCAL_CONTENT)


def neighbor_offsets(num_heads: int) -> Tensor:
    """A random neighbor for every head, (H, 2): columns and rows from -1 to 1.

    The nine neighbors are dealt out in random order, so that each is taken equally often.
    """
    rounds = -(-num_heads // 9)  # rounded up
    neighbors = torch.cat([torch.randperm(9) for _ in range(rounds)])[:num_heads]
    return torch.stack([neighbors % 3 - 1, neighbors // 3 - 1], dim=1)


def pointing_biases(offsets: Tensor, head_width: int) -> tuple[Tensor, Tensor]:
    """The biases of query and key, (H·K,) each, that point heads at these offsets (H, 2).

    The amplitudes a favor high frequencies θ. They are scaled so that a patch that is off by one
    along one side loses LOCAL_CONTRAST in the softmax's exponent.
    """
    frequencies = rope_frequencies(head_width)  # (K/4,)
    loss_by_one_patch = (frequencies.square() * (1 - frequencies.cos())).sum()
    squares = frequencies.square() / loss_by_one_patch
    # Attention divides the products by √K.
    amplitudes = (LOCAL_CONTRAST * math.sqrt(head_width) * squares).sqrt()

    # A channel pair is a vector in the plane: only the query's is rotated by the offset.
    angles = offsets[..., None] * frequencies  # (H, column and row, K/4)
    query = torch.stack([angles.cos(), angles.sin()], dim=-1) * amplitudes[:, None]
    key = torch.stack([torch.ones_like(angles), torch.zeros_like(angles)], dim=-1)
    key = key * amplitudes[:, None]
    return query.flatten(), key.flatten()


@torch.no_grad()
def whiten_patches(model: "VisionTransformer", images: Tensor) -> None:
    """Start the filters that see pixels as a whitening of the patches of these images, in place.

    These are the patch embedding's, or those of a conv stem's first convolution. Each output
    channel gets unit variance and no two are correlated, as far as the width allows, so that edges
    count as much as brightness. The weights are trained on from there. It is the first layer of
    Jordan 2024 (arXiv:2404.00498, section 3.2), made for patches too.

    images: normalized images of the training set, (n, C, height, width).
    Raises ValueError for a hybrid with a ResNet, whose patches are features and whose convolutions
    standardize their weights.
    """
    filters = pixel_filters(model.embeddings.patch_embedding)
    if filters is None:
        raise ValueError("train.whiten_patches needs patches of pixels; a ResNet's are features")
    # Every pixel once, also where the filters overlap: statistics are alike at any offset, and
    # 3 × 3 patches at each would take nine times the memory
    patches = F.unfold(images, filters.kernel_size, stride=filters.kernel_size)
    patches = patches.transpose(1, 2).flatten(0, 1)  # (all patches, C·P·Q)
    whitening = whitening_matrix(patches)

    # Rotate it at random, so that every channel sees a mixture and not one principal axis. With
    # more channels than pixels they can't all be uncorrelated: then it is a scaled projection.
    channels, size = len(filters.weight), len(whitening)
    larger = max(channels, size)
    # The Q of a random matrix is a random rotation.
    orthogonal = torch.linalg.qr(torch.randn(larger, size, dtype=torch.float64)).Q
    weight = math.sqrt(larger / size) * orthogonal[:channels] @ whitening
    filters.weight.copy_(weight.reshape(filters.weight.shape))


def whitening_matrix(patches: Tensor) -> Tensor:
    """The matrix that gives patches (n, size) unit variance along their principal axes."""
    patches = patches.cpu().double()  # some devices have no float64
    patches = patches - patches.mean(0)
    covariance = patches.T @ patches / len(patches)
    variances, axes = torch.linalg.eigh(covariance)
    return (axes / (variances + WHITENING_FLOOR).sqrt()).T
