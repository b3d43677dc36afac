"""A batch at a time, on the device: crop, mirroring and policies of small images; erasing and mixing of all.

What happens to a sample is a function of (seed, epoch, its index) alone (vit/randomness.py); which two are mixed and how, of
(seed, step). The random numbers are drawn on the CPU, where the indices are known, so that a GPU is never waited for.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence

import torch
from scipy.special import betaincinv
from torch import Tensor

from vit.policies import Change, Policy, apply
from vit.randomness import random_uniform


def crop_and_flip(pixels: Tensor, offsets: Tensor, flipped: Tensor, pad: int) -> Tensor:
    """Pad with black, cut the original size out at each image's own offset, mirror where `flipped`.

    pixels (B, C, height, width) of any type; offsets (B, 2) rows and columns from 0 to 2 pad; flipped (B,) bool.
    """
    B, C, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
    rows = offsets[:, :1] + torch.arange(height)  # (B, height)
    columns = torch.arange(width).expand(B, width)
    columns = offsets[:, 1:] + torch.where(flipped[:, None], columns.flip(1), columns)  # (B, width)
    places = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).flatten(1).to(pixels.device, non_blocking=True)
    return padded.flatten(2).gather(2, places[:, None].expand(-1, C, -1)).unflatten(2, (height, width))


def resized_crop_boxes(numbers: Tensor, height: int, width: int, scale: Sequence[float]) -> Tensor:
    """Boxes (B, 4) of top, left, height, width in pixels, for Szegedy et al. 2015's random crop as torchvision draws it.

    numbers (B, 22) in [0, 1): ten tries of an area (a share within `scale`) and an aspect ratio (3/4 to 4/3, uniform in its
    logarithm), of which the first that fits is taken, the whole image where none does; then the place.
    """
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[:, :10])
    ratios = torch.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * numbers[:, 10:20])
    widths, heights = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    return first_fitting(heights, widths, fits, (height, width), numbers[:, 20:], height, width)


def first_fitting(heights: Tensor, widths: Tensor, fits: Tensor, otherwise: tuple[int, int], places: Tensor, height: int,
                  width: int) -> Tensor:
    """Boxes (B, 4) of top, left, height, width: of each image's tries (B, n) the first that `fits`, or one of the size
    `otherwise`, at a place in the image of height x width pixels that `places` (B, 2) in [0, 1) gives."""
    first, found = fits.int().argmax(dim=1, keepdim=True), fits.any(1)
    box_height, box_width = (torch.where(found, sides.gather(1, first)[:, 0], float(other))
                             for sides, other in zip((heights, widths), otherwise, strict=True))
    top = (places[:, 0] * (height - box_height + 1)).floor()
    left = (places[:, 1] * (width - box_width + 1)).floor()
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
    grid = grid.to(pixels.device, non_blocking=True)
    out = torch.nn.functional.grid_sample(pixels.float(), grid, align_corners=True, padding_mode="border")
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
        members: dict[Change, list[int]] = {}
        for image, changes in enumerate(drawn):
            if turn < len(changes) and changes[turn].name != "identity":
                members.setdefault(changes[turn], []).append(image)
        for change, images in members.items():
            chosen = torch.tensor(images).to(pixels.device, non_blocking=True)
            changed = apply(pixels.index_select(0, chosen), change, policy)
            assert isinstance(changed, Tensor)
            pixels.index_copy_(0, chosen, changed)
    return pixels


def sample_numbers(seed: int, epochs: Tensor, indices: Tensor, purpose: str, count: int) -> Tensor:
    """(B, count) numbers in [0, 1), each sample's own."""
    return random_uniform(seed, purpose, epochs[:, None], indices[:, None], torch.arange(count))


class BatchAugmentation:
    """Random changes to a batch of small images, uint8 in and out.

    size: of the model's input, pixels; pad: share of the side to pad before the random crop; crop_scale: with pad 0, the
    share of the area that a random crop takes, resized to `size`, or None; flip: probability; policies: vit.policies.
    """

    def __init__(self, seed: int, size: tuple[int, int], pad: float, crop_scale: Sequence[float] | None, flip: float,
                 policies: Sequence[Policy] = ()):
        self.seed, self.size, self.pad, self.crop_scale, self.flip = seed, size, pad, crop_scale, flip
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


def inside(boxes: Tensor, height: int, width: int, device: torch.device) -> Tensor:
    """Which pixels lie in each image's box: boxes (B, 4) of top, left, height, width → bool (B, 1, height, width)."""
    top, left, box_height, box_width = (edge[:, None] for edge in boxes.to(device, non_blocking=True).unbind(1))
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    row_in, column_in = (rows >= top) & (rows < top + box_height), (columns >= left) & (columns < left + box_width)
    return (row_in[:, :, None] & column_in[:, None, :])[:, None]


def erasing_boxes(numbers: Tensor, height: int, width: int) -> Tensor:
    """Boxes (B, 4) of top, left, height, width in pixels for random erasing (Zhong et al. 2020, arXiv:1708.04896,
    algorithm 1), of no size where nothing fits.

    numbers (B, 22) in [0, 1): ten tries of an area (0.02 to 1/3 of the image) and an aspect ratio (0.3 to 1/0.3, uniform in its
    logarithm), as timm draws them; then the place.
    """
    areas = height * width * (0.02 + (1 / 3 - 0.02) * numbers[:, :10])
    ratios = torch.exp(math.log(0.3) * (1 - 2 * numbers[:, 10:20]))
    heights, widths = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (widths < width) & (heights < height)
    return first_fitting(heights, widths, fits, (0, 0), numbers[:, 20:], height, width)


