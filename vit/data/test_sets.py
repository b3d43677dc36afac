"""Data sets that a model is only tested on: a folder taken whole, and those made for ImageNet's
models.

A reader gets the folder and the model's classes, and labels its images by the model's classes.
Nothing is cut from a test set, so that no images of train are needed.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit.data.class_folders import class_names, imagenet_wnids, list_labeled
from vit.data.class_matching import knows_imagenet, match_classes
from vit.data.image_files import iter_image_files
from vit.data.layouts import find_splits, folder_name, require_no_classes_beside
from vit.data.parquet_index import find_parquet
from vit.data.splits import ImageDataset, ImageSplit, sample_evenly
from vit.errors import DataError

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.")


@dataclass(frozen=True)
class TestSet:
    """Images that a model is tested on, labeled by the model's own classes.

    data: train is empty where there is nothing to learn from.
    taken: which images these are, in words.
    competing: the classes that a prediction is chosen from, int64 (k,); None: all of the model's.
    answers: bool (n, C), of every test image which of the C classes are right; None: its label is.
    """

    # Its name would make pytest collect it
    __test__ = False

    data: ImageDataset
    taken: str
    competing: Tensor | None = None
    answers: Tensor | None = None

    def limited(self, limit: int | None) -> "TestSet":
        """At most `limit` images of every split, spread evenly over the classes; None: all."""
        if limit is None:
            return self
        answers = self.answers
        if answers is not None:
            answers = answers[sample_evenly(self.data.test.labels, limit)]
        return replace(self, data=self.data.limited(limit), answers=answers)


def of_test_images(classes: Sequence[str], images: ImageSplit) -> ImageDataset:
    """A data set that consists of test images alone."""
    return ImageDataset(list(classes), no_images(images.title), None, images)


def no_images(title: str) -> ImageSplit:
    """A split without images, in place of one that a data set does not have."""
    return ImageSplit(
        f"{title} (no training images)",
        torch.zeros(0, dtype=torch.int64),
        paths=np.array([b""])[:0],
    )


def read_whole_folder(root: Path, classes: Sequence[str]) -> TestSet:
    """Class folders, or train/, val/ and test/ with class folders, of which nothing is cut.

    The class folders may be a subset of the model's classes. Where there are folders of splits,
    test/ is the test split, or else val/. Raises DataError where neither is there, where the
    folders can be understood in more than one way, where a class is not one of the model's, or for
    a table or parquet files.
    """
    if root.is_file() or find_parquet(root):
        raise DataError(
            f"{root.absolute()}: not the run's own data set, and of others class folders alone are "
            "taken, no table and no parquet files; expected <class>/*.jpg in a folder"
        )
    if not root.is_dir():
        raise DataError(f"{root.absolute()}: no such folder; expected <class>/*.jpg in it")
    name = folder_name(root)
    folders = splits_in(root)
    if not folders:
        images = list_matched(root, classes, name)
        return TestSet(of_test_images(classes, images), f"{name} taken whole")

    splits = {
        split: list_matched(folder, classes, f"{name} {folder.name}")
        for split, folder in folders.items()
    }
    tested = "test" if "test" in splits else "val"
    if tested not in splits:
        raise DataError(
            f"{root.absolute()}: holds {folders['train'].name}/ alone, and nothing is cut from the "
            f"folder of another data set; data.root={folders['train']} takes it whole"
        )
    # Taken out: a temperature may not be fitted on val where it is used as test
    test = splits.pop(tested)
    if tested == "val":
        test = replace(test, title=f"{test.title}, used as test")
    train = splits.get("train", no_images(name))
    data = ImageDataset(list(classes), train, splits.get("val"), test)
    return TestSet(data, f"{name}/{folders[tested].name} taken whole")


def splits_in(root: Path) -> dict[str, Path]:
    """{split: its folder}; empty where the root holds the class folders themselves."""
    folders, others = find_splits(root)
    if folders:
        require_no_classes_beside(next(iter(folders.values())), others)
    return folders


def list_matched(folder: Path, classes: Sequence[str], title: str) -> ImageSplit:
    """The images in folder/<class>/ at any depth, labeled by the model's classes.

    Raises DataError for no class folder, an empty one, or a class that is not one of the model's.
    """
    names = class_names(folder)
    if not names:
        raise DataError(f"{folder.absolute()}: no class folders; expected <class>/*.jpg in it")
    return list_labeled(folder, names, match_classes(names, classes, folder), title)


def require_folder(root: Path, name: str, advice: str) -> None:
    """Raise DataError, which says how to get it, where the root is no folder."""
    if not root.is_dir():
        raise DataError(
            f"data={name}: no folder {root.absolute()}; {advice}, or say where it is with "
            "data.root=FOLDER"
        )


def read_imagenet_v2(root: Path, classes: Sequence[str]) -> TestSet:
    """ImageNet-V2 (Recht et al. 2019, arXiv:1902.10811): the folders 0 to 999 are the labels."""
    require_folder(root, "imagenet_v2", "unpack an archive of ImageNet-V2 there")
    names = class_names(root)
    wrong = [name for name in names if name not in map(str, range(len(classes)))]
    if wrong or len(names) != len(classes):
        problem = f"also holds {wrong[0]}/" if wrong else f"holds {len(names)} of them"
        raise DataError(
            f"{root.absolute()}: expected the folders 0 to {len(classes) - 1} of ImageNet-V2, but "
            f"it {problem}"
        )
    title = f"ImageNet-V2 ({folder_name(root)})"
    images = list_labeled(root, names, [int(name) for name in names], title)
    return TestSet(of_test_images(classes, images), "all of ImageNet-V2's images there")


def read_imagenet_a(root: Path, classes: Sequence[str]) -> TestSet:
    """ImageNet-A (Hendrycks et al. 2021, arXiv:1907.07174), among its 200 classes."""
    return read_imagenet_subset(root, classes, "imagenet_a", "ImageNet-A")


def read_imagenet_r(root: Path, classes: Sequence[str]) -> TestSet:
    """ImageNet-R (Hendrycks et al. 2021, arXiv:2006.16241), among its 200 classes."""
    return read_imagenet_subset(root, classes, "imagenet_r", "ImageNet-R")


def read_imagenet_subset(root: Path, classes: Sequence[str], name: str, title: str) -> TestSet:
    """root/<wnid>/ of some of ImageNet's classes, which alone compete, as in the papers' code."""
    require_folder(root, name, f"unpack the archive of {title} there")
    images = list_matched(root, classes, title)
    return TestSet(
        of_test_images(classes, images),
        f"all of {title}'s images there",
        competing=images.labels.unique(),
    )


def read_imagenet_real(root: Path, classes: Sequence[str]) -> TestSet:
    """ImageNet's validation images, root/val/, with the labels of root/real.json.

    These are the reassessed labels of Beyer et al. 2020 (arXiv:2006.07159): of each image, in the
    order of the names, a list of the right classes. Images with an empty list are left out. The
    images may lie in folders; their names alone count.
    """
    advice = (
        "put real.json (github.com/google-research/reassessed-imagenet) and ImageNet's val/ there"
    )
    require_folder(root / "val", "imagenet_real", advice)
    lists = read_real_labels(root / "real.json", len(classes))
    paths = sorted(iter_image_files(root / "val"), key=os.path.basename)
    numbers = [validation_number(path, len(lists)) for path in paths]
    labeled = [
        (path, lists[number]) for path, number in zip(paths, numbers, strict=True) if lists[number]
    ]
    if not labeled:
        raise DataError(f"{(root / 'val').absolute()}: none of its images has a label in real.json")
    answers = torch.zeros(len(labeled), len(classes), dtype=torch.bool)
    for row, (_, right) in enumerate(labeled):
        answers[row, right] = True
    images = ImageSplit(
        "ImageNet val with ReaL labels, used as test",
        torch.tensor([right[0] for _, right in labeled]),
        paths=np.array([os.fsencode(path) for path, _ in labeled]),
    )
    left_out = len(paths) - len(labeled)
    taken = f"ImageNet's validation images, without {left_out:,} that have no ReaL label"
    return TestSet(of_test_images(classes, images), taken, answers=answers)


def read_real_labels(file: Path, num_classes: int) -> list[list[int]]:
    """The lists of right classes. Raises DataError where the file is missing or something else."""
    try:
        lists = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file.absolute()}: can't be read ({error}); get it from "
            "https://github.com/google-research/reassessed-imagenet"
        ) from None
    good = isinstance(lists, list) and all(
        isinstance(right, list)
        and all(isinstance(label, int) and 0 <= label < num_classes for label in right)
        for right in lists
    )
    if not good:
        raise DataError(
            f"{file.absolute()}: expected a list with a list of classes, numbers from 0 to "
            f"{num_classes - 1}, of every validation image"
        )
    return lists


def validation_number(path: str, count: int) -> int:
    """The place of a validation image in their order, from 0, by its name.

    Raises DataError for another name, or a number beyond `count`, the images there are labels of.
    """
    match = VALIDATION_NAME.match(os.path.basename(path))
    number = int(match[1]) - 1 if match else -1
    if not 0 <= number < count:
        raise DataError(
            f"{path}: expected the official name of a validation image, ILSVRC2012_val_00000001 "
            f"to _{count:08}, which says which labels of real.json are its own"
        )
    return number


# By the values of data.name; like those of vit/data/datasets.py, but for tests alone
TEST_SETS: dict[str, Callable[[Path, Sequence[str]], TestSet]] = {
    "imagenet_v2": read_imagenet_v2,
    "imagenet_a": read_imagenet_a,
    "imagenet_r": read_imagenet_r,
    "imagenet_real": read_imagenet_real,
}


def read_test_set(name: str, root: Path, classes: Sequence[str]) -> TestSet:
    """Read a folder taken whole (`folder`), or one of TEST_SETS.

    Raises DataError as the readers do, and where a set of ImageNet's is no test of this model.
    """
    if name not in TEST_SETS:
        return read_whole_folder(root, classes)
    if not knows_imagenet(classes):
        raise DataError(
            f"data={name} is for models of ImageNet's {len(imagenet_wnids()):,} classes; this one "
            f"has {len(classes):,} classes; data=folder takes a subset of a model's own classes"
        )
    return TEST_SETS[name](root, classes)
