"""The Vision Transformer, from pixels to logits; read it from top to bottom.

    images (B, C, height, width)
      PatchEmbedding     one linear map of every patch           (B, R·S, D)
      Embeddings         + class token, registers, positions     (B, N, D)
      Encoder            num_layers × Block, then LayerNorm      (B, N, D)
        Block            x + Attention(norm(x)); x + MLP(norm(x))
      pool, Pooler, head class token or mean → linear            (B, num_classes)

Axis letters, used at every reshape: B batch, C channels, N tokens, D width (hidden_size), H heads,
K = D / H width of one head, P patch side, R × S rows × columns of the patch grid, L layers.

`model(images)` computes the logits the fastest way; `model.trace(images)` computes the same by explicit arithmetic and
keeps every hidden state and attention map.

Sources: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (arXiv:2010.11929), equations 1-4 and figure 1, and its
authors' code; later parts name their own papers. docs/names.md has the names that other implementations use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit.model.head_pruning import remove_heads
from vit.model.initialization import initialize
from vit.model.positions import Size, patch_grid, rope2d, rotate, sincos1d, sincos2d
from vit.model.resnet_stem import ResNetStem

if TYPE_CHECKING:
    from vit.data.preprocessing import Preprocessing


class QuickGELU(nn.Module):
    """x σ(1.702 x), the approximation of GELU that CLIP's weights were trained with (Hendrycks & Gimpel 2016, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class PatchEmbedding(nn.Module):
    """Cut images into patches and map each linearly to the model's width (equation 1: x_p E).

    (B, C, height, width) → (B, R·S, D), patches in rows from the top left. The weights are those of a convolution whose
    stride is its kernel; as its patches don't overlap it is computed as one matrix product, which is faster.
    With resnet_stages the patches are cut from a ResNet's features (the paper's hybrid); patch_size is then the total stride.
    """

    def __init__(
        self,
        image_size: Size,
        patch_size: Size | None,
        num_channels: int,
        hidden_size: int,
        grid_size: Size | None = None,
        resnet_stages: Sequence[int] | None = None,
        resnet_style: str = "jax",
    ):
        super().__init__()
        self.image_size, self.patch_size, self.grid_size = patch_grid(
            image_size, patch_size, grid_size
        )
        self.num_patches, self.num_channels = self.grid_size[0] * self.grid_size[1], num_channels
        self.stem = ResNetStem(num_channels, resnet_stages, resnet_style) if resnet_stages else None
        stride, channels = (
            (self.stem.stride, self.stem.out_channels) if self.stem else (1, num_channels)
        )
        if self.patch_size[0] % stride or self.patch_size[1] % stride:
            raise ValueError(
                f"patch_size {self.patch_size} must be a multiple of the ResNet's stride {stride}"
            )
        kernel = (self.patch_size[0] // stride, self.patch_size[1] // stride)
        self.projection = nn.Conv2d(channels, hidden_size, kernel_size=kernel, stride=kernel)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (self.num_channels, *self.image_size):
            raise ValueError(
                f"this model takes images of shape (B, {self.num_channels}, {self.image_size[0]}, "
                f"{self.image_size[1]}), got {tuple(images.shape)}"
            )
        B, C, _, _ = (features := images if self.stem is None else self.stem(images)).shape
        (R, S), (P, Q) = self.grid_size, self.projection.kernel_size
        patches = (
            features.reshape(B, C, R, P, S, Q)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(B, R * S, C * P * Q)
        )
        return F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)


