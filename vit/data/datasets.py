"""Data sets, their splits, and the batches of training and evaluation.

Small data sets stand whole on the device as uint8 and are augmented there a batch at a time; folders of pictures are
decoded in worker processes. Both give the loop the same thing: normalised images and labels, in an order that is a
function of (seed, epoch) alone.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch

from vit.data.image_files import EXTENSIONS, iter_image_files
from vit.data.splits import ImageDataset, ImageSplit, check_classes, hold_out, sample_evenly
from vit.data.tar_index import CLASSES, SPLITS, index_split
from vit.errors import DataError

CLASS_COUNTS = {
    "digits": 10,
    "cifar10": 10,
    "cifar100": 100,
    "tiny_imagenet": 200,
    "imagenet": 1000,
}  # as published


# The 1,000 wnids of ILSVRC 2012 in order, joined by newlines: a folder that holds exactly these gets readable class names.
IMAGENET_WNIDS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


def load_data(
    *,
    name: str,
    root: str | None,
    val_fraction: float,
    test_fraction: float | None,
    limit: int | None,
    image_size: tuple[int, int],
    num_channels: int,
    num_classes: int | None,
    num_images: int | None,
    device: torch.device,
) -> ImageDataset:
    """Read a data set (not its pictures, where they are files) and cut the splits it lacks out of train, stratified.

    The cut depends on the data alone, not on the run's seed, so that every run of a sweep holds out the same images.
    Raises DataError where something is missing or inconsistent, naming the path and what to do.
    """
    if name == "digits":
        classes, train, val, test = read_digits()
    elif name in ("cifar10", "cifar100"):
        classes, train, val, test = read_cifar(name, Path(str(root)))
    elif name == "synthetic":
        assert num_classes
        assert num_images
        classes, train, val, test = make_synthetic(
            num_classes, num_images, (num_channels, *image_size), device
        )
    elif name == "shards":
        classes, train, val, test = read_shards(Path(str(root)))
    else:
        classes, train, val, test = read_folder(name, Path(str(root)))
    if test is None:
        train, test = hold_out(
            train, test_fraction or 0.0, f"{train.title} (a share of it), used as test"
        )
    if val is None and val_fraction > 0:
        train, val = hold_out(train, val_fraction, f"{train.title}, held out for validation")
    if limit is not None:
        train, test = (
            images and images.subset(sample_evenly(images.labels, limit))
            for images in (train, test)
        )
        val = val and val.subset(sample_evenly(val.labels, limit))
    for images in (train, val, test):
        if images is not None and len(images) == 0:
            raise DataError(
                f"{images.title}: no image is left; hold out more or fewer with data.val_fraction or "
                "data.test_fraction, or raise data.limit"
            )
    return ImageDataset(classes, train, val, test)


Splits = tuple[list[str], ImageSplit, ImageSplit | None, ImageSplit | None]


def read_digits() -> Splits:
    """scikit-learn's bundled digits (UCI optical recognition, Alpaydin & Kaynak 1998); 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy((images / 16 * 255).round().astype(np.uint8)).reshape(-1, 1, 8, 8)
    return (
        [str(digit) for digit in range(10)],
        ImageSplit("digits", torch.from_numpy(labels).long(), pixels),
        None,
        None,
    )


