"""TODO: say what this file is for."""

import torch
from torch import Tensor

from vit.randomness import permutation


class SampleOrder:
    """Which samples each step sees: the epochs' permutations one after another, cut into batches.

    A batch may hold the end of one epoch and the start of the next, so every sample is seen equally often whatever the
    batch size, and the step alone says where the stream stands.
    repeats: a sample comes that often in a row of the stream, each time changed otherwise (Hoffer et al. 2020,
    arXiv:1901.09335); within a batch its copies stand apart, so that they are not mixed with each other.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, repeats: int = 1):
        self.num_samples, self.batch_size, self.seed, self.repeats = (
            num_samples,
            batch_size,
            seed,
            repeats,
        )
        self.cached: dict[int, Tensor] = {}

    def epoch_order(self, epoch: int) -> Tensor:
        if epoch not in self.cached:
            self.cached = {kept: order for kept, order in self.cached.items() if kept == epoch - 1}
            self.cached[epoch] = permutation(self.num_samples, self.seed, "order", epoch)
        return self.cached[epoch]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(passes, indices) of the samples of a step, counted from 0; int64 (batch_size,) each. A pass is an epoch, or with
        repeats one of the copies of an epoch's samples: (pass, index) tells one picture of the whole run."""
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        positions = positions[torch.argsort(positions % self.repeats, stable=True)]
        copies, samples = positions % self.repeats, positions // self.repeats
        epochs, offsets = samples // self.num_samples, samples % self.num_samples
        indices = torch.empty_like(offsets)
        for epoch in epochs.unique().tolist():
            indices[epochs == epoch] = self.epoch_order(epoch)[offsets[epochs == epoch]]
        return epochs * self.repeats + copies, indices
