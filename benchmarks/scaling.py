"""How training scales over processes: measured here, and worked out on paper for GPUs that are not here.

    python benchmarks/scaling.py                            # one process against two on this machine's cores
    python benchmarks/scaling.py --paper --step-seconds vit_b16=0.062 --link-GB 450

On paper: data-parallel training sends each gradient twice through every GPU's link (reduce-scatter and all-gather of a ring,
2 (N - 1) / N of its bytes), while the backward pass, two thirds of a step, goes on; the last bucket, and what does not fit
beside it, is waited for. Stragglers and the input are not in it: it is an upper bound.
--step-seconds are those of one GPU; without them a step takes 6 x multiply-adds x batch at 50 % of --peak-TFLOPs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {"vit_s16": 256, "vit_b16": 256, "vit_l16": 128}  # images of a step on each GPU
BACKWARD_SHARE = 2 / 3
BUCKET = 25e6  # bytes that DistributedDataParallel sends at once; the last has nothing left to hide behind
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


def images_per_second(processes: int, threads: int) -> float:
    """The median over the later steps of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(ROOT / "train.py"),
            *RUN,
            f"runtime.threads={threads}",
            f"hydra.run.dir={folder}/run",
        ]
        more = [f"runtime.processes={processes}"] if processes > 1 else []
        subprocess.run(
            [*command, *more],
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        rows = [
            json.loads(line)
            for line in (Path(folder) / "run" / "timing.jsonl").read_text().splitlines()
        ]
    return statistics.median(row["images_per_second"] for row in rows[4:])


def measured(rounds: int) -> None:
    cores = os.cpu_count() or 1
    cases = {
        "1 process, 1 thread": (1, 1),
        f"1 process, {cores} threads": (1, cores),
        f"{cores} processes, 1 thread each": (cores, 1),
    }
    found: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, (processes, threads) in cases.items():
            found[case].append(images_per_second(processes, threads))
    one = next(iter(found.values()))
    print(
        f"{cores} cores, {date.today()}, vit_ti4 at 32 px, fp32, batch 128\n\n"
        f"| | images/s | of {cores} times one thread's |\n|---|---|---|"
    )
    for case, rates in found.items():
        share = statistics.median(
            rate / (cores * alone) for rate, alone in zip(rates, one, strict=True)
        )
        print(f"| {case} | {statistics.median(rates):.1f} | {share:.0%} |")


def paper(step_seconds: dict[str, float], peak: float, link: float, node_link: float) -> None:
    """Efficiency of 8 GPUs on links of a machine, and of 64 on those between machines, gradients in float32."""
    import torch

    from benchmarks.contestants import SIZES as SHAPES
    from benchmarks.contestants import ours
    from vit.model.cost import count_macs

    print(
        f"links {link:g} GB/s within a machine, {node_link:g} GB/s a GPU between machines, each way\n"
    )
    print(
        "| model, images a GPU | step of one GPU, ms | gradients, MB | 8 GPUs | 64 GPUs |\n|---|---|---|---|---|"
    )
    for size, batch in SIZES.items():
        with torch.device("meta"):
            model = ours(*SHAPES[size])
        parameters = sum(parameter.numel() for parameter in model.parameters())
        step = step_seconds.get(size) or 6 * count_macs(model) * batch / (0.5 * peak)  # pyright: ignore[reportArgumentType]
        cells = []
        for gpus, rate in ((8, link), (64, node_link)):
            sending = 2 * (gpus - 1) / gpus * 4 * parameters / (rate * 1e9)
            waited = max(
                sending - BACKWARD_SHARE * step, sending * min(1, BUCKET / (4 * parameters))
            )
            cells.append(f"{step / (step + waited):.1%} (sending takes {1e3 * sending:.1f} ms)")
        print(
            f"| {size}, {batch} | {1e3 * step:.1f} | {4 * parameters / 1e6:.0f} | {cells[0]} | {cells[1]} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--step-seconds", action="append", default=[], metavar="MODEL=SECONDS")
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
    arguments = parser.parse_args()
    if not arguments.paper:
        measured(arguments.rounds)
        return
    given = dict(word.split("=") for word in arguments.step_seconds)
    paper(
        {name: float(value) for name, value in given.items()},
        arguments.peak_TFLOPs * 1e12,
        arguments.link_GB,
        arguments.node_link_GB,
    )


if __name__ == "__main__":
    main()
