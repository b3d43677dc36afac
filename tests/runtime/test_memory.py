"""Where memory ends, batches are halved and nothing is computed twice."""

import pytest
import torch

from vit.errors import ConfigError
from vit.runtime.memory import MemoryLimit, is_out_of_memory, memory_errors

CPU = torch.device("cpu")
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1 GB)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
    ),
    MemoryError("Unable to allocate 1.00 TiB for an array"),
]
BUGS = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")]


class Limited:
    """Doubles numbers, at most `capacity` of them at once."""

    def __init__(self, capacity, error=OUT_OF_MEMORY[0]):
        self.capacity = capacity
        self.error = error
        self.sizes = []

    def __call__(self, numbers, *others):
        self.sizes.append(len(numbers))
        if len(numbers) > self.capacity:
            raise self.error
        return 2 * numbers


def doubled(memory, compute, count):
    return torch.cat(list(memory.parts(compute, torch.arange(count), torch.arange(count))))


@pytest.mark.parametrize("count", [1, 7, 16, 100])
@pytest.mark.parametrize("capacity", [1, 2, 5, 16, 1000])
def test_every_row_is_computed_once_and_in_order(count, capacity):
    lines = []
    memory = MemoryLimit(CPU, lines.append)
    compute = Limited(capacity)
    assert doubled(memory, compute, count).tolist() == list(range(0, 2 * count, 2))
    assert sum(size for size in compute.sizes if size <= capacity) == count
    failed = [size for size in compute.sizes if size > capacity]
    assert len(lines) == len(failed)
    for line, size in zip(lines, failed, strict=True):
        assert f"with {size} images" in line
        assert f"{(size + 1) // 2};" in line


def test_what_did_not_fit_once_is_not_tried_again():
    memory = MemoryLimit(CPU, lambda line: None)
    compute = Limited(3)
    doubled(memory, compute, 8)
    doubled(memory, compute, 8)
    assert compute.sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert memory.largest(lambda size: size, 100) == 2


def test_the_largest_size_that_fits():
    memory = MemoryLimit(CPU, lambda line: None)
    compute = Limited(5)
    assert memory.largest(lambda size: len(compute(torch.arange(size))), 33) == 5
    assert compute.sizes == [33, 17, 9, 5]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_known_in_all_its_forms(error):
    assert is_out_of_memory(error)
    memory = MemoryLimit(CPU, lambda line: None)
    assert len(doubled(memory, Limited(4, error), 9)) == 9
    with (
        pytest.raises(ConfigError, match=r"^out of memory \(.*\); buy more$"),
        memory_errors("buy more"),
    ):
        raise error


@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
def test_a_bug_stays_what_it_is(error):
    assert not is_out_of_memory(error)
    compute = Limited(4, error)
    for work in (
        lambda: doubled(MemoryLimit(CPU), compute, 9),
        lambda: MemoryLimit(CPU).largest(lambda size: compute(torch.arange(size)), 9),
    ):
        compute.sizes.clear()
        with pytest.raises(type(error)), memory_errors("buy more"):
            work()
        assert compute.sizes == [9]


def test_one_row_that_does_not_fit_is_an_error():
    for work in (
        lambda memory, compute: doubled(memory, compute, 4),
        lambda memory, compute: memory.largest(lambda size: compute(torch.arange(size)), 4),
    ):
        compute = Limited(0)
        with pytest.raises(torch.OutOfMemoryError):
            work(MemoryLimit(CPU, lambda line: None), compute)
        assert compute.sizes == [4, 2, 1]


def test_batches_that_all_processes_compute_together_are_not_split():
    compute = Limited(4)
    with pytest.raises(torch.OutOfMemoryError):
        doubled(MemoryLimit(CPU, may_split=False), compute, 9)
    assert compute.sizes == [9]
