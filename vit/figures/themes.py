"""How figures drawn by matplotlib look, on light and on dark pages."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 100


@dataclass(frozen=True)
class Theme:
    """Colors of a figure; base.css and page.html of vit/report have the same ones.

    suffix: of the names of files with figures in this theme.
    """

    suffix: str
    background: str
    text: str
    faint: str  # axes and grids
    first: str  # of two curves, and of filled cells
    second: str


LIGHT = Theme("", "#ffffff", "#24292f", "#d0d7de", "#0b62c4", "#c4500b")
DARK = Theme("_dark", "#16191e", "#d5dae1", "#3b424c", "#6cb0ff", "#ffa15e")


def matplotlib_settings(theme: Theme) -> dict[Any, Any]:
    from cycler import cycler

    return {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "axes.edgecolor": theme.faint,
        "grid.color": theme.faint,
        "axes.prop_cycle": cycler(color=[theme.first, theme.second]),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "font.size": 9,
        "legend.framealpha": 0,
        "figure.dpi": DOTS_PER_INCH,
        "savefig.dpi": DOTS_PER_INCH,
        # A dollar sign in the name of a class is no formula
        "text.parse_math": False,
    }


@contextlib.contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Within the block, figures are drawn and saved in the theme."""
    import matplotlib  # late, as in vit/figures/confusion.py

    with matplotlib.rc_context(matplotlib_settings(theme)), warnings.catch_warnings():
        # Names of classes may be in scripts that the font lacks
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def rasterize(figure: "Figure") -> Tensor:
    """The pixels of a figure, uint8 (3, height, width)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
