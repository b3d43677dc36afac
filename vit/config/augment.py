"""The group `augment`: conf/augment/*.yaml."""

from dataclasses import dataclass

from vit.config.settings import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    Range,
    belongs_to,
    setting,
)

CROP_SCALE = Range(
    lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
    "[smallest, largest], above 0 and at most 1",
)
MAGNITUDE = Range(lambda value: 0 <= value <= 30, "from 0 to 30")
RANDAUGMENTS = belongs_to(
    "augment.policy", "randaugment", "randaugment_big_vision", "randaugment_timm"
)


@dataclass
class AugmentConfig:
    """Random changes of the training images."""

    # random crop of small images: padding as a fraction of the side
    pad: float = setting(PROBABILITY)
    # Random resized crop of image files, and of small images where pad is 0: fraction of the area;
    # null: none
    crop_scale: list[float] | None = setting(CROP_SCALE)
    flip: float = setting(PROBABILITY)  # probability of mirroring, where data.mirror allows it
    policy: str = setting()  # a name of vit.augment.policies
    policy_ops: int | None = setting(POSITIVE, belongs=RANDAUGMENTS)  # operations an image
    policy_magnitude: float | None = setting(MAGNITUDE, belongs=RANDAUGMENTS)
    # brightness, contrast, saturation: a factor within 1 ± this
    color_jitter: float = setting(PROBABILITY)
    erasing: float = setting(PROBABILITY)  # probability of filling a random box with noise
    # alpha of the Beta distribution of the two weights; 0: off
    mixup: float = setting(NOT_NEGATIVE)
    # likewise, of the areas; with both on, either half the time
    cutmix: float = setting(NOT_NEGATIVE)
    mix_probability: float | None = setting(FRACTION)  # of mixing a pair at all; null: 1
    # times a sample comes in a row, augmented differently each time
    repeats: int = setting(POSITIVE)
