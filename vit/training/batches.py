"""The batches of a run: of every training step, and of every evaluation."""

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vit.augment.batch import BatchAugmentation
from vit.augment.erasing import random_erase
from vit.augment.mixing import MixupCutmix
from vit.data.loader import ImageFileDataset, decode_batches, evaluation_batches
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.splits import ImageDataset, ImageSplit
from vit.data.training_transform import TrainingTransform
from vit.errors import Stopped
from vit.evaluation.accuracy import evaluate
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.machine import Machine
from vit.runtime.precision import Precision
from vit.runtime.signals import StopSignal

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Augmentation:
    """All random changes of training.

    image: of image files, in the workers; batch: of small images in memory, a batch at a time;
    erasing: probability of random erasing, of both; mixing: of both; skip_unreadable: take another
    image for a file that can't be read.
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
    """

    data: ImageDataset
    preprocessing: Preprocessing
    augmentation: Augmentation
    order: SampleOrder
    batch_size: int
    machine: Machine
    stop: StopSignal

    def __post_init__(self) -> None:
        self.train = self.data.train.to(self.machine.device)

    @property
    def has_validation(self) -> bool:
        return self.data.val is not None

    @property
    def own(self) -> slice:
        """This process's samples of every global batch."""
        return self.machine.processes.batch_slice(self.batch_size)

    def training(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """This process's part of the batches of steps first_step to last_step - 1, on the device.

        Images are float32 (B, C, *image_size); labels int64 (B,), or where images are mixed the
        classes' weights, float32 (B, classes).
        """
        pixel_batches = self.pixel_batches(first_step, last_step)
        for step, (pixels, labels) in zip(range(first_step, last_step), pixel_batches, strict=True):
            images = self.preprocessing.to_input(pixels)
            if self.augmentation.erasing:
                epochs, indices = self.samples(step)
                images = random_erase(
                    images, epochs, indices, self.order.seed, self.augmentation.erasing
                )
            if self.augmentation.mixing:
                images, labels = self.augmentation.mixing(images, labels, step, self.own.start or 0)
            yield images, labels

    def samples(self, step: int) -> tuple[Tensor, Tensor]:
        """(passes, indices) of this process's samples of a step, int64 on the CPU; see
        SampleOrder.batch.
        """
        passes, indices = self.order.batch(step)
        return passes[self.own], indices[self.own]

    def pixel_batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """uint8 images and labels of the steps, on the device, cropped, mirrored and changed by the
        policies.
        """
        if self.train.pixels is None:
            return self.decoded_batches(first_step, last_step)
        return self.batches_in_memory(first_step, last_step)

    def decoded_batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Of image files, from the loader's processes."""
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
        return decode_batches(dataset, items, self.machine.workers, self.machine.device)

    def batches_in_memory(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Of images that stand in memory, on the device."""
        assert self.train.pixels is not None
        device = self.machine.device
        for step in range(first_step, last_step):
            passes, indices = self.samples(step)
            pixels = self.train.pixels[indices.to(device, non_blocking=True)]
            labels = self.train.labels[indices].to(device, non_blocking=True)
            yield self.augmentation.batch(pixels, passes, indices), labels

    def inputs_of(self, images: ImageSplit) -> Batch:
        """A small split as one batch, as evaluation sees it, on the device."""
        device = self.machine.device
        workers = self.machine.workers if len(images) > 100 else 0
        batches = evaluation_batches(images, len(images), self.preprocessing, workers, device)
        with contextlib.closing(batches):
            return next(batches)

    def evaluate(
        self,
        model: VisionTransformer,
        images: ImageSplit,
        precision: Precision,
        confusion: Tensor | None = None,
    ) -> dict[str, float]:
        """vit.evaluation.accuracy.evaluate of a model on a split, shared by all processes.

        Raises Stopped, between two batches, where a signal came to any of the processes.
        """
        processes = self.machine.processes
        batches = evaluation_batches(
            images,
            -(-self.batch_size // processes.count),
            self.preprocessing,
            self.machine.workers,
            self.machine.device,
            processes.rank,
            processes.count,
        )
        with contextlib.closing(batches):
            return evaluate(model, self.until_stopped(batches), precision, confusion, processes.sum)

    def until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.machine.processes.any_of(bool(self.stop))[0]:
                raise Stopped(f"stopped by {self.stop.describe()} in an evaluation")
            yield batch


def empty_confusion(num_classes: int, device: torch.device) -> Tensor:
    """Counts for evaluate(): int64 (classes, classes) of zeros."""
    return torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
