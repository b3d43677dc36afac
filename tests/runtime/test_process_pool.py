"""A function of many items in several processes: their order, and what becomes of the processes."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from vit import shards, shrink
from vit.errors import ConfigError
from vit.runtime.process_pool import AHEAD, map_in_processes


def test_results_come_in_order_and_items_are_taken_as_they_are_used():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    for count, result in enumerate(map_in_processes(float, items(), 2), 1):
        assert result == count - 1
        assert len(taken) <= count + 2 * AHEAD
    assert count == 100


def test_what_a_process_raises_is_raised():
    with pytest.raises(ValueError, match="invalid literal"):
        list(map_in_processes(int, ["1", "one"], 2))


def test_a_killed_process_ends_in_one_line():
    with pytest.raises(ConfigError, match="--workers: a process was killed"):
        list(map_in_processes(os._exit, [1], 2))


def test_processes_end_with_a_parent_that_is_killed():
    program = """
import time
from vit.runtime.process_pool import map_in_processes
results = map_in_processes(eval, ["__import__('os').getpid()"], 2)
print(next(results), flush=True)
time.sleep(600)
"""
    # They hold the pipe of standard output, so it ends when the last of them has ended
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
        try:
            process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("command", [shards, shrink])
def test_there_are_as_many_processes_as_cores_that_may_be_used(monkeypatch, command):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4}, raising=False)
    assert command.parse_arguments(["in", "out"]).workers == 1
