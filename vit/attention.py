"""Where the model looks: attention maps and rollout, laid over the pictures.

    python -m vit.attention outputs/…/checkpoints/best.safetensors pictures/ cat.jpg --out maps

Everything is drawn from VisionTransformer.trace, so training keeps its fused attention. Of the attention's N × N matrices
a map shows what the pooled output reads: the class token's row, or with global_pool=mean the mean over the patches' rows;
and of that row the patches, in their grid. Class token and registers are left out of the picture.

Sources: rollout, Abnar & Zuidema 2020 (arXiv:2005.00928), section 3; on pictures, Dosovitskiy et al. 2021, appendix D.8.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vit.data.image_files import find_image_files
from vit.errors import ConfigError, run_command, writing_to
from vit.figures.attention import (
    displayable_images,
    head_panels,
    image_panels,
    layers_to_show,
    shorten,
    tile,
)
from vit.model.attention_maps import trace_images
from vit.model.vision_transformer import VisionTransformer

IMAGES_A_GRID = 8


def save_grid(
    path: Path, panels: Tensor, rows: Sequence[str], columns: Sequence[str], note: str
) -> None:
    """Write panels (rows, columns, 3, height, width) as a PNG with a name for every row and column and a note below."""
    from matplotlib.figure import Figure

    gap, (height, width) = 6, panels.shape[-2:]
    canvas = tile(panels, gap).permute(1, 2, 0).clamp(0, 1).numpy()
    # Dots per inch, and the margins in pixels: the longest name on the left decides how wide that one is
    dots, left, above, below = (
        100,
        20 + 7 * max(len(line) for row in rows for line in row.split("\n")),
        34,
        52,
    )
    across, down = canvas.shape[1] + left + 10, canvas.shape[0] + above + below
    figure = Figure(figsize=(across / dots, down / dots), dpi=dots)
    axes = figure.add_axes(
        (left / across, below / down, canvas.shape[1] / across, canvas.shape[0] / down)
    )
    axes.imshow(canvas, interpolation="none")
    axes.spines[:].set_visible(False)
    axes.tick_params(
        length=0, labelsize=9, top=True, labeltop=True, bottom=False, labelbottom=False
    )
    # parse_math: a dollar sign in a name is no formula
    axes.set_xticks(
        [gap + width / 2 + number * (width + gap) for number in range(len(columns))],
        columns,
        parse_math=False,
    )
    axes.set_yticks(
        [gap + height / 2 + number * (height + gap) for number in range(len(rows))],
        rows,
        parse_math=False,
    )
    figure.text(10 / across, 10 / down, note, fontsize=8, color="0.35", parse_math=False)
    figure.savefig(path, dpi=dots)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vit.attention", description="Attention maps and rollout as PNG grids."
    )
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/best.safetensors")
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGES", help="pictures, or folders of pictures"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    parser.add_argument("--limit", type=int, default=16, help="pictures at most (default: 16)")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    from vit.checkpoints.model import load

    options = arguments(given)
    if options.limit <= 0:
        raise ConfigError(f"--limit must be a positive number, got {options.limit}")
    paths = find_image_files(options.images)
    if len(paths) > options.limit:
        print(f"the first {options.limit} of {len(paths)} pictures; more with --limit")
        paths = paths[: options.limit]
    model = load(options.checkpoint)
    with writing_to(f"--out {options.out}", "choose another folder"):
        options.out.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(paths), IMAGES_A_GRID):
            draw(model, paths[start : start + IMAGES_A_GRID], start, options.out)


def draw(model: VisionTransformer, paths: Sequence[Path], start: int, folder: Path) -> None:
    """One grid of the pictures, named after the first's and the last's number, and one of all heads for each."""
    images = torch.stack([model.preprocessing(path) for path in paths])
    trace = trace_images(model, images)
    likely = trace.logits.softmax(dim=1).max(dim=1)
    names = [
        f"{shorten(path.name, 22)}\n{shorten(model.classes[label], 22)} {chance:.0%}"
        for path, chance, label in zip(
            paths, likely.values.tolist(), likely.indices.tolist(), strict=True
        )
    ]
    layers = layers_to_show(len(trace.attentions))
    columns = ["picture", *(f"layer {layer}, mean" for layer in layers), "rollout"]
    note = "Dark to bright: from each map's lowest to its highest patch.\nLayers and heads are counted from 0."
    file = folder / f"attention_{start + 1}-{start + len(paths)}.png"
    save_grid(
        file,
        image_panels(trace, model, displayable_images(images, model.preprocessing, side=192)),
        names,
        columns,
        note,
    )
    print(f"{file}: {len(paths)} pictures")
    for number, picture in enumerate(displayable_images(images, model.preprocessing, side=112)):
        panels = head_panels(trace, model, picture, number)
        file = folder / f"heads_{start + number + 1}.png"
        save_grid(
            file,
            panels,
            [f"layer {layer}" for layer in range(panels.shape[0])],
            [f"head {head}" for head in range(panels.shape[1])],
            f"{shorten(paths[number].name, 50)}\n{note}",
        )
        print(f"{file}: every head on {paths[number]}")


if __name__ == "__main__":
    sys.exit(run_command("vit.attention", main))