def read_cifar(name: str, root: Path) -> Splits:
    """CIFAR-10 or -100, downloaded and verified by torchvision where it isn't in root yet."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    title = "CIFAR-10" if name == "cifar10" else "CIFAR-100"
    folder = root / kind.base_folder
    try:
        try:
            parts = [kind(root, train=train) for train in (True, False)]
        except RuntimeError:  # not there, or not whole
            print(f"{title} is not in {folder}: downloading it", flush=True)
            kind(root, download=True)
            parts = [kind(root, train=train) for train in (True, False)]
    except (URLError, OSError, RuntimeError, EOFError) as error:
        raise DataError(
            f"data={name}: not found in {folder}, and downloading {kind.url} failed ({error}); unpack that archive "
            f"into {root} by hand, or try experiment=digits, which needs no download"
        ) from None
    train, test = (
        ImageSplit(
            f"{title} {split}",
            torch.tensor(part.targets),
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
        )
        for split, part in zip(("train", "test"), parts, strict=True)
    )
    return list(parts[0].classes), train, None, test


def make_synthetic(
    num_classes: int, num_images: int, shape: tuple[int, ...], device: torch.device
) -> Splits:
    generator = torch.Generator(device).manual_seed(0)
    pixels = torch.randint(
        0, 256, (num_images, *shape), dtype=torch.uint8, device=device, generator=generator
    )
    labels = torch.arange(num_images) % num_classes
    return (
        [str(label) for label in range(num_classes)],
        ImageSplit("synthetic noise", labels, pixels),
        None,
        None,
    )


def read_folder(name: str, root: Path) -> Splits:
    """root/train/<class>/… with val/ and test/ where there are; ImageNet's and Tiny-ImageNet's val serve as test."""
    train_folder = root / "train"
    if not train_folder.is_dir():
        how = {
            "imagenet": "get ILSVRC 2012 from https://image-net.org and put its pictures there",
            "tiny_imagenet": "unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there",
            "folder": "put pictures into one folder a class there",
        }[name]
        raise DataError(
            f"data={name}: no folder {train_folder.absolute()}; {how} (train/<class>/*.jpg), or say where it is "
            "with data.root=FOLDER, or try experiment=digits, which needs no files"
        )
    classes, train = list_class_folders(train_folder, f"{root.name} train")
    val = test = None
    if name == "tiny_imagenet" and (root / "val" / "val_annotations.txt").is_file():
        test = read_annotations(root / "val", classes)
    elif (root / "val").is_dir():
        val_classes, val = list_class_folders(root / "val", f"{root.name} val")
        check_classes(classes, val_classes, root / "val")
        if name != "folder":
            title = "ImageNet val" if is_imagenet(classes) else val.title
            val, test = None, replace(val, title=f"{title}, used as test")
    if name == "folder" and (root / "test").is_dir():
        test_classes, test = list_class_folders(root / "test", f"{root.name} test")
        check_classes(classes, test_classes, root / "test")
    if name != "folder" and test is None:
        raise DataError(
            f"data={name}: no folder {(root / 'val').absolute()}, which is used as test"
        )
    return readable_names(classes), train, val, test


def read_shards(root: Path) -> Splits:
    """root/train-*.tar, and val-*.tar and test-*.tar where there are; classes.txt names the labels, which else are numbers."""
    found = {split: index_split(root, split) for split in SPLITS}
    if found["train"] is None:
        raise DataError(
            f"data=shards: no {root.absolute()}/train-*.tar; write shards with python -m vit.shards FOLDER OUT, or "
            "say where they are with data.root=FOLDER"
        )
    top = max(int(labels.max(initial=-1)) for _, labels in filter(None, found.values()))
    names = root / CLASSES
    classes = (
        names.read_text().splitlines()
        if names.is_file()
        else [str(label) for label in range(top + 1)]
    )
    if (
        top >= len(classes)
        or min(int(labels.min(initial=0)) for _, labels in filter(None, found.values())) < 0
    ):
        raise DataError(
            f"{root.absolute()}: labels must be from 0 to {len(classes) - 1}, for the {len(classes)} classes of "
            f"{CLASSES}; found {top}"
        )
    splits = {
        split: None
        if index is None
        else ImageSplit(f"{root.name} {split}", torch.from_numpy(index[1]), paths=index[0])
        for split, index in found.items()
    }
    assert splits["train"] is not None
    return readable_names(classes), splits["train"], splits["val"], splits["test"]


def list_class_folders(folder: Path, title: str) -> tuple[list[str], ImageSplit]:
    """The classes, sorted, and the pictures below folder/<class>/, at any depth, sorted."""
    classes = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if len(classes) < 2:
        raise DataError(
            f"{folder.absolute()}: found {len(classes)} class folders; expected one folder a class, two at least"
        )
    paths: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(iter_image_files(folder / name))
        if not found:
            raise DataError(
                f"{(folder / name).absolute()}: no pictures in this class folder "
                f"(looked for {', '.join(EXTENSIONS)}); add some or remove the folder"
            )
        paths += [os.fsencode(path) for path in found]
        labels += [label] * len(found)
    return classes, ImageSplit(title, torch.tensor(labels), paths=np.array(paths))


def read_annotations(folder: Path, classes: list[str]) -> ImageSplit:
    """Tiny-ImageNet's val as its archive has it: images/ and val_annotations.txt (file, wnid, box)."""
    number = {name: label for label, name in enumerate(classes)}
    rows = [
        line.split("\t")[:2]
        for line in (folder / "val_annotations.txt").read_text().splitlines()
        if line.strip()
    ]
    check_classes(classes, sorted({wnid for _, wnid in rows}), folder / "val_annotations.txt")
    return ImageSplit(
        "Tiny-ImageNet val, used as test",
        torch.tensor([number[wnid] for _, wnid in rows]),
        paths=np.array([os.fsencode(folder / "images" / file) for file, _ in rows]),
    )


def is_imagenet(classes: Sequence[str]) -> bool:
    return (
        len(classes) == 1000
        and hashlib.sha256("\n".join(classes).encode()).hexdigest() == IMAGENET_WNIDS_SHA256
    )


def readable_names(classes: list[str]) -> list[str]:
    """For ImageNet's 1,000 wnids the English names, which torchvision lists in their order; else the names as they are."""
    if not is_imagenet(classes):
        return classes
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
