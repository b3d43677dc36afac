"""Labels and probabilities of pictures.

    python -m vit.predict outputs/…/checkpoints/best.safetensors cat.jpg pictures/ 'more/*.png' --top-k 3
    find . -name '*.jpg' | python -m vit.predict outputs/…/checkpoints/best.safetensors --format csv --out found.csv

Pictures are answered in the order given, a batch at a time, so that any number of them needs the same memory. One that
can't be read is told on stderr and left out; then the exit code is 2 at the end.
"""

import argparse
import contextlib
import csv
import glob
import io
import itertools
import json
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from vit.errors import ConfigError, DataError, run_command, writing_to

if TYPE_CHECKING:
    from torch import Tensor

    from vit.data.preprocessing import Preprocessing
    from vit.model.vision_transformer import VisionTransformer
    from vit.runtime.precision import Precision


FEW = 64  # so many pictures are decoded sooner than worker processes have started


OVERLAY_SIDE = 384  # pixels of the longer side, about


TRACED_AT_ONCE = 8  # the explicit attention holds every N × N matrix


WIDEST = 80  # a column of the table; what is longer sticks out


LONGEST_STEM = (
    50  # letters of a picture's name in its overlay's, of which a file system takes 255 bytes
)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vit.predict",
        description="Labels and probabilities of pictures.",
        epilog="Exit code 2 where a picture could not be read; the others are answered.",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="RUN/checkpoints/best.safetensors, or a pruned one"
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGES",
        help="files, folders (with all below them), 'patterns*'; - or nothing: paths from a pipe, one a line",
    )
    parser.add_argument(
        "--format",
        default="table",
        choices=FORMATS,
        help="json: one object a line (default: table)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there, not to the screen")
    parser.add_argument(
        "--top-k", type=int, default=5, metavar="K", help="labels a picture (default: 5)"
    )
    parser.add_argument(
        "--attention",
        type=Path,
        metavar="FOLDER",
        help="write each picture's attention rollout there as PNG",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at once (default: 64)")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that decode pictures (default: one a core where there are many "
        "pictures, eight at most)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    for name, least in (("top_k", 1), ("batch_size", 1), ("workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    if not options.images and sys.stdin.isatty():
        raise ConfigError(
            "no pictures: give files, folders or 'patterns*', or pipe their paths in, one a line"
        )
    try:
        predict(options)
    except (BrokenPipeError, ConfigError) as error:
        with contextlib.suppress(
            OSError
        ):  # what nobody takes must not be written once more when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(
            error, BrokenPipeError
        ):  # whoever reads the output has had enough: a quiet end
            raise
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def predict(options: argparse.Namespace) -> None:
    # Imported here so that --help and a mistaken command answer at once.
    import torch

    from vit.checkpoints.file import require_header_keys
    from vit.checkpoints.model import load_with_header
    from vit.data.image_files import EXTENSIONS
    from vit.runtime.device import choose_device
    from vit.runtime.precision import Precision

    out = options.out
    if out is not None and (out.is_dir() or out.suffix.lower() in (".safetensors", *EXTENSIONS)):
        raise ConfigError(
            f"--out {out}: give the name of a text file; this is a folder, a checkpoint or a picture"
        )
    device = choose_device(options.device)
    model, header = load_with_header(options.checkpoint)
    model = model.to(device)
    precision = Precision(
        require_header_keys(header, options.checkpoint, "precision")["precision"], device
    )
    if options.attention is not None:
        with writing_to(f"--attention {options.attention}"):
            options.attention.mkdir(parents=True, exist_ok=True)
    try:
        with output(out) as file:
            pictures, bad = answer(model, precision, options, file)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"--batch-size {options.batch_size}: out of memory; try {max(1, options.batch_size // 2)}"
        ) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ConfigError(
            f"--workers: a process that decodes pictures died ({str(error).splitlines()[0]}); if memory is "
            "short, lower it"
        ) from None
    if bad:
        raise DataError(
            f"{bad} of {pictures + bad} can't be read, as told above; {pictures} answered"
        )
    if not pictures:
        raise DataError("no path came through the pipe; one a line is expected")


