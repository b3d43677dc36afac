"""The Vision Transformer, from pixels to logits; read it from top to bottom.

    images (B, C, height, width)
      PatchEmbedding     one linear map of every patch           (B, N-1, D)
      Embeddings         + class token, + positions, dropout     (B, N, D)
      Encoder            num_layers × Block, then LayerNorm      (B, N, D)
        Block            x + Attention(norm(x)); x + MLP(norm(x))
      pool, head         class token or mean → linear            (B, num_classes)

Axis letters, used at every reshape: B batch, C channels, N tokens, D width (hidden_size), H heads,
K = D / H width of one head, P patch side, R × S rows × columns of the patch grid.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (arXiv:2010.11929), equations 1-4 and
figure 1; the details of initialisation are those of the authors' code where the paper is silent.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from vit.transforms import Preprocessing

Size = int | Sequence[int]

ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def pair(size: Size, name: str) -> tuple[int, int]:
    """(height, width) from one number or two. Raises ValueError unless both are whole and positive."""
    height, width = (size, size) if isinstance(size, int) else (tuple(size) if len(size) == 2 else (0, 0))
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        raise ValueError(f"{name} must be a positive whole number or two of them (height, width), got {size}")
    return height, width


def patch_grid(image_size: Size, patch_size: Size | None, grid_size: Size | None) -> tuple[tuple[int, int], ...]:
    """The image, patch and grid sizes, each (height, width), from the image and either of the other two.

    Raises ValueError where neither or both are given, or where the patches don't tile the image.
    """
    image = pair(image_size, "image_size")
    if (patch_size is None) == (grid_size is None):
        raise ValueError("give patch_size (pixels a patch) or grid_size (patches a side), one of the two")
    name, divisor = ("patch_size", patch_size) if grid_size is None else ("grid_size", grid_size)
    assert divisor is not None
    parts = pair(divisor, name)
    if image[0] % parts[0] or image[1] % parts[1]:
        raise ValueError(f"{name} {parts[0]}x{parts[1]} does not divide image_size {image[0]}x{image[1]}")
    quotient = (image[0] // parts[0], image[1] // parts[1])
    return (image, parts, quotient) if grid_size is None else (image, quotient, parts)


class PatchEmbedding(nn.Module):
    """Cut images into patches and map each linearly to the model's width (equation 1: x_p E).

    (B, C, height, width) → (B, R·S, D), patches in rows from the top left. The weights are those of a convolution whose
    stride is its kernel; as its patches don't overlap it is computed as one matrix product, which is faster.
    """

    def __init__(self, image_size: Size, patch_size: Size | None, num_channels: int, hidden_size: int,
                 grid_size: Size | None = None):
        super().__init__()
        self.image_size, self.patch_size, self.grid_size = patch_grid(image_size, patch_size, grid_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.projection = nn.Conv2d(num_channels, hidden_size, kernel_size=self.patch_size, stride=self.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        B, C, height, width = images.shape
        if (height, width) != self.image_size or self.projection.in_channels != C:
            raise ValueError(f"this model takes images of shape (B, {self.projection.in_channels}, "
                             f"{self.image_size[0]}, {self.image_size[1]}), got {tuple(images.shape)}")
        (R, S), (P, Q) = self.grid_size, self.patch_size
        patches = images.reshape(B, C, R, P, S, Q).permute(0, 2, 4, 1, 3, 5).reshape(B, R * S, C * P * Q)
        return F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)


class Embeddings(nn.Module):
    """Patch embeddings with the class token before them, plus learnt positions, then dropout (equation 1).

    (B, C, height, width) → (B, N, D), N = patches + 1.
    """

    def __init__(self, image_size: Size, patch_size: Size | None, num_channels: int, hidden_size: int,
                 dropout: float = 0.0, grid_size: Size | None = None):
        super().__init__()
        self.patch_embedding = PatchEmbedding(image_size, patch_size, num_channels, hidden_size, grid_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, self.patch_embedding.num_patches + 1, hidden_size))
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images)
        cls_tokens = self.cls_token.expand(images.shape[0], -1, -1).to(patches.dtype)
        return self.dropout(torch.cat([cls_tokens, patches], dim=1) + self.position_embedding)


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
    """Multi-head self-attention (appendix A, equations 5-8); (B, N, D) → (B, N, D).

    Raises ValueError unless num_heads is positive and divides hidden_size.
    """

    def __init__(self, hidden_size: int, num_heads: int, attention_dropout: float = 0.0, dropout: float = 0.0,
                 qkv_bias: bool = True):
        super().__init__()
        if num_heads <= 0 or hidden_size % num_heads:
            raise ValueError(f"num_heads must be positive and divide hidden_size {hidden_size}, got {num_heads}")
        self.num_heads, self.head_size = num_heads, hidden_size // num_heads
        self.query = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.key = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.value = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.projection = nn.Linear(hidden_size, hidden_size)
        self.attention_dropout = attention_dropout
        self.dropout = nn.Dropout(dropout)

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, N, D) → query, key and value, (B, H, N, K) each: three matrices, multiplied as one because that is faster."""
        matrices = (self.query, self.key, self.value)
        bias = None if self.query.bias is None else torch.cat([matrix.bias for matrix in matrices])
        product = F.linear(x, torch.cat([matrix.weight for matrix in matrices]), bias)
        return product.unflatten(-1, (3, self.num_heads, self.head_size)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x)
        context = attend(query, key, value, self.attention_dropout if self.training else 0.0)
        context = context.transpose(1, 2).flatten(2)  # (B, H, N, K) → (B, N, D)
        return self.dropout(self.projection(context))


