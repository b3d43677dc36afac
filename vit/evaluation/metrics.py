"""What logits and labels tell: accuracy by class, confusions, calibration, nearest neighbors.

Pure functions. Throughout, `logits` are floats (n, C) and `labels` int64 (n,) from 0 to C - 1,
both on one device, with n at least 1.

Sources: calibration, Guo et al. 2017, "On Calibration of Modern Neural Networks"
(arXiv:1706.04599); nearest neighbors, Wu et al. 2018, "Unsupervised Feature Learning via
Non-Parametric Instance Discrimination" (arXiv:1805.01978), section 3.4.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import root_scalar
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor

# Rows that are copied to float64 or multiplied at a time: bounds the memory that 50,000 x 1,000
# logits take
CHUNK = 4096
NEIGHBOR_CHUNK = 256

# The temperature is searched for between these
MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 100.0
TEMPERATURE_TOLERANCE = 1e-9  # relative


@dataclass(frozen=True)
class PerClass:
    """One number for each class, (C,): float64, and int64 for `support`, its number of samples.

    What is not defined, such as the recall of a class without samples, is 0.
    """

    precision: np.ndarray  # of the samples predicted as the class, the fraction that are
    recall: np.ndarray  # of the samples of the class, the fraction predicted as it
    f1: np.ndarray  # harmonic mean of precision and recall
    support: np.ndarray


def per_class(predicted: Tensor, labels: Tensor, num_classes: int) -> PerClass:
    """Precision, recall, F1 and support of every class from predicted and true classes, (n,)."""
    precision, recall, f1, support = precision_recall_fscore_support(
        labels.cpu().numpy(),
        predicted.cpu().numpy(),
        labels=np.arange(num_classes),
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    return PerClass(np.asarray(precision), np.asarray(recall), np.asarray(f1), np.asarray(support))


def most_confused(confusion: Tensor, count: int) -> list[tuple[int, int, int]]:
    """The pairs of classes that are taken for each other most often.

    confusion: counts, int64 (C, C), rows are the true classes.

    Returns at most `count` tuples (true class, predicted class, images), none with 0 images, the
    most frequent first and equal ones in the order of the classes.
    """
    num_classes = len(confusion)
    # A stable sort, so that the same counts always give the same pairs
    mistakes = confusion.clone().fill_diagonal_(0).flatten()
    cells = mistakes.argsort(descending=True, stable=True)[:count]
    pairs = []
    for cell, images in zip(cells.tolist(), mistakes[cells].tolist(), strict=True):
        if images > 0:
            pairs.append((cell // num_classes, cell % num_classes, images))
    return pairs


def top_of_answers(logits: Tensor, answers: Tensor) -> dict[str, float]:
    """{"top1", "top5"}: fractions of the images with a right class among the first predictions.

    logits: (n, C). answers: bool (n, C), which classes are right (Beyer et al. 2020,
    arXiv:2006.07159, section 3: ReaL accuracy).
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = answers.gather(1, best)
    top1, top5 = hits[:, 0], hits.any(dim=1)
    return {"top1": top1.double().mean().item(), "top5": top5.double().mean().item()}


def chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits as float64 with their labels, some thousand rows at a time."""
    for rows, targets in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
        yield rows.double(), targets


def negative_log_likelihood(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """The mean of -log softmax(logits / temperature) at the labels, in nats."""
    losses = [
        F.cross_entropy(rows / temperature, targets, reduction="sum")
        for rows, targets in chunks(logits, labels)
    ]
    return torch.stack(losses).sum().item() / len(labels)


def confidences(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The probability of the most likely class, float64 (n,), and that class, int64 (n,).

    The probabilities are softmax(logits / temperature).
    """
    probabilities = []
    classes = []
    for rows in logits.split(CHUNK):
        best = (rows.double() / temperature).softmax(dim=1).max(dim=1)
        probabilities.append(best.values)
        classes.append(best.indices)
    return torch.cat(probabilities), torch.cat(classes)


