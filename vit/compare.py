"""Compare two runs: python -m vit.compare RUN RUN.

Prints where their configurations differ, their metrics side by side, and, from both best checkpoints on the same test images,
whether the difference in accuracy is more than chance: McNemar's exact test on the images that one gets right and the other
wrong (McNemar 1947; Dietterich 1998, section 3.1).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit.checkpoints.run import BEST
from vit.config.config import flatten, read_yaml
from vit.errors import ConfigError, run_command
from vit.files import read_json
from vit.text import markdown_table

if TYPE_CHECKING:
    from torch import Tensor


METRICS = (
    "status",
    "val_top1",
    "test_top1",
    "test_loss",
    "best_step",
    "steps",
    "params",
    "seconds",
    "images_per_second",
)


IGNORED = ("resume", "resume_changed", "explain", "jobs_at_once")


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value, value) of two plain configurations where they differ, in their order; a key that one lacks is None there."""
    flat = [flatten(container) for container in (first, second)]
    keys = [key for key in {**flat[0], **flat[1]} if key not in IGNORED]
    return [
        (key, flat[0].get(key), flat[1].get(key))
        for key in keys
        if flat[0].get(key) != flat[1].get(key)
    ]


def mcnemar(first: "Tensor", second: "Tensor") -> tuple[int, int, float]:
    """(images only the first gets right, only the second, two-sided p) from two bool (n,) of which images are right.

    Where both are equally good, each disagreement is as likely to favour either: a binomial test of ½.
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    disagreements = only_first + only_second
    return (
        only_first,
        only_second,
        1.0 if disagreements == 0 else float(binomtest(only_first, disagreements).pvalue),
    )


def right_ones(folder: Path, split: str, workers: int | None) -> "tuple[Tensor, Tensor, str]":
    """(which images of a split a run's best checkpoint gets right, their labels, the split's title)."""
    import torch

    from vit.data.loader import evaluation_batches
    from vit.evaluation.restore import restore
    from vit.runtime.device import choose_device, loader_workers

    device = choose_device("auto")
    restored = restore(folder / "checkpoints" / BEST, {}, device)
    images = restored.data.split(split)
    right = []
    with torch.inference_mode():
        for inputs, targets in evaluation_batches(
            images,
            restored.config.train.batch_size,
            restored.model.preprocessing,
            loader_workers(workers),
            device,
        ):
            with restored.precision.autocast():
                logits = restored.model(inputs)
            right.append((logits.argmax(dim=1) == targets).cpu())
    return torch.cat(right), images.labels, str(images)


def compare(folders: Sequence[Path], split: str, workers: int | None) -> str:
    """Raises ConfigError where a folder is no run or the two were not tested on the same images."""
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}: no run folder (it has no config.yaml)")
    names = [str(folder) for folder in folders]
    changed = differences(*(read_yaml(folder / "config.yaml") for folder in folders))
    results = [read_json(folder / "result.json") for folder in folders]
    parts = [
        "configuration",
        markdown_table([["key", *names], *([key, str(a), str(b)] for key, a, b in changed)])
        if changed
        else "the same, but for where and how often",
        "",
        "metrics",
        markdown_table(
            [
                ["", *names],
                *([key, *(told(result.get(key)) for result in results)] for key in METRICS),
            ]
        ),
        "",
    ]
    (right, labels, title), (other, other_labels, _) = (
        right_ones(folder, split, workers) for folder in folders
    )
    if labels.tolist() != other_labels.tolist():
        raise ConfigError(
            f"{names[0]} and {names[1]}: their {split} images are not the same, so they can't be paired"
        )
    first, second, p = mcnemar(right, other)
    verdict = (
        "no more than chance would give"
        if p >= 0.05
        else f"{names[0] if first > second else names[1]} is better"
    )
    parts += [
        f"paired on the same images: {title}",
        f"top-1 {right.float().mean():.2%} and {other.float().mean():.2%}; only the first is right on "
        f"{first:,}, only the second on {second:,}; McNemar's exact test p = {p:.3g}: {verdict}",
    ]
    return "\n".join(parts)


def told(value: Any) -> str:
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vit.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--workers", type=int, help="processes that decode pictures")
    options = parser.parse_args(given)
    print(compare(options.runs, options.split, options.workers))


if __name__ == "__main__":
    sys.exit(run_command("vit.compare", main))
