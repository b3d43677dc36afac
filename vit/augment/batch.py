"""Augmentation of a batch of small images on the device: crops, mirroring and policies.

What happens to a sample is a function of (seed, epoch, its index) alone (vit/randomness.py). The
random numbers are drawn on the CPU, where the indices are known, so that a GPU is never waited for.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.augment.affine import NUMBERS, Affine, warp
from vit.augment.batch_operations import apply_drawn
from vit.augment.boxes import NUMBERS_PER_BOX, resized_crop_boxes, sample_numbers
from vit.augment.flips import AlternatingFlip
from vit.augment.policies import Policy
from vit.augment.resizing import filter_boxes, resize_images
from vit.runtime.device import send


class BatchAugmentation:
    """Random changes to a batch of small images, uint8 in and out.

    size           (height, width) of the model's input in pixels, reached by a resized crop
    pad            fraction of the longer side to pad on each side before the random crop
    crop_scale     with pad 0, the fractions of the area that a random crop takes, or None
    flip           probability of mirroring, or which images are mirrored in a pass
    affine         rotation, translation, scaling and shear; their sampling also reaches `size`
    policies       see vit.augment.policies
    interpolation  bilinear or bicubic; antialiased, as in evaluation, where images become smaller
    """

    def __init__(
        self,
        seed: int,
        size: tuple[int, int],
        pad: float,
        crop_scale: Sequence[float] | None,
        flip: float | AlternatingFlip,
        policies: Sequence[Policy] = (),
        affine: Affine | None = None,
        interpolation: str = "bilinear",
    ):
        self.seed = seed
        self.size = size
        self.pad = pad
        self.crop_scale = crop_scale
        self.flip = flip
        self.policies = policies
        self.affine = affine or Affine()
        self.interpolation = interpolation

    def __call__(self, pixels: Tensor, epochs: Tensor, indices: Tensor) -> Tensor:
        """Augment uint8 (B, C, height, width); resized or warped, it is (B, C, *size) afterwards.

        epochs, indices: (B,) int64 on the CPU, which pass over the data and which sample each
        image is.
        """
        height, width = pixels.shape[-2:]
        draw = functools.partial(sample_numbers, self.seed, epochs, indices)

        pad = round(self.pad * max(height, width))
        if isinstance(self.flip, AlternatingFlip):
            flipped = self.flip(epochs, indices)
        else:
            flipped = draw("flip", 1)[:, 0] < self.flip
        if self.crop_scale is not None and not self.pad:
            numbers = draw("resized crop", NUMBERS_PER_BOX)
            boxes = resized_crop_boxes(numbers, height, width, self.crop_scale)
            pixels = self.resize_boxes(pixels, boxes, flipped)
        elif pad or self.flip:
            offsets = (draw("crop", 2) * (2 * pad + 1)).long()
            pixels = crop_and_flip(pixels, offsets, flipped, pad)

        if self.affine:
            height, width = pixels.shape[-2:]
            matrices = self.affine.matrices(draw("affine", NUMBERS), height, width)
            # What the sampling can't do, which takes the nearest pixels alone
            if (height, width) != self.size and not self.may_sample(height, width):
                pixels = resize_images(pixels, self.size, self.interpolation)
            pixels = warp(pixels, matrices, self.size)

        # The purposes' names are part of the result: other names are other random numbers.
        # The position of a policy tells its random numbers from those of the other policies
        for position, policy in enumerate(self.policies):
            numbers = draw(f"policy {position}", policy.num_random)
            pixels = apply_policy(pixels, numbers, policy)
        return pixels

    def resize_boxes(self, pixels: Tensor, boxes: Tensor, flipped: Tensor) -> Tensor:
        """Each image's own box, mirrored where `flipped`, as uint8 (B, C, *size)."""
        if self.may_sample(*pixels.shape[-2:]):
            return sample_boxes(pixels, boxes, flipped, self.size)
        return filter_boxes(pixels, boxes, flipped, self.size, self.interpolation)

    def may_sample(self, height: int, width: int) -> bool:
        """Whether sampling bilinearly resizes images, and boxes in them, as evaluation does."""
        becomes_smaller = height > self.size[0] or width > self.size[1]
        return self.interpolation == "bilinear" and not becomes_smaller


