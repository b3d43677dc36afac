"""Signals that ask a run to stop. Imports nothing heavy, so that the handler stands before torch is
imported.
"""

import os
import signal
from types import FrameType

from vit.errors import Stopped


class StopSignal:
    """Set by SIGTERM, SIGINT or SIGUSR1; training looks at it between micro-batches, saves and
    stops.

    The handler raises nothing itself: in the middle of an import a library might swallow the
    exception. A second SIGINT (Ctrl-C twice) ends the process at once; the last checkpoint on disk
    stays whole.
    """

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal, once one has come
        # While other processes are waited for there is nothing to lose, and nobody looks at `name`
        self.exit_immediately = False

    def __bool__(self) -> bool:
        return self.name is not None

    def install(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.receive)
        return self

    def check(self) -> None:
        """Raise Stopped where a signal has come before there is anything to save."""
        if self:
            raise Stopped(f"stopped by {self.name} before the first step")

    def describe(self) -> str:
        """The signal's name; another process of the run may have received it."""
        return self.name or "a signal to another process"

    def receive(self, number: int, frame: FrameType | None) -> None:
        second_interrupt = self.name is not None and number == signal.SIGINT
        if self.exit_immediately or second_interrupt:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
