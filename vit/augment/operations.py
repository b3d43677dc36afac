"""The operations of augmentation policies, applied to one PIL image or to a batch of uint8 images.

Nothing here is random: which operations an image gets, and how strongly, is drawn in
vit/augment/policies.py. Type and size of an image stay as they are. The pixels are those of
torchvision's functions, which the tests hold to timm's and big_vision's definitions.

Two tables name the operations. Those on colors need a strength alone; those that move pixels also
need the settings of the policy and, for the cutout, a position.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as ops

Images = Any  # a PIL image (RGB or L), or a batch of images, uint8 (B, C, height, width)


class DrawnOperation(NamedTuple):
    """One operation as it was drawn for one image.

    name      a key of COLOR_OPERATIONS or GEOMETRIC_OPERATIONS
    strength  in the unit of that operation: degrees, pixels, levels or a factor
    position  row and column as fractions of the sides, for the cutout
    """

    name: str
    strength: float = 0.0
    position: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class OperationSettings:
    """What a policy fixes for all its geometric operations.

    fill           RGB color of pixels that come from outside the image; None: black
    interpolation  how warped pixels are sampled
    origin         center of shears in pixels: 0 is the image's corner, 0.5 the middle of the
                   first pixel
    """

    fill: tuple[int, ...] | None = None
    interpolation: InterpolationMode = InterpolationMode.NEAREST
    origin: float = 0.0


def apply_operation(
    images: Images, operation: DrawnOperation, settings: OperationSettings
) -> Images:
    """The same operation on a PIL image or on every image of a batch; the input stays unchanged."""
    if operation.name in COLOR_OPERATIONS:
        return COLOR_OPERATIONS[operation.name](images, operation.strength)
    return GEOMETRIC_OPERATIONS[operation.name](images, operation, settings)


def is_gray(images: Images) -> bool:
    return images.shape[-3] == 1 if isinstance(images, Tensor) else images.mode == "L"


def map_levels(image: Image.Image, table: list[int]) -> Image.Image:
    """Look every pixel of every channel up in a table of 256 levels."""
    return image.point(table * len(image.getbands()))


def identity(images: Images, strength: float) -> Images:
    return images


def saturation(images: Images, strength: float) -> Images:
    """Blend with the grayscale image; a factor of 1 changes nothing."""
    return images if is_gray(images) else ops.adjust_saturation(images, strength)


def gray_contrast(images: Images, strength: float) -> Images:
    """big_vision's contrast: blend with one gray that depends on the image's size alone."""
    # The published code divides the number of pixels by 256 where it means the mean level
    height, width = ops.get_size(images)
    gray = min(255, height * width // 256)
    if isinstance(images, Tensor):
        blended = gray + (images.float() - gray) * strength
        return blended.clamp(0, 255).to(torch.uint8)
    blended = [gray + (level - gray) * strength for level in range(256)]
    return map_levels(images, [int(min(255.0, max(0.0, level))) for level in blended])


def posterize(images: Images, strength: float) -> Images:
    """Keep the highest `strength` bits; without any bit left, the image is black."""
    # Pillow refuses to keep no bits
    if strength < 1:
        return ops.adjust_brightness(images, 0.0)
    return ops.posterize(images, int(strength))


def solarize(images: Images, strength: float) -> Images:
    """Invert the levels from `strength` on."""
    # torchvision refuses a threshold above the largest level, which would invert nothing
    return images if strength > 255 else ops.solarize(images, strength)


def solarize_add(images: Images, strength: float) -> Images:
    """Add `strength` to the levels below 128."""
    added = int(strength)
    if isinstance(images, Tensor):
        brighter = (images.int() + added).clamp(max=255).to(torch.uint8)
        return torch.where(images < 128, brighter, images)
    table = [min(255, level + added) if level < 128 else level for level in range(256)]
    return map_levels(images, table)


def autocontrast(images: Images, strength: float) -> Images:
    return ops.autocontrast(images)


def equalize(images: Images, strength: float) -> Images:
    return ops.equalize(images)


def invert(images: Images, strength: float) -> Images:
    return ops.invert(images)


def grayscale(images: Images, strength: float) -> Images:
    return images if is_gray(images) else ops.rgb_to_grayscale(images, num_output_channels=3)


def blur(images: Images, strength: float) -> Images:
    """Gaussian blur with a standard deviation of `strength` pixels."""
    # Three standard deviations on either side hold 99.7 % of the kernel
    kernel_size = 2 * math.ceil(3 * strength) + 1
    return ops.gaussian_blur(images, [kernel_size, kernel_size], [strength, strength])


def fill_color(images: Images, settings: OperationSettings) -> Any:
    """The fill color as a list with one number per channel, or None for black."""
    if settings.fill is None:
        return None
    # The mean color of a gray image, whose fill must have one channel too
    if is_gray(images):
        return [round(sum(settings.fill) / len(settings.fill))]
    return list(settings.fill)


def interpolation_for(images: Images, settings: OperationSettings) -> InterpolationMode:
    """The policy's interpolation; torchvision samples batches bilinearly at best."""
    if isinstance(images, Tensor) and settings.interpolation == InterpolationMode.BICUBIC:
        return InterpolationMode.BILINEAR
    return settings.interpolation


