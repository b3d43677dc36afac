"""Random erasing of a normalized batch on the device."""

import functools
import math

import torch
from torch import Tensor

from vit.augment.boxes import NUMBERS_PER_BOX, box_mask, erasing_boxes, sample_numbers
from vit.randomness import more_bits, random_bits, to_uniform
from vit.runtime.device import send, wide_device


def random_erase(
    images: Tensor, epochs: Tensor, indices: Tensor, seed: int, probability: float
) -> Tensor:
    """Fill a box of each image with noise (Zhong et al. 2020, arXiv:1708.04896).

    probability: of erasing an image at all. The noise is standard normal, as the normalized
    pixels are. images float (B, C, height, width); epochs, indices (B,) int64 on the CPU.
    """
    device = images.device
    height, width = images.shape[-2:]
    draw = functools.partial(sample_numbers, seed, epochs, indices)
    # Noise is made for the chosen images alone
    chosen = (draw("erasing", 1)[:, 0] < probability).nonzero()[:, 0]
    boxes = erasing_boxes(draw("erased box", NUMBERS_PER_BOX)[chosen], height, width)
    noise = normal_noise(images.shape[1:], epochs[chosen], indices[chosen], seed, device)

    chosen = send(chosen, device)
    in_box = box_mask(boxes, height, width, device)
    erased = torch.where(in_box, noise.to(images.dtype), images[chosen])
    return images.index_copy(0, chosen, erased)


def normal_noise(
    shape: torch.Size, epochs: Tensor, indices: Tensor, seed: int, device: torch.device
) -> Tensor:
    """Standard normal float32 (n, *shape), a function of (seed, epoch, index, pixel)."""
    bits = random_bits(seed, "erasing noise", epochs, indices)[:, None]
    # Hashed on the device where it can, since there is a number for every pixel
    maker = wide_device(device)
    pixels = torch.arange(math.prod(shape), device=maker)
    uniform = to_uniform(more_bits(send(bits, maker), pixels))
    # The inverse of the normal distribution; 0 itself would give minus infinity
    uniform = uniform.clamp(2.0**-25, 1 - 2.0**-24)
    noise = (uniform * 2 - 1).erfinv() * math.sqrt(2)
    return send(noise.reshape(-1, *shape), device)
