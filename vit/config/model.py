"""The group `model`: conf/model/*.yaml, which hold the values."""

from dataclasses import dataclass, fields
from typing import Any

from vit.config.settings import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    belongs_to,
    one_of,
    setting,
)

GRAY_OR_RGB = Range(lambda value: value in (1, 3), "1 (gray) or 3 (RGB)")
STAGES = Range(
    lambda value: len(value) > 0 and all(units > 0 for units in value),
    "a list of positive whole numbers",
)
# Each is normalized in groups of 16
CHANNELS = Range(
    lambda value: len(value) > 0 and all(count > 0 and count % 16 == 0 for count in value),
    "a list of multiples of 16",
)
STRIDES = Range(lambda value: all(stride in (1, 2) for stride in value), "a list of 1 and 2")


@dataclass
class ModelConfig:
    """The keyword arguments of vit.model.VisionTransformer, which documents them.

    num_classes is not among them: the data set gives it.
    """

    name: str = setting()

    # The input in pixels: one number or [height, width]. Images are resized to it
    image_size: Any = setting()
    # Likewise; null where grid_size, the number of patches a side, is given instead
    patch_size: Any = setting()
    grid_size: Any = setting()
    num_channels: int = setting(GRAY_OR_RGB)

    hidden_size: int = setting(POSITIVE)
    num_layers: int = setting(POSITIVE)
    num_heads: int = setting(POSITIVE)
    mlp_ratio: float = setting(POSITIVE)
    # Width of the MLP, instead of mlp_ratio
    intermediate_size: int | None = setting(POSITIVE)
    activation: str = setting(one_of("gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu"))
    # The activation of one half of the MLP's first layer multiplies the other; silu: SwiGLU
    gated_mlp: bool = setting()

    # The three that may be null take the value of dropout then
    dropout: float = setting(BELOW_ONE)
    embedding_dropout: float | None = setting(BELOW_ONE)
    attention_dropout: float = setting(BELOW_ONE)
    projection_dropout: float | None = setting(BELOW_ONE)
    mlp_dropout: float | None = setting(BELOW_ONE)
    # Stochastic depth: the last block's rate, see train.drop_path_schedule
    drop_path: float = setting(BELOW_ONE)
    # Fraction of the patches left out in training
    patch_dropout: float = setting(BELOW_ONE)

    qkv_bias: bool = setting()
    qk_norm: bool = setting()
    # Initial factor of every residual branch; null: none
    layer_scale: float | None = setting(POSITIVE)
    layer_norm_eps: float = setting(POSITIVE)

    position: str = setting(
        one_of("learned", "sincos2d", "sincos1d", "rope2d", "rope_dinov3", "none")
    )
    cls_token: bool = setting()
    # Whether the class token has a learned position too
    cls_position: bool = setting()
    # A second class token with a head of its own
    distill_token: bool = setting()
    num_registers: int = setting(NOT_NEGATIVE)
    # A LayerNorm before the blocks
    pre_norm: bool = setting()
    global_pool: str = setting(one_of("cls", "mean", "cls_mean", "map"))
    # The last LayerNorm after the mean instead of before it
    fc_norm: bool = setting()
    # Width of a dense + tanh layer before the head; null: none
    representation_size: int | None = setting(POSITIVE)

    # Hybrid: units in each stage of the ResNet before the patches; null: patches of pixels
    resnet_stages: list[int] | None = setting(STAGES)
    resnet_style: str = setting(one_of("jax", "timm"))
    # Another hybrid: channels of each 3 x 3 convolution before the patches; null: none
    conv_stem: list[int] | None = setting(CHANNELS)
    # Null: 2 for each
    conv_stem_strides: list[int] | None = setting(STRIDES)

    # {layer: [heads to leave out]}, as vit.prune writes it into a checkpoint
    pruned_heads: Any = setting()
    init: str = setting(one_of("jax", "xavier", "trunc_normal", "local"))
    # Standard deviation; null: 0.02
    init_range: float | None = setting(POSITIVE, belongs=belongs_to("model.init", "trunc_normal"))


# Sizes are the user's choice, and weights that don't fit are refused
SIZES = (
    "image_size",
    "patch_size",
    "grid_size",
    "num_channels",
    "hidden_size",
    "num_layers",
    "num_heads",
    "mlp_ratio",
    "intermediate_size",
    "representation_size",
    "resnet_stages",
    "conv_stem",
)
# What a trained model does not compute with
OF_TRAINING = (
    "dropout",
    "embedding_dropout",
    "attention_dropout",
    "projection_dropout",
    "mlp_dropout",
    "drop_path",
    "patch_dropout",
    "init",
    "init_range",
)
# What pretrained weights were trained with, and a model must have to compute what they did: a new
# setting of the model is one of them, unless it is named above
MODEL_SETTINGS_OF_WEIGHTS = tuple(
    item.name for item in fields(ModelConfig) if item.name not in ("name", *SIZES, *OF_TRAINING)
)