class MLP(nn.Module):
    """Two linear layers with an activation between them and dropout after each; (B, N, D) → (B, N, D)."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "gelu", dropout: float = 0.0):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation}")
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(x)))))


class Block(nn.Module):
    """One pre-norm encoder layer (equations 2 and 3); (B, N, D) → (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int, activation: str = "gelu",
                 dropout: float = 0.0, attention_dropout: float = 0.0, qkv_bias: bool = True,
                 layer_norm_eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = Attention(hidden_size, num_heads, attention_dropout, dropout, qkv_bias)
        self.norm2 = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = MLP(hidden_size, intermediate_size, activation, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """num_layers blocks, then a LayerNorm (equation 4); (B, N, D) → (B, N, D)."""

    def __init__(self, num_layers: int, hidden_size: int, num_heads: int, intermediate_size: int,
                 activation: str = "gelu", dropout: float = 0.0, attention_dropout: float = 0.0,
                 qkv_bias: bool = True, layer_norm_eps: float = 1e-6):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, intermediate_size, activation, dropout, attention_dropout, qkv_bias,
                  layer_norm_eps)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class VisionTransformer(nn.Module):
    """A Vision Transformer that classifies images: (B, C, height, width) floats → (B, num_classes) logits.

    image_size, patch_size   pixels, one number or (height, width); the patches must tile the image
    grid_size                patches a side, instead of patch_size (then give patch_size=None)
    num_channels             of the images: 1 grey, 3 RGB
    hidden_size              D, the width of every token; num_heads must divide it
    mlp_ratio                width of the MLP over D, or give the width itself as intermediate_size
    activation               gelu (exact), gelu_tanh, relu, silu
    dropout                  after the embeddings, the attention's projection and each layer of the MLP
    attention_dropout        on the attention's probabilities
    global_pool              cls: the class token goes to the head; mean: the mean of the patches does
    init                     jax: the authors' (vit_jax); xavier: every matrix Xavier-uniform (Glorot & Bengio 2010),
                             biases of the MLP N(0, 1e-6); trunc_normal: N(0, init_range) cut at 2σ, as in DeiT

    Raises ValueError where a size is not positive, doesn't divide, or a name is unknown.
    Table 1 of the paper: B, L and H; table 1 of Touvron et al. 2021 (arXiv:2012.12877): Ti and S.
    """

    classes: list[str]  # these two where vit.load() made the model
    preprocessing: "Preprocessing"

    def __init__(self, *, image_size: Size, patch_size: Size | None, hidden_size: int, num_layers: int, num_heads: int,
                 num_classes: int, grid_size: Size | None = None, num_channels: int = 3, mlp_ratio: float = 4.0,
                 intermediate_size: int | None = None, activation: str = "gelu", dropout: float = 0.0,
                 attention_dropout: float = 0.0, qkv_bias: bool = True, layer_norm_eps: float = 1e-6,
                 global_pool: str = "cls", init: str = "jax", init_range: float = 0.02):
        super().__init__()
        if global_pool not in ("cls", "mean"):
            raise ValueError(f"global_pool must be cls or mean, got {global_pool}")
        if min(num_layers, num_channels, num_classes) <= 0:
            raise ValueError("num_layers, num_channels and num_classes must be positive, "
                             f"got {num_layers}, {num_channels} and {num_classes}")
        if intermediate_size is None:
            intermediate_size = round(mlp_ratio * hidden_size)
        self.global_pool = global_pool
        self.embeddings = Embeddings(image_size, patch_size, num_channels, hidden_size, dropout, grid_size)
        self.encoder = Encoder(num_layers, hidden_size, num_heads, intermediate_size, activation, dropout,
                               attention_dropout, qkv_bias, layer_norm_eps)
        self.head = nn.Linear(hidden_size, num_classes)
        self.initialize(init, init_range)

    def forward(self, images: Tensor) -> Tensor:
        sequence = self.encoder(self.embeddings(images))
        return self.head(self.pool(sequence))

    def pool(self, sequence: Tensor) -> Tensor:
        """(B, N, D) → (B, D): the class token, or the mean of the patches without it."""
        return sequence[:, 0] if self.global_pool == "cls" else sequence[:, 1:].mean(dim=1)

    @torch.no_grad()
    def initialize(self, init: str, init_range: float) -> None:
        """Draw every weight anew from torch's default generator; see the class for the three ways."""
        if init not in ("jax", "xavier", "trunc_normal"):
            raise ValueError(f"init must be jax, xavier or trunc_normal, got {init}")
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if init == "trunc_normal":
                    truncated_normal(module.weight, init_range)
                elif init == "xavier":
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                elif name == "head":  # vit_jax starts from equal logits
                    nn.init.zeros_(module.weight)
                elif isinstance(module, nn.Conv2d):  # flax's default, lecun_normal: the variance of what was cut is put back
                    truncated_normal(module.weight, math.sqrt(1 / module.weight[0].numel()) / 0.87962566103423978)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                    if ".mlp." in name and init != "trunc_normal":
                        nn.init.normal_(module.bias, std=1e-6)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.zeros_(self.embeddings.cls_token)
        if init == "trunc_normal":
            truncated_normal(self.embeddings.cls_token, init_range)
            truncated_normal(self.embeddings.position_embedding, init_range)
        else:
            nn.init.normal_(self.embeddings.position_embedding, std=0.02)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def macs(self) -> int:
        """Multiply-adds of one image's forward pass in its matrix products (two FLOPs each; training takes thrice as many).

        Norms, softmax and activations are left out, as is usual; they are under 2 %.
        """
        embedding, blocks = self.embeddings.patch_embedding, self.encoder.blocks
        block = blocks[0]
        assert isinstance(block, Block)
        N, D, M = embedding.num_patches + 1, self.head.in_features, block.mlp.fc1.out_features
        per_block = 4 * N * D * D + 2 * N * N * D + 2 * N * D * M  # q, k, v, projection; Q Kᵀ and its product with V; MLP
        return (embedding.num_patches * embedding.projection.weight.numel() + len(blocks) * per_block
                + D * self.head.out_features)


def truncated_normal(tensor: Tensor, std: float) -> Tensor:
    """N(0, std) cut at two standard deviations, in place."""
    return nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)
