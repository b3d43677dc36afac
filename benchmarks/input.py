"""ImageSplit/s of this project's input against the usual one: DataLoader, Pillow and torchvision's transforms an image at a time.

    python benchmarks/input.py --jpegs FOLDER_OF_JPEGS           # the pictures below it, repeated to 576

Small images: from uint8 in memory to normalised float32 batches on the CPU, two threads or two workers. JPEGs: from files to
normalised float32 batches of 224 px, random crop and mirroring; workers 0 is one core for everything. Both sides take turns;
medians of the rounds, and the medians of their quotients.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

from vit.augment.batch import BatchAugmentation
from vit.augment.mixing import MixupCutmix
from vit.augment.policies import build_policies
from vit.data.class_folders import list_class_folders
from vit.data.image_files import EXTENSIONS
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.splits import ImageSplit
from vit.data.training_transform import TrainingTransform
from vit.shrink import shrink_folder
from vit.training.batches import Augmentation, training_batches

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PICTURES = 576


class Small(Dataset):
    """ImageSplit of CIFAR's size as a Dataset of PIL images would give them, through torchvision's transforms."""

    def __init__(self, pixels: torch.Tensor, transform: v2.Compose):
        self.pictures = [v2.functional.to_pil_image(image) for image in pixels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pictures[index]), 0


def consume(batches: Iterable) -> float:
    """ImageSplit/s of an iterable of (images, labels), from the second batch on: starting processes is not counted."""
    iterator = iter(batches)
    next(iterator)
    began, images = time.perf_counter(), 0
    for _, labels in iterator:
        images += len(labels)
    return images / (time.perf_counter() - began)


def compare(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> str:
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    mine, others = (statistics.median(column) for column in zip(*pairs, strict=True))
    return f"{mine:,.0f} | {others:,.0f} | {statistics.median(a / b for a, b in pairs):.1f}"


def plain_augmentation(
    preprocessing: Preprocessing, crop_scale: list[float] | None, pad: float, policy: str
) -> Augmentation:
    policies = build_policies(policy, None, None, 0.0)
    return Augmentation(
        TrainingTransform(preprocessing, crop_scale, 0.5, policies),
        BatchAugmentation(0, preprocessing.image_size, pad, crop_scale, 0.5, policies),
        0.0,
        MixupCutmix(0, 10, 0.0, 0.0, 1.0),
    )


def small_images(rounds: int) -> None:
    pixels = torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8)
    images = ImageSplit("noise", torch.zeros(len(pixels), dtype=torch.int64), pixels)
    preprocessing = Preprocessing((32, 32), 3, MEAN, STD, None, "bilinear")
    order, steps = SampleOrder(len(pixels), 500, 0), len(pixels) // 500
    for title, policy, more in (
        ("crop, flip", "none", []),
        ("crop, flip, RandAugment", "randaugment", [v2.RandAugment(2, 9)]),
    ):
        augmentation = plain_augmentation(preprocessing, None, 0.125, policy)
        transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                *more,
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        loader = DataLoader(Small(pixels, transform), 500, shuffle=True, num_workers=2)
        found = compare(
            lambda augmentation=augmentation: consume(
                training_batches(images, order, 0, steps, preprocessing, augmentation, 0, CPU)
            ),
            lambda loader=loader: consume(loader),
            rounds,
        )
        print(f"| 32 px in memory: {title} | 2 cores | {found} |", flush=True)


def as_folder(jpegs: Path, root: Path) -> None:
    """root/train with two classes of links to the pictures, PICTURES in all."""
    found = sorted(path for path in jpegs.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not found:
        sys.exit(f"{jpegs}: no pictures")
    for number in range(PICTURES):
        folder = root / "train" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").symlink_to(found[number % len(found)].absolute())


def jpegs(root: Path, rounds: int, title: str, workers: int, shrunk: Path | None = None) -> None:
    preprocessing = Preprocessing((224, 224), 3, MEAN, STD, 0.875, "bilinear")
    _, images = list_class_folders((shrunk or root) / "train", "pictures")
    augmentation = plain_augmentation(preprocessing, [0.08, 1.0], 0.0, "none")
    order, steps = SampleOrder(len(images), 32, 0), len(images) // 32
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(224),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(root / "train"), transform), 32, shuffle=True, num_workers=workers
    )
    found = compare(
        lambda: consume(
            training_batches(images, order, 0, steps, preprocessing, augmentation, workers, CPU)
        ),
        lambda: consume(loader),
        rounds,
    )
    print(
        f"| {title} | {'one core' if workers == 0 else f'{workers} workers'} | {found} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jpegs", type=Path, help="a folder of JPEGs of their original sizes")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("| input | on | ours, images/s | the usual, images/s | ratio |\n|---|---|---|---|---|")
    small_images(arguments.rounds)
    if arguments.jpegs is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "original"
        as_folder(arguments.jpegs, root)
        torch.set_num_threads(1)
        for workers in (0, 1, min(2, os.cpu_count() or 1)):
            jpegs(root, arguments.rounds, "JPEGs as they are, 224 px", workers)
        shrink_folder(root, Path(folder) / "shrunk", short_side=256, quality=90, workers=2)
        jpegs(
            root,
            arguments.rounds,
            "the same, ours made smaller by vit.shrink",
            0,
            Path(folder) / "shrunk",
        )


if __name__ == "__main__":
    main()
