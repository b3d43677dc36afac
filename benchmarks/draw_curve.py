"""Draw a run's loss and top-1 over its epochs, and the test accuracy of its result.

python benchmarks/draw_curve.py outputs/cifar10_fast --epochs 10 --out curve.png
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

# Before pyplot is imported, which would look for a screen
matplotlib.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The script is started by its path, and the repository is not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from vit.files import read_json, read_jsonl


def draw_splits(axis: Axes, rows: list[dict[str, Any]], key: str, epochs_per_step: float) -> None:
    """Draw a metric of the training and the validation split over the epochs."""
    for split in ("train", "val"):
        points = [row for row in rows if row["split"] == split and key in row]
        if points:
            epochs = [row["step"] * epochs_per_step for row in points]
            values = [row[key] for row in points]
            axis.plot(epochs, values, label=split, linewidth=1)
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)


def draw_run(run: Path, num_epochs: float) -> Figure:
    """Draw a run folder's curves. num_epochs: those that the run's steps make up."""
    rows = read_jsonl(run / "metrics.jsonl")
    result = read_json(run / "result.json")
    epochs_per_step = num_epochs / result["steps"]

    figure, (loss_axis, top1_axis) = plt.subplots(1, 2, figsize=(9, 3.2))
    draw_splits(loss_axis, rows, "loss", epochs_per_step)
    loss_axis.set_title("loss")
    draw_splits(top1_axis, rows, "top1", epochs_per_step)
    top1_axis.set_title("top-1")

    test_top1 = result["test_top1"]
    if test_top1 is not None:
        label = f"test {test_top1:.2%}"
        top1_axis.plot([num_epochs], [test_top1], "o", color="black", label=label)
    top1_axis.legend(loc="lower right")

    minutes = result["seconds"] / 60
    title = f"{run.name}: {result['steps']:,} steps in {minutes:.1f} minutes"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("--epochs", type=float, required=True, help="that the run's steps make up")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    figure = draw_run(arguments.run, arguments.epochs)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
