"""Which kernels a step of training takes its time for, compiled and not.

    python benchmarks/gpu_profile.py --size vit_s16 --out table.md
    python benchmarks/gpu_profile.py --miniature     # a tiny model, on whatever is there

A piece of benchmarks/gpu.py. The table has the device's time of each kernel over a few steps, and
the host's time of what queues them; the time that no kernel fills is the device waiting.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.contestants import Contestant, make_step
from benchmarks.gpu_steps import BATCH_SIZES, precision_for
from benchmarks.reporting import Report, table_header, table_row
from benchmarks.timing import describe_machine, synchronize
from vit.runtime.device import choose_device
from vit.runtime.precision import Precision

WARMUP, STEPS, SHOWN = 3, 3, 25


def profile_steps(size: str, compiled: bool, precision: Precision) -> list[str]:
    """Return the table of one size's kernels, those with the most time first."""
    device = precision.device
    step = make_step(Contestant("ours", compiled), size, BATCH_SIZES[size], precision, True)
    for _ in range(WARMUP):
        step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        start = time.perf_counter()
        for _ in range(STEPS):
            step.run()
        synchronize(device)
        wall = time.perf_counter() - start

    kinds = profiled.key_averages()
    if device.type == "cuda":
        # Kernels alone: torch counts their time for the operations that queue them, too, and for
        # the spans that these are in, such as the optimizer's step
        kernels = [
            kind
            for kind in kinds
            if kind.device_type == DeviceType.CUDA and not kind.is_user_annotation
        ]
        events = [(kernel.self_device_time_total, kernel) for kernel in kernels]
    else:
        events = [(kind.self_cpu_time_total, kind) for kind in kinds]
    events.sort(key=lambda pair: pair[0], reverse=True)
    # In microseconds
    busy = sum(microseconds for microseconds, _ in events) / 1e6
    title = f"{size}, {BATCH_SIZES[size]}, {'compiled' if compiled else 'eager'}"
    lines = [
        f"{title}: {1e3 * wall / STEPS:.2f} ms a step, kernels fill {busy / wall:.0%} of it",
        "",
        table_header("kernel", "ms a step", "of all", "calls a step"),
    ]
    for microseconds, event in events[:SHOWN]:
        lines.append(
            table_row(
                event.key[:90].replace("|", "/"),
                f"{microseconds / 1e3 / STEPS:.3f}",
                f"{microseconds / 1e6 / busy:.1%}",
                f"{event.count / STEPS:.0f}",
            )
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", action="append", choices=BATCH_SIZES)
    parser.add_argument("--miniature", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--out", type=Path, help="write the tables here too, as Markdown")
    arguments = parser.parse_args()
    device = choose_device("auto")
    precision = precision_for(device)
    report = Report(arguments.out)
    report.add(f"{describe_machine(device)}, {precision.name}", "")
    default = ["vit_nano4"] if arguments.miniature else ["vit_s16"]
    for size in arguments.size or default:
        # Compiling a tiny model for a trial would take a minute
        for compiled in (False,) if arguments.miniature else (False, True):
            report.add(*profile_steps(size, compiled, precision))
            torch.compiler.reset()


if __name__ == "__main__":
    main()
