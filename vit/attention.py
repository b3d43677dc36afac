"""Draw where a model looks: attention maps and rollout, laid over images, as PNG files.

    python -m vit.attention RUN/checkpoints/best.safetensors photos/ cat.jpg --out maps

Everything is drawn from `VisionTransformer.trace`, so training keeps its fused attention. Of the
attention's N × N matrices a map shows what the pooled output reads: the class token's row or, with
global_pool=mean, the mean over the patches' rows; and of that row the patches, in their grid. The
class token and registers have no position in the image and are left out.

Sources: rollout, Abnar & Zuidema 2020 (arXiv:2005.00928), section 3; on images, Dosovitskiy et al.
2021 (arXiv:2010.11929), appendix D.8.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vit.errors import ConfigError, run_command, writing_to
from vit.files import atomic_write
from vit.text import escape_unprintable, shorten

# torch takes seconds to import, and --help and a mistyped command should answer at once. So torch,
# and the modules of vit that import it, are imported inside the functions that need them.
if TYPE_CHECKING:
    from torch import Tensor

    from vit.model.vision_transformer import Trace, VisionTransformer

IMAGES_PER_GRID = 8

# Longer side of an image in the grids of images and of heads, in pixels
IMAGE_SIDE = 192
HEAD_SIDE = 112

# Sizes in the PNG files, in pixels; a character of a row's name is CHARACTER_WIDTH wide
DOTS_PER_INCH = 100
PANEL_GAP = 6
CHARACTER_WIDTH = 7
MARGIN_TOP = 34
MARGIN_BOTTOM = 52
MARGIN_RIGHT = 10

NOTE = (
    "Dark to bright: from each map's lowest to its highest patch.\n"
    "Layers and heads are counted from 0."
)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vit.attention", description="Draw attention maps and rollout as PNG grids."
    )
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/best.safetensors, or RUN")
    parser.add_argument(
        "images",
        type=Path,
        nargs="+",
        metavar="IMAGES",
        help="image files, or folders of them",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    parser.add_argument(
        "--limit", type=int, default=16, help="at most this many images (default: 16)"
    )
    return parser.parse_intermixed_args(arguments)  # IMAGES may follow --out


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.limit <= 0:
        raise ConfigError(f"--limit must be a positive number, got {options.limit}")
    draw_images(options)


def draw_images(options: argparse.Namespace) -> None:
    from vit.checkpoints.model import load
    from vit.data.image_files import find_image_files

    paths = find_image_files(options.images, print)
    if len(paths) > options.limit:
        print(f"the first {options.limit} of {len(paths)} images; more with --limit")
        paths = paths[: options.limit]
    model = load(options.checkpoint)
    with writing_to(f"--out {options.out}", "choose another folder"):
        options.out.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(paths), IMAGES_PER_GRID):
            draw_grids(model, paths[start : start + IMAGES_PER_GRID], start, options.out)


def draw_grids(model: "VisionTransformer", paths: Sequence[Path], start: int, folder: Path) -> None:
    """Draw one grid of all the images and, for each, one of all heads.

    start: the index of the first image among all; the files' names count from 1. Raises OSError,
    and DataError for an unreadable image.
    """
    import torch

    from vit.figures.attention import displayable_images, head_panels, image_panels
    from vit.model.attention_maps import trace_images

    images = torch.stack([model.preprocessing(path) for path in paths])
    trace = trace_images(model, images)

    file = folder / f"attention_{start + 1}-{start + len(paths)}.png"
    large = displayable_images(images, model.preprocessing, side=IMAGE_SIDE)
    panels = image_panels(trace, model, large)
    save_grid(file, Grid(panels, image_names(trace, model, paths), column_names(trace), NOTE))
    print(f"{file}: {len(paths)} images")

    small = displayable_images(images, model.preprocessing, side=HEAD_SIDE)
    for number, path in enumerate(paths):
        panels = head_panels(trace, model, small[number], number)
        rows = [f"layer {layer}" for layer in range(panels.shape[0])]
        columns = [f"head {head}" for head in range(panels.shape[1])]
        file = folder / f"heads_{start + number + 1}.png"
        name = shorten(escape_unprintable(path.name), 50)
        save_grid(file, Grid(panels, rows, columns, f"{name}\n{NOTE}"))
        print(f"{file}: every head on {escape_unprintable(str(path))}")


def image_names(trace: "Trace", model: "VisionTransformer", paths: Sequence[Path]) -> list[str]:
    """For each image its file, and the class that the model predicts with its probability."""
    top = trace.logits.softmax(dim=1).max(dim=1)
    names = []
    for path, label, probability in zip(
        paths, top.indices.tolist(), top.values.tolist(), strict=True
    ):
        prediction = f"{shorten(model.classes[label], 22)} {probability:.0%}"
        names.append(f"{shorten(escape_unprintable(path.name), 22)}\n{prediction}")
    return names


def column_names(trace: "Trace") -> list[str]:
    """The names of the columns that `vit.figures.attention.image_panels` draws."""
    from vit.figures.attention import layers_to_show

    layers = layers_to_show(len(trace.attentions))
    return ["image", *(f"layer {layer}, mean" for layer in layers), "rollout"]


@dataclass(frozen=True)
class Grid:
    """Panels, (rows, columns, 3, height, width) in 0..1, with their names and a note below them."""

    panels: "Tensor"
    rows: Sequence[str]
    columns: Sequence[str]
    note: str


def save_grid(path: Path, grid: Grid) -> None:
    """Write a grid as a PNG file, each panel pixel by pixel. Raises OSError."""
    from matplotlib.figure import Figure

    from vit.figures.attention import tile

    canvas = tile(grid.panels, PANEL_GAP).permute(1, 2, 0).clamp(0, 1).numpy()
    canvas_height, canvas_width = canvas.shape[:2]
    # The longest name on the left decides how wide that margin is
    longest = max(len(line) for row in grid.rows for line in row.split("\n"))
    margin_left = 20 + CHARACTER_WIDTH * longest
    width = margin_left + canvas_width + MARGIN_RIGHT
    height = MARGIN_TOP + canvas_height + MARGIN_BOTTOM

    # The axes are as large as the canvas, so that a pixel of it is a pixel of the file
    figure = Figure(figsize=(width / DOTS_PER_INCH, height / DOTS_PER_INCH), dpi=DOTS_PER_INCH)
    axes = figure.add_axes(
        (
            margin_left / width,
            MARGIN_BOTTOM / height,
            canvas_width / width,
            canvas_height / height,
        )
    )
    axes.imshow(canvas, interpolation="none")
    axes.spines[:].set_visible(False)
    axes.tick_params(
        length=0, labelsize=9, top=True, labeltop=True, bottom=False, labelbottom=False
    )
    # parse_math: a dollar sign in a name does not begin a formula
    panel_height, panel_width = grid.panels.shape[-2:]
    axes.set_xticks(panel_centers(len(grid.columns), panel_width), grid.columns, parse_math=False)
    axes.set_yticks(panel_centers(len(grid.rows), panel_height), grid.rows, parse_math=False)
    figure.text(10 / width, 10 / height, grid.note, fontsize=8, color="0.35", parse_math=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH, format="png")


def panel_centers(count: int, length: int) -> list[float]:
    """Where the centers of `count` panels of this length lie along one side of the canvas."""
    return [PANEL_GAP + length / 2 + index * (length + PANEL_GAP) for index in range(count)]


if __name__ == "__main__":
    sys.exit(run_command("vit.attention", main))
