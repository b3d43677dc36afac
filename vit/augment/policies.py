"""Published augmentation policies: RandAugment, AutoAugment for CIFAR-10, 3-Augment, color jitter.

A policy turns uniform random numbers into a list of operations, each a name, a strength and a
position. It sees no pixels: vit/augment/operations.py applies what is drawn here, to one image
from a file and to a batch alike.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

from torchvision.transforms import InterpolationMode

from vit.augment.operations import DrawnOperation, OperationSettings
from vit.augment.spaces import (
    AUTOAUGMENT_CIFAR10,
    AUTOAUGMENT_OPERATIONS,
    BIG_VISION_OPERATIONS,
    TIMM_OPERATIONS,
    Operation,
    torchvision_randaugment_operations,
)
from vit.errors import ConfigError

# Random numbers that one operation takes, in this order: which operation, its sign, whether it is
# applied at all, the deviation of its level, and a position's row and column
CHOICE, SIGN, APPLY, DEVIATION, ROW, COLUMN = range(6)
NUMBERS_PER_OPERATION = 6

# (uniform numbers in [0, 1), the image's height and width) → operations in the order of application
Draw = Callable[[Sequence[float], int, int], list[DrawnOperation]]


@dataclass(frozen=True)
class Policy:
    """draw turns num_random uniform numbers into operations, which settings say how to apply."""

    num_random: int
    draw: Draw
    settings: OperationSettings = field(default_factory=OperationSettings)


def draw_operation(
    operation: Operation, level: float, numbers: Sequence[float], height: int, width: int
) -> DrawnOperation:
    """The operation at a level from 0 to 1; its sign and its position come from the numbers."""
    side = height if operation.name == "translate_y" else width
    strength = operation.strength(level, side)
    if operation.signed and numbers[SIGN] < 0.5:
        strength = -strength
    # Only the cutout has a position
    position = (numbers[ROW], numbers[COLUMN]) if operation.name == "cutout" else (0.0, 0.0)
    return DrawnOperation(operation.name, operation.center + strength, position)


def split_numbers(numbers: Sequence[float]) -> list[Sequence[float]]:
    """The random numbers of each operation."""
    starts = range(0, len(numbers), NUMBERS_PER_OPERATION)
    return [numbers[start : start + NUMBERS_PER_OPERATION] for start in starts]


def draw_randaugment(
    numbers: Sequence[float],
    height: int,
    width: int,
    *,
    operations: Sequence[Operation],
    level: float,
    probability: float = 1.0,
    deviation: float = 0.0,
) -> list[DrawnOperation]:
    """RandAugment (Cubuk et al. 2020, arXiv:1909.13719): each operation is chosen independently.

    level        from 0 to 1, common to all operations
    probability  of applying each of them
    deviation    standard deviation of normal noise on the level, which stays within 0 and 1
    """
    drawn = []
    for own in split_numbers(numbers):
        if own[APPLY] >= probability:
            continue
        operation = operations[int(own[CHOICE] * len(operations))]
        noisy_level = level + deviation * standard_normal(own[DEVIATION]) if deviation else level
        noisy_level = min(1.0, max(0.0, noisy_level))
        drawn.append(draw_operation(operation, noisy_level, own, height, width))
    return drawn


def standard_normal(number: float) -> float:
    """A standard normal number from a uniform one, by the inverse of its distribution."""
    return NormalDist().inv_cdf(min(max(number, 1e-9), 1 - 1e-9))


def draw_autoaugment(numbers: Sequence[float], height: int, width: int) -> list[DrawnOperation]:
    """One of AutoAugment's 25 pairs of operations, each applied with its own probability."""
    # The number that RandAugment chooses an operation by chooses the pair here
    pair = AUTOAUGMENT_CIFAR10[int(numbers[CHOICE] * len(AUTOAUGMENT_CIFAR10))]
    drawn = []
    for own, (name, probability, magnitude) in zip(split_numbers(numbers), pair, strict=True):
        if own[APPLY] < probability:
            operation = AUTOAUGMENT_OPERATIONS[name]
            drawn.append(draw_operation(operation, magnitude / 9, own, height, width))
    return drawn


