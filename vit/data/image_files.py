"""One image at a time, in the CPU workers: decode, crop, mirror, policies for training, resize and crop for evaluation;
and the preprocessing that travels with a checkpoint."""

import contextlib
import io
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from vit.errors import DataError


def find_image_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and for folders the pictures in them at any depth, sorted.

    Raises DataError for a path that is not there or a folder without pictures.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(map(Path, iter_image_files(path)))
            if not inside:
                raise DataError(
                    f"{path}: no pictures in this folder (looked for {', '.join(EXTENSIONS)})"
                )
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return found


MEMBER = re.compile(
    r"(.*\.tar)!(\d+)\+(\d+)"
)  # a shard's member: file, first byte, bytes (vit/shards.py)


MAX_PIXELS = (
    100_000_000  # a larger picture is refused by its header: decoded it could fill the memory
)


EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


# What Pillow's readers raise for files that are cut short, damaged or made to do harm
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


def is_image_file(name: str) -> bool:
    """Whether a file of this name is taken for a picture: by its extension, and not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def iter_image_files(folder: str | Path, follow_links: bool = False) -> Iterator[str]:
    """The paths of the pictures in a folder at any depth, in no order; follow_links: also into linked folders."""
    for parent, _, names in os.walk(folder, followlinks=follow_links):
        yield from (os.path.join(parent, name) for name in names if is_image_file(name))


def open_tar_member(place: str) -> io.BytesIO:
    """The file at "shard.tar!offset+size"."""
    found = MEMBER.fullmatch(place)
    if found is None:
        raise FileNotFoundError(place)
    with open(found[1], "rb") as file:
        file.seek(int(found[2]))
        return io.BytesIO(file.read(int(found[3])))


@contextlib.contextmanager
def open_lazily(path: str | Path) -> Iterator[Image.Image]:
    """The picture in a file, of which only the header is read; or in a member of a shard, named as in vit/shards.py.

    Raises DataError, naming the path, for a file that is missing, cut short, too large or no picture, also where that shows
    inside the `with`.
    """
    try:
        with Image.open(open_tar_member(str(path)) if ".tar!" in str(path) else path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except Image.DecompressionBombError:  # Pillow's own, or ours at a lower limit
        raise DataError(
            f"{path}: more than {MAX_PIXELS:,} pixels; make it smaller or take it out of the data set"
        ) from None
    except UNREADABLE as error:
        raise DataError(
            f"{path}: not a readable picture ({error}); repair it or take it out of the data set"
        ) from None


def open_image(path: str | Path, num_channels: int = 3) -> Image.Image:
    """The picture in a file, upright, as 8-bit RGB (or grey for one channel), from any mode Pillow reads.

    Raises DataError as opened() does.
    """
    with open_lazily(path) as image:
        return to_mode(ImageOps.exif_transpose(image), num_channels)


def exif_orientation(image: Image.Image) -> int:
    """EXIF's number of an opened picture: 1 upright; from 5 on turned by a quarter, so that the header's sides are swapped."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def decode_jpeg(image: Image.Image, num_channels: int, shrink: int = 1) -> Tensor | None:
    """The pixels of an opened picture, uint8 (C, height, width), if it is an upright JPEG in RGB or grey that libjpeg-turbo
    finds no fault with; else None. By its fast decoder, some levels beside Pillow's: for training alone.

    shrink: 1, 2, 4 or 8; each side is divided by it, rounded up, which saves most of the work of decoding.
    """
    file = getattr(image, "fp", None)
    if (
        image.format != "JPEG"
        or image.mode not in ("RGB", "L")
        or exif_orientation(image) != 1
        or file is None
    ):
        return None
    file.seek(0)
    height, width = (
        (-(-side // shrink) if shrink > 1 else 0) for side in (image.height, image.width)
    )
    try:
        pixels = simplejpeg.decode_jpeg(
            file.read(),
            "RGB" if num_channels == 3 else "GRAY",
            fastdct=True,
            fastupsample=True,
            min_height=height,
            min_width=width,
            min_factor=shrink,
        )
    except ValueError:  # Pillow will tell what is wrong with it, or read it all the same
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_mode(image: Image.Image, num_channels: int) -> Image.Image:
    """8-bit RGB or grey. 16-bit greys are scaled first, since Pillow would clip them; transparency is laid on white."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        values = np.asarray(image, dtype=np.float64)
        scale = (
            255.0
            if values.max(initial=0) <= 1
            else 1.0
            if values.max() <= 255 and image.mode != "I;16"
            else 255 / 65535
        )
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB" if num_channels == 3 else "L")


def to_pixels(image: Image.Image) -> Tensor:
    """A PIL image as uint8 (C, height, width)."""
    return (
        torch.from_numpy(np.array(image))
        .reshape(image.height, image.width, -1)
        .permute(2, 0, 1)
        .contiguous()
    )
