"""TODO: say what this file is for."""

import math
from collections.abc import Callable

from vit.errors import ConfigError


def every_interval(interval: float | None, total_steps: int) -> Callable[[int], bool]:
    """step → whether a multiple of `interval` steps, which need not be whole, has just been reached, or the end; with None
    never."""
    if interval is None:
        return lambda step: False
    return lambda step: (
        step == total_steps or (step > 0 and int(step / interval) > int((step - 1) / interval))
    )


Schedule = Callable[[int], float]


def duration_in_steps(value: float | str, total_steps: int, steps_per_epoch: float) -> int:
    """Steps from a share of the run (a number below 1), steps (1 or more) or epochs ("5ep"). Raises ConfigError otherwise."""
    if isinstance(value, str):
        number = value.removesuffix("ep").strip()
        if value.endswith("ep") and number.replace(".", "", 1).isdigit():
            return round(float(number) * steps_per_epoch)
        raise ConfigError(
            f"a duration is a share of the run (0.05), steps (500) or epochs (5ep), got {value}"
        )
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
    """step → factor on the learning rate, from 0 at step 0 to 1 after the warmup, then down to `final` at total_steps.

    cosine, linear: over the whole rest; constant: in a straight line over the last steps, `cooldown`, if any (Zhai et al.
    2022, arXiv:2106.04560, section 3.5). warmup, cooldown: see duration(). final: 0 where None. Raises ValueError for
    another name, and ConfigError where warmup and cooldown are as long as the run.
    """
    if name not in ("cosine", "linear", "constant"):
        raise ValueError(f"schedule must be cosine, linear or constant, got {name}")
    warmup_steps = duration_in_steps(warmup, total_steps, steps_per_epoch)
    cooldown_steps = duration_in_steps(cooldown or 0, total_steps, steps_per_epoch)
    if warmup_steps >= total_steps:
        raise ConfigError(
            f"schedule.warmup of {warmup_steps} steps leaves nothing of a run of {total_steps}; shorten it"
        )
    if warmup_steps + cooldown_steps > total_steps:
        raise ConfigError(
            f"schedule.warmup of {warmup_steps} and schedule.cooldown of {cooldown_steps} steps are more than "
            f"the run's {total_steps}; shorten them"
        )
    lowest = final or 0.0

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if name == "constant":
            left = total_steps - step
            return 1.0 if left >= cooldown_steps else lowest + (1 - lowest) * left / cooldown_steps
        progress = (step - warmup_steps) / (total_steps - warmup_steps)
        if name == "cosine":
            return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - (1 - lowest) * progress

    return factor
