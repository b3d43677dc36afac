"""TODO: say what this file is for."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def build_loss(name: str, label_smoothing: float) -> Loss:
    """(logits (B, classes), targets) → the sum of the images' losses. Targets are labels, int64 (B,), or the classes' shares
    of mixed images, float (B, classes).

    cross_entropy: of the softmax; bce: binary cross-entropy, the mean over the classes, for which a mixed image wholly is of
    both classes (Wightman et al. 2021, arXiv:2110.00476, section 2.1; DeiT-III). Both with smoothed labels (Szegedy et al.
    2016). Raises ValueError for another name.
    """
    if name == "cross_entropy":
        return lambda logits, targets: F.cross_entropy(
            logits, targets, label_smoothing=label_smoothing, reduction="sum"
        )
    if name != "bce":
        raise ValueError(f"train.loss must be cross_entropy or bce, got {name}")

    def bce(logits: Tensor, targets: Tensor) -> Tensor:
        present = targets > 0 if targets.ndim == 2 else F.one_hot(targets, logits.shape[1])
        smoothed = (
            present.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
        )
        return (
            F.binary_cross_entropy_with_logits(logits, smoothed, reduction="sum") / logits.shape[1]
        )

    return bce
