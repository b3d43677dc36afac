"""Advice on cheaper runs, and the last lines of a run on the screen."""

import logging
import shlex
from collections.abc import Mapping

from vit.config.config import Config
from vit.evaluation.accuracy import wilson_interval
from vit.runs.folder import RunFolder
from vit.runs.selection import CRITERIA, describe, describe_value
from vit.text import format_duration

log = logging.getLogger("vit")

# Models for small and for large images with their multiply-adds an image, the larger first. The
# small images are those of data sets that are read into memory
SMALL_IMAGE_MODELS = {"vit_s4": 1.4e9, "vit_ti4": 0.35e9}
LARGE_IMAGE_MODELS = {"vit_s16": 4.6e9, "vit_ti16": 1.26e9}


def cheaper_setting(macs: int, config: Config, small_images: bool) -> str:
    """Return the setting that makes the same command cheaper: KEY=VALUE.

    It is the largest model that takes less than half the work, or else a quarter of the run's
    length. Pretrained weights fit no other model: of these only the head is trained, to begin with.
    macs: multiply-adds of one image's forward pass in the configuration; small_images: all of them
    fit into memory.
    """
    train = config.train
    if config.pretrained is None:
        models = SMALL_IMAGE_MODELS if small_images else LARGE_IMAGE_MODELS
        for model, cost in models.items():
            if cost < macs / 2:
                return f"model={model}"
    elif train.freeze == "none" and train.lora_rank is None:
        return "train.freeze=backbone"
    if train.steps is not None:
        return f"train.steps={max(1, train.steps // 4)}"
    return f"train.epochs={train.epochs / 4:g}"


def log_result(
    run: RunFolder,
    *,
    best: Mapping[str, float | None],
    best_step: int | None,
    select: str,
    test: Mapping[str, float],
    seconds: float,
    val_title: str,
    test_title: str,
    note: str = "",
) -> None:
    """Log what a run reached, where its folder is, and what to do next.

    best: the metrics on the validation split, None where nothing is held out; select: what was
    best in it; test: the metrics of vit.evaluation.accuracy.evaluate; val_title, test_title: names
    and sizes of the splits. note: what to compare the test accuracy with where classes are
    unbalanced, whose balanced accuracy is then told too; empty: they are not.
    """
    # Every reported number names its split, its size and its uncertainty
    low, high = wilson_interval(test["top1"], int(test["n"]))
    if (value := best[select]) is not None:
        shown = describe_value(select, value) + others(best, select, unbalanced=bool(note))
        title = f"best validation {CRITERIA[select]}"
        log.info(f"{title:22} {shown}, after step {best_step} ({val_title})")
    shown = describe_value("top1", test["top1"]) + others(test, "top1", unbalanced=bool(note))
    interval = f"95 % interval {low:.2%} to {high:.2%}"
    compared = f"; {note}" if note else ""
    log.info(f"test top-1             {shown}, {interval} ({test_title}){compared}")
    log.info(f"trained in             {format_duration(seconds)}; the run is in {run.path}")

    log_next_commands(run)


def others(metrics: Mapping[str, float | None], told: str, unbalanced: bool) -> str:
    """Return what belongs beside a metric: top-1, and the balanced accuracy where it differs."""
    names = ("top1", "balanced_top1") if unbalanced else ("top1",)
    known = {name: metrics[name] for name in names if name != told}
    texts = [describe(name, value) for name, value in known.items() if value is not None]
    return f" ({', '.join(texts)})" if texts else ""


def log_next_commands(run: RunFolder) -> None:
    """Log what a person may want to do with a finished run, ready to be pasted."""
    checkpoint = f"{run.path}/checkpoints/best.safetensors"
    explorer = shlex.join(
        ["python", "-m", "vit.explore", checkpoint, "--out", f"{run.path}/explorer.html"]
    )
    report = shlex.join(["python", "evaluate.py", f"checkpoint={checkpoint}", "report=true"])
    # All runs in outputs/ on one page, to compare them
    folder = "outputs" if run.path.parts[0] == "outputs" else str(run.path)
    curves = shlex.join(["tensorboard", "--logdir", folder])
    log.info(f"next\n  look inside: {explorer}\n  a report:    {report}\n  the curves:  {curves}")
