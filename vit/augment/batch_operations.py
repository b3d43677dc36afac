"""The operations of augmentation policies on a batch of images, each with a strength of its own.

What was drawn for the images is applied one turn after another; in a turn, all images that have the
same operation are changed at once. Strengths, and which images they belong to, are drawn on the
CPU, so a GPU gets a few numbers an image and is never waited for.

The pixels are those of torchvision's functions for tensors, to the bit on a CPU.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode

from vit.augment.affine import affine_positions
from vit.augment.boxes import box_mask
from vit.augment.operations import (
    DrawnOperation,
    OperationSettings,
    big_vision_gray,
    blur_radius,
    cutout_box,
    fill_color,
    shear_degrees,
    whole_pixels,
)
from vit.runtime.device import send

CACHED_NUMBERS = 1 << 19  # floats, 2 MB: about what a core's cache holds

# Changes images, uint8 (n, C, height, width), in place, each by its own operation of those drawn.
# They are sorted by name, in the order of BATCH_OPERATIONS
Change = Callable[[Tensor, Sequence[DrawnOperation], OperationSettings], None]


def apply_drawn(
    pixels: Tensor, drawn: Sequence[Sequence[DrawnOperation]], settings: OperationSettings
) -> Tensor:
    """Apply to each image the operations that were drawn for it, one after another.

    pixels uint8 (B, C, height, width), which stay unchanged; drawn: B sequences of operations.
    """
    pixels = pixels.clone()
    for turn in range(max(len(operations) for operations in drawn)):
        chosen = [
            (image, operations[turn])
            for image, operations in enumerate(drawn)
            if turn < len(operations) and changes_pixels(operations[turn], pixels.shape[1])
        ]
        # Next to each other in memory, the images of an operation are a slice
        chosen.sort(key=lambda pair: ORDER[pair[1].name])
        most = images_at_once(pixels)
        for first in range(0, len(chosen), most):
            change_images(pixels, chosen[first : first + most], settings)
    return pixels


def changes_pixels(operation: DrawnOperation, num_channels: int) -> bool:
    """Whether an operation can change anything at all in images of so many channels."""
    if operation.name in ("saturation", "grayscale"):
        return num_channels > 1
    if operation.name == "solarize":
        return operation.strength <= 255
    return operation.name != "identity"


def images_at_once(pixels: Tensor) -> int:
    """How many images are changed at once: on a GPU all, on a CPU those that its cache holds."""
    if pixels.device.type != "cpu":
        return len(pixels)
    return max(1, CACHED_NUMBERS // pixels[0].numel())


def change_images(
    pixels: Tensor, chosen: Sequence[tuple[int, DrawnOperation]], settings: OperationSettings
) -> None:
    """Change images in place by one operation each: (position in the batch, operation), sorted."""
    members = send(torch.tensor([image for image, _ in chosen]), pixels.device)
    images = pixels.index_select(0, members)
    operations = [operation for _, operation in chosen]
    first = 0
    for change, group in itertools.groupby(operations, key=lambda op: BATCH_OPERATIONS[op.name]):
        changed = list(group)
        change(images[first : first + len(changed)], changed, settings)
        first += len(changed)
    pixels.index_copy_(0, members, images)


def per_image(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A number for each image, (n, 1, 1, 1), on the device of a tensor."""
    return send(torch.tensor(values, dtype=dtype), like.device)[:, None, None, None]


def strengths_of(drawn: Sequence[DrawnOperation]) -> list[float]:
    return [operation.strength for operation in drawn]


def luminance(images: Tensor) -> Tensor:
    """(n, 3, height, width) of any type → float32 (n, 1, height, width), ITU-R 601's weights."""
    red, green, blue = images.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def enhance(images: Tensor, drawn: Sequence[DrawnOperation], settings: OperationSettings) -> None:
    """Blend with what the image would be without saturation, without contrast, or black."""
    names = [operation.name for operation in drawn]
    num_saturated = names.count("saturation")
    num_gray = num_saturated + names.count("contrast")
    strengths = strengths_of(drawn)
    complements = per_image([1.0 - strength for strength in strengths], images)

    # Saturation blends with the gray image, contrast with its mean and brightness with black
    values = images.float()
    gray = values[:num_gray]
    if images.shape[1] > 1:
        gray = luminance(gray).floor_()
    means = gray[num_saturated:].mean(dim=(1, 2, 3), keepdim=True)

    # A multiply-add rounds once, as torchvision's addition of a multiple does
    values.mul_(per_image(strengths, images))
    values[:num_saturated].addcmul_(gray[:num_saturated], complements[:num_saturated])
    values[num_saturated:num_gray].addcmul_(means, complements[num_saturated:num_gray])
    images.copy_(values.clamp_(0, 255))


def gray_contrast(
    images: Tensor, drawn: Sequence[DrawnOperation], settings: OperationSettings
) -> None:
    gray = big_vision_gray(*images.shape[-2:])
    factors = per_image(strengths_of(drawn), images)
    blended = images.float().sub_(gray).mul_(factors).add_(gray)
    images.copy_(blended.clamp_(0, 255))


