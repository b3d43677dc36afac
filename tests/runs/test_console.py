"""The progress of a run: a bar in a terminal, a line now and then elsewhere."""

import math

import pytest

from vit.runs import screen as screen_module
from vit.runs.console import Console, Numbers
from vit.runs.screen import Screen
from vit.runs.timing import Clock

NUMBERS = Numbers(loss=1.25, top1=0.5, images_per_second=100.0, mfu=0.3)
MIXED = Numbers(loss=1.25, top1=math.nan, images_per_second=100.0, mfu=0.3)


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr(screen_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def screen(clock, capsys):
    """A screen whose thread is not started; where output goes is no terminal."""
    return Screen()


@pytest.fixture
def terminal(screen):
    screen.is_terminal = True
    yield screen
    screen.close_bar()


def make_console(screen, first_step=0, **changes):
    """Nine steps of 8 images, of which 4.5 are an epoch."""
    settings = {
        "total_steps": 9,
        "steps_per_epoch": 4.5,
        "epochs": 2,
        "batch_size": 8,
        "evaluations": 2,
    }
    return Console(screen, Clock(first_step, 0.0), **settings | changes)


def test_where_output_is_no_terminal_there_is_no_bar(screen, capsys):
    console = make_console(screen)
    for step in range(1, 10):
        console.advance(step)
    assert screen.bar is None
    assert capsys.readouterr().err == ""


def test_a_bar_goes_over_the_images_of_an_epoch(terminal, capsys):
    console = make_console(terminal)
    totals = {}
    for step in range(1, 10):
        console.advance(step)
        if terminal.bar is not None:
            totals.setdefault(terminal.bar.desc, []).append((terminal.bar.n, terminal.bar.total))
    # 4.5 steps an epoch: the first ends within the fifth step, the second with the ninth
    assert totals["epoch 1/2"] == [(8, 32), (16, 32), (24, 32), (32, 32)]
    assert totals["epoch 2/2"] == [(16, 40), (24, 40), (32, 40)]
    assert "epoch 1/2" in capsys.readouterr().err


def test_a_resumed_run_has_the_bar_where_it_was(terminal):
    console = make_console(terminal, first_step=2)
    console.advance(3)
    bar = terminal.bar
    assert (bar.initial, bar.n, bar.total) == (16, 24, 32)


def test_the_first_step_is_told_at_once_in_a_line(screen, log_lines):
    console = make_console(screen)
    assert console.wants_numbers(1)
    console.show_numbers(1, NUMBERS)
    (line,) = log_lines
    assert "step 1 " in line
    assert not console.wants_numbers(2)


def test_numbers_stand_in_the_bar(terminal, clock):
    console = make_console(terminal)
    console.advance(1)
    console.advance(2)
    assert not console.wants_numbers(2)
    clock[0] += 1.5
    assert console.wants_numbers(2)
    console.show_numbers(2, NUMBERS)
    assert terminal.bar.postfix == "loss 1.250, top-1 50.0%, MFU 30%"
    assert not console.wants_numbers(2)
    console.show_numbers(2, MIXED)
    assert terminal.bar.postfix == "loss 1.250, MFU 30%"


def test_without_a_bar_a_line_comes_before_the_screen_would_speak(screen, clock, log_lines):
    console = make_console(screen)
    clock[0] += screen_module.SILENCE_SECONDS - 3
    assert not console.wants_numbers(5)
    clock[0] += 1.0
    assert console.wants_numbers(5)
    console.show_numbers(5, NUMBERS)
    (line,) = log_lines
    for part in ("1.1/2", "step 5", "loss 1.250", "top-1 50.0%", "100 img/s", "MFU 30%"):
        assert part in line
    # Five of nine steps took six seconds
    assert "0:05 left" in line


def test_an_evaluations_line_has_the_latest_numbers(screen, clock, log_lines):
    console = make_console(screen, first_step=4)
    console.note_numbers(MIXED)
    assert log_lines == []
    clock[0] += 60.0
    console.evaluated(8, 1, {"loss": 0.5, "top1": 0.75}, improved=True)
    (line,) = log_lines
    assert "loss 1.250  100 img/s" in line
    assert "val loss 0.500  val top-1 75.00%  best so far" in line
    assert "top-1" not in line.partition("img/s")[0]
    # This process has made four steps, and there is one to go
    assert "0:15 left" in line


def test_an_evaluations_line_has_what_is_selected_by(screen, log_lines):
    metrics = {"loss": 0.5, "top1": 0.857, "balanced_top1": 0.5, "macro_f1": 0.4615}
    make_console(screen).evaluated(8, 1, metrics, True, ("balanced_top1", "macro_f1"))
    (line,) = log_lines
    assert "top-1 85.70%  balanced accuracy 50.00%  macro F1 46.15%  best so far" in line


def test_of_many_evaluations_at_most_twenty_have_a_line(screen, log_lines):
    console = make_console(screen, total_steps=1000, evaluations=1000)
    for number in range(1, 1001):
        console.evaluated(number, number, {"loss": 1.0, "top1": 0.5}, improved=True)
    assert len(log_lines) <= 21
    assert "step 1000 " in log_lines[-1]


def test_a_validation_that_has_stopped_improving_is_told_once(screen, log_lines):
    console = make_console(screen, total_steps=40, evaluations=40)
    for number in range(1, 41):
        console.evaluated(number, number, {"loss": 1.0, "top1": 0.5}, improved=number == 1)
    notes = [line for line in log_lines if "has not improved" in line]
    assert len(notes) == 1
    assert "last 10 evaluations" in notes[0]


def test_the_step_that_compiles_says_so(screen):
    console = make_console(screen, first_step=3, compiles=True)
    console.next_step(4)
    assert screen.activity == "step 4, which compiles the model"
    console.next_step(5)
    assert screen.activity == "step 5"


def test_a_first_step_that_compiles_is_not_taken_for_the_speed(screen, clock, log_lines):
    console = make_console(screen, compiles=True)
    console.next_step(1)
    clock[0] += 60.0
    console.show_numbers(1, NUMBERS)
    assert not console.clock.forecast_due(1)
    for step in (2, 3):
        console.next_step(step)
        clock[0] += 2.0
    console.show_numbers(3, NUMBERS)
    first, third = log_lines
    assert "left" not in first
    # Two steps took four seconds, and there are six to go
    assert third.endswith("0:12 left")


def test_before_the_first_step_nothing_is_known_of_the_time_left(screen, clock):
    console = make_console(screen, first_step=4)
    clock[0] += 60.0
    assert console.seconds_left(4) == 0.0
