import pytest
import torch

from vit.data.sample_order import SampleOrder


def whole_stream(num_epochs):
    """The samples of the first epochs, whatever the batch size."""
    order = SampleOrder(100, 1, seed=1)
    return torch.cat([order.epoch_samples(epoch)[1] for epoch in range(num_epochs)])


@pytest.mark.parametrize("batch_size", [7, 10, 32, 100])
def test_every_epoch_sees_every_sample_once_whatever_the_batch(batch_size):
    order = SampleOrder(100, batch_size, seed=1)
    batches = [order.batch(step) for step in range(300 // batch_size)]
    epochs, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    first = indices[epochs == 0]
    assert torch.equal(first.sort().values, torch.arange(100))
    assert torch.equal(indices, whole_stream(3)[: len(indices)])
    assert not torch.equal(first, indices[epochs == 1][:100])


def test_a_batch_is_known_without_those_before_it():
    late = SampleOrder(100, 7, seed=1).batch(40)[1]
    assert torch.equal(late, whole_stream(4)[40 * 7 : 41 * 7])
    assert not torch.equal(late, SampleOrder(100, 7, seed=2).batch(40)[1])


def test_repeated_samples_come_in_a_row_but_apart_in_the_batch():
    order = SampleOrder(100, 32, seed=1, repeats=3)
    batches = [order.batch(step) for step in range(30)]
    passes, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    # No augmented image of the run comes twice
    assert len(set(zip(passes.tolist(), indices.tolist(), strict=True))) == 960
    for step, (_, in_batch) in enumerate(batches):
        assert len(in_batch.unique()) <= 32 / 3 + 2
        assert (in_batch[::2] != in_batch[1::2]).all(), step
    assert set(indices[:96].tolist()) == set(whole_stream(1)[:32].tolist())


def test_two_epochs_are_kept_at_most():
    order = SampleOrder(10, 5, seed=0)
    for step in range(20):
        order.batch(step)
    assert len(order.cached_epochs) <= 2
