"""Random affine changes of whole images: rotation, translation, scaling and shear in one sampling.

The parameters are torchvision's RandomAffine's, with one difference: what comes in from outside the
image repeats its border instead of being black.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.runtime.device import send

NUMBERS = 5  # an angle, two translations, a scale and a shear


@dataclass(frozen=True)
class Affine:
    """How far images are changed at most; each amount is uniform between -1 and 1 times it.

    rotate     degrees
    translate  fraction of the image's height and width
    scale      the factor is within 1 ± this
    shear      degrees, along the rows
    """

    rotate: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0

    def __bool__(self) -> bool:
        return any((self.rotate, self.translate, self.scale, self.shear))

    def matrices(self, numbers: Tensor, height: int, width: int) -> Tensor:
        """Where each image's output pixels come from: (B, 2, 3), as F.affine_grid takes them.

        numbers: (B, NUMBERS) in [0, 1); height, width: of the image in pixels.
        """
        amounts = (2 * numbers - 1).double()
        rotate, down, right, scale, shear = amounts.unbind(1)
        return inverse_matrices(
            angle=rotate * math.radians(self.rotate),
            right=right * self.translate * width,
            down=down * self.translate * height,
            scale=1 + scale * self.scale,
            shear=shear * math.radians(self.shear),
            height=height,
            width=width,
        )


def inverse_matrices(
    *,
    angle: Tensor,
    right: Tensor,
    down: Tensor,
    scale: Tensor,
    shear: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Invert translation · rotation · shear · scaling about the center; (B, 2, 3) in float32.

    angle, shear: radians; right, down: pixels; all (B,). In coordinates from -1 to 1.
    """
    cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
    # The inverse of rotation times shear, in pixels from the center, x before y
    xx = (cos - sin * tan) / scale
    xy = (sin + cos * tan) / scale
    yx = -sin / scale
    yy = cos / scale
    x0 = -(xx * right + xy * down)
    y0 = -(yx * right + yy * down)
    # From pixels to fractions of half the sides
    row_x = torch.stack([xx, xy * height / width, x0 * 2 / width], dim=1)
    row_y = torch.stack([yx * width / height, yy, y0 * 2 / height], dim=1)
    return torch.stack([row_x, row_y], dim=1).float()


def warp(pixels: Tensor, matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """Sample images bilinearly where matrices (B, 2, 3) say, at another size if need be.

    uint8 (B, C, height, width) → uint8 (B, C, *size), which should not be smaller: the pixels
    between those sampled would be lost. Enlarging in the same sampling blurs once instead of twice.
    """
    device = pixels.device
    x, y = (side_centers(side, device) for side in (size[1], size[0]))
    grid = affine_positions(send(matrices, device), x, y)
    # The outermost pixel centers lie half a pixel within -1 and 1; beyond them the border repeats
    height, width = pixels.shape[-2:]
    for positions, side in ((grid[..., 0], width), (grid[..., 1], height)):
        positions.clamp_(-(1 - 1 / side), 1 - 1 / side)
    warped = F.grid_sample(pixels.float(), grid, align_corners=False)
    return warped.round().to(torch.uint8)


def affine_positions(matrices: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Where output pixels come from, as F.grid_sample takes it: (B, len(y), len(x), 2).

    matrices (B, 2, 3); x, y: the output pixels' centers along both sides. Computed without a matrix
    product, which a GPU may round to ten bits.
    """
    xx, xy, offset = (column[:, :, None, None] for column in matrices.unbind(2))
    positions = xx * x + xy * y[:, None]
    return positions.add_(offset).permute(0, 2, 3, 1)


def side_centers(side: int, device: torch.device) -> Tensor:
    """Centers of the pixels along a side, which reaches from -1 to 1; (side,)."""
    return torch.linspace(-1, 1, side, device=device) * (side - 1) / side