def answer(
    model: "VisionTransformer", precision: "Precision", options: argparse.Namespace, file: TextIO
) -> tuple[int, int]:
    """Write the answers to all pictures, in their order; how many there were, and how many could not be read."""
    answered = bad = 0
    place = "standard output" if options.out is None else f"--out {options.out}"
    writer = FORMATS[options.format](file)
    began = time.perf_counter()
    for batch in read_batches(
        find(options.images or ["-"]), model.preprocessing, options.batch_size, options.workers
    ):
        for error in batch.unreadable:
            print(f"vit.predict: {printable(str(error))}", file=sys.stderr)
        bad += len(batch.unreadable)
        if batch.pixels is None:
            continue
        images, chances = infer(model, precision, batch.pixels)
        top = chances.topk(min(options.top_k, chances.shape[1]), dim=1)
        with writing_to(place):
            writer.write(
                batch.paths,
                [
                    [
                        (label, model.classes[label], chance)
                        for label, chance in zip(labels, row, strict=True)
                    ]
                    for labels, row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ],
            )
            file.flush()  # whoever reads the other end of a pipe should not wait for the next
        if options.attention is not None:
            with writing_to(f"--attention {options.attention}"):
                draw_rollout(model, images, batch.paths, answered + 1, options.attention)
        answered += len(batch.paths)
    if options.out is not None:
        speed = answered / (time.perf_counter() - began)
        print(
            f"written to {options.out}: {answered:,} pictures, {speed:.0f} images/s ({precision.name} on "
            f"{precision.device.type})"
        )
    return answered, bad


def find(given: Sequence[str]) -> Iterator[str | DataError]:
    """The paths of the pictures in the order given, one after another: a folder's files sorted, then its folders; a pattern's
    matches sorted; for "-" what the lines of standard input name. In place of what is not there a DataError that says so."""
    for name in given:
        if name == "-":
            for line in sys.stdin.buffer:
                if line.strip():
                    yield from below(os.fsdecode(line.rstrip(b"\r\n")))
        else:
            yield from below(name)


def below(name: str) -> Iterator[str | DataError]:
    if os.path.isdir(name):
        yield from in_folder(name)
    elif os.path.lexists(name) or not glob.has_magic(name):
        yield name
    else:
        matches = sorted(glob.glob(name, recursive=True))
        if not matches:
            yield DataError(f"{name}: no file matches this pattern")
        for match in matches:
            yield from in_folder(match) if os.path.isdir(match) else [match]


def in_folder(folder: str) -> Iterator[str | DataError]:
    from vit.data.image_files import EXTENSIONS, is_image_file

    found, closed = False, []
    for parent, folders, files in os.walk(folder, onerror=closed.append):
        folders.sort()
        for file in sorted(files):
            if is_image_file(file):
                found = True
                yield os.path.join(parent, file)
    yield from (
        DataError(f"{error.filename}: can't look into this folder ({error.strerror})")
        for error in closed
    )
    if not (found or closed):
        yield DataError(
            f"{folder}: no pictures in this folder (looked for {', '.join(EXTENSIONS)})"
        )


@dataclass
class Batch:
    """The pictures that could be read, their pixels uint8 (B, C, *image_size) or None without any, and the others' errors."""

    paths: list[str]
    pixels: "Tensor | None"
    unreadable: list[DataError]


class Pictures:
    """A data set for torch's loader whose items are the paths themselves, so that they need not be known beforehand."""

    def __init__(self, preprocessing: "Preprocessing"):
        self.preprocessing = preprocessing

    def __getitem__(self, item: str | DataError) -> "tuple[str, Tensor] | DataError":
        """An error is returned, not raised, so that the others of its batch are answered."""
        from vit.data.image_files import open_image, to_pixels

        if isinstance(item, DataError):
            return item
        if not os.path.isfile(item):  # opening a named pipe would wait for ever
            return DataError(
                f"{item}: {'not a file' if os.path.exists(item) else 'no such file or folder'}"
            )
        try:
            return item, to_pixels(
                self.preprocessing.resize_and_crop(
                    open_image(item, self.preprocessing.num_channels)
                )
            )
        except DataError as error:
            return error


def collate(items: "list[tuple[str, Tensor] | DataError]") -> Batch:
    import torch

    good = [item for item in items if not isinstance(item, DataError)]
    return Batch(
        [path for path, _ in good],
        torch.stack([pixels for _, pixels in good]) if good else None,
        [item for item in items if isinstance(item, DataError)],
    )


def read_batches(
    paths: Iterator[str | DataError],
    preprocessing: "Preprocessing",
    batch_size: int,
    workers: int | None,
) -> Iterator[Batch]:
    """workers None: none where there are few pictures, else what training would take."""
    from torch.utils.data import DataLoader

    from vit.data.loader import init_worker
    from vit.runtime.device import loader_workers

    if workers is None:
        first = list(itertools.islice(paths, FEW + 1))
        workers = loader_workers(None) if len(first) > FEW else 0
        paths = itertools.chain(first, paths)
    batches = iter(lambda: list(itertools.islice(paths, batch_size)), [])
    return iter(
        DataLoader(
            Pictures(preprocessing),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,  # type: ignore[arg-type]
            worker_init_fn=init_worker,
            prefetch_factor=2 if workers else None,
        )
    )


