"""The progress of a run on its screen: a bar in a terminal, elsewhere a line now and then."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from vit.runs.screen import Screen
from vit.runs.selection import describe
from vit.runs.timing import Clock
from vit.text import format_duration

log = logging.getLogger("vit")

# How much sooner finished steps report than the screen mentions an unfinished one
HEAD_START_SECONDS = 2.5
# How often the bar shows new numbers
SECONDS_BETWEEN_LOOKS = 1
# Evaluations that each get a line; of more, those at round fractions of the run do
MAX_EVALUATION_LINES = 20
# A run whose validation has not improved over this fraction of all its evaluations is told so
STALE_FRACTION, MIN_STALE_EVALUATIONS = 0.25, 5


@dataclass(frozen=True)
class Numbers:
    """Means over the last steps.

    top1: NaN where images are mixed, so that it is unknown; mfu: see vit.runs.timing.Speed.
    """

    loss: float
    top1: float
    images_per_second: float
    mfu: float

    def describe(self) -> str:
        accuracy = "" if math.isnan(self.top1) else f"  top-1 {self.top1:.1%}"
        speed = f"{self.images_per_second:.0f} img/s  MFU {self.mfu:.0%}"
        return f"loss {self.loss:.3f}{accuracy}  {speed}"

    def describe_briefly(self) -> str:
        """For the bar, which shows the speed itself."""
        accuracy = "" if math.isnan(self.top1) else f", top-1 {self.top1:.1%}"
        return f"loss {self.loss:.3f}{accuracy}, MFU {self.mfu:.0%}"


class Console:
    """Shows the progress of a run. Steps count finished optimizer steps.

    clock: of the run, which knows where this session took it up; steps_per_epoch: need not be
    whole; evaluations: how many the whole run makes; compiles: the first step compiles the model.
    """

    def __init__(
        self,
        screen: Screen,
        clock: Clock,
        *,
        total_steps: int,
        steps_per_epoch: float,
        epochs: int,
        batch_size: int,
        evaluations: int,
        compiles: bool = False,
    ):
        self.screen, self.clock = screen, clock
        self.first_step, self.total_steps = clock.first_step, total_steps
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs
        self.batch_size = batch_size
        self.evaluations, self.compiles = evaluations, compiles
        self.since_best = 0
        self.said_stale = False
        self.latest = ""
        self.last_look = time.monotonic()

    def next_step(self, step: int) -> None:
        """Note that step `step` is being made, for when it takes long."""
        is_first = step == self.first_step + 1
        note = ", which compiles the model" if is_first and self.compiles else ""
        self.screen.doing(f"step {step}{note}")

    def advance(self, step: int) -> None:
        """Move the bar; called after every step. Does nothing where there is no terminal."""
        if not self.screen.is_terminal:
            return

        # One bar an epoch: it is made by the epoch's first step, and closed by its last
        epoch = self.epoch_of(step - 1)
        if self.screen.bar is None:
            self.screen.open_bar(self.new_bar(step - 1, epoch))
        assert self.screen.bar is not None
        self.screen.bar.update(self.batch_size)
        if self.epoch_of(step) != epoch:
            self.screen.close_bar()

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
            desc=f"epoch {epoch}/{max(epoch, self.epochs)}",
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left{postfix}",
        )

    def wants_numbers(self, step: int) -> bool:
        """Whether it is time to show the numbers of the last steps.

        Right after the first step, then seldom, since reading them makes a GPU wait.
        """
        if step == self.first_step + 1:
            return True
        now = time.monotonic()
        if self.screen.bar is not None:
            return now - self.last_look > SECONDS_BETWEEN_LOOKS
        # Before the screen would mention the step that is being made
        return now - self.screen.last_line > self.screen.allowed_silence(now) - HEAD_START_SECONDS

    def show_numbers(self, step: int, numbers: Numbers) -> None:
        """Show the numbers of the last steps, in the bar or in a line."""
        self.latest = numbers.describe()
        self.last_look = time.monotonic()
        if self.screen.bar is not None and step > self.first_step + 1:
            self.screen.bar.set_postfix_str(numbers.describe_briefly())
        else:
            self.line(step)

    def note_numbers(self, numbers: Numbers) -> None:
        """Remember the numbers of the last steps for the next line."""
        self.latest = numbers.describe()

    def evaluated(
        self,
        step: int,
        number: int,
        metrics: Mapping[str, float],
        improved: bool,
        beside: Sequence[str] = (),
    ) -> None:
        """Report an evaluation on the validation split, the `number`-th of the run.

        beside: names of metrics to show beside loss and top-1.
        """
        self.since_best = 0 if improved else self.since_best + 1
        if self.is_shown(number):
            best = "  best so far" if improved else ""
            loss, top1 = metrics["loss"], metrics["top1"]
            more = "".join(f"  {describe(name, metrics[name])}" for name in beside)
            self.line(step, f"  val loss {loss:.3f}  val top-1 {top1:.2%}{more}{best}")
        self.say_stale_once()

    def is_shown(self, number: int) -> bool:
        """Whether an evaluation gets a line: all of a few, else those at round fractions."""
        if self.evaluations <= MAX_EVALUATION_LINES or number == 1:
            return True
        lines_before = (number - 1) * MAX_EVALUATION_LINES // self.evaluations
        return number * MAX_EVALUATION_LINES // self.evaluations > lines_before

    def say_stale_once(self) -> None:
        """Say once that validation has stopped improving."""
        patience = max(MIN_STALE_EVALUATIONS, math.ceil(STALE_FRACTION * self.evaluations))
        if self.said_stale or self.since_best < patience:
            return
        self.said_stale = True
        log.info(
            f"note   validation has not improved in the last {self.since_best} evaluations; "
            "the best weights are kept, and Ctrl-C stops the run so that it can be resumed"
        )

    def line(self, step: int, more: str = "") -> None:
        """Print a plain line: how far training is, its latest numbers, and `more`."""
        epoch = min(step / self.steps_per_epoch, self.total_steps / self.steps_per_epoch)
        line = f"epoch {epoch:5.1f}/{self.epochs}  step {step}  {self.latest}{more}"
        # A step that compiled says nothing about those to come
        if self.compiles and step == self.first_step + 1:
            log.info(line)
        else:
            log.info(f"{line}  {format_duration(self.seconds_left(step))} left")

    def seconds_left(self, step: int) -> float:
        """Estimate the remaining time from the speed of this session, evaluations included."""
        return self.clock.seconds_per_step(step) * (self.total_steps - step)
