"""TODO: say what this file is for."""

import atexit
import logging
import multiprocessing
import os
import random
import signal
from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vit.augment.image import TrainingTransform
from vit.data.image_files import open_image, to_pixels
from vit.data.preprocessing import Preprocessing
from vit.data.splits import ImageSplit
from vit.errors import DataError
from vit.randomness import random_seed

log = logging.getLogger("vit")


class ImageFileDataset(Dataset):
    """Decodes and transforms one picture; an item is (epoch, index), so that workers hold no state.

    skip: in the place of a picture that can't be read the next one that can is taken, the same in every epoch.
    """

    def __init__(
        self,
        images: ImageSplit,
        preprocessing: Preprocessing,
        transform: TrainingTransform | None,
        seed: int,
        skip: bool = False,
    ):
        self.images, self.preprocessing, self.transform, self.seed, self.skip = (
            images,
            preprocessing,
            transform,
            seed,
            skip,
        )

    def __getitem__(self, item: tuple[int, int]) -> "DecodedImage | DataError":
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
            return to_pixels(
                self.preprocessing.resize_and_crop(
                    open_image(path, self.preprocessing.num_channels)
                )
            )
        seed = random_seed(
            self.seed, "sample", epoch, index
        )  # every library a transform may draw from
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  (NumPy's global generator is one of them)
        return self.transform(path)


# One picture: uint8 (C, *image_size), its label, and a line for every picture that could not be read before it
DecodedImage = tuple[Tensor, int, list[str]]


MAX_SUBSTITUTES = 10  # so many unreadable pictures in a row are no accident


MAX_UNREADABLE = 0.01  # share of the pictures that may be skipped


def collate(items: list[DecodedImage | DataError]) -> tuple[Tensor, Tensor, list[str]] | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    pixels, labels, unreadable = zip(*items, strict=True)
    return (
        torch.stack(pixels),
        torch.tensor(labels),
        [line for lines in unreadable for line in lines],
    )


def init_worker(worker: int) -> None:
    """The parent answers signals; a worker that died of one would take the batch in progress with it. One thread each."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


@atexit.register
def kill_workers() -> None:
    """Where a program ends in an error its loaders may still stand, and workers that ignore SIGTERM would be waited for."""
    signal.signal(
        signal.SIGCHLD, signal.SIG_DFL
    )  # torch's handler would raise about the workers that are killed here
    for worker in multiprocessing.active_children():
        worker.kill()


def decode_batches(
    dataset: ImageFileDataset,
    batches: Sequence[list[tuple[int, int]]] | Iterator[list[tuple[int, int]]],
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures from the loader's processes, uint8 on the device.

    Raises the DataError of an unreadable picture, or where more are skipped than may be.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=init_worker,
        pin_memory=device.type == "cuda",
        prefetch_factor=2 if workers else None,
    )
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
            raise DataError(
                f"{len(told)} of {len(dataset.images)} pictures can't be read, more than {MAX_UNREADABLE:.0%}; the "
                f"last: {unreadable[-1]}"
            )
        yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def evaluation_batches(
    images: ImageSplit,
    batch_size: int,
    preprocessing: Preprocessing,
    workers: int,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Every image once, in order, as evaluation sees it; the last batch may be smaller.

    Of several processes each takes every processes-th image, and all as many: one that has none left gets an image whose label
    is -1, which vit.evaluation doesn't count.
    """
    own = torch.arange(rank, -(-len(images) // processes) * processes, processes)
    labels = torch.where(own < len(images), images.labels[own.clamp(max=len(images) - 1)], -1)
    own = own.clamp(max=len(images) - 1)
    batches = own.split(batch_size)
    if images.pixels is None:
        dataset = ImageFileDataset(images, preprocessing, None, 0)
        decoder = decode_batches(
            dataset,
            [[(0, index) for index in batch.tolist()] for batch in batches],
            workers,
            device,
        )
        stream = (pixels for pixels, _ in decoder)
    else:
        held = images.pixels
        stream = (held[batch.to(held.device)].to(device) for batch in batches)
    for pixels, targets in zip(stream, labels.split(batch_size), strict=True):
        yield preprocessing.to_input(pixels), targets.to(device)
