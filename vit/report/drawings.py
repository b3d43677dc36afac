"""TODO: say what this file is for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor
from torchvision.utils import make_grid

from vit.evaluation.accuracy import wilson_interval
from vit.evaluation.measurements import BINS, Measured
from vit.evaluation.metrics import reliability

# Classes at most with counts in the confusion matrix's cells; with names at its sides; with a row of their own
NUMBERED, NAMED, CELLS = 20, 40, 250


DOTS = 100  # per inch of a figure


@dataclass(frozen=True)
class Theme:
    """Colours of a figure on a light or a dark page; the page's own stand in STYLE."""

    suffix: str
    background: str
    text: str
    faint: str
    first: str
    second: str

    def settings(self) -> dict[Any, Any]:
        """matplotlib's."""
        return {
            "figure.facecolor": self.background,
            "axes.facecolor": self.background,
            "savefig.facecolor": self.background,
            "text.color": self.text,
            "axes.labelcolor": self.text,
            "xtick.color": self.text,
            "ytick.color": self.text,
            "axes.edgecolor": self.faint,
            "grid.color": self.faint,
            "legend.framealpha": 0,
            "font.size": 9,
            "axes.prop_cycle": cycler(color=[self.first, self.second]),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "text.parse_math": False,
        }


LIGHT = Theme("", "#ffffff", "#24292f", "#d0d7de", "#0b62c4", "#c4500b")


DARK = Theme("_dark", "#16191e", "#d5dae1", "#3b424c", "#6cb0ff", "#ffa15e")


def mosaic(panels: Tensor, gap: int) -> Tensor:
    """(rows, columns, 3, height, width) → (4, …), side by side, the page showing through the gaps."""
    opaque = torch.cat([panels, torch.ones_like(panels[:, :, :1])], dim=2)
    return make_grid(opaque.flatten(0, 1), nrow=panels.shape[1], padding=gap, pad_value=0.0)[
        :, gap:-gap, gap:-gap
    ]


def enlarge(pixels: Tensor, factor: int) -> Tensor:
    return pixels.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)


def draw_confusion(theme: Theme, confusion: Tensor, names: Sequence[str]) -> Figure:
    """Cells have a whole number of pixels, so that none is lost; of more than CELLS classes neighbours share one."""
    together = -(-len(names) // CELLS)
    count = -(-len(names) // together)
    missing = count * together - len(names)
    grouped = (
        F.pad(confusion, (0, missing, 0, missing))
        .reshape(count, together, count, together)
        .sum(dim=(1, 3))
    )
    cell = (
        46
        if count <= 10
        else 34
        if count <= NUMBERED
        else 18
        if count <= NAMED
        else max(1, 750 // count)
    )
    side = cell * count
    longest = max(len(short(name)) for name in names) if count <= NAMED else 4
    left, below, rest = 34 + 7 * longest, 34 + 7 * longest, 14
    across, down = side + left + rest, side + below + rest
    drawn = Figure(figsize=(across / DOTS, down / DOTS))
    axes = drawn.add_axes((left / across, below / down, side / across, side / down))
    shares = (grouped / grouped.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    scale = LinearSegmentedColormap.from_list("cells", [theme.background, theme.first])
    axes.imshow(
        shares,
        cmap=scale,
        norm=PowerNorm(1.0 if count <= NUMBERED else 0.5, 0, 1),
        interpolation="none",
        extent=None
        if together == 1
        else (-0.5, count * together - 0.5, count * together - 0.5, -0.5),
    )
    axes.spines[:].set_visible(True)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if count <= NAMED:
        axes.set_xticks(range(count), [short(name) for name in names], rotation=90)
        axes.set_yticks(range(count), [short(name) for name in names])
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
    if count <= NUMBERED:
        most = int(confusion.max())
        size = min(9.0, 0.9 * cell / max(2, len(str(most))))
        for row, column in confusion.nonzero().tolist():
            on = theme.background if shares[row, column] > 0.6 else theme.text
            axes.text(
                column,
                row,
                str(int(confusion[row, column])),
                ha="center",
                va="center",
                color=on,
                fontsize=size,
            )
    return drawn


def short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def draw_calibration(theme: Theme, measured: Measured) -> Figure:
    """The reliability diagram, and below it how many samples each bin holds."""
    drawn = Figure(figsize=(5.6, 5.2), layout="constrained")
    upper, lower = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=theme.faint, linewidth=1)
    temperature = measured.found["temperature"]
    for number, (value, label) in enumerate(((1.0, "as it is"), (temperature, "with temperature"))):
        if value is None:
            continue
        bins = reliability(measured.logits, measured.images.labels, BINS, value)
        there = bins.count > 0
        confidence, accuracy, counts = (
            values[there].tolist() for values in (bins.confidence, bins.accuracy, bins.count)
        )
        ends = [wilson_interval(part, int(n)) for part, n in zip(accuracy, counts, strict=True)]
        reach = [
            [max(0.0, part - low) for part, (low, _) in zip(accuracy, ends, strict=True)],
            [max(0.0, high - part) for part, (_, high) in zip(accuracy, ends, strict=True)],
        ]
        upper.errorbar(
            confidence,
            accuracy,
            reach,
            marker="o",
            markersize=4,
            linewidth=1.2,
            label=label,
            elinewidth=0.8,
        )
        width = 1 / BINS
        lower.bar(
            [(place + 0.28 + 0.44 * number) * width for place in range(BINS)],
            bins.count.tolist(),
            width * 0.42,
        )
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1.02)
    lower.set_xlim(0, 1)
    lower.set_ylabel("images")
    lower.set_xlabel("confidence")
    for axis in (upper.xaxis, upper.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    if temperature is not None:
        upper.legend(loc="upper left")
    return drawn


def filter_components(weight: Tensor, count: int) -> Tensor:
    """(D, C, P, Q) filters → their first principal components, (count, 3, P, Q) in 0..1, each scaled to its own range around
    0.5. A component's sign is arbitrary: its largest value is made positive."""
    flat = weight.flatten(1)
    components = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False).Vh[:count]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    return (0.5 + components / largest / 2).unflatten(1, weight.shape[1:]).expand(-1, 3, -1, -1)


def position_similarity(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """(R·S, D) → cosines (R, S, R, S): of the patch at the first two places with all others."""
    unit = F.normalize(positions, dim=1)
    return (unit @ unit.T).reshape(*grid, *grid)


def draw_curves(theme: Theme, rows: Sequence[dict[str, Any]], best: int | None) -> Figure:
    drawn = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, key in zip(drawn.subplots(1, 2), ("loss", "top1"), strict=True):
        for split in ("train", "val"):
            points = [
                (row["step"], row[key])
                for row in rows
                if row.get("split") == split and row.get(key) is not None
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    label=split,
                    linewidth=1.2,
                    marker="o" if len(points) < 10 else "",
                    markersize=3,
                )
        tests = [
            (row["step"], row[key])
            for row in rows
            if row.get("split") == "test" and row.get(key) is not None
        ]
        if tests:
            axes.plot(*zip(*tests, strict=True), "D", color=theme.text, markersize=5, label="test")
        if isinstance(best, int):
            axes.axvline(best, color=theme.text, linestyle=":", linewidth=0.8)
        axes.set_title("loss" if key == "loss" else "top-1")
        axes.set_xlabel("step")
        axes.grid(alpha=0.6, linewidth=0.6)
        if key == "top1":
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return drawn
