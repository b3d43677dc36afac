"""Classes of unequal size: their weights are scikit-learn's, and each is drawn as asked."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from vit.data.class_balance import (
    ClassDraws,
    are_equal,
    are_unbalanced,
    balanced_weights,
    class_sizes,
    describe_sizes,
    epoch_shares,
    largest_share,
)
from vit.data.sample_order import SampleOrder
from vit.randomness import permutation

SIZES = (60, 12, 3)
LABELS = torch.arange(3).repeat_interleave(torch.tensor(SIZES))[
    torch.randperm(75, generator=torch.Generator().manual_seed(1))
]


def counts_of(draws: ClassDraws, epochs: int) -> torch.Tensor:
    """How often each image is drawn in so many epochs, (n,)."""
    indices = torch.cat([draws.epoch(epoch)[1] for epoch in range(epochs)])
    return indices.bincount(minlength=draws.num_samples)


def of_class(label: int) -> torch.Tensor:
    return LABELS.eq(label).nonzero()[:, 0]


def test_the_weights_are_scikit_learns():
    weights = balanced_weights(class_sizes(LABELS, 3))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS.numpy())
    assert weights.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert weights[LABELS].mean().item() == pytest.approx(1)


def test_a_class_without_images_has_a_finite_weight_and_counts_for_no_other():
    sizes = torch.tensor([0, 60, 12, 0, 3])
    weights = balanced_weights(sizes)
    assert weights[[0, 3]].tolist() == [0, 0]
    assert weights[[1, 2, 4]].tolist() == balanced_weights(torch.tensor(SIZES)).tolist()
    assert balanced_weights(sizes, 0.5).isfinite().all()


@pytest.mark.parametrize("balance", [0.3, 0.5, 1.0])
def test_weights_make_up_for_what_balance_leaves(balance):
    weights = balanced_weights(torch.tensor(SIZES), balance)
    drawn = torch.tensor(SIZES, dtype=torch.float64) ** (1 - balance)
    per_class = weights * drawn
    assert per_class.tolist() == pytest.approx([per_class[0].item()] * 3)
    assert (per_class.sum() / drawn.sum()).item() == pytest.approx(1)


@pytest.mark.parametrize("balance", [0.25, 0.5, 1.0])
def test_every_class_has_its_share_of_every_epoch(balance):
    draws = ClassDraws(LABELS, balance, seed=3)
    expected = np.array(SIZES) ** (1.0 - balance)
    expected *= 75 / expected.sum()
    total = np.zeros(3)
    for epoch in range(20):
        rounds, indices = draws.epoch(epoch)
        assert len(rounds) == len(indices) == 75
        total += LABELS[indices].bincount(minlength=3).numpy()
        # The sums over the epochs stay within one image of the exact shares
        assert np.abs(total - (epoch + 1) * expected).max() < 1


@pytest.mark.parametrize("balance", [0.25, 1.0])
def test_no_image_comes_again_before_all_others_of_its_class(balance):
    draws = ClassDraws(LABELS, balance, seed=3)
    for epochs in (1, 2, 7):
        counts = counts_of(draws, epochs)
        for label in range(3):
            repeats = counts[of_class(label)]
            assert repeats.max() - repeats.min() <= 1
    # Over a few epochs the largest class, drawn less often, is seen as a whole
    assert (counts[of_class(0)] > 0).all()


def test_a_round_and_an_index_come_once_in_the_whole_run():
    draws = ClassDraws(LABELS, 0.8, seed=3)
    pairs = [pair for epoch in range(8) for pair in zip(*draws.epoch(epoch), strict=True)]
    assert len({(int(number), int(index)) for number, index in pairs}) == 8 * 75


def test_an_epoch_is_known_without_those_before_it():
    whole = [ClassDraws(LABELS, 0.5, seed=3).epoch(epoch)[1] for epoch in range(4)]
    assert torch.equal(ClassDraws(LABELS, 0.5, seed=3).epoch(3)[1], whole[3])
    assert not torch.equal(ClassDraws(LABELS, 0.5, seed=4).epoch(3)[1], whole[3])


def test_the_order_is_the_same_on_every_machine():
    """Written down once: decimal arithmetic gives the shares, whatever the processor's powers."""
    assert epoch_shares(torch.tensor([9, 4, 0, 9]), 0.5)[:3] == [3 * 10**30, 2 * 10**30, 0]
    assert epoch_shares(torch.tensor([7, 3, 1]), 1) == [10**30] * 3
    assert epoch_shares(torch.tensor([60]), 0.3)[0] == pytest.approx(60**0.7 * 1e30, rel=1e-14)
    order = SampleOrder(75, 10, seed=3, draws=ClassDraws(LABELS, 0.5, seed=3))
    passes, indices = order.batch(11)
    assert passes.tolist() == [2, 1, 0, 1, 1, 3, 1, 2, 2, 0]
    assert indices.tolist() == [73, 46, 22, 3, 38, 27, 4, 33, 49, 8]


def test_batches_of_a_balanced_order_hold_the_epochs_draws():
    draws = ClassDraws(LABELS, 1.0, seed=3)
    order = SampleOrder(75, 10, seed=3, repeats=2, draws=draws)
    batches = [order.batch(step) for step in range(15)]
    passes, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    drawn = draws.epoch(0)[1].repeat(2)
    assert torch.equal(indices.sort().values, drawn.sort().values)
    # No augmented image comes twice, although images do
    assert len(set(zip(passes.tolist(), indices.tolist(), strict=True))) == 150
    assert len(order.cached_epochs) <= 2


def test_without_draws_the_order_is_one_permutation_an_epoch():
    plain = SampleOrder(75, 10, seed=3)
    rounds, indices = plain.epoch_samples(2)
    assert torch.equal(indices, permutation(75, 3, "order", 2))
    assert rounds.unique().tolist() == [2]


def test_sizes_are_told_and_compared():
    names = ["owl", "cat", "dog"]
    text = "1,200 cat, 12 owl, and no image of 1 more"
    assert describe_sizes(torch.tensor([12, 1200, 0]), names) == text
    many = torch.tensor([5, 900, 7, 6, 5])
    assert describe_sizes(many, list("abcde")) == "from 900 b to 5 e of 5 classes"
    assert are_unbalanced(many)
    assert not are_unbalanced(torch.tensor([3, 9, 0]))
    assert not are_unbalanced(torch.tensor([0, 0]))
    assert are_equal(torch.tensor([4, 0, 4]))
    assert not are_equal(torch.tensor([4, 5]))
    assert largest_share(torch.tensor([1, 1, 0, 1])) == (1, 0.75)
