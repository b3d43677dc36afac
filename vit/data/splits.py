"""TODO: say what this file is for."""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit.errors import DataError
from vit.randomness import random_bits


@dataclass(frozen=True)
class ImageSplit:
    """One split: labels int64 (n,) and either pixels uint8 (n, C, height, width) or paths, bytes (n,)."""

    title: str  # for people: "CIFAR-10 test"
    labels: Tensor
    pixels: Tensor | None = None
    paths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return f"{self.title}, {len(self):,} images"

    def subset(self, indices: Tensor, title: str | None = None) -> "ImageSplit":
        return ImageSplit(
            title or self.title,
            self.labels[indices],
            None if self.pixels is None else self.pixels[indices.to(self.pixels.device)],
            None if self.paths is None else self.paths[indices.numpy()],
        )

    def fingerprint(self) -> int:
        """A number that other images or labels would hardly have: a checksum of the labels and the pixels, or, for files, of
        their names and those of their folders (not of where these lie)."""
        checksum = zlib.crc32(self.labels.numpy().data)
        if self.paths is not None:
            names = b"\0".join(b"/".join(path.split(b"/")[-2:]) for path in self.paths.tolist())
            return zlib.crc32(names, checksum)
        assert self.pixels is not None
        return zlib.crc32(self.pixels.cpu().contiguous().numpy().data, checksum)

    def to(self, device: torch.device) -> "ImageSplit":
        """With the pixels on the device; labels and paths stay."""
        return self if self.pixels is None else replace(self, pixels=self.pixels.to(device))


@dataclass(frozen=True)
class ImageDataset:
    """A data set: class names in the order of the labels, and its splits; val is None where nothing is held out."""

    classes: list[str]
    train: ImageSplit
    val: ImageSplit | None
    test: ImageSplit

    def split(self, name: str) -> ImageSplit:
        """train, val or test by name; raises DataError where nothing was held out for val."""
        images = {"train": self.train, "val": self.val, "test": self.test}[name]
        if images is None:
            raise DataError(
                "split=val: nothing was held out of train (data.val_fraction=0); use split=test"
            )
        return images


def rank_within_class(labels: Tensor) -> Tensor:
    """Each sample's place in a fixed random order within its class, int64 (n,)."""
    order = torch.argsort(random_bits(0, "split", torch.arange(len(labels))), stable=True)
    order = order[torch.argsort(labels[order], stable=True)]  # by class, random within
    counts = torch.bincount(labels)
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return rank


def hold_out(images: ImageSplit, fraction: float, title: str) -> tuple[ImageSplit, ImageSplit]:
    """(the rest, the held-out share of every class). A class of two images or more gives at least one and keeps one."""
    counts = torch.bincount(images.labels)[images.labels]
    wanted = (counts * fraction).round().clamp(min=1).minimum(counts - 1)
    held = rank_within_class(images.labels) < wanted
    return images.subset((~held).nonzero()[:, 0]), images.subset(held.nonzero()[:, 0], title)


def sample_evenly(labels: Tensor, limit: int) -> Tensor:
    """The indices of `limit` samples, as evenly over the classes as they go, in the data set's order."""
    return (
        torch.argsort(rank_within_class(labels) * (labels.max() + 1) + labels)[:limit].sort().values
    )


def check_classes(classes: list[str], other: list[str], where: Path) -> None:
    if classes != other:
        missing, extra = sorted(set(classes) - set(other)), sorted(set(other) - set(classes))
        told = [
            f"{what} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
            for what, names in (("lacks", missing), ("has besides", extra))
            if names
        ]
        raise DataError(
            f"{where.absolute()}: its classes are not those of train: it {' and '.join(told)}"
        )
