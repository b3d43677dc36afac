"""Steps of training on a GPU, this project beside the others: one report in under ten minutes.

    python benchmarks/gpu_steps.py --size vit_b16 --out table.md    # needs a GPU
    python benchmarks/gpu_steps.py --miniature     # a tiny model in seconds, on whatever is there

A piece of benchmarks/gpu.py. Measured are:
- the rate of large matrix products, the ceiling of every percentage below;
- the kernels of attention at the shape of ViT-B/16;
- training steps of each project, uncompiled and compiled, in turn: images/s, MFU (6 x
  multiply-adds x images/s over the measured ceiling and over the data sheet's rate), peak memory;
- the augmentation of small images on the device.
Contestants are built in the order of interest until the minutes are used up; the table names those
that are left out.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.contestants import OTHERS, Contestant, flops_per_image, make_step
from benchmarks.reporting import Report, table_header, table_row
from benchmarks.timing import describe_machine, median_ratio, median_seconds, take_turns
from vit.augment.batch import BatchAugmentation
from vit.augment.policies import build_policies
from vit.runtime.device import (
    choose_device,
    describe_device,
    peak_memory,
    product_rate,
    use_exact_float32,
)
from vit.runtime.precision import Precision, choose_precision

# Images of a step, by the model's size
BATCH_SIZES = {
    "vit_s16": 512,
    "vit_b16": 256,
    "vit_l16": 128,
    "vit_s4": 512,
    "vit_ti4": 512,
    "vit_nano4": 8,
}
SIZES_ON_A_GPU = ["vit_s16", "vit_b16", "vit_l16", "vit_s4", "vit_ti4"]
STEPS = 5  # of a contestant in each round

# FLOP/s of dense matrix products in bf16 (V100: fp16), from the makers' data sheets
DATA_SHEET_RATES = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "V100": 125e12,
}
ATTENTION_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# (B, heads, tokens, head size): of ViT-B/16 at 224 px, of ViT-S/4 at 32 px, and of something tiny
ATTENTION_SHAPES = [(128, 12, 197, 64), (512, 6, 65, 64)]
MINIATURE_ATTENTION_SHAPES = [(2, 2, 17, 16)]

TRAINING_COLUMNS = (
    "model, batch",
    "project",
    "images/s",
    "ours is faster by",
    "of the ceiling",
    "of the datasheet",
    "peak GiB",
    "first step, s",
)


def attention_table(precision: Precision, shape: tuple[int, int, int, int]) -> list[str]:
    """Return a table of each kernel's time for a forward and backward pass at (B, H, N, K)."""
    device = precision.device
    inputs = [
        torch.randn(shape, device=device, dtype=precision.dtype, requires_grad=True)
        for _ in range(3)
    ]
    gradient = torch.randn(shape, device=device, dtype=precision.dtype)

    def forward_and_backward() -> None:
        # The attention alone: nothing is summed, and no gradient added to the one before
        torch.autograd.grad(scaled_dot_product_attention(*inputs), inputs, gradient)

    lines = [table_header(f"attention {shape}", "forward and backward, ms")]
    for name, kernel in ATTENTION_KERNELS.items():
        try:
            with sdpa_kernel(kernel):
                seconds = median_seconds(forward_and_backward, device, warmup=2, repeats=6)
            cell = f"{1e3 * seconds:.2f}"
        except RuntimeError as error:
            # This kernel is not for this device, or not for this type
            cell = str(error).splitlines()[0][:60]
        lines.append(table_row(name, cell))
    return lines


def small_images_table(device: torch.device) -> list[str]:
    """Return a table of the images/s of CIFAR's augmentation on the device."""
    pixels = torch.randint(0, 256, (8192, 3, 32, 32), dtype=torch.uint8, device=device)
    epochs = torch.zeros(len(pixels), dtype=torch.int64)
    indices = torch.arange(len(pixels))

    lines = [table_header("32 px images made on the device", "images/s")]
    for title, policy in (("crop, flip", "none"), ("crop, flip, RandAugment", "randaugment")):
        policies = build_policies(policy, None, None, 0.0)
        augmentation = BatchAugmentation(
            seed=0, size=(32, 32), pad=0.125, crop_scale=None, flip=0.5, policies=policies
        )

        def augment(augmentation: BatchAugmentation = augmentation) -> None:
            augmentation(pixels, epochs, indices)

        seconds = median_seconds(augment, device, warmup=1, repeats=4)
        lines.append(table_row(title, f"{len(pixels) / seconds:,.0f}"))
    return lines


class Prepared(NamedTuple):
    """A contestant that is built. step: makes a step and returns its seconds."""

    step: Callable[[], float]
    first_seconds: float
    peak_bytes: int


def prepare(contestant: Contestant, size: str, precision: Precision) -> Prepared:
    """Build a contestant and make two steps, which are not counted.

    Raises torch.OutOfMemoryError.
    """
    device = precision.device
    # What the contestants before it keep is not this one's
    bytes_before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        bytes_before = torch.cuda.memory_allocated()
    step = make_step(contestant, size, BATCH_SIZES[size], precision, training=True)
    first_seconds = step()
    step()
    return Prepared(step, first_seconds, peak_memory(device) - bytes_before)


