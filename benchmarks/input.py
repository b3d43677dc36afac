"""Images per second of this project's input against the usual one.

    python benchmarks/input.py --jpegs FOLDER_OF_JPEGS    # the images below it, repeated to 576

The usual one: DataLoader over PIL images, torchvision's transforms one image at a time. Small
images: from uint8 in memory to normalized float32 batches on the CPU, two threads or two workers.
JPEGs: from files to normalized float32 batches of 224 px, random crop and mirroring; without
workers one core does everything. Both sides take turns; the table has medians of the rounds, and
the medians of their quotients.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.reporting import table_header, table_row
from benchmarks.timing import median_ratio, take_turns
from vit.augment.batch import BatchAugmentation
from vit.augment.mixing import MixupCutmix
from vit.augment.policies import build_policies
from vit.data.class_folders import list_class_folders
from vit.data.image_files import find_image_files
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.splits import ImageDataset, ImageSplit
from vit.data.training_transform import TrainingTransform
from vit.errors import DataError
from vit.runtime.cores import usable_cores
from vit.runtime.machine import Machine
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.shrink import shrink_folder
from vit.training.batches import Augmentation, Batches

CPU = torch.device("cpu")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

NUM_SMALL = 10_000
SMALL_BATCH_SIZE = 500
NUM_JPEGS = 576
JPEG_BATCH_SIZE = 32


class SmallImages(Dataset):
    """Images of CIFAR's size as PIL images, through torchvision's transforms."""

    def __init__(self, pixels: Tensor, transform: v2.Compose):
        self.images = [v2.functional.to_pil_image(image) for image in pixels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), 0


def usual_transform(*changes: nn.Module) -> v2.Compose:
    """Return random changes of a PIL image, followed by the way to a normalized tensor."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([*changes, v2.ToImage(), to_float, v2.Normalize(MEAN, STD)])


def make_augmentation(
    preprocessing: Preprocessing, *, crop_scale: list[float] | None, pad: float, policy: str
) -> Augmentation:
    """Return crops, mirroring and a policy; see TrainingTransform and BatchAugmentation."""
    size = preprocessing.image_size
    policies = build_policies(policy, None, None, 0.0)
    return Augmentation(
        image=TrainingTransform(preprocessing, crop_scale, flip=0.5, policies=policies),
        batch=BatchAugmentation(0, size, pad, crop_scale, flip=0.5, policies=policies),
        erasing=0.0,
        mixing=MixupCutmix(0, num_classes=10, mixup=0.0, cutmix=0.0, probability=1.0),
    )


