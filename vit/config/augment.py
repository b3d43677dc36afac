"""TODO: say what this file is for."""

from dataclasses import dataclass
from enum import Enum

PolicyName = Enum(
    "PolicyName",
    {
        "none": "none",
        "randaugment": "randaugment",
        "randaugment_big_vision": "randaugment_big_vision",
        "randaugment_timm": "randaugment_timm",
        "autoaugment": "autoaugment",
        "three_augment": "three_augment",
    },
)


@dataclass
class AugmentConfig:
    pad: float = 0.0  # random crop of small images: padding on each side as a share of the side (0.125 of 32 px: 4 px)
    # Random crop of pictures from files, and of small images where pad is 0: share of the area; null: as in evaluation
    crop_scale: list[float] | None = None
    flip: float = 0.0  # probability of mirroring, where data.mirror allows it
    policy: PolicyName = PolicyName.none  # see vit.augment.policies.build_policies
    policy_ops: int | None = None  # the RandAugments: operations an image
    policy_magnitude: float | None = (
        None  # the RandAugments: of 30 in torchvision's, of 10 in the others
    )
    color_jitter: float = (
        0.0  # brightness, contrast and saturation are each multiplied by a number within 1 ± this
    )
    erasing: float = 0.0  # probability of filling a random box with noise
    mixup: float = 0.0  # α of the Beta distribution of two images' shares; 0: off
    cutmix: float = 0.0  # likewise, of their areas; with both on, either half the time
    mix_probability: float | None = None  # of mixing a pair at all; null: 1
    repeats: int = 1  # times a sample comes in a row, changed otherwise each time
