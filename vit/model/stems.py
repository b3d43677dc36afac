"""What may stand before the patch embedding, so that patches are cut from features."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from vit.model.conv_stem import ConvStem
from vit.model.resnet_stem import ResNetStem

if TYPE_CHECKING:
    from vit.model.vision_transformer import PatchEmbedding

Stem = ResNetStem | ConvStem


def build_stem(
    num_channels: int,
    resnet_stages: Sequence[int] | None = None,
    resnet_style: str = "jax",
    conv_stem: Sequence[int] | None = None,
    conv_stem_strides: Sequence[int] | None = None,
) -> Stem | None:
    """Build the stem that these arguments of VisionTransformer ask for, or None for no stem.

    Raises ValueError where they ask for both, give strides to no convolutions, and as the stems do.
    """
    if resnet_stages and conv_stem:
        raise ValueError("resnet_stages and conv_stem are two stems; leave one of them out")
    if conv_stem_strides is not None and not conv_stem:
        raise ValueError("conv_stem_strides does nothing without conv_stem; leave it out")
    if resnet_stages:
        return ResNetStem(num_channels, resnet_stages, resnet_style)
    if conv_stem:
        return ConvStem(num_channels, conv_stem, conv_stem_strides)
    return None


def pixel_filters(embedding: "PatchEmbedding") -> nn.Conv2d | None:
    """The convolution whose filters see pixels; None for a ResNet, which standardizes them."""
    if isinstance(embedding.stem, ResNetStem):
        return None
    return embedding.projection if embedding.stem is None else embedding.stem.convolutions()[0]
