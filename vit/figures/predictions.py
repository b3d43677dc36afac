"""What a model gets right and wrong, for TensorBoard: the confusion of the classes, each class's accuracy, predictions on fixed
images, and the gradients layer by layer; so seldom that training doesn't feel it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from vit.data.image_files import to_pixels
from vit.data.preprocessing import Preprocessing
from vit.figures.attention import colorize, displayable_images, shorten
from vit.runs.metrics_log import Tracker
from vit.runtime.precision import Precision


def class_names(targets: Tensor, classes: list[str]) -> list[str]:
    """What the pictures are: labels (B,) by name, and mixed ones (B, classes) by the names and shares of their two."""
    if targets.ndim == 1:
        return [classes[label] for label in targets]
    return [
        " + ".join(f"{classes[label]} {shares[label]:.2f}" for label in shares.nonzero()[:, 0])
        for shares in targets.cpu()
    ]


PICTURES_A_RUN = 10  # TensorBoard keeps no more of a kind


FEW_CLASSES = 20  # with their names in the picture and a curve each


CONFUSED_PAIRS = 10


CELL, PICTURE_SIDE, TEXT = 34, 112, 13  # pixels


COLUMNS = 4  # TensorBoard shows a picture some 350 pixels wide


RIGHT, WRONG, INK = (0, 110, 50), (190, 20, 30), (40, 40, 40)


@dataclass
class Figures:
    """images: fixed validation images, normalised, (B, C, height, width), on the device; labels: int64 (B,)."""

    tracker: Tracker
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


def parameters_by_layer(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters that are trained: those of the embeddings, of every block, and of what follows, in this order."""
    layers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        layer = (
            f"block {int(parts[2]):02}"
            if parts[:2] == ["encoder", "blocks"]
            else parts[0].replace("encoder", "final norm")
        )
        if parameter.requires_grad:
            layers.setdefault(layer, []).append(parameter)
    return layers


@functools.cache
def lettering() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT)


def confusion_figure(confusion: Tensor, classes: list[str]) -> Tensor:
    """Counts (true class, predicted class) → a picture, uint8 (3, height, width): each row's shares, dark for none, with names
    and per cents where the classes are few."""
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    few = len(classes) <= FEW_CLASSES
    cell = CELL if few else max(1, 640 // len(classes))
    cells = (colorize(shares.sqrt()[None]) * 255).round().byte()  # the root shows small shares
    matrix = Image.fromarray(cells.permute(1, 2, 0).numpy())
    matrix = matrix.resize((cell * matrix.width, cell * matrix.height), Image.Resampling.NEAREST)
    font, title = lettering(), "rows: the true class, columns: the predicted one"
    names = [shorten(name, 16) for name in classes] if few else []
    margin = max([10, *(int(font.getlength(name)) + 12 for name in names)])
    width = max(margin + matrix.width, int(font.getlength(title))) + 12
    canvas = Image.new("RGB", (width, margin + matrix.height + 30), "white")
    canvas.paste(matrix, (margin, margin))
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, canvas.height - 20), title, INK, font)
    upright = Image.new(
        "RGB", (margin, matrix.height), "white"
    )  # the columns' names, to be turned by a quarter
    for place, name in enumerate(names):
        draw.text((margin - 6, margin + (place + 0.5) * cell), name, INK, font, anchor="rm")
        ImageDraw.Draw(upright).text((6, (place + 0.5) * cell), name, INK, font, anchor="lm")
        for column, share in enumerate(shares[place].tolist()):
            if share >= 0.005:
                draw.text(
                    (margin + (column + 0.5) * cell, margin + (place + 0.5) * cell),
                    f"{100 * share:.0f}",
                    "white" if share < 0.35 else "black",
                    font,
                    anchor="mm",
                )
    if few:
        canvas.paste(upright.transpose(Image.Transpose.ROTATE_90), (margin, 0))
    return to_pixels(canvas)


def confused_table(confusion: Tensor, classes: list[str]) -> str:
    """The pairs of classes that are most often taken for each other, as a table in Markdown."""
    wrong = confusion.clone().fill_diagonal_(0)
    counts, places = wrong.flatten().topk(min(CONFUSED_PAIRS, wrong.numel()))
    totals = confusion.sum(1)
    names = [name.replace("|", "\\|") for name in classes]
    rows = [
        (
            names[place // len(names)],
            names[place % len(names)],
            count,
            int(totals[place // len(names)]),
        )
        for count, place in zip(counts.tolist(), places.tolist(), strict=True)
        if count
    ]
    return "\n".join(
        [
            "| is | taken for | images |",
            "|---|---|---|",
            *(f"| {true} | {taken} | {count} of {total} |" for true, taken, count, total in rows),
        ]
    )


def prediction_figure(
    pictures: Tensor, probabilities: Tensor, labels: Tensor, classes: list[str]
) -> Tensor:
    """(B, 3, height, width) in 0..1, (B, classes), (B,) → a grid, uint8 (3, …): below each picture what it is taken for, and,
    in red, what it is where that is something else."""
    font, gap = lettering(), 8
    shown = (pictures.cpu() * 255).round().byte()
    height, width = shown.shape[-2:]
    columns, rows = min(COLUMNS, len(shown)), -(-len(shown) // COLUMNS)
    across, down = max(width, PICTURE_SIDE) + gap, height + gap + 2 * (TEXT + 4)
    canvas = Image.new("RGB", (columns * across + gap, rows * down + gap), "white")
    draw = ImageDraw.Draw(canvas)
    best = probabilities.max(1)
    for number, (picture, chance, taken, true) in enumerate(
        zip(shown, best.values.tolist(), best.indices.tolist(), labels.tolist(), strict=True)
    ):
        left, top = gap + number % columns * across, gap + number // columns * down
        canvas.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (left, top))
        draw.text(
            (left, top + height + 2),
            f"{shorten(classes[taken], 14)} {chance:.0%}",
            RIGHT if taken == true else WRONG,
            font,
        )
        if taken != true:
            draw.text(
                (left, top + height + TEXT + 6), f"is {shorten(classes[true], 14)}", INK, font
            )
    return to_pixels(canvas)
