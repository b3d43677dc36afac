"""Attention maps laid over images, and grids of them. Everything is drawn from a model's trace."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from vit.data.preprocessing import Preprocessing
from vit.model.attention_maps import head_maps, mean_maps, pooled_row, rollout, trace_images
from vit.model.head_pruning import attention_modules, num_original_heads
from vit.model.vision_transformer import Trace, VisionTransformer

# In grids with a row for every image
LAYERS_SHOWN = 4

# Dark blue, violet, red, orange, pale yellow: the brightness rises, so it also reads in gray
COLORMAP = torch.tensor(
    [
        (0.04, 0.03, 0.20),
        (0.40, 0.08, 0.46),
        (0.80, 0.20, 0.33),
        (0.98, 0.55, 0.15),
        (0.99, 0.98, 0.70),
    ]
)


def overlay(images: Tensor, maps: Tensor) -> Tensor:
    """Lay maps over images.

    images: (…, 3, height, width) in 0..1. maps: (…, R, S), one value a patch; each map is scaled to
    its own range, enlarged smoothly and colored.
    """
    size = images.shape[-2:]
    tiny = torch.finfo(maps.dtype).tiny
    above_lowest = maps - maps.amin(dim=(-2, -1), keepdim=True)
    scaled = above_lowest / above_lowest.amax(dim=(-2, -1), keepdim=True).clamp(min=tiny)
    flat = scaled.reshape(-1, 1, *maps.shape[-2:])
    # Smoothly, since the edges of patches would draw the eye
    heat = F.interpolate(flat, size, mode="bicubic").clamp(min=0)
    # The curve between the patches overshoots a little
    heat = heat / heat.amax(dim=(-2, -1), keepdim=True).clamp(min=tiny)
    heat = heat.reshape(*maps.shape[:-2], 1, *size)
    # In gray, since the image's colors could be mistaken for the map's
    gray = images.mean(dim=-3, keepdim=True)
    return torch.lerp(gray, colorize(heat), 0.45 + 0.4 * heat)


def colorize(values: Tensor) -> Tensor:
    """(…, 1, height, width) in 0..1 → colors (…, 3, height, width), interpolated in COLORMAP."""
    # Linear interpolation between the two nearest colors
    colors = COLORMAP.to(values)
    position = values[..., 0, :, :] * (len(colors) - 1)
    below = position.long().clamp(max=len(colors) - 2)
    weight = (position - below)[..., None]
    mixed = colors[below] * (1 - weight) + colors[below + 1] * weight
    return mixed.movedim(-1, -3)


def displayable_images(inputs: Tensor, preprocessing: Preprocessing, side: int) -> Tensor:
    """The model's inputs as RGB in 0..1, (B, 3, height, width), the longer side about `side` px.

    Small images are enlarged without smoothing: a person should see their pixels.
    """
    images = preprocessing.denormalize(inputs).expand(-1, 3, -1, -1)
    longest = max(images.shape[-2:])
    if longest <= side:
        return enlarge(images, side // longest)
    size = [round(length * side / longest) for length in images.shape[-2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def enlarge(images: Tensor, factor: int) -> Tensor:
    """(…, height, width) with each pixel repeated `factor` times along both sides."""
    return images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def layers_to_show(num_layers: int) -> list[int]:
    """The first layer, the last and some evenly between."""
    return sorted(
        {round(layer) for layer in torch.linspace(0, num_layers - 1, LAYERS_SHOWN).tolist()}
    )


def image_panels(trace: Trace, model: VisionTransformer, images: Tensor) -> Tensor:
    """A row of panels for each image: itself, the mean maps of some layers, and the rollout.

    images: what the traced inputs look like, (B, 3, height, width). Returns (B, columns, 3, height,
    width).
    """
    layers = layers_to_show(len(trace.attentions))
    maps = mean_maps(trace, model)[:, layers]
    rolled = pooled_row(rollout(trace.attentions), model)
    maps = torch.cat([maps, rolled[:, None]], dim=1)
    return torch.cat([images[:, None], overlay(images[:, None], maps)], dim=1)


def head_panels(trace: Trace, model: VisionTransformer, image: Tensor, index: int) -> Tensor:
    """The map of every head, over one image of the traced batch: (L, H, 3, height, width).

    image: what it looks like, (3, height, width). index: its position in the batch. Where a head
    was removed, the panel is white.
    """
    attentions = attention_modules(model)
    num_heads = num_original_heads(attentions[0])
    panels = torch.ones(len(attentions), num_heads, *image.shape, device=image.device)
    for layer, maps in enumerate(head_maps(trace, model)):
        panels[layer, attentions[layer].heads] = overlay(image[None], maps[index])
    return panels


def tile(panels: Tensor, gap: int, gap_value: float = 1.0) -> Tensor:
    """(rows, columns, C, height, width) → one image (C, …), with gaps between and around the
    panels, in pixels; gap_value 1 is white."""
    columns = panels.shape[1]
    return make_grid(panels.flatten(0, 1), nrow=columns, padding=gap, pad_value=gap_value)


def attention_figure(
    model: VisionTransformer, preprocessing: Preprocessing, inputs: Tensor
) -> Tensor:
    """One image (3, height, width) in 0..1, on the CPU, with a row of image_panels for each input.

    Uses no random numbers and leaves the model as it was.
    """
    images = displayable_images(inputs, preprocessing, side=128)
    panels = image_panels(trace_images(model, inputs), model, images)
    return tile(panels, gap=4).cpu()
