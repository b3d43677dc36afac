"""The losses, for labels and for the mixed targets of mixup and CutMix."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def build_loss(name: str, label_smoothing: float) -> Loss:
    """Return the function (logits (B, classes), targets) → the sum of the images' losses.

    The sum and not the mean, so that micro-batches of different sizes add up to the global batch.
    targets: labels, int64 (B,), or the classes' weights in mixed images, float (B, classes), rows
    summing to 1.

    cross_entropy: of the softmax. bce: binary cross-entropy, the mean over the classes (Wightman et
    al. 2021, arXiv:2110.00476, section 2.1; DeiT-III). Labels are smoothed as in Szegedy et al.
    2016, arXiv:1512.00567, section 7. Raises ValueError for another name.
    """
    if name == "cross_entropy":
        return cross_entropy(label_smoothing)
    if name == "bce":
        return binary_cross_entropy(label_smoothing)
    raise ValueError(f"train.loss must be cross_entropy or bce, got {name}")


def cross_entropy(label_smoothing: float) -> Loss:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="sum")

    return loss


def binary_cross_entropy(label_smoothing: float) -> Loss:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        num_classes = logits.shape[1]
        # A mixed image counts as wholly of both its classes, whatever their weights
        present = targets > 0 if targets.ndim == 2 else F.one_hot(targets, num_classes)
        smoothed = present.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / num_classes
        # A mean over the classes, as published, and a sum over the images like the other loss
        total = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="sum")
        return total / num_classes

    return loss
