"""Compare two runs: python -m vit.compare RUN RUN.

Prints where their configurations differ, their metrics side by side, and, from both best
checkpoints on the same images, whether their difference in accuracy is more than chance: McNemar's
exact test on the images that one gets right and the other wrong (McNemar 1947; Dietterich 1998,
section 3.1).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit.config.config import flatten, read_config_file
from vit.config.image_options import check_minima
from vit.errors import ConfigError, run_command
from vit.files import read_json
from vit.text import markdown_table

# torch takes seconds to import, and --help and a mistyped command should answer at once. So torch,
# and the modules of vit that import it, are imported inside the functions that need them.
if TYPE_CHECKING:
    from torch import Tensor

# Keys of result.json, in the order of the table
METRICS = (
    "status",
    "select",
    "val_top1",
    "val_balanced_top1",
    "val_macro_f1",
    "val_loss",
    "test_top1",
    "test_balanced_top1",
    "test_macro_f1",
    "test_loss",
    "best_step",
    "steps",
    "params",
    "seconds",
    "images_per_second",
)

# Keys of the configuration that say how the command was given, not what was trained
IGNORED_KEYS = ("resume", "resume_changed", "explain", "jobs_at_once")

# Differences that chance gives less often than this are called a difference
SIGNIFICANCE_LEVEL = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vit.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--workers", type=int, help="processes that decode images")
    options = parser.parse_args(arguments)
    check_minima(options, {"workers": 0})
    print(compare(options.runs, options.split, options.workers))


def compare(folders: Sequence[Path], split: str, workers: int | None) -> str:
    """Compare two run folders and describe the result, in three paragraphs.

    Raises ConfigError where a folder is not a run's or the two were not tested on the same images.
    """
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"{folder}: not a run folder (it has no config.yaml)")
    paragraphs = (
        f"configuration\n{configuration_table(folders)}",
        f"metrics\n{metrics_table(folders)}",
        compare_predictions(folders, split, workers),
    )
    return "\n\n".join(paragraphs)


def configuration_table(folders: Sequence[Path]) -> str:
    first, second = (read_config_file(folder / "config.yaml") for folder in folders)
    differences = find_differences(first, second)
    if not differences:
        return "the same, apart from the run folder and how the run was started"
    rows = [["key", *map(str, folders)]]
    rows += [[key, str(value), str(other_value)] for key, value, other_value in differences]
    return markdown_table(rows)


def find_differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, value, value) where two plain configurations differ, in the order of their keys.

    The value of a key that one of them lacks is None there.
    """
    first, second = flatten(first), flatten(second)
    differences = []
    for key in {**first, **second}:
        value, other_value = first.get(key), second.get(key)
        if key not in IGNORED_KEYS and value != other_value:
            differences.append((key, value, other_value))
    return differences


def metrics_table(folders: Sequence[Path]) -> str:
    results = [read_json(folder / "result.json") for folder in folders]
    rows = [["", *map(str, folders)]]
    for key in METRICS:
        values = [result.get(key) for result in results]
        # Earlier versions measured less
        if any(value is not None for value in values):
            rows.append([key, *map(format_metric, values)])
    return markdown_table(rows)


def format_metric(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def compare_predictions(folders: Sequence[Path], split: str, workers: int | None) -> str:
    """Test on the same images whether one run's best checkpoint is more accurate than the other's.

    Raises ConfigError if the images are not the same.
    """
    from vit.data.class_matching import in_the_same_order, only_one_has_names

    first, second = (predict_split(folder, split, workers) for folder in folders)
    # The classes and the labels in their order stand for the images, which are not kept: the same
    # images may lie in folders here and in shards, maybe without names, there
    names = (first.classes, second.classes)
    same_classes = in_the_same_order(*names) or only_one_has_names(*names)
    if not same_classes or first.labels.tolist() != second.labels.tolist():
        raise ConfigError(
            f"{folders[0]} and {folders[1]}: their {split} images are not the same, so their "
            "predictions can't be paired"
        )
    only_first, only_second, p = mcnemar(first.correct, second.correct)
    if p >= SIGNIFICANCE_LEVEL:
        verdict = "no more than chance would give"
    else:
        verdict = f"{folders[0] if only_first > only_second else folders[1]} is better"
    return (
        f"paired on the same images: {first.title}\n"
        f"top-1 {first.accuracy:.2%} and {second.accuracy:.2%}; only the first is right on "
        f"{only_first:,}, only the second on {only_second:,}; McNemar's exact test p = {p:.3g}: "
        f"{verdict}"
    )


@dataclass(frozen=True)
class SplitPredictions:
    """How a model does on the n images of a split.

    correct: bool (n,), whether its prediction is right.
    labels: (n,), the true classes.
    classes: their names.
    title: what the images are.
    """

    correct: "Tensor"
    labels: "Tensor"
    classes: list[str]
    title: str

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item()


def predict_split(folder: Path, split: str, workers: int | None) -> SplitPredictions:
    """Predict a split with the best checkpoint of a run."""
    import torch

    from vit.checkpoints.file import BEST
    from vit.evaluation.restore import restore
    from vit.runtime.cores import loader_workers
    from vit.runtime.device import start_device
    from vit.runtime.faults import failures_explained

    device = start_device("auto")
    restored = restore(folder / "checkpoints" / BEST, {}, device)
    images = restored.data.split(split)

    model = restored.model

    def is_correct(pixels: "Tensor", labels: "Tensor") -> "Tensor":
        inputs = model.preprocessing.to_input(pixels)
        with restored.precision.autocast():
            logits = model(inputs)
        return (logits.argmax(dim=1) == labels).cpu()

    correct: list[Tensor] = []
    with torch.inference_mode(), failures_explained("a single image is too much for this device"):
        num_workers = loader_workers(workers, device_type=device.type)
        for pixels, labels in restored.batches(images, num_workers):
            correct += restored.memory.parts(is_correct, pixels, labels)
    return SplitPredictions(torch.cat(correct), images.labels, model.classes, str(images))


def mcnemar(first: "Tensor", second: "Tensor") -> tuple[int, int, float]:
    """McNemar's exact test of two models on the same n images.

    Where both are equally good, each image on which they disagree is as likely to favor either: a
    binomial test of one half.

    first, second: bool (n,), the images that each gets right. Returns how many only the first gets
    right, how many only the second, and the two-sided p-value.
    """
    from scipy.stats import binomtest

    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    disagreements = only_first + only_second
    if disagreements == 0:
        return 0, 0, 1.0
    return only_first, only_second, float(binomtest(only_first, disagreements).pvalue)


if __name__ == "__main__":
    sys.exit(run_command("vit.compare", main))
