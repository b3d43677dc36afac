"""What safety costs: deterministic kernels in a training step, and saving at its usual interval.

python benchmarks/overheads.py
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.contestants import SIZES, Contestant, build_ours, make_step
from benchmarks.reporting import table_header, table_row
from benchmarks.timing import describe_machine, median_ratio
from vit.checkpoints.file import write_checkpoint
from vit.runs.timing import SECONDS_BETWEEN_SAVES
from vit.runtime.device import choose_device, use_deterministic_kernels
from vit.runtime.precision import Precision, choose_precision
from vit.training.optimizers import build_optimizer
from vit.training.state import EMA, Progress, TrainingState

# Images of a step, by the model's size
STEP_SIZES = {"vit_ti4": 64, "vit_s4": 32}
SAVED_SIZES = ["vit_s4", "vit_b16"]
SAVES = 3


def deterministic_ratio(size: str, batch_size: int, rounds: int) -> float:
    """Return how many times as long a step takes with runtime.deterministic=true."""
    precision = choose_precision("auto", choose_device("auto"), SIZES[size].hidden_size)
    contestant = Contestant("ours", compiled=False)
    step = make_step(contestant, size, batch_size, precision, training=True)

    # First, since what cuBLAS needs for it can't be set anymore after the first matrix product
    use_deterministic_kernels(True)
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * (rounds + 1)):
        # Off, on, on, off: neither is always the first
        deterministic = bool((turn + turn // 2) % 2)
        use_deterministic_kernels(deterministic)
        times[deterministic].append(step())
    use_deterministic_kernels(False)
    # The first round allocates memory
    return median_ratio(times[True][1:], times[False][1:])


def state_after_one_step(size: str) -> TrainingState:
    """Return a state with all that a `last` checkpoint holds: AdamW's moments and an average."""
    model = build_ours(SIZES[size])
    optimizer = build_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return TrainingState(
        model=model,
        ema=EMA(model, decay=0.999),
        optimizer=optimizer,
        precision=Precision("fp32", torch.device("cpu")),
        progress=Progress(step=1),
    )


def seconds_to_save(size: str) -> tuple[float, float]:
    """Return (median seconds, GiB) of saving a `last` checkpoint."""
    state = state_after_one_step(size)
    times = []
    # In the current folder, since the one for temporary files may be in memory
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "last.safetensors"
        previous = Path(folder) / "previous.safetensors"
        for _ in range(SAVES):
            start = time.perf_counter()
            write_checkpoint(path, state.tensors(), {"kind": "last"}, keep=previous)
            times.append(time.perf_counter() - start)
        return statistics.median(times), path.stat().st_size / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--size",
        action="append",
        choices=SIZES,
        help="measure both costs of this model; default: ViT-Ti/4 and S/4, and S/4 and B/16",
    )
    arguments = parser.parse_args()

    print(f"{describe_machine(choose_device('auto'))}\n\n{table_header('what', 'cost')}")
    for size in arguments.size or STEP_SIZES:
        batch_size = STEP_SIZES.get(size, 32)
        cost = deterministic_ratio(size, batch_size, arguments.rounds)
        what = f"runtime.deterministic=true, a step of {size}, batch {batch_size}"
        print(table_row(what, f"{cost:.3f} times the time"), flush=True)

    for size in arguments.size or SAVED_SIZES:
        seconds, gib = seconds_to_save(size)
        what = (
            f"saving {size} with AdamW's moments and the average, {gib:.2f} GiB, "
            f"every {SECONDS_BETWEEN_SAVES} s"
        )
        cost = f"{seconds:.2f} s, {seconds / SECONDS_BETWEEN_SAVES:.2%}"
        print(table_row(what, cost), flush=True)


if __name__ == "__main__":
    main()
