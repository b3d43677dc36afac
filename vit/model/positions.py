"""Where the patches lie: the grid, its fixed position encodings, and the resizing of learned ones.

Axis letters: R × S rows × columns of the patch grid, D width of the model, N tokens, H heads,
K width of one head.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Size = int | Sequence[int]
Pair = tuple[int, int]  # (height, width)


def pair(size: Size, name: str) -> Pair:
    """Return (height, width) from one number or two.

    Raises ValueError, which names the argument, unless both are positive whole numbers.
    """
    sides = (size, size) if isinstance(size, int) else size
    is_pair = isinstance(sides, Sequence) and len(sides) == 2
    if not is_pair or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(
            f"{name} must be a positive whole number or two of them (height, width), got {size}"
        )
    height, width = sides
    return height, width


def patch_grid(
    image_size: Size, patch_size: Size | None, grid_size: Size | None
) -> tuple[Pair, Pair, Pair]:
    """Work out the image size, the patch size and the grid size from the image and one of the two.

    The patch size is in pixels, the grid size in patches. Raises ValueError where neither or both
    of them are given, or where the patches don't tile the image.
    """
    image = pair(image_size, "image_size")
    if patch_size is not None and grid_size is None:
        patch = pair(patch_size, "patch_size")
        return image, patch, divide(image, patch, "patch_size")
    if grid_size is not None and patch_size is None:
        grid = pair(grid_size, "grid_size")
        return image, divide(image, grid, "grid_size"), grid
    raise ValueError(
        "give either patch_size (pixels a patch) or grid_size (patches a side), exactly one of them"
    )


def divide(image: Pair, parts: Pair, name: str) -> Pair:
    """Divide the image's sides by `parts`, an argument of this name; ValueError for a remainder."""
    if image[0] % parts[0] or image[1] % parts[1]:
        raise ValueError(
            f"{name} {parts[0]}x{parts[1]} does not divide image_size {image[0]}x{image[1]}"
        )
    return image[0] // parts[0], image[1] // parts[1]


def patch_coordinates(grid_size: Pair) -> tuple[Tensor, Tensor]:
    """The column x and the row y of every patch in raster order, (R·S,) each."""
    rows, columns = grid_size
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return x.flatten(), y.flatten()


