"""Loss and accuracy over a data set.

Training, the end of a run, evaluate.py and the other commands all measure with `evaluate`.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.evaluation.class_counts import class_means, count_classes
from vit.runtime.device import to_float64, wide_device
from vit.runtime.memory import MemoryLimit
from vit.runtime.precision import Precision


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Precision,
    confusion: Tensor | None = None,
    over_processes: Callable[[Tensor], Tensor] | None = None,
    prepare: Callable[[Tensor], Tensor] | None = None,
    memory: MemoryLimit | None = None,
    counted: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Measure a model on (images, labels) batches.

    The model is put into evaluation mode and left there. Images with the label -1 are not counted.
    Batches that the memory can't hold are computed in parts; the result does not depend on either,
    up to the rounding of sums.

    confusion: int64 (classes, classes) on any device. Every image of this process is added to it,
        at the row of its true class and the column of the predicted one.
    over_processes: sums a tensor over the processes that share the images; None: there is one.
    prepare: makes the model's input of a batch's images; None: they are that already.
    memory: how many images are computed at once; None: whole batches, until memory ends.
    counted: called once for every forward pass whose images have been counted.

    Returns {"n", "loss", "top1", "top5", "balanced_top1", "macro_f1"}: the number of images, the
    mean cross-entropy in nats and four fractions. With fewer than five classes, top5 counts all of
    them; for the two last see class_means.
    """
    model.eval()
    memory = memory or MemoryLimit(precision.device)

    def measure(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = images if prepare is None else prepare(images)
        with precision.autocast():
            logits = model(inputs)
        return measure_logits(logits, labels)

    # Loss, images, top-1 hits and top-5 hits. They stay on the device until the end, unless it
    # has no float64: then it is waited for after every batch
    sums = torch.zeros(4, dtype=torch.float64, device=wide_device(precision.device))
    # Of every class; how many there are is known from the first batch
    counts: Tensor | None = None
    for images, labels in batches:
        # What is out of memory has not been counted, and is measured again in smaller parts
        parts = memory.parts(measure, images, labels)
        for part_sums, part_counts, targets, predicted in parts:
            sums += part_sums
            counts = part_counts if counts is None else counts + part_counts
            if confusion is not None:
                targets, predicted = targets.to(confusion.device), predicted.to(confusion.device)
                cells = (targets.clamp(min=0), predicted)
                confusion.index_put_(cells, (targets >= 0).long(), accumulate=True)
            if counted is not None:
                counted()
    assert counts is not None, "no batch"
    # The only wait for the device, and for the other processes
    if over_processes is not None:
        sums, counts = over_processes(sums), over_processes(counts)
    loss, n, top1, top5 = sums.tolist()
    fractions = {"top1": top1 / n, "top5": top5 / n, **class_means(counts)}
    return {"n": int(n), "loss": loss / n, **fractions}


def measure_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (sums, counts, labels, predictions) of logits (B, classes) and labels int64 (B,).

    sums: of the images' cross-entropies, the number of images, of top-1 hits and of top-5 hits,
    float64 (4,); counts: see count_classes. All are on wide_device().
    """
    # Ranks and losses in float32, whatever precision the model computed in
    logits = logits.float()
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
    numbers = torch.stack([(labels >= 0).sum(), hits[:, 0].sum(), hits.sum()])
    sums = torch.cat([to_float64(losses).sum()[None], to_float64(numbers)])

    wide = wide_device(logits.device)
    labels, predicted = labels.to(wide), best[:, 0].to(wide)
    return sums, count_classes(labels, predicted, logits.shape[1]), labels, predicted


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy measured on n samples, as two fractions (Wilson 1927)."""
    from scipy.stats import binomtest  # takes half a second to import, which a run's start need not

    # SciPy takes whole successes; `accuracy` is a quotient of such
    hits = round(accuracy * n)
    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
