"""Which samples each training step sees."""

import torch
from torch import Tensor

from vit.randomness import permutation


class SampleOrder:
    """The permutations of one epoch after another, cut into batches.

    A batch may hold the end of one epoch and the start of the next. So every sample is seen equally
    often whatever the batch size, and the step alone tells where the stream stands.

    repeats: times a sample comes in a row, augmented differently each time (Hoffer et al. 2020,
    arXiv:1901.09335). Within a batch its copies stand apart, so that they are not mixed with each
    other.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, repeats: int = 1):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.repeats = repeats
        self.cached_orders: dict[int, Tensor] = {}  # by epoch

    def epoch_order(self, epoch: int) -> Tensor:
        """The order of an epoch's samples, int64 (num_samples,)."""
        if epoch not in self.cached_orders:
            # A batch needs two epochs at most
            previous = {e: order for e, order in self.cached_orders.items() if e == epoch - 1}
            order = permutation(self.num_samples, self.seed, "order", epoch)
            self.cached_orders = {**previous, epoch: order}
        return self.cached_orders[epoch]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(passes, indices) of the samples of a step, counted from 0; int64 (batch_size,) each.

        A pass is an epoch or, with repeats, one of the copies of an epoch's samples: (pass, index)
        names one augmented image of the whole run.
        """
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        # First copies come first in the batch, then second copies, and so on
        positions = positions[torch.argsort(positions % self.repeats, stable=True)]
        copies = positions % self.repeats
        samples = positions // self.repeats
        epochs = samples // self.num_samples
        offsets = samples % self.num_samples

        indices = torch.empty_like(offsets)
        for epoch in epochs.unique().tolist():
            in_epoch = epochs == epoch
            indices[in_epoch] = self.epoch_order(epoch)[offsets[in_epoch]]
        return epochs * self.repeats + copies, indices
