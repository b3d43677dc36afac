"""What safety costs: a training step with deterministic kernels and without, in turn; saving, as a share of its interval.

python benchmarks/overheads.py
"""

import argparse
import copy
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.contestants import SIZES, Contestant, make_step, ours, ratio
from vit.checkpoints.file import write_checkpoint
from vit.runs.timing import SECONDS_BETWEEN_SAVES
from vit.runtime.device import choose_device, describe_device, use_deterministic_kernels
from vit.runtime.precision import choose_precision
from vit.training.optimizers import build_optimizer
from vit.training.state import EMA, Progress, TrainingState


def deterministic_ratio(size: str, batch: int, rounds: int) -> float:
    device = choose_device("auto")
    step = make_step(
        Contestant("ours", False),
        size,
        batch,
        choose_precision("auto", device, SIZES[size][2]),
        True,
    )
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * (rounds + 1)):
        wanted = bool((turn + turn // 2) % 2)  # off, on, on, off: neither is always first
        use_deterministic_kernels(wanted)
        times[wanted].append(step())
    return ratio(times[True][1:], times[False][1:])


def seconds_to_save(size: str) -> tuple[float, float]:
    """(seconds, GiB) of a `last` checkpoint with AdamW's moments and averaged weights, the median of three."""
    model = ours(*SIZES[size])
    optimizer = build_optimizer(model, name="adamw", lr=1e-3, weight_decay=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = TrainingState(model, EMA(copy.deepcopy(model), 0.999), optimizer, Progress())  # pyright: ignore[reportArgumentType]
    times = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "last.safetensors"
        for _ in range(3):
            began = time.perf_counter()
            write_checkpoint(
                path, state.tensors(), {"kind": "last"}, keep=Path(folder) / "previous.safetensors"
            )
            times.append(time.perf_counter() - began)
        return sorted(times)[1], path.stat().st_size / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = choose_device("auto")
    print(
        f"{describe_device(device)}, torch {torch.__version__}, {date.today()}\n\n| what | cost |\n|---|---|"
    )
    for size, batch in (("vit_ti4", 64), ("vit_s4", 32)):
        cost = deterministic_ratio(size, batch, arguments.rounds)
        print(
            f"| runtime.deterministic=true, a step of {size}, batch {batch} | {cost:.3f} times the time |",
            flush=True,
        )
    for size in ("vit_s4", "vit_b16"):
        seconds, gib = seconds_to_save(size)
        print(
            f"| saving {size} with AdamW's moments and the average, {gib:.2f} GiB, every {SECONDS_BETWEEN_SAVES} s | "
            f"{seconds:.2f} s, {seconds / SECONDS_BETWEEN_SAVES:.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
