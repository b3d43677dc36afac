"""The splits of a data set: images with labels, and what is held out or sampled from them.

Which images are held out depends on the labels alone, not on the run's seed, so that every run of a
sweep holds out the same ones.
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vit.errors import DataError
from vit.randomness import random_bits


@dataclass(frozen=True)
class ImageSplit:
    """One split, with its images either in memory or in files.

    title   for people, such as "CIFAR-10 test"
    labels  int64 (n,)
    pixels  uint8 (n, C, height, width), or None
    paths   bytes (n,), or None; see vit/data/image_files.py
    """

    title: str
    labels: Tensor
    pixels: Tensor | None = None
    paths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return f"{self.title}, {len(self):,} images"

    def subset(self, indices: Tensor, title: str | None = None) -> "ImageSplit":
        """The images at these indices, int64 (m,), in their order."""
        pixels = self.pixels
        paths = self.paths
        return ImageSplit(
            title or self.title,
            self.labels[indices],
            None if pixels is None else pixels[indices.to(pixels.device)],
            None if paths is None else paths[indices.numpy()],
        )

    def limited(self, limit: int | None) -> "ImageSplit":
        """At most `limit` images, spread evenly over the classes; None: all."""
        if limit is None or len(self) == 0:
            return self
        return self.subset(sample_evenly(self.labels, limit))

    def fingerprint(self) -> int:
        """A checksum that other images or labels would hardly have.

        Of the labels and the pixels or, for files, of their names and their folders' names: the
        data may be moved.
        """
        checksum = zlib.crc32(self.labels.numpy().data)
        if self.paths is not None:
            # Folder and file, such as cat/0.jpg; reading the contents would take an epoch's time
            names = [b"/".join(path.split(b"/")[-2:]) for path in self.paths.tolist()]
            return zlib.crc32(b"\0".join(names), checksum)
        assert self.pixels is not None
        return zlib.crc32(self.pixels.cpu().contiguous().numpy().data, checksum)

    def to(self, device: torch.device) -> "ImageSplit":
        """With the pixels on the device; labels and paths stay on the CPU."""
        return self if self.pixels is None else replace(self, pixels=self.pixels.to(device))


class Splits(NamedTuple):
    """The classes and splits that a data set brings; val and test are None where it has none.

    layout: see ImageDataset.
    """

    classes: list[str]
    train: ImageSplit
    val: ImageSplit | None = None
    test: ImageSplit | None = None
    layout: str = ""

    def named(self) -> dict[str, ImageSplit]:
        """{split: its images} of the splits that there are."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {name: images for name, images in splits.items() if images is not None}


@dataclass(frozen=True)
class ImageDataset:
    """A data set: class names in the order of the labels, and its splits.

    val is None where nothing is held out of train. train is empty where the images are for tests
    alone. layout: how the files were understood, for people, where they can be laid out in several
    ways; else empty.
    """

    classes: list[str]
    train: ImageSplit
    val: ImageSplit | None
    test: ImageSplit
    layout: str = ""

    def split(self, name: str) -> ImageSplit:
        """train, val or test by name; raises DataError where there is no such split."""
        images = {"train": self.train, "val": self.val, "test": self.test}[name]
        if images is not None and len(images) > 0:
            return images
        if len(self.train) == 0:
            raise DataError(f"split={name}: {self.test.title} is for tests alone; use split=test")
        raise DataError(
            "split=val: nothing was held out of train (data.val_fraction=0); use split=test"
        )

    def limited(self, limit: int | None) -> "ImageDataset":
        """At most `limit` images of every split, spread evenly over the classes; None: all."""
        return replace(
            self,
            train=self.train.limited(limit),
            val=None if self.val is None else self.val.limited(limit),
            test=self.test.limited(limit),
        )


def rank_within_class(labels: Tensor) -> Tensor:
    """The position of each sample in a fixed random order of its class, int64 (n,)."""
    # Not the run's seed: every run holds out the same images
    order = torch.argsort(random_bits(0, "split", torch.arange(len(labels))), stable=True)
    # Sorted by class, in random order within one
    order = order[torch.argsort(labels[order], stable=True)]
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts  # where each class starts in `order`
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels)) - starts[labels[order]]
    return rank


def hold_out(images: ImageSplit, fraction: float, title: str) -> tuple[ImageSplit, ImageSplit]:
    """(the rest, the held-out fraction of every class); the latter gets the title.

    A class of two images or more gives at least one and keeps one. A larger fraction holds out the
    same images and more.
    """
    # By rank within the class, so that classes need not be gone through one by one
    class_sizes = torch.bincount(images.labels)[images.labels]  # of each image's class
    num_held_out = (class_sizes * fraction).round().clamp(min=1).minimum(class_sizes - 1)
    is_held_out = rank_within_class(images.labels) < num_held_out
    rest = images.subset((~is_held_out).nonzero()[:, 0])
    return rest, images.subset(is_held_out.nonzero()[:, 0], title)


def sample_evenly(labels: Tensor, limit: int) -> Tensor:
    """The indices of `limit` samples in the data set's order, spread evenly over the classes.

    All samples where there are fewer.
    """
    num_classes = labels.max() + 1
    # The first of every class in turn, then the second of every class, and so on
    order = torch.argsort(rank_within_class(labels) * num_classes + labels)
    return order[:limit].sort().values


def classes_of_numbers(labels: np.ndarray) -> list[str]:
    """The names of classes that are known by their numbers alone: those that occur, sorted.

    labels: whole numbers (n,); those below 0 are no classes.
    """
    # Without gaps: a class of no images would be counted as one, and a large number exhaust memory
    return [str(number) for number in np.unique(labels[labels >= 0]).tolist()]


def positions_of(labels: np.ndarray, classes: list[str]) -> np.ndarray:
    """The labels, text or numbers (n,), as positions in a list of names, int64; -1: not there."""
    positions = {name: position for position, name in enumerate(classes)}
    distinct, inverse = np.unique(labels, return_inverse=True)
    of_distinct = [positions.get(str(label), -1) for label in distinct.tolist()]
    return np.array(of_distinct, dtype=np.int64)[inverse]


def check_classes(classes: list[str], found: list[str], path: Path) -> None:
    """Raise DataError where the classes found at `path` are not those of train."""
    if classes == found:
        return
    missing = sorted(set(classes) - set(found))
    extra = sorted(set(found) - set(classes))
    differences = []
    if missing:
        differences.append(f"lacks {first_names(missing)}")
    if extra:
        differences.append(f"has besides {first_names(extra)}")
    if not differences:
        differences.append("has them in another order")
    raise DataError(
        f"{path.absolute()}: its classes are not those of train: it {' and '.join(differences)}"
    )


def first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
