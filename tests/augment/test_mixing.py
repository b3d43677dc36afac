import pytest
import torch

from vit.augment.mixing import MixupCutmix


def own_fraction(images, mixed):
    """The fraction of each mixed image's pixels that are its own, for images of one value each."""
    return (mixed == images).float().mean((1, 2, 3))


@pytest.mark.parametrize("count", [8, 9])
def test_cutmix_weighs_labels_by_their_pixels(count):
    images = torch.arange(1.0, count + 1)[:, None, None, None].expand(-1, 3, 32, 24)
    labels = torch.arange(count)
    partner = [number ^ 1 if (number ^ 1) < count else number for number in range(count)]
    for step in range(20):
        mixed, targets = MixupCutmix(0, count, 0.0, 1.0, 1.0)(images, labels, step)
        torch.testing.assert_close(targets.sum(1), torch.ones(count))
        torch.testing.assert_close(targets[labels, labels], own_fraction(images, mixed))
        for number, image in enumerate(mixed):
            assert set(image.unique().tolist()) <= {number + 1, partner[number] + 1}


def test_mixup_blends_images_as_their_labels():
    images = torch.rand(64, 3, 8, 8)
    labels = torch.arange(64) % 5
    mixed, targets = MixupCutmix(3, 5, 0.8, 0.0, 1.0)(images, labels, 7)
    for number in range(64):
        own, other = labels[number], labels[number ^ 1]
        if own == other:
            assert targets[number, own] == pytest.approx(1.0)
            continue
        weight = targets[number, own]
        blended = weight * images[number] + (1 - weight) * images[number ^ 1]
        torch.testing.assert_close(mixed[number], blended)
        assert targets[number, other] == pytest.approx(float(1 - weight), abs=1e-6)


def pairs_of_zeros_and_ones():
    images = torch.arange(2.0)[:, None, None, None].expand(2, 1, 16, 16).repeat(4000, 1, 1, 1)
    return images, torch.arange(2).repeat(4000)


def test_weights_follow_the_beta_distribution():
    images, labels = pairs_of_zeros_and_ones()
    _, targets = MixupCutmix(0, 2, 0.4, 0.0, 1.0)(images, labels, 0)
    weights = targets[torch.arange(8000), labels][::2].double()
    assert weights.mean() == pytest.approx(0.5, abs=0.02)
    assert weights.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.05)  # of Beta(α, α)


def test_mixup_and_cutmix_are_equally_frequent():
    images, labels = pairs_of_zeros_and_ones()
    mixed, targets = MixupCutmix(0, 2, 1.0, 1.0, 0.5)(images, labels, 0)
    is_untouched = (mixed == images).flatten(1).all(1) & (targets.max(1).values == 1)
    is_cut = ~is_untouched & ((mixed == 0) | (mixed == 1)).flatten(1).all(1)
    assert is_untouched.float().mean() == pytest.approx(0.5, abs=0.03)
    assert is_cut.float().mean() == pytest.approx(0.25, abs=0.03)


def test_mixing_depends_on_the_step_and_the_position_alone():
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8)
    mixing = MixupCutmix(1, 8, 0.8, 1.0, 0.9)
    whole = mixing(images, labels, 5)
    assert torch.equal(mixing(images, labels, 5)[0], whole[0])
    first_half = mixing(images[:4], labels[:4], 5)
    second_half = mixing(images[4:], labels[4:], 5, first=4)
    for kind in (0, 1):
        assert torch.equal(first_half[kind], whole[kind][:4])
        assert torch.equal(second_half[kind], whole[kind][4:])
    assert not torch.equal(mixing(images, labels, 6)[1], whole[1])


def test_mixing_is_false_where_nothing_is_mixed():
    assert MixupCutmix(1, 8, 0.8, 0.0, 1.0)
    assert MixupCutmix(1, 8, 0.0, 1.0, 1.0)
    assert not MixupCutmix(1, 8, 0.0, 0.0, 1.0)
    assert not MixupCutmix(1, 8, 0.8, 1.0, 0.0)
