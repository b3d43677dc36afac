"""The ResNet before the patch embedding of the hybrid models.

Dosovitskiy et al. 2021, section 3.1 ("Hybrid Architecture") and appendix D.1.2: a ResNet whose batch norms are group norms
and whose convolutions standardise their weights (Qiao et al. 2019, arXiv:1903.10520; Kolesnikov et al. 2020, BiT).
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The two ways published weights were trained with: (added to what, group norm's epsilon)
STYLES = {"jax": ("deviation", 1e-5, 1e-6), "timm": ("variance", 1e-8, 1e-5)}


def same_padding(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad so that the output has ceil(size / stride) rows and columns, the odd pixel after, as TensorFlow and flax do."""
    (top, bottom), (left, right) = (
        (total // 2, total - total // 2)
        for total in (
            max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]
        )
    )
    return F.pad(x, (left, right, top, bottom), value=value)


class StdConv2d(nn.Conv2d):
    """A convolution without bias whose weights are standardised for each output channel, with SAME padding.

    style jax: (w - μ) / (σ + 1e-5); timm: (w - μ) / √(σ² + 1e-8).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, style: str = "jax"
    ):
        super().__init__(in_channels, out_channels, kernel, stride, bias=False)
        self.added_to, self.epsilon, _ = STYLES[style]

    def forward(self, input: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        deviation = (
            variance.sqrt() + self.epsilon
            if self.added_to == "deviation"
            else (variance + self.epsilon).sqrt()
        )
        kernel, stride = self.kernel_size[0], self.stride[0]
        return F.conv2d(
            same_padding(input, kernel, stride), (self.weight - mean) / deviation, stride=stride
        )


def group_norm(channels: int, style: str) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=STYLES[style][2])


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 convolutions around a shortcut, ReLU after the sum (He et al. 2016)."""

    def __init__(self, in_channels: int, width: int, stride: int, style: str):
        super().__init__()
        self.conv1, self.norm1 = (
            StdConv2d(in_channels, width, 1, style=style),
            group_norm(width, style),
        )
        self.conv2, self.norm2 = StdConv2d(width, width, 3, stride, style), group_norm(width, style)
        self.conv3, self.norm3 = (
            StdConv2d(width, 4 * width, 1, style=style),
            group_norm(4 * width, style),
        )
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
    """(B, C, height, width) → (B, out_channels, height / stride, width / stride).

    stages: the bottleneck units of each; (3, 4, 9) is the paper's R50 before ViT-B/16, stride 16, 1,024 channels.
    style: jax or timm, whose weight standardisation and epsilons differ (see STYLES). Raises ValueError for another.
    """

    def __init__(self, num_channels: int, stages: Sequence[int], style: str = "jax"):
        super().__init__()
        if style not in STYLES:
            raise ValueError(f"resnet_style must be one of {', '.join(STYLES)}, got {style}")
        self.stride, self.out_channels = 2 ** (len(stages) + 1), 256 * 2 ** (len(stages) - 1)
        self.conv, self.norm = StdConv2d(num_channels, 64, 7, 2, style), group_norm(64, style)
        blocks, channels = [], 64
        for stage, units in enumerate(stages):
            width = 64 * 2**stage
            for unit in range(units):
                blocks.append(Bottleneck(channels, width, 2 if stage and not unit else 1, style))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(images)))
        x = F.max_pool2d(same_padding(x, 3, 2, -torch.inf), 3, 2)
        return cast(Tensor, self.blocks(x))
