"""What a person sees of a run: a bar in a terminal, a line now and then elsewhere."""

import io
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from vit.runs import console as console_module
from vit.runs.console import Console, print_line


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    return now


class Terminal:
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """The program takes standard error for a terminal."""
    streams = SimpleNamespace(stderr=Terminal(), stdout=sys.stdout)
    monkeypatch.setattr(console_module, "sys", streams)


def make_console(speaks=True, first_step=0, total_steps=9, steps_per_epoch=4.5):
    """Nine steps of 8 images, of which 4.5 are an epoch."""
    return Console(
        first_step=first_step,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        epochs=2,
        batch_size=8,
        speaks=speaks,
    )


def test_where_output_is_no_terminal_there_is_no_bar(capsys):
    console = make_console()
    for step in range(1, 10):
        console.advance(step)
    console.close()
    assert console.bar is None
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("terminal")
def test_other_processes_have_no_bar(capsys):
    console = make_console(speaks=False)
    console.advance(1)
    assert console.bar is None
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("terminal")
def test_a_bar_goes_over_the_images_of_an_epoch(capsys):
    console = make_console()
    totals = {}
    for step in range(1, 10):
        console.advance(step)
        if console.bar is not None:
            totals.setdefault(console.bar.desc, []).append((console.bar.n, console.bar.total))
    # 4.5 steps an epoch: the first ends within the fifth step, the second with the ninth
    assert totals["epoch 1/2"] == [(8, 32), (16, 32), (24, 32), (32, 32)]
    assert totals["epoch 2/2"] == [(16, 40), (24, 40), (32, 40)]
    assert "epoch 1/2" in capsys.readouterr().err
    console.close()
    assert console.bar is None


@pytest.mark.usefixtures("terminal")
def test_a_resumed_run_has_the_bar_where_it_was():
    console = make_console(first_step=2)
    console.advance(3)
    assert (console.bar.initial, console.bar.n, console.bar.total) == (16, 24, 32)
    console.close()


@pytest.mark.usefixtures("terminal")
def test_numbers_stand_in_the_bar(clock):
    console = make_console()
    console.advance(1)
    assert not console.wants_numbers()
    clock[0] += 1.5
    assert console.wants_numbers()
    console.show_numbers(1, 1.25, 0.5, 100.0, 0.3)
    assert console.bar.postfix == "loss 1.250, top-1 50.0%, MFU 30%"
    assert not console.wants_numbers()
    console.show_numbers(1, 1.25, float("nan"), 100.0, 0.3)
    assert console.bar.postfix == "loss 1.250, MFU 30%"
    console.close()


def test_without_a_bar_a_line_comes_every_half_minute(clock, log_lines):
    console = make_console()
    clock[0] += 29.0
    assert not console.wants_numbers()
    clock[0] += 2.0
    assert console.wants_numbers()
    console.show_numbers(5, 1.25, 0.5, 100.0, 0.3)
    (line,) = log_lines
    for part in ("1.1/2", "step 5", "loss 1.250", "top-1 50.0%", "100 img/s", "MFU 30%"):
        assert part in line
    # Five of nine steps took 31 seconds
    assert "0:25 left" in line
    assert not console.wants_numbers()


def test_an_evaluations_line_has_the_latest_numbers(clock, log_lines):
    console = make_console(first_step=4)
    console.note_numbers(2.5, float("nan"), 10.0, 0.1)
    assert log_lines == []
    clock[0] += 60.0
    console.line(8, "  val top-1 50.00%")
    (line,) = log_lines
    assert "loss 2.500  10 img/s" in line
    assert "val top-1 50.00%" in line
    assert "top-1" not in line.partition("img/s")[0]
    # This process has made four steps, and there is one to go
    assert "0:15 left" in line


def test_before_the_first_step_nothing_is_known_of_the_time_left(clock):
    console = make_console(first_step=4)
    clock[0] += 60.0
    assert console.seconds_left(4) == 0.0


def test_a_line_stands_above_the_bar(capsys):
    with tqdm(total=3, file=io.StringIO()):
        print_line("hello")
    assert capsys.readouterr().out == "hello\n"
