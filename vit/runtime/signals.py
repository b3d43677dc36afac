"""Signals that ask a run to stop, and a limit of time that does.

Imports nothing heavy, so that the handler can be installed before torch is imported.
"""

import atexit
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from vit.errors import Stopped
from vit.runtime.time_limit import TimeLimit

# By so much the clocks of a run's processes differ in when they began to count
SECONDS_APART = 5.0


class Interrupted(BaseException):
    """A signal came within StopSignal.interrupting().

    Not an Exception, since libraries turn those into errors of their own.
    """


class StopSignal:
    """Is true once SIGTERM, SIGINT or SIGUSR1 has come; training then saves and stops.

    So it is where the time is nearly over that limit() gives the run. Training looks at it between
    micro-batches. A second SIGINT (Ctrl-C twice) ends the process at once; the last checkpoint on
    disk stays whole. started: when the command was, by time.monotonic(); None: now.
    """

    def __init__(self, started: float | None = None) -> None:
        self.started = time.monotonic() if started is None else started
        self.time_limit: TimeLimit | None = None
        # Of the signal, or of the setting that gives the limit, once it is to stop
        self.name: str | None = None
        # While other processes are waited for there is nothing to lose, and nobody looks at `name`
        self.exit_immediately = False
        # Whether a signal raises Interrupted
        self.raises = False

    def __bool__(self) -> bool:
        return self.name is not None

    def install(self) -> "StopSignal":
        # Slurm can send SIGUSR1 before a job's time is over (--signal=USR1@60)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.receive)
        return self

    def limit(self, minutes: float | None) -> None:
        """Let the run stop in time to end so many minutes after its start; None: whenever."""
        if minutes is None:
            return
        self.time_limit = TimeLimit(minutes, self.started)
        # An alarm also interrupts what never looks, such as compiling
        signal.signal(signal.SIGALRM, self.receive)
        self.set_alarm(self.time_limit)
        # Python gives signals their usual meaning when it ends: an alarm would kill it then
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)

    def set_alarm(self, time_limit: TimeLimit) -> None:
        # 0 would switch it off
        signal.setitimer(signal.ITIMER_REAL, max(0.001, time_limit.seconds_left()))

    def expect_save(self, seconds: float) -> None:
        """Keep so much of a limited time free for saving."""
        if self.time_limit is not None and not self:
            self.time_limit.save_seconds = seconds
            self.set_alarm(self.time_limit)

    def require_time(self, seconds: float) -> None:
        """Become true where something that takes so long would end too late."""
        if not self and self.time_limit is not None and self.time_limit.seconds_left() < seconds:
            self.name = self.time_limit.describe()

    def is_at_limit(self) -> bool:
        """Whether the limit of time is reached, or so nearly that another process may be there."""
        return self.time_limit is not None and self.time_limit.seconds_left() < SECONDS_APART

    def check(self) -> None:
        """Raise Stopped where a signal has come, before there is anything to save."""
        if self:
            raise Stopped(f"stopped by {self.name} before the first step")

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within the block a signal raises Interrupted, wherever the main thread is.

        For long work that changes nothing which is not saved, such as compiling.
        """
        self.raises = True
        try:
            yield
        finally:
            self.raises = False

    def describe(self) -> str:
        """Name the signal or the limit, either of which may be another process's of the run."""
        if self.name is None and self.time_limit is not None:
            return f"{self.time_limit.describe()}, or a signal, of another process"
        return self.name or "a signal to another process"

    def receive(self, number: int, frame: FrameType | None) -> None:
        second_interrupt = self.name is not None and number == signal.SIGINT
        limit = self.time_limit if number == signal.SIGALRM else None
        if self.exit_immediately or second_interrupt:
            os._exit(128 + number if limit is None else Stopped.exit_code)
        self.name = signal.Signals(number).name if limit is None else limit.describe()
        # Nothing is raised elsewhere: in the middle of an import a library might swallow the
        # exception, and in the middle of a step the weights would be half updated
        if self.raises:
            raise Interrupted
