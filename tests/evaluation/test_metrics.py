"""The metrics against scikit-learn, SciPy and plain loops."""

import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn import metrics as sk
from sklearn.neighbors import KNeighborsClassifier

from vit.evaluation.metrics import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    confidences,
    fit_temperature,
    likelihood_slope,
    most_confused,
    nearest_neighbors,
    negative_log_likelihood,
    per_class,
    reliability,
)


def sample(
    n: int = 2000, num_classes: int = 7, scale: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from their softmax: calibrated at temperature 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, num_classes, generator=generator) * scale
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def test_the_classes_are_scored_as_by_hand():
    predicted = torch.tensor([0, 0, 1, 3, 3, 3])
    labels = torch.tensor([0, 1, 1, 1, 0, 0])
    metrics = per_class(predicted, labels, 4)
    assert metrics.support.tolist() == [3, 3, 0, 0]
    assert metrics.precision.tolist() == [0.5, 1, 0, 0]
    assert metrics.recall.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0])
    assert metrics.f1.tolist() == pytest.approx([0.4, 0.5, 0, 0])


def test_the_classes_are_scored_as_by_scikit_learn():
    logits, labels = sample()
    labels[labels == 3] = 4  # a class without samples, which is still predicted
    predicted = logits.argmax(1)
    metrics = per_class(predicted, labels, 7)
    expected = sk.precision_recall_fscore_support(
        labels, predicted, labels=range(7), zero_division=0
    )
    for ours, theirs in zip(
        (metrics.precision, metrics.recall, metrics.f1, metrics.support), expected, strict=True
    ):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_likelihood_is_scikit_learns(temperature):
    logits, labels = sample()
    probabilities = (logits.double() / temperature).softmax(1).numpy()
    expected = sk.log_loss(labels, probabilities, labels=range(7))
    loss = negative_log_likelihood(logits, labels, temperature)
    assert loss == pytest.approx(expected, rel=1e-12)


def test_most_confused():
    confusion = torch.tensor([[9, 2, 0], [5, 1, 0], [0, 2, 3]])
    assert most_confused(confusion, 10) == [(1, 0, 5), (0, 1, 2), (2, 1, 2)]
    assert most_confused(confusion, 1) == [(1, 0, 5)]
    assert most_confused(torch.eye(3, dtype=torch.int64), 10) == []
    assert confusion[0, 0] == 9  # left as it was


def test_confidences_of_a_temperature():
    logits, _ = sample(5000)
    probabilities = (logits.double() / 2).softmax(1)
    confidence, predicted = confidences(logits, 2.0)
    assert torch.equal(predicted, logits.argmax(1))
    assert torch.allclose(confidence, probabilities.amax(1), rtol=1e-12)


@pytest.mark.parametrize(("n", "scale", "bins"), [(5000, 2.0, 15), (10, 0.1, 15), (777, 30.0, 4)])
def test_ece_is_that_of_a_plain_loop(n, scale, bins):
    logits, labels = sample(n, 5, scale)
    labels[::3] = 0
    probabilities = logits.double().softmax(1)
    confidence = probabilities.amax(1).tolist()
    correct = (probabilities.argmax(1) == labels).tolist()
    error = 0.0
    for b in range(bins):
        inside = [i for i in range(n) if b / bins < confidence[i] <= (b + 1) / bins]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean_confidence = sum(confidence[i] for i in inside) / len(inside)
            error += len(inside) / n * abs(accuracy - mean_confidence)
    result = reliability(logits, labels, bins)
    assert result.expected_calibration_error() == pytest.approx(error, abs=1e-9)
    assert result.count.sum() == n


@pytest.mark.parametrize("scale", [0.05, 0.5, 1.0, 3.0, 40.0])
def test_the_temperature_is_the_likelihoods_minimum(scale):
    """Calibrated logits times a number need that number as temperature."""
    logits, labels = sample(20000)
    temperature = fit_temperature(logits * scale, labels)
    assert temperature == pytest.approx(scale, rel=0.04)
    slope = likelihood_slope(logits * scale, labels, 1 / temperature)
    assert abs(slope / scale) < 1e-8

    def loss(beta: float) -> float:
        return negative_log_likelihood(logits, labels, 1 / beta)

    assert temperature == pytest.approx(scale / minimize_scalar(loss, (0.5, 1.5)).x, rel=1e-4)


def test_the_slope_is_the_likelihoods_derivative():
    logits, labels = sample()
    step = 1e-4
    upper = negative_log_likelihood(logits, labels, 1 / (0.7 + step))
    lower = negative_log_likelihood(logits, labels, 1 / (0.7 - step))
    slope = likelihood_slope(logits, labels, 0.7)
    assert slope == pytest.approx((upper - lower) / (2 * step), rel=1e-6)


def test_a_temperature_without_minimum_stays_finite():
    logits = torch.eye(4) * 3
    always_right = torch.arange(4)
    always_wrong = torch.tensor([1, 2, 3, 0])
    assert fit_temperature(logits, always_right) == MIN_TEMPERATURE
    assert fit_temperature(logits, always_wrong) == MAX_TEMPERATURE
    assert fit_temperature(torch.zeros(4, 4), always_right) == 1.0


def test_neighbors_are_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(500, 6, generator=generator)
    labels = torch.arange(500) % 4
    features = torch.randn(300, 6, generator=generator)

    def weights(distances):
        return torch.tensor(-distances / 0.07).exp().numpy()

    theirs = KNeighborsClassifier(20, metric="cosine", weights=weights).fit(bank, labels)
    ours = nearest_neighbors(features, bank, labels, 4, k=20, temperature=0.07)
    assert (ours.numpy() == theirs.predict(features)).all()


def test_a_bank_of_one():
    features = torch.ones(1, 6)
    predicted = nearest_neighbors(features, features, torch.tensor([2]), 4, 20, 0.07)
    assert predicted.tolist() == [2]