def sharpness(images: Tensor, drawn: Sequence[DrawnOperation], settings: OperationSettings) -> None:
    """Blend with a smoothed image: each pixel counts five times and its neighbors once.

    The outermost pixels, which lack neighbors, stay as they are.
    """
    if min(images.shape[-2:]) < 3:
        return
    complements = per_image([1.0 - operation.strength for operation in drawn], images)
    values = images.float()
    center = values[..., 1:-1, 1:-1]
    # Sums of whole numbers: exact, unlike a convolution, and several times as fast on a CPU
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    smooth = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = smooth.add_(center, alpha=4).div_(13).round_()
    blended = torch.addcmul(center, smooth.sub_(center), complements)
    images[..., 1:-1, 1:-1].copy_(blended.clamp_(0, 255))


def posterize(images: Tensor, drawn: Sequence[DrawnOperation], settings: OperationSettings) -> None:
    # The highest bits of eight, or none of them
    masks = [256 - (256 >> min(8, max(0, int(operation.strength)))) for operation in drawn]
    images.bitwise_and_(per_image(masks, images, torch.uint8))


def solarize(images: Tensor, drawn: Sequence[DrawnOperation], settings: OperationSettings) -> None:
    """Invert the levels from the strength on; all of them for "invert"."""
    thresholds = torch.tensor(
        [0.0 if operation.name == "invert" else operation.strength for operation in drawn]
    )
    # A whole level is at least a threshold where it is at least the next whole number
    thresholds = thresholds.ceil().to(torch.uint8)
    inverted = images >= send(thresholds, images.device)[:, None, None, None]
    images.bitwise_xor_(inverted.view(torch.uint8).mul_(255))


def solarize_add(
    images: Tensor, drawn: Sequence[DrawnOperation], settings: OperationSettings
) -> None:
    added = [int(operation.strength) for operation in drawn]
    # Only dark levels grow, and none past 255
    assert max(added) <= 128
    is_dark = images < 128
    images.add_(is_dark.view(torch.uint8).mul_(per_image(added, images, torch.uint8)))


def autocontrast(
    images: Tensor, drawn: Sequence[DrawnOperation], settings: OperationSettings
) -> None:
    """Stretch each channel's levels to 0 to 255; a channel of one level stays as it is."""
    lowest = images.amin(dim=(2, 3), keepdim=True)
    highest = images.amax(dim=(2, 3), keepdim=True)
    is_flat = lowest == highest
    scale = (highest - lowest).mul(1 / 255)
    # A flat channel is divided by one, and nothing is subtracted
    scale.masked_fill_(is_flat, 1.0)
    lowest.masked_fill_(is_flat, 0)
    images.copy_((images - lowest).div(scale))


def equalize(images: Tensor, drawn: Sequence[DrawnOperation], settings: OperationSettings) -> None:
    """Spread each channel's levels so that all are about equally frequent, as Pillow does."""
    levels = images.flatten(2).to(torch.int64)
    num_pixels = levels.shape[-1]
    histogram = levels.new_zeros(*levels.shape[:2], 256, dtype=torch.int32)
    histogram.scatter_add_(2, levels, histogram.new_ones(1).expand_as(levels))

    # Pixels darker than each level. Past the lightest level of the image these are all of them, so
    # the remainder is largest at the lightest one
    darker = histogram.cumsum(2, dtype=torch.int32).sub_(histogram)
    step = darker.remainder(num_pixels).amax(2, keepdim=True)
    step.div_(255, rounding_mode="floor")
    table = (darker + step.div(2, rounding_mode="floor")).div_(
        step.clamp(min=1), rounding_mode="floor"
    )
    # Pillow leaves a channel alone that has too few pixels to be spread
    unchanged = torch.arange(256, dtype=torch.int32, device=images.device)
    table = torch.where(step == 0, unchanged, table.clamp_(max=255)).to(torch.uint8)
    images.copy_(table.gather(2, levels).view_as(images))


def grayscale(images: Tensor, drawn: Sequence[DrawnOperation], settings: OperationSettings) -> None:
    images.copy_(luminance(images))


