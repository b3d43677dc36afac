"""Random changes of an image by published policies: three RandAugments, AutoAugment for CIFAR-10, 3-Augment, colour jitter.

A policy turns uniform numbers into a list of changes, each a name, a strength and a place; `apply` carries one out, by
torchvision's functions, on a picture from a file and on a batch of uint8 images alike.
"""

import functools
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torchvision.transforms import InterpolationMode

from vit.augment.operations import DrawnOperation, Policy

NUMBERS_A_CHANGE = 6  # which, its sign, whether at all, how strong, and a place's row and column


class Operation(NamedTuple):
    """One of a policy's choices: strength(level, side) of a change, level from 0 to 1 and side in pixels."""

    name: str
    strength: Callable[[float, int], float] = lambda level, side: 0.0
    signed: bool = False  # the strength is negated every other time
    centre: float = 0.0  # what a signed strength is added to


@functools.cache
def linspace_list(first: float, last: float, bins: int) -> list[float]:
    """`bins` numbers from first to last, in torchvision's own float32."""
    return torch.linspace(first, last, bins).tolist()


def linear_strength(largest: float, bins: int) -> Callable[[float, int], float]:
    return lambda level, side: linspace_list(0.0, largest, bins)[round(level * (bins - 1))]


def torchvision_operations(bins: int) -> dict[str, Operation]:
    """Strengths as in torchvision's RandAugment (31 bins) and AutoAugment (10)."""

    def moved(level: float, side: int) -> float:
        return linear_strength(150.0 / 331.0 * side, bins)(level, side)

    return {
        operation.name: operation
        for operation in [
            *(
                Operation(name, linear_strength(0.3, bins), signed=True)
                for name in ("shear_x", "shear_y")
            ),
            *(Operation(name, moved, signed=True) for name in ("translate_x", "translate_y")),
            Operation("rotate", linear_strength(30.0, bins), signed=True),
            *(
                Operation(name, linear_strength(0.9, bins), signed=True, centre=1.0)
                for name in ("brightness", "saturation", "contrast", "sharpness")
            ),
            Operation("posterize", lambda level, side: 8 - round(4 * level)),
            Operation(
                "solarize",
                lambda level, side: (
                    255.0 * linspace_list(1.0, 0.0, bins)[round(level * (bins - 1))]
                ),
            ),
            *(Operation(name) for name in ("autocontrast", "equalize", "invert")),
        ]
    }


BIG_VISION_OPERATIONS = [
    Operation("autocontrast"),
    Operation("equalize"),
    Operation("invert"),
    Operation("rotate", lambda level, side: 30 * level, signed=True),
    Operation("posterize", lambda level, side: int(4 * level)),
    Operation("solarize", lambda level, side: int(256 * level)),
    *(
        Operation(name, lambda level, side: 1.8 * level + 0.1)
        for name in ("saturation", "grey_contrast", "brightness", "sharpness")
    ),
    *(
        Operation(name, lambda level, side: 0.3 * level, signed=True)
        for name in ("shear_x", "shear_y")
    ),
    *(
        Operation(name, lambda level, side: 100 * level, signed=True)
        for name in ("translate_x", "translate_y")
    ),
    Operation("cutout", lambda level, side: int(40 * level)),
    Operation("solarize_add", lambda level, side: int(110 * level)),
]


TIMM_OPERATIONS = [
    Operation("autocontrast"),
    Operation("equalize"),
    Operation("invert"),
    Operation("rotate", lambda level, side: 30 * level, signed=True),
    Operation("posterize", lambda level, side: 4 - int(4 * level)),
    Operation("solarize", lambda level, side: 256 - min(256, int(256 * level))),
    Operation("solarize_add", lambda level, side: min(128, int(110 * level))),
    *(
        Operation(name, lambda level, side: min(0.9, 0.9 * level), signed=True, centre=1.0)
        for name in ("saturation", "contrast", "brightness", "sharpness")
    ),
    *(
        Operation(name, lambda level, side: 0.3 * level, signed=True)
        for name in ("shear_x", "shear_y")
    ),
    *(
        Operation(name, lambda level, side: level * 0.45 * side, signed=True)
        for name in ("translate_x", "translate_y")
    ),
]


AUTOAUGMENT_OPERATIONS = torchvision_operations(bins=10)


# Table 7 of Cubuk et al. 2019 (arXiv:1805.09501), "Reduced CIFAR-10": (operation, probability, magnitude from 0 to 9) twice
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


def draw_operation(
    operation: Operation, level: float, numbers: Sequence[float], height: int, width: int
) -> DrawnOperation:
    strength = operation.strength(level, height if operation.name == "translate_y" else width)
    if operation.signed and numbers[1] < 0.5:
        strength = -strength
    return DrawnOperation(
        operation.name,
        operation.centre + strength,
        (numbers[4], numbers[5]) if operation.name == "cutout" else (0.0, 0.0),
    )


