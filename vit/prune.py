"""Remove the least important attention heads of a checkpoint.

    python -m vit.prune outputs/…/checkpoints/best.safetensors --fraction 0.33 --out pruned.safetensors

The heads are scored on training images, so that the split the accuracy is measured on has no part in their choice. The
file written is a checkpoint like the one read: it can be evaluated, fine-tuned and pruned again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit.errors import ConfigError, run_command, writing_to

if TYPE_CHECKING:
    from torch import Tensor

    from vit.model.vision_transformer import VisionTransformer
    from vit.runtime.precision import Precision


SCORING_IMAGES = 2048  # of train at most, spread over the classes


SCORING_BATCH = 32  # the explicit attention keeps every N × N matrix for the backward pass


SPEED_ROUNDS = 15


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vit.prune", description="Remove the least important heads of a checkpoint."
    )
    parser.add_argument(
        "checkpoint", type=Path, help="RUN/checkpoints/best.safetensors, or a pruned one"
    )
    parser.add_argument(
        "--fraction",
        type=float,
        required=True,
        help="share of its heads to remove, between 0 and 1",
    )
    parser.add_argument("--out", type=Path, required=True, help="file for the pruned checkpoint")
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="where accuracy is measured (default: val, or test where nothing was held out)",
    )
    parser.add_argument("--limit", type=int, help="images of each split, for a quick try")
    parser.add_argument("--data-root", help="where the data set lies now")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    if not 0 < options.fraction < 1:
        raise ConfigError(f"--fraction must be between 0 and 1, got {options.fraction:g}")
    if options.limit is not None and options.limit <= 0:
        raise ConfigError(f"--limit must be a positive number, got {options.limit}")
    if options.out.is_dir() or (
        options.out.exists()
        and options.checkpoint.exists()
        and options.out.samefile(options.checkpoint)
    ):
        raise ConfigError(
            f"--out {options.out}: give the name of a new file; this is a folder or the checkpoint itself"
        )
    prune(options)


def prune(options: argparse.Namespace) -> None:
    # Imported here so that --help and a mistaken command answer at once.
    import copy

    from vit.checkpoints.file import write_checkpoint
    from vit.data.loader import evaluation_batches
    from vit.data.splits import sample_evenly
    from vit.evaluation.accuracy import wilson_interval
    from vit.evaluation.restore import restore
    from vit.model.cost import count_macs
    from vit.model.head_pruning import attention_modules, importance, least_important, removed_heads
    from vit.runtime.device import choose_device, describe_device, loader_workers

    device = choose_device(options.device)
    changes = {"data.root": options.data_root, "data.limit": options.limit}
    restored = restore(
        options.checkpoint,
        {key: value for key, value in changes.items() if value is not None},
        device,
    )
    model, data, precision, workers = (
        restored.model,
        restored.data,
        restored.precision,
        loader_workers(None),
    )
    split = options.split or ("test" if data.val is None else "val")
    images = data.split(split)
    with writing_to(
        f"--out {options.out}"
    ):  # before the work, so that a place that can't be written to is told at once
        options.out.parent.mkdir(parents=True, exist_ok=True)

    scored = data.train.subset(sample_evenly(data.train.labels, SCORING_IMAGES))
    scores = importance(
        model, evaluation_batches(scored, SCORING_BATCH, model.preprocessing, workers, device)
    )
    heads = least_important(scores, options.fraction)
    before, after = (
        sum(len(attention.heads) for attention in attention_modules(model)),
        sum(map(len, heads.values())),
    )
    if not heads:
        raise ConfigError(
            f"--fraction {options.fraction:g} removes none of the {before} heads in {len(scores)} layers; raise "
            "it, but one head stays in every layer"
        )
    pruned = copy.deepcopy(model)
    pruned.prune_heads(heads)
    fewer = (
        ""
        if after == round(options.fraction * before)
        else " (fewer than asked, as one stays in every layer)"
    )
    print(
        f"importance of the heads on {scored} (train), and [in brackets] those removed, {after} of {before}{fewer}"
    )
    print(table(scores, heads))

    pair = {"before": model, "after": pruned}
    accuracy = {}
    for name, measured in pair.items():
        metrics = accuracy[name] = restored.measure(measured, split, workers)
        low, high = wilson_interval(metrics["top1"], int(metrics["n"]))
        print(
            f"{name:7} top-1 {metrics['top1']:.2%} (95 % interval {low:.2%} to {high:.2%}), loss {metrics['loss']:.4f} "
            f"({images})"
        )
    batch = next(
        iter(
            evaluation_batches(
                images, restored.config.train.batch_size, model.preprocessing, workers, device
            )
        )
    )[0]
    speed = seconds(list(pair.values()), batch, precision)
    for (name, measured), took in zip(pair.items(), speed, strict=True):
        print(
            f"{name:7} {measured.num_parameters():,} parameters, {count_macs(measured) / 1e6:,.1f} million multiply-adds and "
            f"{1000 * took / len(batch):.3f} ms an image"
        )
    print(
        f"{speed[0] / speed[1]:.2f} times as fast (batches of {len(batch)}, {precision.name} on "
        f"{describe_device(device)}, medians of {SPEED_ROUNDS} in turn)"
    )

    config = {
        **restored.header["config"],
        "model": {**restored.header["config"]["model"], "pruned_heads": removed_heads(pruned)},
    }
    note = {
        "from": str(options.checkpoint),
        "measured_on": str(images),
        "top1_before": accuracy["before"]["top1"],
        "top1_after": accuracy["after"]["top1"],
    }
    with writing_to(f"--out {options.out}"):
        write_checkpoint(
            options.out, pruned.state_dict(), {**restored.header, "config": config, "pruning": note}
        )
    print(f"written to {options.out}")


def table(scores: "Tensor", removed: dict[int, list[int]]) -> str:
    """The importance of every head, a line a layer; [in brackets] those removed now, a dash for those that were before."""
    lines = ["          " + "".join(f"{f'head {head}':^9}" for head in range(scores.shape[1]))]
    for layer, row in enumerate(scores.tolist()):
        shown = [
            "-"
            if score != score
            else f"[{score:.3f}]"
            if head in removed.get(layer, [])
            else f"{score:.3f}"
            for head, score in enumerate(row)
        ]
        lines.append(f"layer {layer:<4}" + "".join(f"{word:^9}" for word in shown))
    return "\n".join(line.rstrip() for line in lines)


def seconds(
    models: "Sequence[VisionTransformer]", images: "Tensor", precision: "Precision"
) -> list[float]:
    """The median time of a forward pass of each model, measured in turn so that a change of the machine's pace hits all."""
    import statistics
    import time

    import torch

    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode(), precision.autocast():
        for turn in range(SPEED_ROUNDS + 3):
            for model, row in zip(models, times, strict=True):
                began = time.perf_counter()
                logits = model(images)
                logits[0, 0].item()  # waits for the device
                if turn >= 3:  # the first are slower
                    row.append(time.perf_counter() - began)
    return [statistics.median(row) for row in times]


if __name__ == "__main__":
    sys.exit(run_command("vit.prune", main))
