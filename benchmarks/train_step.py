"""One training step (forward, backward, optimizer) against timm's, torchvision's and vit-pytorch's ViT of the same size.

    python benchmarks/train_step.py [--size vit_s4] [--size vit_b16] [--rounds 7] [--no-compile]

All contestants stand in one process and take turns, a step each a round, so that a machine that slows down slows them
all; the table gives medians and the ratio of ours as configured by default (eager on CPUs, compiled on GPUs) to each, the
median over the rounds of their quotient. Every contestant gets AdamW: ours as build_optimizer makes it, the others torch's
default, as their own examples have it. The first two steps of each are not counted; the first, which may compile, is
shown apart.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from vit.model import VisionTransformer
from vit.optim import build_optimizer
from vit.runtime import choose_device, choose_precision, describe_device, worth_compiling

SIZES = {  # image, patch, width, layers, heads, batch
    "vit_ti4": (32, 4, 192, 12, 3, 128),
    "vit_s4": (32, 4, 384, 12, 6, 128),
    "vit_s16": (224, 16, 384, 12, 6, 16),
    "vit_b16": (224, 16, 768, 12, 12, 8),
}


def ours(image: int, patch: int, width: int, layers: int, heads: int) -> nn.Module:
    return VisionTransformer(image_size=image, patch_size=patch, hidden_size=width, num_layers=layers, num_heads=heads,
                             num_classes=1000)


def timm(image: int, patch: int, width: int, layers: int, heads: int) -> nn.Module:
    from timm.models import VisionTransformer as Timm

    return Timm(img_size=image, patch_size=patch, embed_dim=width, depth=layers, num_heads=heads, num_classes=1000)


def torchvision(image: int, patch: int, width: int, layers: int, heads: int) -> nn.Module:
    from torchvision.models import VisionTransformer as Torchvision

    return Torchvision(image, patch, layers, heads, width, 4 * width, num_classes=1000)


def vit_pytorch(image: int, patch: int, width: int, layers: int, heads: int) -> nn.Module:
    from vit_pytorch import ViT

    return ViT(image_size=image, patch_size=patch, num_classes=1000, dim=width, depth=layers, heads=heads, mlp_dim=4 * width,
               dim_head=width // heads)


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, precision, images: torch.Tensor,
              labels: torch.Tensor, compiled: bool) -> Callable[[], float]:
    forward = torch.compile(model) if compiled else model
    device = precision.device

    def step() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        with precision.autocast():
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


OTHERS = {build.__name__: build for build in (timm, torchvision, vit_pytorch)}


def compare(size: str, precision_name: str, rounds: int, modes: list[bool], against: list[str]) -> list[str]:
    """Table rows of one size in one precision."""
    *shape, batch = SIZES[size]
    device = choose_device("auto")
    precision = choose_precision(precision_name, device, shape[2])
    torch.manual_seed(0)
    images = torch.randn(batch, 3, shape[0], shape[0], device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    steps, first = {}, {}
    for build in (ours, *(OTHERS[name] for name in against)):
        for compiled in modes:
            model = build(*shape).to(device).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4) if build is not ours else build_optimizer(
                model, name="adamw", lr=1e-4, weight_decay=0.05, betas=None, eps=None, momentum=None, nesterov=None)
            step = make_step(model, optimizer, precision, images, labels, compiled)
            name = (build.__name__, compiled)
            first[name] = step()
            step()
            steps[name] = step
    times: dict = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step())
    default = times["ours", True in modes and worth_compiling(device, shape[2], float("inf"))]
    rows = []
    for (builder, compiled), taken in times.items():
        ratio = statistics.median(other / mine for other, mine in zip(taken, default, strict=True))
        rows.append(f"| {size} | {precision.name} | {builder}{' compiled' if compiled else ''} "
                    f"| {batch / statistics.median(taken):.1f} | {ratio:.2f} | {first[builder, compiled]:.1f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=SIZES, help="may be given several times; default vit_s4 and vit_b16")
    parser.add_argument("--precision", action="append", choices=["fp32", "bf16", "fp16"], help="default fp32 and the best")
    parser.add_argument("--against", action="append", choices=OTHERS, help="default all three")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled contestants")
    arguments = parser.parse_args()
    modes = [False] if arguments.no_compile else [False, True]
    print(f"{describe_device(choose_device('auto'))}, {platform.processor() or platform.machine()}, torch {torch.__version__}, "
          f"{date.today()}, {arguments.rounds} rounds\n")
    print("| size | precision | model | images/s | ours is faster by | first step, s |\n|---|---|---|---|---|---|")
    for size in arguments.size or ["vit_s4", "vit_b16"]:
        best = choose_precision("auto", choose_device("auto"), SIZES[size][2]).name
        for precision in arguments.precision or sorted({"fp32", best}):
            for row in compare(size, precision, arguments.rounds, modes, arguments.against or list(OTHERS)):
                print(row, flush=True)
            torch.compiler.reset()


if __name__ == "__main__":
    main()
