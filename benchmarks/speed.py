"""Steps of training and inference of this project's ViT against timm's, Hugging Face's, torchvision's and vit-pytorch's.

    python benchmarks/speed.py                                               # what `make bench` runs: under ten minutes
    python benchmarks/speed.py --row train:vit_ti4:bf16:128 --compiled timm --rounds 7

All contestants of a row stand in one process and take turns, a step each a round. "As they come": uncompiled, and ours as a
long run has it (vit/runtime.py decides); compiled contestants are compiled by torch.compile as a whole. The first two steps
of each are not counted; the seconds of the first, which may compile, are shown. The share of the matrix-product rate is
6 (training) or 2 (inference) times the model's multiply-adds, over the rate of large products measured in the same run.
"""

import argparse
import gc
import platform
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.contestants import OTHERS, SIZES, Contestant, make_step, ours, ratio, take_turns
from vit.model.cost import count_macs
from vit.runtime.compiling import worth_compiling
from vit.runtime.device import choose_device, describe_device, product_rate
from vit.runtime.precision import choose_precision


class Row(NamedTuple):
    what: str
    size: str
    precision: str
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Row":
        what, size, precision, batch = text.split(":")
        if what not in ("train", "infer") or size not in SIZES:
            raise argparse.ArgumentTypeError(
                f"{text}: train or infer, and one of {', '.join(SIZES)}"
            )
        return cls(what, size, precision, int(batch))


DEFAULT = [
    "train:vit_b16:bf16:8",
    "train:vit_s4:bf16:128",
    "train:vit_s4:fp32:32",
    "infer:vit_b16:bf16:8",
    "infer:vit_s4:bf16:128",
]


def measure(row: Row, rounds: int, against: list[str], compiled: list[str]) -> list[str]:
    """The table's lines for one row."""
    device = choose_device("auto")
    precision = choose_precision(row.precision, device, SIZES[row.size][2])
    names = ["ours", *against]
    contestants = [Contestant(name, False) for name in names] + [
        Contestant(name, True) for name in compiled
    ]
    steps, first, peak = {}, {}, product_rate(precision)
    for contestant in contestants:
        step = make_step(contestant, row.size, row.batch, precision, row.what == "train")
        first[contestant] = step()
        step()
        steps[contestant] = step
    times = take_turns(steps, rounds)
    default = Contestant("ours", worth_compiling(device, SIZES[row.size][2], float("inf")))
    default = default if default in steps else Contestant("ours", False)
    flops = count_macs(ours(*SIZES[row.size])) * (6 if row.what == "train" else 2)  # pyright: ignore[reportArgumentType]
    peak = max(
        peak, product_rate(precision)
    )  # also after them: other work on the machine would make it look slow
    lines = []
    for contestant, taken in times.items():
        rate = row.batch / statistics.median(taken)
        mark = "**" if contestant == default else ""
        lines.append(
            f"| {row.what} {row.size}, {row.batch} | {row.precision} | {mark}{contestant}{mark} | {rate:.4g} | "
            f"{ratio(taken, times[default]):.2f} | {rate * flops / peak:.0%} | {first[contestant]:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--row",
        action="append",
        type=Row.parse,
        help="train|infer:size:precision:batch, any number of them",
    )
    parser.add_argument("--against", action="append", choices=OTHERS, help="default all")
    parser.add_argument(
        "--compiled",
        action="append",
        choices=["ours", "none", *OTHERS],
        help="who also stands compiled; default ours and vit_pytorch",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the table here too, as Markdown")
    arguments = parser.parse_args()
    device = choose_device("auto")
    here = f"{describe_device(device)}, {processor()}, torch {torch.__version__}"
    lines = [
        f"{here}, {date.today()}, {arguments.rounds} rounds",
        "",
        "| step, batch | precision | model | images/s | ours is faster by | of the product rate | first step, s |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    compiled = [name for name in arguments.compiled or ["ours", "vit_pytorch"] if name != "none"]
    for row in arguments.row or [Row.parse(text) for text in DEFAULT]:
        # Evaluation runs uncompiled, and in fp32 compiling changes little: see the README beside this file
        also = (
            compiled if arguments.row or (row.what == "train" and row.precision != "fp32") else []
        )
        found = measure(row, arguments.rounds, arguments.against or list(OTHERS), also)
        print("\n".join(found), flush=True)
        lines += found
        torch.compiler.reset()
        gc.collect()
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


def processor() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
