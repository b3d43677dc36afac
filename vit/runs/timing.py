"""Where a run's time goes: when to save, how long it will take, what limits its speed.

Nothing here changes the result of a run.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

# A kill repeats at most this much work; saving takes a second or so
SECONDS_BETWEEN_SAVES = 600
# Of steps, before their speed is taken for the run's
SECONDS_TO_A_FORECAST = 5
# Fractions of the whole above which something other than computing is named as the bottleneck
DATA_FRACTION, EVALUATION_FRACTION, SAVING_FRACTION, FIRST_STEP_FRACTION = 0.1, 0.3, 0.05, 0.25
# Below this fraction of its rate a GPU waits for the host between small kernels
LOW_GPU_MFU = 0.3


@dataclass
class Spent:
    """Seconds of this process by purpose, as the host sees them.

    data: waiting for batches; first_step: apart from the others, since it may compile. On a GPU the
    host only queues the steps, and waits for the device where it reads numbers: both are within
    `steps`, and the other purposes begin when the device has done all that was queued.
    """

    data: float = 0.0
    steps: float = 0.0
    first_step: float = 0.0
    evaluation: float = 0.0
    saving: float = 0.0

    def total(self) -> float:
        return self.data + self.steps + self.first_step + self.evaluation + self.saving


class Clock:
    """The wall time of a run.

    first_step: the number of finished steps when this session took the run up; seconds_before: what
    the sessions before it spent.
    """

    def __init__(self, first_step: int, seconds_before: float):
        self.first_step, self.seconds_before = first_step, seconds_before
        self.spent = Spent()
        # Monotonic, since the time of day may be set while a run trains
        self.started = self.last_save = time.monotonic()
        # When the first step of this session was done, which may have compiled the model
        self.after_first_step: float | None = None
        self.forecast_done = False

    @contextlib.contextmanager
    def during(self, purpose: str) -> Iterator[None]:
        """Count the time of the block as spent on a purpose, a field of Spent."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.count(purpose, time.perf_counter() - start)

    def count(self, purpose: str, seconds: float) -> None:
        """Count seconds as spent on a purpose, a field of Spent."""
        setattr(self.spent, purpose, getattr(self.spent, purpose) + seconds)

    def total_seconds(self) -> float:
        """Return the seconds of all sessions that have worked on the run, this one included."""
        return self.seconds_before + time.monotonic() - self.started

    def saved(self) -> None:
        self.last_save = time.monotonic()

    def save_due(self, step: int, every: int | None) -> bool:
        """Whether to save after `step` finished steps.

        every: train.save_every in steps; None: by the clock.
        """
        # What was resumed from is still on the disk
        if step <= self.first_step:
            return False
        if every is not None:
            return step % every == 0
        return time.monotonic() - self.last_save > SECONDS_BETWEEN_SAVES

    def forecast_due(self, step: int) -> bool:
        """Whether it is time for a forecast of the run's length: once, after a few steps."""
        now = time.monotonic()
        steps_done = step - self.first_step
        if steps_done == 1:
            self.after_first_step = now
        if self.forecast_done or self.after_first_step is None or steps_done < 2:
            return False
        self.forecast_done = now - self.after_first_step > SECONDS_TO_A_FORECAST
        return self.forecast_done

    def seconds_per_step(self, step: int) -> float:
        """Return the mean time of a step of this session, evaluations included; 0 before the first.

        The first one is left out where there are others, since it may compile.
        """
        since, steps = self.started, step - self.first_step
        if self.after_first_step is not None and steps > 1:
            since, steps = self.after_first_step, steps - 1
        return (time.monotonic() - since) / steps if steps > 0 else 0.0


class Cost(NamedTuple):
    """What one image costs.

    macs: multiply-adds of a forward pass; nominal_flops: FLOPs of training, a teacher's pass
    included. What is computed a second time (activation checkpointing) does not count: it brings
    training no further. Both are of the whole architecture, as papers have it;
    vit.model.cost.training_flops counts what is really done.
    """

    macs: int
    nominal_flops: float


class Speed:
    """Turns images per second into MFU: the fraction of the device's rate in large matrix products.

    product_rate: FLOP/s of all processes together, as vit.runtime.device.product_rate measures it.
    """

    def __init__(self, cost: Cost, product_rate: float):
        self.cost = cost
        self.product_rate = product_rate

    def mfu(self, images_per_second: float) -> float:
        """Return the MFU of a speed, between 0 and 1."""
        rate = self.cost.nominal_flops * images_per_second
        # The product rate was measured too low where the machine was busy
        self.product_rate = max(self.product_rate, rate)
        return rate / self.product_rate


@dataclass(frozen=True)
class Circumstances:
    """What decides which setting would make a run faster.

    could_compile, could_use_bf16: whether it pays on this device at this width; from_files: images
    are decoded from files by `workers` processes; cores: that there are for these.
    """

    device: str
    precision: str
    compiled: bool
    could_compile: bool
    could_use_bf16: bool
    from_files: bool
    workers: int
    cores: int


def bottleneck(spent: Spent, mfu: float, run: Circumstances) -> str:
    """Say in one line what limited a run most, and which setting would help.

    mfu: of the steps alone, without evaluations and pauses.
    """
    # Not zero, in a run that was resumed at its end
    total = max(spent.total(), 1e-9)
    data, evaluation, saving = spent.data / total, spent.evaluation / total, spent.saving / total
    fractions = f"data {data:.0%}, evaluation {evaluation:.0%}, saving {saving:.0%}"

    # The easiest to change first
    if data > DATA_FRACTION:
        return f"bottleneck: waiting for data ({fractions}); {data_advice(run)}"
    if evaluation > EVALUATION_FRACTION:
        return f"bottleneck: evaluation ({fractions}); a larger train.eval_every would help"
    if saving > SAVING_FRACTION:
        return f"bottleneck: saving ({fractions}); a larger train.save_every would help"
    if run.compiled and spent.first_step > FIRST_STEP_FRACTION * total:
        return (
            f"bottleneck: compiling ({spent.first_step:.0f} s of {total:.0f}); "
            "runtime.compile=false would help so short a run"
        )

    rate = f"steps at {mfu:.0%} of the device's matrix-product rate"
    return f"bottleneck: computing ({rate}; {fractions}); {computing_advice(mfu, run)}"


def data_advice(run: Circumstances) -> str:
    if not run.from_files:
        return "a lighter augment would help"
    if run.workers < run.cores:
        return f"runtime.workers={run.cores} would help"
    return "smaller files would help (python -m vit.shrink), or a lighter augment"


def computing_advice(mfu: float, run: Circumstances) -> str:
    if run.could_use_bf16 and run.precision == "fp32":
        return "train.precision=bf16 would help"
    if run.could_compile and not run.compiled:
        return "runtime.compile=true would help a longer run"
    if run.device == "cuda" and mfu < LOW_GPU_MFU:
        return "the steps are small for this device: a larger train.batch_size would use it better"
    return "only a smaller model, a smaller image_size or a faster device would help"
