"""TODO: say what this file is for."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vit.randomness import random_uniform


def resized_crop_boxes(numbers: Tensor, height: int, width: int, scale: Sequence[float]) -> Tensor:
    """Boxes (B, 4) of top, left, height, width in pixels, for Szegedy et al. 2015's random crop as torchvision draws it.

    numbers (B, 22) in [0, 1): ten tries of an area (a share within `scale`) and an aspect ratio (3/4 to 4/3, uniform in its
    logarithm), of which the first that fits is taken, the whole image where none does; then the place.
    """
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[:, :10])
    ratios = torch.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * numbers[:, 10:20])
    widths, heights = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    return first_fitting(heights, widths, fits, (height, width), numbers[:, 20:], height, width)


def first_fitting(
    heights: Tensor,
    widths: Tensor,
    fits: Tensor,
    otherwise: tuple[int, int],
    places: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Boxes (B, 4) of top, left, height, width: of each image's tries (B, n) the first that `fits`, or one of the size
    `otherwise`, at a place in the image of height x width pixels that `places` (B, 2) in [0, 1) gives."""
    first, found = fits.int().argmax(dim=1, keepdim=True), fits.any(1)
    box_height, box_width = (
        torch.where(found, sides.gather(1, first)[:, 0], float(other))
        for sides, other in zip((heights, widths), otherwise, strict=True)
    )
    top = (places[:, 0] * (height - box_height + 1)).floor()
    left = (places[:, 1] * (width - box_width + 1)).floor()
    return torch.stack([top, left, box_height, box_width], dim=1)


def sample_numbers(seed: int, epochs: Tensor, indices: Tensor, purpose: str, count: int) -> Tensor:
    """(B, count) numbers in [0, 1), each sample's own."""
    return random_uniform(seed, purpose, epochs[:, None], indices[:, None], torch.arange(count))


def box_mask(boxes: Tensor, height: int, width: int, device: torch.device) -> Tensor:
    """Which pixels lie in each image's box: boxes (B, 4) of top, left, height, width → bool (B, 1, height, width)."""
    top, left, box_height, box_width = (
        edge[:, None] for edge in boxes.to(device, non_blocking=True).unbind(1)
    )
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    row_in, column_in = (
        (rows >= top) & (rows < top + box_height),
        (columns >= left) & (columns < left + box_width),
    )
    return (row_in[:, :, None] & column_in[:, None, :])[:, None]


def erasing_boxes(numbers: Tensor, height: int, width: int) -> Tensor:
    """Boxes (B, 4) of top, left, height, width in pixels for random erasing (Zhong et al. 2020, arXiv:1708.04896,
    algorithm 1), of no size where nothing fits.

    numbers (B, 22) in [0, 1): ten tries of an area (0.02 to 1/3 of the image) and an aspect ratio (0.3 to 1/0.3, uniform in its
    logarithm), as timm draws them; then the place.
    """
    areas = height * width * (0.02 + (1 / 3 - 0.02) * numbers[:, :10])
    ratios = torch.exp(math.log(0.3) * (1 - 2 * numbers[:, 10:20]))
    heights, widths = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (widths < width) & (heights < height)
    return first_fitting(heights, widths, fits, (0, 0), numbers[:, 20:], height, width)
