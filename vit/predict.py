"""Predict the classes of images and how probable they are.

    python -m vit.predict RUN/checkpoints/best.safetensors cat.jpg photos/ 'more/*.png' --top-k 3
    find . -name '*.jpg' | python -m vit.predict RUN/checkpoints/best.safetensors --format csv

Images are answered in the order given, a batch at a time, so that any number of them needs the same
memory. One that can't be read is reported on standard error and left out; the exit code is then 2.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from vit.config.image_options import (
    TOO_LITTLE_MEMORY,
    add_computing,
    check_minima,
    require_images,
)
from vit.errors import ConfigError, DataError, run_command, writing_to
from vit.files import atomic_write, discard_output
from vit.text import display_width, escape_unprintable, pad

# torch takes seconds to import, and --help and a mistyped command should answer at once. So torch,
# and the modules of vit that import it, are imported inside the functions that need them.
if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vit.model.vision_transformer import VisionTransformer
    from vit.runtime.memory import MemoryLimit
    from vit.runtime.precision import Precision

# Longer side of the images with their attention, in pixels; a multiple of small images' own size
OVERLAY_SIDE = 384

# Images per explicit forward pass, which keeps an N × N attention matrix for every layer and head
TRACE_BATCH_SIZE = 8

# Characters of an image's name that its overlay's name keeps; file systems allow 255 bytes
MAX_STEM_LENGTH = 50

# Widest column of the table, in characters; longer paths stick out
MAX_COLUMN_WIDTH = 80


class Prediction(NamedTuple):
    """One of the most probable classes of an image: its index, its name, its probability."""

    class_index: int
    label: str
    probability: float

    @property
    def rounded_probability(self) -> float:
        """The probability with the seven significant digits that a float32 has."""
        return float(f"{self.probability:.7g}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vit.predict",
        description="Predict the classes of images and how probable they are.",
        epilog="The exit code is 2 if an image could not be read; the others are answered.",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="RUN/checkpoints/best.safetensors, or RUN, or a pruned one"
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGES",
        help="files, folders (with their subfolders), 'patterns*'; "
        "- or nothing: paths from a pipe, one per line",
    )
    parser.add_argument(
        "--format",
        default="table",
        choices=WRITERS,
        help="json: one object per line (default: table)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write to this file, not to the screen"
    )
    parser.add_argument(
        "--top-k", type=int, default=5, metavar="K", help="labels per image (default: 5)"
    )
    parser.add_argument(
        "--attention",
        type=Path,
        metavar="FOLDER",
        help="write each image with its attention rollout there, as PNG",
    )
    add_computing(parser)
    return parser.parse_intermixed_args(arguments)  # IMAGES may follow the options


def check_options(options: argparse.Namespace) -> None:
    """Raise ConfigError for what can be seen to be wrong before anything is read."""
    check_minima(options, {"top_k": 1, "batch_size": 1, "workers": 0})
    require_images(options)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    check_options(options)
    try:
        predict(options)
    except BrokenPipeError:
        discard_output()  # whoever reads the output has had enough: no error
    except ConfigError:
        discard_output()
        raise


def predict(options: argparse.Namespace) -> None:
    """Answer all images.

    Raises DataError at the end if some could not be read, or if there were none.
    """
    from vit.checkpoints.file import require_header_keys
    from vit.checkpoints.model import load_with_header
    from vit.runtime.attention_kernels import exclude_faulty_attention
    from vit.runtime.device import start_device
    from vit.runtime.faults import failures_explained
    from vit.runtime.precision import Precision

    check_output_name(options.out)
    device = start_device(options.device, "--device")
    model, header = load_with_header(options.checkpoint)
    model = model.to(device)
    exclude_faulty_attention(device, model)
    # The precision in which it was trained and measured, so that the answers are those measured
    require_header_keys(header, options.checkpoint, "precision")
    precision = Precision(header["precision"], device)
    if options.attention is not None:
        with writing_to(f"--attention {options.attention}"):
            options.attention.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    with failures_explained(TOO_LITTLE_MEMORY), open_output(options.out) as file:
        answered, unreadable = answer_images(model, precision, options, file)
    if options.out is not None:
        speed = answered / (time.perf_counter() - start)
        computed = f"{precision.name} on {device.type}"
        print(f"written to {options.out}: {answered:,} images, {speed:.0f} images/s ({computed})")
    if unreadable:
        total = answered + unreadable
        raise DataError(
            f"{unreadable} of {total} could not be read (listed above); {answered} answered"
        )
    if not answered:
        raise DataError("no path came through the pipe; expected one per line")


def answer_images(
    model: "VisionTransformer", precision: "Precision", options: argparse.Namespace, file: TextIO
) -> tuple[int, int]:
    """Write the predictions of all images in their order.

    Returns how many images were answered and how many could not be read.
    """
    from vit.data.image_stream import find_images, stream_batches
    from vit.runtime.memory import MemoryLimit

    def warn(line: str) -> None:
        print(f"vit.predict: {line}", file=sys.stderr)

    def infer_part(pixels: "Tensor") -> "tuple[Tensor, Tensor]":
        return infer(model, precision, pixels)

    # The maps of a trace need more memory than a prediction
    memory = MemoryLimit(precision.device, warn)
    trace_memory = MemoryLimit(precision.device, warn, at_once=TRACE_BATCH_SIZE)
    destination = "standard output" if options.out is None else f"--out {options.out}"
    writer = WRITERS[options.format](file)
    answered = 0
    unreadable = 0
    paths = find_images(options.images or ["-"])
    for batch in stream_batches(paths, model.preprocessing, options.batch_size, options.workers):
        for error in batch.errors:
            warn(escape_unprintable(str(error)))
        unreadable += len(batch.errors)
        if batch.pixels is None:
            continue

        paths_left = iter(batch.paths)
        # In one part, unless memory ends
        for images, probabilities in memory.parts(infer_part, batch.pixels):
            part_paths = list(itertools.islice(paths_left, len(images)))
            predictions = rank_classes(probabilities, model.classes, options.top_k)
            with writing_to(destination):
                writer.write(part_paths, predictions)
                file.flush()  # so that the reader of a pipe need not wait for the next batch
            if options.attention is not None:
                with writing_to(f"--attention {options.attention}"):
                    overlays = draw_overlays(model, images, trace_memory)
                    write_overlays(overlays, part_paths, answered + 1, options.attention)
            answered += len(images)
    return answered, unreadable


def infer(
    model: "VisionTransformer", precision: "Precision", pixels: "Tensor"
) -> "tuple[Tensor, Tensor]":
    """Return the model's inputs, (B, C, *image_size), and the probabilities, (B, classes).

    pixels: uint8 (B, C, *image_size). Both results are float32 on the device.
    """
    import torch

    images = model.preprocessing.to_input(pixels.to(precision.device))
    with torch.inference_mode(), precision.autocast():
        logits = model(images)
    # In float32: 16-bit probabilities would not sum to one
    return images, logits.float().softmax(dim=1)


def rank_classes(
    probabilities: "Tensor", classes: Sequence[str], top_k: int
) -> list[list[Prediction]]:
    """The `top_k` most probable classes of every image, best first, or all if there are fewer."""
    top = probabilities.topk(min(top_k, len(classes)), dim=1)
    predictions = []
    for indices, values in zip(top.indices.tolist(), top.values.tolist(), strict=True):
        ranked = [
            Prediction(index, classes[int(index)], value)
            for index, value in zip(indices, values, strict=True)
        ]
        predictions.append(ranked)
    return predictions


def draw_overlays(
    model: "VisionTransformer", images: "Tensor", memory: "MemoryLimit"
) -> "Iterator[np.ndarray]":
    """Draw each image, as the model sees it, under its attention rollout.

    images: the model's inputs, (B, C, height, width). Yields uint8 (height, width, 3) for each.
    """
    from vit.figures.attention import displayable_images, overlay
    from vit.model.attention_maps import pooled_row, rollout, trace_images

    def draw(part: "Tensor") -> "np.ndarray":
        maps = pooled_row(rollout(trace_images(model, part).attentions), model)
        overlays = overlay(displayable_images(part, model.preprocessing, OVERLAY_SIDE), maps)
        return (overlays.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    for pixels in memory.parts(draw, images):
        yield from pixels


def write_overlays(
    overlays: "Iterable[np.ndarray]", paths: Sequence[str], first_number: int, folder: Path
) -> None:
    """Write images as folder/<number>_<name>.png, numbered from `first_number` on.

    Raises OSError.
    """
    from PIL import Image

    for number, (path, overlay) in enumerate(zip(paths, overlays, strict=True), first_number):
        stem = Path(path).stem[:MAX_STEM_LENGTH]
        with atomic_write(folder / f"{number:06}_{stem}.png") as temporary:
            Image.fromarray(overlay).save(temporary, format="PNG")


def check_output_name(path: Path | None) -> None:
    """Raise ConfigError if --out is an image or a checkpoint, which it would overwrite."""
    from vit.data.image_files import EXTENSIONS

    if path is None:
        return
    if path.is_dir() or path.suffix.lower() in (".safetensors", *EXTENSIONS):
        raise ConfigError(
            f"--out {path}: give the name of a text file, not of a folder, a checkpoint or an image"
        )


@contextlib.contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
    """Open standard output or a file for UTF-8; paths that are no Unicode keep their bytes.

    The file is written directly, not by way of a temporary one: it grows while the command runs,
    may be a device or a named pipe, and after an interruption holds the answers so far.
    """
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield sys.stdout
        return
    with writing_to(f"--out {path}"):
        file = open(path, "w", encoding="utf-8", errors="surrogateescape", newline="")  # noqa: SIM115
    try:
        yield file
    finally:
        # What the last flush could not write has been reported
        with contextlib.suppress(OSError):
            file.close()


class JsonWriter:
    """Writes one JSON object per image and line, in ASCII.

    {"image": …, "predictions": [{"class": …, "label": …, "probability": …}, …]}
    """

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, paths: Sequence[str], predictions: Sequence[Sequence[Prediction]]) -> None:
        for path, ranked in zip(paths, predictions, strict=True):
            row = {"image": path, "predictions": [self.as_object(one) for one in ranked]}
            self.file.write(json.dumps(row) + "\n")

    def as_object(self, prediction: Prediction) -> dict[str, object]:
        return {
            "class": prediction.class_index,
            "label": prediction.label,
            "probability": prediction.rounded_probability,
        }


class CsvWriter:
    """Writes one line per prediction: image, rank (from 1), class, label, probability."""

    def __init__(self, file: TextIO):
        self.csv = csv.writer(file, lineterminator="\n")
        self.csv.writerow(("image", "rank", "class", "label", "probability"))

    def write(self, paths: Sequence[str], predictions: Sequence[Sequence[Prediction]]) -> None:
        for path, ranked in zip(paths, predictions, strict=True):
            for rank, prediction in enumerate(ranked, 1):
                probability = prediction.rounded_probability
                self.csv.writerow((path, rank, *prediction[:2], probability))


class TableWriter:
    """Writes a table for people, without any character that a terminal would interpret.

    `vit.text.markdown_table` has to see all rows to know how wide its columns are. This table is
    written as the answers come, so its columns are as wide as what has been shown so far needs.
    """

    def __init__(self, file: TextIO):
        self.file = file
        self.widths = [0, 0]  # of the columns of images and labels
        self.rows = [("image", "label", "probability")]

    def write(self, paths: Sequence[str], predictions: Sequence[Sequence[Prediction]]) -> None:
        for path, ranked in zip(paths, predictions, strict=True):
            # The path stands in the first of its rows alone
            image = escape_unprintable(path)
            for prediction in ranked:
                label = escape_unprintable(prediction.label)
                self.rows.append((image, label, f"{prediction.probability:11.2%}"))
                image = ""
        self.flush_rows()

    def flush_rows(self) -> None:
        for column, width in enumerate(self.widths):
            needed = max(display_width(row[column]) for row in self.rows)
            self.widths[column] = min(MAX_COLUMN_WIDTH, max(width, needed))
        for image, label, probability in self.rows:
            cells = (pad(image, self.widths[0]), pad(label, self.widths[1]), probability)
            self.file.write("  ".join(cells) + "\n")
        self.rows.clear()


WRITERS = {"table": TableWriter, "json": JsonWriter, "csv": CsvWriter}


if __name__ == "__main__":
    sys.exit(run_command("vit.predict", main))
