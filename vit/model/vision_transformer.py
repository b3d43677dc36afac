"""The Vision Transformer, from pixels to logits; read it from top to bottom.

    images (B, C, height, width)
      PatchEmbedding     one linear map of every patch           (B, R·S, D)
      Embeddings         + class token, registers, positions     (B, N, D)
      Encoder            L × Block, then LayerNorm               (B, N, D)
        Block            x + Attention(norm(x)); x + MLP(norm(x))
      pool               the class token, the mean, …            (B, D)
      Pooler, head       an optional hidden layer, a linear map  (B, num_classes)

Axis letters, used at every reshape:

    B  batch            N  tokens                    P × Q  height × width of a patch
    C  channels         D  width (hidden_size)       R × S  rows × columns of the patch grid
    L  layers           H  heads                     K      width of one head, D / H

`model(images)` computes logits the fastest way, `model.features(images)` the head's input alone;
`model.trace(images)` computes both by explicit arithmetic and keeps all states and attention maps.

Sources: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (arXiv:2010.11929), equations 1-4
and figure 1, and its authors' code; later parts name their own papers. docs/names.md lists the
names that other implementations use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit.model.checks import check_counts, check_pooling
from vit.model.head_pruning import remove_heads, select_heads, split_head_mask
from vit.model.initialization import initialize
from vit.model.low_rank import multiply_as_one
from vit.model.mlp import MLP
from vit.model.pooling import AttentionPool, Pooler
from vit.model.positions import (
    Size,
    fixed_positions,
    kept_patches,
    patch_grid,
    rotary_positions,
    rotate,
)
from vit.model.residual import LayerScale, drop_path
from vit.model.stems import Stem, build_stem

if TYPE_CHECKING:
    from vit.data.preprocessing import Preprocessing


class PatchEmbedding(nn.Module):
    """Cut images into patches and map each linearly to the model's width (equation 1: x_p E).

    (B, C, height, width) → (B, R·S, D), patches in raster order from the top left.

    The weights are those of a convolution whose stride is its kernel. As its patches don't overlap,
    it is computed as one matrix product, which is faster. With a stem the patches are cut from the
    features of a ResNet (the paper's hybrid) or ConvStem, and patch_size is the total stride.
    Raises ValueError where sizes don't fit each other, and in forward() for other images.
    """

    def __init__(
        self,
        image_size: Size,
        patch_size: Size | None,
        num_channels: int,
        hidden_size: int,
        grid_size: Size | None = None,
        stem: Stem | None = None,
    ):
        super().__init__()
        sizes = patch_grid(image_size, patch_size, grid_size)
        self.image_size, self.patch_size, self.grid_size = sizes
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.num_channels = num_channels

        self.stem = stem
        stride, features = 1, num_channels
        if stem is not None:
            stride, features = stem.stride, stem.out_channels
        height, width = self.patch_size
        if height % stride or width % stride:
            raise ValueError(
                f"patch_size {self.patch_size} must be a multiple of the stem's stride {stride}"
            )
        kernel = (height // stride, width // stride)
        self.projection = nn.Conv2d(features, hidden_size, kernel_size=kernel, stride=kernel)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (self.num_channels, *self.image_size):
            height, width = self.image_size
            raise ValueError(
                f"this model takes images of shape (B, {self.num_channels}, {height}, {width}), "
                f"got {tuple(images.shape)}"
            )
        features = images if self.stem is None else self.stem(images)
        B, C = features.shape[:2]
        (R, S), (P, Q) = self.grid_size, self.projection.kernel_size
        patches = features.reshape(B, C, R, P, S, Q)
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, R, S, C, P, Q)
        patches = patches.reshape(B, R * S, C * P * Q)
        return F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)


class Embeddings(nn.Module):
    """Patch embeddings plus positions, after the class token and registers (equation 1).

    (B, C, height, width) → (B, N, D), where N = prefix + patches.

    cls_token       put a learned token before the patches, to pool the image in
    distill_token   a second class token with a head of its own, after the first (Touvron et al.
                    2021, DeiT, arXiv:2012.12877); it has no position
    num_registers   learned tokens after those that nothing reads (Darcet et al. 2024,
                    arXiv:2309.16588); they have no position
    position        learned; sincos2d or sincos1d (both fixed, zero for the class token); none.
                    rope2d and rope_dinov3 act in the attention and add nothing here
    cls_position    whether the class token has a learned position too
    patch_dropout   the fraction of patches left out in training, other ones for each image
                    (Liu et al. 2023, PatchDropout, arXiv:2208.07220); not with rope2d, rope_dinov3
    pre_norm        a LayerNorm on all tokens, as in CLIP (Radford et al. 2021, arXiv:2103.00020)

    Raises ValueError for an unknown position, or one that doesn't go with the sizes.
    """

    def __init__(
        self,
        patch_embedding: PatchEmbedding,
        hidden_size: int,
        dropout: float = 0.0,
        cls_token: bool = True,
        cls_position: bool = True,
        num_registers: int = 0,
        position: str = "learned",
        patch_dropout: float = 0.0,
        distill_token: bool = False,
        pre_norm: bool = False,
        layer_norm_eps: float = 1e-6,
    ):
        super().__init__()
        if patch_dropout and position in ("rope2d", "rope_dinov3"):
            raise ValueError(
                f"patch_dropout needs positions that are added to the patches, not {position}"
            )
        self.patch_embedding = patch_embedding
        self.patch_dropout = patch_dropout
        self.num_prefix = int(cls_token) + int(distill_token) + num_registers
        self.cls_token = None
        if cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.distill_token = None
        if distill_token:
            self.distill_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.registers = None
        if num_registers:
            self.registers = nn.Parameter(torch.zeros(1, num_registers, hidden_size))

        self.cls_position = cls_token and cls_position and position == "learned"
        if position == "learned":
            num_positions = patch_embedding.num_patches + int(self.cls_position)
            self.position_embedding = nn.Parameter(torch.zeros(1, num_positions, hidden_size))
        else:
            table = fixed_positions(position, patch_embedding.grid_size, hidden_size)
            # It can be computed again, so it isn't saved with the weights.
            self.register_buffer("position_embedding", table, persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps) if pre_norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images)  # (B, R·S, D)
        if self.position_embedding is not None:
            x = x + self.position_embedding[:, int(self.cls_position) :]
        # After the positions, so that the patches that stay keep theirs
        if self.patch_dropout and self.training:
            x = self.drop_patches(x)
        prefix = [token.expand(x.shape[0], -1, -1).to(x.dtype) for token in self.prefix_tokens()]
        return self.norm(self.dropout(torch.cat([*prefix, x], dim=1)))

    def prefix_tokens(self) -> list[Tensor]:
        """The tokens before the patches, (1, count, D) each, the class token with its position."""
        tokens = []
        if self.cls_token is not None:
            cls_token = self.cls_token
            if self.cls_position and self.position_embedding is not None:
                cls_token = cls_token + self.position_embedding[:, :1]
            tokens.append(cls_token)
        if self.distill_token is not None:
            tokens.append(self.distill_token)
        if self.registers is not None:
            tokens.append(self.registers)
        return tokens

    def drop_patches(self, x: Tensor) -> Tensor:
        """Keep a random subset of each image's patches, in order: (B, R·S, D) → (B, kept, D)."""
        B, num_patches, D = x.shape
        num_kept = kept_patches(num_patches, self.patch_dropout)
        order = torch.rand(B, num_patches, device=x.device).argsort(dim=1)
        kept = order[:, :num_kept].sort(dim=1).values
        return x.gather(1, kept[..., None].expand(-1, -1, D))


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """softmax(Q Kᵀ / √K) V for (B, H, N, K) each, by the faster way for the device.

    On CPUs with bfloat16 the explicit product is faster than the fused kernel at every length
    measured (benchmarks/README.md). Everywhere else the fused one is, and it keeps no N × N matrix.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        return F.dropout(scores.softmax(dim=-1), dropout) @ value
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


class Attention(nn.Module):
    """Multi-head self-attention (appendix A, equations 5-8): (B, N, D) → (B, N, D).

    qk_norm puts a LayerNorm on every head's queries and keys (Dehghani et al. 2023, ViT-22B,
    arXiv:2302.05442). The attribute `heads` holds the original numbers of the heads that are left
    after pruning. Raises ValueError unless num_heads is positive and divides hidden_size.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_norm_eps: float = 1e-6,
    ):
        super().__init__()
        if num_heads <= 0 or hidden_size % num_heads:
            raise ValueError(
                f"num_heads must be positive and divide hidden_size {hidden_size}, got {num_heads}"
            )
        self.heads = list(range(num_heads))
        self.head_size = hidden_size // num_heads
        self.query = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.query_norm = nn.Identity()
        self.key_norm = nn.Identity()
        if qk_norm:
            self.query_norm = nn.LayerNorm(self.head_size, eps=layer_norm_eps)
            self.key_norm = nn.LayerNorm(self.head_size, eps=layer_norm_eps)
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.attention_dropout = attention_dropout
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, outputs: int | None = None
    ) -> Tensor:
        """rotation (2, N, K): of rope2d. outputs: compute the first tokens alone, None for all."""
        query, key, value = self.qkv(x, rotation)
        dropout = self.attention_dropout if self.training else 0.0
        # Also where few outputs are computed, they attend to all tokens.
        context = attend(query[:, :, :outputs], key, value, dropout)
        context = context.transpose(1, 2).flatten(2)  # (B, H, N, K) → (B, N, H·K)
        return self.dropout(self.projection(context))

    def qkv(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) → query, key and value, (B, H, N, K) each.

        They are three matrices, multiplied as one because that is faster.
        """
        product = multiply_as_one((self.query, self.key, self.value), x)  # (B, N, 3·H·K)
        product = product.unflatten(-1, (3, len(self.heads), self.head_size))
        # Not by chunk(): compiled for a CPU, that may write out of bounds (benchmarks/README.md).
        query, key, value = product.permute(2, 0, 3, 1, 4).unbind()

        # Under autocast the norms give float32; the fused attention wants one type.
        query = self.query_norm(query).to(value.dtype)
        key = self.key_norm(key).to(value.dtype)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return query, key, value

    def trace(
        self, x: Tensor, rotation: Tensor | None, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """forward() by explicit arithmetic: the output (B, N, D), the probabilities (B, H, N, N).

        head_mask: (H,) or (B, H), a factor for every head by its original number.
        """
        query, key, value = self.qkv(x, rotation)
        scores = query @ key.transpose(-2, -1) * self.head_size**-0.5
        probabilities = F.dropout(scores.softmax(dim=-1), self.attention_dropout, self.training)
        masked = probabilities
        if head_mask is not None:
            masked = probabilities * select_heads(self, head_mask, len(x))
        context = (masked @ value).transpose(1, 2).flatten(2)  # (B, N, H·K)
        return self.dropout(self.projection(context)), probabilities


class Block(nn.Module):
    """One pre-norm encoder layer (equations 2 and 3): (B, N, D) → (B, N, D).

    layer_scale: the initial factor of a LayerScale on both branches, or None for none.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        activation: str = "gelu",
        projection_dropout: float = 0.0,
        mlp_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        qkv_bias: bool = True,
        layer_norm_eps: float = 1e-6,
        layer_scale: float | None = None,
        qk_norm: bool = False,
        gated_mlp: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        dropouts = (attention_dropout, projection_dropout)
        self.attention = Attention(
            hidden_size, num_heads, *dropouts, qkv_bias, qk_norm, layer_norm_eps
        )
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(hidden_size, layer_scale)
        self.norm2 = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = MLP(hidden_size, intermediate_size, activation, mlp_dropout, gated_mlp)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(hidden_size, layer_scale)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None = None,
        keep: Tensor | None = None,
        outputs: int | None = None,
    ) -> Tensor:
        """keep (B, 2): drop path's factors for both branches; rotation, outputs: see Attention."""
        keep1, keep2 = (None, None) if keep is None else keep.unbind(1)
        attended = self.scale1(self.attention(self.norm1(x), rotation, outputs))
        x = x[:, :outputs] + drop_path(attended, keep1)
        return x + drop_path(self.scale2(self.mlp(self.norm2(x))), keep2)

    def trace(
        self, x: Tensor, rotation: Tensor | None, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """forward() without drop path, and the attention's probabilities (B, H, N, N)."""
        attended, probabilities = self.attention.trace(self.norm1(x), rotation, head_mask)
        x = x + self.scale1(attended)
        return x + self.scale2(self.mlp(self.norm2(x))), probabilities

    def load_from(self, weights: Path | str | Mapping[str, Any], n: int) -> None:
        """Copy block n of a whole model: a file or folder of any format, tensors under the names of
        VisionTransformer.state_dict(), or Google's arrays (a mapping, or an open np.load(file)).

        Raises CheckpointError, and changes nothing, where they don't fit.
        """
        from vit.weights.loading import load_block  # it imports this module

        load_block(self, weights, n)


class Encoder(nn.Module):
    """The blocks one after another, then a LayerNorm (equation 4): (B, N, D) → (B, N, D).

    rotation (2, N, K): of rotary positions, or None. norm_last: whether the norm is computed here;
    else the pooling computes it. With `checkpointing` set, training recomputes each
    block's activations in the backward pass and so keeps none of them.
    """

    rotation: Tensor | None

    def __init__(
        self,
        blocks: Sequence[Block],
        hidden_size: int,
        layer_norm_eps: float = 1e-6,
        rotation: Tensor | None = None,
        norm_last: bool = True,
    ):
        super().__init__()
        self.norm_last = norm_last
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.checkpointing = False
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(self, x: Tensor, keep: Tensor | None = None, outputs: int | None = None) -> Tensor:
        """keep (B, L, 2): see Block; outputs: how many tokens the last block computes, or None."""
        last = len(self.blocks) - 1
        for n, block in enumerate(self.blocks):
            run = block
            # A frozen block, which is not in training, keeps no activations anyway
            if self.checkpointing and block.training:
                run = partial(checkpoint, block, use_reentrant=False)
            block_keep = None if keep is None else keep[:, n]
            x = run(x, self.rotation, block_keep, outputs if n == last else None)
        return self.finish(x)

    def finish(self, x: Tensor) -> Tensor:
        """What follows the last block, (B, N, D) → (B, N, D)."""
        return self.norm(x) if self.norm_last else x


@dataclass(frozen=True)
class Trace:
    """What VisionTransformer.trace keeps of one forward pass."""

    logits: Tensor  # (B, num_classes)
    pooled: Tensor  # (B, D, 2·D with cls_mean, or representation_size), the head's input
    sequence: Tensor  # (B, N, D), after the final norm, or before it with fc_norm
    hidden_states: tuple[Tensor, ...]  # L + 1 of (B, N, D): the embeddings and each block's output
    attentions: tuple[Tensor, ...]  # L of (B, H, N, N)


class VisionTransformer(nn.Module):
    """A Vision Transformer that classifies images: (B, C, height, width) → (B, num_classes) logits.

    image_size, patch_size   pixels, one number or (height, width); the patches must tile the image
    hidden_size              D, the width of every token; num_heads must divide it
    num_layers, num_heads    L, the number of blocks, and H, the heads in each
    num_classes              the number of logits
    grid_size                patches a side, instead of patch_size (then give patch_size=None)
    num_channels             of the images: 1 gray, 3 RGB
    mlp_ratio                width of the MLP's hidden layer over D,
    intermediate_size        or that width itself
    activation               gelu (exact), gelu_tanh, quick_gelu, relu, relu2, silu
    dropout                  the rate of the other three where these are None: embedding_dropout
                             after the embeddings, projection_dropout after the attention's
                             projection, mlp_dropout after both layers of the MLP
    attention_dropout        on the attention's probabilities
    drop_path                stochastic depth (Huang et al. 2016, arXiv:1603.09382): the rate of the
                             last block; training draws the factors and gives them to forward()
    gated_mlp                see MLP
    qkv_bias                 whether query, key and value have biases
    qk_norm, layer_scale     see Attention and Block
    layer_norm_eps           of every LayerNorm
    position, cls_token, cls_position, distill_token, num_registers, patch_dropout, pre_norm: see
                             Embeddings
    global_pool              what goes to the head. cls: the class token; mean: the patches' mean;
                             cls_mean: both, one after the other; map: see AttentionPool
    fc_norm                  with mean: whether the last LayerNorm comes after it, not before
    representation_size      width of a Pooler before the head, or None for no Pooler
    resnet_stages            bottleneck units in each stage of the hybrid's ResNet, or None
    resnet_style             jax or timm, see ResNetStem
    conv_stem                channels of each 3×3 convolution before the patches, or None
    conv_stem_strides        their strides (None: 2 for each), see ConvStem
    pruned_heads             {layer: heads to leave out}
    init, init_range         jax, xavier, trunc_normal (init_range is of it alone; None: 0.02) or
                             local, see vit/model/initialization.py

    Raises ValueError where a size is not positive or doesn't divide, or a name is unknown.
    Table 1 of the paper has the sizes B, L and H, table 1 of Touvron et al. 2021 (DeiT,
    arXiv:2012.12877) Ti and S.
    """

    classes: list[str]  # these two are set by vit.load
    preprocessing: "Preprocessing"
    separate_heads = False  # set where a teacher gives each head a loss of its own

    # Related arguments share a line, in the order of the table above.
    def __init__(
        self,
        *,
        image_size: Size, patch_size: Size | None,
        hidden_size: int, num_layers: int, num_heads: int, num_classes: int,
        grid_size: Size | None = None, num_channels: int = 3,
        mlp_ratio: float = 4.0, intermediate_size: int | None = None, activation: str = "gelu",
        dropout: float = 0.0, embedding_dropout: float | None = None,
        attention_dropout: float = 0.0, projection_dropout: float | None = None,
        mlp_dropout: float | None = None, drop_path: float = 0.0,
        gated_mlp: bool = False, qkv_bias: bool = True, qk_norm: bool = False,
        layer_scale: float | None = None, layer_norm_eps: float = 1e-6,
        position: str = "learned", cls_token: bool = True, cls_position: bool = True,
        distill_token: bool = False, num_registers: int = 0, patch_dropout: float = 0.0,
        pre_norm: bool = False, global_pool: str = "cls", fc_norm: bool = False,
        representation_size: int | None = None,
        resnet_stages: Sequence[int] | None = None, resnet_style: str = "jax",
        conv_stem: Sequence[int] | None = None, conv_stem_strides: Sequence[int] | None = None,
        pruned_heads: Mapping[int, Sequence[int]] | None = None,
        init: str = "jax", init_range: float | None = None,
    ):  # fmt: skip
        super().__init__()
        check_counts(num_layers, num_channels, num_classes)
        check_pooling(global_pool, cls_token, distill_token, fc_norm)
        if intermediate_size is None:
            intermediate_size = round(mlp_ratio * hidden_size)
        embedding_dropout, projection_dropout, mlp_dropout = (
            dropout if rate is None else rate
            for rate in (embedding_dropout, projection_dropout, mlp_dropout)
        )
        self.hidden_size, self.position = hidden_size, position
        self.global_pool, self.drop_path = global_pool, drop_path

        # From pixels to tokens
        pixels = (image_size, patch_size, num_channels)
        stem = build_stem(num_channels, resnet_stages, resnet_style, conv_stem, conv_stem_strides)
        patches = PatchEmbedding(*pixels, hidden_size, grid_size, stem)
        tokens = (cls_token, cls_position, num_registers, position, patch_dropout)
        extras = (distill_token, pre_norm, layer_norm_eps)
        self.embeddings = Embeddings(patches, hidden_size, embedding_dropout, *tokens, *extras)

        # From tokens to tokens
        sizes = (hidden_size, num_heads, intermediate_size, activation)
        dropouts = (projection_dropout, mlp_dropout, attention_dropout)
        variants = (qkv_bias, layer_norm_eps, layer_scale, qk_norm, gated_mlp)
        blocks = [Block(*sizes, *dropouts, *variants) for _ in range(num_layers)]
        grid = (patches.grid_size, hidden_size // num_heads, self.embeddings.num_prefix)
        rotation = rotary_positions(position, *grid)
        self.encoder = Encoder(blocks, hidden_size, layer_norm_eps, rotation, not fc_norm)

        # From tokens to logits
        is_map = global_pool == "map"
        self.attention_pool = AttentionPool(*sizes, layer_norm_eps) if is_map else None
        width = hidden_size * (2 if global_pool == "cls_mean" else 1)
        self.pooler = Pooler(width, representation_size) if representation_size else nn.Identity()
        self.head = nn.Linear(representation_size or width, num_classes)
        self.head_distill = nn.Linear(hidden_size, num_classes) if distill_token else None

        initialize(self, init, init_range)
        self.prune_heads(pruned_heads or {})

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B, L, 2): drop path's factors for the two branches of every block, or None.

        Training draws them (draw_drop_path in vit/training/step.py); None keeps every branch.
        """
        return self.classify(self.encode(images, keep))

    def features(self, images: Tensor) -> Tensor:
        """The head's input by the fast path, Trace.pooled: (B, D); other widths see there."""
        return self.pooler(self.pool(self.encode(images)))

    def encode(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """The encoder's output (B, N, D), with global_pool=cls of the class tokens alone."""
        # Where class tokens are pooled, nothing reads the last block's other tokens.
        outputs = None
        if self.global_pool == "cls":
            outputs = 1 if self.head_distill is None else 2
        return self.encoder(self.embeddings(images), keep, outputs)

    def classify(self, sequence: Tensor) -> Tensor:
        """The encoder's output (B, N, D) → (B, num_classes), with two heads the mean of both.

        With `separate_heads`, training gets both as they are, (B, 2, num_classes).
        """
        logits = self.head(self.pooler(self.pool(sequence)))
        if self.head_distill is None:
            return logits
        of_teacher = self.head_distill(sequence[:, 1])
        if self.separate_heads and self.training:
            return torch.stack([logits, of_teacher], dim=1)
        return (logits + of_teacher) / 2

    def pool(self, sequence: Tensor) -> Tensor:
        """The encoder's output (B, N, D) → (B, D): of class token or patches; of both (B, 2·D)."""
        if self.global_pool == "cls":
            return sequence[:, 0]
        patches = sequence[:, self.embeddings.num_prefix :]
        if self.attention_pool is not None:
            return self.attention_pool(patches)
        mean = patches.mean(dim=1)
        if self.global_pool == "cls_mean":
            return torch.cat([sequence[:, 0], mean], dim=1)
        return mean if self.encoder.norm_last else self.encoder.norm(mean)

    def trace(self, images: Tensor, head_mask: Tensor | None = None) -> Trace:
        """The same logits by explicit arithmetic, with everything that lies between.

        It is differentiable, also in head_mask: a factor for every head by its original number, of
        shape (H,) for all layers, (L, H), or (B, L, H) for each image; 0 switches a head off.
        Raises ValueError for other shapes.
        """
        masks = split_head_mask(self, head_mask, len(images))
        hidden_states, attentions = [self.embeddings(images)], []
        for block, mask in zip(self.encoder.blocks, masks, strict=True):
            assert isinstance(block, Block)
            x, probabilities = block.trace(hidden_states[-1], self.encoder.rotation, mask)
            hidden_states.append(x)
            attentions.append(probabilities)
        sequence = self.encoder.finish(hidden_states[-1])
        pooled = self.pooler(self.pool(sequence))
        logits = self.classify(sequence)
        return Trace(logits, pooled, sequence, tuple(hidden_states), tuple(attentions))

    def prune_heads(self, heads: Mapping[int, Sequence[int]]) -> None:
        """Remove {layer: heads by their original numbers} for good, as remove_heads describes."""
        remove_heads(self, heads)

    @classmethod
    def load_from(cls, path: Path | str, num_classes: int | None = None) -> "VisionTransformer":
        """Build a model that fits weights of any known format; see vit.weights.loading.build."""
        from vit.weights.loading import build  # it imports this module

        return build(path, num_classes)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
