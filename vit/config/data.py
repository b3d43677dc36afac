"""The group `data`: conf/data/*.yaml."""

from dataclasses import dataclass
from typing import Any

from vit.config.settings import (
    BELOW_ONE,
    FRACTION,
    FREE,
    POSITIVE,
    Range,
    one_of,
    setting,
)

BETWEEN_0_AND_1 = Range(lambda value: 0 < value < 1, "between 0 and 1")
PER_CHANNEL = Range(lambda value: len(value) in (1, 3), "1 number (gray) or 3 (RGB)")
PER_CHANNEL_POSITIVE = Range(
    lambda value: len(value) in (1, 3) and all(number > 0 for number in value),
    "1 positive number (gray) or 3 (RGB)",
)


@dataclass
class DataConfig:
    """What is learned from. Which data sets need or take root, test_fraction, num_classes and
    num_images is told by the table in vit/data/datasets.py.
    """

    name: str = setting()
    root: str | None = setting(on_resume=FREE)  # where the files are
    val_fraction: float = setting(BELOW_ONE)  # of train, held out to select the best checkpoint
    test_fraction: float | None = setting(BETWEEN_0_AND_1)  # of train, where there is no test split
    limit: int | None = setting(POSITIVE)  # images of each split, spread evenly over the classes
    mean: list[float] = setting(PER_CHANNEL)  # per channel, of pixels in 0..1
    std: list[float] = setting(PER_CHANNEL_POSITIVE)
    # center crop as a fraction of the shorter side; null: squash
    eval_crop: float | None = setting(FRACTION)
    interpolation: str = setting(one_of("bilinear", "bicubic"))
    unreadable: str = setting(one_of("refuse", "skip"))  # image files of train that can't be read
    mirror: bool = setting()  # a mirrored image is of the same class
    num_classes: int | None = setting(POSITIVE)
    num_images: int | None = setting(POSITIVE)


def data_arguments(data: DataConfig, num_channels: int) -> dict[str, Any]:
    """The keyword arguments of vit.data.datasets.load_data, less the device and the image size."""
    return {
        "name": data.name,
        "root": data.root,
        "val_fraction": data.val_fraction,
        "test_fraction": data.test_fraction,
        "limit": data.limit,
        "num_channels": num_channels,
        "num_classes": data.num_classes,
        "num_images": data.num_images,
    }
