"""The data sets that can be trained on: one table with a reader for each.

A new data set is a reader function, its entry in DATASETS, and a file in conf/data. Small data sets
are read into memory. Of folders and shards the paths alone are read; worker processes decode the
images (vit/data/loader.py).
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from vit.data.class_folders import (
    is_imagenet,
    list_annotated,
    list_class_folders,
    list_same_classes,
    readable_names,
)
from vit.data.image_files import describe_unsupported
from vit.data.layouts import folder_name
from vit.data.listing import list_images
from vit.data.splits import (
    ImageDataset,
    ImageSplit,
    Splits,
    classes_of_numbers,
    hold_out,
    positions_of,
)
from vit.data.tar_index import CLASSES, SPLITS, index_split, read_class_names
from vit.data.test_sets import TEST_SETS
from vit.errors import ConfigError, DataError
from vit.runtime.device import wide_device


class Request(NamedTuple):
    """What every reader is given.

    name         the key in DATASETS, for messages
    title        the data set's name for people
    root         the folder of the data set, where it needs one
    image_shape  (C, height, width) of the model's input, for images that are made and not read
    device       where the images are made
    """

    name: str
    title: str
    root: Path
    image_shape: tuple[int, int, int]
    device: torch.device


@dataclass(frozen=True)
class DatasetReader:
    """An entry of DATASETS.

    read         Request → Splits; its keyword-only parameters are further keys of the group data,
                 required where they have no default
    title        the data set's name for people
    num_classes  as published, or None where the files decide
    needs_root   the files are in a folder, data.root
    reads_files  images stay in their files, which worker processes decode; else all are in memory
    cuts_test    test is cut from train, where the files bring none: data.test_fraction is required
    """

    read: Callable[..., Splits]
    title: str
    num_classes: int | None = None
    needs_root: bool = True
    reads_files: bool = False
    cuts_test: bool = False

    def own_settings(self) -> dict[str, bool]:
        """The further keys of this data set, and whether each is required."""
        return {
            parameter.name: parameter.default is parameter.empty
            for parameter in inspect.signature(self.read).parameters.values()
            if parameter.kind == parameter.KEYWORD_ONLY
        }

    def all_settings(self) -> dict[str, bool]:
        """All keys that mean something to some data sets only, as own_settings."""
        keys = self.own_settings()
        if self.needs_root:
            keys["root"] = True
        if self.cuts_test:
            keys["test_fraction"] = True
        return keys


# What to write, and why, where a required key is missing; else the key alone says enough
REQUIRED = {
    "root": "data.root=FOLDER",
    "test_fraction": "data.test_fraction=0.1: its test images are cut from train",
}


def check_dataset(
    *,
    name: str,
    root: str | None,
    test_fraction: float | None,
    settings: Mapping[str, Any],
) -> None:
    """Raise ConfigError, naming the key, for settings that do not fit the data set.

    Nothing is read: this is for a data set that is not in the table, a key that it needs and does
    not have, and a key that would do nothing. settings: the keys that only some data sets take.
    None means that a key is not set.
    """
    if name in TEST_SETS:
        raise ConfigError(f"data={name} is a test set, for evaluate.py: it has no training images")
    if name not in DATASETS:
        raise ConfigError(f"data.name must be one of {', '.join(DATASETS)}, got {name}")
    given = {"root": root, "test_fraction": test_fraction, **settings}
    keys = DATASETS[name].all_settings()
    for key, value in given.items():
        if value is None and keys.get(key, False):
            raise ConfigError(f"data={name} needs {REQUIRED.get(key, f'data.{key}')}")
        if value is not None and key not in keys:
            owners = [other for other, reader in DATASETS.items() if key in reader.all_settings()]
            raise ConfigError(
                f"data.{key} does nothing with data={name}; it belongs to {', '.join(owners)}"
            )


def load_data(
    *,
    name: str,
    root: str | None,
    val_fraction: float,
    test_fraction: float | None,
    limit: int | None,
    image_size: tuple[int, int],
    num_channels: int,
    settings: Mapping[str, Any],
    device: torch.device,
    typed: Collection[str] = (),
) -> ImageDataset:
    """Read a data set and cut the splits that it lacks from train, stratified by class.

    Images in files are not read, only listed. The cut depends on the data alone, not on the run's
    seed. limit: images of each split, spread evenly over the classes. image_size (height, width),
    num_channels and device are those of images that are made and not read. settings: the keys that
    only some data sets take, None where they are not set. typed: the keys that the user has given,
    which are refused where they turn out to do nothing.

    Raises ConfigError as check_dataset does and for such a key, and DataError, naming the path and
    what to do, where something is missing or inconsistent.
    """
    check_dataset(name=name, root=root, test_fraction=test_fraction, settings=settings)
    reader = DATASETS[name]
    request = Request(name, reader.title, Path(root or ""), (num_channels, *image_size), device)
    # After the check, what is set belongs to this data set; what is not has a default in its reader
    own_settings = {key: value for key, value in settings.items() if value is not None}
    classes, train, val, test, layout = reader.read(request, **own_settings)
    for key, images in (("val_fraction", val), ("test_fraction", test)):
        if images is not None and key in typed:
            raise ConfigError(
                f"data.{key} does nothing here: nothing is cut from train, since there is "
                f"{images.title}; leave it out"
            )

    # The test split is cut first, so that it does not depend on val_fraction
    if test is None:
        assert test_fraction is not None
        title = f"{train.title} (a part of it), used as test"
        train, test = hold_out(train, test_fraction, title)
    if val is None and val_fraction > 0:
        train, val = hold_out(train, val_fraction, f"{train.title}, held out for validation")

    # After the cuts, so that a limited test split is part of the whole one
    data = ImageDataset(classes, train, val, test, layout).limited(limit)
    # Few images or many classes may leave nothing, which would fail later with less to go by
    for images in (data.train, data.val, data.test):
        if images is not None and len(images) == 0:
            raise DataError(
                f"{images.title}: no image is left; hold out more or fewer with "
                "data.val_fraction or data.test_fraction, or raise data.limit"
            )
    return data


def read_digits(request: Request) -> Splits:
    """scikit-learn's bundled digits (UCI optical recognition, Alpaydin & Kaynak 1998)."""
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import

    images, labels = load_digits(return_X_y=True)
    pixels = (images / 16 * 255).round().astype(np.uint8)  # levels are from 0 to 16
    pixels = torch.from_numpy(pixels).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(labels).long()
    classes = [str(digit) for digit in range(10)]
    return Splits(classes, ImageSplit(request.title, labels, pixels))


