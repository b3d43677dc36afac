"""Remove the least important attention heads of a checkpoint.

    python -m vit.prune RUN/checkpoints/best.safetensors --fraction 0.33 --out pruned.safetensors

The heads are scored on training images, so that the split on which accuracy is measured has no
part in choosing them. The file written is a checkpoint like the one read: it can be evaluated,
fine-tuned and pruned again.
"""

import argparse
import contextlib
import copy
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit.config.image_options import check_minima
from vit.errors import ConfigError, run_command, writing_to
from vit.files import check_writable

# torch takes seconds to import, and --help and a mistyped command should answer at once. So torch,
# and the modules of vit that import it, are imported inside the functions that need them.
if TYPE_CHECKING:
    from torch import Tensor

    from vit.data.splits import ImageSplit
    from vit.evaluation.restore import RestoredModel
    from vit.model.vision_transformer import VisionTransformer
    from vit.runtime.precision import Precision

# Training images on which the heads are scored, spread over the classes
SCORING_IMAGES = 2048

# Images per backward pass: it keeps the N × N attention matrices of every layer and head
SCORING_BATCH_SIZE = 32

# Timed forward passes of each model, after some that are not timed because the first are slower
SPEED_ROUNDS = 15
WARMUP_ROUNDS = 3


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vit.prune",
        description="Remove the least important attention heads of a checkpoint.",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="RUN/checkpoints/best.safetensors, or RUN, or a pruned one"
    )
    parser.add_argument(
        "--fraction",
        type=float,
        required=True,
        help="fraction of the heads to remove, between 0 and 1",
    )
    parser.add_argument("--out", type=Path, required=True, help="file for the pruned checkpoint")
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="where accuracy is measured (default: val, or test where nothing was held out)",
    )
    parser.add_argument("--limit", type=int, help="images of each split, for a quick try")
    parser.add_argument("--data-root", help="where the data set is now, if it has moved")
    parser.add_argument("--workers", type=int, help="processes that decode images")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if not 0 < options.fraction < 1:
        raise ConfigError(f"--fraction must be between 0 and 1, got {options.fraction:g}")
    check_minima(options, {"limit": 1, "workers": 0})
    if options.out.is_dir() or same_file(options.out, options.checkpoint):
        raise ConfigError(
            f"--out {options.out}: give the name of a new file, not of a folder or of the "
            "checkpoint itself"
        )

    from vit.runtime.faults import failures_explained

    with failures_explained("try --device cpu"):
        prune(options)


