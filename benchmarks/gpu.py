"""One table of what matters on a GPU, in one call of under ten minutes, this project beside the others.

    python benchmarks/gpu.py --out table.md                 # S, B and L at 224 px in bf16; needs a GPU
    python benchmarks/gpu.py --miniature                    # the same in seconds with tiny models on whatever is there

Measured: the rate of large matrix products (the ceiling of every share below); kernels of attention at ViT-B/16's shape;
training steps of each project as it comes and compiled, in turn (images/s, MFU = 6 x multiply-adds x images/s over the
measured ceiling and over the datasheet's rate, peak memory); the input of small images made on the device. Contestants are
built in order of interest until the minutes are used up; what was left out is named.
"""

import argparse
import gc
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.contestants import (
    OTHERS,
    SIZES,
    Contestant,
    finish,
    make_step,
    ours,
    ratio,
    take_turns,
)
from vit.augment.batch import BatchAugmentation
from vit.augment.policies import build_policies
from vit.model.cost import count_macs
from vit.runtime.device import choose_device, describe_device, peak_memory, product_rate
from vit.runtime.precision import Precision, choose_precision

BATCHES = {"vit_s16": 512, "vit_b16": 256, "vit_l16": 128, "vit_nano4": 8}
# FLOP/s of dense products in bf16 (V100: fp16)
DATASHEET = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "V100": 125e12,
}
STEPS = 5  # of a contestant in each round
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_kernels(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> list[str]:
    """Seconds of forward and backward of each kernel at (B, H, N, K)."""
    lines = [f"| attention {shape} | forward and backward, ms |", "|---|---|"]
    query, key, value = (
        torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                times = []
                for _ in range(8):
                    finish(device)
                    began = time.perf_counter()
                    scaled_dot_product_attention(query, key, value).sum().backward()
                    finish(device)
                    times.append(time.perf_counter() - began)
            lines.append(f"| {name} | {1e3 * statistics.median(times[2:]):.2f} |")
        except RuntimeError as error:  # this kernel isn't for this device
            lines.append(f"| {name} | {str(error).splitlines()[0][:60]} |")
    return lines


def training(
    size: str,
    contestants: list[Contestant],
    precision: Precision,
    ceiling: float,
    rounds: int,
    deadline: float,
) -> list[str]:
    """The table's lines of one size; contestants whose turn to be built comes after the deadline are left out and named."""
    device, batch = precision.device, BATCHES[size]
    steps, first, memory, left_out = {}, {}, {}, []
    for contestant in contestants:
        if time.monotonic() > deadline:
            left_out.append(f"{contestant}: no time")
            continue
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        try:
            step = make_step(contestant, size, batch, precision, True)
            first[contestant] = step()
            step()
        except torch.OutOfMemoryError:
            left_out.append(f"{contestant}: out of memory at batch {batch}")
            continue
        memory[contestant] = peak_memory(device) - held

        def several(step=step) -> float:
            return sum(step() for _ in range(STEPS)) / STEPS

        steps[contestant] = several
    times = take_turns(steps, rounds)
    flops = 6 * count_macs(ours(*SIZES[size]))  # pyright: ignore[reportArgumentType]
    sheet = next(
        (rate for name, rate in DATASHEET.items() if name in describe_device(device)), None
    )
    mine = next(
        contestant
        for contestant in [Contestant("ours", True), Contestant("ours", False)]
        if contestant in times
    )
    lines = []
    for contestant, taken in times.items():
        rate = batch / statistics.median(taken)
        of_sheet = "" if sheet is None else f"{rate * flops / sheet:.0%}"
        lines.append(
            f"| {size}, {batch} | {contestant} | {rate:.0f} | {ratio(taken, times[mine]):.2f} | "
            f"{rate * flops / ceiling:.0%} | {of_sheet} | {memory[contestant] / 2**30:.1f} | "
            f"{first[contestant]:.0f} |"
        )
    return lines + [f"| {size}, {batch} | {line} | | | | | | |" for line in left_out]


def small_images(device: torch.device) -> list[str]:
    """Images/s of CIFAR's augmentation on the device."""
    lines = ["| 32 px images made on the device | images/s |", "|---|---|"]
    pixels = torch.randint(0, 256, (8192, 3, 32, 32), dtype=torch.uint8, device=device)
    epochs, indices = torch.zeros(len(pixels), dtype=torch.int64), torch.arange(len(pixels))
    for title, policy in (("crop, flip", "none"), ("crop, flip, RandAugment", "randaugment")):
        augmentation = BatchAugmentation(
            0, (32, 32), 0.125, None, 0.5, build_policies(policy, None, None, 0.0)
        )
        times = []
        for _ in range(5):
            finish(device)
            began = time.perf_counter()
            augmentation(pixels, epochs, indices)
            finish(device)
            times.append(time.perf_counter() - began)
        lines.append(f"| {title} | {len(pixels) / statistics.median(times[1:]):,.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", action="append", choices=BATCHES, help="default S, B and L at 224 px"
    )
    parser.add_argument(
        "--against", action="append", choices=OTHERS, help="default timm, huggingface, torchvision"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="no contestant is built after as many"
    )
    parser.add_argument("--miniature", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--out", type=Path, help="write the table here too, as Markdown")
    arguments = parser.parse_args()
    device = choose_device("auto")
    if device.type != "cuda" and not arguments.miniature:
        sys.exit("no GPU here; --miniature tries the script without one")
    precision = (
        choose_precision("auto", device, 1024)
        if device.type == "cuda"
        else Precision("fp32", device)
    )
    sizes = arguments.size or (
        ["vit_nano4"] if arguments.miniature else ["vit_s16", "vit_b16", "vit_l16"]
    )
    against = arguments.against or ["timm", "huggingface", "torchvision"]
    contestants = [
        Contestant("ours", True),
        Contestant("timm", True),
        Contestant("ours", False),
        *(Contestant(name, False) for name in against),
        *(Contestant(name, True) for name in against if name != "timm"),
    ]
    began, lines = time.monotonic(), []

    def tell(*more: str) -> None:
        print("\n".join(more), flush=True)
        lines.extend(more)
        if arguments.out:  # after each part, so that none is lost
            arguments.out.write_text("\n".join(lines) + "\n")

    ceiling = product_rate(precision)
    tell(
        f"{describe_device(device)}, torch {torch.__version__}, {date.today()}, {precision.name}, "
        f"{arguments.rounds} rounds of {STEPS} steps",
        f"large matrix products: {ceiling / 1e12:.4g} TFLOP/s",
        "",
    )
    shape = (2, 2, 17, 16) if arguments.miniature else (128, 12, 197, 64)
    tell(
        *attention_kernels(
            device, torch.float32 if precision.name == "fp32" else torch.bfloat16, shape
        ),
        "",
    )
    tell(*small_images(device), "")
    tell(
        "| model, batch | project | images/s | ours is faster by | of the ceiling | of the datasheet | peak GiB "
        "| first step, s |",
        "|---|---|---|---|---|---|---|---|",
    )
    for number, size in enumerate(sizes, start=1):
        deadline = began + 60 * arguments.minutes * number / len(sizes)
        tell(*training(size, contestants, precision, ceiling, arguments.rounds, deadline))
        torch.compiler.reset()
        gc.collect()


if __name__ == "__main__":
    main()
