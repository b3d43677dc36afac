"""Batches that the device's memory can't hold are computed in parts.

For what is computed without gradients, image by image, so that the parts add up to the same result.
A training step knows its micro-batch beforehand, see vit/training/micro_batch.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from vit.errors import ConfigError
from vit.text import first_line

T = TypeVar("T")

# Metal and the CPU raise a plain RuntimeError, which its text alone tells from a bug
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or this machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def free_memory(device: torch.device) -> None:
    """Give back the memory that torch keeps for later tensors, which may be in small pieces."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "mps":
        torch.mps.empty_cache()


@dataclass
class MemoryLimit:
    """How many images a device computes at once: all that it is given, until memory ends.

    Then the number is halved, which `say` is told in a line, and stays so for what comes later.
    at_once: None before memory has ended. items: what they are, for that line. may_split: false
    where all processes must compute batches of the same size, as a sharded model does.
    """

    device: torch.device
    say: Callable[[str], None] = print
    at_once: int | None = None
    items: str = "images"
    may_split: bool = True

    def parts(self, compute: Callable[..., T], *tensors: Tensor) -> Iterator[T]:
        """Yield compute(rows of each tensor) for one part of the rows after another.

        tensors: of as many rows each. A part for which memory ends is computed again, in halves, so
        that compute must change nothing before it is sure to succeed. Raises the error where a
        single row is too much.
        """
        start, count = 0, len(tensors[0])
        while start < count:
            size = min(self.at_once or count, count - start)
            try:
                result = compute(*(tensor[start : start + size] for tensor in tensors))
            except (RuntimeError, MemoryError) as error:
                if not self.can_be_halved(error, size):
                    raise
            else:
                yield result
                start += size
                continue
            # Not above, where the error still holds the tensors of the failed attempt
            self.halve(size)

    def largest(self, compute: Callable[[int], T], size: int) -> T:
        """Return compute(size), or compute of that halved as often as it must be.

        Raises the error where 1 is too much.
        """
        while True:
            size = min(self.at_once or size, size)
            try:
                return compute(size)
            except (RuntimeError, MemoryError) as error:
                if not self.can_be_halved(error, size):
                    raise
            self.halve(size)

    def can_be_halved(self, error: BaseException, size: int) -> bool:
        """Whether fewer than `size` images at once would help against an error."""
        return self.may_split and size > 1 and is_out_of_memory(error)

    def halve(self, size: int) -> None:
        """Note, and say, that `size` images at once were too many."""
        self.at_once = (size + 1) // 2
        free_memory(self.device)
        self.say(
            f"memory ended with {size} {self.items} at once: from here on {self.at_once}; "
            "the result is the same"
        )


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn running out of memory in the block into a ConfigError that ends in the advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"out of memory ({first_line(error)}); {advice}") from None
