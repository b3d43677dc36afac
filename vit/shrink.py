"""Make a folder of large images smaller once, so that every epoch decodes less.

    python -m vit.shrink FOLDER OUT
    python train.py data=imagenet data.root=OUT

Every image below FOLDER whose shorter side is longer than --short-side is written to the same path
below OUT, upright, as a JPEG of that shorter side; all others are copied as they are. Training
crops at 224 px from a shorter side of 288 or more look as they did. Evaluation resizes a second
time, so compare published numbers on the original images.
"""

import argparse
import functools
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vit.data.image_files import (
    JPEG,
    iter_image_files,
    no_images,
    open_image,
    unsupported_image,
)
from vit.errors import DataError, run_command, writing_to
from vit.files import atomic_write
from vit.runtime.cores import usable_cores
from vit.runtime.process_pool import map_in_processes


def shrink_image(source: str | Path, short_side: int | None, quality: int) -> bytes | None:
    """The image as a JPEG whose shorter side is `short_side` pixels; None where it is small enough.

    Without short_side any image is small enough. Raises DataError for an image that cannot be read,
    also where it is small enough: better now than in training.
    """
    # Decoded in any case, so that a damaged file shows now
    image = open_image(source)
    if short_side is None or min(image.size) <= short_side:
        return None
    factor = short_side / min(image.size)
    # Rounding must not make the shorter side shorter still
    size = (
        max(short_side, round(image.width * factor)),
        max(short_side, round(image.height * factor)),
    )
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


def shrink_file(paths: tuple[Path, Path], short_side: int, quality: int) -> str | None:
    """Write the image at source to target; return a line about it where it cannot be read.

    An image of another format that is made smaller gets .jpg after its name. What stands at target
    already is left, so that an interrupted command can be started again.
    """
    source, target = paths
    target_jpeg = target.with_name(f"{target.name}.jpg")
    if target.exists() or target_jpeg.exists():
        return None
    try:
        jpeg = shrink_image(source, short_side, quality)
    except DataError as error:
        return str(error)
    if jpeg is not None and source.suffix.lower() not in JPEG:
        target = target_jpeg
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        temporary.write_bytes(source.read_bytes() if jpeg is None else jpeg)
    return None


def shrink_folder(
    source: Path, target: Path, *, short_side: int, quality: int, workers: int
) -> tuple[int, list[str]]:
    """(number of images in target, a line for each image that could not be read).

    Raises DataError where source has no images or can't be read, and where target lies in it.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder")
    if target.absolute().is_relative_to(source.absolute()):
        raise DataError(f"{target}: lies in {source}; choose a folder beside it")
    unsupported: list[str] = []
    images = [Path(path) for path in iter_image_files(source, unsupported)]
    if not images:
        raise DataError(f"{source}: {no_images(unsupported, 'below it')}")
    pairs = [(image, target / image.relative_to(source)) for image in sorted(images)]
    shrink = functools.partial(shrink_file, short_side=short_side, quality=quality)
    lines = map_in_processes(shrink, pairs, workers)
    unreadable = sorted(line for line in lines if line is not None)
    others = [unsupported_image(path) for path in sorted(unsupported)]
    return len(pairs) - len(unreadable), unreadable + others


def report_unreadable(lines: list[str]) -> None:
    """Raise DataError, with a line for each, where images could not be read and were left out.

    For the end of a command that wrote all others.
    """
    if lines:
        raise DataError("\n".join([*lines, f"{len(lines)} images were left out"]))


def parse_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vit.shrink",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--short-side", type=int, default=288, help="pixels of the shorter side (default 288)"
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=90,
        choices=range(1, 101),
        metavar="1..100",
        help="of the JPEGs (default 90)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        help="processes (default: one for each core that it may use)",
    )
    options = parser.parse_args(given)
    if options.short_side < 1 or options.workers < 1:
        parser.error("--short-side and --workers must be positive")
    return options


def main(given: Sequence[str] | None = None) -> None:
    options = parse_arguments(given)
    with writing_to(options.out, "choose another folder"):
        count, unreadable = shrink_folder(
            options.folder,
            options.out,
            short_side=options.short_side,
            quality=options.quality,
            workers=options.workers,
        )
    print(f"{count:,} images in {options.out}; train with data.root={options.out}")
    report_unreadable(unreadable)


if __name__ == "__main__":
    sys.exit(run_command("vit.shrink", main))
