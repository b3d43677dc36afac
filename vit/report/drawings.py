"""Figures of the report: calibration, learning curves, and what the weights hold.

Those drawn by matplotlib take a Theme and are to be called within themed(theme); the others turn
tensors into pixels in 0..1.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from vit.evaluation.accuracy import wilson_interval
from vit.evaluation.metrics import Reliability
from vit.figures.attention import tile
from vit.figures.themes import Theme

# Curves of fewer points than this have a marker at each
FEW_POINTS = 10


def mosaic(panels: Tensor, gap: int = 4) -> Tensor:
    """(rows, columns, 3, height, width) → one image (4, …) with transparent gaps between them.

    The fourth channel is the opacity, so that the page shows through the gaps.
    """
    opaque = torch.cat([panels, torch.ones_like(panels[:, :, :1])], dim=2)
    return tile(opaque, gap, gap_value=0.0)[:, gap:-gap, gap:-gap]


def draw_calibration(theme: Theme, curves: Sequence[tuple[str, Reliability]]) -> Figure:
    """A reliability diagram (Guo et al. 2017, figure 1), and below it the images in each bin.

    curves: one or two, each with its label.
    """
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    # The diagonal, where confidence and accuracy are equal
    upper.plot([0, 1], [0, 1], color=theme.faint, linewidth=1)
    for number, (label, bins) in enumerate(curves):
        draw_accuracies(upper, label, bins)
        # The curves' bars stand side by side within their bins
        width = 1 / len(bins.count)
        left = torch.arange(len(bins.count)) + 0.28 + 0.44 * number
        lower.bar((left * width).tolist(), bins.count.tolist(), 0.42 * width)
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1.02)
    lower.set_xlim(0, 1)
    lower.set_ylabel("images")
    lower.set_xlabel("confidence")
    for axis in (upper.xaxis, upper.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    if len(curves) > 1:
        upper.legend(loc="upper left")
    return figure


def draw_accuracies(axes: Axes, label: str, bins: Reliability) -> None:
    """The accuracy of the bins that hold images, over their confidence, with 95 % intervals."""
    filled = bins.count > 0
    accuracies = bins.accuracy[filled].tolist()
    below, above = [], []
    # matplotlib takes the distances to the ends, which rounding can make negative at 0 and 1
    for accuracy, count in zip(accuracies, bins.count[filled].tolist(), strict=True):
        low, high = wilson_interval(accuracy, int(count))
        below.append(max(0.0, accuracy - low))
        above.append(max(0.0, high - accuracy))
    axes.errorbar(
        bins.confidence[filled].tolist(),
        accuracies,
        [below, above],
        marker="o",
        markersize=4,
        linewidth=1.2,
        elinewidth=0.8,
        label=label,
    )


def draw_curves(theme: Theme, rows: Sequence[dict[str, Any]], best_step: int | None) -> Figure:
    """Loss, top-1 and where it is logged balanced accuracy, from the rows of metrics.jsonl.

    best_step: where a dotted line marks the best checkpoint; None: nowhere.
    """
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    balanced = points_of(rows, "val", "balanced_top1")
    draw_curve(right, balanced, "val, balanced accuracy", theme.text)
    for axes, key, title in ((left, "loss", "loss"), (right, "top1", "top-1")):
        # Colors by name, since train may have no top-1
        for split, color in (("train", theme.first), ("val", theme.second)):
            draw_curve(axes, points_of(rows, split, key), split, color)
        # Measured once, at the end: a point, not a curve
        tests = points_of(rows, "test", key)
        if tests:
            steps, values = zip(*tests, strict=True)
            axes.plot(steps, values, "D", color=theme.text, markersize=5, label="test")
        # The step whose weights `best` holds
        if best_step is not None:
            axes.axvline(best_step, color=theme.text, linestyle=":", linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.6, linewidth=0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    right.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    return figure


def points_of(rows: Sequence[dict[str, Any]], split: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows of a split that have the key."""
    points = []
    for row in rows:
        if row.get("split") == split and row.get(key) is not None:
            points.append((row["step"], row[key]))
    return points


def draw_curve(axes: Axes, points: Sequence[tuple[int, float]], label: str, color: str) -> None:
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axes.plot(
        steps,
        values,
        color=color,
        label=label,
        linewidth=1.2,
        marker="o" if len(points) < FEW_POINTS else "",
        markersize=3,
    )


def filter_components(weight: Tensor, count: int) -> Tensor:
    """The first principal components of filters (D, C, P, Q): (count, 3, P, Q) in 0..1.

    Each is scaled to its own range around 0.5. A component's sign is arbitrary: its value of
    largest magnitude is made positive. As in Dosovitskiy et al. 2021, figure 7, on the left.
    """
    # One filter a row; the right singular vectors are the principal axes of the rows
    flat = weight.flatten(1)
    components = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False).Vh[:count]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    scaled = 0.5 + components / largest / 2
    return scaled.unflatten(1, weight.shape[1:]).expand(-1, 3, -1, -1)


def position_similarity(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosine similarity of the patches' position embeddings (R·S, D): (R, S, R, S).

    The first two axes are a patch, the last two all others. As in Dosovitskiy et al. 2021, figure
    7, in the middle.
    """
    unit = F.normalize(positions, dim=1)
    return (unit @ unit.T).reshape(*grid, *grid)
