"""Small pictures made worse: noise, blur, brightness, contrast, pixelation, JPEG, at five severities each.

After Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
(arXiv:1903.12261). The kinds are theirs, without weather, glass, zoom and elastic; the severities are this file's own, so the
accuracies can be compared with each other, not with those published for CIFAR-10-C.

Every change is a function of (kind, severity, the image's number): the same whatever the batch size.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vit.randomness import random_seed

MAX_SIDE = 64  # pixels: the strengths below would hardly be seen in larger pictures


# Mild to strong, for pictures of 32 px. Lengths grow with the picture's shorter side, everything else is as it stands.
SEVERITIES: dict[str, tuple[float, ...]] = {
    "gaussian noise": (0.04, 0.06, 0.08, 0.10, 0.14),  # standard deviation, of pixels in 0..1
    "shot noise": (500, 250, 120, 70, 40),  # photons of a white pixel
    "impulse noise": (0.01, 0.02, 0.04, 0.07, 0.11),  # share of the values set to 0 or 1
    "gaussian blur": (0.4, 0.6, 0.8, 1.0, 1.4),  # standard deviation, pixels
    "defocus blur": (0.7, 1.0, 1.3, 1.7, 2.2),  # radius of the disc, pixels
    "motion blur": (1.5, 2.5, 3.5, 5.0, 7.0),  # length of the way, pixels; its direction is random
    "brightness": (0.05, 0.10, 0.15, 0.20, 0.30),  # added to pixels in 0..1
    "contrast": (
        0.75,
        0.50,
        0.40,
        0.30,
        0.15,
    ),  # share that is left of the distance to the picture's mean
    "pixelate": (0.85, 0.75, 0.65, 0.50, 0.35),  # share of the side that is left, enlarged again
    "jpeg": (80, 60, 40, 25, 12),  # quality
}


BLOCK = 256  # images that share one random generator


def corrupt(pixels: Tensor, kind: str, severity: int) -> Tensor:
    """uint8 (n, C, height, width) on the CPU → the same shape; kind: of SEVERITIES, severity: 1 to 5."""
    amount = SEVERITIES[kind][severity - 1]
    return torch.cat(
        [
            corrupt_block(
                block,
                kind,
                amount,
                torch.Generator().manual_seed(random_seed(severity, kind, number)),
            )
            for number, block in enumerate(pixels.split(BLOCK))
        ]
    )


def corrupt_block(pixels: Tensor, kind: str, amount: float, generator: torch.Generator) -> Tensor:
    if kind == "jpeg":
        return torch.stack([jpeg(picture, int(amount)) for picture in pixels])
    images = pixels.float() / 255
    scale = min(images.shape[-2:]) / 32
    if kind == "gaussian noise":
        images = images + amount * torch.randn(images.shape, generator=generator)
    elif kind == "shot noise":
        images = torch.poisson(images * amount, generator=generator) / amount
    elif kind == "impulse noise":
        drawn = torch.rand(images.shape, generator=generator)
        images = images.masked_fill(drawn < amount / 2, 0).masked_fill(drawn > 1 - amount / 2, 1)
    elif kind == "brightness":
        images = images + amount
    elif kind == "contrast":
        mean = images.mean(dim=(-2, -1), keepdim=True)
        images = mean + amount * (images - mean)
    elif kind == "pixelate":
        height, width = (
            box_weights(side, max(1, round(side * amount))) for side in images.shape[-2:]
        )
        small = height @ images @ width.T
        images = (
            box_weights(small.shape[-2], images.shape[-2])
            @ small
            @ box_weights(small.shape[-1], images.shape[-1]).T
        )
    else:
        images = blur(images, kernels(kind, amount * scale, len(images), generator))
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def box_weights(before: int, after: int) -> Tensor:
    """(after, before): each of `after` pixels is the mean of what it covers of `before` pixels, also of parts of them.
    Smaller and larger again by whole pixels would shift what they show, and a stronger one look milder."""
    edges = torch.arange(after + 1.0)[:, None] * before / after
    covered = (torch.arange(before + 1.0) - edges).clamp(min=0)  # of the way right of each edge
    overlap = (covered[:-1, 1:] - covered[:-1, :-1]) - (covered[1:, 1:] - covered[1:, :-1])
    return overlap / overlap.sum(dim=1, keepdim=True)


def kernels(kind: str, length: float, count: int, generator: torch.Generator) -> Tensor:
    """(count, K, K) that sum to one each; length in pixels. Edges are softened over a pixel, so that fractions of one count."""
    reach = max(
        1,
        int(
            np.ceil(
                {"gaussian blur": 3 * length, "defocus blur": length, "motion blur": length / 2}[
                    kind
                ]
            )
        ),
    )
    y, x = torch.meshgrid(*[torch.arange(-reach, reach + 1.0)] * 2, indexing="ij")
    if kind == "gaussian blur":
        weights = torch.exp(-(x**2 + y**2) / (2 * length**2)).expand(count, -1, -1)
    elif kind == "defocus blur":
        weights = (length + 0.5 - (x**2 + y**2).sqrt()).clamp(0, 1).expand(count, -1, -1)
    else:
        angle = torch.rand(count, 1, 1, generator=generator) * torch.pi
        along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        weights = (1 - across.abs()).clamp(min=0) * (length / 2 + 0.5 - along.abs()).clamp(0, 1)
    return weights / weights.sum(dim=(-2, -1), keepdim=True)


def blur(images: Tensor, weights: Tensor) -> Tensor:
    """(B, C, height, width), each with its own kernel (B, K, K); edges are repeated outwards."""
    reach = weights.shape[-1] // 2
    padded = F.pad(images, [reach] * 4, mode="replicate")
    B, C = images.shape[:2]
    filters = weights.repeat_interleave(C, dim=0)[:, None]
    return F.conv2d(padded.reshape(1, B * C, *padded.shape[-2:]), filters, groups=B * C).reshape(
        images.shape
    )


def jpeg(picture: Tensor, quality: int) -> Tensor:
    """uint8 (C, height, width), written as a JPEG and read again."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).squeeze(-1).numpy()).save(
        file, "JPEG", quality=quality
    )
    return (
        torch.from_numpy(np.array(Image.open(file)))
        .reshape(*picture.shape[1:], -1)
        .permute(2, 0, 1)
    )