@dataclass(frozen=True)
class Reliability:
    """Samples in B bins of equal width by their confidence, float64 (B,) each.

    Bin b of B, from 1, holds the confidences above (b - 1)/B and up to b/B. `confidence` and
    `accuracy` are means over a bin, 0 where it is empty (Guo et al., section 2).
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    def expected_calibration_error(self) -> float:
        """ECE: |accuracy - confidence| of the bins, weighted by their samples (equation 3)."""
        gaps = (self.accuracy - self.confidence).abs() * self.count
        return gaps.sum().item() / self.count.sum().item()


def reliability(logits: Tensor, labels: Tensor, bins: int, temperature: float = 1.0) -> Reliability:
    """Sort the predictions of softmax(logits / temperature) into bins by their confidence."""
    confidence, predicted = confidences(logits, temperature)
    # Bins are open on the left, so a confidence of exactly b/B belongs to bin b
    bin_of_sample = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(bin_of_sample, minlength=bins).double()

    def bin_means(values: Tensor) -> Tensor:
        sums = torch.bincount(bin_of_sample, values, minlength=bins)
        return sums / count.clamp(min=1)

    correct = (predicted == labels).double()
    return Reliability(count, bin_means(confidence), bin_means(correct))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T with the least loss of softmax(logits / T) (Guo et al., section 4.2).

    The negative log-likelihood is convex in β = 1/T, so its slope has at most one zero. That zero
    is searched for on a logarithmic scale, since T may span decades. Where the loss has no minimum
    between MIN_TEMPERATURE and MAX_TEMPERATURE (all predictions are right, or they are worse than
    chance) the nearer of the two is returned, and 1 where T makes no difference.
    """

    # Cached, since the ends of the interval are asked for again by the search
    @functools.cache
    def slope(log_temperature: float) -> float:
        return likelihood_slope(logits, labels, math.exp(-log_temperature))

    if slope(0.0) == 0:
        return 1.0
    # A slope above 0 at T = 1 asks for a smaller β, that is a higher temperature
    bound = MAX_TEMPERATURE if slope(0.0) > 0 else MIN_TEMPERATURE
    log_bound = math.log(bound)
    if (slope(0.0) > 0) == (slope(log_bound) > 0):
        return bound
    # An absolute tolerance of the logarithm is a relative one of T
    search = root_scalar(
        slope, bracket=(0.0, log_bound), method="brentq", xtol=TEMPERATURE_TOLERANCE
    )
    return math.exp(search.root)


def likelihood_slope(logits: Tensor, labels: Tensor, beta: float) -> float:
    """The derivative by β of the negative log-likelihood of softmax(β · logits).

    It is the mean over the samples of E[z] - z_label, where z are the logits and E is the
    expectation under the softmax.
    """
    total = 0.0
    for rows, targets in chunks(logits, labels):
        # Differences to the label's logit, so that the two terms don't cancel
        z = rows - rows.gather(1, targets[:, None])
        probabilities = (beta * z).softmax(dim=1)
        total += (probabilities * z).sum().item()
    return total / len(labels)


def nearest_neighbors(
    features: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    k: int,
    temperature: float,
) -> Tensor:
    """The class that the k most similar samples of a bank vote for, int64 (n,).

    features: (n, D). bank, bank_labels: (m, D) and (m,); a bank of fewer than k samples votes as a
    whole. A vote has the weight exp(cosine similarity / temperature) (Wu et al., section 3.4).
    Where the sums are equal, the lower class wins.
    """
    bank = F.normalize(bank.float(), dim=1)
    predicted = []
    for rows in F.normalize(features.float(), dim=1).split(NEIGHBOR_CHUNK):
        nearest = (rows @ bank.T).topk(min(k, len(bank)), dim=1)
        # The largest similarity is 1: less 1, no weight overflows
        weights = ((nearest.values - 1) / temperature).exp()
        votes = torch.zeros(len(rows), num_classes, device=rows.device)
        votes.scatter_add_(1, bank_labels[nearest.indices], weights)
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)