def affine(
    images: Images,
    settings: OperationSettings,
    *,
    shear: tuple[float, float] = (0.0, 0.0),
    translate: tuple[float, float] = (0, 0),
) -> Images:
    """Shear by angles in degrees (x, y) and translate by pixels (x, y)."""
    # Whole pixels where nothing is interpolated, as in torchvision's policies
    if settings.interpolation == InterpolationMode.NEAREST:
        translate = (int(translate[0]), int(translate[1]))
    # About the origin and not the image's center, as all published policies shear
    return ops.affine(
        images,
        angle=0.0,
        translate=list(translate),
        scale=1.0,
        shear=list(shear),
        fill=fill_color(images, settings),
        interpolation=interpolation_for(images, settings),
        center=[settings.origin, settings.origin],
    )


def shear_degrees(strength: float) -> float:
    """The angle of a shear that moves a row by `strength` times its distance from the origin."""
    return math.degrees(math.atan(strength))


def shear_x(images: Images, operation: DrawnOperation, settings: OperationSettings) -> Images:
    return affine(images, settings, shear=(shear_degrees(operation.strength), 0.0))


def shear_y(images: Images, operation: DrawnOperation, settings: OperationSettings) -> Images:
    return affine(images, settings, shear=(0.0, shear_degrees(operation.strength)))


def translate_x(images: Images, operation: DrawnOperation, settings: OperationSettings) -> Images:
    return affine(images, settings, translate=(operation.strength, 0))


def translate_y(images: Images, operation: DrawnOperation, settings: OperationSettings) -> Images:
    return affine(images, settings, translate=(0, operation.strength))


def rotate(images: Images, operation: DrawnOperation, settings: OperationSettings) -> Images:
    """Rotate about the center by an angle in degrees."""
    return ops.rotate(
        images,
        operation.strength,
        interpolation=interpolation_for(images, settings),
        fill=fill_color(images, settings),
    )


def cutout(images: Images, operation: DrawnOperation, settings: OperationSettings) -> Images:
    """Fill a square of twice the strength, cut off at the edges (DeVries & Taylor 2017)."""
    height, width = ops.get_size(images)
    half = int(operation.strength)
    row = int(operation.position[0] * height)
    column = int(operation.position[1] * width)
    top, bottom = max(0, row - half), min(height, row + half)
    left, right = max(0, column - half), min(width, column + half)
    color = fill_color(images, settings) or [0]
    if isinstance(images, Tensor):
        out = images.clone()
        color = torch.tensor(color, dtype=torch.uint8, device=images.device)
        out[..., top:bottom, left:right] = color[:, None, None]
        return out
    out = images.copy()
    out.paste(color[0] if is_gray(images) else tuple(color), (left, top, right, bottom))
    return out


COLOR_OPERATIONS: dict[str, Callable[[Images, float], Images]] = {
    "identity": identity,
    "brightness": ops.adjust_brightness,
    "saturation": saturation,
    "contrast": ops.adjust_contrast,
    "gray_contrast": gray_contrast,
    "sharpness": ops.adjust_sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
    "grayscale": grayscale,
    "blur": blur,
}

GEOMETRIC_OPERATIONS: dict[str, Callable[[Images, DrawnOperation, OperationSettings], Images]] = {
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
    "cutout": cutout,
}
