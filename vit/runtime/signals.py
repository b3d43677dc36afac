"""Signals that ask a run to stop.

Imports nothing heavy, so that the handler can be installed before torch is imported.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from vit.errors import Stopped


class Interrupted(BaseException):
    """A signal came within StopSignal.interrupting().

    Not an Exception, since libraries turn those into errors of their own.
    """


class StopSignal:
    """Is true once SIGTERM, SIGINT or SIGUSR1 has come; training then saves and stops.

    Training looks at it between micro-batches. A second SIGINT (Ctrl-C twice) ends the process at
    once; the last checkpoint on disk stays whole.
    """

    def __init__(self) -> None:
        # Of the signal, once one has come
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
        """Name the signal, which another process of the run may have received."""
        return self.name or "a signal to another process"

    def receive(self, number: int, frame: FrameType | None) -> None:
        second_interrupt = self.name is not None and number == signal.SIGINT
        if self.exit_immediately or second_interrupt:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        # Nothing is raised elsewhere: in the middle of an import a library might swallow the
        # exception, and in the middle of a step the weights would be half updated
        if self.raises:
            raise Interrupted
