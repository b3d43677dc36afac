"""Image files: finding them in folders, opening them safely, decoding them to uint8 pixels.

An image also has a path where it is a part of a file: "FILE.tar!OFFSET+SIZE" in a tar shard (see
vit/data/tar_index.py), "FILE.parquet!GROUP+ROW" in a parquet file (see vit/data/parquet_rows.py).
"""

import contextlib
import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vit.data.parquet_rows import PARQUET_ROW, open_row
from vit.errors import DataError

# The path of a folder, and the names of the files in it
Folder = tuple[str, list[str]]
OnError = Callable[[OSError], object]

# .jfif is what browsers on Windows call a JPEG
JPEG = (".jpg", ".jpeg", ".jfif")
EXTENSIONS = (*JPEG, ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

# What phones and cameras write and Pillow does not read: left out, but not in silence
UNSUPPORTED = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf")

# Of macOS in zip files, of Synology's disks with a thumbnail of each image, and of Windows
FOLDERS_OF_PROGRAMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")

# The tar file, the member's first byte and its size in bytes
TAR_MEMBER = re.compile(r"(.*\.tar)!(\d+)\+(\d+)")

# A larger image is refused by its header, since decoding it could exhaust the memory
MAX_PIXELS = 100_000_000

# So many images show how large the images of a data set are
NUM_TYPICAL = 9

# What Pillow's readers raise for files that are cut short, damaged or malicious
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


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a program's and not the user's, by its name."""
    return name.startswith(".") or name in FOLDERS_OF_PROGRAMS


def is_image_file(name: str) -> bool:
    """Whether a file name is that of an image: by its extension, and not hidden."""
    return name.lower().endswith(EXTENSIONS) and not is_hidden(name)


def walk_folders(folder: str | Path, onerror: OnError | None = None) -> Iterator[Folder]:
    """A folder and those in it at any depth, links among them; subfolders come sorted.

    Each folder comes once, however many links lead to it. Links to those above `folder` are left
    out, since the folders of other classes lie there. So are hidden folders: programs keep
    thumbnails and originals there, copies of images that may be held out. onerror: told of each
    folder that can't be read, which is left out.
    """
    seen: set[tuple[int, int]] = set()
    start = Path(os.path.realpath(folder))
    for path in (start, *start.parents):
        is_new_folder(path, seen)
    for parent, folders, names in os.walk(folder, onerror=onerror, followlinks=True):
        # os.walk goes on with what is left in this list, in its order
        folders[:] = [
            name
            for name in sorted(folders)
            if not is_hidden(name) and is_new_folder(os.path.join(parent, name), seen)
        ]
        yield parent, names


def is_new_folder(folder: str | Path, seen: set[tuple[int, int]]) -> bool:
    """Whether a folder is not among the (device, inode) of those seen, to which it is added."""
    try:
        status = os.stat(folder)
    except OSError:  # reading it will tell why
        return True
    identity = status.st_dev, status.st_ino
    is_new = identity not in seen
    seen.add(identity)
    return is_new


def is_unsupported(name: str) -> bool:
    """Whether a file name is that of an image in a format that is not read."""
    return name.lower().endswith(UNSUPPORTED) and not is_hidden(name)


def unsupported_image(path: str) -> str:
    """The message for one such file."""
    return f"{path}: images of this format can't be read; convert it to JPEG"


def describe_unsupported(paths: Sequence[str]) -> str:
    """What such files, one at least, are and what to do."""
    kinds = " and ".join(sorted({os.path.splitext(path)[1].lower() for path in paths}))
    files, them = ("file", "it") if len(paths) == 1 else ("files", "them")
    return f"{len(paths):,} {kinds} {files} can't be read; convert {them} to JPEG"


def no_images(unsupported: Sequence[str] = (), where: str = "in this folder") -> str:
    """The message for a folder without images. unsupported: its images of other formats."""
    found = f"; its {describe_unsupported(unsupported)}" if unsupported else ""
    return f"no images {where} (looked for {', '.join(EXTENSIONS)}{found})"


def iter_image_files(folder: str | Path, unsupported: list[str] | None = None) -> Iterator[str]:
    """The paths of the image files in a folder as walk_folders finds it, in no particular order.

    unsupported: a list to which the paths of images in formats that are not read are added.

    Raises DataError for a folder that can't be read.
    """
    # Strings, since Path objects of a million files take seconds to make
    for parent, names in walk_folders(folder, onerror=refuse_folder):
        for name in names:
            if is_image_file(name):
                yield os.path.join(parent, name)
            elif unsupported is not None and is_unsupported(name):
                unsupported.append(os.path.join(parent, name))


def refuse_folder(error: OSError) -> NoReturn:
    """Raise DataError for what reading a folder has raised."""
    raise DataError(
        f"{error.filename}: can't open this folder ({error.strerror}); make it readable or take it "
        "out of the data set"
    )


def find_image_files(paths: Sequence[Path], warn: Callable[[str], object]) -> list[Path]:
    """The files among `paths`, and the image files in the folders among them at any depth, sorted.

    warn: told of images in a folder that are left out, since their formats are not read.

    Raises DataError for a path that does not exist, and a folder that has no images or can't be
    read.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            unsupported: list[str] = []
            in_folder = sorted(map(Path, iter_image_files(path, unsupported)))
            if not in_folder:
                raise DataError(f"{path}: {no_images(unsupported)}")
            if unsupported:
                warn(f"{path}: {describe_unsupported(unsupported)}")
            files += in_folder
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return files


def file_of(path: str) -> str:
    """The file on the disk in which an image lies: a tar shard, a parquet file, or the path."""
    if "!" not in path:
        return path
    match = TAR_MEMBER.fullmatch(path) or PARQUET_ROW.fullmatch(path)
    return path if match is None else match[1]


def open_tar_member(path: str) -> io.BytesIO:
    """The file at "FILE.tar!OFFSET+SIZE"; raises FileNotFoundError for a path of another form."""
    match = TAR_MEMBER.fullmatch(path)
    if match is None:
        raise FileNotFoundError(path)
    tar_path, offset, size = match.groups()
    # Copied out, so that no reader can run into the next member
    with open(tar_path, "rb") as file:
        file.seek(int(offset))
        return io.BytesIO(file.read(int(size)))


def open_encoded(path: str) -> BinaryIO:
    """Open the bytes of an image file, or of an image inside a tar shard or a parquet file.

    Raises what the readers in UNREADABLE raise where there is none.
    """
    if ".tar!" in path:
        return open_tar_member(path)
    if ".parquet!" in path.lower():
        return open_row(path)
    return open(path, "rb")


@contextlib.contextmanager
def open_lazily(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file, or one inside another file, reading its header alone.

    Raises DataError, naming the path, for a file that is missing, cut short, too large or no image;
    also where that shows only inside the `with` block, when the pixels are decoded.
    """
    try:
        with open_encoded(str(path)) as file, Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except Image.DecompressionBombError:  # ours, or Pillow's own at a higher limit
        raise DataError(
            f"{path}: more than {MAX_PIXELS:,} pixels; make it smaller or take it out of the "
            "data set"
        ) from None
    except UNREADABLE as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        if is_unknown and is_unsupported(os.path.basename(path)):
            raise DataError(unsupported_image(str(path))) from None
        # Pillow's own words would name the file once more
        reason = "of no known format" if is_unknown else error
        raise DataError(
            f"{path}: not a readable image ({reason}); repair it or take it out of the data set"
        ) from None


def typical_side(paths: Sequence[bytes] | np.ndarray) -> int | None:
    """The median of the shorter sides of a few images, in pixels; None where none can be read."""
    sides: list[int] = []
    step = max(1, len(paths) // NUM_TYPICAL)
    for path in paths[::step][:NUM_TYPICAL]:
        # Which images are damaged is found, and told, by whoever decodes them
        with contextlib.suppress(DataError), open_lazily(os.fsdecode(path)) as image:
            sides.append(min(image.size))
    return sorted(sides)[len(sides) // 2] if sides else None


def open_image(path: str | Path, num_channels: int = 3) -> Image.Image:
    """Decode an image upright as 8-bit RGB, or gray for one channel, from any mode Pillow reads.

    Raises DataError as open_lazily does.
    """
    with open_lazily(path) as image:
        return to_mode(upright(image), num_channels)


def exif_orientation(image: Image.Image) -> int:
    """EXIF's orientation of an opened image: 1, upright, to 8; from 5 on its sides are swapped.

    A value without a meaning, and EXIF that can't be read, say nothing about the pixels: 1.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        return 1
    return orientation if orientation in range(1, 9) else 1


def upright(image: Image.Image) -> Image.Image:
    """An opened image as it is meant to be looked at."""
    # First, since Pillow turns a TIFF as it reads its pixels, and EXIF may stand behind them
    image.load()
    return image if exif_orientation(image) == 1 else ImageOps.exif_transpose(image)


def decode_jpeg(image: Image.Image, num_channels: int, shrink: int = 1) -> Tensor | None:
    """Decode an opened JPEG fast, a few levels beside Pillow's pixels: for training alone.

    shrink: 1, 2, 4 or 8; each side is divided by it, rounded up, which saves most of the work.
    Returns uint8 (C, height, width), or None for what must be left to Pillow: another format,
    another mode than RGB or gray, a rotated image, or a file that libjpeg-turbo finds a fault
    with.
    """
    file = getattr(image, "fp", None)
    is_plain = image.mode in ("RGB", "L") and exif_orientation(image) == 1
    if image.format != "JPEG" or not is_plain or file is None:
        return None
    file.seek(0)  # Pillow has read the header already
    # Least sizes, which tell simplejpeg how far it may shrink; 0: not at all
    height = -(-image.height // shrink) if shrink > 1 else 0
    width = -(-image.width // shrink) if shrink > 1 else 0
    # Both shortcuts trade accuracy for speed; random augmentation changes far more
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
    except ValueError:  # Pillow will say what is wrong with the file, or read it all the same
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_mode(image: Image.Image, num_channels: int) -> Image.Image:
    """Convert any mode to 8-bit RGB, or gray for one channel; what is transparent becomes white."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        image = scale_to_8_bits(image)  # Pillow itself would clip the values
    # Without its transparency an image would show the colors that it hides
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB" if num_channels == 3 else "L")


def scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits, or float, to 8 bits.

    A mode does not tell the largest value, so it is guessed from the values: 1, 255 or 65535; in
    modes of 16 bits it is not 255.
    """
    values = np.asarray(image, dtype=np.float64)
    largest = values.max(initial=0)
    if largest <= 1:
        scale = 255.0
    elif largest <= 255 and not image.mode.startswith("I;16"):  # in either order of the bytes
        scale = 1.0
    else:
        scale = 255 / 65535
    return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))


def to_pixels(image: Image.Image) -> Tensor:
    """A PIL image as uint8 (C, height, width)."""
    pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)
    return pixels.permute(2, 0, 1).contiguous()
