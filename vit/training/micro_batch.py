"""How many images a device's memory holds in one forward and backward pass."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vit.runtime.memory import free_memory
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes

Teach = Callable[[Tensor, Precision], object]

# Fraction of the memory that is left alone: for the exchange of gradients, whose buffers grow with
# the first steps, and for what else takes some of the memory later
MARGIN = 0.05


def agree_on_micro_batch_size(
    model: nn.Module,
    image_shape: tuple[int, ...],
    own: int,
    batch_size: int,
    precision: Precision,
    processes: Processes,
    teach: Teach | None = None,
) -> int | None:
    """Return the largest micro-batch that fits into the memory of every process's device.

    image_shape: (C, height, width); own: images of this process in a global batch of batch_size;
    teach: asks a teacher about the images before the model gets them, None without one. Returns
    None where all of them fit at once, in every process. A collective. Raises
    torch.OutOfMemoryError, in all processes, where in one of them not even one image fits.
    """
    # NCCL takes its buffers with the first exchange, which must have been before
    processes.sum(torch.zeros(1, device=precision.device))
    try:
        size = find_micro_batch_size(model, image_shape, own, precision, teach)
    except torch.OutOfMemoryError:
        # The others wait for an answer
        size = 0

    # GPUs differ in what else fills them, and processes by two images in their parts of a batch
    least = processes.least(batch_size if size >= own else size)
    if least == 0:
        raise torch.OutOfMemoryError("not even one image fits into the memory")
    return None if least >= batch_size else least


def find_micro_batch_size(
    model: nn.Module,
    image_shape: tuple[int, ...],
    batch_size: int,
    precision: Precision,
    teach: Teach | None = None,
) -> int:
    """Find how many images fit into the device's memory in one forward and backward pass.

    image_shape: (C, height, width). Returns batch_size, or one of smaller_size(). Raises
    torch.OutOfMemoryError where not even one image fits.
    """
    size = batch_size
    while True:
        try:
            try_pass(model, image_shape, batch_size, size, precision, teach)
            return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        finally:
            # All of it is given back, or the next try would start with less memory
            model.zero_grad()
            free_memory(precision.device)
        size = smaller_size(batch_size, size)


def smaller_size(batch_size: int, size: int) -> int:
    """Return the micro-batch to try after `size` images were too many: half as many, or fewer.

    One that divides the batch where there is such between a quarter and a half, so that no
    micro-batch is smaller than the others: a compiled model has a graph for each shape.
    """
    half = (size + 1) // 2
    least = half // 2 + 1
    divisors = [divisor for divisor in range(least, half + 1) if batch_size % divisor == 0]
    return max(divisors, default=half)


def passes_of_processes(batch_size: int, size: int, count: int) -> list[int]:
    """Return how many passes each of `count` processes makes over its part of a global batch.

    size: of a micro-batch. Parts differ by two images, see Processes.batch_slice.
    """
    slices = (Processes(rank=rank, count=count).batch_slice(batch_size) for rank in range(count))
    return [-(-len(range(batch_size)[own]) // size) for own in slices]


def largest_in_step(batch_size: int, size: int, count: int) -> int | None:
    """Return the largest micro-batch up to `size` that gives all processes equally many passes.

    Those of a sharded model are collectives: a process that makes one more than the others waits
    for them for ever. None where there is no such micro-batch.
    """
    for smaller in range(size, 0, -1):
        if len(set(passes_of_processes(batch_size, smaller, count))) == 1:
            return smaller
    return None


def try_pass(
    model: nn.Module,
    image_shape: tuple[int, ...],
    batch_size: int,
    size: int,
    precision: Precision,
    teach: Teach | None = None,
) -> None:
    """Make a forward and backward pass over `size` images, beside all that training holds.

    Raises torch.OutOfMemoryError where they do not fit.
    """
    device = precision.device
    held = memory_of_training(model, image_shape, batch_size, device)
    # The first images of the batch, as a micro-batch is a part of it
    images = held[0][:size]
    if teach is not None:
        teach(images, precision)
    with precision.autocast():
        logits = model(images)
    # What is held takes part, so that it is alive until the end of the backward pass
    others = torch.stack([tensor.flatten()[:1].sum() for tensor in held])
    (logits.float().sum() + 0 * others.sum()).backward()


def memory_of_training(
    model: nn.Module, image_shape: tuple[int, ...], batch_size: int, device: torch.device
) -> Sequence[Tensor]:
    """Return what a step holds beside the weights, their gradients and the activations.

    That is the batch's images, float32 (B, C, height, width) and first, the pixels of the next
    batch, the optimizer's two moments, and the margin.
    """
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad)
    margin = 0
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        margin = int(MARGIN * total)
    return [
        torch.zeros(batch_size, *image_shape, device=device),
        torch.zeros(batch_size, *image_shape, dtype=torch.uint8, device=device),
        torch.zeros(2 * trained, device=device),
        torch.zeros(margin, dtype=torch.uint8, device=device),
    ]
