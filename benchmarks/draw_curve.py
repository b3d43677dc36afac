"""Draws a run's loss and top-1 over its epochs, from metrics.jsonl, and the test accuracy of its result.

python benchmarks/draw_curve.py outputs/cifar10_fast --epochs 10 --out benchmarks/results/cifar10_fast.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--epochs", type=float, required=True, help="that the run's steps make up")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((arguments.run / "result.json").read_text())
    scale = arguments.epochs / result["steps"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, key, title in ((axes[0], "loss", "loss"), (axes[1], "top1", "top-1")):
        for split in ("train", "val"):
            points = [
                (row["step"] * scale, row[key])
                for row in rows
                if row["split"] == split and key in row
            ]
            if points:
                axis.plot(*zip(*points, strict=True), label=split, linewidth=1)
        axis.set_xlabel("epoch")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    if result["test_top1"] is not None:
        axes[1].plot(
            [arguments.epochs],
            [result["test_top1"]],
            "o",
            color="black",
            label=f"test {result['test_top1']:.2%}",
        )
    axes[1].legend(loc="lower right")
    figure.suptitle(
        f"{arguments.run.name}: {result['steps']:,} steps in {result['seconds'] / 60:.1f} minutes",
        fontsize=10,
    )
    figure.tight_layout()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
