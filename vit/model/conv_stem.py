"""A few convolutions before the patch embedding: a light hybrid for small images.

Source: Xiao et al. 2021, "Early Convolutions Help Transformers See Better" (arXiv:2106.14881),
section 4. Its 1×1 convolution at the end is the patch embedding's projection here.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

# Channels that are normalized together
GROUP_SIZE = 16


class ConvLayer(nn.Module):
    """A 3×3 convolution, group norm and GELU, where the paper has batch norm and ReLU.

    A group norm's result for an image depends on that image alone: with batch norm, that of a step
    would depend on how a batch is split into micro-batches and over processes.
    (B, in_channels, height, width) → (B, out_channels, ⌈height / stride⌉, ⌈width / stride⌉)
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        # The norm adds a bias of its own
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(out_channels // GROUP_SIZE, out_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.conv(x)))


class ConvStem(nn.Module):
    """The convolutions: images to features.

    (B, C, height, width) → (B, out_channels, height / stride, width / stride)

    channels: that each convolution gives, multiples of GROUP_SIZE
    strides:  of each convolution, 1 or 2; None: 2 for each, as in the paper's smaller models

    Raises ValueError for other channels or strides, or where they are not as many.
    """

    def __init__(
        self, num_channels: int, channels: Sequence[int], strides: Sequence[int] | None = None
    ):
        super().__init__()
        self.strides = [2] * len(channels) if strides is None else list(strides)
        if any(count <= 0 or count % GROUP_SIZE for count in channels):
            raise ValueError(f"conv_stem must be multiples of {GROUP_SIZE}, got {list(channels)}")
        if len(self.strides) != len(channels) or not set(self.strides) <= {1, 2}:
            raise ValueError(
                f"conv_stem_strides must be 1 or 2 for each of the {len(channels)} convolutions "
                f"of conv_stem, got {self.strides}"
            )
        self.stride = math.prod(self.strides)
        self.out_channels = channels[-1]
        inputs = [num_channels, *channels[:-1]]
        self.layers = nn.ModuleList(map(ConvLayer, inputs, channels, self.strides))

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for layer in self.layers:
            x = layer(x)
        return x

    def convolutions(self) -> list[nn.Conv2d]:
        """The convolutions in the order of the pass; the first one sees pixels."""
        return [cast(ConvLayer, layer).conv for layer in self.layers]