def same_file(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def prune(options: argparse.Namespace) -> None:
    from vit.evaluation.restore import restore
    from vit.runtime.cores import loader_workers
    from vit.runtime.device import start_device

    device = start_device(options.device, "--device")
    changes = {"data.root": options.data_root, "data.limit": options.limit}
    changes = {key: value for key, value in changes.items() if value is not None}
    restored = restore(options.checkpoint, changes, device)
    split = options.split or ("test" if restored.data.val is None else "val")
    images = restored.data.split(split)
    check_writable(options.out)

    workers = loader_workers(options.workers, device_type=device.type)
    heads = choose_heads(restored, options.fraction, workers)
    # A copy, because the original is measured beside it
    pruned = copy.deepcopy(restored.model)
    pruned.prune_heads(heads)

    accuracies = compare_accuracy(restored, pruned, split, workers)
    compare_speed(restored, pruned, images, workers)

    note = {
        "from": str(options.checkpoint),
        "measured_on": str(images),
        "top1_before": accuracies[0],
        "top1_after": accuracies[1],
    }
    with writing_to(f"--out {options.out}"):
        write_pruned(options.out, restored, pruned, note)
    print(f"written to {options.out}")


def choose_heads(restored: "RestoredModel", fraction: float, workers: int) -> dict[int, list[int]]:
    """Score all heads on training images, print the scores, and return those to remove, by layer.

    Raises ConfigError if the fraction is too small to remove any.
    """
    from vit.data.loader import evaluation_batches
    from vit.data.splits import sample_evenly
    from vit.model.head_pruning import attention_modules, importance, least_important
    from vit.runtime.memory import MemoryLimit

    model = restored.model
    device = restored.precision.device
    train = restored.data.train
    images = train.subset(sample_evenly(train.labels, SCORING_IMAGES))

    def score(batch_size: int) -> "Tensor":
        batches = evaluation_batches(images, batch_size, model.preprocessing, workers, device)
        with contextlib.closing(batches):
            return importance(model, batches)

    # Apart from the memory of evaluations, which need less
    scores = MemoryLimit(device).largest(score, SCORING_BATCH_SIZE)
    heads = least_important(scores, fraction)

    num_heads = sum(len(attention.heads) for attention in attention_modules(model))
    num_removed = sum(len(removed) for removed in heads.values())
    if not heads:
        raise ConfigError(
            f"--fraction {fraction:g} removes none of the {num_heads} heads in {len(scores)} "
            "layers; raise it (one head stays in every layer)"
        )
    fewer = ""
    if num_removed < round(fraction * num_heads):
        fewer = " (fewer than asked, as one stays in every layer)"
    print(
        f"importance of the heads on {images} (train), and [in brackets] those removed, "
        f"{num_removed} of {num_heads}{fewer}"
    )
    print(format_scores(scores, heads))
    return heads


def format_scores(scores: "Tensor", removed: dict[int, list[int]]) -> str:
    """Format the importance of every head, (L, H), as one line per layer.

    Heads that are removed now stand [in brackets]; a dash stands for one that was removed before.
    """
    header = "".join(f"{f'head {head}':^9}" for head in range(scores.shape[1]))
    lines = [" " * 10 + header]
    for layer, row in enumerate(scores.tolist()):
        removed_here = removed.get(layer, [])
        cells = [format_score(score, head in removed_here) for head, score in enumerate(row)]
        lines.append(f"layer {layer:<4}" + "".join(f"{cell:^9}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def format_score(score: float, removed: bool) -> str:
    if math.isnan(score):
        return "-"
    return f"[{score:.3f}]" if removed else f"{score:.3f}"


def compare_accuracy(
    restored: "RestoredModel", pruned: "VisionTransformer", split: str, workers: int
) -> list[float]:
    """Measure and print accuracy and loss before and after; return both top-1 accuracies."""
    from vit.evaluation.accuracy import wilson_interval

    accuracies = []
    for name, model in (("before", restored.model), ("after", pruned)):
        metrics = restored.measure(model, split, workers)
        accuracies.append(metrics["top1"])
        low, high = wilson_interval(metrics["top1"], int(metrics["n"]))
        print(
            f"{name:7} top-1 {metrics['top1']:.2%} (95 % interval {low:.2%} to {high:.2%}), "
            f"loss {metrics['loss']:.4f} ({restored.data.split(split)})"
        )
    return accuracies


def compare_speed(
    restored: "RestoredModel", pruned: "VisionTransformer", images: "ImageSplit", workers: int
) -> None:
    """Measure and print what an image costs before and after, on one batch of the images."""
    from vit.model.cost import count_macs
    from vit.runtime.device import describe_device

    precision = restored.precision
    with contextlib.closing(restored.batches(images, workers)) as batches:
        pixels, _ = next(batches)
    models = (restored.model, pruned)

    def measure(size: int) -> tuple[int, list[float]]:
        batch = restored.model.preprocessing.to_input(pixels[:size])
        return size, time_forward_passes(models, batch, precision)

    size, times = restored.memory.largest(measure, len(pixels))
    for name, model, seconds in zip(("before", "after"), models, times, strict=True):
        print(
            f"{name:7} {model.num_parameters():,} parameters, "
            f"{count_macs(model) / 1e6:,.1f} million multiply-adds and "
            f"{1000 * seconds / size:.3f} ms per image"
        )
    print(
        f"{times[0] / times[1]:.2f} times as fast (batches of {size}, {precision.name} on "
        f"{describe_device(precision.device)}, medians of {SPEED_ROUNDS} in turn)"
    )


def time_forward_passes(
    models: "Sequence[VisionTransformer]", images: "Tensor", precision: "Precision"
) -> list[float]:
    """Return the median time in seconds of each model's forward pass.

    The models take turns, so that a change in the machine's speed affects all alike.
    """
    import torch

    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode(), precision.autocast():
        for round_number in range(WARMUP_ROUNDS + SPEED_ROUNDS):
            for model, model_times in zip(models, times, strict=True):
                start = time.perf_counter()
                logits = model(images)
                logits[0, 0].item()  # waits for the device
                if round_number >= WARMUP_ROUNDS:
                    model_times.append(time.perf_counter() - start)
    return [statistics.median(model_times) for model_times in times]


def write_pruned(
    path: Path,
    restored: "RestoredModel",
    pruned: "VisionTransformer",
    note: dict[str, str | float],
) -> None:
    """Write the pruned model with the header of the old one, in which only its heads are changed.

    Raises OSError.
    """
    from vit.checkpoints.file import write_checkpoint
    from vit.model.head_pruning import removed_heads

    header = copy.deepcopy(restored.header)
    header["config"]["model"]["pruned_heads"] = removed_heads(pruned)
    header["pruning"] = note
    write_checkpoint(path, pruned.state_dict(), header)


if __name__ == "__main__":
    sys.exit(run_command("vit.prune", main))
