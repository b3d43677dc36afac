"""Where a run's time goes: when to save, how long it will take, and what would make it faster."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

SECONDS_BETWEEN_SAVES = 600


SECONDS_TO_A_FORECAST = 5


# Shares of the whole above which something other than computing is named as the bottleneck
DATA_SHARE, EVALUATION_SHARE, SAVING_SHARE, FIRST_STEP_SHARE = 0.1, 0.3, 0.05, 0.25


LOW_GPU_MFU = 0.3


@dataclass
class Spent:
    """Seconds of this process, by purpose; `data` is what the loop waited for batches. On a GPU the host is what is timed: it
    waits for the device where it reads numbers, which is within `steps`."""

    data: float = 0.0
    steps: float = 0.0
    first_step: float = 0.0  # apart, since it may compile
    evaluation: float = 0.0
    saving: float = 0.0

    def total(self) -> float:
        return sum(vars(self).values())


@dataclass
class Clock:
    """Wall time of a run. `step` is the number of finished steps when this process took it up, `seconds` what was spent by
    those before it."""

    step: int
    seconds: float
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        self.first_step, self.seconds_before, self.began = self.step, self.seconds, time.monotonic()
        self.saved, self.after_first_step, self.told = self.began, 0.0, False

    @contextlib.contextmanager
    def during(self, purpose: str) -> Iterator[None]:
        """Count the time inside as spent on a purpose, a field of Spent."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self.spent, purpose, getattr(self.spent, purpose) + time.perf_counter() - began)

    def now(self) -> float:
        """Seconds of all processes that worked on the run."""
        return self.seconds_before + time.monotonic() - self.began

    def save_due(self, step: int, every: int | None) -> bool:
        if step <= self.first_step:
            return False
        return (
            step % every == 0
            if every is not None
            else time.monotonic() - self.saved > SECONDS_BETWEEN_SAVES
        )

    def seconds_a_step(self, step: int) -> float:
        return (time.monotonic() - self.after_first_step) / (step - self.first_step - 1)

    def forecast_due(self, step: int) -> bool:
        """Once, after a few steps; the first is left out of the estimate, since it may compile."""
        now, done = time.monotonic(), step - self.first_step
        if done == 1:
            self.after_first_step = now
        due = not self.told and done > 2 and now - self.after_first_step > SECONDS_TO_A_FORECAST
        self.told = self.told or due
        return due


def bottleneck(
    spent: Spent,
    mfu: float,
    *,
    device: str,
    precision: str,
    compiled: bool,
    could_compile: bool,
    could_bf16: bool,
    from_files: bool,
    workers: int,
    cores: int,
) -> str:
    """One line: what most limited the run, and the setting that would help.

    mfu: floating-point operations a second of the steps over what the device does in large products; could_…: whether it pays
    on this device at this width.
    """
    total = max(spent.total(), 1e-9)
    shares = f"data {spent.data / total:.0%}, evaluation {spent.evaluation / total:.0%}, saving {spent.saving / total:.0%}"
    rate = f"steps at {mfu:.0%} of the device's matrix-product rate"
    if spent.data > DATA_SHARE * total:
        if not from_files:
            advice = "a lighter augment would help"
        elif workers < cores:
            advice = f"runtime.workers={cores} would help"
        else:
            advice = "smaller files would help (python -m vit.shrink), or a lighter augment"
        return f"bottleneck: waiting for data ({shares}); {advice}"
    if spent.evaluation > EVALUATION_SHARE * total:
        return f"bottleneck: evaluation ({shares}); a larger train.eval_every would help"
    if spent.saving > SAVING_SHARE * total:
        return f"bottleneck: saving ({shares}); a larger train.save_every would help"
    if compiled and spent.first_step > FIRST_STEP_SHARE * total:
        return (
            f"bottleneck: compiling ({spent.first_step:.0f} s of {total:.0f}); runtime.compile=false would help so short a "
            "run"
        )
    if could_bf16 and precision == "fp32":
        advice = "train.precision=bf16 would help"
    elif could_compile and not compiled:
        advice = "runtime.compile=true would help a longer run"
    elif device == "cuda" and mfu < LOW_GPU_MFU:
        advice = (
            "the steps are small for this device: a larger train.batch_size would use it better"
        )
    else:
        advice = "only a smaller model, a smaller image_size or a faster device would help"
    return f"bottleneck: computing ({rate}; {shares}); {advice}"