def our_rate(
    images: ImageSplit,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    batch_size: int,
    workers: int,
) -> float:
    """Return the images/s of one pass over a split as training reads it."""
    batches = Batches(
        data=ImageDataset([], train=images, val=None, test=images),
        preprocessing=preprocessing,
        augmentation=augmentation,
        order=SampleOrder(len(images), batch_size, seed=0),
        batch_size=batch_size,
        machine=Machine(CPU, Processes(), workers, sharded=False),
        stop=StopSignal(),
    )
    return images_per_second(batches.training(0, len(images) // batch_size))


def images_per_second(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Read all batches of (images, labels), and return the rate from the second batch on."""
    iterator = iter(batches)
    # Starting the processes is not counted
    next(iterator)
    start = time.perf_counter()
    num_images = sum(len(labels) for _, labels in iterator)
    return num_images / (time.perf_counter() - start)


def compare(ours: Callable[[], float], usual: Callable[[], float], rounds: int) -> list[str]:
    """Return a row's cells: ours, the usual, and their ratio, of two functions that give rates."""
    rates = take_turns({"ours": ours, "usual": usual}, rounds)
    return [
        f"{statistics.median(rates['ours']):,.0f}",
        f"{statistics.median(rates['usual']):,.0f}",
        f"{median_ratio(rates['ours'], rates['usual']):.1f}",
    ]


def compare_small_images(title: str, policy: str, more: list[nn.Module], rounds: int) -> str:
    """Return the row for noise of CIFAR's size.

    policy: of our augmentation; more: the same as torchvision's transforms.
    """
    pixels = torch.randint(0, 256, (NUM_SMALL, 3, 32, 32), dtype=torch.uint8)
    images = ImageSplit("noise", torch.zeros(len(pixels), dtype=torch.int64), pixels)
    preprocessing = Preprocessing((32, 32), 3, MEAN, STD, None, "bilinear")
    augmentation = make_augmentation(preprocessing, crop_scale=None, pad=0.125, policy=policy)

    # Crop and mirroring as for CIFAR-10 in He et al. 2015 (arXiv:1512.03385), section 4.2
    transform = usual_transform(v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *more)
    dataset = SmallImages(pixels, transform)
    loader = DataLoader(dataset, SMALL_BATCH_SIZE, shuffle=True, num_workers=2)
    cells = compare(
        lambda: our_rate(images, preprocessing, augmentation, SMALL_BATCH_SIZE, workers=0),
        lambda: images_per_second(loader),
        rounds,
    )
    return table_row(f"32 px in memory: {title}", "2 cores", *cells)


def compare_jpegs(ours: Path, usual: Path, title: str, workers: int, rounds: int) -> str:
    """Return the row for the JPEGs of two folders, each read by its side."""
    _, images = list_class_folders(ours / "train", "images")
    preprocessing = Preprocessing((224, 224), 3, MEAN, STD, 0.875, "bilinear")
    augmentation = make_augmentation(preprocessing, crop_scale=[0.08, 1.0], pad=0.0, policy="none")

    transform = usual_transform(v2.RandomResizedCrop(224), v2.RandomHorizontalFlip())
    folder = ImageFolder(str(usual / "train"), transform)
    loader = DataLoader(folder, JPEG_BATCH_SIZE, shuffle=True, num_workers=workers)
    cells = compare(
        lambda: our_rate(images, preprocessing, augmentation, JPEG_BATCH_SIZE, workers),
        lambda: images_per_second(loader),
        rounds,
    )
    return table_row(title, f"{workers} workers" if workers else "one core", *cells)


def link_images(source: Path, root: Path) -> None:
    """Fill root/train with two classes of links to the images below source, NUM_JPEGS in all."""
    try:
        files = find_image_files([source])
    except DataError as error:
        sys.exit(str(error))
    for number in range(NUM_JPEGS):
        folder = root / "train" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / f"{number}.jpg"
        link.symlink_to(files[number % len(files)].absolute())


def print_jpeg_rows(source: Path, rounds: int) -> None:
    # As many as the workers in which both sides decode
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        original, shrunk = Path(folder) / "original", Path(folder) / "shrunk"
        link_images(source, original)
        for workers in (0, 1, min(2, usable_cores())):
            title = "JPEGs as they are, 224 px"
            print(compare_jpegs(original, original, title, workers, rounds), flush=True)

        shrink_folder(original, shrunk, short_side=256, quality=90, workers=2)
        title = "the same, ours made smaller by vit.shrink"
        print(compare_jpegs(shrunk, original, title, 0, rounds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jpegs", type=Path, help="a folder of JPEGs of their original sizes")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    print(table_header("input", "on", "ours, images/s", "the usual, images/s", "ratio"))
    cases: list[tuple[str, str, list[nn.Module]]] = [
        ("crop, flip", "none", []),
        ("crop, flip, RandAugment", "randaugment", [v2.RandAugment(2, 9)]),
    ]
    for title, policy, more in cases:
        print(compare_small_images(title, policy, more, arguments.rounds), flush=True)
    if arguments.jpegs is not None:
        print_jpeg_rows(arguments.jpegs, arguments.rounds)


if __name__ == "__main__":
    main()
