"""TODO: say what this file is for."""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from vit.augment.batch import BatchAugmentation
from vit.augment.erasing import random_erase
from vit.augment.image import TrainingTransform
from vit.augment.mixing import MixupCutmix
from vit.data.loader import ImageFileDataset, decode_batches
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.splits import ImageSplit


@dataclass(frozen=True)
class Augmentation:
    """All random changes of training: of pictures from files in the workers, of small images by the batch, and of both as
    normalised batches on the device; erasing: its probability; skip: unreadable pictures are replaced by others."""

    picture: TrainingTransform
    batch: BatchAugmentation
    erasing: float
    mixing: MixupCutmix
    skip: bool = False


def training_batches(
    images: ImageSplit,
    order: SampleOrder,
    first_step: int,
    last_step: int,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    workers: int,
    device: torch.device,
    part: slice = slice(None),
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """The batches of steps first_step to last_step - 1, on the device: float32 (B, C, *image_size), and labels int64 (B,), or
    where images are mixed the classes' shares, float32 (B, classes). part: of every global batch only these samples, the same
    as in the whole; its start must be even, since neighbours are mixed."""
    pictures = None
    if images.pixels is None:
        items = (
            list(zip(*(numbers[part].tolist() for numbers in order.batch(step)), strict=True))
            for step in range(first_step, last_step)
        )
        dataset = ImageFileDataset(
            images, preprocessing, augmentation.picture, order.seed, augmentation.skip
        )
        pictures = decode_batches(dataset, items, workers, device)
    for step in range(first_step, last_step):
        epochs, indices = (numbers[part] for numbers in order.batch(step))
        if pictures is not None:
            pixels, labels = next(pictures)
        else:
            assert images.pixels is not None
            pixels = augmentation.batch(
                images.pixels[indices.to(device, non_blocking=True)], epochs, indices
            )
            labels = images.labels[indices].to(device, non_blocking=True)
        inputs = preprocessing.to_input(pixels)
        if augmentation.erasing:
            inputs = random_erase(inputs, epochs, indices, order.seed, augmentation.erasing)
        yield (
            augmentation.mixing(inputs, labels, step, part.start or 0)
            if augmentation.mixing
            else (inputs, labels)
        )
