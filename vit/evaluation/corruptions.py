"""Small images made worse: noise, blur, brightness, contrast, pixelation and JPEG.

After Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations" (arXiv:1903.12261). The kinds are theirs, without weather, glass, zoom and
elastic transforms. The severities are this project's, so accuracies can be compared with one
another, but not with those published for CIFAR-10-C.

A corrupted image is a function of the image, its number, the kind and the severity. It does not
depend on the batch size.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vit.data.image_files import to_pixels
from vit.randomness import random_seed

# Pixels. In larger images the strengths below would hardly show.
MAX_SIDE = 64

NUM_SEVERITIES = 5

# Images that share one random generator; another number would give other noise
BLOCK = 256


def corrupt(pixels: Tensor, kind: str, severity: int) -> Tensor:
    """Corrupt images, uint8 (n, C, height, width) on the CPU; the result has the same shape.

    kind: a key of CORRUPTIONS. severity: 1 to NUM_SEVERITIES.
    """
    corruption = CORRUPTIONS[kind]
    amount = corruption.amounts[severity - 1]
    corrupted = []
    for number, block in enumerate(pixels.split(BLOCK)):
        generator = torch.Generator().manual_seed(random_seed(severity, kind, number))
        images = corruption.apply(block.float() / 255, amount, generator)
        corrupted.append((images * 255).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(corrupted)


# Each takes images (n, C, height, width) in 0..1, an amount and a random generator, and returns
# images of the same shape.


def gaussian_noise(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    return images + amount * torch.randn(images.shape, generator=generator)


def shot_noise(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(images * amount, generator=generator) / amount


def impulse_noise(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    chance = torch.rand(images.shape, generator=generator)
    images = images.masked_fill(chance < amount / 2, 0)
    return images.masked_fill(chance > 1 - amount / 2, 1)


def brightness(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    return images + amount


def contrast(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    mean = images.mean(dim=(-2, -1), keepdim=True)
    return mean + amount * (images - mean)


def pixelate(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Shrink and enlarge again, each pixel the mean of what it covers, also of parts of pixels.

    With whole pixels the image would shift, and a stronger corruption could look milder.
    """
    height, width = images.shape[-2:]
    small_height = max(1, round(height * amount))
    small_width = max(1, round(width * amount))
    small = box_weights(height, small_height) @ images @ box_weights(width, small_width).T
    return box_weights(small_height, height) @ small @ box_weights(small_width, width).T


def jpeg(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Write each image as a JPEG and read it again."""
    pixels = (images * 255).round().to(torch.uint8)
    return torch.stack([jpeg_round_trip(image, int(amount)) for image in pixels]) / 255


def gaussian_blur(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    sigma = amount * blur_scale(images)
    x, y = kernel_coordinates(3 * sigma)
    weights = torch.exp(-(x**2 + y**2) / (2 * sigma**2))
    return blur(images, weights.expand(len(images), -1, -1))


def defocus_blur(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    radius = amount * blur_scale(images)
    x, y = kernel_coordinates(radius)
    # The edge is softened over a pixel, so that fractions of a pixel count
    weights = (radius + 0.5 - (x**2 + y**2).sqrt()).clamp(0, 1)
    return blur(images, weights.expand(len(images), -1, -1))


def motion_blur(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    length = amount * blur_scale(images)
    x, y = kernel_coordinates(length / 2)
    angle = torch.rand(len(images), 1, 1, generator=generator) * torch.pi
    along = x * angle.cos() + y * angle.sin()
    across = y * angle.cos() - x * angle.sin()
    # A line one pixel wide, its ends softened over a pixel
    weights = (1 - across.abs()).clamp(min=0) * (length / 2 + 0.5 - along.abs()).clamp(0, 1)
    return blur(images, weights)


@dataclass(frozen=True)
class Corruption:
    """A function of this file, and its amounts at the severities 1 to 5."""

    apply: Callable[[Tensor, float, torch.Generator], Tensor]
    amounts: tuple[float, float, float, float, float]


# The amounts are for images of 32 px; lengths in pixels grow with the image's shorter side
CORRUPTIONS = {
    # Standard deviation, of pixels in 0..1
    "gaussian noise": Corruption(gaussian_noise, (0.04, 0.06, 0.08, 0.10, 0.14)),
    # Photons of a white pixel
    "shot noise": Corruption(shot_noise, (500, 250, 120, 70, 40)),
    # Fraction of the values that are set to 0 or 1
    "impulse noise": Corruption(impulse_noise, (0.01, 0.02, 0.04, 0.07, 0.11)),
    # Standard deviation in pixels
    "gaussian blur": Corruption(gaussian_blur, (0.4, 0.6, 0.8, 1.0, 1.4)),
    # Radius of the disc in pixels
    "defocus blur": Corruption(defocus_blur, (0.7, 1.0, 1.3, 1.7, 2.2)),
    # Length of the motion in pixels; its direction is random
    "motion blur": Corruption(motion_blur, (1.5, 2.5, 3.5, 5.0, 7.0)),
    # Added to pixels in 0..1
    "brightness": Corruption(brightness, (0.05, 0.10, 0.15, 0.20, 0.30)),
    # Fraction that is left of the distance to the image's mean
    "contrast": Corruption(contrast, (0.75, 0.50, 0.40, 0.30, 0.15)),
    # Fraction of the side that is left before the image is enlarged again
    "pixelate": Corruption(pixelate, (0.85, 0.75, 0.65, 0.50, 0.35)),
    # Quality
    "jpeg": Corruption(jpeg, (80, 60, 40, 25, 12)),
}


def box_weights(before: int, after: int) -> Tensor:
    """The matrix (after, before) that resizes a line of pixels by area averaging."""
    edges = torch.arange(after + 1.0)[:, None] * before / after
    # How much of each input pixel, and of those left of it, lies right of each edge
    covered = (torch.arange(before + 1.0) - edges).clamp(min=0)
    right_of_start = covered[:-1, 1:] - covered[:-1, :-1]
    right_of_end = covered[1:, 1:] - covered[1:, :-1]
    overlap = right_of_start - right_of_end
    return overlap / overlap.sum(dim=1, keepdim=True)


def blur_scale(images: Tensor) -> float:
    """What lengths that are meant for 32 px are multiplied by."""
    return min(images.shape[-2:]) / 32


def kernel_coordinates(reach: float) -> tuple[Tensor, Tensor]:
    """x and y of a kernel's pixels from its center, (K, K) each; K = 2 · ceil(reach) + 1 or 3."""
    side = torch.arange(-max(1, math.ceil(reach)), max(1, math.ceil(reach)) + 1.0)
    y, x = torch.meshgrid(side, side, indexing="ij")
    return x, y


def blur(images: Tensor, weights: Tensor) -> Tensor:
    """Filter each image (B, C, height, width) with its kernel (B, K, K), repeating the edges.

    The kernels are normalized to a sum of one.
    """
    weights = weights / weights.sum(dim=(-2, -1), keepdim=True)
    B, C, height, width = images.shape
    margin = weights.shape[-1] // 2
    padded = F.pad(images, [margin] * 4, mode="replicate")
    # A group of the convolution is one channel of one image
    channels = padded.reshape(1, B * C, *padded.shape[-2:])
    filters = weights.repeat_interleave(C, dim=0)[:, None]
    return F.conv2d(channels, filters, groups=B * C).reshape(B, C, height, width)


def jpeg_round_trip(image: Tensor, quality: int) -> Tensor:
    """uint8 (C, height, width), compressed and decompressed."""
    array = image.permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=quality)
    return to_pixels(Image.open(file))