def read_cifar10(request: Request) -> Splits:
    """CIFAR-10 (Krizhevsky 2009)."""
    return read_cifar(CIFAR10, request)


def read_cifar100(request: Request) -> Splits:
    """CIFAR-100 (Krizhevsky 2009)."""
    return read_cifar(CIFAR100, request)


def read_cifar(dataset: type[CIFAR10], request: Request) -> Splits:
    """Either CIFAR, downloaded and verified by torchvision where it is not in root yet."""
    root = request.root
    folder = root / dataset.base_folder
    # torchvision raises RuntimeError for files that are missing, incomplete or changed
    try:
        try:
            parts = [dataset(root, train=train) for train in (True, False)]
        except RuntimeError:
            print(f"{request.title} is not in {folder}: downloading it", flush=True)
            dataset(root, download=True)
            parts = [dataset(root, train=train) for train in (True, False)]
    except (URLError, OSError, RuntimeError, EOFError) as error:
        raise DataError(
            f"data={request.name}: not found in {folder}, and downloading {dataset.url} failed "
            f"({error}); unpack that archive into {root} by hand, or try experiment=digits, which "
            "needs no download"
        ) from None
    # torchvision gives (n, height, width, C)
    train, test = (
        ImageSplit(
            f"{request.title} {split}",
            torch.tensor(part.targets),
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
        )
        for split, part in zip(("train", "test"), parts, strict=True)
    )
    return Splits(list(parts[0].classes), train, test=test)


def make_synthetic(request: Request, *, num_classes: int, num_images: int) -> Splits:
    """Noise of the model's image size, for speed tests without a disk or a decoder."""
    # The same noise for every run, so that speeds can be compared; Metal makes no bytes
    device = wide_device(request.device)
    generator = torch.Generator(device).manual_seed(0)
    pixels = torch.randint(
        0,
        256,
        (num_images, *request.image_shape),
        dtype=torch.uint8,
        device=device,
        generator=generator,
    )
    labels = torch.arange(num_images) % num_classes
    classes = [str(label) for label in range(num_classes)]
    return Splits(classes, ImageSplit(request.title, labels, pixels))


def read_folder(request: Request, *, label_column: str | None = None) -> Splits:
    """Images as vit.data.listing finds them: in class folders, or named by a table."""
    splits = list_images(request.root, label_column)
    return splits._replace(classes=readable_names(splits.classes))


def read_imagenet(request: Request) -> Splits:
    """root/train/<wnid>/ and root/val/, flat or in class folders; the latter is used as test."""
    unsupported: list[str] = []
    classes, train = list_train_folder(
        request,
        "get ILSVRC2012_img_train.tar from https://image-net.org and unpack it there with "
        "python -m vit.unpack",
        unsupported,
    )
    test = list_val_as_test(request, classes, unsupported)
    return Splits(readable_names(classes), train, test=test, layout=left_out(unsupported))


