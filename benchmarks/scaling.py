"""How training scales over processes: measured here, or calculated for GPUs that are not here.

    python benchmarks/scaling.py           # one process against several on this machine's cores
    python benchmarks/scaling.py --paper --step-seconds vit_b16=0.062 --link-GB 450

On paper: data-parallel training sends each gradient twice through every GPU's link (reduce-scatter
and all-gather of a ring, 2 (N - 1) / N of its bytes) while the backward pass, two thirds of a step,
is computed. What does not fit beside it is waited for, and so is the last bucket at least.
Stragglers and the input are left out, so the result is an upper bound. --step-seconds are those of
one GPU; without them a step takes 6 x multiply-adds x batch at 50 % of --peak-TFLOPs.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.contestants import flops_per_image, ours_on_meta
from benchmarks.reporting import table_header, table_row
from benchmarks.timing import median_ratio, take_turns
from benchmarks.training_runs import ROOT, train_command
from vit.files import read_jsonl
from vit.runtime.cores import usable_cores

RUN = [
    "data=synthetic",
    "data.num_images=2560",
    "data.num_classes=10",
    "data.val_fraction=0",
    "data.limit=512",
    "model=vit_ti4",
    "train.batch_size=128",
    "train.steps=14",
    "train.log_every=1",
    "train.precision=fp32",
    "train.ema_decay=0",
    "runtime.compile=false",
]
WARMUP_STEPS = 4

# On paper: images of a step on each GPU, by the model's size
BATCH_SIZES = {"vit_s16": 256, "vit_b16": 256, "vit_l16": 128}
BACKWARD_FRACTION = 2 / 3  # of a step's time
# Bytes that DistributedDataParallel sends at once; nothing is left to compute beside the last
BUCKET_BYTES = 25e6
# Of the GPU's matrix products, in FLOP/s, where a step's time is not given
USUAL_UTILIZATION = 0.5


def images_per_second(processes: int, threads: int) -> float:
    """Return the median rate of the later steps of a run. Exits where the run fails."""
    overrides = [*RUN, f"runtime.threads={threads}"]
    if processes > 1:
        overrides.append(f"runtime.processes={processes}")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        finished = subprocess.run(
            train_command(overrides, folder),
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        if finished.returncode != 0:
            sys.exit(f"{finished.stderr}\nthe run failed, exit code {finished.returncode}")
        rows = read_jsonl(folder / "timing.jsonl")
    return statistics.median(row["images_per_second"] for row in rows[WARMUP_STEPS:])


def measure(rounds: int) -> None:
    """Print the rates of one process and of several, on this machine's cores."""
    cores = usable_cores()
    one_thread = "1 process, 1 thread"
    # (processes, threads of each)
    cases = {
        one_thread: (1, 1),
        f"1 process, {cores} threads": (1, cores),
        f"{cores} processes, 1 thread each": (cores, 1),
    }
    runs = {case: functools.partial(images_per_second, *counts) for case, counts in cases.items()}
    rates = take_turns(runs, rounds)

    print(f"{cores} cores, {date.today()}, vit_ti4 at 32 px, fp32, batch 128\n")
    print(table_header("", "images/s", f"of {cores} times one thread's"))
    for case, values in rates.items():
        fraction = median_ratio(values, rates[one_thread]) / cores
        print(table_row(case, f"{statistics.median(values):.1f}", f"{fraction:.0%}"))


def sending_seconds(gradient_bytes: float, gpus: int, link_rate: float) -> float:
    """Return how long a ring of GPUs takes to add up their gradients; link_rate: bytes/s."""
    return 2 * (gpus - 1) / gpus * gradient_bytes / link_rate


def efficiency(step_seconds: float, gradient_bytes: float, sending: float) -> float:
    """Return the fraction of a step's time in which a GPU computes; sending: seconds."""
    not_hidden = sending - BACKWARD_FRACTION * step_seconds
    last_bucket = sending * min(1, BUCKET_BYTES / gradient_bytes)
    return step_seconds / (step_seconds + max(not_hidden, last_bucket))


def calculate(
    given_seconds: dict[str, float], peak_rate: float, link_rate: float, node_link_rate: float
) -> None:
    """Print the efficiency of 8 GPUs of a machine, and of 64 of several, gradients in float32.

    given_seconds: of one GPU's step, by the model's size; peak_rate: FLOP/s of a GPU; link_rate,
    node_link_rate: bytes/s that a GPU sends within a machine, and to other machines.
    """
    print(
        f"links {link_rate / 1e9:g} GB/s within a machine, {node_link_rate / 1e9:g} GB/s a GPU "
        "between machines, each way\n"
    )
    print(
        table_header(
            "model, images a GPU", "step of one GPU, ms", "gradients, MB", "8 GPUs", "64 GPUs"
        )
    )
    for size, batch_size in BATCH_SIZES.items():
        step_seconds = given_seconds.get(size)
        if step_seconds is None:
            flops = batch_size * flops_per_image(size, training=True)
            step_seconds = flops / (USUAL_UTILIZATION * peak_rate)
        gradient_bytes = 4 * ours_on_meta(size).num_parameters()

        cells = [
            f"{size}, {batch_size}",
            f"{1e3 * step_seconds:.1f}",
            f"{gradient_bytes / 1e6:.0f}",
        ]
        for gpus, rate in ((8, link_rate), (64, node_link_rate)):
            sending = sending_seconds(gradient_bytes, gpus, rate)
            fraction = efficiency(step_seconds, gradient_bytes, sending)
            cells.append(f"{fraction:.1%} (sending takes {1e3 * sending:.1f} ms)")
        print(table_row(*cells))


def model_and_seconds(text: str) -> tuple[str, float]:
    """Parse MODEL=SECONDS. Raises ValueError."""
    name, seconds = text.split("=")
    return name, float(seconds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument(
        "--step-seconds",
        action="append",
        default=[],
        type=model_and_seconds,
        metavar="MODEL=SECONDS",
    )
    parser.add_argument(
        "--peak-TFLOPs",
        type=float,
        default=790,
        help="of the GPU's matrix products (default 790, an H200's)",
    )
    parser.add_argument(
        "--link-GB",
        type=float,
        default=450,
        help="GB/s a GPU sends within a machine (default 450, NVLink 4)",
    )
    parser.add_argument(
        "--node-link-GB",
        type=float,
        default=50,
        help="GB/s a GPU sends to other machines (default 50, NDR InfiniBand)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not arguments.paper:
        measure(arguments.rounds)
        return
    calculate(
        dict(arguments.step_seconds),
        arguments.peak_TFLOPs * 1e12,
        arguments.link_GB * 1e9,
        arguments.node_link_GB * 1e9,
    )


if __name__ == "__main__":
    main()
