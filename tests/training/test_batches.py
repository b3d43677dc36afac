import os
from pathlib import Path

import pytest
import torch
from helpers import make_images
from limited_memory import memory_of

from benchmarks.emulated_device import emulated_device
from vit.augment.batch import BatchAugmentation
from vit.augment.erasing import random_erase
from vit.augment.mixing import MixupCutmix
from vit.augment.policies import build_policies
from vit.data.datasets import load_data
from vit.data.loader import evaluation_pixels
from vit.data.preprocessing import Preprocessing
from vit.data.sample_order import SampleOrder
from vit.data.training_transform import TrainingTransform
from vit.errors import DataError
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.machine import Machine
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.training.batches import Augmentation, Batches, on_device_if_it_fits

CPU = torch.device("cpu")
RGB = Preprocessing((24, 24), 3, (0.5,), (0.25,), 0.875, "bilinear")


def load(name, root=None):
    return load_data(
        name=name,
        root=None if root is None else str(root),
        val_fraction=0.1,
        test_fraction=0.1,
        limit=None,
        image_size=(24, 24),
        num_channels=3,
        settings={},
        device=CPU,
    )


def make_augmentation(preprocessing, *, erasing=0.0, mixing=None, skip_unreadable=False):
    """Erasing and mixing, and nothing that changes single images."""
    return Augmentation(
        TrainingTransform(preprocessing, None, 0.0),
        BatchAugmentation(0, preprocessing.image_size, 0.0, None, 0.0),
        erasing,
        mixing or MixupCutmix(0, 10, 0.0, 0.0, 1.0),
        skip_unreadable,
    )


def make_batches(data, preprocessing, augmentation, batch_size, workers=0):
    machine = Machine(device=CPU, processes=Processes(), workers=workers, sharded=False)
    order = SampleOrder(len(data.train), batch_size, seed=5)
    return Batches(data, preprocessing, augmentation, order, batch_size, machine, StopSignal())


def test_small_images_are_selected_by_step_and_resized():
    data = load("digits")
    preprocessing = Preprocessing((16, 16), 1, (0.3,), (0.4,), None, "bilinear")
    batches = make_batches(data, preprocessing, make_augmentation(preprocessing), 32)
    ((images, labels),) = batches.training(3, 4)
    indices = batches.order.batch(3)[1]
    assert torch.equal(labels, data.train.labels[indices])
    torch.testing.assert_close(images, preprocessing.to_input(data.train.pixels[indices]))
    assert images.shape == (32, 1, 16, 16)


def test_small_images_are_erased_and_mixed_after_normalizing():
    data = load("digits")
    preprocessing = Preprocessing((8, 8), 1, (0.3,), (0.4,), None, "bilinear")
    mixing = MixupCutmix(0, 10, 0.0, 1.0, 1.0)
    augmentation = make_augmentation(preprocessing, erasing=0.7, mixing=mixing)
    batches = make_batches(data, preprocessing, augmentation, 32)
    ((mixed, targets),) = batches.training(3, 4)
    epochs, indices = batches.order.batch(3)
    inputs = preprocessing.to_input(data.train.pixels[indices])
    erased = random_erase(inputs, epochs, indices, batches.order.seed, 0.7)
    expected, expected_targets = mixing(erased, data.train.labels[indices], 3)
    assert torch.equal(mixed, expected)
    assert torch.equal(targets, expected_targets)
    assert targets.shape == (32, 10)


def test_any_number_of_workers_gives_the_same_batches(tmp_path):
    data = load("folder", make_images(tmp_path, {"train": 12}))
    augmentation = Augmentation(
        TrainingTransform(RGB, [0.2, 1.0], 0.5, build_policies("randaugment", 2, 9, 0.3)),
        BatchAugmentation(5, (24, 24), 0.0, None, 0.0),
        0.5,
        MixupCutmix(5, 2, 0.8, 1.0, 0.9),
    )

    def run(workers, first_step):
        return list(make_batches(data, RGB, augmentation, 8, workers).training(first_step, 4))

    expected = run(0, 0)
    assert expected[0][0].shape == (8, 3, 24, 24)
    for workers, first_step in ((1, 0), (2, 0), (1, 2)):
        batches = run(workers, first_step)
        for batch, known in zip(batches, expected[first_step:], strict=True):
            assert torch.equal(batch[0], known[0])
            assert torch.equal(batch[1], known[1])


@pytest.mark.parametrize("skip", [False, True])
def test_unreadable_images_are_skipped_where_that_is_asked_for(tmp_path, skip):
    data = load("folder", make_images(tmp_path, {"train": 12}))
    augmentation = make_augmentation(RGB, skip_unreadable=skip)
    batches = make_batches(data, RGB, augmentation, len(data.train))
    bad = int(batches.order.batch(0)[1][3])
    path = os.fsdecode(data.train.paths[bad])
    Path(path).write_bytes(b"\xff\xd8 no more")
    if skip:
        ((_, labels),) = batches.training(0, 1)
        assert labels[3] == data.train.labels[(bad + 1) % len(data.train)]
    else:
        with pytest.raises(DataError, match=path):
            list(batches.training(0, 1))


