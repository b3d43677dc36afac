"""What a model gets right and wrong: figures and tables of its predictions.

Pure functions from tensors to images (uint8, 3 x height x width) and text.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from vit.data.image_files import to_pixels
from vit.data.preprocessing import Preprocessing
from vit.evaluation.metrics import most_confused
from vit.figures.attention import displayable_images
from vit.figures.confusion import draw_confusion
from vit.figures.themes import LIGHT, rasterize, themed
from vit.runtime.precision import Precision
from vit.text import markdown_table, shorten

if TYPE_CHECKING:
    from vit.runs.metrics_log import Tracker

PICTURES_A_RUN = 10  # TensorBoard keeps no more of a kind
FEW_CLASSES = 20  # that have a curve each
CONFUSED_PAIRS = 10

# Pixels
PICTURE_SIDE = 112
FONT_SIZE = 13
LINE_HEIGHT = FONT_SIZE + 4
GAP = 8

COLUMNS = 4  # TensorBoard shows a figure some 350 pixels wide
NAME_LENGTH = 14

# Colors of the captions
RIGHT = (0, 110, 50)
WRONG = (190, 20, 30)
INK = (40, 40, 40)


@dataclass
class Figures:
    """images: fixed validation images, normalised, (B, C, height, width), on the device; labels: int64 (B,)."""

    tracker: "Tracker"
    classes: list[str]
    preprocessing: Preprocessing
    precision: Precision
    images: Tensor
    labels: Tensor
    drawn: int = -1  # the tenth of the run in which pictures were drawn last

    @torch.no_grad()
    def evaluated(self, model: nn.Module, confusion: Tensor, step: int) -> None:
        """After an evaluation of the model, which is in evaluation mode, with what it counted (vit.evaluation.evaluate): every
        class's accuracy, and in each tenth of the run and at its end the pictures."""
        board, confusion = self.tracker.board, confusion.cpu()
        counts = confusion.sum(1)
        known = (counts > 0).nonzero()[:, 0]
        accuracy = confusion.diagonal()[known] / counts[known]
        if len(self.classes) > FEW_CLASSES:
            board.add("histogram", "classes/validation accuracy of the classes", accuracy, step)
        else:
            for label, value in zip(known.tolist(), accuracy.tolist(), strict=True):
                board.add(
                    "scalar",
                    f"classes/{label:02} {self.classes[label].replace('/', '_')}",
                    value,
                    step,
                )
        tenth = step * PICTURES_A_RUN // self.tracker.total_steps
        if tenth == self.drawn or board.writer is None:
            return
        self.drawn = tenth
        board.add(
            "image",
            "pictures/confusion of the classes",
            confusion_figure(confusion, self.classes),
            step,
        )
        board.add(
            "text", "pictures/most often confused", confused_table(confusion, self.classes), step
        )
        with self.precision.autocast():
            logits = model(self.images)
        pictures = displayable_images(self.images, self.preprocessing, PICTURE_SIDE)
        figure = prediction_figure(pictures, logits.float().softmax(1), self.labels, self.classes)
        board.add("image", "pictures/predictions on validation images", figure, step)

    def watch_gradients(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        next_step: Callable[[], int],
        interval: int,
    ) -> None:
        """From now on write the norm of every layer's gradient, after clipping, at step 1 and each multiple of the interval;
        next_step tells the number of the step that is to be made."""
        layers = parameters_by_layer(model)

        def write(*_: object) -> None:
            step = next_step()
            if (step == 1 or step % interval == 0) and self.tracker.board.writer is not None:
                norms = [
                    nn.utils.get_total_norm([each.grad for each in layer if each.grad is not None])
                    for layer in layers.values()
                ]
                for name, norm in zip(
                    layers, torch.stack(norms).tolist(), strict=True
                ):  # waits for the device once
                    self.tracker.board.add("scalar", f"gradients/{name}", norm, step)

        optimizer.register_step_pre_hook(write)


def class_names(targets: Tensor, classes: Sequence[str]) -> list[str]:
    """The names of labels (B,), or of mixed targets (B, classes) with the weight of each class."""
    if targets.ndim == 1:
        return [classes[label] for label in targets.tolist()]
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
    cell_width = max(width, PICTURE_SIDE) + GAP
    cell_height = height + GAP + 2 * LINE_HEIGHT
    columns = min(COLUMNS, len(pixels))
    rows = -(-len(pixels) // COLUMNS)
    canvas = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    best = probabilities.max(dim=1)
    for index, predicted in enumerate(best.indices.tolist()):
        left = GAP + index % columns * cell_width
        top = GAP + index // columns * cell_height
        canvas.paste(Image.fromarray(pixels[index]), (left, top))
        true = int(labels[index])
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
