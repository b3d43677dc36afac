"""Accuracy in which every class counts alike, from counts that one pass over the images gives."""

import torch
from torch import Tensor


def count_classes(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count the images, the predictions and the hits of every class: int64 (3, classes).

    labels, predicted: int64 (B,). An image with the label -1 is not counted.
    """
    counts = torch.zeros(3, num_classes, dtype=torch.int64, device=labels.device)
    known = labels >= 0
    targets = labels.clamp(min=0)
    # By index_put_, which unlike bincount lets a GPU's host go on
    counts[0].index_put_((targets,), known.long(), accumulate=True)
    counts[1].index_put_((predicted,), known.long(), accumulate=True)
    counts[2].index_put_((targets,), (known & (predicted == labels)).long(), accumulate=True)
    return counts


def class_means(counts: Tensor) -> dict[str, float]:
    """{"balanced_top1", "macro_f1"} of what count_classes counted: fractions.

    They are means over the classes that have images: of their recalls (Brodersen et al. 2010,
    "The balanced accuracy and its posterior distribution"), and of their F1, the harmonic mean of
    precision and recall. Of classes without images neither is defined.
    """
    images, predictions, hits = counts[:, counts[0] > 0].double()
    recall = hits / images
    f1 = 2 * hits / (images + predictions)
    return {"balanced_top1": recall.mean().item(), "macro_f1": f1.mean().item()}