def erase(images: Tensor, epochs: Tensor, indices: Tensor, seed: int, probability: float) -> Tensor:
    """Random erasing: with `probability`, a box of each image is filled with noise, N(0, 1) as the normalised pixels are.

    images float (B, C, height, width); epochs, indices (B,) int64 on the CPU.
    """
    channels, height, width = images.shape[1:]
    draw = functools.partial(sample_numbers, seed, epochs, indices)
    chosen = (draw("erasing", 1)[:, 0] < probability).nonzero()[:, 0]
    boxes = erasing_boxes(draw("erased box", 22)[chosen], height, width)
    device = images.device
    places = torch.arange(channels * height * width, device=device)
    samples = (counter[chosen].to(device, non_blocking=True)[:, None] for counter in (epochs, indices))
    numbers = random_uniform(seed, "erasing noise", *samples, places)
    noise = (numbers.clamp(2.0**-25, 1 - 2.0**-24) * 2 - 1).erfinv() * math.sqrt(2)
    chosen, where = chosen.to(device, non_blocking=True), inside(boxes, height, width, device)
    erased = torch.where(where, noise.reshape(-1, channels, height, width).to(images.dtype), images[chosen])
    return images.index_copy(0, chosen, erased)


class Mixing:
    """Mixup (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899) of neighbours in a batch.

    The order of a batch is random, so images 0 and 1, 2 and 3, … are mixed with each other, each pair with its own share,
    which depends on (seed, step) and the pair's place alone; a last odd one stays as it is.
    mixup, cutmix: α of their Beta(α, α), 0: off; probability: of mixing a pair at all; with both on, either half the time.
    """

    def __init__(self, seed: int, num_classes: int, mixup: float, cutmix: float, probability: float):
        self.seed, self.num_classes, self.mixup, self.cutmix, self.probability = seed, num_classes, mixup, cutmix, probability

    def __bool__(self) -> bool:
        return bool(self.probability and (self.mixup or self.cutmix))

    def __call__(self, images: Tensor, labels: Tensor, step: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, height, width), labels int64 (B,) → mixed images, targets float32 (B, num_classes) whose
        rows sum to 1. first: the place in the step's global batch of the first of these images, an even number."""
        count, (height, width) = len(labels), images.shape[-2:]
        places = torch.arange(count)
        partner = torch.where(places.bitwise_xor(1) < count, places.bitwise_xor(1), places)
        numbers = random_uniform(self.seed, "mixing", step, (first + places)[:, None] // 2, torch.arange(5))
        mixed, cut, share, row, column = numbers.unbind(1)
        cuts = (cut < 0.5) if self.mixup and self.cutmix else torch.full_like(cut, bool(self.cutmix), dtype=torch.bool)
        kept = torch.where(cuts, beta(share, self.cutmix), beta(share, self.mixup))  # of the image itself; λ in the papers
        # Both of a pair keep the same λ: an image's own label then has the share of its own pixels in both
        kept = torch.where((mixed < self.probability) & (partner != places), kept, torch.ones_like(kept))
        boxes = cutmix_boxes(torch.where(cuts, kept, 1.0), row, column, height, width)
        kept = torch.where(cuts, 1 - boxes[:, 2] * boxes[:, 3] / (height * width), kept)
        device = images.device
        blended = torch.where(cuts, 1.0, kept).to(device, images.dtype, non_blocking=True)[:, None, None, None]
        partner, weights = (numbers.to(device, non_blocking=True) for numbers in (partner, kept))
        partners = images[partner]
        out = torch.where(inside(boxes, height, width, device), partners, partners.lerp(images, blended))
        targets = torch.zeros(count, self.num_classes, device=device)
        targets.scatter_(1, labels[:, None], weights[:, None])
        targets.scatter_add_(1, labels[partner][:, None], 1 - weights[:, None])
        return out, targets


def beta(numbers: Tensor, alpha: float) -> Tensor:
    """Uniform numbers (n,) → numbers of Beta(alpha, alpha), by the inverse of its distribution; ones for alpha 0."""
    if not alpha:
        return torch.ones_like(numbers)
    return torch.from_numpy(betaincinv(alpha, alpha, numbers.double().numpy())).to(numbers.dtype)


def cutmix_boxes(kept: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """Boxes (B, 4) of top, left, height, width in pixels about a centre drawn anywhere, cut off at the edges, so that what is
    left of an image may be more than `kept`. kept, row, column: (B,) in [0, 1]."""
    half_height, half_width = ((1 - kept).sqrt() * side // 2 for side in (height, width))
    centre_row, centre_column = (row * height).floor(), (column * width).floor()
    top, bottom = ((centre_row + half).clamp(0, height) for half in (-half_height, half_height))
    left, right = ((centre_column + half).clamp(0, width) for half in (-half_width, half_width))
    return torch.stack([top, left, bottom - top, right - left], dim=1)
