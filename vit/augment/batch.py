"""A batch at a time, on the device: crop, mirroring and policies of small images; erasing and mixing of all.

What happens to a sample is a function of (seed, epoch, its index) alone (vit/randomness.py); which two are mixed and how, of
(seed, step). The random numbers are drawn on the CPU, where the indices are known, so that a GPU is never waited for.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vit.augment.boxes import resized_crop_boxes, sample_numbers
from vit.augment.operations import DrawnOperation, Policy, apply_operation


def crop_and_flip(pixels: Tensor, offsets: Tensor, flipped: Tensor, pad: int) -> Tensor:
    """Pad with black, cut the original size out at each image's own offset, mirror where `flipped`.

    pixels (B, C, height, width) of any type; offsets (B, 2) rows and columns from 0 to 2 pad; flipped (B,) bool.
    """
    B, C, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
    rows = offsets[:, :1] + torch.arange(height)  # (B, height)
    columns = torch.arange(width).expand(B, width)
    columns = offsets[:, 1:] + torch.where(flipped[:, None], columns.flip(1), columns)  # (B, width)
    places = (
        (rows[:, :, None] * padded.shape[3] + columns[:, None, :])
        .flatten(1)
        .to(pixels.device, non_blocking=True)
    )
    return (
        padded.flatten(2).gather(2, places[:, None].expand(-1, C, -1)).unflatten(2, (height, width))
    )


def resize_boxes(pixels: Tensor, boxes: Tensor, flipped: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut each image's own box out, mirror where `flipped` and resize it bilinearly; uint8 in, (B, C, *size) uint8 out.

    As torchvision's resized_crop where a box grows; boxes (B, 4) as from resized_crop_boxes, flipped (B,) bool.
    """
    height, width = pixels.shape[-2:]
    top, left, box_height, box_width = boxes.unbind(1)

    def places(start: Tensor, length: Tensor, count: int, whole: int) -> Tensor:
        """Where the output's pixels lie in the image, kept within the box, from -1 to 1 as grid_sample has it: (B, count)."""
        centres = start[:, None] + (torch.arange(count) + 0.5) * (length[:, None] / count) - 0.5
        return (
            centres.clamp(start[:, None], (start + length - 1)[:, None]) * (2 / max(1, whole - 1))
            - 1
        )

    y, x = places(top, box_height, size[0], height), places(left, box_width, size[1], width)
    x = torch.where(flipped[:, None], x.flip(1), x)
    grid = torch.stack(
        [x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], dim=-1
    )
    grid = grid.to(pixels.device, non_blocking=True)
    out = torch.nn.functional.grid_sample(
        pixels.float(), grid, align_corners=True, padding_mode="border"
    )
    return out.round().to(torch.uint8)


def apply_policy(pixels: Tensor, numbers: Tensor, policy: Policy) -> Tensor:
    """Each image's own changes in turn. pixels uint8 (B, C, height, width); numbers (B, policy.numbers) in [0, 1).

    Images that share a change go through torchvision's kernel together.
    """
    with one_thread() if pixels.device.type == "cpu" else contextlib.nullcontext():
        return change_groups(pixels, numbers, policy)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For many small kernels in a row, whose work sharing two threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def change_groups(pixels: Tensor, numbers: Tensor, policy: Policy) -> Tensor:
    height, width = pixels.shape[-2:]
    drawn = [policy.draw(own, height, width) for own in numbers.tolist()]
    pixels = pixels.clone()
    for turn in range(max(len(changes) for changes in drawn)):
        members: dict[DrawnOperation, list[int]] = {}
        for image, changes in enumerate(drawn):
            if turn < len(changes) and changes[turn].name != "identity":
                members.setdefault(changes[turn], []).append(image)
        for change, images in members.items():
            chosen = torch.tensor(images).to(pixels.device, non_blocking=True)
            changed = apply_operation(pixels.index_select(0, chosen), change, policy)
            assert isinstance(changed, Tensor)
            pixels.index_copy_(0, chosen, changed)
    return pixels


class BatchAugmentation:
    """Random changes to a batch of small images, uint8 in and out.

    size: of the model's input, pixels; pad: share of the side to pad before the random crop; crop_scale: with pad 0, the
    share of the area that a random crop takes, resized to `size`, or None; flip: probability; policies: vit.augment.policies.
    """

    def __init__(
        self,
        seed: int,
        size: tuple[int, int],
        pad: float,
        crop_scale: Sequence[float] | None,
        flip: float,
        policies: Sequence[Policy] = (),
    ):
        self.seed, self.size, self.pad, self.crop_scale, self.flip = (
            seed,
            size,
            pad,
            crop_scale,
            flip,
        )
        self.policies = policies

    def __call__(self, pixels: Tensor, epochs: Tensor, indices: Tensor) -> Tensor:
        """(B, C, height, width) → the same, or (B, C, *size) after a resized crop. epochs, indices: (B,) int64 on the CPU,
        which pass over the data and which sample each image is."""
        height, width = pixels.shape[-2:]
        pad = round(self.pad * max(height, width))

        draw = functools.partial(sample_numbers, self.seed, epochs, indices)
        flipped = draw("flip", 1)[:, 0] < self.flip
        if not self.pad and self.crop_scale is not None:
            boxes = resized_crop_boxes(draw("resized crop", 22), height, width, self.crop_scale)
            pixels = resize_boxes(pixels, boxes, flipped, self.size)
        elif pad or self.flip:
            offsets = (draw("crop", 2) * (2 * pad + 1)).long()
            pixels = crop_and_flip(pixels, offsets, flipped, pad)
        for number, policy in enumerate(self.policies):
            pixels = apply_policy(pixels, draw(f"policy {number}", policy.numbers), policy)
        return pixels
