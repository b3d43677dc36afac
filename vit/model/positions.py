"""The grid of patches and the positions in it: computed ones, and the resizing of learnt ones."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Size = int | Sequence[int]


def pair(size: Size, name: str) -> tuple[int, int]:
    """(height, width) from one number or two. Raises ValueError unless both are whole and positive."""
    height, width = (
        (size, size)
        if isinstance(size, int)
        else (tuple(size) if isinstance(size, Sequence) and len(size) == 2 else (0, 0))
    )
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        raise ValueError(
            f"{name} must be a positive whole number or two of them (height, width), got {size}"
        )
    return height, width


def patch_grid(
    image_size: Size, patch_size: Size | None, grid_size: Size | None
) -> tuple[tuple[int, int], ...]:
    """The image, patch and grid sizes, each (height, width), from the image and either of the other two.

    Raises ValueError where neither or both are given, or where the patches don't tile the image.
    """
    image = pair(image_size, "image_size")
    if (patch_size is None) == (grid_size is None):
        raise ValueError(
            "give patch_size (pixels a patch) or grid_size (patches a side), one of the two"
        )
    name, divisor = ("patch_size", patch_size) if grid_size is None else ("grid_size", grid_size)
    assert divisor is not None
    parts = pair(divisor, name)
    if image[0] % parts[0] or image[1] % parts[1]:
        raise ValueError(
            f"{name} {parts[0]}x{parts[1]} does not divide image_size {image[0]}x{image[1]}"
        )
    quotient = (image[0] // parts[0], image[1] // parts[1])
    return (image, parts, quotient) if grid_size is None else (image, quotient, parts)


def sincos2d(grid_size: tuple[int, int], width: int) -> Tensor:
    """Fixed positions (R·S, D): sin x, cos x, sin y, cos y, a quarter of the width each.

    Beyer et al. 2022 (arXiv:2205.01580) and MoCo v3; frequencies 10000^(-i / (D/4 - 1)) as in the former's code.
    Raises ValueError unless 4 divides the width.
    """
    if width % 4 or width < 8:
        raise ValueError(
            f"position=sincos2d needs a hidden_size that 4 divides, 8 at least, got {width}"
        )
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width // 4 - 1))
    y, x = torch.meshgrid(torch.arange(grid_size[0]), torch.arange(grid_size[1]), indexing="ij")
    angles = [coordinate.flatten()[:, None] * frequencies for coordinate in (x, y)]
    return torch.cat(
        [function(angle) for angle in angles for function in (torch.sin, torch.cos)], dim=1
    )


def sincos1d(grid_size: tuple[int, int], width: int) -> Tensor:
    """Fixed positions (R·S, D) of the patches in raster order: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5.

    Even channels sin, odd ones cos. Raises ValueError for an odd width.
    """
    if width % 2:
        raise ValueError(f"position=sincos1d needs an even hidden_size, got {width}")
    frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(grid_size[0] * grid_size[1])[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def rope_frequencies(head_width: int) -> Tensor:
    """How far rope2d turns each channel pair a patch, in radians: 100^(-i / (K/4)), (K/4,)."""
    return 100.0 ** (-torch.arange(head_width // 4) / (head_width // 4))


def rope2d(grid_size: tuple[int, int], head_width: int, num_prefix: int) -> Tensor:
    """Rotations of queries and keys by the patch's row and column, (2, N, K): cosines and sines.

    Axial: the first half of a head's channels turns with the column, the second with the row, in pairs, with frequencies
    100^(-i / (K/4)) (Heo et al. 2024, arXiv:2403.13298, section 3.1). Prefix tokens are not turned.
    Raises ValueError unless 4 divides the head's width.
    """
    if head_width % 4:
        raise ValueError(f"position=rope2d needs heads whose width 4 divides, got {head_width}")
    frequencies = rope_frequencies(head_width)
    y, x = torch.meshgrid(torch.arange(grid_size[0]), torch.arange(grid_size[1]), indexing="ij")
    angles = torch.cat(
        [coordinate.flatten()[:, None] * frequencies for coordinate in (x, y)], dim=1
    )
    angles = torch.cat([torch.zeros(num_prefix, head_width // 2), angles]).repeat_interleave(
        2, dim=1
    )
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn channel pairs of (B, H, N, K) by rotation (2, N, K)."""
    even, odd = x[..., ::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x * rotation[0] + turned * rotation[1]).to(x.dtype)


def resize_positions(
    positions: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    interpolation: str = "bicubic",
) -> Tensor:
    """Learnt positions (1, prefix + R·S, D) for another grid; those of prefix tokens stay as they are.

    interpolation: bicubic with antialiasing, as timm resizes; or linear without, between the corner patches, as the
    authors' code (scipy's zoom of order 1) does.
    """
    count = old_grid[0] * old_grid[1]
    prefix, patches = positions[:, :-count], positions[:, -count:]
    patches = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2).float()
    if interpolation == "bicubic":
        patches = F.interpolate(
            patches, new_grid, mode="bicubic", antialias=True, align_corners=False
        )
    elif interpolation == "linear":
        patches = F.interpolate(patches, new_grid, mode="bilinear", align_corners=True)
    else:
        raise ValueError(f"interpolation must be bicubic or linear, got {interpolation}")
    return torch.cat([prefix, patches.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)], dim=1)
