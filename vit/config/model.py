"""TODO: say what this file is for."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

# OmegaConf refuses any word but the members' names, and names these.
Activation = Enum(
    "Activation",
    {
        "gelu": "gelu",
        "gelu_tanh": "gelu_tanh",
        "quick_gelu": "quick_gelu",
        "relu": "relu",
        "silu": "silu",
    },
)


Position = Enum(
    "Position",
    {
        "learned": "learned",
        "sincos2d": "sincos2d",
        "sincos1d": "sincos1d",
        "rope2d": "rope2d",
        "none": "none",
    },
)


PositionResize = Enum("PositionResize", {"bicubic": "bicubic", "linear": "linear"})


ResnetStyle = Enum("ResnetStyle", {"jax": "jax", "timm": "timm"})


Pool = Enum("Pool", {"cls": "cls", "mean": "mean"})


Init = Enum(
    "Init", {"jax": "jax", "xavier": "xavier", "trunc_normal": "trunc_normal", "local": "local"}
)


@dataclass
class ModelConfig:
    """The keyword arguments of vit.model.VisionTransformer, less num_classes, which the data set gives."""

    name: str = MISSING
    image_size: Any = MISSING  # pixels: one number or [height, width]
    patch_size: Any = (
        MISSING  # pixels: one number or [height, width]; null where grid_size is given
    )
    grid_size: Any = None  # patches a side instead of patch_size
    num_channels: int = 3
    hidden_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    mlp_ratio: float = 4.0
    intermediate_size: int | None = None  # width of the MLP, instead of mlp_ratio
    activation: Activation = Activation.gelu
    dropout: float = (
        0.0  # of the embeddings, the attention's projection and the MLP, where these have no own
    )
    embedding_dropout: float | None = None
    attention_dropout: float = 0.0
    projection_dropout: float | None = None
    mlp_dropout: float | None = None
    drop_path: float = 0.0  # stochastic depth: the last block's rate (train.drop_path_schedule)
    patch_dropout: float = 0.0  # share of the patches left out in training
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None  # initial factor
    layer_norm_eps: float = 1e-6
    position: Position = Position.learned
    cls_token: bool = True
    cls_position: bool = True  # learned: the class token has a position of its own
    num_registers: int = 0
    global_pool: Pool = Pool.cls
    representation_size: int | None = None  # width of a dense + tanh layer before the head
    resnet_stages: list[int] | None = (
        None  # hybrid: units in each stage of the ResNet before the patches
    )
    resnet_style: ResnetStyle = ResnetStyle.jax
    pruned_heads: Any = None  # {layer: [heads to leave out]}
    init: Init = Init.jax
    init_range: float = 0.02
