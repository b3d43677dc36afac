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
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from vit.errors import ConfigError, DataError, run, writing
from vit.model import Trace, VisionTransformer
from vit.pruning import attentions, original_heads
from vit.transforms import EXTENSIONS, Preprocessing, pictures_below

LAYERS_SHOWN = 4  # in the grids that have a row for every image
IMAGES_A_GRID = 8
# A scale that rises in brightness, so that it also reads in grey: night blue, violet, red, orange, pale yellow
COLOURS = torch.tensor([(0.04, 0.03, 0.20), (0.40, 0.08, 0.46), (0.80, 0.20, 0.33), (0.98, 0.55, 0.15), (0.99, 0.98, 0.70)])


# --- maps ------------------------------------------------------------------------------------------------------------


def pooled_row(matrices: Tensor, model: VisionTransformer) -> Tensor:
    """(…, N, N) attention from rows to columns → (…, R, S): how much the pooled output takes from every patch."""
    prefix, grid = model.embeddings.num_prefix, model.embeddings.patch_embedding.grid_size
    row = matrices[..., 0, :] if model.global_pool == "cls" else matrices[..., prefix:, :].mean(dim=-2)
    return row[..., prefix:].unflatten(-1, grid)


def head_maps(trace: Trace, model: VisionTransformer) -> list[Tensor]:
    """Every head's map, a (B, H, R, S) for each layer; pruned layers have fewer heads."""
    return [pooled_row(probabilities, model) for probabilities in trace.attentions]


def mean_maps(trace: Trace, model: VisionTransformer) -> Tensor:
    """The mean over each layer's heads, (B, L, R, S)."""
    return torch.stack([maps.mean(dim=1) for maps in head_maps(trace, model)], dim=1)


def rollout(layers: Sequence[Tensor]) -> Tensor:
    """How much of every input token reaches every output token, (B, N, N), from L of (B, H, N, N).

    A layer passes on ½ A + ½ I, A its heads' mean, rows summing to one; the residual connection is the I. The product of
    the layers, the last on the left.
    """
    identity = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype, device=layers[0].device)
    reached = identity
    for probabilities in layers:
        passed = (probabilities.mean(dim=1) + identity) / 2
        reached = passed / passed.sum(dim=-1, keepdim=True) @ reached
    return reached


# --- pictures --------------------------------------------------------------------------------------------------------


def overlay(pictures: Tensor, maps: Tensor) -> Tensor:
    """(…, 3, height, width) in 0..1 under (…, R, S) maps, each scaled to its own range, coloured and smoothly enlarged."""
    size, tiny = pictures.shape[-2:], torch.finfo(maps.dtype).tiny
    above = (maps - maps.amin(dim=(-2, -1), keepdim=True)).reshape(-1, 1, *maps.shape[-2:])
    heat = F.interpolate(above / above.amax(dim=(-2, -1), keepdim=True).clamp(min=tiny), size, mode="bicubic").clamp(min=0)
    heat = heat / heat.amax(dim=(-2, -1), keepdim=True).clamp(min=tiny)  # the curve between the patches overshoots a little
    heat = heat.reshape(*maps.shape[:-2], 1, *size)
    grey = pictures.mean(dim=-3, keepdim=True)  # the picture's own colours would be taken for the map's
    return torch.lerp(grey, colour(heat), 0.45 + 0.4 * heat)


def colour(values: Tensor) -> Tensor:
    """(…, 1, height, width) in 0..1 → (…, 3, height, width), along COLOURS."""
    scale = COLOURS.to(values)
    place = values[..., 0, :, :] * (len(scale) - 1)
    below = place.long().clamp(max=len(scale) - 2)
    between = (place - below)[..., None]
    return (scale[below] * (1 - between) + scale[below + 1] * between).movedim(-1, -3)


def shown_pictures(images: Tensor, preprocessing: Preprocessing, side: int) -> Tensor:
    """The model's input as RGB in 0..1, (B, 3, height, width), the longer side about `side` pixels.

    Small images are enlarged without smoothing: a person should see their pixels.
    """
    pictures = preprocessing.to_picture(images).expand(-1, 3, -1, -1)
    longest = max(pictures.shape[-2:])
    if longest <= side:
        factor = side // longest
        return pictures.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    size = [round(length * side / longest) for length in pictures.shape[-2:]]
    return F.interpolate(pictures, size, mode="bilinear", antialias=True)


def shown_layers(layers: int) -> list[int]:
    """The first, the last and some evenly between."""
    return sorted({round(place) for place in torch.linspace(0, layers - 1, LAYERS_SHOWN).tolist()})


@torch.no_grad()
def trace_images(model: VisionTransformer, images: Tensor) -> Trace:
    """The model's trace in evaluation mode; its mode stays as it was."""
    training = model.training
    trace = model.eval().trace(images)
    model.train(training)
    return trace


def image_panels(trace: Trace, model: VisionTransformer, pictures: Tensor) -> Tensor:
    """(B, columns, 3, height, width): the picture, some layers' mean maps and the rollout over it."""
    maps = mean_maps(trace, model)[:, shown_layers(len(trace.attentions))]
    maps = torch.cat([maps, pooled_row(rollout(trace.attentions), model)[:, None]], dim=1)
    return torch.cat([pictures[:, None], overlay(pictures[:, None], maps)], dim=1)


