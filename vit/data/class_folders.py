"""Images sorted into one folder per class, as ImageNet and most people keep them."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision.models import ResNet18_Weights

from vit.data.image_files import (
    is_hidden,
    is_image_file,
    iter_image_files,
    no_images,
    refuse_folder,
)
from vit.data.imagenet_val import list_flat_val
from vit.data.splits import ImageSplit, check_classes
from vit.errors import DataError
from vit.text import shorten

# One a line, sorted, which is the order of the labels (Russakovsky et al. 2015, arXiv:1409.0575)
WNIDS_FILE = Path(__file__).parent / "imagenet_wnids.txt"
# Characters of a line that a message shows
MAX_LINE = 40


def class_names(folder: Path) -> list[str]:
    """The names of the class folders in a folder, sorted; hidden ones are left out.

    Raises DataError where it can't be read.
    """
    try:
        return sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not is_hidden(entry.name)
        )
    except OSError as error:
        refuse_folder(error)


def list_class_folders(
    folder: Path, title: str, unsupported: list[str] | None = None
) -> tuple[list[str], ImageSplit]:
    """(class names, the images in folder/<class>/ at any depth), both sorted.

    unsupported: see vit.data.image_files.iter_image_files.

    Raises DataError for fewer than two classes or a class without images.
    """
    classes = require_two_classes(folder)
    return classes, list_labeled(folder, classes, range(len(classes)), title, unsupported)


def list_labeled(
    folder: Path,
    names: Sequence[str],
    labels: Sequence[int],
    title: str,
    unsupported: list[str] | None = None,
) -> ImageSplit:
    """The images in folder/<name>/ at any depth, those of each name with its label.

    unsupported: see vit.data.image_files.iter_image_files.

    Raises DataError for a folder without images.
    """
    # Bytes, since an array of strings takes four bytes a character
    paths: list[bytes] = []
    of_images: list[int] = []
    for name, label in zip(names, labels, strict=True):
        images = images_of_class(folder / name, unsupported)
        paths += [os.fsencode(path) for path in images]
        of_images += [label] * len(images)
    return ImageSplit(title, torch.tensor(of_images), paths=np.array(paths))


def require_two_classes(folder: Path) -> list[str]:
    """class_names of a folder. Raises DataError for fewer than two, or a name that is no text."""
    classes = class_names(folder)
    for name in classes:
        # What Python reads other bytes as can't be written to the screen, to pages or TensorBoard
        if name.encode(errors="replace").decode() != name:
            raise DataError(
                f"{folder.absolute()}: the name of the class folder {name!r} is not UTF-8; rename "
                "the folder"
            )
    if len(classes) < 2:
        raise DataError(
            f"{folder.absolute()}: found {len(classes)} class folders; expected one folder per "
            "class, two at least"
        )
    return classes


def images_of_class(folder: Path, unsupported: list[str] | None = None) -> list[str]:
    """The image files in a class folder at any depth, sorted.

    unsupported: see vit.data.image_files.iter_image_files.

    Raises DataError for none, and for a folder that can't be read.
    """
    others: list[str] = []
    # Sorted, since the order of the files decides what is held out and when each is seen
    images = sorted(iter_image_files(folder, others))
    if not images:
        problem = no_images(others, "in this class folder")
        raise DataError(f"{folder.absolute()}: {problem}; add some or remove the folder")
    if unsupported is not None:
        unsupported += others
    return images


def list_same_classes(
    folder: Path, classes: list[str], title: str, unsupported: list[str] | None = None
) -> ImageSplit:
    """The images in folder/<class>/ of a split other than train, or of ImageNet's flat val.

    unsupported: see vit.data.image_files.iter_image_files.

    Raises DataError as list_class_folders and list_flat_val do, and where the classes are not those
    of train.
    """
    if not class_names(folder) and any(is_image_file(entry.name) for entry in os.scandir(folder)):
        return list_flat_val(folder, classes, title)
    its_classes, images = list_class_folders(folder, title, unsupported)
    check_classes(classes, its_classes, folder)
    return images


def list_annotated(folder: Path, classes: list[str], title: str) -> ImageSplit:
    """The val folder of Tiny-ImageNet's archive: images/ and their classes in a text file.

    A line of that file holds, between tabs, the file name, the wnid and a bounding box. Raises
    DataError for another line, and where the classes are not those of train.
    """
    annotations = folder / "val_annotations.txt"
    rows = read_annotations(annotations)
    check_classes(classes, sorted({wnid for _, wnid in rows}), annotations)
    labels = {wnid: label for label, wnid in enumerate(classes)}
    return ImageSplit(
        title,
        torch.tensor([labels[wnid] for _, wnid in rows]),
        paths=np.array([os.fsencode(folder / "images" / name) for name, _ in rows]),
    )


def read_annotations(file: Path) -> list[tuple[str, str]]:
    """(file name, wnid) of each line, see list_annotated."""
    # Bytes of another file than this must show in the message
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) >= 2:
            rows.append((fields[0], fields[1]))
        elif line.strip():
            raise DataError(
                f"{file.absolute()}: line {number}, {shorten(line, MAX_LINE)!r}, is not a file "
                "name, a tab and a class; get it again"
            )
    return rows


@functools.cache
def imagenet_wnids() -> tuple[str, ...]:
    """The wnids of ILSVRC 2012's 1,000 classes, in the order of the labels."""
    return tuple(WNIDS_FILE.read_text(encoding="ascii").split())


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether the classes are the 1,000 wnids of ILSVRC 2012, in order."""
    return tuple(classes) == imagenet_wnids()


def readable_names(classes: list[str]) -> list[str]:
    """English names for ImageNet's 1,000 wnids; other names as they are."""
    if not is_imagenet(classes):
        return classes
    # torchvision lists the names in the order of the wnids
    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