def test_a_few_training_images_are_skipped_like_those_of_a_batch(tmp_path):
    """As train.whiten_patches and TensorBoard take them; others must all be readable."""
    data = load("folder", make_images(tmp_path, {"train": 12}))
    indices = torch.tensor([2, 5, 7])
    path = os.fsdecode(data.train.paths[5])
    Path(path).write_bytes(b"\xff\xd8 no more")
    for skip in (True, False):
        batches = make_batches(data, RGB, make_augmentation(RGB, skip_unreadable=skip), 4)
        if skip:
            images, labels = batches.inputs_of(data.train, indices)
            expected, _ = batches.inputs_of(data.train, torch.tensor([2, 6, 7]))
            assert torch.equal(images, expected)
            assert torch.equal(labels, data.train.labels[[2, 6, 7]])
            others = data.train.subset(indices)
        else:
            others = data.train
        with pytest.raises(DataError, match=path):
            batches.inputs_of(others, torch.arange(len(others)))


def test_a_few_images_in_memory_are_those_of_an_evaluation():
    data = load("digits")
    gray = Preprocessing((8, 8), 1, (0.3,), (0.4,), None, "bilinear")
    batches = make_batches(data, gray, make_augmentation(gray), 64)
    images, labels = batches.inputs_of(data.val, torch.tensor([3, 1]))
    assert torch.equal(images, gray.to_input(data.val.pixels[[3, 1]]))
    assert torch.equal(labels, data.val.labels[[3, 1]])


def test_evaluations_keep_to_the_micro_batch_and_to_the_memory(log_lines):
    data = load("digits")
    gray = Preprocessing((8, 8), 1, (0.3,), (0.4,), None, "bilinear")
    batches = make_batches(data, gray, make_augmentation(gray), 64)
    model = VisionTransformer(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_classes=10,
    )

    def evaluate(images):
        with memory_of(model, images) as sizes:
            metrics = batches.evaluate(model, data.test, Precision("fp32", CPU))
        return metrics, sizes

    expected, sizes = evaluate(64)
    assert sizes == [64, 64, len(data.test) - 128]
    batches.micro_batch_size = 16
    metrics, sizes = evaluate(64)
    assert max(sizes) == 16
    assert metrics == expected | {"loss": pytest.approx(expected["loss"], rel=1e-6)}
    assert not log_lines

    batches.micro_batch_size = 200
    metrics, sizes = evaluate(20)
    assert sizes[:4] == [64, 32, 16, 16]
    assert metrics == expected | {"loss": pytest.approx(expected["loss"], rel=1e-6)}
    assert [line.partition(":")[0] for line in log_lines] == [
        "memory ended with 64 images at once",
        "memory ended with 32 images at once",
    ]


def test_small_images_of_training_and_validation_are_on_the_device():
    with emulated_device("cuda") as emulated:
        data = load("digits")
        gray = Preprocessing((8, 8), 1, (0.3,), (0.4,), None, "bilinear")
        device = torch.device("cuda", 0)
        machine = Machine(device=device, processes=Processes(), workers=0, sharded=False)
        order = SampleOrder(len(data.train), 64, seed=5)
        batches = Batches(data, gray, make_augmentation(gray), order, 64, machine, StopSignal())
        assert emulated.holds(batches.data.val.pixels)
        assert not emulated.holds(batches.data.test.pixels)
        list(batches.training(0, 1))
        emulated.waits.clear()
        images, labels = next(batches.training(1, 2))
        assert emulated.holds(images)
        assert emulated.holds(labels)
        pixels = evaluation_pixels(batches.data.val, 64, gray, 0, device)
        assert all(emulated.holds(tensor) for batch in pixels for tensor in batch)
        assert not emulated.waits


def test_validation_images_that_do_not_fit_stay_where_they_are():
    class Full:
        def to(self, device):
            raise torch.OutOfMemoryError("planted")

    full = Full()
    assert on_device_if_it_fits(full, CPU) is full


def test_sharded_models_are_not_evaluated_in_parts():
    data = load("digits")
    gray = Preprocessing((8, 8), 1, (0.3,), (0.4,), None, "bilinear")
    machine = Machine(device=CPU, processes=Processes(), workers=0, sharded=True)
    order = SampleOrder(len(data.train), 64, seed=5)
    batches = Batches(data, gray, make_augmentation(gray), order, 64, machine, StopSignal())
    assert not batches.memory.may_split
