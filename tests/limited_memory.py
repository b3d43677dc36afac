"""Models that run out of memory where they are given too many images at once."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def memory_of(model: nn.Module, images: int, at_the_end: bool = False) -> Iterator[list[int]]:
    """Within the block, the model's forward pass holds so many images, and raises for more.

    at_the_end: it raises after the forward pass, as where the memory ends with the loss. Yields the
    list of how many images it was given each time.
    """
    sizes: list[int] = []

    def check(*arguments: Any) -> None:
        size = len(arguments[1][0])
        sizes.append(size)
        if size > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    register = model.register_forward_hook if at_the_end else model.register_forward_pre_hook
    handle = register(check)
    try:
        yield sizes
    finally:
        handle.remove()
