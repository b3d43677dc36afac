"""Signals that ask a run to stop. Imports nothing heavy, so that the handler stands before torch is imported."""

import os
import signal
from types import FrameType


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR1; the training loop looks at it between micro-steps, saves and ends.

    A second SIGINT (Ctrl-C twice) ends the process at once; the last checkpoint on disk stays whole.
    """

    def __init__(self) -> None:
        self.signal: str | None = None

    def install(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.receive)
        return self

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal = signal.Signals(number).name
