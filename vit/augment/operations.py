"""TODO: say what this file is for."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as ops


class DrawnOperation(NamedTuple):
    name: str
    strength: float = 0.0
    place: tuple[float, float] = (
        0.0,
        0.0,
    )  # row and column as shares of the sides, where the change has one


@dataclass(frozen=True)
class Policy:
    """draw: `numbers` uniform numbers, height and width → changes, to be carried out in turn; fill, interpolation, origin: of
    what turns and moves an image (a batch is interpolated bilinearly where a picture is bicubically)."""

    numbers: int
    draw: Callable[[Sequence[float], int, int], list[DrawnOperation]]
    fill: tuple[int, ...] | None = None  # None: black
    interpolation: InterpolationMode = InterpolationMode.NEAREST
    origin: float = (
        0.0  # of shears, in pixels: 0 the image's corner, 0.5 the middle of the first pixel
    )


def apply_operation(images: Any, change: DrawnOperation, policy: Policy) -> Any:
    """The change on a PIL picture, or on every image of a batch, uint8 (B, C, height, width); type and sizes stay."""
    name, strength, place = change
    batch = isinstance(images, Tensor)
    height, width = ops.get_size(images)
    grey = images.shape[-3] == 1 if batch else images.mode == "L"
    fill: Any = (
        None
        if policy.fill is None
        else ([round(sum(policy.fill) / len(policy.fill))] if grey else list(policy.fill))
    )
    bicubic = policy.interpolation == InterpolationMode.BICUBIC
    interpolation = InterpolationMode.BILINEAR if batch and bicubic else policy.interpolation

    def affine(shear: tuple[float, float], translate: tuple[float, float]) -> Any:
        if policy.interpolation == InterpolationMode.NEAREST:
            translate = (int(translate[0]), int(translate[1]))
        return ops.affine(
            images,
            angle=0.0,
            translate=list(translate),
            scale=1.0,
            shear=list(shear),
            fill=fill,
            interpolation=interpolation,
            center=[policy.origin, policy.origin],
        )

    def blend_with_grey(value: int) -> Any:
        """big_vision's contrast: towards a grey that depends on the image's size alone."""
        if isinstance(images, Tensor):
            return (value + (images.float() - value) * strength).clamp(0, 255).to(torch.uint8)
        table = [int(min(255.0, max(0.0, value + (old - value) * strength))) for old in range(256)]
        return images.point(table * len(images.getbands()))

    def add_below_middle() -> Any:
        if isinstance(images, Tensor):
            return torch.where(
                images < 128, (images.int() + int(strength)).clamp(max=255).to(torch.uint8), images
            )
        table = [min(255, old + int(strength)) if old < 128 else old for old in range(256)]
        return images.point(table * len(images.getbands()))

    def cut_out() -> Any:
        """A square of 2 strength px about the place, cut off at the image's edges (DeVries & Taylor 2017)."""
        row, column, half = int(place[0] * height), int(place[1] * width), int(strength)
        top, left, bottom, right = (
            max(0, row - half),
            max(0, column - half),
            min(height, row + half),
            min(width, column + half),
        )
        values = fill or [0]
        if isinstance(images, Tensor):
            out = images.clone()
            out[..., top:bottom, left:right] = torch.tensor(
                values, dtype=torch.uint8, device=images.device
            )[:, None, None]
            return out
        out = images.copy()
        out.paste(values[0] if grey else tuple(values), (left, top, right, bottom))
        return out

    carry_out: dict[str, Callable[[], Any]] = {
        "identity": lambda: images,
        "shear_x": lambda: affine((math.degrees(math.atan(strength)), 0.0), (0, 0)),
        "shear_y": lambda: affine((0.0, math.degrees(math.atan(strength))), (0, 0)),
        "translate_x": lambda: affine((0.0, 0.0), (strength, 0)),
        "translate_y": lambda: affine((0.0, 0.0), (0, strength)),
        "rotate": lambda: ops.rotate(images, strength, interpolation=interpolation, fill=fill),
        "brightness": lambda: ops.adjust_brightness(images, strength),
        "saturation": lambda: images if grey else ops.adjust_saturation(images, strength),
        "contrast": lambda: ops.adjust_contrast(images, strength),
        "grey_contrast": lambda: blend_with_grey(min(255, height * width // 256)),
        "sharpness": lambda: ops.adjust_sharpness(images, strength),
        "posterize": lambda: (
            ops.posterize(images, int(strength))
            if strength >= 1
            else ops.adjust_brightness(images, 0.0)
        ),
        "solarize": lambda: images if strength > 255 else ops.solarize(images, strength),
        "solarize_add": add_below_middle,
        "autocontrast": lambda: ops.autocontrast(images),
        "equalize": lambda: ops.equalize(images),
        "invert": lambda: ops.invert(images),
        "cutout": cut_out,
        "greyscale": lambda: (
            images if grey else ops.rgb_to_grayscale(images, num_output_channels=3)
        ),
        "blur": lambda: ops.gaussian_blur(
            images, [2 * math.ceil(3 * strength) + 1] * 2, [strength, strength]
        ),
    }
    return carry_out[name]()
