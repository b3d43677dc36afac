"""Resizing images in memory with antialiasing: whole ones alike, or each one's own box.

The pixels are those of torchvision's and F.interpolate's antialiased resizing of single images,
which evaluation and image files use too. Bilinear sampling gives the same where nothing becomes
smaller, and takes less (vit/augment/batch.py, vit/augment/affine.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.runtime.device import send


def resize_images(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """uint8 (B, C, height, width) → uint8 (B, C, *size); interpolation: bilinear or bicubic."""
    resized = F.interpolate(
        pixels.float(), size, mode=interpolation, antialias=True, align_corners=False
    )
    return to_uint8(resized)


def filter_boxes(
    pixels: Tensor, boxes: Tensor, flipped: Tensor, size: tuple[int, int], interpolation: str
) -> Tensor:
    """Cut each image's own box out, mirror where `flipped` and resize it.

    uint8 (B, C, height, width) → uint8 (B, C, *size). boxes (B, 4) as from resized_crop_boxes,
    flipped (B,) bool; interpolation: bilinear or bicubic.
    """
    C, height, width = pixels.shape[1:]
    device = pixels.device
    top, left, box_height, box_width = boxes.unbind(1)
    rows = filter_weights(top, box_height, size[0], height, interpolation, device)
    columns = filter_weights(left, box_width, size[1], width, interpolation, device)
    columns = torch.where(send(flipped, device)[:, None, None], columns.flip(1), columns)

    # One side after the other: (B, C·height, width) · (B, width, size[1]), then
    # (B, size[0], height) · (B, height, C·size[1])
    images = pixels.float().flatten(1, 2) @ columns.transpose(1, 2)
    images = rows @ images.unflatten(1, (C, height)).transpose(1, 2).flatten(2)
    return to_uint8(images.unflatten(2, (C, size[1])).transpose(1, 2).contiguous())


def filter_weights(
    start: Tensor,
    length: Tensor,
    count: int,
    image_side: int,
    interpolation: str,
    device: torch.device,
) -> Tensor:
    """How much of every pixel along one axis of the image is in each output pixel.

    start, length: of each box, (B,) in pixels on the CPU. Three numbers an image are sent to the
    device and expanded there. Returns (B, count, image_side); the weights of an output pixel, which
    are 0 outside of the box, add up to 1.
    """
    numbers = torch.stack([start, start + length, length / count])
    start, end, step = send(numbers, device)[:, :, None, None]
    # Pixel i covers i to i + 1, so its center lies at i + 0.5
    pixels = torch.arange(0.5, image_side, device=device)
    centers = start + torch.arange(0.5, count, device=device)[:, None] * step
    # Where a box becomes smaller the filter is as wide as an output pixel, which averages
    weights = filter_curve((pixels - centers) / step.clamp(min=1), interpolation)
    weights = weights * ((pixels > start) & (pixels < end))
    return weights / weights.sum(2, keepdim=True)


def filter_curve(distances: Tensor, interpolation: str) -> Tensor:
    """The filter at these distances from its center, in pixels; of any shape.

    The triangle, or Keys' cubic (1981) with a = -0.5, which is Pillow's too.
    """
    x = distances.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def to_uint8(images: Tensor) -> Tensor:
    """Floats to whole numbers from 0 to 255, which bicubic filters pass; changes the floats."""
    return images.round_().clamp_(0, 255).to(torch.uint8)
