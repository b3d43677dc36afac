"""The time that a run may take from its start to its end, as a queue gives it: runtime.max_minutes.

Imports nothing heavy, as signals.py does.
"""

import time

# Kept free at the end, as a fraction of the limit and in seconds: for what Python takes before its
# first line and after its last, and for ending other processes
MARGIN, LEAST_MARGIN, MOST_MARGIN = 0.05, 3.0, 30.0
# Where the machine is busy or its disk slow, ending takes long as starting up did
MARGIN_OF_START = 0.5
# A save may take so much longer than the one before it
SAVE_FACTOR = 2.0


class TimeLimit:
    """When a run has to begin to save, so that it ends in time.

    minutes: that the whole may take; started: when it was started, by time.monotonic(). To be made
    when Python has imported what it needs.
    """

    def __init__(self, minutes: float, started: float):
        self.minutes = minutes
        seconds, starting = 60 * minutes, time.monotonic() - started
        margin = max(MARGIN * seconds, MARGIN_OF_START * starting, LEAST_MARGIN)
        margin = min(margin, MOST_MARGIN)
        self.ends = started + seconds - margin
        self.save_seconds = 0.0

    def seconds_left(self) -> float:
        """Return the seconds until the last save has to begin; below 0 where it is too late."""
        return self.ends - SAVE_FACTOR * self.save_seconds - time.monotonic()

    def describe(self) -> str:
        return f"runtime.max_minutes={self.minutes:g}"
