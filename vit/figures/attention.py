"""TODO: say what this file is for."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from vit.data.preprocessing import Preprocessing
from vit.model.attention_maps import head_maps, mean_maps, pooled_row, rollout, trace_images
from vit.model.head_pruning import attention_modules, num_original_heads
from vit.model.vision_transformer import Trace, VisionTransformer

LAYERS_SHOWN = 4  # in the grids that have a row for every image


# A scale that rises in brightness, so that it also reads in grey: night blue, violet, red, orange, pale yellow
COLORMAP = torch.tensor(
    [
        (0.04, 0.03, 0.20),
        (0.40, 0.08, 0.46),
        (0.80, 0.20, 0.33),
        (0.98, 0.55, 0.15),
        (0.99, 0.98, 0.70),
    ]
)


def overlay(pictures: Tensor, maps: Tensor) -> Tensor:
    """(…, 3, height, width) in 0..1 under (…, R, S) maps, each scaled to its own range, coloured and smoothly enlarged."""
    size, tiny = pictures.shape[-2:], torch.finfo(maps.dtype).tiny
    above = (maps - maps.amin(dim=(-2, -1), keepdim=True)).reshape(-1, 1, *maps.shape[-2:])
    heat = F.interpolate(
        above / above.amax(dim=(-2, -1), keepdim=True).clamp(min=tiny), size, mode="bicubic"
    ).clamp(min=0)
    heat = heat / heat.amax(dim=(-2, -1), keepdim=True).clamp(
        min=tiny
    )  # the curve between the patches overshoots a little
    heat = heat.reshape(*maps.shape[:-2], 1, *size)
    grey = pictures.mean(
        dim=-3, keepdim=True
    )  # the picture's own colours would be taken for the map's
    return torch.lerp(grey, colorize(heat), 0.45 + 0.4 * heat)


def colorize(values: Tensor) -> Tensor:
    """(…, 1, height, width) in 0..1 → (…, 3, height, width), along COLORMAP."""
    scale = COLORMAP.to(values)
    place = values[..., 0, :, :] * (len(scale) - 1)
    below = place.long().clamp(max=len(scale) - 2)
    between = (place - below)[..., None]
    return (scale[below] * (1 - between) + scale[below + 1] * between).movedim(-1, -3)


def displayable_images(images: Tensor, preprocessing: Preprocessing, side: int) -> Tensor:
    """The model's input as RGB in 0..1, (B, 3, height, width), the longer side about `side` pixels.

    Small images are enlarged without smoothing: a person should see their pixels.
    """
    pictures = preprocessing.denormalize(images).expand(-1, 3, -1, -1)
    longest = max(pictures.shape[-2:])
    if longest <= side:
        factor = side // longest
        return pictures.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    size = [round(length * side / longest) for length in pictures.shape[-2:]]
    return F.interpolate(pictures, size, mode="bilinear", antialias=True)


def layers_to_show(layers: int) -> list[int]:
    """The first, the last and some evenly between."""
    return sorted({round(place) for place in torch.linspace(0, layers - 1, LAYERS_SHOWN).tolist()})


def image_panels(trace: Trace, model: VisionTransformer, pictures: Tensor) -> Tensor:
    """(B, columns, 3, height, width): the picture, some layers' mean maps and the rollout over it."""
    maps = mean_maps(trace, model)[:, layers_to_show(len(trace.attentions))]
    maps = torch.cat([maps, pooled_row(rollout(trace.attentions), model)[:, None]], dim=1)
    return torch.cat([pictures[:, None], overlay(pictures[:, None], maps)], dim=1)


def head_panels(trace: Trace, model: VisionTransformer, picture: Tensor, number: int) -> Tensor:
    """(L, H, 3, height, width): the map of every head over one image of the traced batch; white where a head was removed."""
    heads = [attention.heads for attention in attention_modules(model)]
    panels = torch.ones(
        len(heads),
        num_original_heads(attention_modules(model)[0]),
        *picture.shape,
        device=picture.device,
    )
    for layer, maps in enumerate(head_maps(trace, model)):
        panels[layer, heads[layer]] = overlay(picture[None], maps[number])
    return panels


def tile(panels: Tensor, gap: int) -> Tensor:
    """(rows, columns, 3, height, width) → one picture (3, …) with white gaps."""
    return make_grid(panels.flatten(0, 1), nrow=panels.shape[1], padding=gap, pad_value=1.0)


def attention_figure(
    model: VisionTransformer, preprocessing: Preprocessing, images: Tensor
) -> Tensor:
    """One picture (3, H, W) in 0..1 on the CPU for a batch of the model's inputs: a row for each, with the image itself, the
    mean maps of some layers and the rollout. Draws no random number and leaves the model as it was."""
    pictures = displayable_images(images, preprocessing, side=128)
    return tile(image_panels(trace_images(model, images), model, pictures), gap=4).cpu()


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