def prepare_all(
    contestants: list[Contestant], size: str, precision: Precision, deadline: float
) -> tuple[dict[Contestant, Prepared], list[str]]:
    """Build contestants that are built by the deadline, a time of time.monotonic().

    One is taken to need as long as the slowest of its kind, compiled or not, before it. Returns
    those that were built, and a line about each of the others.
    """
    prepared, left_out = {}, []
    slowest = {True: 0.0, False: 0.0}
    for contestant in contestants:
        start = time.monotonic()
        # One that is not done in time would take what was measured with it
        if start + slowest[contestant.compiled] > deadline:
            left_out.append(f"{contestant}: no time")
            continue
        try:
            prepared[contestant] = prepare(contestant, size, precision)
        except torch.OutOfMemoryError:
            left_out.append(f"{contestant}: out of memory at batch {BATCH_SIZES[size]}")
        seconds = time.monotonic() - start
        slowest[contestant.compiled] = max(slowest[contestant.compiled], seconds)
    return prepared, left_out


def mean_seconds(step: Callable[[], float]) -> Callable[[], float]:
    """Return a function that makes STEPS steps and returns the seconds of one."""

    def make_steps() -> float:
        return sum(step() for _ in range(STEPS)) / STEPS

    return make_steps


def measure_training(
    size: str,
    contestants: list[Contestant],
    precision: Precision,
    ceiling: float,
    rounds: int,
    deadline: float,
) -> list[str]:
    """Return the table's lines for one size.

    ceiling: FLOP/s of large matrix products; deadline: see prepare_all.
    """
    batch_size = BATCH_SIZES[size]
    title = f"{size}, {batch_size}"
    prepared, left_out = prepare_all(contestants, size, precision, deadline)
    times = take_turns({name: mean_seconds(each.step) for name, each in prepared.items()}, rounds)

    # Ours may have been left out, too
    ours = [Contestant("ours", compiled=True), Contestant("ours", compiled=False)]
    reference = next((contestant for contestant in ours if contestant in times), None)
    flops = flops_per_image(size, training=True)
    data_sheet_rate = find_data_sheet_rate(precision.device)
    lines = []
    for contestant, seconds in times.items():
        images_per_second = batch_size / statistics.median(seconds)
        flops_per_second = images_per_second * flops
        line = table_row(
            title,
            str(contestant),
            f"{images_per_second:.0f}",
            "" if reference is None else f"{median_ratio(seconds, times[reference]):.2f}",
            f"{flops_per_second / ceiling:.0%}",
            "" if data_sheet_rate is None else f"{flops_per_second / data_sheet_rate:.0%}",
            f"{prepared[contestant].peak_bytes / 2**30:.1f}",
            f"{prepared[contestant].first_seconds:.0f}",
        )
        lines.append(line)

    empty_cells = [""] * (len(TRAINING_COLUMNS) - 2)
    return lines + [table_row(title, reason, *empty_cells) for reason in left_out]


def find_data_sheet_rate(device: torch.device) -> float | None:
    name = describe_device(device)
    return next((rate for key, rate in DATA_SHEET_RATES.items() if key in name), None)


def contestants_by_interest(others: list[str]) -> list[Contestant]:
    """Return all contestants, those first that must not be missing for want of time."""
    return [
        Contestant("ours", compiled=True),
        Contestant("timm", compiled=True),
        Contestant("ours", compiled=False),
        *(Contestant(name, compiled=False) for name in others),
        *(Contestant(name, compiled=True) for name in others if name != "timm"),
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        action="append",
        choices=BATCH_SIZES,
        help="default: S, B, L at 224 px, S, Ti at 32",
    )
    parser.add_argument("--against", action="append", choices=OTHERS, help="default: timm")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="all contestants are built by then"
    )
    parser.add_argument("--kernels", action="store_true", help="attention and small images alone")
    parser.add_argument("--miniature", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--out", type=Path, help="write the table here too, as Markdown")
    return parser.parse_args()


def precision_for(device: torch.device) -> Precision:
    """Return what training would take on the device; float32 where this is a trial on a CPU."""
    if device.type == "cuda":
        return choose_precision("auto", device, width=1024)
    return Precision("fp32", device)


def add_kernels(report: Report, precision: Precision, miniature: bool) -> None:
    """Report the kernels of attention, and the augmentation of small images."""
    for shape in MINIATURE_ATTENTION_SHAPES if miniature else ATTENTION_SHAPES:
        report.add(*attention_table(precision, shape), "")
    report.add(*small_images_table(precision.device))


def main() -> None:
    arguments = parse_arguments()
    device = choose_device("auto")
    if device.type != "cuda" and not arguments.miniature:
        sys.exit("no GPU here; --miniature tries the script without one")
    start = time.monotonic()
    use_exact_float32()
    precision = precision_for(device)

    report = Report(arguments.out)
    ceiling = product_rate(device, precision.dtype)
    report.add(
        f"{describe_machine(device)}, {precision.name}, {arguments.rounds} rounds of {STEPS} steps",
        f"large matrix products: {ceiling / 1e12:.4g} TFLOP/s",
        "",
    )
    if arguments.kernels:
        add_kernels(report, precision, arguments.miniature)
        return

    sizes = arguments.size or (["vit_nano4"] if arguments.miniature else SIZES_ON_A_GPU)
    contestants = contestants_by_interest(arguments.against or ["timm"])
    if arguments.miniature:
        # Compiling would take a minute of the seconds
        contestants = [contestant for contestant in contestants if not contestant.compiled]
    report.add(table_header(*TRAINING_COLUMNS))
    for number, size in enumerate(sizes, start=1):
        # Each size gets an equal part of the minutes, and what those before it have left
        deadline = start + 60 * arguments.minutes * number / len(sizes)
        lines = measure_training(size, contestants, precision, ceiling, arguments.rounds, deadline)
        report.add(*lines)
        # The next size needs the memory
        torch.compiler.reset()
        gc.collect()


if __name__ == "__main__":
    main()
