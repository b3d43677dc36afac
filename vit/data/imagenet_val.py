"""ImageNet's validation images in one flat folder, as its archive unpacks, and who labels them.

The archive ILSVRC2012_img_val.tar holds val images without their classes. Those are published in
four forms, each in a file of its own name (LABEL_FILES). It is looked for in the folder of the
images, beside that folder, and in the development kit unpacked beside it.
"""

import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vit.data.image_files import is_image_file
from vit.data.splits import ImageSplit, check_classes
from vit.errors import DataError

DEVKIT = Path("ILSVRC2012_devkit_t12", "data")
META = "meta.mat"
WNID = re.compile(r"n\d{8}")

# What SciPy's reader raises for files that are cut short or no MATLAB files; the base class of its
# own errors is Exception itself
UNREADABLE = (OSError, ValueError, TypeError, KeyError, IndexError, struct.error, zlib.error)

# {name of an image without its extension: wnid}
Labels = dict[str, str]


def find_label_file(folder: Path) -> Path | None:
    """The file that labels the images in a flat folder, or None."""
    places = (folder, folder.parent, folder.parent / DEVKIT)
    candidates = [place / name for name in LABEL_FILES for place in places]
    return next((path for path in candidates if path.is_file()), None)


def list_flat_val(folder: Path, classes: list[str], title: str) -> ImageSplit:
    """The images directly in a folder, labeled by a file of LABEL_FILES; in the order of names.

    classes: those of train, in order. Raises DataError where no file labels them, that file can't
    be understood, it has other classes, or names of images lack in the file or in the folder.
    """
    file = find_label_file(folder)
    if file is None:
        raise DataError(
            f"{folder.absolute()}: holds images, but no class folders and no file that labels them "
            f"({', '.join(LABEL_FILES)}); put one there or beside the folder"
        )
    try:
        labels = LABEL_FILES[file.name](file, classes)
    except UnicodeDecodeError:
        raise DataError(f"{file.absolute()}: not a text file; get it again") from None
    check_classes(classes, sorted(set(labels.values())), file)

    names = sorted(name for name in os.listdir(folder) if is_image_file(name))
    stems = [os.path.splitext(name)[0] for name in names]
    differences = sorted(labels.keys() ^ set(stems))
    if differences:
        problem = (
            "does not label" if differences[0] not in labels else "labels, but the folder lacks,"
        )
        raise DataError(
            f"{folder.absolute()}: {file.name} {problem} {differences[0]} (and "
            f"{len(differences) - 1:,} others)"
        )
    positions = {name: position for position, name in enumerate(classes)}
    return ImageSplit(
        title,
        torch.tensor([positions[labels[stem]] for stem in stems]),
        paths=np.array([os.fsencode(folder / name) for name in names]),
    )


def read_ids(file: Path, classes: list[str]) -> Labels:
    """The development kit's list: the class of image 1, 2, …, as a number that meta.mat explains.

    The numbers are not in the order of the wnids.
    """
    places = (file.parent, file.parent.parent, file.parent.parent / DEVKIT)
    meta = next((place / META for place in places if (place / META).is_file()), None)
    if meta is None:
        raise DataError(
            f"{file.absolute()}: {META} of the development kit is needed beside it, which says "
            "what its numbers mean"
        )
    wnids = read_meta(meta)
    lines = file.read_text(encoding="utf-8").split()
    unknown = [number for number, line in enumerate(lines, 1) if line not in wnids]
    if unknown:
        raise DataError(
            f"{file.absolute()}: line {unknown[0]}, {lines[unknown[0] - 1]!r}, is not a class of "
            f"{META}"
        )
    return numbered([wnids[line] for line in lines])


def read_meta(meta: Path) -> dict[str, str]:
    """{ILSVRC2012_ID as text: wnid} of the development kit's meta.mat."""
    from scipy.io import loadmat  # it takes a while to import
    from scipy.io.matlab import MatReadError

    try:
        synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
        pairs = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        return {str(int(number)): str(wnid) for number, wnid in pairs}
    except (*UNREADABLE, NotImplementedError, MatReadError) as error:
        raise DataError(
            f"{meta.absolute()}: not the {META} of ILSVRC 2012 ({error}); get it again"
        ) from None


def read_wnids(file: Path, classes: list[str]) -> Labels:
    """The wnid of image 1, 2, …, one a line (TensorFlow's list)."""
    lines = file.read_text(encoding="utf-8").split()
    for number, line in enumerate(lines, 1):
        if not WNID.fullmatch(line):
            raise DataError(f"{file.absolute()}: line {number}, {line!r}, is not a wnid")
    return numbered(lines)


def read_positions(file: Path, classes: list[str]) -> Labels:
    """Lines of a file name and the class's position in the order of the wnids (Caffe's list)."""
    labels: Labels = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        name, _, position = line.strip().rpartition(" ")
        if not name or not position.isdecimal() or int(position) >= len(classes):
            raise DataError(
                f"{file.absolute()}: line {number}, {line!r}, is not a file name and a "
                f"number below {len(classes)}"
            )
        labels[Path(name).stem] = classes[int(position)]
    return labels


def read_boxes(file: Path, classes: list[str]) -> Labels:
    """Kaggle's table of bounding boxes: an image's name, a comma, its wnid and numbers."""
    labels: Labels = {}
    _, *lines = file.read_text(encoding="utf-8").splitlines() or [""]
    for number, line in enumerate(lines, 2):
        name, _, boxes = line.partition(",")
        wnid = boxes.partition(" ")[0]
        if not WNID.fullmatch(wnid):
            raise DataError(f"{file.absolute()}: line {number}, {line!r}, names no wnid")
        labels[name] = wnid
    return labels


def numbered(wnids: list[str]) -> Labels:
    """The labels of images that are called by their number, in the order of a list."""
    return {f"ILSVRC2012_val_{number:08}": wnid for number, wnid in enumerate(wnids, 1)}


# (file, classes of train in order) → labels; the first that is found is read
LABEL_FILES: dict[str, Callable[[Path, list[str]], Labels]] = {
    "ILSVRC2012_validation_ground_truth.txt": read_ids,
    "imagenet_2012_validation_synset_labels.txt": read_wnids,
    "LOC_val_solution.csv": read_boxes,
    "val.txt": read_positions,
}