class Embeddings(nn.Module):
    """Patch embeddings plus positions, after a class token and registers, then dropout (equation 1).

    (B, C, height, width) → (B, N, D), N = prefix + patches; prefix = the class token, if any, and the registers (Darcet et
    al. 2024), which have no positions. position: learned (one for the class token too, where cls_position), sincos2d,
    sincos1d (both fixed, zero for the class token), or none; rope2d acts in the attention instead.
    patch_dropout leaves that share of the patches out in training, drawn for each image (Liu et al. 2023, FLIP).
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
    ):
        super().__init__()
        self.patch_embedding = patch_embedding
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if cls_token else None
        self.registers = (
            nn.Parameter(torch.zeros(1, num_registers, hidden_size)) if num_registers else None
        )
        self.num_prefix, self.patch_dropout = int(cls_token) + num_registers, patch_dropout
        self.cls_position = cls_token and cls_position and position == "learned"
        if position == "learned":
            count = patch_embedding.num_patches + int(self.cls_position)
            self.position_embedding = nn.Parameter(torch.zeros(1, count, hidden_size))
        else:
            fixed = {"sincos2d": sincos2d, "sincos1d": sincos1d}.get(position)
            table = None if fixed is None else fixed(patch_embedding.grid_size, hidden_size)[None]
            self.register_buffer("position_embedding", table, persistent=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images)
        prefix = [] if self.cls_token is None else [self.cls_token]
        if self.position_embedding is not None:
            x = x + self.position_embedding[:, int(self.cls_position) :]
            if self.cls_position and self.cls_token is not None:
                prefix = [self.cls_token + self.position_embedding[:, :1]]
        if self.registers is not None:
            prefix.append(self.registers)
        if self.patch_dropout and self.training:
            x = self.drop_patches(x)
        return self.dropout(
            torch.cat(
                [*(token.expand(x.shape[0], -1, -1).to(x.dtype) for token in prefix), x], dim=1
            )
        )

    def drop_patches(self, x: Tensor) -> Tensor:
        """(B, R·S, D) → (B, those kept, D), in their order."""
        kept = max(1, round(x.shape[1] * (1 - self.patch_dropout)))
        chosen = (
            torch.rand(x.shape[:2], device=x.device).argsort(dim=1)[:, :kept].sort(dim=1).values
        )
        return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """softmax(Q Kᵀ / √K) V for (B, H, N, K) each, by the faster way for the device.

    On CPUs with bfloat16 the explicit product is faster than the fused kernel at every length measured
    (benchmarks/README.md); everywhere else the fused one is, and it keeps no N × N matrix.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        return F.dropout(scores.softmax(dim=-1), dropout) @ value
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


class Attention(nn.Module):
    """Multi-head self-attention (appendix A, equations 5-8); (B, N, D) → (B, N, D), or of the first `outputs` tokens alone.

    qk_norm: a LayerNorm on every head's queries and keys (Dehghani et al. 2023, ViT-22B). `heads` holds the numbers of the
    heads that are left after pruning. Raises ValueError unless num_heads is positive and divides hidden_size.
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
        self.heads, self.head_size = list(range(num_heads)), hidden_size // num_heads
        self.query = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.query_norm = (
            nn.LayerNorm(self.head_size, eps=layer_norm_eps) if qk_norm else nn.Identity()
        )
        self.key_norm = (
            nn.LayerNorm(self.head_size, eps=layer_norm_eps) if qk_norm else nn.Identity()
        )
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.attention_dropout = attention_dropout
        self.dropout = nn.Dropout(dropout)

    def qkv(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, ...]:
        """(B, N, D) → query, key and value, (B, H, N, K) each: three matrices, multiplied as one because that is faster."""
        matrices = (self.query, self.key, self.value)
        bias = None if self.query.bias is None else torch.cat([matrix.bias for matrix in matrices])
        product = F.linear(x, torch.cat([matrix.weight for matrix in matrices]), bias)
        query, key, value = (
            product.unflatten(-1, (3, len(self.heads), self.head_size))
            .permute(2, 0, 3, 1, 4)
            .unbind()
        )
        query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        return (
            (query, key, value)
            if rotation is None
            else (rotate(query, rotation), rotate(key, rotation), value)
        )

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, outputs: int | None = None
    ) -> Tensor:
        query, key, value = self.qkv(x, rotation)
        context = attend(
            query[:, :, :outputs], key, value, self.attention_dropout if self.training else 0.0
        )
        context = context.transpose(1, 2).flatten(2)  # (B, H, N, K) → (B, N, H·K)
        return self.dropout(self.projection(context))

    def trace(
        self, x: Tensor, rotation: Tensor | None, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """forward() by explicit arithmetic: (B, N, D) and the probabilities (B, H, N, N). head_mask (H,) or (B, H) scales the
        heads, by their original numbers."""
        query, key, value = self.qkv(x, rotation)
        probabilities = (query @ key.transpose(-2, -1) * self.head_size**-0.5).softmax(dim=-1)
        probabilities = F.dropout(probabilities, self.attention_dropout, self.training)
        masked = (
            probabilities
            if head_mask is None
            else probabilities * head_mask[..., self.heads, None, None]
        )
        context = (masked @ value).transpose(1, 2).flatten(2)
        return self.dropout(self.projection(context)), probabilities


class MLP(nn.Module):
    """Two linear layers with an activation between them and dropout after each; (B, N, D) → (B, N, D)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "gelu",
        dropout: float = 0.0,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation}"
            )
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(x)))))


