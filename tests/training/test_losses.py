"""The losses against their formulas, for labels and for mixed targets."""

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

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


WEIGHTS = torch.tensor([0.25, 0.5, 2.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "mixed"])
def test_weighted_cross_entropy_is_torchs(targets, logits):
    expected = cross_entropy(
        logits, targets.to(logits) if targets is MIXED else targets, WEIGHTS, reduction="sum"
    )
    loss = build_loss("cross_entropy", 0.0, WEIGHTS)
    torch.testing.assert_close(loss(logits, targets), expected)


@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "mixed"])
def test_smoothing_spreads_an_images_weight_evenly(targets, logits):
    weighted = weights_of(targets) * WEIGHTS
    smoothed = weighted * 0.9 + weighted.sum(1, keepdim=True) * 0.1 / CLASSES
    expected = -(smoothed * logits.log_softmax(1)).sum()
    torch.testing.assert_close(build_loss("cross_entropy", 0.1, WEIGHTS)(logits, targets), expected)
    # Of labels that is each image's smoothed loss, times its weight
    if targets is LABELS:
        each = cross_entropy(logits, LABELS, label_smoothing=0.1, reduction="none")
        torch.testing.assert_close((each * WEIGHTS[LABELS]).sum(), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "mixed"])
def test_weighted_binary_cross_entropy_weighs_images(targets, smoothing, logits):
    plain = build_loss("bce", smoothing)
    each = [plain(logits[row : row + 1], targets[row : row + 1]) for row in range(6)]
    expected = (torch.stack(each) * (weights_of(targets) * WEIGHTS).sum(1)).sum()
    loss = build_loss("bce", smoothing, WEIGHTS)
    torch.testing.assert_close(loss(logits, targets), expected)


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "mixed"])
def test_equal_weights_change_nothing(name, targets, logits):
    weighted = build_loss(name, 0.1, torch.ones(CLASSES))
    torch.testing.assert_close(weighted(logits, targets), build_loss(name, 0.1)(logits, targets))


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"train\.loss .*hinge"):
        build_loss("hinge", 0.0)
