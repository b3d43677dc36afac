"""A run is never silent for long: a moving line in a terminal, plain lines elsewhere."""

import io
import threading

import pytest
from tqdm import tqdm

from vit.runs import screen as screen_module
from vit.runs.screen import Screen
from vit.runtime.signals import StopSignal


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(screen_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def screen(clock):
    return Screen()


def tick_for(screen, clock, seconds):
    for _ in range(seconds):
        clock[0] += 1.0
        screen.tick()


def test_a_long_silence_is_broken_by_plain_lines(screen, clock, capsys):
    screen.doing("reading the data")
    tick_for(screen, clock, 30)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"… reading the data, 0:{seconds} so far" for seconds in ("08", "16", "24")]


def test_lines_of_others_end_the_silence(screen, clock, capsys):
    screen.doing("reading the data")
    for _ in range(4):
        tick_for(screen, clock, 7)
        screen.print("hello")
    assert capsys.readouterr().out == "hello\n" * 4


def test_a_long_run_speaks_more_seldom(screen, clock, capsys):
    clock[0] = screen_module.SECONDS_OF_SHORT_SILENCE
    screen.print("late")
    screen.doing("step 7")
    tick_for(screen, clock, 120)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "… step 7, 1:00 so far",
        "… step 7, 2:00 so far",
    ]


def test_nothing_is_said_where_nothing_is_done(screen, clock, capsys):
    tick_for(screen, clock, 100)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_line_that_moves(screen, clock, capsys):
    screen.is_terminal = True
    screen.doing("building the model")
    tick_for(screen, clock, 3)
    seen = capsys.readouterr()
    assert seen.out == ""
    for second in (1, 2, 3):
        assert f"building the model  0:0{second}" in seen.err
    screen.doing(None)
    assert screen.moving_line is None


def test_a_step_that_takes_long_is_mentioned_in_the_bar(screen, clock):
    screen.is_terminal = True
    screen.open_bar(tqdm(total=8, desc="epoch 1/2", file=io.StringIO()))
    screen.doing("step 3")
    tick_for(screen, clock, 2)
    assert screen.bar.desc == "epoch 1/2"
    tick_for(screen, clock, 5)
    assert screen.bar.desc == "epoch 1/2, step 3 0:07"
    screen.close_bar()


def test_an_activity_within_another_returns_to_it(screen, clock):
    screen.doing("step 3")
    clock[0] = 5.0
    with screen.during("saving"):
        assert screen.activity == "saving"
    assert (screen.activity, screen.activity_started) == ("step 3", 0.0)


def test_a_signal_is_told_once(clock, capsys):
    stop = StopSignal()
    screen = Screen(stop=stop)
    tick_for(screen, clock, 2)
    assert capsys.readouterr().out == ""
    stop.name = "SIGINT"
    tick_for(screen, clock, 3)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("SIGINT: saving and stopping")
    assert "Ctrl-C again" in line


def test_other_processes_say_nothing(clock, capsys):
    screen = Screen(speaks=False)
    with screen:
        screen.doing("reading the data")
        screen.print("hello")
    assert not screen.is_terminal
    assert capsys.readouterr() == ("", "")


def test_the_thread_ends_with_the_run():
    with Screen() as screen:
        assert screen.thread.is_alive()
    assert not screen.thread.is_alive()


def test_a_line_that_was_begun_when_the_work_ended_does_not_stay(monkeypatch):
    begun, goes_on = threading.Event(), threading.Event()

    class SlowLine(tqdm):
        def __init__(self, **options):
            begun.set()
            goes_on.wait(10)
            super().__init__(**options)

    monkeypatch.setattr(screen_module, "tqdm", SlowLine)
    monkeypatch.setattr(screen_module, "TICK_SECONDS", 0.01)
    screen = Screen()
    screen.is_terminal = True
    with screen:
        screen.doing("building the model")
        assert begun.wait(10)
        threading.Timer(0.2, goes_on.set).start()
        screen.doing(None)
        screen.stopped.set()
        screen.thread.join()
        assert screen.moving_line is None


def test_a_line_stands_above_the_bar(screen, capsys):
    with tqdm(total=3, file=io.StringIO()):
        screen.print("hello")
    assert capsys.readouterr().out == "hello\n"
