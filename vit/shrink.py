"""Make a folder of large pictures smaller once, so that every epoch decodes less: python -m vit.shrink FOLDER OUT.

Every picture below FOLDER whose shorter side is longer than --short-side is written to the same place below OUT as a JPEG of
that shorter side, upright; all others are copied as they are. Then train with data.root=OUT. Training crops at 224 px from
a shorter side of 288 or more look as they did; evaluation after it resizes twice, so compare published numbers on originals.
"""

import argparse
import functools
import io
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vit.data.image_files import EXTENSIONS, iter_image_files, open_image, open_lazily
from vit.errors import DataError, run_command, writing_to


def shrunk(source: Path, short_side: int | None, quality: int) -> tuple[str, bytes]:
    """(extension, file) of a picture: a JPEG whose shorter side is short_side pixels where it is longer, else as it is.

    Raises DataError where it can't be read, also where it is to be copied: better now than in training.
    """
    with open_lazily(source) as image:
        large = short_side is not None and min(image.size) > short_side
    picture = open_image(source)
    if not large or short_side is None:
        return source.suffix, source.read_bytes()
    factor = short_side / min(picture.size)
    size = (
        max(short_side, round(picture.width * factor)),
        max(short_side, round(picture.height * factor)),
    )
    file = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return source.suffix if source.suffix.lower() in (
        ".jpg",
        ".jpeg",
    ) else f"{source.suffix}.jpg", file.getvalue()


def shrink_picture(source: Path, target: Path, short_side: int, quality: int) -> str | None:
    """Write one picture; a line about it where it can't be read. What stands at target already is left, so that an
    interrupted command goes on where it was. A picture of another format that is made smaller gets .jpg after its name."""
    if target.exists() or target.with_name(f"{target.name}.jpg").exists():
        return None
    try:
        extension, content = shrunk(source, short_side, quality)
    except DataError as error:
        return str(error)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.writing")
    unfinished.write_bytes(content)
    os.replace(unfinished, target.with_name(target.stem + extension))
    return None


def shrink_pair(pair: tuple[Path, Path], short_side: int, quality: int) -> str | None:
    return shrink_picture(*pair, short_side, quality)


def in_processes(call: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """call(item) of every item, in order; by several processes where workers is more than 1."""
    if workers == 1:
        yield from map(call, items)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(call, items, chunksize=16)


def shrink_folder(
    source: Path, target: Path, *, short_side: int, quality: int, workers: int
) -> tuple[int, list[str]]:
    """(how many pictures stand in target, a line for each that could not be read).

    Raises DataError where source has no pictures, and where target lies in it.
    """
    if target.absolute().is_relative_to(source.absolute()):
        raise DataError(f"{target}: lies in {source}; choose a folder beside it")
    found = sorted(
        Path(path).relative_to(source) for path in iter_image_files(source, follow_links=True)
    )
    if not found:
        raise DataError(f"{source}: no pictures below it (looked for {', '.join(EXTENSIONS)})")
    pairs = [(source / path, target / path) for path in found]
    shrink = functools.partial(shrink_pair, short_side=short_side, quality=quality)
    unreadable = [line for line in in_processes(shrink, pairs, workers) if line is not None]
    return len(found) - len(unreadable), sorted(unreadable)


def tell_left_out(lines: list[str]) -> None:
    """At the end of a command that wrote all others: raise DataError where pictures could not be read, a line for each."""
    if lines:
        raise DataError("\n".join([*lines, f"{len(lines)} pictures were left out"]))


def main(given: Sequence[str] | None = None) -> None:
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
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default one a core)"
    )
    options = parser.parse_args(given)
    if options.short_side < 1 or options.workers < 1:
        parser.error("--short-side and --workers must be positive")
    with writing_to(options.out, "choose another folder"):
        count, unreadable = shrink_folder(
            options.folder,
            options.out,
            short_side=options.short_side,
            quality=options.quality,
            workers=options.workers,
        )
    print(f"{count:,} pictures in {options.out}; train with data.root={options.out}")
    tell_left_out(unreadable)


if __name__ == "__main__":
    sys.exit(run_command("vit.shrink", main))
