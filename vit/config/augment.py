"""The group `augment`: conf/augment/*.yaml, which hold the values."""

from dataclasses import dataclass

from vit.config.settings import (
    BELOW_ONE,
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
# torchvision's RandAugment counts magnitudes to 30; check_augmentation() limits the others to 10
MAGNITUDE = Range(lambda value: 0 <= value <= 30, "from 0 to 30")
DEGREES = Range(lambda value: 0 <= value <= 180, "degrees from 0 to 180")
SHEAR = Range(lambda value: 0 <= value < 90, "degrees, at least 0 and below 90")
RANDAUGMENTS = belongs_to(
    "augment.policy", "randaugment", "randaugment_big_vision", "randaugment_timm"
)


@dataclass
class AugmentConfig:
    """Random changes of the training images."""

    # Random crop of small images: padding on each side as a fraction of it (0.125 of 32 px: 4 px)
    pad: float = setting(PROBABILITY)
    # Random resized crop of image files, and of small images where pad is 0: fraction of the area;
    # null: the crop of evaluation
    crop_scale: list[float] | None = setting(CROP_SCALE)
    # Probability of mirroring, where data.mirror allows it
    flip: float = setting(PROBABILITY)
    # Mirror each image in every second pass instead, which takes flip=0.5
    alternating_flip: bool = setting()
    # Affine changes, each uniform up to this amount to either side: degrees of rotation,
    # translation as a fraction of the sides, a factor within 1 ± scale, degrees of shear
    rotate: float = setting(DEGREES)
    translate: float = setting(PROBABILITY)
    scale: float = setting(BELOW_ONE)
    shear: float = setting(SHEAR)
    # A name in vit.augment.policies
    policy: str = setting()
    # RandAugment: operations an image, and their strength
    policy_ops: int | None = setting(POSITIVE, belongs=RANDAUGMENTS)
    policy_magnitude: float | None = setting(MAGNITUDE, belongs=RANDAUGMENTS)
    # Brightness, contrast and saturation are each multiplied by a factor within 1 ± this
    color_jitter: float = setting(PROBABILITY)
    # Probability of filling a random box with noise
    erasing: float = setting(PROBABILITY)
    # Alpha of the Beta distribution of the two images' weights; 0: off
    mixup: float = setting(NOT_NEGATIVE)
    # Likewise, of their areas; with both on, each is chosen half the time
    cutmix: float = setting(NOT_NEGATIVE)
    # Probability of mixing a pair at all; null: 1
    mix_probability: float | None = setting(FRACTION)
    # How often a sample comes in a row, augmented differently each time
    repeats: int = setting(POSITIVE)
