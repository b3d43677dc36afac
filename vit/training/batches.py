"""The batches of a run: of every training step, and of every evaluation."""

import contextlib
import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vit.augment.batch import BatchAugmentation
from vit.augment.erasing import random_erase
from vit.augment.mixing import MixupCutmix
from vit.data.loader import ImageFileDataset, decode_batches, evaluation_pixels
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.splits import ImageDataset, ImageSplit
from vit.data.training_transform import TrainingTransform
from vit.errors import Stopped
from vit.evaluation.accuracy import evaluate
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.compiling import without_compiling
from vit.runtime.device import send, wide_device
from vit.runtime.machine import Machine
from vit.runtime.memory import MemoryLimit
from vit.runtime.precision import Precision
from vit.runtime.signals import StopSignal

log = logging.getLogger("vit")

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Augmentation:
    """All random changes of training images.

    image: of image files, in the workers; batch: of small images in memory, a batch at a time.
    erasing: the probability of random erasing, for both; mixing: mixup and CutMix, for both.
    skip_unreadable: take another image for a file that can't be read.
    """

    image: TrainingTransform
    batch: BatchAugmentation
    erasing: float
    mixing: MixupCutmix
    skip_unreadable: bool = False


@dataclass
class Batches:
    """Gives every step its batch, and evaluates a model on a split.

    order: which samples each step sees; batch_size: global, of which this process gets its slice.
    micro_batch_size: images of a forward pass in evaluations, None for this process's part of a
    batch. Batches are functions of the seed and the step, so that a resumed run sees the same ones.
    """

    data: ImageDataset
    preprocessing: Preprocessing
    augmentation: Augmentation
    order: SampleOrder
    batch_size: int
    machine: Machine
    stop: StopSignal
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        # Once: small images stay on the device, so that a step needs no copy of pixels
        device = self.machine.device
        self.train = self.data.train.to(device)
        self.train_labels = send(self.train.labels, device)
        if self.data.val is not None:
            self.data = replace(self.data, val=on_device_if_it_fits(self.data.val, device))
        # What one evaluation finds out holds for the next. The passes of a sharded model are
        # collectives, whose number must be the same in all processes
        may_split = not self.machine.sharded
        self.memory = MemoryLimit(self.machine.device, log.info, may_split=may_split)
        # Seconds of waiting for the processes that decode
        self.loader_seconds = 0.0

    @property
    def has_validation(self) -> bool:
        return self.data.val is not None

    @property
    def own(self) -> slice:
        """The samples of every global batch that this process computes."""
        return self.machine.processes.batch_slice(self.batch_size)

    def training(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """Yield this process's part of the batches of steps first_step to last_step - 1.

        Images are float32 (B, C, *image_size) and normalized; labels int64 (B,), or where images
        are mixed the classes' weights, float32 (B, classes). Both are on the device.
        """
        pixel_batches = self.pixel_batches(first_step, last_step)
        for step, (pixels, labels) in zip(range(first_step, last_step), pixel_batches, strict=True):
            images = self.preprocessing.to_input(pixels)

            # After normalizing, since the boxes are filled with normal noise
            if self.augmentation.erasing:
                epochs, indices = self.samples(step)
                images = random_erase(
                    images, epochs, indices, self.order.seed, self.augmentation.erasing
                )

            # Last, so that both images of a pair are augmented. Pairs are drawn for the global
            # batch, of which this process's images start at own.start
            if self.augmentation.mixing:
                images, labels = self.augmentation.mixing(images, labels, step, self.own.start or 0)
            yield images, labels

    def waited(self, seconds: float, loader_seconds_before: float) -> float:
        """How much of the time that taking a batch took was waiting for data, in seconds.

        On a CPU all of it, which is what making the batch took. On a GPU the making is only queued,
        behind steps that the host may have to wait for: there it is the wait for the loader.
        """
        if self.machine.device.type == "cpu":
            return seconds
        return self.loader_seconds - loader_seconds_before

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches of the loader, and count how long each is waited for."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.loader_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def samples(self, step: int) -> tuple[Tensor, Tensor]:
        """Return (passes, indices) of this process's samples of a step, int64 on the CPU.

        The pass over the data set seeds a sample's augmentation; see SampleOrder.batch.
        """
        passes, indices = self.order.batch(step)
        return passes[self.own], indices[self.own]

    def pixel_batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Return uint8 images and labels of the steps, on the device.

        The images are cropped, mirrored and changed by the policies.
        """
        if self.train.pixels is None:
            return self.decoded_batches(first_step, last_step)
        return self.batches_in_memory(first_step, last_step)

    def decoded_batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Return the batches of image files, which the loader's processes decode ahead."""
        # A generator, since a long run has many millions of (pass, index) pairs
        items = (
            list(zip(*(numbers.tolist() for numbers in self.samples(step)), strict=True))
            for step in range(first_step, last_step)
        )
        dataset = ImageFileDataset(
            self.train,
            self.preprocessing,
            self.augmentation.image,
            self.order.seed,
            self.augmentation.skip_unreadable,
        )
        return self.timed(decode_batches(dataset, items, self.machine.workers, self.machine.device))

    def batches_in_memory(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield the batches of images that are in memory, or on the GPU."""
        assert self.train.pixels is not None
        device = self.machine.device
        for step in range(first_step, last_step):
            passes, indices = self.samples(step)
            # Without blocking, so that the host can prepare the next step while a GPU computes
            chosen = send(indices, device)
            pixels = self.augmentation.batch(self.train.pixels[chosen], passes, indices)
            yield pixels, self.train_labels[chosen]

    def inputs_of(self, images: ImageSplit, indices: Tensor) -> Batch:
        """Return a few images of a split as one batch on the device, preprocessed as in evaluation.

        indices: int64 (n,). In place of training images that can't be read others are taken, where
        the run skips them. Raises DataError where one can't be read otherwise.
        """
        device = self.machine.device
        if images.pixels is not None:
            pixels = send(images.pixels[indices.to(images.pixels.device)], device)
            return self.preprocessing.to_input(pixels), send(images.labels[indices], device)

        # Not of a subset: what takes another's place, and how many may, is decided by all images
        skip = self.augmentation.skip_unreadable and images is self.data.train
        dataset = ImageFileDataset(images, self.preprocessing, None, self.order.seed, skip)
        items = [[(0, index) for index in indices.tolist()]]
        # Starting processes takes longer than decoding a few images here
        workers = self.machine.workers if len(indices) > 100 else 0
        pixels, labels = next(decode_batches(dataset, items, workers, device))
        return self.preprocessing.to_input(pixels), labels

    def evaluate(
        self,
        model: VisionTransformer,
        images: ImageSplit,
        precision: Precision,
        confusion: Tensor | None = None,
    ) -> dict[str, float]:
        """Measure a model on a split; each process takes a part of the images.

        confusion: where to count predictions, see empty_confusion. Returns what
        vit.evaluation.accuracy.evaluate does, the same in all processes. Raises Stopped, between
        two batches, where a signal came to any of them.
        """
        processes = self.machine.processes
        batches = evaluation_pixels(
            images,
            self.evaluation_batch_size(),
            self.preprocessing,
            self.machine.workers,
            self.machine.device,
            processes.rank,
            processes.count,
        )
        with contextlib.closing(batches), without_compiling():
            return evaluate(
                model,
                self.until_stopped(batches),
                precision,
                confusion,
                processes.sum,
                self.preprocessing.to_input,
                self.memory,
            )

    def evaluation_batch_size(self) -> int:
        """Return how many images this process evaluates at once."""
        # A step's batch split over the processes, and no more than a step computes at once
        size = -(-self.batch_size // self.machine.processes.count)
        return min(size, self.micro_batch_size or size)

    def until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches; raise Stopped where a signal came to any of the processes."""
        for batch in batches:
            # All processes have the same number of batches, so they meet in this collective
            if self.machine.processes.any_of(bool(self.stop)):
                raise Stopped(f"stopped by {self.stop.describe()} in an evaluation")
            yield batch


def on_device_if_it_fits(images: ImageSplit, device: torch.device) -> ImageSplit:
    """The images with their pixels on the device, or as they are where its memory is too small."""
    try:
        return images.to(device)
    except torch.OutOfMemoryError:
        return images


def empty_confusion(num_classes: int, device: torch.device) -> Tensor:
    """Return zero counts for evaluate(): int64 (classes, classes), true class by prediction."""
    return torch.zeros(num_classes, num_classes, dtype=torch.int64, device=wide_device(device))
