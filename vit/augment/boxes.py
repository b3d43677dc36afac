"""Random boxes in images: where to crop and what to erase, from numbers that belong to each sample.

A box is top, left, height and width in pixels, whole numbers in float32; boxes have shape (B, 4).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vit.randomness import random_uniform
from vit.runtime.device import send

NUM_TRIES = 10  # sizes that are tried before a box gives up, as in torchvision and timm
NUMBERS_PER_BOX = 2 * NUM_TRIES + 2  # an area and an aspect ratio for each try, then a position


def sample_numbers(seed: int, epochs: Tensor, indices: Tensor, purpose: str, count: int) -> Tensor:
    """(B, count) numbers in [0, 1), a function of (seed, purpose, epoch, index) for each sample."""
    return random_uniform(seed, purpose, epochs[:, None], indices[:, None], torch.arange(count))


def resized_crop_boxes(numbers: Tensor, height: int, width: int, scale: Sequence[float]) -> Tensor:
    """Boxes (B, 4) of the random crop of Szegedy et al. 2015, with torchvision's distribution.

    numbers (B, NUMBERS_PER_BOX) in [0, 1). Each try has an area, a fraction of the image within
    `scale`, and an aspect ratio from 3/4 to 4/3, uniform in its logarithm. The first try that
    fits is taken, the whole image where none does.
    """
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[:, :NUM_TRIES])
    log_lowest, log_highest = math.log(3 / 4), math.log(4 / 3)
    log_ratios = log_lowest + (log_highest - log_lowest) * numbers[:, NUM_TRIES : 2 * NUM_TRIES]
    ratios = torch.exp(log_ratios)  # of width to height
    # The sides that have this product and this quotient
    widths = (areas * ratios).sqrt().round()
    heights = (areas / ratios).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    box_height, box_width = first_fitting(heights, widths, fits, (height, width))
    return place_boxes(box_height, box_width, numbers[:, 2 * NUM_TRIES :], height, width)


def erasing_boxes(numbers: Tensor, height: int, width: int) -> Tensor:
    """Boxes (B, 4) of random erasing (Zhong et al. 2020, arXiv:1708.04896, algorithm 1).

    numbers (B, NUMBERS_PER_BOX) in [0, 1). Each try has an area of 0.02 to 1/3 of the image and
    an aspect ratio from 0.3 to 1/0.3, uniform in its logarithm, as in timm. Where no try fits,
    the box is empty.
    """
    areas = height * width * (0.02 + (1 / 3 - 0.02) * numbers[:, :NUM_TRIES])
    log_ratios = math.log(0.3) * (1 - 2 * numbers[:, NUM_TRIES : 2 * NUM_TRIES])
    ratios = torch.exp(log_ratios)  # of height to width
    heights = (areas * ratios).sqrt().round()
    widths = (areas / ratios).sqrt().round()
    # Smaller than the image, as in timm, so that something of it remains
    fits = (widths < width) & (heights < height)
    box_height, box_width = first_fitting(heights, widths, fits, (0, 0))
    return place_boxes(box_height, box_width, numbers[:, 2 * NUM_TRIES :], height, width)


def first_fitting(
    heights: Tensor, widths: Tensor, fits: Tensor, fallback: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(heights, widths), (B,) each, of the first try that fits, or of the fallback where none does.

    heights, widths and fits are (B, tries).
    """
    # The first of equal maxima
    first = fits.int().argmax(dim=1, keepdim=True)
    any_fits = fits.any(1)
    # Without one, argmax points at the first try, which is replaced
    box_height = torch.where(any_fits, heights.gather(1, first)[:, 0], float(fallback[0]))
    box_width = torch.where(any_fits, widths.gather(1, first)[:, 0], float(fallback[1]))
    return box_height, box_width


def place_boxes(
    box_height: Tensor, box_width: Tensor, position: Tensor, height: int, width: int
) -> Tensor:
    """Boxes (B, 4) of these sizes somewhere in an image of height x width pixels.

    position (B, 2) in [0, 1): from the first possible row and column to the last.
    """
    top = (position[:, 0] * (height - box_height + 1)).floor()
    left = (position[:, 1] * (width - box_width + 1)).floor()
    return torch.stack([top, left, box_height, box_width], dim=1)


def box_mask(boxes: Tensor, height: int, width: int, device: torch.device) -> Tensor:
    """Boxes (B, 4) → whether a pixel lies in its image's box, bool (B, 1, height, width)."""
    boxes = send(boxes, device)
    top, left, box_height, box_width = (column[:, None] for column in boxes.unbind(1))
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    in_rows = (rows >= top) & (rows < top + box_height)  # (B, height)
    in_columns = (columns >= left) & (columns < left + box_width)  # (B, width)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
