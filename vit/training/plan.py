"""The run's only clock: epochs and fractions become steps here, once.

Schedules are pure functions of the step and hold no state, so nothing of them need be saved.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vit.errors import ConfigError

if TYPE_CHECKING:
    from vit.training.state import Progress

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Plan:
    """How long a run is, and what is due when. Steps count finished optimizer steps.

    steps_per_epoch: need not be whole; batch_size: global; schedule: step → factor on the learning
    rate. eval_every, attention_every: in epochs; log_every, save_every: in steps; save_every None:
    by the clock. patience: evaluations in a row without improvement that end the run; None: it ends
    after its last step.
    """

    total_steps: int
    steps_per_epoch: float
    batch_size: int
    schedule: Schedule
    eval_every: float
    attention_every: float | None
    log_every: int
    save_every: int | None
    patience: int | None = None

    def evaluation_due(self, step: int) -> bool:
        return due_every(self.eval_every * self.steps_per_epoch, step, self.total_steps)

    def evaluations(self, step: int) -> int:
        """Return how many evaluations are due up to a step, itself included."""
        # At most one a step, however short the interval
        interval = max(1.0, self.eval_every * self.steps_per_epoch)
        if step == self.total_steps:
            return int((step - 1) / interval) + 1
        return int(step / interval)

    def out_of_patience(self, progress: "Progress") -> bool:
        """Whether the last `patience` evaluations, up to the one just made, brought no improvement.

        From the steps alone, so that there is no counter to be saved.
        """
        step, best_step = progress.step, progress.best_step
        if self.patience is None or best_step is None or progress.evaluated_step != step:
            return False
        return self.evaluations(step) - self.evaluations(best_step) >= self.patience

    def describe_end(self, progress: "Progress") -> str:
        """Say why a run that has come to its end did so."""
        if progress.step < self.total_steps and self.out_of_patience(progress):
            return (
                f"train.patience={self.patience}: no improvement since step {progress.best_step}, "
                f"so it ended after step {progress.step} of {self.total_steps}"
            )
        return "all steps done"

    def attention_due(self, step: int) -> bool:
        if self.attention_every is None:
            return False
        return due_every(self.attention_every * self.steps_per_epoch, step, self.total_steps)

    def log_due(self, step: int) -> bool:
        # Before each evaluation too, so that train and val have points at the same steps
        return step % self.log_every == 0 or self.evaluation_due(step)

    @property
    def epochs(self) -> int:
        """The run's length in epochs, rounded, at least 1."""
        return max(1, round(self.total_steps / self.steps_per_epoch))


def due_every(interval: float, step: int, total_steps: int) -> bool:
    """Whether a multiple of `interval` steps has just been reached, or the end.

    interval: need not be whole; half an epoch of 7 steps is 3.5.
    """
    if step == total_steps:
        return True
    # From the step alone, without a counter, so that a resumed run has the same times
    return step > 0 and int(step / interval) > int((step - 1) / interval)


def duration_in_steps(value: float | str, total_steps: int, steps_per_epoch: float) -> int:
    """Turn a fraction of the run (below 1), steps (1 or more) or epochs ("5ep") into steps.

    Raises ConfigError for anything else.
    """
    if isinstance(value, str):
        number = value.removesuffix("ep").strip()
        if value.endswith("ep") and number.replace(".", "", 1).isdigit():
            return round(float(number) * steps_per_epoch)
        raise ConfigError(
            f"a duration is a fraction of the run (0.05), steps (500) or epochs (5ep), got {value}"
        )
    # 1 is one step: a warmup of the whole run would make no sense
    return round(value * total_steps) if value < 1 else round(value)


def build_schedule(
    *,
    name: str,
    warmup: float | str,
    final: float | None,
    cooldown: float | str | None,
    total_steps: int,
    steps_per_epoch: float,
) -> Schedule:
    """Return the function step → factor on the learning rate.

    It rises from 0 at step 0 to 1 after the warmup, and then falls to `final` (0 where None) at the
    end: over the whole rest for cosine (Loshchilov & Hutter 2017, arXiv:1608.03983) and linear; in
    a straight line over the last steps, `cooldown`, if any, for constant (Zhai et al. 2022,
    arXiv:2106.04560, section 3.5). warmup, cooldown: see duration_in_steps.

    Raises ValueError for another name, and ConfigError where warmup and cooldown leave no step.
    """
    if name not in ("cosine", "linear", "constant"):
        raise ValueError(f"schedule must be cosine, linear or constant, got {name}")

    warmup_steps = duration_in_steps(warmup, total_steps, steps_per_epoch)
    cooldown_steps = duration_in_steps(cooldown or 0, total_steps, steps_per_epoch)
    if warmup_steps >= total_steps:
        raise ConfigError(
            f"schedule.warmup of {warmup_steps} steps leaves nothing of a run of {total_steps}; "
            "shorten it"
        )
    if warmup_steps + cooldown_steps > total_steps:
        raise ConfigError(
            f"schedule.warmup of {warmup_steps} and schedule.cooldown of {cooldown_steps} steps "
            f"are more than the run's {total_steps}; shorten them"
        )
    lowest = final or 0.0

    # Steps count from 0: the first one is made at rate 0 where there is a warmup, and the last one
    # a step above `final`, as in the published schedules
    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        # The cooldown counts from the end, so that a longer run has the same steps before it
        if name == "constant":
            steps_left = total_steps - step
            if steps_left >= cooldown_steps:
                return 1.0
            return lowest + (1 - lowest) * steps_left / cooldown_steps
        progress = (step - warmup_steps) / (total_steps - warmup_steps)
        if name == "cosine":
            return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - (1 - lowest) * progress

    return factor
