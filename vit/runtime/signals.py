"""Signals that ask a run to stop. Imports nothing heavy, so that the handler stands before torch is imported."""

import os
import signal
from types import FrameType

from vit.errors import Stopped


class StopSignal:
    """Set by SIGTERM, SIGINT or SIGUSR1; the training loop looks at it between micro-steps, saves and ends.

    The handler raises nothing itself: in the middle of an import, a library may catch what it must not. A second SIGINT
    (Ctrl-C twice) ends the process at once; the last checkpoint on disk stays whole.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.at_once = False  # while other processes are waited for: then nothing is lost by ending, and nobody looks

    def install(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.receive)
        return self

    def check(self) -> None:
        """Before there is anything to save: raise Stopped where a signal has come."""
        if self.signal is not None:
            raise Stopped(f"stopped by {self.signal} before the first step")

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.at_once or (self.signal is not None and number == signal.SIGINT):
            os._exit(128 + number)
        self.signal = signal.Signals(number).name
