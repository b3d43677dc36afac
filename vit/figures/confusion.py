"""The confusion matrix as an image, for any number of classes."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from vit.figures.themes import DOTS_PER_INCH, Theme
from vit.text import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Up to so many classes, the cells hold their counts; the axes, the names of the classes
MAX_CLASSES_WITH_COUNTS = 20
MAX_CLASSES_WITH_NAMES = 40

# Cells a side; of more classes, neighbors share a cell
MAX_CELLS = 250

# Pixels
MATRIX_SIDE = 460  # of few classes
LARGE_MATRIX_SIDE = 750  # of many
LARGEST_CELL = 92
SMALLEST_CELL_WITH_COUNT = 34
LETTER_WIDTH = 7  # about

NAME_LENGTH = 14


def classes_per_cell(num_classes: int) -> int:
    return math.ceil(num_classes / MAX_CELLS)


def draw_confusion(theme: Theme, confusion: Tensor, names: Sequence[str]) -> "Figure":
    """Draw counts (C, C), rows are the true classes; to be called within themed(theme).

    The color of a cell is its fraction of the row. Of more than MAX_CLASSES_WITH_COUNTS classes it
    is the root of the fraction, so that rare confusions show, and a bar beside the matrix gives the
    scale.
    """
    # Training imports this module and draws only later; matplotlib takes half a second to import
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    per_cell = classes_per_cell(len(names))
    counts = sum_blocks(confusion, per_cell)
    cells = len(counts)
    with_counts = cells <= MAX_CLASSES_WITH_COUNTS

    # All cells have the same whole number of pixels, so that the image is sharp
    if with_counts:
        cell_size = min(LARGEST_CELL, max(SMALLEST_CELL_WITH_COUNT, MATRIX_SIDE // cells))
    else:
        cell_size = LARGE_MATRIX_SIDE // cells
    shown_names = [shorten(name, NAME_LENGTH) for name in names]
    if len(names) > MAX_CLASSES_WITH_NAMES:
        shown_names = []
    figure, axes = square_axes(cell_size * cells, shown_names, with_scale=not with_counts)

    fractions = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    edge = cells * per_cell - 0.5
    image = axes.imshow(
        fractions,
        cmap=LinearSegmentedColormap.from_list("cells", [theme.background, theme.first]),
        norm=PowerNorm(1.0 if with_counts else 0.5, 0, 1),
        interpolation="none",
        extent=(-0.5, edge, edge, -0.5),
    )
    axes.spines[:].set_visible(True)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if shown_names:
        axes.set_xticks(range(cells), shown_names, rotation=90)
        axes.set_yticks(range(cells), shown_names)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
    if with_counts:
        write_counts(axes, theme, counts, cell_size)
    else:
        bar = figure.colorbar(image, cax=figure.axes[1], ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
        bar.outline.set_edgecolor(theme.faint)  # pyright: ignore[reportCallIssue]
        bar.set_label("of the true class")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    return figure


def sum_blocks(confusion: Tensor, side: int) -> Tensor:
    """Sum blocks of side x side cells; at the end of each axis, a block may be of fewer."""
    blocks = math.ceil(len(confusion) / side)
    missing = blocks * side - len(confusion)
    padded = F.pad(confusion, (0, missing, 0, missing))
    return padded.reshape(blocks, side, blocks, side).sum(dim=(1, 3))


def square_axes(side: int, names: Sequence[str], with_scale: bool) -> "tuple[Figure, Axes]":
    """A figure with axes of `side` pixels, and margins for the names and, on the right, a scale.

    matplotlib's layouts would give the axes a fraction of a pixel.
    """
    from matplotlib.figure import Figure

    longest = max((len(name) for name in names), default=4)
    before = 44 + LETTER_WIDTH * longest  # on the left, and below
    after = 14  # above, and on the right
    scale = 96 if with_scale else 0
    width = before + side + after + scale
    height = before + side + after
    figure = Figure(figsize=(width / DOTS_PER_INCH, height / DOTS_PER_INCH))
    axes = figure.add_axes((before / width, before / height, side / width, side / height))
    if with_scale:
        left = before + side + after
        figure.add_axes((left / width, before / height, 12 / width, side / height))
    return figure, axes


def write_counts(axes: "Axes", theme: Theme, counts: Tensor, cell_size: int) -> None:
    """Write the counts other than 0 into their cells."""
    fractions = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    digits = len(str(int(counts.max())))
    font_size = min(9.0, 0.9 * cell_size / max(2, digits))
    for row, column in counts.nonzero().tolist():
        dark_cell = fractions[row, column] > 0.6
        axes.text(
            column,
            row,
            str(int(counts[row, column])),
            ha="center",
            va="center",
            color=theme.background if dark_cell else theme.text,
            fontsize=font_size,
        )
