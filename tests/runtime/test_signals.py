"""The signals that stop a run."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from vit.errors import Stopped
from vit.runtime.signals import Interrupted, StopSignal
from vit.runtime.time_limit import TimeLimit

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture
def stop():
    """An installed StopSignal; the handlers before it come back, and no alarm is left."""
    handlers = {number: signal.getsignal(number) for number in (*NUMBERS, signal.SIGALRM)}
    yield StopSignal().install()
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def exits(monkeypatch):
    """The exit codes that os._exit was called with."""
    codes = []
    monkeypatch.setattr("vit.runtime.signals.os._exit", codes.append)
    return codes


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_noted_and_raises_nothing_itself(stop, exits, number):
    assert not stop
    stop.check()
    os.kill(os.getpid(), number)
    assert stop
    assert stop.describe() == number.name
    with pytest.raises(Stopped, match=number.name) as stopped:
        stop.check()
    assert stopped.value.exit_code == 75
    assert exits == []


def test_a_second_interrupt_ends_the_process_at_once(stop, exits):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert exits == []
    os.kill(os.getpid(), signal.SIGINT)
    assert exits == [128 + signal.SIGINT]


def test_while_other_processes_are_waited_for_a_signal_ends_at_once(stop, exits):
    stop.exit_immediately = True
    os.kill(os.getpid(), signal.SIGTERM)
    assert exits == [128 + signal.SIGTERM]


def test_within_long_work_that_changes_nothing_a_signal_interrupts(stop):
    with stop.interrupting(), pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.describe() == "SIGTERM"
    # And afterwards no more
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not issubclass(Interrupted, Exception)


def test_another_process_may_have_received_it():
    assert "another process" in StopSignal().describe()


def test_without_a_limit_there_is_time_for_everything(stop):
    stop.limit(None)
    stop.require_time(1e9)
    stop.expect_save(1e9)
    assert not stop
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_would_end_too_late_stops_the_run(stop):
    stop.limit(10)  # half a minute of it is left free
    stop.require_time(560)
    assert not stop
    stop.expect_save(20)  # and twice that for saving
    stop.require_time(520)
    assert not stop
    stop.require_time(540)
    with pytest.raises(Stopped, match=r"runtime\.max_minutes=10 before"):
        stop.check()


def test_the_minutes_count_from_the_start_of_the_command():
    stop = StopSignal(started=time.monotonic() - 500)
    stop.limit(10)
    stop.require_time(60)
    assert not stop
    stop.require_time(80)
    assert stop
    signal.setitimer(signal.ITIMER_REAL, 0)


def test_at_the_limit_an_alarm_stops_the_run_and_interrupts_long_work(stop, exits):
    def work():
        stop.limit(0.06)  # three seconds of it are left free
        time.sleep(30)

    with stop.interrupting(), pytest.raises(Interrupted):
        work()
    assert stop.describe() == "runtime.max_minutes=0.06"
    # It is not saved again, and a save that is measured sets no other alarm
    stop.expect_save(1)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert exits == []


def test_at_the_limit_a_process_that_waits_for_others_can_be_started_again(stop, exits):
    stop.exit_immediately = True
    stop.started -= 60
    stop.limit(1)
    time.sleep(0.1)
    assert exits == [75]


def test_an_earlier_signal_is_what_is_told(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    stop.limit(0.01)
    stop.require_time(1e9)
    assert stop.describe() == "SIGTERM"


END_AT_THE_LIMIT = """
import signal, time
from vit.runtime.signals import StopSignal

stop = StopSignal().install()
stop.limit(1)

class Slow:
    def __del__(self):
        time.sleep(1)

# Lives as long as the interpreter, which takes a second to end in which the alarm would come
signal.slow = Slow()
signal.setitimer(signal.ITIMER_REAL, 0.3)
"""


def test_an_alarm_does_not_kill_a_process_that_is_ending():
    done = subprocess.run([sys.executable, "-c", END_AT_THE_LIMIT], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_a_slow_start_leaves_more_time_to_end(monkeypatch):
    monkeypatch.setattr("vit.runtime.time_limit.time.monotonic", lambda: 100.0)
    quick, slow = (TimeLimit(2, 100.0 - seconds) for seconds in (1, 20))
    assert quick.seconds_left() == pytest.approx(120 - 1 - 6)
    assert slow.seconds_left() == pytest.approx(120 - 20 - 10)
