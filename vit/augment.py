"""A batch at a time, on the device: random crop, mirroring and RandAugment of small images.

What happens to a sample is a function of (seed, epoch, its index) alone (vit/randomness.py). The random numbers are
drawn on the CPU, where the indices are known, so that a GPU is never waited for.
"""

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as ops

from vit.randomness import random_uniform


def crop_and_flip(pixels: Tensor, offsets: Tensor, flipped: Tensor, pad: int) -> Tensor:
    """Pad with black, cut the original size out at each image's own offset, mirror where `flipped`.

    pixels (B, C, height, width) of any type; offsets (B, 2) rows and columns from 0 to 2 pad; flipped (B,) bool.
    """
    B, _, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
    rows = offsets[:, :1] + torch.arange(height)  # (B, height)
    columns = torch.arange(width).expand(B, width)
    columns = offsets[:, 1:] + torch.where(flipped[:, None], columns.flip(1), columns)  # (B, width)
    rows, columns, batch = (index.to(pixels.device) for index in (rows, columns, torch.arange(B)))
    return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def randaugment_operations(magnitude: int, height: int, width: int) -> list[tuple]:
    """The 14 operations of torchvision's RandAugment (Cubuk et al. 2020) as (function, strength, has a sign).

    magnitude: 0 to 30. Each function takes uint8 (B, C, height, width) and the signed strength.
    """

    def share(largest: float) -> float:
        """magnitude / 30 of the largest strength, in torchvision's own float32 steps."""
        return float(torch.linspace(0.0, largest, 31)[magnitude])

    def affine(images: Tensor, shear: tuple[float, float], translate: tuple[int, int]) -> Tensor:
        return ops.affine(images, angle=0.0, translate=list(translate), scale=1.0, shear=list(shear),
                          center=[0, 0] if any(shear) else None)

    shear = math.degrees(math.atan(share(0.3)))
    bits = round(8 - magnitude / 7.5)
    return [
        (lambda x, s: x, 0.0, False),
        (lambda x, s: affine(x, (s, 0.0), (0, 0)), shear, True),
        (lambda x, s: affine(x, (0.0, s), (0, 0)), shear, True),
        (lambda x, s: affine(x, (0.0, 0.0), (int(s), 0)), share(150.0 / 331.0 * width), True),
        (lambda x, s: affine(x, (0.0, 0.0), (0, int(s))), share(150.0 / 331.0 * height), True),
        (lambda x, s: ops.rotate(x, s), share(30.0), True),
        (lambda x, s: ops.adjust_brightness(x, 1 + s), share(0.9), True),
        (lambda x, s: ops.adjust_saturation(x, 1 + s), share(0.9), True),
        (lambda x, s: ops.adjust_contrast(x, 1 + s), share(0.9), True),
        (lambda x, s: ops.adjust_sharpness(x, 1 + s), share(0.9), True),
        (lambda x, s: ops.posterize(x, bits), 0.0, False),
        (lambda x, s: ops.solarize(x, 255 * (1 - share(1.0))), 0.0, False),
        (lambda x, s: ops.autocontrast(x), 0.0, False),
        (lambda x, s: ops.equalize(x), 0.0, False),
    ]


def randaugment(pixels: Tensor, choices: Tensor, signs: Tensor, magnitude: int) -> Tensor:
    """RandAugment with each image's own operations.

    pixels uint8 (B, C, height, width); choices (B, n) from 0 to 13, applied in turn; signs (B, n) bool, True negates.
    Images that share an operation and a sign go through torchvision's kernel together.
    """
    operations = randaugment_operations(magnitude, *pixels.shape[-2:])
    pixels = pixels.clone()
    for choice, sign in zip(choices.unbind(1), signs.unbind(1), strict=True):
        for number, (operation, strength, signed) in enumerate(operations):
            for negative in (False, True) if signed else (None,):
                chosen = (choice == number) & ((sign == negative) if negative is not None else True)
                members = chosen.nonzero()[:, 0].to(pixels.device)
                if len(members) and number:
                    pixels[members] = operation(pixels[members], -strength if negative else strength)
    return pixels


class BatchAugmentation:
    """Random changes to a batch of small images, uint8 in and out, (B, C, height, width).

    pad: share of the side to pad before the random crop; flip: probability; randaugment_ops, randaugment_magnitude:
    RandAugment.
    """

    def __init__(self, seed: int, pad: float, flip: float, randaugment_ops: int, randaugment_magnitude: int):
        self.seed, self.pad, self.flip = seed, pad, flip
        self.randaugment_ops, self.randaugment_magnitude = randaugment_ops, randaugment_magnitude

    def __call__(self, pixels: Tensor, epochs: Tensor, indices: Tensor) -> Tensor:
        """epochs, indices: (B,) int64 on the CPU, which pass over the data and which sample each image is."""
        pad = round(self.pad * max(pixels.shape[-2:]))

        def draw(purpose: str, count: int) -> Tensor:
            return random_uniform(self.seed, purpose, epochs[:, None], indices[:, None], torch.arange(count))

        if pad or self.flip:
            offsets = (draw("crop", 2) * (2 * pad + 1)).long()
            pixels = crop_and_flip(pixels, offsets, draw("flip", 1)[:, 0] < self.flip, pad)
        if self.randaugment_ops:
            choices = (draw("randaugment", self.randaugment_ops) * 14).long()
            signs = draw("randaugment sign", self.randaugment_ops) < 0.5
            pixels = randaugment(pixels, choices, signs, self.randaugment_magnitude)
        return pixels
