"""The losses against their formulas, for labels and for mixed targets."""

import pytest
import torch
from torch.nn.functional import one_hot

from vit.training.losses import build_loss

CLASSES = 4
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
MIXED = one_hot(LABELS, CLASSES) * 0.6 + one_hot(LABELS.roll(1), CLASSES) * 0.4


def weights_of(targets):
    """The weight of every class: that of the label is 1."""
    return one_hot(targets, CLASSES) if targets.ndim == 1 else targets


@pytest.fixture
def logits():
    return torch.randn(6, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "mixed"])
def test_cross_entropy(targets, smoothing, logits):
    smoothed = weights_of(targets) * (1 - smoothing) + smoothing / CLASSES
    expected = -(smoothed * logits.log_softmax(1)).sum()
    loss = build_loss("cross_entropy", smoothing)
    torch.testing.assert_close(loss(logits, targets), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "mixed"])
def test_binary_cross_entropy_takes_both_classes_of_a_mixed_image_wholly(
    targets, smoothing, logits
):
    smoothed = (weights_of(targets) > 0) * (1 - smoothing) + smoothing / CLASSES
    probabilities = logits.sigmoid()
    logarithms = smoothed * probabilities.log() + (1 - smoothed) * (1 - probabilities).log()
    expected = -logarithms.mean(1).sum()
    loss = build_loss("bce", smoothing)
    torch.testing.assert_close(loss(logits, targets), expected)


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"train\.loss .*hinge"):
        build_loss("hinge", 0.0)