def head_panels(trace: Trace, model: VisionTransformer, picture: Tensor, number: int) -> Tensor:
    """(L, H, 3, height, width): the map of every head over one image of the traced batch; white where a head was removed."""
    heads = [attention.heads for attention in attentions(model)]
    panels = torch.ones(len(heads), original_heads(attentions(model)[0]), *picture.shape, device=picture.device)
    for layer, maps in enumerate(head_maps(trace, model)):
        panels[layer, heads[layer]] = overlay(picture[None], maps[number])
    return panels


def tile(panels: Tensor, gap: int) -> Tensor:
    """(rows, columns, 3, height, width) → one picture (3, …) with white gaps."""
    return make_grid(panels.flatten(0, 1), nrow=panels.shape[1], padding=gap, pad_value=1.0)


def attention_figure(model: VisionTransformer, preprocessing: Preprocessing, images: Tensor) -> Tensor:
    """One picture (3, H, W) in 0..1 on the CPU for a batch of the model's inputs: a row for each, with the image itself, the
    mean maps of some layers and the rollout. Draws no random number and leaves the model as it was."""
    pictures = shown_pictures(images, preprocessing, side=128)
    return tile(image_panels(trace_images(model, images), model, pictures), gap=4).cpu()


# --- the command -----------------------------------------------------------------------------------------------------


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and for folders the pictures in them at any depth, sorted.

    Raises DataError for a path that is not there or a folder without pictures.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(map(Path, pictures_below(path)))
            if not inside:
                raise DataError(f"{path}: no pictures in this folder (looked for {', '.join(EXTENSIONS)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return found


def save_grid(path: Path, panels: Tensor, rows: Sequence[str], columns: Sequence[str], note: str) -> None:
    """Write panels (rows, columns, 3, height, width) as a PNG with a name for every row and column and a note below."""
    from matplotlib.figure import Figure

    gap, (height, width) = 6, panels.shape[-2:]
    canvas = tile(panels, gap).permute(1, 2, 0).clamp(0, 1).numpy()
    # Dots per inch, and the margins in pixels: the longest name on the left decides how wide that one is
    dots, left, above, below = 100, 20 + 7 * max(len(line) for row in rows for line in row.split("\n")), 34, 52
    across, down = canvas.shape[1] + left + 10, canvas.shape[0] + above + below
    figure = Figure(figsize=(across / dots, down / dots), dpi=dots)
    axes = figure.add_axes((left / across, below / down, canvas.shape[1] / across, canvas.shape[0] / down))
    axes.imshow(canvas, interpolation="none")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, top=True, labeltop=True, bottom=False, labelbottom=False)
    # parse_math: a dollar sign in a name is no formula
    axes.set_xticks([gap + width / 2 + number * (width + gap) for number in range(len(columns))], columns, parse_math=False)
    axes.set_yticks([gap + height / 2 + number * (height + gap) for number in range(len(rows))], rows, parse_math=False)
    figure.text(10 / across, 10 / down, note, fontsize=8, color="0.35", parse_math=False)
    figure.savefig(path, dpi=dots)


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length - 1] + "…"


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m vit.attention", description="Attention maps and rollout as PNG grids.")
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/best.safetensors")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="pictures, or folders of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    parser.add_argument("--limit", type=int, default=16, help="pictures at most (default: 16)")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    from vit.checkpoint import load

    options = arguments(given)
    if options.limit <= 0:
        raise ConfigError(f"--limit must be a positive number, got {options.limit}")
    paths = find_pictures(options.images)
    if len(paths) > options.limit:
        print(f"the first {options.limit} of {len(paths)} pictures; more with --limit")
        paths = paths[:options.limit]
    model = load(options.checkpoint)
    with writing(f"--out {options.out}", "choose another folder"):
        options.out.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(paths), IMAGES_A_GRID):
            draw(model, paths[start:start + IMAGES_A_GRID], start, options.out)


def draw(model: VisionTransformer, paths: Sequence[Path], start: int, folder: Path) -> None:
    """One grid of the pictures, named after the first's and the last's number, and one of all heads for each."""
    images = torch.stack([model.preprocessing(path) for path in paths])
    trace = trace_images(model, images)
    likely = trace.logits.softmax(dim=1).max(dim=1)
    names = [f"{shorten(path.name, 22)}\n{shorten(model.classes[label], 22)} {chance:.0%}"
             for path, chance, label in zip(paths, likely.values.tolist(), likely.indices.tolist(), strict=True)]
    layers = shown_layers(len(trace.attentions))
    columns = ["picture", *(f"layer {layer}, mean" for layer in layers), "rollout"]
    note = "Dark to bright: from each map's lowest to its highest patch.\nLayers and heads are counted from 0."
    file = folder / f"attention_{start + 1}-{start + len(paths)}.png"
    save_grid(file, image_panels(trace, model, shown_pictures(images, model.preprocessing, side=192)), names, columns, note)
    print(f"{file}: {len(paths)} pictures")
    for number, picture in enumerate(shown_pictures(images, model.preprocessing, side=112)):
        panels = head_panels(trace, model, picture, number)
        file = folder / f"heads_{start + number + 1}.png"
        save_grid(file, panels, [f"layer {layer}" for layer in range(panels.shape[0])],
                  [f"head {head}" for head in range(panels.shape[1])], f"{shorten(paths[number].name, 50)}\n{note}")
        print(f"{file}: every head on {paths[number]}")


if __name__ == "__main__":
    sys.exit(run("vit.attention", main))
