"""A process that falls silent ends the run: with a store in memory and a short silence."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT
from several_processes import store_of_group

from vit.runtime import heartbeat
from vit.runtime.heartbeat import Heartbeat, exit_after_silence

HOST = socket.gethostname()
SILENCE = 30.0


class FakeStore:
    """The part of torch's TCPStore that is used, in this process."""

    def __init__(self):
        self.values = {}
        self.broken = False

    def set(self, key, value):
        if self.broken:
            raise RuntimeError("Broken pipe")
        self.values[key] = value.encode()

    def check(self, keys):
        return all(key in self.values for key in keys)

    def get(self, key):
        return self.values[key]


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, to be set."""
    now = [1000.0]
    monkeypatch.setattr(heartbeat, "MAX_SILENCE_SECONDS", SILENCE)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def ended(monkeypatch):
    """([(this rank, silent rank, its name)], an event): notes the end of the process instead."""
    calls, event = [], threading.Event()

    def end(*arguments):
        calls.append(arguments)
        event.set()
        raise SystemExit  # ends the thread, as os._exit would end the process

    monkeypatch.setattr(heartbeat, "exit_after_silence", end)
    return calls, event


def test_a_rank_that_beats_is_not_silent(clock):
    store = FakeStore()
    first = Heartbeat(0, store, {1: f"{HOST} 7"})
    for beat in range(1, 100):
        clock[0] += SILENCE - 1
        store.set("beat 1", str(beat))
        assert first.exchange(beat) is None
    assert store.values["beat 0"] == b"99"


def test_the_rank_that_has_been_silent_too_long_is_named(clock):
    store = FakeStore()
    first = Heartbeat(0, store, {1: f"{HOST} 7", 2: f"{HOST} 8"})
    store.set("beat 2", "1")
    for beat in (1, 2, 3):
        store.set("beat 1", str(beat))
        assert first.exchange(beat) is None
        clock[0] += SILENCE / 2
    # Rank 2's beat is still the first one
    store.set("beat 1", "4")
    assert first.exchange(4) == 2


def test_a_rank_that_never_beat_is_silent_too(clock):
    first = Heartbeat(0, FakeStore(), {1: f"{HOST} 7"})
    for beat in (1, 2, 3):
        assert first.exchange(beat) is None
        clock[0] += SILENCE / 2
    assert first.exchange(4) == 1


def test_a_process_that_was_suspended_misses_nobody_who_was_so_too(clock):
    store = FakeStore()
    first = Heartbeat(0, store, {1: f"{HOST} 7"})
    store.set("beat 1", "1")
    assert first.exchange(1) is None
    clock[0] += 3600
    # Its thread looks first, or the other one's beats
    assert first.exchange(2) is None
    store.set("beat 1", "2")
    for beat in (3, 4, 5):
        assert first.exchange(beat) is None
        clock[0] += SILENCE / 2
    assert first.exchange(6) == 1


def test_the_thread_ends_the_process_when_another_falls_silent(monkeypatch, ended):
    calls, event = ended
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    # Half of it is what a busy machine may keep the thread from looking
    monkeypatch.setattr(heartbeat, "MAX_SILENCE_SECONDS", 1.0)
    thread = Heartbeat(0, FakeStore(), {1: f"{HOST} 7"})
    started = time.monotonic()
    thread.start()
    assert event.wait(60)
    thread.join(10)
    assert time.monotonic() - started >= 1.0
    assert calls == [(0, 1, f"{HOST} 7")]


def test_a_lost_store_means_that_rank_0_is_gone(monkeypatch, ended):
    calls, event = ended
    monkeypatch.setattr(heartbeat, "MAX_SILENCE_SECONDS", 0.1)
    thread = start_without_store(monkeypatch)
    assert event.wait(10)
    thread.join(10)
    assert calls == [(1, 0, f"{HOST} 7")]


def test_a_process_that_ends_soon_after_rank_0_does_not_kill_it(monkeypatch, ended):
    calls, _ = ended
    thread = start_without_store(monkeypatch)
    time.sleep(0.1)
    thread.stop()
    assert not thread.is_alive()
    assert calls == []


def start_without_store(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    store = FakeStore()
    store.broken = True
    thread = Heartbeat(1, store, {0: f"{HOST} 7"})
    thread.start()
    return thread


def test_a_run_that_is_over_waits_for_nobody(monkeypatch, ended):
    calls, _ = ended
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "MAX_SILENCE_SECONDS", 0.0)
    thread = Heartbeat(0, FakeStore(), {1: f"{HOST} 7"})
    thread.stopped.set()
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert calls == []


@pytest.mark.parametrize(("host", "kills"), [(HOST, True), ("elsewhere", False)])
def test_the_end_names_the_silent_process_and_takes_it_along(monkeypatch, capsys, host, kills):
    killed, codes = [], []
    monkeypatch.setattr(heartbeat.os, "kill", lambda *arguments: killed.append(arguments))
    monkeypatch.setattr(heartbeat.os, "_exit", codes.append)
    exit_after_silence(2, 1, f"{host} 4711")
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(part in message for part in ("rank 2", "rank 1", "4711", host))
    assert killed == ([(4711, signal.SIGKILL)] if kills else [])
    assert codes == [3]


# Beats all the time, so that the thread is in the store's C++ code whenever the process ends
BUSY = """
import sys
import time
import torch
from vit.runtime import heartbeat
from vit.runtime.processes import join_processes
heartbeat.BEAT_SECONDS = 0.0
stop = heartbeat.Heartbeat.stop
processes = join_processes("cpu")
"""


def run_ranks(script):
    """Run a script in two processes of one group; returns their exit codes and error outputs."""
    store, address = store_of_group()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, **address, "WORLD_SIZE": "2", "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    del store
    return [rank.returncode for rank in ranks], errors


@pytest.mark.parametrize("end", ["processes.leave()", "processes.barrier(); sys.exit(2)"])
def test_a_process_ends_in_the_middle_of_a_beat(end):
    codes, errors = run_ranks(f"{BUSY}\ntime.sleep(0.2)\n{end}")
    assert codes == ([0, 0] if "leave" in end else [2, 2]), errors


def test_the_first_process_takes_the_store_away_when_all_have_stopped():
    late = """
def slow_stop(self):
    time.sleep(2.0 * self.rank)
    stop(self)
heartbeat.Heartbeat.stop = slow_stop
"""
    codes, errors = run_ranks(f"{BUSY}{late}processes.leave()")
    assert codes == [0, 0], errors
