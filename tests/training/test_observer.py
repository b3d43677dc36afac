"""What the loop reports: rows of the log, curves, forecasts, the time spent."""

import math

import pytest
import torch
from helpers import rows
from small_training import (
    MadeUpBatches,
    make_observer,
    make_plan,
    make_state,
    make_trainer,
    mixed_batch,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit.runs.tensorboard import TensorBoard

LAYERED = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "layer_decay": 0.5}


def scalars(folder):
    """{tag: {step: value}} of TensorBoard's files."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def train(folder, **parts):
    """A short run with TensorBoard on."""
    trainer = make_trainer(folder, **parts)
    trainer.observer.board = TensorBoard(folder / "tensorboard", None)
    trainer.fit()
    trainer.observer.close()
    return trainer


def test_a_row_stands_for_the_steps_since_the_last_one(tmp_path):
    train(tmp_path / "every", plan=make_plan(6, log_every=1))
    train(tmp_path / "some", plan=make_plan(6, log_every=2))
    every = rows(tmp_path / "every" / "metrics.jsonl")
    some = rows(tmp_path / "some" / "metrics.jsonl")
    assert [row["step"] for row in every] == [1, 2, 3, 4, 5, 6]
    assert {row["split"] for row in every} == {"train"}
    # An evaluation is due after steps 3 and 6, and begins a new window
    assert [row["step"] for row in some] == [2, 3, 4, 6]
    for key in ("loss", "top1", "grad_norm"):
        expected = (every[0][key] + every[1][key]) / 2
        assert some[0][key] == pytest.approx(expected)
        assert some[2][key] == pytest.approx(every[3][key])


def test_mixed_images_have_no_training_accuracy(tmp_path):
    train(tmp_path, batches=MadeUpBatches(source=mixed_batch))
    metrics = rows(tmp_path / "metrics.jsonl")
    assert {row["split"] for row in metrics} == {"train"}
    assert all("top1" not in row and row["loss"] > 0 for row in metrics)
    assert "top1/train" not in scalars(tmp_path / "tensorboard")


def test_curves_hold_what_the_rows_hold(tmp_path):
    evaluations = [{"loss": 1.5, "top1": 0.25}, {"loss": 1.0, "top1": 0.5}]
    train(tmp_path, batches=MadeUpBatches(evaluations=evaluations))
    curves = scalars(tmp_path / "tensorboard")
    metrics = rows(tmp_path / "metrics.jsonl")
    for split in ("train", "val"):
        for key in ("loss", "top1"):
            values = {row["step"]: row[key] for row in metrics if row["split"] == split}
            assert curves[f"{key}/{split}"] == pytest.approx(values)
    assert curves["top5/val"] == {3: 1.0, 6: 1.0}
    assert curves["optimizer/epoch"][6] == 2.0
    timing = rows(tmp_path / "timing.jsonl")
    assert [row["step"] for row in timing] == [2, 3, 4, 6]
    assert all(row["images_per_second"] > 0 and row["memory_bytes"] > 0 for row in timing)
    assert {"speed/MFU", "speed/data_wait_share", "speed/peak_memory_GiB"} <= curves.keys()


def test_metrics_beside_the_usual_ones_are_logged_where_they_are_asked_for(tmp_path):
    evaluations = [{"loss": 1.5, "top1": 0.25, "macro_f1": 0.125}, {"loss": 1.0, "top1": 0.5}]
    trainer = make_trainer(tmp_path, batches=MadeUpBatches(evaluations=evaluations))
    trainer.observer.beside = ("macro_f1",)
    trainer.observer.board = TensorBoard(tmp_path / "tensorboard", None)
    trainer.fit()
    trainer.observer.close()
    validation = [row for row in rows(tmp_path / "metrics.jsonl") if row["split"] == "val"]
    assert [row["macro_f1"] for row in validation] == [0.125, 0.5]
    curves = scalars(tmp_path / "tensorboard")
    assert curves["macro_f1/val"] == {3: 0.125, 6: 0.5}
    assert "balanced_top1/val" not in curves


def test_rates_that_differ_have_a_curve_each(tmp_path):
    train(tmp_path / "alike")
    names = scalars(tmp_path / "alike" / "tensorboard")
    assert not any(name.startswith("optimizer/learning_rate/") for name in names)
    train(tmp_path / "layers", state=make_state(optimizer=LAYERED))
    curves = scalars(tmp_path / "layers" / "tensorboard")
    assert curves["optimizer/learning_rate/decay_layer_3"][6] == pytest.approx(1e-3)
    assert curves["optimizer/learning_rate/decay_layer_0"][6] == pytest.approx(1e-3 / 8)
    # The row and the main curve have the fastest
    assert curves["optimizer/learning_rate"][6] == pytest.approx(1e-3)


def test_the_first_step_is_counted_apart(tmp_path):
    """It may compile."""
    observer = make_observer(tmp_path, make_state(), make_plan(6), MadeUpBatches())
    with observer.stepping():
        pass
    observer.state.progress.step = 1
    assert observer.clock.spent.first_step > 0
    assert observer.clock.spent.steps == 0
    with observer.stepping(), observer.waiting_for_data():
        pass
    spent = observer.clock.spent
    assert spent.steps >= spent.data > 0
    assert observer.window.data_seconds == spent.data


def test_the_window_of_an_interrupted_run_is_taken_up(tmp_path):
    state = make_state()
    state.progress.window = {"rows": [[1.0, 8.0, 0.5]], "images": 16}
    state.progress.step = 2
    observer = make_observer(tmp_path, state, make_plan(6, log_every=2), MadeUpBatches())
    observer.step_done(torch.tensor([2.0, 16.0, 1.5]))
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["top1"], row["grad_norm"]) == (1.5, 24 / 32, 1.0)
    assert observer.window.images == 0


def test_a_long_run_is_forecast_with_advice(tmp_path, log_lines, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vit.runs.timing.time.monotonic", lambda: now[0])
    observer = make_observer(tmp_path, make_state(), make_plan(1002), MadeUpBatches())
    observer.slow_advice = "take a smaller model"
    for step in range(1, 10):
        now[0] += 10.0
        observer.state.progress.step = step
        observer.forecast_if_due()
    # Ten seconds a step, and 1,000 steps to go after the second
    forecast, advice = log_lines
    assert "2:46:40" in forecast
    assert advice == "take a smaller model"


def test_watching_draws_no_random_number(tmp_path):
    observer = make_observer(tmp_path, make_state(), make_plan(6), MadeUpBatches())
    observer.state.progress.step = 1
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    observer.step_done(torch.tensor([2.0, math.nan, 1.5]))
    observer.log_window()
    assert torch.equal(torch.rand(1), expected)
