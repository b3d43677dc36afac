"""Loss and accuracy over a data set: the one function that training, the end of a run and evaluate.py use."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.runtime.precision import Precision


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    confusion: Tensor | None = None,
    over_processes: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """{"n", "loss", "top1", "top5"} over (images, labels) batches; loss is plain cross-entropy, the others are fractions.

    The model is put into evaluation mode and left so. With fewer than five classes top5 is the top `classes`. Images labelled
    -1 are not counted. confusion: int64 (classes, classes) on the device, to which every image of this process is added at its
    true class (row) and the one it is taken for. over_processes: adds up a tensor over the processes that share the images.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=precision.device)
    for images, labels in batches:
        with precision.autocast():
            logits = model(images)
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        ranked = best == labels[:, None]
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
        sums += torch.stack(
            [(labels >= 0).sum(), losses.double().sum(), ranked[:, 0].sum(), ranked.sum()]
        )
        if confusion is not None:
            places = (labels.clamp(min=0), best[:, 0])
            confusion.index_put_(places, (labels >= 0).long(), accumulate=True)
    n, loss, top1, top5 = over_processes(sums).tolist()
    return {"n": int(n), "loss": loss / n, "top1": top1 / n, "top5": top5 / n}


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy measured on n samples (Wilson 1927), as two fractions."""
    z = 1.959964
    centre = accuracy + z * z / (2 * n)
    half = z * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