def blur(images: Tensor, drawn: Sequence[DrawnOperation], settings: OperationSettings) -> None:
    """Gaussian blur; every channel of every image is convolved with a kernel of its own."""
    n, C, height, width = images.shape
    kernels = send(gaussian_kernels(strengths_of(drawn)), images.device)  # (n, side)
    side = kernels.shape[1]
    kernels = kernels[:, :, None] * kernels[:, None, :]
    kernels = kernels[:, None].expand(-1, C, -1, -1).reshape(n * C, 1, side, side)

    padded = F.pad(images.float(), (side // 2,) * 4, mode="reflect")
    padded = padded.reshape(1, n * C, *padded.shape[-2:])
    blurred = F.conv2d(padded, kernels, groups=n * C)
    images.copy_(blurred.round_().view(n, C, height, width))


def gaussian_kernels(sigmas: Sequence[float]) -> Tensor:
    """One-dimensional kernels of these standard deviations in pixels, with zeros to the largest.

    float32 (n, 2 radius + 1).
    """
    radii = [blur_radius(sigma) for sigma in sigmas]
    largest = max(radii)
    kernels = torch.zeros(len(sigmas), 2 * largest + 1)
    for radius in sorted(set(radii)):
        members = [number for number, own in enumerate(radii) if own == radius]
        sigma = torch.tensor([sigmas[number] for number in members])[:, None]
        # In units of √2 standard deviations the exponent is a square
        limit = 2 * radius / (2.0 * math.sqrt(2.0))
        positions = torch.linspace(-limit, limit, 2 * radius + 1)
        own = torch.softmax((positions / sigma).pow(2).neg(), dim=1)
        kernels[members, largest - radius : largest + radius + 1] = own
    return kernels


def warp(images: Tensor, drawn: Sequence[DrawnOperation], settings: OperationSettings) -> None:
    """Shear, translate or rotate each image, all of them in one sampling."""
    n, C, height, width = images.shape
    matrices = torch.tensor([warp_matrix(op, height, width, settings) for op in drawn])
    # From pixels to fractions of half the sides
    matrices = matrices.view(n, 2, 3) / torch.tensor([0.5 * width, 0.5 * height])[:, None]
    grid = affine_positions(
        send(matrices, images.device),
        centers_from_middle(width, images.device),
        centers_from_middle(height, images.device),
    )
    # torchvision samples batches bilinearly at best
    nearest = settings.interpolation == InterpolationMode.NEAREST
    mode = "nearest" if nearest else "bilinear"

    fill = fill_color(C, settings)
    if fill is None:
        values = images.float()
    else:
        # Sampled like the colors, a channel of ones tells how much of a pixel the image covers
        values = torch.ones(n, C + 1, height, width, device=images.device)
        values[:, :C].copy_(images)
    sampled = F.grid_sample(values, grid, mode, padding_mode="zeros", align_corners=False)
    if fill is not None:
        color = send(torch.tensor(fill, dtype=torch.float32), images.device)[:, None, None]
        sampled = blend_fill(sampled[:, :C], sampled[:, C:], color, nearest)
    images.copy_(sampled if nearest else sampled.round_())


def blend_fill(colors: Tensor, covered: Tensor, fill: Tensor, nearest: bool) -> Tensor:
    """Sampled colors (n, C, height, width) with the fill color where the image covers nothing."""
    if nearest:
        return torch.where(covered < 0.5, fill, colors)
    return colors.sub_(fill).mul_(covered).add_(fill)


def centers_from_middle(side: int, device: torch.device) -> Tensor:
    """Centers of pixels along a side, counted from the image's middle; (side,)."""
    return torch.arange((1 - side) / 2, side / 2, device=device)


def warp_matrix(
    operation: DrawnOperation, height: int, width: int, settings: OperationSettings
) -> tuple[float, ...]:
    """Where an output pixel comes from, in pixels from the image's middle: the rows of (2, 3).

    In the order of torchvision's operations, so that the same numbers are rounded.
    """
    name, strength, _ = operation
    if name == "rotate":
        angle = math.radians(-(strength % 360))
        return (math.cos(angle), math.sin(angle), 0.0, -math.sin(angle), math.cos(angle), 0.0)

    shear_x = shear_y = right = down = 0.0
    if name == "shear_x":
        shear_x = math.tan(math.radians(shear_degrees(strength)))
    elif name == "shear_y":
        angle = math.radians(shear_degrees(strength))
        shear_y = math.sin(angle) / math.cos(angle)
    elif name == "translate_x":
        right = whole_pixels(strength, settings)
    else:
        down = whole_pixels(strength, settings)

    # Sheared about the policy's origin
    x, y = settings.origin - width * 0.5, settings.origin - height * 0.5
    x_offset = x - (x + right) - shear_x * (y + down)
    y_offset = y - shear_y * (x + right) - (y + down)
    return (1.0, shear_x, x_offset, shear_y, 1.0, y_offset)


def cutout(images: Tensor, drawn: Sequence[DrawnOperation], settings: OperationSettings) -> None:
    C, height, width = images.shape[1:]
    boxes = torch.tensor([cutout_box(operation, height, width) for operation in drawn])
    color = torch.tensor(fill_color(C, settings) or [0], dtype=torch.uint8)
    in_box = box_mask(boxes, height, width, images.device)
    images.copy_(torch.where(in_box, send(color, images.device)[:, None, None], images))


# Those with the same function are changed together, so they stand together
BATCH_OPERATIONS: dict[str, Change] = {
    "saturation": enhance,
    "contrast": enhance,
    "brightness": enhance,
    "gray_contrast": gray_contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "invert": solarize,
    "solarize_add": solarize_add,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "grayscale": grayscale,
    "blur": blur,
    "shear_x": warp,
    "shear_y": warp,
    "translate_x": warp,
    "translate_y": warp,
    "rotate": warp,
    "cutout": cutout,
}
ORDER = {name: number for number, name in enumerate(BATCH_OPERATIONS)}
