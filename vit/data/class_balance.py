"""Classes of unequal size: whether they are, how they are described, weighted, and drawn.

Throughout, `sizes` are the images of every class of the training split, int64 (classes,). A class
without any image is neither drawn nor weighted.
"""

from collections.abc import Sequence
from decimal import Context, Decimal

import torch
from torch import Tensor

from vit.randomness import permutation

# Beyond this ratio of the largest class to the smallest, a run says so
NOTABLE_RATIO = 3
# Classes that are all named; of more, the largest and the smallest
NAMED_CLASSES = 4
# Decimal digits of the classes' shares of an epoch
DIGITS = 30


def class_sizes(labels: Tensor, num_classes: int) -> Tensor:
    """The images of every class, int64 (num_classes,)."""
    return torch.bincount(labels, minlength=num_classes)


def are_equal(sizes: Tensor) -> bool:
    """Whether all classes that have images have equally many."""
    return len(sizes[sizes > 0].unique()) <= 1


def are_unbalanced(sizes: Tensor) -> bool:
    """Whether the largest class has more than NOTABLE_RATIO times the images of the smallest."""
    present = sizes[sizes > 0]
    return len(present) > 0 and bool(present.max() > NOTABLE_RATIO * present.min())


def describe_sizes(sizes: Tensor, classes: Sequence[str]) -> str:
    """The sizes in words: "48 big, 9 small", and of many classes the largest and the smallest."""
    order = sizes.argsort(descending=True, stable=True).tolist()
    named = [f"{sizes[label]:,} {classes[label]}" for label in order if sizes[label] > 0]
    missing = len(classes) - len(named)
    if len(named) > NAMED_CLASSES:
        text = f"from {named[0]} to {named[-1]} of {len(named):,} classes"
    else:
        text = ", ".join(named)
    return f"{text}, and no image of {missing:,} more" if missing else text


def largest_share(labels: Tensor) -> tuple[int, float]:
    """(the most frequent class, its fraction of the images): what always naming it would get."""
    counts = torch.bincount(labels)
    label = int(counts.argmax())
    return label, counts[label].item() / len(labels)


def epoch_shares(sizes: Tensor, balance: float) -> list[int]:
    """How often each class is drawn, relative to the others: n^(1 - balance) for n images.

    Whole numbers by decimal arithmetic, which unlike a machine's floating-point powers gives the
    same digits everywhere, so that the order of the samples is the same too.

    Source: Kang et al. 2020, arXiv:1910.09217, equation 1, with q = 1 - balance.
    """
    context = Context(prec=DIGITS)
    exponent = 1 - Decimal(str(balance))
    powers: dict[int, int] = {0: 0}
    for size in sizes.unique().tolist():
        if size > 0:
            power = context.power(Decimal(size), exponent)
            powers[size] = int(power.scaleb(DIGITS, context))
    return [powers[size] for size in sizes.tolist()]


def balanced_weights(sizes: Tensor, balance: float = 0.0) -> Tensor:
    """The weight of every class in the loss, float64 (classes,): N / (K·n), as in scikit-learn.

    n is how many images of the class an epoch of N images draws, with data.balance=0 those that
    there are, and K the number of classes that have any. So the mean weight of the images drawn is
    1. A class without images has the weight 0.

    Source: King & Zeng 2001, "Logistic Regression in Rare Events Data".
    """
    drawn = [float(share) for share in epoch_shares(sizes, balance)]
    shares = torch.tensor(drawn, dtype=torch.float64)
    present = shares > 0
    weights = torch.zeros_like(shares)
    weights[present] = shares.sum() / (present.sum() * shares[present])
    return weights


class ClassDraws:
    """The samples of each epoch, of which every class has its share.

    A class is an endless stream of permutations of its images. An epoch takes the next of each
    stream, as many as the class's share of an epoch, whole numbers whose sums over the epochs stay
    within one image of the exact shares. So no image of a class comes again, within an epoch or
    over the run, before all others of the class have come. Where an epoch starts in the streams is
    computed, not stored.

    labels: int64 (n,); balance: see epoch_shares.
    """

    def __init__(self, labels: Tensor, balance: float, seed: int):
        self.num_samples, self.seed = len(labels), seed
        sizes = torch.bincount(labels)
        self.shares = epoch_shares(sizes, balance)
        # The images of each class, in the order of the data set
        self.members = torch.argsort(labels, stable=True).split(sizes.tolist())

    def drawn_before(self, epoch: int) -> list[int]:
        """How many samples of each class all epochs before this one have drawn together.

        By the largest remainders (Hamilton's method), so that they sum to the epochs' samples.
        """
        total, whole = epoch * self.num_samples, sum(self.shares)
        drawn = [total * share // whole for share in self.shares]
        remainders = [total * share % whole for share in self.shares]
        # A stable sort: of equal remainders the first class's is the larger
        by_remainder = sorted(range(len(drawn)), key=lambda label: -remainders[label])
        for label in by_remainder[: total - sum(drawn)]:
            drawn[label] += 1
        return drawn

    def epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """(rounds, indices) of an epoch's samples, class after class; int64 (n,) each.

        A round counts the permutations of a class: (round, index) comes once in the whole run.
        """
        starts, ends = self.drawn_before(epoch), self.drawn_before(epoch + 1)
        rounds, indices = [], []
        for label, members in enumerate(self.members):
            positions = torch.arange(starts[label], ends[label])
            if len(positions) == 0:
                continue
            rounds.append(positions // len(members))
            indices.append(members[self.stream(label, starts[label], ends[label])])
        return torch.cat(rounds), torch.cat(indices)

    def stream(self, label: int, start: int, end: int) -> Tensor:
        """Positions `start` to `end` - 1 of a class's stream, as places among its images."""
        size = len(self.members[label])
        first, last = start // size, (end - 1) // size
        whole = [
            permutation(size, self.seed, "order of a class", label, number)
            for number in range(first, last + 1)
        ]
        return torch.cat(whole)[start - first * size : end - first * size]
