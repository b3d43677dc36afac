"""Image files decoded by worker processes, and the batches of evaluation.

Workers hold no state: an item is (epoch, index), and everything random about a sample is a
function of (seed, epoch, index). So any number of workers gives the same batches, and a run may
start anywhere.
"""

import atexit
import contextlib
import itertools
import logging
import multiprocessing
import os
import random
import signal
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from vit.data.preprocessing import Preprocessing
from vit.data.splits import ImageSplit
from vit.data.training_transform import TrainingTransform
from vit.errors import DataError
from vit.randomness import random_seed
from vit.runtime.device import send
from vit.runtime.faults import from_workers

log = logging.getLogger("vit")

# uint8 (C, *image_size), the label, and a line about each image that could not be read before it
DecodedImage = tuple[Tensor, int, list[str]]
# uint8 (B, C, *image_size), labels int64 (B,), and those lines of all images
DecodedBatch = tuple[Tensor, Tensor, list[str]]


class PixelReader(Protocol):
    """What reads an image file for evaluation, such as Preprocessing."""

    def read_pixels(self, path: str | Path) -> Tensor:
        """uint8 (channels, height, width), of equal size for all; raises DataError."""
        ...


MAX_SUBSTITUTES = 10  # that many unreadable images in a row are no accident
MAX_UNREADABLE = 0.01  # fraction of the images that may be skipped


class ImageFileDataset(Dataset):
    """Decodes and transforms one image file; an item is (epoch, index).

    transform  of training; None: as in evaluation
    skip       in place of an image that cannot be read, use the next one that can; it is the same
               in every epoch
    """

    def __init__(
        self,
        images: ImageSplit,
        preprocessing: PixelReader,
        transform: TrainingTransform | None,
        seed: int,
        skip: bool = False,
    ):
        self.images = images
        self.preprocessing = preprocessing
        self.transform = transform
        self.seed = seed
        self.skip = skip

    def __getitem__(self, item: tuple[int, int]) -> DecodedImage | DataError:
        """A DataError is returned, not raised: a worker would wrap it in its traceback."""
        epoch, first = item
        assert self.images.paths is not None
        # In the order of the data set, so that the substitute is the same in every epoch
        attempts = min(MAX_SUBSTITUTES, len(self.images)) if self.skip else 1
        errors: list[DataError] = []
        for attempt in range(attempts):
            index = (first + attempt) % len(self.images)
            path = os.fsdecode(self.images.paths[index])
            try:
                pixels = self.read(path, epoch, index)
            except DataError as error:
                errors.append(error)
            else:
                return pixels, int(self.images.labels[index]), [str(error) for error in errors]
        return errors[-1]

    def read(self, path: str, epoch: int, index: int) -> Tensor:
        """uint8 (C, *image_size); raises DataError for a file that cannot be read."""
        if self.transform is None:
            return self.preprocessing.read_pixels(path)
        seed_libraries(random_seed(self.seed, "sample", epoch, index))
        return self.transform(path, epoch, index)


def seed_libraries(seed: int) -> None:
    """Seed every generator that a transform may draw from."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (NumPy's global generator is one of them)


def collate(items: list[DecodedImage | DataError]) -> DecodedBatch | DataError:
    """Stack images to a batch, or give the first error among them."""
    images: list[DecodedImage] = []
    for item in items:
        if isinstance(item, DataError):
            return item
        images.append(item)
    pixels, labels, unreadable = zip(*images, strict=True)
    # torch's own, which in a worker writes into shared memory at once. What is moved there only
    # when it is sent takes another copy, and where there is too little of it the batch is lost
    # without an error, and waited for for ever
    return (
        default_collate(list(pixels)),
        default_collate(list(map(torch.tensor, labels))),
        list(itertools.chain(*unreadable)),
    )


def init_worker(worker: int) -> None:
    """Leave signals and cores to the parent.

    A terminal sends Ctrl+C, and a scheduler its SIGTERM, to every process of a group. The parent
    then finishes its step and saves; a worker that ended at once would take the batch in progress
    with it. One thread each, since there are as many workers as cores.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


@atexit.register
def kill_workers() -> None:
    """End the workers of loaders that an error left running.

    Python would ask them to end by SIGTERM, which they ignore (init_worker), and wait for them for
    ever. Functions registered later run first, so this one comes before Python's own.
    """
    # torch's handler of SIGCHLD would raise an error about every worker that is killed here
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def decode_batches(
    dataset: ImageFileDataset,
    batches: Iterable[list[tuple[int, int]]],
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decode batches of (epoch, index): pixels uint8 (B, C, *image_size) and labels on the device.

    workers: processes; 0 decodes in this one. Raises the DataError of an image that cannot be
    read, or where more images are skipped than may be.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=init_worker,
        pin_memory=device.type == "cuda",  # so that the copy does not hold the GPU up
        prefetch_factor=2 if workers else None,
    )
    decoded = readable_batches(from_workers(loader), len(dataset.images))
    if device.type == "cuda":
        return copy_ahead(decoded, device)
    return ((send(pixels, device), send(labels, device)) for pixels, labels in decoded)


