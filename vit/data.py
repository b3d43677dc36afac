"""Data sets, their splits, and the batches of training and evaluation.

Small data sets stand whole on the device as uint8 and are augmented there a batch at a time; folders of pictures are
decoded in worker processes. Both give the loop the same thing: normalised images and labels, in an order that is a
function of (seed, epoch) alone.
"""

import atexit
import hashlib
import logging
import multiprocessing
import os
import random
import signal
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vit.augment import BatchAugmentation, Mixing, erase
from vit.errors import DataError
from vit.randomness import permutation, random_bits, random_seed
from vit.shards import CLASSES, SPLITS, index_split
from vit.transforms import EXTENSIONS, Preprocessing, TrainingTransform, open_image, pictures_below, to_pixels

log = logging.getLogger("vit")

CLASS_COUNTS = {"digits": 10, "cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "imagenet": 1000}  # as published

# The 1,000 wnids of ILSVRC 2012 in order, joined by newlines: a folder that holds exactly these gets readable class names.
IMAGENET_WNIDS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


@dataclass(frozen=True)
class Images:
    """One split: labels int64 (n,) and either pixels uint8 (n, C, height, width) or paths, bytes (n,)."""

    title: str  # for people: "CIFAR-10 test"
    labels: Tensor
    pixels: Tensor | None = None
    paths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        return f"{self.title}, {len(self):,} images"

    def subset(self, indices: Tensor, title: str | None = None) -> "Images":
        return Images(title or self.title, self.labels[indices],
                      None if self.pixels is None else self.pixels[indices.to(self.pixels.device)],
                      None if self.paths is None else self.paths[indices.numpy()])

    def fingerprint(self) -> int:
        """A number that other images or labels would hardly have: a checksum of the labels and the pixels, or, for files, of
        their names and those of their folders (not of where these lie)."""
        checksum = zlib.crc32(self.labels.numpy().data)
        if self.paths is not None:
            names = b"\0".join(b"/".join(path.split(b"/")[-2:]) for path in self.paths.tolist())
            return zlib.crc32(names, checksum)
        assert self.pixels is not None
        return zlib.crc32(self.pixels.cpu().contiguous().numpy().data, checksum)

    def to(self, device: torch.device) -> "Images":
        """With the pixels on the device; labels and paths stay."""
        return self if self.pixels is None else replace(self, pixels=self.pixels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A data set: class names in the order of the labels, and its splits; val is None where nothing is held out."""

    classes: list[str]
    train: Images
    val: Images | None
    test: Images

    def split(self, name: str) -> Images:
        """train, val or test by name; raises DataError where nothing was held out for val."""
        images = {"train": self.train, "val": self.val, "test": self.test}[name]
        if images is None:
            raise DataError("split=val: nothing was held out of train (data.val_fraction=0); use split=test")
        return images


# --- reading ---------------------------------------------------------------------------------------------------------


def load_data(*, name: str, root: str | None, val_fraction: float, test_fraction: float | None, limit: int | None,
              image_size: tuple[int, int], num_channels: int, num_classes: int | None, num_images: int | None,
              device: torch.device) -> ImageData:
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
        classes, train, val, test = make_synthetic(num_classes, num_images, (num_channels, *image_size), device)
    elif name == "shards":
        classes, train, val, test = read_shards(Path(str(root)))
    else:
        classes, train, val, test = read_folder(name, Path(str(root)))
    if test is None:
        train, test = hold_out(train, test_fraction or 0.0, f"{train.title} (a share of it), used as test")
    if val is None and val_fraction > 0:
        train, val = hold_out(train, val_fraction, f"{train.title}, held out for validation")
    if limit is not None:
        train, test = (images and images.subset(spread_over_classes(images.labels, limit)) for images in (train, test))
        val = val and val.subset(spread_over_classes(val.labels, limit))
    for images in (train, val, test):
        if images is not None and len(images) == 0:
            raise DataError(f"{images.title}: no image is left; hold out more or fewer with data.val_fraction or "
                            "data.test_fraction, or raise data.limit")
    return ImageData(classes, train, val, test)


def class_rank(labels: Tensor) -> Tensor:
    """Each sample's place in a fixed random order within its class, int64 (n,)."""
    order = torch.argsort(random_bits(0, "split", torch.arange(len(labels))), stable=True)
    order = order[torch.argsort(labels[order], stable=True)]  # by class, random within
    counts = torch.bincount(labels)
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return rank


def hold_out(images: Images, fraction: float, title: str) -> tuple[Images, Images]:
    """(the rest, the held-out share of every class). A class of two images or more gives at least one and keeps one."""
    counts = torch.bincount(images.labels)[images.labels]
    wanted = (counts * fraction).round().clamp(min=1).minimum(counts - 1)
    held = class_rank(images.labels) < wanted
    return images.subset((~held).nonzero()[:, 0]), images.subset(held.nonzero()[:, 0], title)


def spread_over_classes(labels: Tensor, limit: int) -> Tensor:
    """The indices of `limit` samples, as evenly over the classes as they go, in the data set's order."""
    return torch.argsort(class_rank(labels) * (labels.max() + 1) + labels)[:limit].sort().values


Splits = tuple[list[str], Images, Images | None, Images | None]


def read_digits() -> Splits:
    """scikit-learn's bundled digits (UCI optical recognition, Alpaydin & Kaynak 1998); 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy((images / 16 * 255).round().astype(np.uint8)).reshape(-1, 1, 8, 8)
    return [str(digit) for digit in range(10)], Images("digits", torch.from_numpy(labels).long(), pixels), None, None


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
        raise DataError(f"data={name}: not found in {folder}, and downloading {kind.url} failed ({error}); unpack that archive "
                        f"into {root} by hand, or try experiment=digits, which needs no download") from None
    train, test = (Images(f"{title} {split}", torch.tensor(part.targets),
                          torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous())
                   for split, part in zip(("train", "test"), parts, strict=True))
    return list(parts[0].classes), train, None, test


def make_synthetic(num_classes: int, num_images: int, shape: tuple[int, ...], device: torch.device) -> Splits:
    generator = torch.Generator(device).manual_seed(0)
    pixels = torch.randint(0, 256, (num_images, *shape), dtype=torch.uint8, device=device, generator=generator)
    labels = torch.arange(num_images) % num_classes
    return [str(label) for label in range(num_classes)], Images("synthetic noise", labels, pixels), None, None


def read_folder(name: str, root: Path) -> Splits:
    """root/train/<class>/… with val/ and test/ where there are; ImageNet's and Tiny-ImageNet's val serve as test."""
    train_folder = root / "train"
    if not train_folder.is_dir():
        how = {"imagenet": "get ILSVRC 2012 from https://image-net.org and put its pictures there",
               "tiny_imagenet": "unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there",
               "folder": "put pictures into one folder a class there"}[name]
        raise DataError(f"data={name}: no folder {train_folder.absolute()}; {how} (train/<class>/*.jpg), or say where it is "
                        "with data.root=FOLDER, or try experiment=digits, which needs no files")
    classes, train = list_pictures(train_folder, f"{root.name} train")
    val = test = None
    if name == "tiny_imagenet" and (root / "val" / "val_annotations.txt").is_file():
        test = list_annotated(root / "val", classes)
    elif (root / "val").is_dir():
        val_classes, val = list_pictures(root / "val", f"{root.name} val")
        check_classes(classes, val_classes, root / "val")
        if name != "folder":
            title = "ImageNet val" if is_imagenet(classes) else val.title
            val, test = None, replace(val, title=f"{title}, used as test")
    if name == "folder" and (root / "test").is_dir():
        test_classes, test = list_pictures(root / "test", f"{root.name} test")
        check_classes(classes, test_classes, root / "test")
    if name != "folder" and test is None:
        raise DataError(f"data={name}: no folder {(root / 'val').absolute()}, which is used as test")
    return readable_names(classes), train, val, test


def read_shards(root: Path) -> Splits:
    """root/train-*.tar, and val-*.tar and test-*.tar where there are; classes.txt names the labels, which else are numbers."""
    found = {split: index_split(root, split) for split in SPLITS}
    if found["train"] is None:
        raise DataError(f"data=shards: no {root.absolute()}/train-*.tar; write shards with python -m vit.shards FOLDER OUT, or "
                        "say where they are with data.root=FOLDER")
    top = max(int(labels.max(initial=-1)) for _, labels in filter(None, found.values()))
    names = root / CLASSES
    classes = names.read_text().splitlines() if names.is_file() else [str(label) for label in range(top + 1)]
    if top >= len(classes) or min(int(labels.min(initial=0)) for _, labels in filter(None, found.values())) < 0:
        raise DataError(f"{root.absolute()}: labels must be from 0 to {len(classes) - 1}, for the {len(classes)} classes of "
                        f"{CLASSES}; found {top}")
    splits = {split: None if index is None else Images(f"{root.name} {split}", torch.from_numpy(index[1]), paths=index[0])
              for split, index in found.items()}
    assert splits["train"] is not None
    return readable_names(classes), splits["train"], splits["val"], splits["test"]


def list_pictures(folder: Path, title: str) -> tuple[list[str], Images]:
    """The classes, sorted, and the pictures below folder/<class>/, at any depth, sorted."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise DataError(f"{folder.absolute()}: found {len(classes)} class folders; expected one folder a class, two at least")
    paths: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(pictures_below(folder / name))
        if not found:
            raise DataError(f"{(folder / name).absolute()}: no pictures in this class folder "
                            f"(looked for {', '.join(EXTENSIONS)}); add some or remove the folder")
        paths += [os.fsencode(path) for path in found]
        labels += [label] * len(found)
    return classes, Images(title, torch.tensor(labels), paths=np.array(paths))


def list_annotated(folder: Path, classes: list[str]) -> Images:
    """Tiny-ImageNet's val as its archive has it: images/ and val_annotations.txt (file, wnid, box)."""
    number = {name: label for label, name in enumerate(classes)}
    rows = [line.split("\t")[:2] for line in (folder / "val_annotations.txt").read_text().splitlines() if line.strip()]
    check_classes(classes, sorted({wnid for _, wnid in rows}), folder / "val_annotations.txt")
    return Images("Tiny-ImageNet val, used as test", torch.tensor([number[wnid] for _, wnid in rows]),
                  paths=np.array([os.fsencode(folder / "images" / file) for file, _ in rows]))


def check_classes(classes: list[str], other: list[str], where: Path) -> None:
    if classes != other:
        missing, extra = sorted(set(classes) - set(other)), sorted(set(other) - set(classes))
        told = [f"{what} {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
                for what, names in (("lacks", missing), ("has besides", extra)) if names]
        raise DataError(f"{where.absolute()}: its classes are not those of train: it {' and '.join(told)}")


def is_imagenet(classes: Sequence[str]) -> bool:
    return len(classes) == 1000 and hashlib.sha256("\n".join(classes).encode()).hexdigest() == IMAGENET_WNIDS_SHA256


def readable_names(classes: list[str]) -> list[str]:
    """For ImageNet's 1,000 wnids the English names, which torchvision lists in their order; else the names as they are."""
    if not is_imagenet(classes):
        return classes
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


# --- batches ---------------------------------------------------------------------------------------------------------


class SampleOrder:
    """Which samples each step sees: the epochs' permutations one after another, cut into batches.

    A batch may hold the end of one epoch and the start of the next, so every sample is seen equally often whatever the
    batch size, and the step alone says where the stream stands.
    repeats: a sample comes that often in a row of the stream, each time changed otherwise (Hoffer et al. 2020,
    arXiv:1901.09335); within a batch its copies stand apart, so that they are not mixed with each other.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, repeats: int = 1):
        self.num_samples, self.batch_size, self.seed, self.repeats = num_samples, batch_size, seed, repeats
        self.cached: dict[int, Tensor] = {}

    def epoch_order(self, epoch: int) -> Tensor:
        if epoch not in self.cached:
            self.cached = {kept: order for kept, order in self.cached.items() if kept == epoch - 1}
            self.cached[epoch] = permutation(self.num_samples, self.seed, "order", epoch)
        return self.cached[epoch]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(passes, indices) of the samples of a step, counted from 0; int64 (batch_size,) each. A pass is an epoch, or with
        repeats one of the copies of an epoch's samples: (pass, index) tells one picture of the whole run."""
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        positions = positions[torch.argsort(positions % self.repeats, stable=True)]
        copies, samples = positions % self.repeats, positions // self.repeats
        epochs, offsets = samples // self.num_samples, samples % self.num_samples
        indices = torch.empty_like(offsets)
        for epoch in epochs.unique().tolist():
            indices[epochs == epoch] = self.epoch_order(epoch)[offsets[epochs == epoch]]
        return epochs * self.repeats + copies, indices


class PictureFiles(Dataset):
    """Decodes and transforms one picture; an item is (epoch, index), so that workers hold no state.

    skip: in the place of a picture that can't be read the next one that can is taken, the same in every epoch.
    """

    def __init__(self, images: Images, preprocessing: Preprocessing, transform: TrainingTransform | None, seed: int,
                 skip: bool = False):
        self.images, self.preprocessing, self.transform, self.seed, self.skip = images, preprocessing, transform, seed, skip

    def __getitem__(self, item: tuple[int, int]) -> "Decoded | DataError":
        """A DataError is returned, not raised: a worker would wrap it in its traceback."""
        epoch, first = item
        assert self.images.paths is not None
        failed: list[DataError] = []
        for tried in range(min(MAX_SUBSTITUTES, len(self.images)) if self.skip else 1):
            index = (first + tried) % len(self.images)
            try:
                pixels = self.read(os.fsdecode(self.images.paths[index]), epoch, index)
                return pixels, int(self.images.labels[index]), [str(error) for error in failed]
            except DataError as error:
                failed.append(error)
        return failed[-1]

    def read(self, path: str, epoch: int, index: int) -> Tensor:
        if self.transform is None:
            return to_pixels(self.preprocessing.fit_size(open_image(path, self.preprocessing.num_channels)))
        seed = random_seed(self.seed, "sample", epoch, index)  # every library a transform may draw from
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  (NumPy's global generator is one of them)
        return self.transform(path)


# One picture: uint8 (C, *image_size), its label, and a line for every picture that could not be read before it
Decoded = tuple[Tensor, int, list[str]]
MAX_SUBSTITUTES = 10  # so many unreadable pictures in a row are no accident
MAX_UNREADABLE = 0.01  # share of the pictures that may be skipped


def collate(items: list[Decoded | DataError]) -> tuple[Tensor, Tensor, list[str]] | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    pixels, labels, unreadable = zip(*items, strict=True)
    return torch.stack(pixels), torch.tensor(labels), [line for lines in unreadable for line in lines]


def start_worker(worker: int) -> None:
    """The parent answers signals; a worker that died of one would take the batch in progress with it. One thread each."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


@atexit.register
def kill_workers() -> None:
    """Where a program ends in an error its loaders may still stand, and workers that ignore SIGTERM would be waited for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise about the workers that are killed here
    for worker in multiprocessing.active_children():
        worker.kill()


def decoded(dataset: PictureFiles, batches: Sequence[list[tuple[int, int]]] | Iterator[list[tuple[int, int]]],
            workers: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures from the loader's processes, uint8 on the device.

    Raises the DataError of an unreadable picture, or where more are skipped than may be.
    """
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                        worker_init_fn=start_worker, pin_memory=device.type == "cuda",
                        prefetch_factor=2 if workers else None)
    told: set[str] = set()
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        pixels, labels, unreadable = batch
        for line in dict.fromkeys(unreadable):
            if line not in told:
                told.add(line)
                log.info(f"warning: skipped {line}")
        if len(told) > max(1, MAX_UNREADABLE * len(dataset.images)):
            raise DataError(f"{len(told)} of {len(dataset.images)} pictures can't be read, more than {MAX_UNREADABLE:.0%}; the "
                            f"last: {unreadable[-1]}")
        yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@dataclass(frozen=True)
class Augmentation:
    """All random changes of training: of pictures from files in the workers, of small images by the batch, and of both as
    normalised batches on the device; erasing: its probability; skip: unreadable pictures are replaced by others."""

    picture: TrainingTransform
    batch: BatchAugmentation
    erasing: float
    mixing: Mixing
    skip: bool = False


def training_batches(images: Images, order: SampleOrder, first_step: int, last_step: int, preprocessing: Preprocessing,
                     augmentation: Augmentation, workers: int, device: torch.device, part: slice = slice(None),
                     ) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The batches of steps first_step to last_step - 1, on the device: float32 (B, C, *image_size), and labels int64 (B,), or
    where images are mixed the classes' shares, float32 (B, classes). part: of every global batch only these samples, the same
    as in the whole; its start must be even, since neighbours are mixed."""
    pictures = None
    if images.pixels is None:
        items = (list(zip(*(numbers[part].tolist() for numbers in order.batch(step)), strict=True))
                 for step in range(first_step, last_step))
        dataset = PictureFiles(images, preprocessing, augmentation.picture, order.seed, augmentation.skip)
        pictures = decoded(dataset, items, workers, device)
    for step in range(first_step, last_step):
        epochs, indices = (numbers[part] for numbers in order.batch(step))
        if pictures is not None:
            pixels, labels = next(pictures)
        else:
            assert images.pixels is not None
            pixels = augmentation.batch(images.pixels[indices.to(device, non_blocking=True)], epochs, indices)
            labels = images.labels[indices].to(device, non_blocking=True)
        inputs = preprocessing.to_input(pixels)
        if augmentation.erasing:
            inputs = erase(inputs, epochs, indices, order.seed, augmentation.erasing)
        yield augmentation.mixing(inputs, labels, step, part.start or 0) if augmentation.mixing else (inputs, labels)


def evaluation_batches(images: Images, batch_size: int, preprocessing: Preprocessing, workers: int, device: torch.device,
                       rank: int = 0, processes: int = 1) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Every image once, in order, as evaluation sees it; the last batch may be smaller.

    Of several processes each takes every processes-th image, and all as many: one that has none left gets an image whose label
    is -1, which vit.evaluation doesn't count.
    """
    own = torch.arange(rank, -(-len(images) // processes) * processes, processes)
    labels = torch.where(own < len(images), images.labels[own.clamp(max=len(images) - 1)], -1)
    own = own.clamp(max=len(images) - 1)
    batches = own.split(batch_size)
    if images.pixels is None:
        dataset = PictureFiles(images, preprocessing, None, 0)
        decoder = decoded(dataset, [[(0, index) for index in batch.tolist()] for batch in batches], workers, device)
        stream = (pixels for pixels, _ in decoder)
    else:
        held = images.pixels
        stream = (held[batch.to(held.device)].to(device) for batch in batches)
    for pixels, targets in zip(stream, labels.split(batch_size), strict=True):
        yield preprocessing.to_input(pixels), targets.to(device)
