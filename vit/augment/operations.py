"""The operations of augmentation policies, applied to one PIL image.

Nothing here is random: which operations an image gets, and how strongly, is drawn in
vit/augment/policies.py. Type and size of an image stay as they are. The pixels are those of
torchvision's functions, which the tests hold to timm's and big_vision's definitions. The same
operations on batches are in vit/augment/batch_operations.py.

Two tables name the operations. Those on colors need a strength alone; those that move pixels also
need the settings of the policy and, for the cutout, a position.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

# They take PIL images too, but are annotated for tensors alone
ops: Any = functional


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
    image: Image.Image, operation: DrawnOperation, settings: OperationSettings
) -> Image.Image:
    """The operation on an image of mode RGB or L, which stays unchanged."""
    if operation.name in COLOR_OPERATIONS:
        return COLOR_OPERATIONS[operation.name](image, operation.strength)
    return GEOMETRIC_OPERATIONS[operation.name](image, operation, settings)


def is_gray(image: Image.Image) -> bool:
    return image.mode == "L"


def map_levels(image: Image.Image, table: list[int]) -> Image.Image:
    """Look every pixel of every channel up in a table of 256 levels."""
    return image.point(table * len(image.getbands()))


def identity(image: Image.Image, strength: float) -> Image.Image:
    return image


def saturation(image: Image.Image, strength: float) -> Image.Image:
    """Blend with the grayscale image; a factor of 1 changes nothing."""
    return image if is_gray(image) else ops.adjust_saturation(image, strength)


def gray_contrast(image: Image.Image, strength: float) -> Image.Image:
    """big_vision's contrast: blend with one gray that depends on the image's size alone."""
    gray = big_vision_gray(image.height, image.width)
    blended = [gray + (level - gray) * strength for level in range(256)]
    return map_levels(image, [int(min(255.0, max(0.0, level))) for level in blended])


def big_vision_gray(height: int, width: int) -> int:
    """The level that big_vision's contrast blends with."""
    # The published code divides the number of pixels by 256 where it means the mean level
    return min(255, height * width // 256)


def posterize(image: Image.Image, strength: float) -> Image.Image:
    """Keep the highest `strength` bits; without any bit left, the image is black."""
    # Pillow refuses to keep no bits
    if strength < 1:
        return ops.adjust_brightness(image, 0.0)
    return ops.posterize(image, int(strength))


def solarize(image: Image.Image, strength: float) -> Image.Image:
    """Invert the levels from `strength` on."""
    # torchvision refuses a threshold above the largest level, which would invert nothing
    return image if strength > 255 else ops.solarize(image, strength)


def solarize_add(image: Image.Image, strength: float) -> Image.Image:
    """Add `strength` to the levels below 128."""
    added = int(strength)
    table = [min(255, level + added) if level < 128 else level for level in range(256)]
    return map_levels(image, table)


def autocontrast(image: Image.Image, strength: float) -> Image.Image:
    return ops.autocontrast(image)


def equalize(image: Image.Image, strength: float) -> Image.Image:
    return ops.equalize(image)


def invert(image: Image.Image, strength: float) -> Image.Image:
    return ops.invert(image)


def grayscale(image: Image.Image, strength: float) -> Image.Image:
    return image if is_gray(image) else ops.rgb_to_grayscale(image, num_output_channels=3)


def blur(image: Image.Image, strength: float) -> Image.Image:
    """Gaussian blur with a standard deviation of `strength` pixels."""
    kernel_size = 2 * blur_radius(strength) + 1
    return ops.gaussian_blur(image, [kernel_size, kernel_size], [strength, strength])


def blur_radius(sigma: float) -> int:
    """Pixels on either side of the center: three standard deviations hold 99.7 % of a kernel."""
    return math.ceil(3 * sigma)


def fill_color(num_channels: int, settings: OperationSettings) -> list[int] | None:
    """The fill color as a list with one number per channel, or None for black."""
    if settings.fill is None:
        return None
    # The mean color of a gray image, whose fill must have one channel too
    if num_channels == 1:
        return [round(sum(settings.fill) / len(settings.fill))]
    return list(settings.fill)


def whole_pixels(strength: float, settings: OperationSettings) -> float:
    """By how much a translation moves: whole pixels where nothing is interpolated.

    As in torchvision's policies.
    """
    return int(strength) if settings.interpolation == InterpolationMode.NEAREST else strength


def affine(
    image: Image.Image,
    settings: OperationSettings,
    *,
    shear: tuple[float, float] = (0.0, 0.0),
    translate: tuple[float, float] = (0, 0),
) -> Image.Image:
    """Shear by angles in degrees (x, y) and translate by pixels (x, y)."""
    # About the origin and not the image's center, as all published policies shear
    return ops.affine(
        image,
        angle=0.0,
        translate=[whole_pixels(pixels, settings) for pixels in translate],
        scale=1.0,
        shear=list(shear),
        fill=fill_color(len(image.getbands()), settings),
        interpolation=settings.interpolation,
        center=[settings.origin, settings.origin],
    )


def shear_degrees(strength: float) -> float:
    """The angle of a shear that moves a row by `strength` times its distance from the origin."""
    return math.degrees(math.atan(strength))


def shear_x(
    image: Image.Image, operation: DrawnOperation, settings: OperationSettings
) -> Image.Image:
    return affine(image, settings, shear=(shear_degrees(operation.strength), 0.0))


def shear_y(
    image: Image.Image, operation: DrawnOperation, settings: OperationSettings
) -> Image.Image:
    return affine(image, settings, shear=(0.0, shear_degrees(operation.strength)))


def translate_x(
    image: Image.Image, operation: DrawnOperation, settings: OperationSettings
) -> Image.Image:
    return affine(image, settings, translate=(operation.strength, 0))


def translate_y(
    image: Image.Image, operation: DrawnOperation, settings: OperationSettings
) -> Image.Image:
    return affine(image, settings, translate=(0, operation.strength))


def rotate(
    image: Image.Image, operation: DrawnOperation, settings: OperationSettings
) -> Image.Image:
    """Rotate about the center by an angle in degrees."""
    return ops.rotate(
        image,
        operation.strength,
        interpolation=settings.interpolation,
        fill=fill_color(len(image.getbands()), settings),
    )


def cutout(
    image: Image.Image, operation: DrawnOperation, settings: OperationSettings
) -> Image.Image:
    """Fill a square of twice the strength, cut off at the edges (DeVries & Taylor 2017)."""
    top, left, height, width = cutout_box(operation, image.height, image.width)
    color = fill_color(len(image.getbands()), settings) or [0]
    out = image.copy()
    box = (left, top, left + width, top + height)
    out.paste(color[0] if is_gray(image) else tuple(color), box)
    return out


def cutout_box(operation: DrawnOperation, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width in pixels of what a cutout fills."""
    half = int(operation.strength)
    row = int(operation.position[0] * height)
    column = int(operation.position[1] * width)
    top, bottom = max(0, row - half), min(height, row + half)
    left, right = max(0, column - half), min(width, column + half)
    return top, left, bottom - top, right - left


ColorOperation = Callable[[Image.Image, float], Image.Image]
GeometricOperation = Callable[[Image.Image, DrawnOperation, OperationSettings], Image.Image]

COLOR_OPERATIONS: dict[str, ColorOperation] = {
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

GEOMETRIC_OPERATIONS: dict[str, GeometricOperation] = {
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
    "cutout": cutout,
}
