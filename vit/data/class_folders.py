"""Images sorted into one folder per class, as ImageNet and most people keep them."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision.models import ResNet18_Weights

from vit.data.image_files import EXTENSIONS, is_image_file, iter_image_files
from vit.data.imagenet_val import list_flat_val
from vit.data.splits import ImageSplit, check_classes
from vit.errors import DataError

# Of the 1,000 wnids of ILSVRC 2012 in order, joined by newlines
IMAGENET_WNIDS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


def class_names(folder: Path) -> list[str]:
    """The names of the class folders in a folder, sorted; hidden ones are left out."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )


def list_class_folders(
    folder: Path, title: str, follow_links: bool = False
) -> tuple[list[str], ImageSplit]:
    """(class names, the images in folder/<class>/ at any depth), both sorted.

    follow_links: also look into folders that are links.

    Raises DataError for fewer than two classes or a class without images.
    """
    classes = require_two_classes(folder)
    # Bytes, since an array of strings takes four bytes a character
    paths: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = images_of_class(folder / name, follow_links)
        paths += [os.fsencode(path) for path in images]
        labels += [label] * len(images)
    return classes, ImageSplit(title, torch.tensor(labels), paths=np.array(paths))


def require_two_classes(folder: Path) -> list[str]:
    """class_names of a folder. Raises DataError for fewer than two."""
    classes = class_names(folder)
    if len(classes) < 2:
        raise DataError(
            f"{folder.absolute()}: found {len(classes)} class folders; expected one folder per "
            "class, two at least"
        )
    return classes


def images_of_class(folder: Path, follow_links: bool = False) -> list[str]:
    """The image files in a class folder at any depth, sorted. Raises DataError for none.

    follow_links: also look into folders that are links.
    """
    # Sorted, since the order of the files decides what is held out and when each is seen
    images = sorted(iter_image_files(folder, follow_links))
    if not images:
        raise DataError(
            f"{folder.absolute()}: no images in this class folder (looked for "
            f"{', '.join(EXTENSIONS)}); add some or remove the folder"
        )
    return images


def list_same_classes(
    folder: Path, classes: list[str], title: str, follow_links: bool = False
) -> ImageSplit:
    """The images in folder/<class>/ of a split other than train, or of ImageNet's flat val.

    Raises DataError as list_class_folders and list_flat_val do, and where the classes are not those
    of train.
    """
    if not class_names(folder) and any(is_image_file(entry.name) for entry in os.scandir(folder)):
        return list_flat_val(folder, classes, title)
    its_classes, images = list_class_folders(folder, title, follow_links)
    check_classes(classes, its_classes, folder)
    return images


def list_annotated(folder: Path, classes: list[str], title: str) -> ImageSplit:
    """The val folder of Tiny-ImageNet's archive: images/ and their classes in a text file.

    A line of that file holds, between tabs, the file name, the wnid and a bounding box. Raises
    DataError where the classes are not those of train.
    """
    annotations = folder / "val_annotations.txt"
    lines = [line for line in annotations.read_text().splitlines() if line.strip()]
    rows = [line.split("\t")[:2] for line in lines]
    check_classes(classes, sorted({wnid for _, wnid in rows}), annotations)
    labels = {wnid: label for label, wnid in enumerate(classes)}
    return ImageSplit(
        title,
        torch.tensor([labels[wnid] for _, wnid in rows]),
        paths=np.array([os.fsencode(folder / "images" / name) for name, _ in rows]),
    )


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether the classes are the 1,000 wnids of ILSVRC 2012."""
    # Other class names need not even be valid text
    if len(classes) != 1000:
        return False
    return hashlib.sha256("\n".join(classes).encode()).hexdigest() == IMAGENET_WNIDS_SHA256


def readable_names(classes: list[str]) -> list[str]:
    """English names for ImageNet's 1,000 wnids; other names as they are."""
    if not is_imagenet(classes):
        return classes
    # torchvision lists the names in the order of the wnids
    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
