"""What each of several processes does: together it is what one process would do."""

from collections.abc import Callable

import pytest
import torch
from helpers import make_images

from vit.augment.batch import BatchAugmentation
from vit.augment.mixing import MixupCutmix
from vit.augment.policies import build_policies
from vit.data.datasets import load_data
from vit.data.loader import evaluation_batches, evaluation_pixels
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.splits import ImageDataset
from vit.data.training_transform import TrainingTransform
from vit.evaluation.accuracy import evaluate
from vit.runtime.machine import Machine
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.training.batches import Augmentation, Batches

CPU = torch.device("cpu")
SEED = 5


def load(name: str, root: str | None, size: int, channels: int) -> ImageDataset:
    return load_data(
        name=name,
        root=root,
        val_fraction=0.1,
        test_fraction=0.2,
        limit=None,
        image_size=(size, size),
        num_channels=channels,
        settings={},
        device=CPU,
    )


def make_batches(data: ImageDataset, channels: int, processes: Processes) -> Batches:
    """Batches of ten, cropped, mirrored, erased, mixed, and in color changed by policies."""
    size = (16, 16)
    preprocessing = Preprocessing(size, channels, (0.5,), (0.25,), 0.875, "bilinear")
    policies = build_policies("randaugment", 2, 9, 0.3) if channels == 3 else []
    augmentation = Augmentation(
        image=TrainingTransform(preprocessing, [0.2, 1.0], 0.5, policies),
        batch=BatchAugmentation(SEED, size, 0.0, [0.2, 1.0], 0.5, policies),
        erasing=0.5,
        mixing=MixupCutmix(SEED, len(data.classes), 0.8, 1.0, 0.9),
    )
    return Batches(
        data=data,
        preprocessing=preprocessing,
        augmentation=augmentation,
        order=SampleOrder(len(data.train), 10, SEED),
        batch_size=10,
        machine=Machine(device=CPU, processes=processes, workers=0, sharded=False),
        stop=StopSignal(),
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch_size", [10, 11, 64])
def test_every_sample_belongs_to_one_process_and_pairs_stay_together(count, batch_size):
    slices = [Processes(rank, count).batch_slice(batch_size) for rank in range(count)]
    parts = [range(batch_size)[own] for own in slices]
    assert [sample for part in parts for sample in part] == list(range(batch_size))
    assert all(part.start % 2 == 0 and len(part) > 0 for part in parts)


@pytest.mark.parametrize("name", ["digits", "folder"])
@pytest.mark.parametrize("count", [2, 4])
def test_the_parts_of_a_batch_are_the_batch(tmp_path, name, count):
    from_files = name == "folder"
    root = str(make_images(tmp_path, {"train": 12})) if from_files else None
    channels = 3 if from_files else 1
    data = load(name, root, 16, channels)

    def stream(rank: int, processes: int):
        return make_batches(data, channels, Processes(rank, processes)).training(0, 3)

    parts = [stream(rank, count) for rank in range(count)]
    for whole, *batch_parts in zip(stream(0, 1), *parts, strict=True):
        for kind in (0, 1):  # images, labels
            assert torch.equal(torch.cat([part[kind] for part in batch_parts]), whole[kind])


@pytest.mark.parametrize(("n", "count"), [(23, 2), (23, 4), (3, 4), (24, 4)])
def test_evaluation_counts_every_image_once(n, count):
    """Also where the images do not divide evenly, or some process has none."""
    images = load("digits", None, 8, 1).test.subset(torch.arange(n))
    preprocessing = Preprocessing((8, 8), 1, (0.3,), (0.4,), None, "bilinear")
    precision = Precision("fp32", CPU)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    whole = evaluation_batches(images, 5, preprocessing, 0, CPU)
    expected = evaluate(model, whole, precision)
    assert expected["n"] == n

    # What each process would add up over all of them
    parts: list[list[torch.Tensor]] = []
    batches_of: list[list] = []
    for rank in range(count):
        parts.append([])
        pixels = evaluation_pixels(images, 5, preprocessing, 0, CPU, rank, count)
        batches_of.append([(preprocessing.to_input(part), labels) for part, labels in pixels])
        evaluate(model, batches_of[rank], precision, over_processes=noting(parts[rank]))

    # Otherwise some would wait for the others forever
    lengths = [[len(labels) for _, labels in batches] for batches in batches_of]
    assert all(length == lengths[0] for length in lengths)
    sums = [torch.stack(tensors).sum(0) for tensors in zip(*parts, strict=True)]
    for batches in batches_of:
        replies = iter(sums)
        metrics = evaluate(
            model, batches, precision, over_processes=lambda own, replies=replies: next(replies)
        )
        assert metrics == pytest.approx(expected)


def noting(tensors: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Stands in for the sum over the processes: notes what this process would add."""

    def note(own: torch.Tensor) -> torch.Tensor:
        tensors.append(own.clone())
        return own.clamp(min=1)  # this process alone may have counted no image

    return note
