"""Loss and accuracy over a data set: the one function that training, the end of a run and evaluate.py use."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.runtime import Precision


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision) -> dict[str, float]:
    """{"n", "loss", "top1", "top5"} over (images, labels) batches; loss is plain cross-entropy, the others are fractions.

    The model is put into evaluation mode and left so. With fewer than five classes top5 is the top `classes`.
    """
    model.eval()
    n = 0
    sums = torch.zeros(3, dtype=torch.float64, device=precision.device)
    for images, labels in batches:
        with precision.autocast():
            logits = model(images)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        losses = F.cross_entropy(logits, labels, reduction="none")
        sums += torch.stack([losses.double().sum(), ranked[:, 0].sum().double(), ranked.sum().double()])
        n += len(labels)
    loss, top1, top5 = (sums / n).tolist()
    return {"n": n, "loss": loss, "top1": top1, "top5": top5}


def interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy measured on n samples (Wilson 1927), as two fractions."""
    z = 1.959964
    centre = accuracy + z * z / (2 * n)
    half = z * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
