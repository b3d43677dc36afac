"""The losses, for labels and for the mixed targets of mixup and CutMix."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def build_loss(name: str, label_smoothing: float, class_weights: Tensor | None = None) -> Loss:
    """Return the function (logits (B, classes), targets) → the sum of the images' losses.

    The sum and not the mean, so that micro-batches of different sizes add up to the global batch.
    targets: labels, int64 (B,), or the classes' weights in mixed images, float (B, classes), rows
    summing to 1.

    cross_entropy: of the softmax. bce: binary cross-entropy, the mean over the classes (Wightman et
    al. 2021, arXiv:2110.00476, section 2.1; DeiT-III). Labels are smoothed as in Szegedy et al.
    2016, arXiv:1512.00567, section 7. Raises ValueError for another name.

    class_weights: float (classes,), or None. An image counts as much as its label's class weighs,
    and a mixed image as much as its classes do, each with its part of the image. The sum stays a
    sum over images: nobody divides it by their weights, so that what an image counts does not
    depend on which others are in its batch. The mean loss stays comparable where the mean weight of
    the training images is 1, see vit.data.class_balance.balanced_weights.
    """
    if name == "cross_entropy" and class_weights is not None:
        return weighted_cross_entropy(label_smoothing, class_weights)
    if name == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing, reduction="sum")
    if name == "bce":
        return binary_cross_entropy(label_smoothing, class_weights)
    raise ValueError(f"train.loss must be cross_entropy or bce, got {name}")


def weighted_cross_entropy(label_smoothing: float, class_weights: Tensor) -> Loss:
    """The cross-entropy with the targets w·y, smoothed afterwards.

    Without smoothing it is torch's cross_entropy(weight=w), of labels and of mixed targets. torch
    weighs what smoothing adds as well: of two classes of 1,000 images and of one, with a smoothing
    of 0.1, the images of the large class would get 98 % of their target for the other one. Here
    smoothing gives every class the same part of an image's weight, whatever the class weighs.
    """

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        num_classes = logits.shape[1]
        weighted = shares_of_classes(logits, targets) * class_weights.to(logits.dtype)
        # An image's weight is the sum of its row
        spread = weighted.sum(dim=1, keepdim=True) / num_classes
        smoothed = weighted * (1 - label_smoothing) + spread * label_smoothing
        return F.cross_entropy(logits, smoothed, reduction="sum")

    return loss


def shares_of_classes(logits: Tensor, targets: Tensor) -> Tensor:
    """Labels as rows of zeros and a one, mixed targets as they are, in the logits' dtype."""
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    return targets.to(logits.dtype)


def binary_cross_entropy(label_smoothing: float, class_weights: Tensor | None) -> Loss:
    """The mean over the classes; class_weights: an image's loss is multiplied by its weight."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        num_classes = logits.shape[1]
        # A mixed image counts as wholly of both its classes, whatever their weights
        present = targets > 0 if targets.ndim == 2 else F.one_hot(targets, num_classes)
        smoothed = present.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / num_classes
        of_images = None
        if class_weights is not None:
            weights = class_weights.to(logits.dtype)
            of_images = (shares_of_classes(logits, targets) @ weights)[:, None]
        # A mean over the classes, as published, and a sum over the images like the other loss
        total = F.binary_cross_entropy_with_logits(logits, smoothed, of_images, reduction="sum")
        return total / num_classes

    return loss