def read_tiny_imagenet(request: Request) -> Splits:
    """What Tiny-ImageNet's archive unpacks to, or ImageNet's layout; val is used as test."""
    unsupported: list[str] = []
    classes, train = list_train_folder(
        request, "unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there", unsupported
    )
    val_folder = request.root / "val"
    if (val_folder / "val_annotations.txt").is_file():
        test = list_annotated(val_folder, classes, f"{request.title} val, used as test")
    else:
        test = list_val_as_test(request, classes, unsupported)
    return Splits(readable_names(classes), train, test=test, layout=left_out(unsupported))


def left_out(unsupported: list[str]) -> str:
    """What the screen says of images in formats that are not read; nothing where there are none."""
    return describe_unsupported(unsupported) if unsupported else ""


def list_train_folder(
    request: Request, advice: str, unsupported: list[str]
) -> tuple[list[str], ImageSplit]:
    """(class names, the images of root/train/<class>/).

    advice: how to get the images, for the DataError where there is no such folder. unsupported: see
    vit.data.image_files.iter_image_files.
    """
    folder = request.root / "train"
    if not folder.is_dir():
        raise DataError(
            f"data={request.name}: no folder {folder.absolute()}; {advice} "
            "(train/<class>/*.jpg), or say where it is with data.root=FOLDER, or try "
            "experiment=digits, which needs no files"
        )
    return list_class_folders(folder, f"{folder_name(request.root)} train", unsupported)


def list_val_as_test(request: Request, classes: list[str], unsupported: list[str]) -> ImageSplit:
    """root/val/<class>/ or flat root/val/, under a title that says that it is used as test.

    unsupported: see vit.data.image_files.iter_image_files.
    """
    folder = request.root / "val"
    if not folder.is_dir():
        raise DataError(
            f"data={request.name}: no folder {folder.absolute()}, which is used as test"
        )
    # The official name is only for the official classes
    dataset = "ImageNet" if is_imagenet(classes) else folder_name(request.root)
    return list_same_classes(folder, classes, f"{dataset} val, used as test", unsupported)


def read_shards(request: Request) -> Splits:
    """root/train-*.tar, and val-*.tar and test-*.tar where they exist.

    The labels are numbers; classes.txt names them, where it exists.
    """
    root = request.root
    splits = {split: read_shard_split(root, split) for split in SPLITS}
    train = splits["train"]
    if train is None:
        raise DataError(
            f"data={request.name}: no {root.absolute()}/train-*.tar; write shards with "
            "python -m vit.shards SOURCE OUT, or say where they are with data.root=FOLDER"
        )
    names = read_class_names(root)
    if names is None:
        # Shards of others, who may count from 1
        names = numbers = classes_of_numbers(train.labels.numpy())
        known = "of train"
    else:
        numbers = [str(number) for number in range(len(names))]
        known = f"of {CLASSES}, 0 to {len(names) - 1}"
    train, val, test = (renumber(root, splits[split], numbers, known) for split in SPLITS)
    assert train is not None
    return Splits(readable_names(names), train, val, test)


def renumber(
    root: Path, images: ImageSplit | None, numbers: list[str], known: str
) -> ImageSplit | None:
    """A split with its labels as positions in a list of them; None where there is none.

    known: which labels these are, for the DataError for one that is not there.
    """
    if images is None:
        return None
    positions = positions_of(images.labels.numpy(), numbers)
    wrong = positions < 0
    if wrong.any():
        raise DataError(
            f"{root.absolute()}: {images.title} has the label {images.labels[wrong.argmax()]}, "
            f"which is not among those {known}"
        )
    return replace(images, labels=torch.from_numpy(positions))


def read_shard_split(root: Path, split: str) -> ImageSplit | None:
    index = index_split(root, split)
    if index is None:
        return None
    paths, labels = index
    return ImageSplit(f"{folder_name(root)} {split}", torch.from_numpy(labels), paths=paths)


# The names are the values of data.name; messages list them in this order
DATASETS: dict[str, DatasetReader] = {
    "digits": DatasetReader(
        read_digits, "digits", num_classes=10, needs_root=False, cuts_test=True
    ),
    "cifar10": DatasetReader(read_cifar10, "CIFAR-10", num_classes=10),
    "cifar100": DatasetReader(read_cifar100, "CIFAR-100", num_classes=100),
    "tiny_imagenet": DatasetReader(
        read_tiny_imagenet, "Tiny-ImageNet", num_classes=200, reads_files=True
    ),
    "imagenet": DatasetReader(read_imagenet, "ImageNet", num_classes=1000, reads_files=True),
    "folder": DatasetReader(read_folder, "folder of images", reads_files=True, cuts_test=True),
    "shards": DatasetReader(read_shards, "tar shards", reads_files=True, cuts_test=True),
    "synthetic": DatasetReader(make_synthetic, "synthetic noise", needs_root=False, cuts_test=True),
}
