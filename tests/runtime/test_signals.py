"""The signals that stop a run."""

import os
import signal

import pytest

from vit.errors import Stopped
from vit.runtime.signals import Interrupted, StopSignal

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture
def stop():
    """An installed StopSignal; the handlers before it come back."""
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    yield StopSignal().install()
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
