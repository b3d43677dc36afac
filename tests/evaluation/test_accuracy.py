"""Loss and accuracy against scikit-learn, and the interval of an accuracy."""

import warnings

import pytest
import torch
from limited_memory import memory_of
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    top_k_accuracy_score,
)
from torch import nn

from vit.evaluation.accuracy import evaluate, wilson_interval
from vit.runtime.memory import MemoryLimit
from vit.runtime.precision import Precision

FP32 = Precision("fp32", torch.device("cpu"))


def random_logits(n: int, num_classes: int) -> torch.Tensor:
    return torch.randn(n, num_classes, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("batch_size", [1003, 100, 7])
def test_metrics_are_scikit_learns_whatever_the_batches(batch_size):
    logits = random_logits(1003, 10)
    labels = torch.arange(1003) % 10
    batches = zip(logits.split(batch_size), labels.split(batch_size), strict=True)
    metrics = evaluate(nn.Identity(), batches, FP32)
    assert metrics["n"] == 1003
    assert metrics["top1"] == accuracy_score(labels, logits.argmax(1))
    assert metrics["top5"] == top_k_accuracy_score(labels, logits, k=5)
    expected = log_loss(labels, logits.double().softmax(1).numpy())
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [300, 7])
def test_means_over_the_classes_are_scikit_learns(batch_size):
    """Of classes of very unequal size; one has no image, and is predicted nevertheless."""
    logits = random_logits(300, 6)
    labels = torch.tensor([0] * 250 + [1] * 40 + [2, 2, 3, 4] + [0] * 6)
    batches = zip(logits.split(batch_size), labels.split(batch_size), strict=True)
    metrics = evaluate(nn.Identity(), batches, FP32)
    predicted = logits.argmax(1)
    assert (predicted == 5).any()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        expected = balanced_accuracy_score(labels, predicted)
    assert metrics["balanced_top1"] == pytest.approx(expected, rel=1e-12)
    expected = f1_score(labels, predicted, labels=range(5), average="macro")
    assert metrics["macro_f1"] == pytest.approx(expected, rel=1e-12)
    assert metrics["balanced_top1"] != pytest.approx(metrics["top1"], abs=0.01)


def test_a_model_that_names_the_largest_class_alone_is_found_out():
    logits = torch.tensor([[1.0, 0.0]]).repeat(7, 1)
    metrics = evaluate(nn.Identity(), [(logits, torch.tensor([0] * 6 + [1]))], FP32)
    assert metrics["top1"] == pytest.approx(6 / 7)
    assert metrics["balanced_top1"] == 0.5
    assert metrics["macro_f1"] == pytest.approx(6 / 13)


def test_fewer_than_five_classes():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    assert evaluate(nn.Identity(), [(logits, torch.tensor([0, 0]))], FP32)["top5"] == 1.0


def test_images_without_a_label_are_not_counted():
    logits = random_logits(20, 6)
    labels = torch.arange(20) % 6
    confusion = torch.zeros(6, 6, dtype=torch.int64)
    padded = torch.cat([labels, torch.tensor([-1, -1])])
    batch = (torch.cat([logits, logits[:2]]), padded)
    metrics = evaluate(nn.Identity(), [batch], FP32, confusion)
    assert metrics == evaluate(nn.Identity(), [(logits, labels)], FP32)
    assert confusion.sum() == 20


def test_dropout_is_off():
    model = nn.Dropout(0.9).train()
    logits = torch.eye(4)
    assert evaluate(model, [(logits, torch.arange(4))], FP32)["top1"] == 1.0
    assert not model.training


@pytest.mark.parametrize("num_classes", [3, 30])
def test_the_confusion_counts_every_image_once(num_classes):
    logits = random_logits(500, num_classes)
    labels = torch.arange(500) % num_classes
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    batches = zip(logits.split(64), labels.split(64), strict=True)
    metrics = evaluate(nn.Identity(), batches, FP32, confusion)
    assert confusion.sum() == metrics["n"] == 500
    assert confusion.trace() / 500 == pytest.approx(metrics["top1"])
    assert confusion.sum(1).tolist() == labels.bincount().tolist()
    predicted = logits.argmax(1).bincount(minlength=num_classes)
    assert confusion.sum(0).tolist() == predicted.tolist()
    whole = evaluate(nn.Identity(), [(logits, labels)], FP32)
    assert metrics == whole | {"loss": metrics["loss"]}


def test_sums_are_added_over_the_processes():
    batch = (torch.eye(4), torch.tensor([0, 1, 2, 0]))
    one = evaluate(nn.Identity(), [batch], FP32)
    two = evaluate(nn.Identity(), [batch], FP32, over_processes=lambda sums: 2 * sums)
    assert two == one | {"n": 8}


@pytest.mark.parametrize("at_the_end", [False, True])
def test_images_are_counted_once_where_memory_ends(at_the_end):
    logits = random_logits(500, 7)
    labels = torch.arange(500) % 7
    confusion, expected = torch.zeros(2, 7, 7, dtype=torch.int64)
    batches = list(zip(logits.split(64), labels.split(64), strict=True))
    whole = evaluate(nn.Identity(), batches, FP32, expected)

    model, lines, passes = nn.Identity(), [], []
    memory = MemoryLimit(FP32.device, lines.append)
    with memory_of(model, 10, at_the_end) as sizes:
        metrics = evaluate(
            model, batches, FP32, confusion, memory=memory, counted=lambda: passes.append(sizes[-1])
        )
    assert metrics == whole | {"loss": pytest.approx(whole["loss"], rel=1e-12)}
    assert torch.equal(confusion, expected)
    assert sizes[:4] == [64, 32, 16, 8]
    assert max(passes) == 8
    assert sum(passes) == 500
    assert len(lines) == 3


def test_the_model_gets_what_is_prepared_and_memory_may_end_there():
    logits = random_logits(40, 6)
    labels = torch.arange(40) % 6
    sizes = []

    def double(images):
        sizes.append(len(images))
        if len(images) > 20:
            raise torch.OutOfMemoryError
        return 2 * images

    memory = MemoryLimit(FP32.device, lambda line: None)
    batches = [(logits, labels)]
    metrics = evaluate(nn.Identity(), batches, FP32, prepare=double, memory=memory)
    expected = evaluate(nn.Identity(), [(2 * logits, labels)], FP32)
    assert metrics == expected | {"loss": pytest.approx(expected["loss"], rel=1e-12)}
    assert sizes == [40, 20, 20]


def test_wilsons_interval():
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = wilson_interval(1.0, 20)
    assert (low, high) == pytest.approx((0.8389, 1.0), abs=1e-4)


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (60, 359), (49_999, 50_000)])
def test_wilsons_interval_is_the_formula(hits, n):
    z, p = 1.959964, hits / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    assert wilson_interval(p, n) == pytest.approx((center - half, center + half), abs=1e-8)