def infer(
    model: "VisionTransformer", precision: "Precision", pixels: "Tensor"
) -> "tuple[Tensor, Tensor]":
    """uint8 (B, C, *image_size) → the model's inputs, float32 (B, C, *image_size), and the classes' probabilities, float32
    (B, classes), both on the device."""
    import torch

    images = model.preprocessing.to_input(pixels.to(precision.device))
    with torch.inference_mode(), precision.autocast():
        logits = model(images)
    return images, logits.float().softmax(dim=1)


Ranked = list[tuple[int, str, float]]  # (class, its name, its probability), the most probable first


class JsonLines:
    """{"image": …, "predictions": [{"class": …, "label": …, "probability": …}, …]}, one a line, in ASCII."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, paths: Sequence[str], answers: Sequence[Ranked]) -> None:
        for path, ranked in zip(paths, answers, strict=True):
            predictions = [
                {"class": label, "label": name, "probability": digits(chance)}
                for label, name, chance in ranked
            ]
            self.file.write(json.dumps({"image": path, "predictions": predictions}) + "\n")


class Csv:
    """A line for each prediction: image, rank from 1, class, label, probability."""

    def __init__(self, file: TextIO):
        self.rows = csv.writer(file, lineterminator="\n")
        self.rows.writerow(("image", "rank", "class", "label", "probability"))

    def write(self, paths: Sequence[str], answers: Sequence[Ranked]) -> None:
        for path, ranked in zip(paths, answers, strict=True):
            self.rows.writerows(
                (path, rank, label, name, digits(chance))
                for rank, (label, name, chance) in enumerate(ranked, 1)
            )


class Table:
    """For people: columns as wide as what has been shown so far needs, and no character that a terminal would obey."""

    def __init__(self, file: TextIO):
        self.file, self.widths = file, [0, 0]

    def write(self, paths: Sequence[str], answers: Sequence[Ranked]) -> None:
        rows = [] if any(self.widths) else [("image", "label", "probability")]
        for path, ranked in zip(paths, answers, strict=True):
            rows += [
                ("" if rank else printable(path), printable(name), f"{chance:11.2%}")
                for rank, (_, name, chance) in enumerate(ranked)
            ]
        self.widths = [
            min(WIDEST, max(width, *(columns(row[place]) for row in rows)))
            for place, width in enumerate(self.widths)
        ]
        for row in rows:
            padded = [
                text + " " * (width - columns(text))
                for text, width in zip(row, self.widths, strict=False)
            ]
            self.file.write("  ".join([*padded, row[2]]) + "\n")


FORMATS = {"table": Table, "json": JsonLines, "csv": Csv}


def digits(chance: float) -> float:
    """With the digits that float32 has."""
    return float(f"{chance:.7g}")


def printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def columns(text: str) -> int:
    """How wide a terminal shows it."""
    return sum(
        0
        if unicodedata.combining(letter)
        else 2
        if unicodedata.east_asian_width(letter) in "WF"
        else 1
        for letter in text
    )


@contextlib.contextmanager
def output(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or the file at a path, for UTF-8; names of files that are none keep their bytes."""
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
        with contextlib.suppress(OSError):  # what the last flush could not write has been told
            file.close()


def draw_rollout(
    model: "VisionTransformer", images: "Tensor", paths: Sequence[str], first: int, folder: Path
) -> None:
    """Write each picture as the model sees it under its attention rollout as folder/<number>_<name>.png, `first` the number
    of the first of them."""
    from PIL import Image

    from vit.figures.attention import displayable_images, overlay
    from vit.model.attention_maps import pooled_row, rollout, trace_images

    for start in range(0, len(paths), TRACED_AT_ONCE):
        part = images[start : start + TRACED_AT_ONCE]
        maps = pooled_row(rollout(trace_images(model, part).attentions), model)
        drawn = overlay(displayable_images(part, model.preprocessing, OVERLAY_SIDE), maps)
        pixels = (drawn.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for number, picture in enumerate(pixels, start):
            name = Path(paths[number]).stem[:LONGEST_STEM]
            Image.fromarray(picture).save(folder / f"{first + number:06}_{name}.png")


if __name__ == "__main__":
    sys.exit(run_command("vit.predict", main))
