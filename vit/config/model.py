"""The group `model`: conf/model/*.yaml."""

from dataclasses import dataclass
from typing import Any

from vit.config.settings import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    one_of,
    setting,
)

GRAY_OR_RGB = Range(lambda value: value in (1, 3), "1 (gray) or 3 (RGB)")
STAGES = Range(
    lambda value: len(value) > 0 and all(units > 0 for units in value),
    "a list of positive whole numbers",
)


@dataclass
class ModelConfig:
    """The keyword arguments of vit.model.VisionTransformer, which documents them; the data set
    gives num_classes.
    """

    name: str = setting()
    image_size: Any = setting()  # pixels: one number or [height, width]
    # pixels: one number or [height, width]; null where grid_size is given
    patch_size: Any = setting()
    grid_size: Any = setting()  # patches a side, instead of patch_size
    num_channels: int = setting(GRAY_OR_RGB)
    hidden_size: int = setting(POSITIVE)
    num_layers: int = setting(POSITIVE)
    num_heads: int = setting(POSITIVE)
    mlp_ratio: float = setting(POSITIVE)
    intermediate_size: int | None = setting(POSITIVE)  # width of the MLP, instead of mlp_ratio
    activation: str = setting(one_of("gelu", "gelu_tanh", "quick_gelu", "relu", "silu"))
    dropout: float = setting(BELOW_ONE)
    embedding_dropout: float | None = setting(BELOW_ONE)  # null: dropout
    attention_dropout: float = setting(BELOW_ONE)
    projection_dropout: float | None = setting(BELOW_ONE)  # null: dropout
    mlp_dropout: float | None = setting(BELOW_ONE)  # null: dropout
    drop_path: float = setting(BELOW_ONE)  # stochastic depth, see train.drop_path_schedule
    patch_dropout: float = setting(BELOW_ONE)  # fraction of the patches left out in training
    qkv_bias: bool = setting()
    qk_norm: bool = setting()
    layer_scale: float | None = setting(POSITIVE)  # initial factor
    layer_norm_eps: float = setting(POSITIVE)
    position: str = setting(one_of("learned", "sincos2d", "sincos1d", "rope2d", "none"))
    cls_token: bool = setting()
    cls_position: bool = setting()  # learned positions: the class token has one of its own
    num_registers: int = setting(NOT_NEGATIVE)
    global_pool: str = setting(one_of("cls", "mean"))
    # width of a dense + tanh layer before the head
    representation_size: int | None = setting(POSITIVE)
    resnet_stages: list[int] | None = setting(STAGES)  # hybrid: units in each stage of the ResNet
    resnet_style: str = setting(one_of("jax", "timm"))
    pruned_heads: Any = setting()  # {layer: [heads to leave out]}
    init: str = setting(one_of("jax", "xavier", "trunc_normal", "local"))
    init_range: float = setting(POSITIVE)
