"""TODO: say what this file is for."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

Dataset = Enum(
    "Dataset",
    {
        "digits": "digits",
        "cifar10": "cifar10",
        "cifar100": "cifar100",
        "tiny_imagenet": "tiny_imagenet",
        "imagenet": "imagenet",
        "folder": "folder",
        "shards": "shards",
        "synthetic": "synthetic",
    },
)


Unreadable = Enum("Unreadable", {"refuse": "refuse", "skip": "skip"})


Interpolation = Enum("Interpolation", {"bilinear": "bilinear", "bicubic": "bicubic"})


@dataclass
class DataConfig:
    name: Dataset = MISSING
    root: str | None = None  # where the files are; null for data sets that need none
    val_fraction: float = (
        0.1  # of train, held out to choose the best checkpoint; 0 trains on everything
    )
    test_fraction: float | None = None  # of train, where the data set has no test split of its own
    limit: int | None = None  # images of each split, spread evenly over the classes
    mean: list[float] = MISSING  # per channel, of pixels in 0..1
    std: list[float] = MISSING
    # Centre crop of evaluation as a share of the shorter side; null squashes to the model's size
    eval_crop: float | None = None
    interpolation: Interpolation = Interpolation.bilinear
    unreadable: Unreadable = (
        Unreadable.refuse
    )  # a picture of train that can't be read ends the run, or is replaced by another
    mirror: bool = True  # a mirrored picture is of the same class
    num_classes: int | None = None  # synthetic only
    num_images: int | None = None  # synthetic only


def data_arguments(data: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of vit.data.load_data, less the device and the image size, from to_dict() nodes."""
    names = ("name", "root", "val_fraction", "test_fraction", "limit", "num_classes", "num_images")
    return {**{name: data[name] for name in names}, "num_channels": model["num_channels"]}
