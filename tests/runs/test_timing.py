"""Where a run's time goes, and the line that names it."""

import pytest

from vit.runs.timing import Circumstances, Clock, Cost, Speed, Spent, bottleneck

HERE = {
    "device": "cpu",
    "precision": "bf16",
    "compiled": True,
    "could_compile": True,
    "could_use_bf16": True,
    "from_files": True,
    "workers": 2,
    "cores": 2,
}


@pytest.mark.parametrize(
    ("spent", "mfu", "changes", "parts"),
    [
        (
            Spent(data=20, steps=80),
            0.4,
            {"workers": 1},
            ["waiting for data (data 20%", "runtime.workers=2"],
        ),
        (Spent(data=20, steps=80), 0.4, {}, ["waiting for data", "vit.shrink"]),
        (
            Spent(data=20, steps=80),
            0.4,
            {"from_files": False},
            ["waiting for data", "lighter augment"],
        ),
        (Spent(steps=50, evaluation=50), 0.4, {}, ["evaluation", "train.eval_every"]),
        (Spent(steps=90, saving=10), 0.4, {}, ["saving", "train.save_every"]),
        (
            Spent(steps=60, first_step=40),
            0.4,
            {},
            ["compiling (40 s of 100)", "runtime.compile=false"],
        ),
        (
            Spent(steps=60, first_step=40),
            0.4,
            {"compiled": False},
            ["computing", "runtime.compile=true"],
        ),
        (
            Spent(steps=100),
            0.4,
            {"precision": "fp32"},
            ["computing (steps at 40%", "train.precision=bf16"],
        ),
        (Spent(steps=100), 0.2, {"device": "cuda"}, ["computing", "larger train.batch_size"]),
        (Spent(steps=100), 0.6, {}, ["computing", "only a smaller model"]),
        (Spent(), 0.0, {}, ["computing"]),
    ],
)
def test_the_bottleneck_is_named_with_what_would_help(spent, mfu, changes, parts):
    line = bottleneck(spent, mfu, Circumstances(**{**HERE, **changes}))
    assert all(part in line for part in parts), line
    assert line.count("help") + line.count("would use it better") == 1


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr("vit.runs.timing.time.monotonic", lambda: now[0])
    return now


def test_saving_is_due_by_steps_or_by_minutes_but_not_where_a_process_begins(now):
    now[0] = 100.0
    clock = Clock(first_step=6, seconds_before=30.0)
    assert [step for step in range(6, 13) if clock.save_due(step, 3)] == [9, 12]
    assert not clock.save_due(7, None)
    now[0] = 701.0
    assert not clock.save_due(6, None)
    assert clock.save_due(7, None)
    clock.saved()
    assert not clock.save_due(8, None)
    assert clock.total_seconds() == 631.0


def test_a_forecast_comes_once_and_without_the_first_step(now):
    clock = Clock(first_step=0, seconds_before=0.0)
    due = []
    for step in range(1, 8):
        now[0] += 60.0 if step == 1 else 2.0  # the first compiles
        if clock.forecast_due(step):
            due.append(step)
            assert clock.seconds_per_step(step) == 2.0
    assert due == [4]


def test_time_is_counted_by_purpose_also_where_it_ends_in_an_error(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vit.runs.timing.time.perf_counter", lambda: now[0])
    clock = Clock(0, 0.0)
    for purpose, seconds in (("data", 1.0), ("saving", 2.0), ("data", 4.0)):
        with clock.during(purpose):
            now[0] += seconds

    def fail():
        with clock.during("evaluation"):
            now[0] += 8.0
            raise KeyError("planted")

    with pytest.raises(KeyError):
        fail()
    assert clock.spent == Spent(data=5.0, saving=2.0, evaluation=8.0)
    assert clock.spent.total() == 15.0


def test_the_fraction_of_the_devices_rate_never_passes_one():
    speed = Speed(Cost(macs=10**9, nominal_flops=6e9), product_rate=1.2e12)
    assert speed.mfu(100.0) == pytest.approx(0.5)
    # The rate was measured on a busy machine: it is corrected
    assert speed.mfu(400.0) == 1.0
    assert speed.mfu(200.0) == pytest.approx(0.5)
