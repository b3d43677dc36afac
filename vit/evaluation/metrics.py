"""What can be told of logits and labels: accuracy by class, confusion, calibration, nearest neighbours. Pure functions.

Everywhere: logits float (n, C), labels int64 (n,) in 0..C-1, both of one device, n at least 1.

Sources: calibration, Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv:1706.04599); nearest neighbours,
Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv:1805.01978), section 3.4.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 4096  # rows at a time where float64 copies or products are made, so that 50,000 × 1,000 logits need little memory


MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0


def top_k(logits: Tensor, labels: Tensor, k: int) -> float:
    """The share of samples whose label is among the k largest logits (or all C, where there are fewer)."""
    ranked = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (ranked == labels[:, None]).any(dim=1).double().mean().item()


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts, int64 (C, C): rows are the true classes, columns the predicted ones."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).reshape(
        classes, classes
    )


@dataclass(frozen=True)
class PerClass:
    """One number a class, float64 (C,); support, int64 (C,), counts its samples. Of what is not defined, such as the recall
    of a class without samples, the value is 0, as scikit-learn's with zero_division=0."""

    precision: Tensor  # of the samples predicted as it, the share that are
    recall: Tensor  # of its samples, the share predicted as it
    f1: Tensor  # 2 · precision · recall / (precision + recall)
    support: Tensor

    def macro_f1(self) -> float:
        """The mean F1 of the classes that have samples, each counted alike."""
        return self.f1[self.support > 0].mean().item()


def per_class(confusion: Tensor) -> PerClass:
    """Of a confusion_matrix."""
    right, support, predicted = (
        confusion.diagonal().double(),
        confusion.sum(dim=1),
        confusion.sum(dim=0),
    )
    return PerClass(
        precision=right / predicted.clamp(min=1),
        recall=right / support.clamp(min=1),
        f1=2 * right / (support + predicted).clamp(min=1),
        support=support,
    )


def most_confused(confusion: Tensor, count: int) -> list[tuple[int, int, int]]:
    """The `count` largest counts off the diagonal as (true class, predicted class, count), none of them 0; ties by class."""
    wrong = confusion.clone()
    wrong.fill_diagonal_(0)
    found = wrong.flatten().sort(descending=True, stable=True)
    classes = len(confusion)
    return [
        (place // classes, place % classes, number)
        for number, place in zip(
            found.values[:count].tolist(), found.indices[:count].tolist(), strict=True
        )
        if number
    ]


def negative_log_likelihood(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """The mean of -log softmax(logits / temperature) at the labels, in nats; summed in float64."""
    losses = [
        F.cross_entropy(rows.double() / temperature, true, reduction="sum")
        for rows, true in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True)
    ]
    return torch.stack(losses).sum().item() / len(labels)


def confidences(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(the probability of the most likely class, float64 (n,); that class, int64 (n,)); logits are divided by temperature."""
    found = [
        (rows.double() / temperature).softmax(dim=1).max(dim=1) for rows in logits.split(CHUNK)
    ]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


@dataclass(frozen=True)
class Reliability:
    """Samples in bins of equal width by their confidence, the b-th of B from (b - 1)/B, not included, to b/B; float64 (B,)
    each. confidence, accuracy: the bins' means, 0 where a bin is empty (Guo et al., section 2)."""

    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    def expected_calibration_error(self) -> float:
        """ECE, the mean over the samples of their bins' |accuracy - confidence| (Guo et al., equation 3)."""
        return (
            (self.accuracy - self.confidence).abs() * self.count
        ).sum().item() / self.count.sum().item()


def reliability(
    logits: Tensor, labels: Tensor, bins: int = 15, temperature: float = 1.0
) -> Reliability:
    chance, predicted = confidences(logits, temperature)
    place = (chance * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(place, minlength=bins).double()
    confidence, right = (
        torch.bincount(place, weights, minlength=bins) / count.clamp(min=1)
        for weights in (chance, (predicted == labels).double())
    )
    return Reliability(count, confidence, right)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T whose softmax(logits / T) has the least negative log-likelihood (Guo et al., section 4.2).

    The likelihood is convex in β = 1/T, so Newton's steps find its one minimum; each is kept inside the interval the minimum
    is known to lie in. Where there is none (all predictions right, or worse than guessing) a finite one within 0.01..100, at
    which the likelihood hardly changes any more.
    """
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    beta = 1.0
    for _ in range(60):
        slope, curvature = likelihood_slope(logits, labels, beta)
        low, high = (low, beta) if slope > 0 else (beta, high)
        newton = beta - slope / curvature if curvature > 0 else math.nan
        # Where Newton's step leaves the interval the geometric middle is taken: T spans four decades
        following = newton if low <= newton <= high else (low * high) ** 0.5
        if slope == 0 or abs(following - beta) < 1e-10 * beta:
            break
        beta = following
    return 1 / beta


def likelihood_slope(logits: Tensor, labels: Tensor, beta: float) -> tuple[float, float]:
    """First and second derivative by β of the negative log-likelihood of softmax(β logits): the means over the samples of
    E[z] - z_label and of Var[z], z the logits, under the softmax."""
    slope = curvature = 0.0
    for rows, true in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
        z = rows.double()
        z = z - z.gather(1, true[:, None])
        p = (beta * z).softmax(dim=1)
        mean = (p * z).sum(dim=1, keepdim=True)
        slope += mean.sum().item()
        curvature += (p * (z - mean).square()).sum().item()
    return slope / len(labels), curvature / len(labels)


def nearest_neighbours(
    features: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """The class that the k most similar samples of a bank vote for, int64 (n,).

    features (n, D), bank (m, D) and its labels (m,). A vote weighs exp(cosine / temperature) (Wu et al.); of equal sums the
    lower class wins, and a bank of fewer than k votes whole.
    """
    bank = F.normalize(bank.float(), dim=1)
    found = []
    for rows in F.normalize(features.float(), dim=1).split(256):
        near = (rows @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(
            1, bank_labels[near.indices], ((near.values - 1) / temperature).exp()
        )  # - 1: no overflow
        found.append(votes.argmax(dim=1))
    return torch.cat(found)