def readable_batches(
    batches: Iterable[DecodedBatch | DataError], num_images: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and labels; raises the DataError of an image, or where more are skipped than may be.

    num_images: of the data set.
    """
    skipped: set[str] = set()
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        pixels, labels, unreadable = batch
        report_skipped(unreadable, skipped, num_images)
        yield pixels, labels


def copy_ahead(
    batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches on a GPU, each of which is copied while the step before it is computed.

    The copies are queued in a stream of their own, one batch ahead, and need pinned memory to run
    beside the kernels.
    """
    copying = torch.cuda.Stream(device)
    ahead: tuple[Tensor, Tensor] | None = None
    for pixels, labels in batches:
        # What was copied ahead is handed out with the copy of the next one already queued. Waiting
        # for the first copy alone, which has long been done, lets the second run on
        if ahead is not None:
            torch.cuda.current_stream(device).wait_stream(copying)
        with torch.cuda.stream(copying):
            copied = (send(pixels, device), send(labels, device))
        if ahead is not None:
            yield in_use(ahead, device)
        ahead = copied
    if ahead is not None:
        torch.cuda.current_stream(device).wait_stream(copying)
        yield in_use(ahead, device)


def in_use(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tell torch that the step's stream uses a batch, so that its memory is not reused too soon."""
    for tensor in batch:
        tensor.record_stream(torch.cuda.current_stream(device))
    return batch


def report_skipped(unreadable: list[str], skipped: set[str], num_images: int) -> None:
    """Log what is not in `skipped` yet and add it; raise DataError where that is too much."""
    # Each of them comes again in every epoch
    for line in unreadable:
        if line not in skipped:
            skipped.add(line)
            log.info(f"warning: skipped {line}")
    # One is allowed in the smallest data set, too
    if len(skipped) > max(1, MAX_UNREADABLE * num_images):
        raise DataError(
            f"{len(skipped)} of {num_images} images cannot be read, more than "
            f"{MAX_UNREADABLE:.0%}; the last: {unreadable[-1]}"
        )


def evaluation_batches(
    images: ImageSplit,
    batch_size: int,
    preprocessing: Preprocessing,
    workers: int,
    device: torch.device,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Every image once, in order, as the model takes it; the last batch may be smaller.

    Yields float32 (B, C, *image_size) and labels int64 (B,) on the device.
    """
    batches = evaluation_pixels(images, batch_size, preprocessing, workers, device)
    with contextlib.closing(batches):
        for pixels, labels in batches:
            yield preprocessing.to_input(pixels), labels


def evaluation_pixels(
    images: ImageSplit,
    batch_size: int,
    preprocessing: PixelReader,
    workers: int,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Every image once, in order, before preprocessing.to_input; the last batch may be smaller.

    Yields uint8 (B, C, height, width) and labels int64 (B,) on the device. Of several processes
    each takes every processes-th image, and all take equally many: one that has none left gets an
    image whose label is -1, which vit.evaluation does not count.
    """
    # As many batches in every process, since they talk to each other between two batches
    num_images = len(images)
    rounded_up = -(-num_images // processes) * processes
    indices = torch.arange(rank, rounded_up, processes)
    is_padding = indices >= num_images
    indices = indices.clamp(max=num_images - 1)
    labels = torch.where(is_padding, -1, images.labels[indices])

    # Labels are known without decoding; the stream gives the pixels alone
    batches = indices.split(batch_size)
    if images.pixels is None:
        stream = decode_for_evaluation(images, batches, preprocessing, workers, device)
    else:
        stream = select_pixels(images.pixels, batches, device)
    for pixels, targets in zip(stream, labels.split(batch_size), strict=True):
        yield pixels, send(targets, device)


def decode_for_evaluation(
    images: ImageSplit,
    batches: Iterable[Tensor],
    preprocessing: PixelReader,
    workers: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """The pixels of each batch of indices, from files."""
    dataset = ImageFileDataset(images, preprocessing, transform=None, seed=0)
    items = [[(0, index) for index in batch.tolist()] for batch in batches]
    for pixels, _ in decode_batches(dataset, items, workers, device):
        yield pixels


def select_pixels(
    pixels: Tensor, batches: Iterable[Tensor], device: torch.device
) -> Iterator[Tensor]:
    """The pixels of each batch of indices, from memory."""
    for batch in batches:
        yield send(pixels[send(batch, pixels.device)], device)
