"""The group `data`: conf/data/*.yaml, which hold the values."""

from dataclasses import dataclass, fields
from typing import Any

from vit.config.settings import (
    BELOW_ONE,
    FRACTION,
    FREE,
    POSITIVE,
    PROBABILITY,
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
    """What is learned from.

    The table in vit/data/datasets.py says which data sets take root, test_fraction, label_column,
    num_classes and num_images.
    """

    name: str = setting()
    # Where the files are; free on a resume since the images themselves are compared by checksum
    root: str | None = setting(on_resume=FREE)
    # Of train, held out to select the best checkpoint; 0 trains on everything
    val_fraction: float = setting(BELOW_ONE)
    # Of train, where the data set has no test split
    test_fraction: float | None = setting(BETWEEN_0_AND_1)
    # Images of each split, spread evenly over the classes, for quick tries
    limit: int | None = setting(POSITIVE)
    # Of each channel, for pixels in 0..1
    mean: list[float] = setting(PER_CHANNEL)
    std: list[float] = setting(PER_CHANNEL_POSITIVE)
    # Center crop of evaluation as a fraction of the shorter side; null: squash to the model's size
    eval_crop: float | None = setting(FRACTION)
    interpolation: str = setting(one_of("bilinear", "bicubic"))
    # What an image file of train that can't be read does: end the run, or be replaced by another
    unreadable: str = setting(one_of("refuse", "skip"))
    # Whether a mirrored image is of the same class, as that of a digit is not
    mirror: bool = setting()
    # How often classes are drawn in training: 0 as they come, 1 all equally often
    balance: float = setting(PROBABILITY)
    # Of a table of images: the column with the classes; null: found by its name
    label_column: str | None = setting()
    # Of the synthetic data set alone
    num_classes: int | None = setting(POSITIVE)
    num_images: int | None = setting(POSITIVE)


# What load_data takes for every data set, what is for the preprocessing of their images, and for
# the order in which these are drawn. The other keys belong to some data sets alone, whose readers
# take them
COMMON_KEYS = ("name", "root", "val_fraction", "test_fraction", "limit")
KEYS_OF_PREPROCESSING = ("mean", "std", "eval_crop", "interpolation", "unreadable", "mirror")
KEYS_OF_ORDER = ("balance",)


def data_arguments(data: DataConfig, num_channels: int) -> dict[str, Any]:
    """Return the arguments of vit.data.datasets.load_data but for the device and the image size.

    num_channels: of the model, since images are brought to the channels it takes.
    """
    values = {key.name: getattr(data, key.name) for key in fields(data)}
    common = {key: values.pop(key) for key in COMMON_KEYS}
    for key in KEYS_OF_PREPROCESSING + KEYS_OF_ORDER:
        del values[key]
    return {**common, "num_channels": num_channels, "settings": values}