class LayerScale(nn.Module):
    """A learnt factor for every channel of a residual branch (Touvron et al. 2021, CaiT, arXiv:2103.17239)."""

    def __init__(self, hidden_size: int, initial: float):
        super().__init__()
        self.factor, self.initial = nn.Parameter(torch.full((hidden_size,), initial)), initial

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def drop_path(branch: Tensor, keep: Tensor | None) -> Tensor:
    """Stochastic depth: each image's branch times its own factor, 0 or 1 / keep rate; keep is (B,) or None for all ones."""
    return branch if keep is None else branch * keep[:, None, None].to(branch.dtype)


class Block(nn.Module):
    """One pre-norm encoder layer (equations 2 and 3); (B, N, D) → (B, N, D).

    keep (B, 2): the images' factors on the two branches, see vit.training.draw_drop_path; outputs: as in Attention.
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
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = Attention(
            hidden_size,
            num_heads,
            attention_dropout,
            projection_dropout,
            qkv_bias,
            qk_norm,
            layer_norm_eps,
        )
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(hidden_size, layer_scale)
        self.norm2 = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = MLP(hidden_size, intermediate_size, activation, mlp_dropout)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(hidden_size, layer_scale)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None = None,
        keep: Tensor | None = None,
        outputs: int | None = None,
    ) -> Tensor:
        keep1, keep2 = (None, None) if keep is None else keep.unbind(1)
        x = x[:, :outputs] + drop_path(
            self.scale1(self.attention(self.norm1(x), rotation, outputs)), keep1
        )
        return x + drop_path(self.scale2(self.mlp(self.norm2(x))), keep2)

    def trace(
        self, x: Tensor, rotation: Tensor | None, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """forward() without drop path, and the attention's probabilities (B, H, N, N)."""
        attended, probabilities = self.attention.trace(self.norm1(x), rotation, head_mask)
        x = x + self.scale1(attended)
        return x + self.scale2(self.mlp(self.norm2(x))), probabilities

    def load_from(self, weights: Mapping[str, Tensor], n: int) -> None:
        """Copy block n of a whole model's tensors; raises CheckpointError, changing nothing, where they don't fit."""
        from vit.checkpoints.model import (
            load_weights,
            strip_prefix,  # which imports this module
        )

        load_weights(self, strip_prefix(dict(weights), f"encoder.blocks.{n}."), f"block {n}")