def draw_three_augment(numbers: Sequence[float], height: int, width: int) -> list[DrawnOperation]:
    """Grayscale, solarization or blur (Touvron et al. 2022, arXiv:2204.07118, section 3.2)."""
    blur_sigma = 0.1 + 1.9 * numbers[1]  # pixels
    choices = [
        DrawnOperation("grayscale"),
        DrawnOperation("solarize", 128.0),
        DrawnOperation("blur", blur_sigma),
    ]
    return [choices[int(numbers[0] * 3)]]


def draw_color_jitter(
    numbers: Sequence[float], height: int, width: int, *, strength: float
) -> list[DrawnOperation]:
    """Brightness, contrast and saturation by factors within 1 ± strength, in a random order."""
    lowest = max(0.0, 1 - strength)
    highest = 1 + strength
    operations = []
    for name, number in zip(("brightness", "contrast", "saturation"), numbers[:3], strict=True):
        operations.append(DrawnOperation(name, lowest + (highest - lowest) * number))
    ordered = sorted(zip(numbers[3:6], operations, strict=True))
    return [operation for _, operation in ordered]


def randaugment(num_ops: int | None, magnitude: float | None) -> Policy:
    """torchvision's RandAugment; the magnitude's full scale is 30."""
    draw = functools.partial(
        draw_randaugment,
        operations=torchvision_randaugment_operations(),
        level=(9.0 if magnitude is None else magnitude) / 30,
    )
    return Policy((num_ops or 2) * NUMBERS_PER_OPERATION, draw)


def randaugment_big_vision(num_ops: int | None, magnitude: float | None) -> Policy:
    """big_vision's RandAugment, filled with gray; the magnitude's full scale is 10."""
    draw = functools.partial(
        draw_randaugment,
        operations=BIG_VISION_OPERATIONS,
        level=(10.0 if magnitude is None else magnitude) / 10,
    )
    # TensorFlow's transforms count from the middle of the first pixel
    settings = OperationSettings(fill=(128, 128, 128), origin=0.5)
    return Policy((num_ops or 2) * NUMBERS_PER_OPERATION, draw, settings)


def randaugment_timm(num_ops: int | None, magnitude: float | None) -> Policy:
    """timm's rand-m<magnitude>-mstd0.5-inc1, as in DeiT; the magnitude's full scale is 10."""
    draw = functools.partial(
        draw_randaugment,
        operations=TIMM_OPERATIONS,
        level=(9.0 if magnitude is None else magnitude) / 10,
        probability=0.5,
        deviation=0.05,
    )
    # timm fills with ImageNet's mean color
    settings = OperationSettings(fill=(124, 116, 104), interpolation=InterpolationMode.BICUBIC)
    return Policy((num_ops or 2) * NUMBERS_PER_OPERATION, draw, settings)


def autoaugment(num_ops: int | None, magnitude: float | None) -> Policy:
    """torchvision's AutoAugment for CIFAR-10."""
    return Policy(2 * NUMBERS_PER_OPERATION, draw_autoaugment)


def three_augment(num_ops: int | None, magnitude: float | None) -> Policy:
    """DeiT-III's 3-Augment, without its color jitter."""
    return Policy(2, draw_three_augment)


def color_jitter_policy(strength: float) -> Policy:
    """Brightness, contrast and saturation by factors within 1 ± strength."""
    return Policy(6, functools.partial(draw_color_jitter, strength=strength))


# augment.policy → its builder from augment.policy_ops and augment.policy_magnitude, None: as
# published; both mean something to the RandAugments alone
POLICIES: dict[str, Callable[[int | None, float | None], Policy]] = {
    "randaugment": randaugment,
    "randaugment_big_vision": randaugment_big_vision,
    "randaugment_timm": randaugment_timm,
    "autoaugment": autoaugment,
    "three_augment": three_augment,
}


def build_policies(
    name: str, ops: int | None, magnitude: float | None, color_jitter: float
) -> list[Policy]:
    """The policies that conf/augment asks for, in the order of application.

    name: a key of POLICIES, or none. ops and magnitude are those of a RandAugment, None: as
    published. color_jitter: its strength; above 0 it comes last. Raises ConfigError, a
    ValueError, for another name.
    """
    policies = []
    if name in POLICIES:
        policies.append(POLICIES[name](ops, magnitude))
    elif name != "none":
        raise ConfigError(
            f"augment.policy must be one of {', '.join(['none', *POLICIES])}, got {name}"
        )
    if color_jitter:
        policies.append(color_jitter_policy(color_jitter))
    return policies
