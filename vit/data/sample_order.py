"""Which samples each training step sees."""

import torch
from torch import Tensor

from vit.data.class_balance import ClassDraws
from vit.randomness import permutation


class SampleOrder:
    """The permutations of one epoch after another, cut into batches.

    A batch may hold the end of one epoch and the start of the next. So every sample is seen equally
    often whatever the batch size, and the step alone tells where the stream stands.

    repeats: times a sample comes in a row, augmented differently each time (Hoffer et al. 2020,
    arXiv:1901.09335). Within a batch its copies stand apart, so that they are not mixed with each
    other.
    draws: which samples an epoch holds, where classes are drawn more or less often than they come
    in the data; None: each sample once.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        repeats: int = 1,
        draws: ClassDraws | None = None,
    ):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.repeats = repeats
        self.draws = draws
        self.cached_epochs: dict[int, tuple[Tensor, Tensor]] = {}

    def epoch_samples(self, epoch: int) -> tuple[Tensor, Tensor]:
        """(rounds, indices) of an epoch's samples in their order, int64 (num_samples,) each.

        A round says for the how-many-th time the sample comes, and is the epoch without `draws`.
        """
        if epoch not in self.cached_epochs:
            # A batch needs two epochs at most
            previous = {e: kept for e, kept in self.cached_epochs.items() if e == epoch - 1}
            order = permutation(self.num_samples, self.seed, "order", epoch)
            if self.draws is None:
                samples = torch.full_like(order, epoch), order
            else:
                rounds, indices = self.draws.epoch(epoch)
                samples = rounds[order], indices[order]
            self.cached_epochs = {**previous, epoch: samples}
        return self.cached_epochs[epoch]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(passes, indices) of the samples of a step, counted from 0; int64 (batch_size,) each.

        A pass is a round or, with repeats, one of the copies of a round's samples: (pass, index)
        names one augmented image of the whole run.
        """
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        # First copies come first in the batch, then second copies, and so on
        positions = positions[torch.argsort(positions % self.repeats, stable=True)]
        copies = positions % self.repeats
        samples = positions // self.repeats
        epochs = samples // self.num_samples
        offsets = samples % self.num_samples

        rounds, indices = torch.empty_like(offsets), torch.empty_like(offsets)
        for epoch in epochs.unique().tolist():
            in_epoch = epochs == epoch
            of_epoch = offsets[in_epoch]
            epoch_rounds, epoch_indices = self.epoch_samples(epoch)
            rounds[in_epoch], indices[in_epoch] = epoch_rounds[of_epoch], epoch_indices[of_epoch]
        return rounds * self.repeats + copies, indices
