"""What a model gets right and wrong: figures and tables of its predictions.

Pure functions from tensors to images (uint8, 3 x height x width) and text.
"""

import functools
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from vit.data.image_files import to_pixels
from vit.evaluation.metrics import most_confused
from vit.figures.confusion import draw_confusion
from vit.figures.themes import LIGHT, rasterize, themed
from vit.text import markdown_table, shorten

CONFUSED_PAIRS = 10

# Pixels
MIN_CELL_WIDTH = 112  # so that captions have room below small images
FONT_SIZE = 13
LINE_HEIGHT = FONT_SIZE + 4
GAP = 8

COLUMNS = 4  # TensorBoard shows a figure some 350 pixels wide
NAME_LENGTH = 14

# Colors of the captions
RIGHT = (0, 110, 50)
WRONG = (190, 20, 30)
INK = (40, 40, 40)


def class_names(targets: Tensor, classes: Sequence[str]) -> list[str]:
    """The names of labels (B,), or of mixed targets (B, classes) with the weight of each class."""
    if targets.ndim == 1:
        return [classes[int(label)] for label in targets.tolist()]
    names = []
    for weights in targets.cpu():
        labels = weights.nonzero()[:, 0].tolist()
        names.append(" + ".join(f"{classes[label]} {weights[label]:.2f}" for label in labels))
    return names


def parameters_by_layer(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of the embeddings, of each block, and of what follows, in order."""
    layers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(layer_of(name), []).append(parameter)
    return layers


def layer_of(name: str) -> str:
    """The layer of a parameter: embeddings, "block 00", …, final norm, or head."""
    part, *rest = name.split(".")
    if part == "encoder":
        return f"block {int(rest[1]):02}" if rest[0] == "blocks" else "final norm"
    return part


def confusion_figure(confusion: Tensor, classes: Sequence[str]) -> Tensor:
    """Draw counts (C, C) on the CPU, rows are the true classes; see vit.figures.confusion."""
    with themed(LIGHT):
        return rasterize(draw_confusion(LIGHT, confusion, classes))


def confused_table(confusion: Tensor, classes: Sequence[str]) -> str:
    """The pairs of classes that are taken for each other most often, as a Markdown table."""
    totals = confusion.sum(dim=1).tolist()
    rows = [["is", "taken for", "images"]]
    for true, predicted, images in most_confused(confusion, CONFUSED_PAIRS):
        rows.append([classes[true], classes[predicted], f"{images} of {totals[true]}"])
    return markdown_table(rows)


def prediction_figure(
    images: Tensor, probabilities: Tensor, labels: Tensor, classes: Sequence[str]
) -> Tensor:
    """A grid of images with what each is taken for below, and in case of a mistake what it is.

    images: (B, 3, height, width) in 0..1. probabilities: (B, C). labels: int64 (B,).
    """
    pixels = (images.cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    cell_width = max(width, MIN_CELL_WIDTH) + GAP
    cell_height = height + GAP + 2 * LINE_HEIGHT
    columns = min(COLUMNS, len(pixels))
    rows = -(-len(pixels) // COLUMNS)
    # Two lines of caption below each image: what it is taken for, and after a mistake what it is
    canvas = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    best, labels = probabilities.cpu().max(dim=1), labels.cpu()
    for index in range(len(pixels)):
        left = GAP + index % columns * cell_width
        top = GAP + index // columns * cell_height
        canvas.paste(Image.fromarray(pixels[index]), (left, top))
        predicted, true = int(best.indices[index]), int(labels[index])
        color = RIGHT if predicted == true else WRONG
        caption = f"{shorten(classes[predicted], NAME_LENGTH)} {best.values[index]:.0%}"
        draw.text((left, top + height + 2), caption, color, caption_font())
        if predicted != true:
            caption = f"is {shorten(classes[true], NAME_LENGTH)}"
            draw.text((left, top + height + 2 + LINE_HEIGHT), caption, INK, caption_font())
    return to_pixels(canvas)


@functools.cache
def caption_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)