class Encoder(nn.Module):
    """The blocks one after another, then a LayerNorm (equation 4); (B, N, D) → (B, N, D).

    rotation (2, N, K): of rope2d; keep (B, L, 2): see Block; outputs: how many tokens the last block computes, None for all.
    """

    rotation: Tensor | None

    def __init__(
        self,
        blocks: Sequence[Block],
        hidden_size: int,
        layer_norm_eps: float = 1e-6,
        rotation: Tensor | None = None,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.checkpointing = nn.LayerNorm(hidden_size, eps=layer_norm_eps), False
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(self, x: Tensor, keep: Tensor | None = None, outputs: int | None = None) -> Tensor:
        for n, block in enumerate(self.blocks):
            run = (
                partial(checkpoint, block, use_reentrant=False)
                if self.checkpointing and self.training
                else block
            )
            x = run(
                x,
                self.rotation,
                None if keep is None else keep[:, n],
                outputs if n == len(self.blocks) - 1 else None,
            )
        return self.norm(x)


class Pooler(nn.Module):
    """A dense layer and tanh between the pooled token and the head, (B, D) → (B, representation_size): the paper's
    pre-training head (section 3.1: "a MLP with one hidden layer"); BERT's and Hugging Face's pooler."""

    def __init__(self, hidden_size: int, representation_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, representation_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


@dataclass(frozen=True)
class Trace:
    """What VisionTransformer.trace keeps of one pass."""

    logits: Tensor  # (B, num_classes)
    pooled: Tensor  # (B, D or representation_size), the head's input
    sequence: Tensor  # (B, N, D), after the final norm
    hidden_states: tuple[Tensor, ...]  # L + 1 of (B, N, D): the embeddings and each block's output
    attentions: tuple[Tensor, ...]  # L of (B, H, N, N)


class VisionTransformer(nn.Module):
    """A Vision Transformer that classifies images: (B, C, height, width) floats → (B, num_classes) logits.

    image_size, patch_size   pixels, one number or (height, width); the patches must tile the image
    grid_size                patches a side, instead of patch_size (then give patch_size=None)
    num_channels             of the images: 1 grey, 3 RGB
    hidden_size              D, the width of every token; num_heads must divide it
    mlp_ratio                width of the MLP over D, or give the width itself as intermediate_size
    activation               gelu (exact), gelu_tanh, quick_gelu, relu, silu
    dropout                  of the embeddings, the attention's projection and the MLP, where these have no own
                             (embedding_dropout, projection_dropout, mlp_dropout); attention_dropout: on its probabilities
    drop_path                stochastic depth (Huang et al. 2016): the last block's rate; vit.training.draw_drop_path
    position, cls_token, cls_position, num_registers, patch_dropout: see Embeddings
    qk_norm, layer_scale     see Attention, LayerScale (its initial factor, or None)
    global_pool              cls: the class token goes to the head; mean: the mean of the patches does
    representation_size      width of a Pooler before the head, or None
    resnet_stages            units in each stage of the hybrid's ResNet, or None; resnet_style: see ResNetStem
    pruned_heads             {layer: heads to leave out}
    init, init_range         jax, xavier, trunc_normal or local: see vit/initialization.py

    Raises ValueError where a size is not positive, doesn't divide, or a name is unknown.
    Table 1 of the paper: B, L and H; table 1 of Touvron et al. 2021 (arXiv:2012.12877): Ti and S.
    """

    classes: list[str]  # these two are set by vit.load
    preprocessing: "Preprocessing"

    def __init__(
        self,
        *,
        image_size: Size,
        patch_size: Size | None,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        num_classes: int,
        grid_size: Size | None = None,
        num_channels: int = 3,
        mlp_ratio: float = 4.0,
        intermediate_size: int | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
        embedding_dropout: float | None = None,
        attention_dropout: float = 0.0,
        projection_dropout: float | None = None,
        mlp_dropout: float | None = None,
        drop_path: float = 0.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        layer_norm_eps: float = 1e-6,
        position: str = "learned",
        cls_token: bool = True,
        cls_position: bool = True,
        num_registers: int = 0,
        patch_dropout: float = 0.0,
        global_pool: str = "cls",
        representation_size: int | None = None,
        resnet_stages: Sequence[int] | None = None,
        resnet_style: str = "jax",
        pruned_heads: Mapping[int, Sequence[int]] | None = None,
        init: str = "jax",
        init_range: float = 0.02,
    ):
        super().__init__()
        if global_pool not in ("cls", "mean") or (global_pool == "cls" and not cls_token):
            raise ValueError(
                f"global_pool must be cls (then cls_token too) or mean, got {global_pool}, cls_token {cls_token}"
            )
        if position not in ("learned", "sincos2d", "sincos1d", "rope2d", "none"):
            raise ValueError(
                f"position must be learned, sincos2d, sincos1d, rope2d or none, got {position}"
            )
        if position == "rope2d" and patch_dropout:
            raise ValueError(
                "patch_dropout needs positions that travel with the patches; rope2d's don't"
            )
        if min(counts := (num_layers, num_channels, num_classes)) <= 0:
            raise ValueError(
                f"num_layers, num_channels and num_classes must be positive, got {counts}"
            )
        intermediate_size = (
            round(mlp_ratio * hidden_size) if intermediate_size is None else intermediate_size
        )
        own = [
            dropout if rate is None else rate
            for rate in (embedding_dropout, projection_dropout, mlp_dropout)
        ]
        self.global_pool, self.drop_path = global_pool, drop_path
        patches = PatchEmbedding(
            image_size,
            patch_size,
            num_channels,
            hidden_size,
            grid_size,
            resnet_stages,
            resnet_style,
        )
        self.embeddings = Embeddings(
            patches,
            hidden_size,
            own[0],
            cls_token,
            cls_position,
            num_registers,
            position,
            patch_dropout,
        )
        blocks = [
            Block(
                hidden_size,
                num_heads,
                intermediate_size,
                activation,
                own[1],
                own[2],
                attention_dropout,
                qkv_bias,
                layer_norm_eps,
                layer_scale,
                qk_norm,
            )
            for _ in range(num_layers)
        ]
        rotation = (
            None
            if position != "rope2d"
            else rope2d(patches.grid_size, hidden_size // num_heads, self.embeddings.num_prefix)
        )
        self.encoder = Encoder(blocks, hidden_size, layer_norm_eps, rotation)
        self.pooler = (
            Pooler(hidden_size, representation_size) if representation_size else nn.Identity()
        )
        self.head = nn.Linear(representation_size or hidden_size, num_classes)
        initialize(self, init, init_range)
        self.prune_heads(pruned_heads or {})

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """keep (B, L, 2): drop path's factors (vit.training.draw_drop_path); None: every branch is kept."""
        sequence = self.encoder(
            self.embeddings(images), keep, 1 if self.global_pool == "cls" else None
        )
        return self.head(self.pooler(self.pool(sequence)))

    def pool(self, sequence: Tensor) -> Tensor:
        """(B, N, D) → (B, D): the class token, or the mean of the patches without it and the registers."""
        return (
            sequence[:, 0]
            if self.global_pool == "cls"
            else sequence[:, self.embeddings.num_prefix :].mean(dim=1)
        )

    def trace(self, images: Tensor, head_mask: Tensor | None = None) -> Trace:
        """The same logits by explicit arithmetic, with all that lies between; differentiable, also in head_mask.

        head_mask: a factor for every head by its original number, (H,) for all layers, (L, H), or (B, L, H) for each image
        its own; 0 switches a head off.
        """
        hidden_states, attentions = [self.embeddings(images)], []
        for number, block in enumerate(self.encoder.blocks):
            assert isinstance(block, Block)
            mask = (
                head_mask
                if head_mask is None or head_mask.dim() == 1
                else head_mask[..., number, :]
            )
            state, probabilities = block.trace(hidden_states[-1], self.encoder.rotation, mask)
            hidden_states.append(state)
            attentions.append(probabilities)
        sequence = self.encoder.norm(hidden_states[-1])
        pooled = self.pooler(self.pool(sequence))
        return Trace(self.head(pooled), pooled, sequence, tuple(hidden_states), tuple(attentions))

    def prune_heads(self, heads: Mapping[int, Sequence[int]]) -> None:
        """Remove heads for good, {layer: heads by their original numbers}; raises what vit.model.head_pruning.remove_heads does."""
        remove_heads(self, heads)

    @classmethod
    def load_from(cls, path: Path | str, num_classes: int | None = None) -> "VisionTransformer":
        """A model made to fit the weights in a file or folder of any known format; see vit.weights.build."""
        from vit.weights.loading import build  # which imports this module

        return build(path, num_classes)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
