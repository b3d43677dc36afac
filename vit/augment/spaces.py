"""The operations that each policy chooses from, and how strong each is at a given level.

A level from 0 to 1 is the policy's magnitude over its full scale. Where the libraries disagree,
each has a table of its own: torchvision's RandAugment and AutoAugment, timm's RandAugment as DeiT
trains with it, and big_vision's. Operations are named as in vit/augment/operations.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

# (level from 0 to 1, side of the image in pixels) → strength; partials of functions of this module,
# so that policies can be pickled for worker processes
Strength = Callable[[float, int], float]


def no_strength(level: float, side: int) -> float:
    return 0.0


class Operation(NamedTuple):
    """One choice of a policy.

    strength  at a level, for the side of the image, in pixels, along which the operation moves it
    signed    the strength is negated half the time
    center    what the signed strength is added to: 1 for factors
    """

    name: str
    strength: Strength = no_strength
    signed: bool = False
    center: float = 0.0


def proportional(level: float, side: int, *, full_scale: float) -> float:
    return full_scale * level


def whole_number(level: float, side: int, *, full_scale: float) -> float:
    """Proportional to the level, rounded down."""
    return int(full_scale * level)


@functools.cache
def linspace_list(first: float, last: float, bins: int) -> list[float]:
    """`bins` numbers from first to last, in torchvision's own float32."""
    return torch.linspace(first, last, bins).tolist()


def in_bins(level: float, side: int, *, full_scale: float, bins: int) -> float:
    """Proportional to the level, in one of torchvision's bins."""
    return linspace_list(0.0, full_scale, bins)[round(level * (bins - 1))]


def torchvision_translation(level: float, side: int, *, bins: int) -> float:
    """In pixels; AutoAugment's 150 of ImageNet's 331 (Cubuk et al. 2019)."""
    return in_bins(level, side, full_scale=150.0 / 331.0 * side, bins=bins)


def torchvision_posterize(level: float, side: int) -> float:
    """The number of bits that are kept: 8 down to 4."""
    return 8 - round(4 * level)


def torchvision_solarize(level: float, side: int, *, bins: int) -> float:
    return 255.0 * linspace_list(1.0, 0.0, bins)[round(level * (bins - 1))]


def torchvision_operations(bins: int) -> dict[str, Operation]:
    """By name, with strengths as in torchvision's RandAugment (31 bins) and AutoAugment (10)."""
    shear = functools.partial(in_bins, full_scale=0.3, bins=bins)
    translation = functools.partial(torchvision_translation, bins=bins)
    rotation = functools.partial(in_bins, full_scale=30.0, bins=bins)
    factor = functools.partial(in_bins, full_scale=0.9, bins=bins)
    solarization = functools.partial(torchvision_solarize, bins=bins)
    # A policy draws an operation by its position in this list, so the order is part of the results
    operations = [
        Operation("shear_x", shear, signed=True),
        Operation("shear_y", shear, signed=True),
        Operation("translate_x", translation, signed=True),
        Operation("translate_y", translation, signed=True),
        Operation("rotate", rotation, signed=True),
        Operation("brightness", factor, signed=True, center=1.0),
        Operation("saturation", factor, signed=True, center=1.0),
        Operation("contrast", factor, signed=True, center=1.0),
        Operation("sharpness", factor, signed=True, center=1.0),
        Operation("posterize", torchvision_posterize),
        Operation("solarize", solarization),
        Operation("autocontrast"),
        Operation("equalize"),
        Operation("invert"),
    ]
    return {operation.name: operation for operation in operations}


AUTOAUGMENT_OPERATIONS = torchvision_operations(bins=10)


def torchvision_randaugment_operations() -> list[Operation]:
    """The operations of torchvision's RandAugment: all but inversion, and none at all."""
    operations = torchvision_operations(bins=31)
    del operations["invert"]
    return [Operation("identity"), *operations.values()]


def big_vision_factor(level: float, side: int) -> float:
    return 1.8 * level + 0.1


# github.com/google-research/big_vision, big_vision/pp/autoaugment.py; lengths in pixels at 224 px
BIG_VISION_OPERATIONS = [
    Operation("autocontrast"),
    Operation("equalize"),
    Operation("invert"),
    Operation("rotate", functools.partial(proportional, full_scale=30), signed=True),
    Operation("posterize", functools.partial(whole_number, full_scale=4)),
    Operation("solarize", functools.partial(whole_number, full_scale=256)),
    Operation("saturation", big_vision_factor),
    Operation("gray_contrast", big_vision_factor),
    Operation("brightness", big_vision_factor),
    Operation("sharpness", big_vision_factor),
    Operation("shear_x", functools.partial(proportional, full_scale=0.3), signed=True),
    Operation("shear_y", functools.partial(proportional, full_scale=0.3), signed=True),
    Operation("translate_x", functools.partial(proportional, full_scale=100), signed=True),
    Operation("translate_y", functools.partial(proportional, full_scale=100), signed=True),
    Operation("cutout", functools.partial(whole_number, full_scale=40)),
    Operation("solarize_add", functools.partial(whole_number, full_scale=110)),
]


def timm_posterize(level: float, side: int) -> float:
    """The number of bits that are kept: 4 down to none."""
    return 4 - int(4 * level)


def timm_solarize(level: float, side: int) -> float:
    return 256 - int(256 * level)


def timm_translation(level: float, side: int) -> float:
    """In pixels: up to 45 % of the side."""
    return level * 0.45 * side


timm_factor = functools.partial(proportional, full_scale=0.9)

# timm's "increasing" variants, the inc1 of rand-m9-mstd0.5-inc1: a higher level is a stronger
# change
TIMM_OPERATIONS = [
    Operation("autocontrast"),
    Operation("equalize"),
    Operation("invert"),
    Operation("rotate", functools.partial(proportional, full_scale=30), signed=True),
    Operation("posterize", timm_posterize),
    Operation("solarize", timm_solarize),
    Operation("solarize_add", functools.partial(whole_number, full_scale=110)),
    Operation("saturation", timm_factor, signed=True, center=1.0),
    Operation("contrast", timm_factor, signed=True, center=1.0),
    Operation("brightness", timm_factor, signed=True, center=1.0),
    Operation("sharpness", timm_factor, signed=True, center=1.0),
    Operation("shear_x", functools.partial(proportional, full_scale=0.3), signed=True),
    Operation("shear_y", functools.partial(proportional, full_scale=0.3), signed=True),
    Operation("translate_x", timm_translation, signed=True),
    Operation("translate_y", timm_translation, signed=True),
]


# Table 7 of Cubuk et al. 2019 (arXiv:1805.09501), "Reduced CIFAR-10": 25 pairs of
# (operation, probability, magnitude from 0 to 9)
AUTOAUGMENT_CIFAR10 = [
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("saturation", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("saturation", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("saturation", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("saturation", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("saturation", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
]
