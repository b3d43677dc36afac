import torch

from vit.randomness import (
    _mix,
    more_bits,
    permutation,
    random_bits,
    random_seed,
    random_uniform,
    to_uniform,
)


def test_mixing_is_splitmix64():
    """The first outputs of the published generator for the seeds 0 and 1."""
    outputs = _mix(torch.tensor([0, 1]))
    assert [value % 2**64 for value in outputs.tolist()] == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]


def test_numbers_depend_on_their_counters_alone():
    together = random_uniform(7, "crop", torch.arange(100)[:, None], torch.arange(3))
    assert together.shape == (100, 3)
    part = random_uniform(7, "crop", torch.arange(40, 60)[:, None], torch.arange(3))
    assert torch.equal(together[40:60], part)
    assert torch.equal(together[5, 2], random_uniform(7, "crop", 5, 2))
    for other in (
        random_uniform(8, "crop", 5, 2),
        random_uniform(7, "flip", 5, 2),
        random_uniform(7, "crop", 2, 5),
    ):
        assert together[5, 2] != other


def test_counters_can_be_mixed_in_one_after_another():
    first, second = torch.arange(5)[:, None], torch.arange(3)
    expected = random_uniform(7, "crop", first, second, 4)
    assert torch.equal(to_uniform(more_bits(random_bits(7, "crop", first), second, 4)), expected)
    assert not torch.equal(
        to_uniform(more_bits(random_bits(7, "crop", 4), second, first)), expected
    )


def test_numbers_are_uniform_and_uncorrelated():
    numbers = random_uniform(0, "test", torch.arange(20000)[:, None], torch.arange(2))
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    histogram = torch.histc(numbers, 10, 0, 1)
    assert (histogram / 4000 - 1).abs().max() < 0.06
    assert torch.corrcoef(numbers.T)[0, 1].abs() < 0.03
    neighbors = torch.stack([numbers[:-1, 0], numbers[1:, 0]])
    assert torch.corrcoef(neighbors)[0, 1].abs() < 0.03
    assert len(random_bits(0, "test", torch.arange(20000)).unique()) == 20000


def test_seeds_fit_every_generator():
    seeds = [random_seed(-5, "x", i) for i in range(100)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == 100


def test_a_permutation_holds_every_number_and_repeats():
    order = permutation(1000, 3, "order", 2)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(order, permutation(1000, 3, "order", 2))
    assert not torch.equal(order, permutation(1000, 3, "order", 3))