def crop_and_flip(pixels: Tensor, offsets: Tensor, flipped: Tensor, pad: int) -> Tensor:
    """Pad with black, cut the original size out at each image's own offset, mirror where `flipped`.

    pixels (B, C, height, width) of any type; offsets (B, 2) of rows and columns from 0 to 2 pad;
    flipped (B,) bool.
    """
    C, height, width = pixels.shape[1:]
    padded = F.pad(pixels, (pad, pad, pad, pad))
    stride = padded.shape[3]
    # From the first pixel to the next in memory, or back from the last one of a mirrored row
    direction = torch.where(flipped, -1, 1)
    first = offsets[:, 0] * stride + offsets[:, 1] + (width - 1) * flipped
    # Two numbers an image are sent, and expanded on the device
    first, direction = send(torch.stack([first, direction]), pixels.device)[:, :, None, None]
    rows = torch.arange(0, height * stride, stride, device=pixels.device)[:, None]
    columns = torch.arange(width, device=pixels.device)

    # One gather for the whole batch, by the position of every output pixel in its padded image
    positions = (first + rows) + direction * columns
    positions = positions.flatten(1)[:, None].expand(-1, C, -1)
    return padded.flatten(2).gather(2, positions).unflatten(2, (height, width))


def sample_boxes(pixels: Tensor, boxes: Tensor, flipped: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut each image's own box out, mirror where `flipped` and sample it bilinearly.

    uint8 (B, C, height, width) → uint8 (B, C, *size). boxes (B, 4) as from resized_crop_boxes,
    flipped (B,) bool. The pixels are those of torchvision's resized_crop where a box is enlarged.
    """
    height, width = pixels.shape[-2:]
    device = pixels.device
    top, left, box_height, box_width = boxes.unbind(1)
    y = sampling_positions(top, box_height, size[0], height, device)
    x = sampling_positions(left, box_width, size[1], width, device)
    x = torch.where(send(flipped, device)[:, None], x.flip(1), x)

    # grid_sample wants (x, y) of every output pixel
    x = x[:, None, :].expand(-1, size[0], -1)
    y = y[:, :, None].expand(-1, -1, size[1])
    # Within the image, so that none of the padding modes matters, one of which Metal lacks
    grid = torch.stack([x, y], dim=-1).clamp(-1, 1)
    resized = F.grid_sample(pixels.float(), grid, align_corners=True, padding_mode="zeros")
    return resized.round().to(torch.uint8)


def sampling_positions(
    start: Tensor, length: Tensor, count: int, image_side: int, device: torch.device
) -> Tensor:
    """Where the centers of `count` output pixels lie along one axis of the image; (B, count).

    start, length: of each box, (B,) in pixels on the CPU. Three numbers an image are sent to the
    device and expanded there. Positions stay within their box, and are counted as
    grid_sample does, from -1 at the first pixel to 1 at the last.
    """
    # Pixel i covers i to i + 1, so its center lies at i + 0.5; at the edges, border pixels repeat
    numbers = torch.stack([start, length / count, start + length - 1])
    start, step, last = send(numbers, device)[:, :, None]
    centers = start + torch.arange(0.5, count, device=device) * step - 0.5
    centers = centers.clamp(start, last)
    return centers * (2 / max(1, image_side - 1)) - 1


def apply_policy(pixels: Tensor, numbers: Tensor, policy: Policy) -> Tensor:
    """Each image's own operations, one after another.

    pixels uint8 (B, C, height, width); numbers (B, policy.num_random) in [0, 1).
    """
    with one_thread() if pixels.device.type == "cpu" else contextlib.nullcontext():
        height, width = pixels.shape[-2:]
        drawn = [policy.draw(own, height, width) for own in numbers.tolist()]
        return apply_drawn(pixels, drawn, policy.settings)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For many small kernels in a row.

    On two idle cores, sharing them saves a tenth of the time at 32 px and a third at 224 px; where
    the cores are busy with other work, waiting for each other takes 3 to 30 times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
