"""TODO: say what this file is for."""

import functools
import math

import torch
from torch import Tensor

from vit.augment.boxes import box_mask, erasing_boxes, sample_numbers
from vit.randomness import random_uniform


def random_erase(
    images: Tensor, epochs: Tensor, indices: Tensor, seed: int, probability: float
) -> Tensor:
    """Random erasing: with `probability`, a box of each image is filled with noise, N(0, 1) as the normalised pixels are.

    images float (B, C, height, width); epochs, indices (B,) int64 on the CPU.
    """
    channels, height, width = images.shape[1:]
    draw = functools.partial(sample_numbers, seed, epochs, indices)
    chosen = (draw("erasing", 1)[:, 0] < probability).nonzero()[:, 0]
    boxes = erasing_boxes(draw("erased box", 22)[chosen], height, width)
    device = images.device
    places = torch.arange(channels * height * width, device=device)
    samples = (
        counter[chosen].to(device, non_blocking=True)[:, None] for counter in (epochs, indices)
    )
    numbers = random_uniform(seed, "erasing noise", *samples, places)
    noise = (numbers.clamp(2.0**-25, 1 - 2.0**-24) * 2 - 1).erfinv() * math.sqrt(2)
    chosen, where = chosen.to(device, non_blocking=True), box_mask(boxes, height, width, device)
    erased = torch.where(
        where, noise.reshape(-1, channels, height, width).to(images.dtype), images[chosen]
    )
    return images.index_copy(0, chosen, erased)