def sincos2d(grid_size: Pair, width: int) -> Tensor:
    """Fixed positions (R·S, D): sin x, cos x, sin y, cos y, a quarter of the width each.

    Source: MoCo v3 and Beyer et al. 2022 (arXiv:2205.01580); the frequencies
    10000^(-i / (D/4 - 1)) are those of the latter's code.
    Raises ValueError unless the width is a multiple of 4 and at least 8.
    """
    if width % 4 or width < 8:
        raise ValueError(
            f"position=sincos2d needs a hidden_size that 4 divides, 8 at least, got {width}"
        )
    # From 1 to exactly 1/10000, in radians a patch
    frequencies = 10000.0 ** (-torch.arange(width // 4) / (width // 4 - 1))
    x, y = patch_coordinates(grid_size)
    x_angles = x[:, None] * frequencies
    y_angles = y[:, None] * frequencies
    return torch.cat([x_angles.sin(), x_angles.cos(), y_angles.sin(), y_angles.cos()], dim=1)


def sincos1d(grid_size: Pair, width: int) -> Tensor:
    """Fixed positions (R·S, D) of the patches in raster order, sines in the even channels.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5. Raises ValueError for an odd width.
    """
    if width % 2:
        raise ValueError(f"position=sincos1d needs an even hidden_size, got {width}")
    # One frequency for every pair of channels, a sine and a cosine
    frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(grid_size[0] * grid_size[1])[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def kept_patches(num_patches: int, patch_dropout: float) -> int:
    """How many of an image's patches PatchDropout keeps: at least one."""
    return max(1, round(num_patches * (1 - patch_dropout)))


def fixed_positions(position: str, grid_size: Pair, width: int) -> Tensor | None:
    """The fixed positions that are added to the patches, (1, R·S, D), or None where none are.

    Nothing is added by the rotary ones, which act in the attention, and with `none`. Raises
    ValueError for an unknown name.
    """
    if position == "sincos2d":
        return sincos2d(grid_size, width)[None]
    if position == "sincos1d":
        return sincos1d(grid_size, width)[None]
    if position in ("rope2d", "rope_dinov3", "none"):
        return None
    raise ValueError(
        f"position must be learned, sincos2d, sincos1d, rope2d, rope_dinov3 or none, got {position}"
    )


def rope_frequencies(head_width: int) -> Tensor:
    """By how many radians a patch rotates each pair of channels: 100^(-i / (K/4)), (K/4,)."""
    # The base is 100, not 10000 as for text: a grid has tens of patches a side, not thousands.
    return 100.0 ** (-torch.arange(head_width // 4) / (head_width // 4))


def rope2d(grid_size: Pair, head_width: int, num_prefix: int) -> Tensor:
    """Rotations of queries and keys by the patch's row and column: cosines and sines, (2, N, K).

    Axial: the first half of a head's channels rotates with the column, the second half with the
    row, in pairs (Heo et al. 2024, arXiv:2403.13298, section 3.1). The num_prefix tokens before
    the patches are not rotated. Raises ValueError unless 4 divides the head's width.
    """
    if head_width % 4:
        raise ValueError(f"position=rope2d needs heads whose width 4 divides, got {head_width}")
    frequencies = rope_frequencies(head_width)
    x, y = patch_coordinates(grid_size)
    return rotations(
        torch.cat([x[:, None] * frequencies, y[:, None] * frequencies], dim=1), num_prefix
    )


def rope_dinov3(grid_size: Pair, head_width: int, num_prefix: int) -> Tensor:
    """As rope2d, by where a patch lies in the image instead of by its number: (2, N, K).

    The coordinates of the patches' centers run from -1 to 1 whatever the grid, so that a finer one
    is a finer sampling of the same positions. The first half of a head's channels rotates with the
    row. Source: Siméoni et al. 2025, DINOv3 (arXiv:2508.10104), section 3.2, and its code. Raises
    ValueError unless 4 divides the head's width.
    """
    if head_width % 4:
        raise ValueError(
            f"position=rope_dinov3 needs heads whose width 4 divides, got {head_width}"
        )
    frequencies = 2 * math.pi * rope_frequencies(head_width)
    x, y = patch_coordinates(grid_size)
    rows, columns = grid_size
    x, y = 2 * (x + 0.5) / columns - 1, 2 * (y + 0.5) / rows - 1
    return rotations(
        torch.cat([y[:, None] * frequencies, x[:, None] * frequencies], dim=1), num_prefix
    )


def rotations(patch_angles: Tensor, num_prefix: int) -> Tensor:
    """The cosines and sines (2, N, K) of the patches' angles (R·S, K/2), one a pair of channels."""
    # An angle of zero leaves the class token and the registers as they are.
    prefix_angles = torch.zeros(num_prefix, patch_angles.shape[1])
    # Both channels of a pair rotate by the same angle.
    angles = torch.cat([prefix_angles, patch_angles]).repeat_interleave(2, dim=1)  # (N, K)
    return torch.stack([angles.cos(), angles.sin()])


def rotary_positions(
    position: str, grid_size: Pair, head_width: int, num_prefix: int
) -> Tensor | None:
    """The rotations (2, N, K) of a position of this name, or None where nothing is rotated."""
    if position == "rope2d":
        return rope2d(grid_size, head_width, num_prefix)
    if position == "rope_dinov3":
        return rope_dinov3(grid_size, head_width, num_prefix)
    return None


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the channel pairs of queries or keys (B, H, N, K) by rotation (2, N, K)."""
    return Rotation.apply(x, rotation[0], rotation[1])  # pyright: ignore[reportReturnType]


class Rotation(torch.autograd.Function):
    """rotate() with its derivative, which is the rotation back.

    Autograd's own would scatter the gradients of even and odd channels into zeros, which
    torch.compile does not vectorize for CPUs (benchmarks/README.md, "The rotation's derivative").
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        # (a, b) rotated by θ is (a, b) cos θ + (-b, a) sin θ.
        quarter_turn = torch.stack([-odd, even], dim=-1).flatten(-2)
        rotated = x * cosine + quarter_turn * sine
        # The tables are float32; queries and keys keep their type. A cast to the type it has would
        # return the same tensor: compiled by torch 2.11, the function then loses its gradient.
        return rotated if rotated.dtype == x.dtype else rotated.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return Rotation.apply(gradients[0], cosine, -sine), None, None  # pyright: ignore


def resize_positions(
    positions: Tensor, old_grid: Pair, new_grid: Pair, interpolation: str = "bicubic"
) -> Tensor:
    """Resize learned positions (1, prefix + R·S, D) to another grid; the prefix stays as it is.

    interpolation: `bicubic` with antialiasing, as timm resizes, or `linear` without, from corner
    patch to corner patch, as the paper's authors do (scipy's zoom of order 1).
    Raises ValueError for another name.
    """
    num_patches = old_grid[0] * old_grid[1]
    prefix, patches = positions[:, :-num_patches], positions[:, -num_patches:]
    # (1, R·S, D) → (1, D, R, S), the layout of an image; float32, as half precision rounds much
    image = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2).float()
    if interpolation == "bicubic":
        image = F.interpolate(image, new_grid, mode="bicubic", antialias=True, align_corners=False)
    elif interpolation == "linear":
        image = F.interpolate(image, new_grid, mode="bilinear", align_corners=True)
    else:
        raise ValueError(f"interpolation must be bicubic or linear, got {interpolation}")
    patches = image.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat([prefix, patches], dim=1)
