"""How the benchmarks measure time, and on which machine they did."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch

from vit.runtime.device import describe_device

Name = TypeVar("Name")


def describe_machine(device: torch.device) -> str:
    """Describe what a figure depends on: the device, the processor, torch's version and the day."""
    device_name = describe_device(device)
    return f"{device_name}, {processor_name()}, torch {torch.__version__}, {date.today()}"


def processor_name() -> str:
    # platform knows no more than the architecture on Linux
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time one call, with the work that it queues on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(
    call: Callable[[], object], device: torch.device, *, warmup: int, repeats: int
) -> float:
    """Time several calls, after as many as `warmup` that are not counted."""
    times = [seconds_of(call, device) for _ in range(warmup + repeats)]
    return statistics.median(times[warmup:])


def take_turns(
    measurements: Mapping[Name, Callable[[], float]], rounds: int
) -> dict[Name, list[float]]:
    """Measure every one of several things once in every round.

    A machine that slows down for a while then slows all of them down. Returns the values of each,
    one a round.
    """
    values: dict[Name, list[float]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measure in measurements.items():
            values[name].append(measure())
    return values


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over the rounds of the quotients of two things measured in turn."""
    pairs = zip(numerators, denominators, strict=True)
    return statistics.median(numerator / denominator for numerator, denominator in pairs)
