"""Loss and accuracy over a data set.

Training, the end of a run, evaluate.py and the other commands all measure with `evaluate`.
"""

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
    over_processes: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Measure a model on (images, labels) batches.

    The model is put into evaluation mode and left there. Images with the label -1 are not counted.

    confusion: int64 (classes, classes) on the device. Every image of this process is added to it,
        at the row of its true class and the column of the predicted one.
    over_processes: sums a tensor over the processes that share the images; None: there is one.

    Returns {"n", "loss", "top1", "top5"}: the number of images, the mean cross-entropy in nats and
    two fractions. With fewer than five classes, top5 counts all of them.
    """
    model.eval()
    # Images, loss, top-1 hits and top-5 hits; they stay on the device until the end
    sums = torch.zeros(4, dtype=torch.float64, device=precision.device)
    for images, labels in batches:
        with precision.autocast():
            logits = model(images)
        # Ranks and losses in float32, whatever precision the model computed in
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
        counted = labels >= 0
        sums += torch.stack([counted.sum(), losses.double().sum(), hits[:, 0].sum(), hits.sum()])
        if confusion is not None:
            cells = (labels.clamp(min=0), best[:, 0])
            confusion.index_put_(cells, counted.long(), accumulate=True)
    # The only wait for the device, and for the other processes
    if over_processes is not None:
        sums = over_processes(sums)
    n, loss, top1, top5 = sums.tolist()
    return {"n": int(n), "loss": loss / n, "top1": top1 / n, "top5": top5 / n}


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy measured on n samples, as two fractions (Wilson 1927)."""
    from scipy.stats import binomtest  # takes half a second to import, which a run's start need not

    # SciPy takes whole successes; `accuracy` is a quotient of such
    hits = round(accuracy * n)
    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
