"""What a run shows while it trains: a progress bar in a terminal, elsewhere a line now and then."""

import logging
import math
import sys
import time

from tqdm import tqdm

from vit.text import format_duration

log = logging.getLogger("vit")

# How often the bar shows new numbers
SECONDS_BETWEEN_LOOKS = 1
# How often a line is printed where there is no bar
SECONDS_BETWEEN_LINES = 30


def print_line(line: str) -> None:
    """Print a line on standard output, above the bar where there is one."""
    tqdm.write(line, file=sys.stdout)
    # Into a file or a pipe lines would otherwise come minutes late, or never after a kill
    sys.stdout.flush()


class Console:
    """Shows the progress of a run. Steps count finished optimizer steps.

    first_step: where this session took the run up; steps_per_epoch: need not be whole; speaks:
    false in all but the first of several processes.
    """

    def __init__(
        self,
        *,
        first_step: int,
        total_steps: int,
        steps_per_epoch: float,
        epochs: int,
        batch_size: int,
        speaks: bool,
    ):
        self.first_step, self.total_steps = first_step, total_steps
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs
        self.batch_size = batch_size
        # In a file a bar would be thousands of lines
        self.has_bar = speaks and sys.stderr.isatty()
        self.bar: tqdm | None = None
        # Numbers of the last steps, as text
        self.latest = ""
        self.started = self.last_shown = time.monotonic()

    def advance(self, step: int) -> None:
        """Move the bar; called after every step. Does nothing where there is no terminal."""
        if not self.has_bar:
            return

        # One bar an epoch: it is made by the epoch's first step, and closed by its last
        epoch = self.epoch_of(step - 1)
        if self.bar is None:
            self.bar = self.new_bar(step - 1, epoch)
        self.bar.update(self.batch_size)
        if self.epoch_of(step) != epoch:
            self.close()

    def epoch_of(self, step: int) -> int:
        """Return the epoch, counted from 1, that the step after `step` belongs to."""
        return int(step / self.steps_per_epoch) + 1

    def new_bar(self, step: int, epoch: int) -> tqdm:
        """Return a bar over the images of an epoch, after `step` steps of the run."""
        # The first and the last step of the epoch, whose end need not be the end of a step
        begin = int((epoch - 1) * self.steps_per_epoch)
        end = min(self.total_steps, int(epoch * self.steps_per_epoch))
        return tqdm(
            total=(end - begin) * self.batch_size,
            initial=(step - begin) * self.batch_size,
            unit=" img",
            desc=f"epoch {epoch}/{self.epochs}",
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left{postfix}",
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def wants_numbers(self) -> bool:
        """Whether it is time to show the numbers of the last steps.

        Seldom, since reading them makes a GPU wait.
        """
        interval = SECONDS_BETWEEN_LINES if self.bar is None else SECONDS_BETWEEN_LOOKS
        return time.monotonic() - self.last_shown > interval

    def note_numbers(self, loss: float, top1: float, images_per_second: float, mfu: float) -> None:
        """Remember the numbers of the last steps for the next line.

        top1: NaN where images are mixed, so that it is unknown; mfu: see vit.runs.timing.Speed.
        """
        accuracy = "" if math.isnan(top1) else f"  top-1 {top1:.1%}"
        self.latest = f"loss {loss:.3f}{accuracy}  {images_per_second:.0f} img/s  MFU {mfu:.0%}"

    def show_numbers(
        self, step: int, loss: float, top1: float, images_per_second: float, mfu: float
    ) -> None:
        """Show the numbers of the last steps, in the bar or in a line; see note_numbers."""
        self.note_numbers(loss, top1, images_per_second, mfu)
        self.last_shown = time.monotonic()
        if self.bar is None:
            self.line(step)
            return
        accuracy = "" if math.isnan(top1) else f", top-1 {top1:.1%}"
        self.bar.set_postfix_str(f"loss {loss:.3f}{accuracy}, MFU {mfu:.0%}")

    def line(self, step: int, more: str = "") -> None:
        """Print a plain line: how far training is, its latest numbers, and `more`."""
        # Any line, such as that of an evaluation, puts the next one off
        self.last_shown = time.monotonic()
        epoch = min(step / self.steps_per_epoch, self.epochs)
        remaining = format_duration(self.seconds_left(step))
        log.info(
            f"epoch {epoch:5.1f}/{self.epochs}  step {step}  {self.latest}{more}  {remaining} left"
        )

    def seconds_left(self, step: int) -> float:
        """Estimate the remaining time from the speed of this session, evaluations included."""
        done = step - self.first_step
        if done <= 0:
            return 0.0
        seconds = time.monotonic() - self.started
        return seconds / done * (self.total_steps - step)
