"""How many images are computed at once, where the memory decides."""

from unittest import mock

import pytest
import torch
from small_training import CPU, FP32

from vit.runtime.processes import Processes
from vit.training import micro_batch
from vit.training.micro_batch import (
    MARGIN,
    agree_on_micro_batch_size,
    find_micro_batch_size,
    largest_in_step,
    memory_of_training,
    passes_of_processes,
    smaller_size,
)

SHAPE = (1, 2, 2)


class LimitedMemory(torch.nn.Linear):
    """Has memory for so many images."""

    def __init__(self, limit):
        super().__init__(4, 2)
        self.limit = limit
        self.tried = []

    def forward(self, images):
        self.tried.append(len(images))
        if len(images) > self.limit:
            raise torch.OutOfMemoryError
        return super().forward(images.flatten(1))


@pytest.mark.parametrize(("limit", "size"), [(1, 1), (12, 10), (60, 50), (100, 100), (500, 100)])
def test_the_micro_batch_is_halved_until_it_fits(limit, size):
    model = LimitedMemory(limit)
    assert find_micro_batch_size(model, SHAPE, 100, FP32) == size
    assert model.weight.grad is None


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [
        (1024, [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]),
        (100, [50, 25, 10, 5, 2, 1]),
        (96, [48, 24, 12, 6, 3, 2, 1]),
        # No number between divides it: one micro-batch of the step is smaller
        (98, [49, 14, 7, 4, 2, 1]),
        (62, [31, 16, 8, 4, 2, 1]),
        (1, [1]),
    ],
)
def test_sizes_divide_the_batch_where_that_costs_no_half(batch_size, sizes):
    model = LimitedMemory(1)
    find_micro_batch_size(model, SHAPE, batch_size, FP32)
    assert model.tried == ([] if batch_size == 1 else [batch_size]) + sizes
    for size in range(2, batch_size + 1):
        assert size / 4 < smaller_size(batch_size, size) <= (size + 1) / 2


def test_a_teacher_needs_memory_too():
    """It may hold fewer images at once than the student, and is asked before."""
    model, teacher = LimitedMemory(60), LimitedMemory(12)

    def teach(images, precision):
        return teacher(images)

    assert find_micro_batch_size(model, SHAPE, 100, FP32, teach) == 10
    assert teacher.tried == [100, 50, 25, 10]
    assert model.tried == [10]


def test_not_even_one_image_fits():
    with pytest.raises(torch.OutOfMemoryError):
        find_micro_batch_size(LimitedMemory(0), SHAPE, 8, FP32)
    with pytest.raises(torch.OutOfMemoryError, match="not even one image"):
        agree_on_micro_batch_size(LimitedMemory(0), SHAPE, 8, 8, FP32, Processes())


def test_beside_the_pass_lies_what_training_holds():
    """The whole batch and the next one's pixels, whatever the micro-batch, moments and a margin."""
    held = []

    def noting(*arguments):
        held.append(memory_of_training(*arguments))
        return held[-1]

    with mock.patch.object(micro_batch, "memory_of_training", noting):
        assert find_micro_batch_size(LimitedMemory(4), SHAPE, 8, FP32) == 4
    for tensors in held:
        images, pixels, moments, margin = tensors
        assert images.shape == pixels.shape == (8, *SHAPE)
        assert images.dtype == moments.dtype == torch.float32
        assert pixels.dtype == torch.uint8
        assert len(moments) == 2 * (8 + 2)
        assert margin.numel() == 0  # the CPU's memory is the system's


def test_a_gpu_keeps_a_part_of_its_memory(monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (10**5, 10**6))
    monkeypatch.setattr("torch.zeros", lambda *size, device, **options: zeros(*size, **options))
    model = LimitedMemory(4)
    *_, margin = memory_of_training(model, SHAPE, 8, torch.device("cuda"))
    assert margin.nbytes == MARGIN * 10**6 == 0.05 * 10**6
    *_, margin = memory_of_training(model, SHAPE, 8, CPU)
    assert margin.nbytes == 0


def test_parts_that_differ_by_two_images_may_make_another_pass():
    assert passes_of_processes(66, 32, 2) == [1, 2]
    assert passes_of_processes(66, 34, 2) == [1, 1]
    assert passes_of_processes(64, 32, 2) == [1, 1]
    assert set(passes_of_processes(1024, 57, 6)) == {3, 4}


@pytest.mark.parametrize(
    ("batch_size", "size", "count", "expected"),
    [
        (64, 32, 2, 32),
        # 32 and 34 images: two passes of at most 31, three of 12 and more
        (66, 32, 2, 31),
        (66, 16, 2, 15),
        (1024, 57, 6, 56),
        # 32 and 34 single images, or 16 and 17 pairs
        (66, 2, 2, None),
    ],
)
def test_a_micro_batch_that_keeps_processes_in_step(batch_size, size, count, expected):
    assert largest_in_step(batch_size, size, count) == expected
