"""The ResNet before the patch embedding of the hybrid models.

Its batch norms are group norms and its convolutions standardize their weights.

Sources: Dosovitskiy et al. 2021 (arXiv:2010.11929), section 3.1 ("Hybrid Architecture") and
appendix D.1.2; Qiao et al. 2019 (arXiv:1903.10520); Kolesnikov et al. 2020 (BiT, arXiv:1912.11370).
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The two styles that published weights were trained with, and their group norm's epsilon.
# They also standardize weights differently, see StdConv2d.
GROUP_NORM_EPS = {"jax": 1e-6, "timm": 1e-5}


def same_padding(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad so that a convolution gives ceil(size / stride) rows and columns.

    An odd pixel goes after the image, as in TensorFlow and flax.
    """
    top, bottom = padding(x.shape[-2], kernel, stride)
    left, right = padding(x.shape[-1], kernel, stride)
    return F.pad(x, (left, right, top, bottom), value=value)


def padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """How many pixels to pad before and after one side."""
    outputs = -(-size // stride)  # rounded up
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class StdConv2d(nn.Conv2d):
    """A convolution with SAME padding, no bias, and weights standardized for each output channel.

    style: `jax` divides by σ + 1e-5, `timm` by √(σ² + 1e-8).
    (B, C, height, width) → (B, out_channels, ⌈height / stride⌉, ⌈width / stride⌉)
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, style: str = "jax"
    ):
        super().__init__(in_channels, out_channels, kernel, stride, bias=False)
        self.style = style

    def forward(self, input: Tensor) -> Tensor:
        # Anew in every pass: the weights that are trained are those before standardization.
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / self.deviation(variance)
        kernel, stride = self.kernel_size[0], self.stride[0]
        return F.conv2d(same_padding(input, kernel, stride), weight, stride=stride)

    def deviation(self, variance: Tensor) -> Tensor:
        """The divisor of the weights; each style keeps it off zero in its own way."""
        if self.style == "jax":
            return variance.sqrt() + 1e-5
        return (variance + 1e-8).sqrt()


def group_norm(channels: int, style: str) -> nn.GroupNorm:
    # 32 groups, as in BiT
    return nn.GroupNorm(32, channels, eps=GROUP_NORM_EPS[style])


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 convolutions around a shortcut, ReLU after the sum.

    Source: He et al. 2016 (arXiv:1512.03385), figure 5.
    (B, in_channels, height, width) → (B, 4·width, height / stride, width / stride)
    """

    def __init__(self, in_channels: int, width: int, stride: int, style: str):
        super().__init__()
        self.conv1 = StdConv2d(in_channels, width, 1, style=style)
        self.norm1 = group_norm(width, style)
        self.conv2 = StdConv2d(width, width, 3, stride, style)
        self.norm2 = group_norm(width, style)
        self.conv3 = StdConv2d(width, 4 * width, 1, style=style)
        self.norm3 = group_norm(4 * width, style)
        nn.init.zeros_(self.norm3.weight)  # every unit starts as its shortcut
        self.downsample = None
        if in_channels != 4 * width or stride != 1:
            self.downsample = nn.Sequential(
                StdConv2d(in_channels, 4 * width, 1, stride, style), group_norm(4 * width, style)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(shortcut + self.norm3(self.conv3(x)))


class ResNetStem(nn.Module):
    """The ResNet without its classifier: images to features.

    (B, C, height, width) → (B, out_channels, height / stride, width / stride)

    stages: the number of bottleneck units in each stage; (3, 4, 9) is the paper's R50 before
            ViT-B/16, with stride 16 and 1,024 channels
    style:  `jax` or `timm`, which differ in weight standardization and epsilons

    Raises ValueError for another style.
    """

    def __init__(self, num_channels: int, stages: Sequence[int], style: str = "jax"):
        super().__init__()
        if style not in GROUP_NORM_EPS:
            known = ", ".join(GROUP_NORM_EPS)
            raise ValueError(f"resnet_style must be one of {known}, got {style}")
        # The root and its pooling halve the image twice, every stage after the first once more.
        self.stride = 2 ** (len(stages) + 1)
        self.out_channels = 256 * 2 ** (len(stages) - 1)
        self.conv = StdConv2d(num_channels, 64, 7, 2, style)
        self.norm = group_norm(64, style)
        blocks, channels = [], 64
        for stage, num_units in enumerate(stages):
            width = 64 * 2**stage
            for unit in range(num_units):
                stride = 2 if stage > 0 and unit == 0 else 1
                blocks.append(Bottleneck(channels, width, stride, style))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(images)))
        # -∞ never wins a maximum.
        x = F.max_pool2d(same_padding(x, 3, 2, -torch.inf), 3, 2)
        return cast(Tensor, self.blocks(x))