def split_numbers(numbers: Sequence[float]) -> list[Sequence[float]]:
    """The numbers of each change, one after another."""
    return [
        numbers[start : start + NUMBERS_A_CHANGE]
        for start in range(0, len(numbers), NUMBERS_A_CHANGE)
    ]


def randaugment(
    operations: Sequence[Operation], level: float, probability: float = 1.0, deviation: float = 0.0
) -> Callable[[Sequence[float], int, int], list[DrawnOperation]]:
    """As many operations an image as there are numbers for, each drawn anew, of `level` (0 to 1) plus a normal number times
    `deviation`, within 0 and 1, and carried out with `probability` (Cubuk et al. 2020, arXiv:1909.13719)."""

    def draw(numbers: Sequence[float], height: int, width: int) -> list[DrawnOperation]:
        changes = []
        for own in split_numbers(numbers):
            if own[2] < probability:
                normal = (
                    NormalDist().inv_cdf(min(max(own[3], 1e-9), 1 - 1e-9)) if deviation else 0.0
                )
                operation = operations[int(own[0] * len(operations))]
                changes.append(
                    draw_operation(
                        operation,
                        min(1.0, max(0.0, level + deviation * normal)),
                        own,
                        height,
                        width,
                    )
                )
        return changes

    return draw


def autoaugment(numbers: Sequence[float], height: int, width: int) -> list[DrawnOperation]:
    """One of the 25 pairs, each of its two operations with its own probability."""
    changes = []
    pair = AUTOAUGMENT_CIFAR10[int(numbers[0] * len(AUTOAUGMENT_CIFAR10))]
    for own, (name, probability, magnitude) in zip(split_numbers(numbers), pair, strict=True):
        if own[2] < probability:
            changes.append(
                draw_operation(AUTOAUGMENT_OPERATIONS[name], magnitude / 9, own, height, width)
            )
    return changes


def three_augment(numbers: Sequence[float], height: int, width: int) -> list[DrawnOperation]:
    """Grey, solarised or blurred, one of the three (Touvron et al. 2022, arXiv:2204.07118, section 3.2)."""
    return [
        [
            DrawnOperation("greyscale"),
            DrawnOperation("solarize", 128.0),
            DrawnOperation("blur", 0.1 + 1.9 * numbers[1]),
        ][int(numbers[0] * 3)]
    ]


def color_jitter_policy(
    strength: float,
) -> Callable[[Sequence[float], int, int], list[DrawnOperation]]:
    """Brightness, contrast and saturation, each by a factor within 1 ± strength, in a random order."""

    def draw(numbers: Sequence[float], height: int, width: int) -> list[DrawnOperation]:
        lowest = max(0.0, 1 - strength)
        factors = [lowest + (1 + strength - lowest) * number for number in numbers[:3]]
        changes = [
            DrawnOperation(name, factor)
            for name, factor in zip(("brightness", "contrast", "saturation"), factors, strict=True)
        ]
        return [change for _, change in sorted(zip(numbers[3:6], changes, strict=True))]

    return draw


def build_policies(
    name: str, ops: int | None, magnitude: float | None, color_jitter: float
) -> list[Policy]:
    """The policies of conf/augment: `name` with its number of operations and magnitude (the RandAugments alone; None: as
    published), then the colour jitter, where it is above 0. Raises ValueError for another name.

    randaugment: torchvision's, magnitude of 30; randaugment_big_vision: full scale at 10, grey fill; randaugment_timm:
    "rand-m<magnitude>-mstd0.5-inc1", of 10, as in DeiT; autoaugment: of CIFAR-10, torchvision's; three_augment: DeiT-III's.
    """
    count, level = (
        ops or 2,
        (10.0 if name == "randaugment_big_vision" else 9.0) if magnitude is None else magnitude,
    )
    identity = Operation("identity")
    policies = {
        "none": None,
        "randaugment": Policy(
            count * NUMBERS_A_CHANGE,
            randaugment(
                [
                    identity,
                    *(
                        operation
                        for operation in torchvision_operations(31).values()
                        if operation.name != "invert"
                    ),
                ],
                level / 30,
            ),
        ),
        "randaugment_big_vision": Policy(
            count * NUMBERS_A_CHANGE,
            randaugment(BIG_VISION_OPERATIONS, level / 10),
            fill=(128, 128, 128),
            origin=0.5,
        ),
        "randaugment_timm": Policy(
            count * NUMBERS_A_CHANGE,
            randaugment(TIMM_OPERATIONS, level / 10, 0.5, 0.05),
            fill=(124, 116, 104),
            interpolation=InterpolationMode.BICUBIC,
        ),
        "autoaugment": Policy(2 * NUMBERS_A_CHANGE, autoaugment),
        "three_augment": Policy(2, three_augment),
    }
    if name not in policies:
        raise ValueError(f"augment.policy must be one of {', '.join(policies)}, got {name}")
    jitter = Policy(6, color_jitter_policy(color_jitter)) if color_jitter else None
    return [policy for policy in (policies[name], jitter) if policy is not None]
