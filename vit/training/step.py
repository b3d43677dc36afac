"""TODO: say what this file is for."""

import torch
from torch import Tensor, nn

from vit.randomness import random_uniform
from vit.runtime.precision import Precision

MIN_LOSS_SCALE = 2.0**-10


def draw_drop_path(
    rate: float, num_layers: int, batch_size: int, seed: int, step: int, schedule: str = "linear"
) -> Tensor | None:
    """The factors of stochastic depth for a global batch, (B, L, 2) on the CPU: 0, or 1 / keep rate; None for a rate of 0.

    schedule linear: the rate of dropping rises from 0 in the first block to `rate` in the last (Huang et al. 2016); constant:
    it is `rate` in every block (Touvron et al. 2022, DeiT-III). The factors depend on the arguments alone, so that a batch in
    parts gets the same as a whole one.
    """
    if not rate:
        return None
    rates = torch.linspace(rate if schedule == "constant" else 0, rate, num_layers)[:, None]
    images, layers = torch.arange(batch_size)[:, None, None], torch.arange(num_layers)[:, None]
    return (random_uniform(seed, "drop path", step, images, layers, torch.arange(2)) >= rates) / (
        1 - rates
    )


def split_or_none(keep: Tensor | None, size: int, like: Tensor) -> list[Tensor | None]:
    """drop path's factors cut into micro-batches on the device of `like`; None for each where there are none."""
    if keep is None:
        return [None] * -(-len(like) // size)
    return list(keep.to(like.device, non_blocking=True).split(size))


def find_micro_batch_size(
    model: nn.Module, image_shape: tuple[int, ...], batch_size: int, precision: Precision
) -> int:
    """How many images of (C, height, width) fit into the device's memory at once, in one forward and backward pass, beside the
    optimizer's state: batch_size, or that halved as often as it must be. Raises torch.OutOfMemoryError where not one fits."""
    held = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    size = batch_size
    while True:
        try:
            moments = torch.zeros(2 * held, device=precision.device)  # what the optimizer will keep
            with precision.autocast():
                logits = model(torch.zeros(size, *image_shape, device=precision.device))
            (logits.float().sum() + 0 * moments[:1].sum()).backward()
            return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = (size + 1) // 2
        finally:
            moments = logits = None
            model.zero_grad()
            if precision.device.type == "cuda":
                torch.cuda.empty_cache()
