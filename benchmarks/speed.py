"""Steps of training and inference of this project's ViT against those of four other projects.

    python benchmarks/speed.py          # what `make bench` runs: half an hour
    python benchmarks/speed.py --row train:vit_ti4:bf16:128 --compiled timm --rounds 7

The others are timm, Hugging Face's transformers, torchvision and vit-pytorch. All contestants of a
row are in one process and take turns, a step each a round. The name in bold is ours as a long run
has it, compiled or not (vit/runtime/compiling.py decides); the others are compared with it. The
first two steps of each are not counted; the seconds of the first, which may compile, are shown. The
percentage of the product rate is 6 (training) or 2 (inference) times the model's multiply-adds,
over the rate of large matrix products measured in the same run.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import torch

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.contestants import OTHERS, PROJECTS, SIZES, Contestant, flops_per_image, make_step
from benchmarks.reporting import Report, table_header, table_row
from benchmarks.timing import describe_machine, median_ratio, take_turns
from vit.runtime.compiling import worth_compiling
from vit.runtime.device import choose_device, product_rate
from vit.runtime.precision import Precision, choose_precision

# Of these much of a step is not matrix products, so that everybody is measured compiled as well
SMALL_SIZES = ("vit_ti4", "vit_mini4")
DEFAULT_ROWS = [
    "train:vit_b16:bf16:8",
    "train:vit_s4:bf16:128",
    "train:vit_s4:fp32:32",
    *(f"train:{size}:{precision}:128" for size in SMALL_SIZES for precision in ("bf16", "fp32")),
    "infer:vit_b16:bf16:8",
    "infer:vit_s4:bf16:128",
]
DEFAULT_COMPILED = ["ours", "vit_pytorch"]
EVERYBODY = list(PROJECTS)
COLUMNS = (
    "step, batch",
    "precision",
    "model",
    "images/s",
    "ours is faster by",
    "of the product rate",
    "first step, s",
)


class Row(NamedTuple):
    """What is compared in one block of the table; task: train or infer."""

    task: str
    size: str
    precision: str
    batch_size: int

    @classmethod
    def parse(cls, text: str) -> "Row":
        """Parse task:size:precision:batch. Raises ArgumentTypeError or ValueError."""
        task, size, precision, batch_size = text.split(":")
        if task not in ("train", "infer") or size not in SIZES:
            raise argparse.ArgumentTypeError(
                f"{text}: expected train or infer, and one of {', '.join(SIZES)}"
            )
        return cls(task, size, precision, int(batch_size))


def measure(row: Row, rounds: int, others: list[str], compiled: list[str]) -> list[str]:
    """Return the table's lines for one row."""
    device = choose_device("auto")
    precision = choose_precision(row.precision, device, SIZES[row.size].hidden_size)
    training = row.task == "train"
    contestants = [Contestant(name, compiled=False) for name in ["ours", *others]]
    contestants += [Contestant(name, compiled=True) for name in compiled]
    rate_before = product_rate(device, precision.dtype)

    # Two steps each that are not counted: they allocate memory, and the first may compile
    steps, first_seconds = {}, {}
    for contestant in contestants:
        step = make_step(contestant, row.size, row.batch_size, precision, training)
        first_seconds[contestant] = step()
        step()
        steps[contestant] = step
    times = take_turns(steps, rounds)

    # The higher of two, since other work on the machine can only make it look slow
    peak_rate = max(rate_before, product_rate(device, precision.dtype))
    reference = ours_in_a_long_run(row.size, precision, steps)
    flops = flops_per_image(row.size, training)
    lines = []
    for contestant, seconds in times.items():
        images_per_second = row.batch_size / statistics.median(seconds)
        line = table_row(
            f"{row.task} {row.size}, {row.batch_size}",
            row.precision,
            f"**{contestant}**" if contestant == reference else str(contestant),
            f"{images_per_second:.4g}",
            f"{median_ratio(seconds, times[reference]):.2f}",
            f"{images_per_second * flops / peak_rate:.0%}",
            f"{first_seconds[contestant]:.0f}",
        )
        lines.append(line)
    return lines


def ours_in_a_long_run(
    size: str, precision: Precision, measured: Container[Contestant]
) -> Contestant:
    """Return ours, compiled where a long run would be and that was measured."""
    compiled = Contestant("ours", compiled=True)
    pays = worth_compiling(precision, SIZES[size].hidden_size, run_flops=float("inf"))
    return compiled if pays and compiled in measured else Contestant("ours", compiled=False)


def compiled_by_default(row: Row) -> list[str]:
    """Return who is measured compiled in a row, beside everybody uncompiled."""
    if row.task == "infer":  # evaluation runs uncompiled
        return []
    if row.size in SMALL_SIZES:
        return EVERYBODY
    # In fp32 matrix products are nearly all of the time, see benchmarks/README.md
    return [] if row.precision == "fp32" else DEFAULT_COMPILED


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--row",
        action="append",
        type=Row.parse,
        help="train|infer:size:precision:batch, any number of them",
    )
    parser.add_argument("--against", action="append", choices=OTHERS, help="default: all")
    parser.add_argument(
        "--compiled",
        action="append",
        choices=["none", *EVERYBODY],
        help="who is also measured compiled; default: ours and vit_pytorch, of small models all",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table here too, as Markdown")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    rows = arguments.row or [Row.parse(text) for text in DEFAULT_ROWS]
    others = arguments.against or OTHERS

    report = Report(arguments.out)
    machine = describe_machine(choose_device("auto"))
    report.add(f"{machine}, {arguments.rounds} rounds", "", table_header(*COLUMNS))
    for row in rows:
        compiled = compiled_by_default(row) if arguments.compiled is None else arguments.compiled
        compiled = [name for name in compiled if name != "none"]
        report.add(*measure(row, arguments.rounds, others, compiled))

        # The next row's models need the memory
        torch.compiler.reset()
        gc.collect()


if __name__ == "__main__":
    main()
