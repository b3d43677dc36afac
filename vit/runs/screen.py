"""The screen of a run, which is never silent for long.

In a terminal something always moves: a progress bar over the images of an epoch, or a line that
says what is being done and for how long. Elsewhere, in a file or a pipe, a plain line comes now and
then. A thread of its own keeps it so while the main thread reads data, compiles or computes a step.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

from vit.files import discard_output
from vit.runtime.signals import StopSignal
from vit.text import format_duration

# How often the moving line is renewed
TICK_SECONDS = 1.0
# After how much silence a plain line comes: soon while a person may be waiting for the first signs
# of life, later seldom, so that the log of a run of days stays short
SILENCE_SECONDS, LATER_SILENCE_SECONDS = 8.0, 60.0
SECONDS_OF_SHORT_SILENCE = 600.0
# After so long, the bar mentions what the run is doing
LONG_ACTIVITY_SECONDS = 3.0

# What a signal does. A step may take a minute, in which a person wants to know
STOPPING = "saving and stopping as soon as this is done; Ctrl-C again ends at once, without saving"


class Screen:
    """Writes the lines of a run, and says what it is doing where nothing else is written.

    speaks: false in all but the first of several processes, which then write nothing. stop: the
    signals, of which a person is told that they have come.
    """

    def __init__(self, speaks: bool = True, stop: StopSignal | None = None):
        self.speaks = speaks
        self.stop = stop
        self.said_stopping = False
        # In a file a moving line would be thousands of lines
        self.is_terminal = speaks and sys.stderr.isatty()
        self.bar: tqdm | None = None
        self.bar_title = ""
        self.moving_line: tqdm | None = None
        self.activity: str | None = None
        self.started = self.last_line = self.activity_started = time.monotonic()
        self.stopped = threading.Event()
        # A line that the thread has just begun must not stay when the activity ends
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.run, daemon=True, name="screen")

    def __enter__(self) -> "Screen":
        if self.speaks:
            self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join()
        self.doing(None)
        self.close_bar()

    def print(self, line: str) -> None:
        """Print a line on standard output, above the bar where there is one."""
        if not self.speaks:
            return
        try:
            tqdm.write(line, file=sys.stdout)
            # Into a file or a pipe lines would otherwise come minutes late, or never after a kill
            sys.stdout.flush()
        except OSError:
            # Whoever read them, such as tee, has gone. The run goes on, and train.log has the lines
            discard_output()
        self.last_line = time.monotonic()

    def doing(self, activity: str | None) -> None:
        """Note what the run is doing from now on, such as "reading the data"; None: nothing."""
        with self.lock:
            self.activity = activity
            self.activity_started = time.monotonic()
            if activity is None and self.moving_line is not None:
                self.moving_line.close()
                self.moving_line = None

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Inside: the run is doing this; afterwards what it was doing before."""
        before, since = self.activity, self.activity_started
        self.doing(activity)
        try:
            yield
        finally:
            self.doing(before)
            self.activity_started = since

    def open_bar(self, bar: tqdm) -> None:
        """Show a progress bar, which is kept alive from now on."""
        self.doing(None)
        self.bar, self.bar_title = bar, bar.desc

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def run(self) -> None:
        """Keep the screen alive, in a thread of its own."""
        while not self.stopped.wait(TICK_SECONDS):
            # The screen is a convenience: whatever closes it must not end the run
            with contextlib.suppress(OSError, ValueError), self.lock:
                self.tick()

    def tick(self) -> None:
        """Renew the moving line, or print a plain one where it has been silent for too long."""
        activity, bar = self.activity, self.bar
        now = time.monotonic()
        if self.stop and not self.said_stopping:
            self.said_stopping = True
            self.print(f"{self.stop.describe()}: {STOPPING}")
        if bar is not None:
            self.keep_bar_alive(bar, activity, now - self.activity_started)
        elif activity is None:
            return
        elif self.is_terminal:
            self.move_line(f"{activity}  {format_duration(now - self.activity_started)}")
        elif now - self.last_line >= self.allowed_silence(now):
            elapsed = format_duration(now - self.activity_started)
            self.print(f"… {activity}, {elapsed} so far")

    def keep_bar_alive(self, bar: tqdm, activity: str | None, seconds: float) -> None:
        """Renew the bar, which only finished steps move; a step that takes long is mentioned."""
        title = self.bar_title
        if activity is not None and seconds > LONG_ACTIVITY_SECONDS:
            title += f", {activity} {format_duration(seconds)}"
        bar.set_description_str(title)

    def allowed_silence(self, now: float) -> float:
        """Seconds without a line after which a plain one is due."""
        young = now - self.started < SECONDS_OF_SHORT_SILENCE
        return SILENCE_SECONDS if young else LATER_SILENCE_SECONDS

    def move_line(self, text: str) -> None:
        if self.moving_line is None:
            self.moving_line = tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True)
        self.moving_line.set_description_str(text)
