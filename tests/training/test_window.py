"""The steps since the last log: their means, and what a resumed run has of them."""

import json
import math

import pytest
import torch

from benchmarks.emulated_device import emulated_device
from vit.errors import TrainingFailed
from vit.training.window import StepWindow, require_finite


def filled(*rows, images=16):
    window = StepWindow()
    for row in rows:
        window.add(torch.tensor(row), images)
    return window


def test_means():
    means = filled((1.0, 8.0, 0.5), (2.0, 12.0, 1.5)).means(step=7)
    assert (means.loss, means.top1, means.grad_norm) == (1.5, 20 / 32, 1.0)


def test_mixed_images_have_no_accuracy():
    means = filled((1.0, math.nan, 0.5)).means(step=1)
    assert math.isnan(means.top1)
    assert means.loss == 1.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_with_its_step(loss):
    window = filled((1.0, 8.0, 0.5), (loss, 8.0, 0.5), (1.0, 8.0, 0.5))
    with pytest.raises(TrainingFailed, match=rf"{loss} at step 9"):
        window.means(step=10)
    with pytest.raises(TrainingFailed, match=rf"{loss} at step 3"):
        require_finite(loss, 3)
    require_finite(1.0, 3)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_with_its_step(norm):
    """The loss of the step was that of the weights before it."""
    window = filled((1.0, 8.0, 0.5), (1.0, math.nan, norm), (1.0, 8.0, 0.5))
    with pytest.raises(TrainingFailed, match=rf"norm of the gradient is {norm} at step 9"):
        window.means(step=10)


def test_a_window_survives_json_to_the_bit():
    window = filled((0.1, 3.0, 1 / 3), (math.pi, math.nan, 1e-8))
    again = StepWindow(json.loads(json.dumps(window.to_dict())))
    assert again.images == 32
    ours, theirs = again.means(5), window.means(5)
    assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
    assert math.isnan(ours.top1)
    assert torch.equal(again.rows[0], window.rows[0])


def test_a_devices_rows_are_read_in_one_copy():
    with emulated_device("cuda") as emulated:
        window = StepWindow({"rows": [[1.0, 8.0, 0.5]], "images": 16})
        for _ in range(50):
            window.add(torch.full((3,), 2.0, device="cuda"), 16)
        assert not emulated.waits
        assert window.means(51).loss == pytest.approx(101 / 51)
        assert emulated.waits.total() == 1
        # What has been read is not read again
        window.means(51)
        assert emulated.waits.total() == 1
        window.add(torch.ones(3, device="cuda"), 16)
        assert window.means(52).loss == pytest.approx(102 / 52)
        assert emulated.waits.total() == 2


def test_speed_and_the_wait_for_data(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("vit.training.window.time.perf_counter", lambda: now[0])
    window = StepWindow()
    window.add(torch.zeros(3), 16)
    window.data_seconds = 1.0
    now[0] = 104.0
    assert (window.seconds(), window.images_per_second(), window.data_wait()) == (4.0, 4.0, 0.25)


def test_the_steps_of_an_earlier_session_do_not_count_as_speed(monkeypatch):
    """Their time is not known any more."""
    now = [100.0]
    monkeypatch.setattr("vit.training.window.time.perf_counter", lambda: now[0])
    window = StepWindow({"rows": [[1.0, 8.0, 0.5]] * 49, "images": 49 * 16})
    window.add(torch.full((3,), 2.0), 16)
    now[0] = 104.0
    assert window.images_per_second() == 4.0
    assert window.images == 50 * 16
    assert window.means(50).loss == pytest.approx(51 / 50)
