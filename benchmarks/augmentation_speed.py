"""Images/s of the batched augmentation of small images against torchvision's transforms one image at a time, in turn.

    PYTHONPATH=. python benchmarks/augmentation_speed.py

Both start from the same uint8 images in memory and end in uint8; one thread, no loader processes on either side.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torchvision.transforms import AutoAugmentPolicy, v2

from vit.augment import BatchAugmentation
from vit.policies import build_policies

BATCH, ROUNDS = 512, 7


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    torch.set_num_threads(1)
    pixels = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    epochs, indices = torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH)
    light = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    contestants = {
        "pad, crop, flip": ("none", light),
        "and randaugment": ("randaugment", [*light, v2.RandAugment(2, 9)]),
        "and autoaugment": ("autoaugment", [*light, v2.AutoAugment(AutoAugmentPolicy.CIFAR10)]),
    }
    print("| augmentation | ours, images/s | torchvision, images/s | ratio |\n|---|---|---|---|")
    for title, (policy, steps) in contestants.items():
        ours = BatchAugmentation(0, (32, 32), 0.125, None, 0.5, build_policies(policy, None, None, 0.0))
        theirs = v2.Compose(steps)
        times: list[tuple[float, float]] = []
        for _ in range(ROUNDS):
            times.append((seconds(lambda ours=ours: ours(pixels, epochs, indices)),
                          seconds(lambda theirs=theirs: torch.stack([theirs(image) for image in pixels]))))
        ours_rate, theirs_rate = (BATCH / statistics.median(column) for column in zip(*times[1:], strict=True))
        ratio = statistics.median(slow / fast for fast, slow in times[1:])
        print(f"| {title} | {ours_rate:,.0f} | {theirs_rate:,.0f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
