"""A batch at a time, on the device: random crop, mirroring and RandAugment of small images.

What happens to a sample is a function of (seed, epoch, its index) alone (vit/randomness.py). The random numbers are
drawn on the CPU, where the indices are known, so that a GPU is never waited for.
"""

import math
from collections.abc import Sequence

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


def resized_crop_boxes(numbers: Tensor, height: int, width: int, scale: Sequence[float]) -> Tensor:
    """Boxes (B, 4) of top, left, height, width in pixels, for Szegedy et al. 2015's random crop as torchvision draws it.

    numbers (B, 22) in [0, 1): ten tries of an area (a share within `scale`) and an aspect ratio (3/4 to 4/3, uniform in its
    logarithm), of which the first that fits is taken, the whole image where none does; then the place.
    """
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[:, :10])
    ratios = torch.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * numbers[:, 10:20])
    widths, heights = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    box_height = torch.where(fits.any(1), heights.gather(1, first)[:, 0], torch.tensor(float(height)))
    box_width = torch.where(fits.any(1), widths.gather(1, first)[:, 0], torch.tensor(float(width)))
    top = (numbers[:, 20] * (height - box_height + 1)).floor()
    left = (numbers[:, 21] * (width - box_width + 1)).floor()
    return torch.stack([top, left, box_height, box_width], dim=1)


def resize_boxes(pixels: Tensor, boxes: Tensor, flipped: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut each image's own box out, mirror where `flipped` and resize it bilinearly; uint8 in, (B, C, *size) uint8 out.

    As torchvision's resized_crop where a box grows; boxes (B, 4) as from resized_crop_boxes, flipped (B,) bool.
    """
    height, width = pixels.shape[-2:]
    top, left, box_height, box_width = boxes.unbind(1)

    def places(start: Tensor, length: Tensor, count: int, whole: int) -> Tensor:
        """Where the output's pixels lie in the image, kept within the box, from -1 to 1 as grid_sample has it: (B, count)."""
        centres = start[:, None] + (torch.arange(count) + 0.5) * (length[:, None] / count) - 0.5
        return centres.clamp(start[:, None], (start + length - 1)[:, None]) * (2 / max(1, whole - 1)) - 1

    y, x = places(top, box_height, size[0], height), places(left, box_width, size[1], width)
    x = torch.where(flipped[:, None], x.flip(1), x)
    grid = torch.stack([x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], dim=-1)
    out = torch.nn.functional.grid_sample(pixels.float(), grid.to(pixels.device), align_corners=True, padding_mode="border")
    return out.round().to(torch.uint8)


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
    """Random changes to a batch of small images, uint8 in and out.

    size: of the model's input, pixels; pad: share of the side to pad before the random crop; crop_scale: with pad 0, the
    share of the area that a random crop takes, resized to `size`, or None; flip: probability; randaugment_ops,
    randaugment_magnitude: RandAugment.
    """

    def __init__(self, seed: int, size: tuple[int, int], pad: float, crop_scale: Sequence[float] | None, flip: float,
                 randaugment_ops: int, randaugment_magnitude: int):
        self.seed, self.size, self.pad, self.crop_scale, self.flip = seed, size, pad, crop_scale, flip
        self.randaugment_ops, self.randaugment_magnitude = randaugment_ops, randaugment_magnitude

    def __call__(self, pixels: Tensor, epochs: Tensor, indices: Tensor) -> Tensor:
        """(B, C, height, width) → the same, or (B, C, *size) after a resized crop. epochs, indices: (B,) int64 on the CPU,
        which pass over the data and which sample each image is."""
        height, width = pixels.shape[-2:]
        pad = round(self.pad * max(height, width))

        def draw(purpose: str, count: int) -> Tensor:
            return random_uniform(self.seed, purpose, epochs[:, None], indices[:, None], torch.arange(count))

        flipped = draw("flip", 1)[:, 0] < self.flip
        if not self.pad and self.crop_scale is not None:
            boxes = resized_crop_boxes(draw("resized crop", 22), height, width, self.crop_scale)
            pixels = resize_boxes(pixels, boxes, flipped, self.size)
        elif pad or self.flip:
            offsets = (draw("crop", 2) * (2 * pad + 1)).long()
            pixels = crop_and_flip(pixels, offsets, flipped, pad)
        if self.randaugment_ops:
            choices = (draw("randaugment", self.randaugment_ops) * 14).long()
            signs = draw("randaugment sign", self.randaugment_ops) < 0.5
            pixels = randaugment(pixels, choices, signs, self.randaugment_magnitude)
        return pixels
