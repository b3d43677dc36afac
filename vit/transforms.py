"""One image at a time, in the CPU workers: decode, crop, mirror, policies for training, resize and crop for evaluation;
and the preprocessing that travels with a checkpoint."""

import contextlib
import io
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from vit.errors import DataError
from vit.policies import Policy, apply

MEMBER = re.compile(r"(.*\.tar)!(\d+)\+(\d+)")  # a shard's member: file, first byte, bytes (vit/shards.py)
MAX_PIXELS = 100_000_000  # a larger picture is refused by its header: decoded it could fill the memory
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# What Pillow's readers raise for files that are cut short, damaged or made to do harm
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError, struct.error,
              zlib.error)
PIL_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def is_picture(name: str) -> bool:
    """Whether a file of this name is taken for a picture: by its extension, and not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def pictures_below(folder: str | Path, follow_links: bool = False) -> Iterator[str]:
    """The paths of the pictures in a folder at any depth, in no order; follow_links: also into linked folders."""
    for parent, _, names in os.walk(folder, followlinks=follow_links):
        yield from (os.path.join(parent, name) for name in names if is_picture(name))


def open_member(place: str) -> io.BytesIO:
    """The file at "shard.tar!offset+size"."""
    found = MEMBER.fullmatch(place)
    if found is None:
        raise FileNotFoundError(place)
    with open(found[1], "rb") as file:
        file.seek(int(found[2]))
        return io.BytesIO(file.read(int(found[3])))


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture in a file, of which only the header is read; or in a member of a shard, named as in vit/shards.py.

    Raises DataError, naming the path, for a file that is missing, cut short, too large or no picture, also where that shows
    inside the `with`.
    """
    try:
        with Image.open(open_member(str(path)) if ".tar!" in str(path) else path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except Image.DecompressionBombError:  # Pillow's own, or ours at a lower limit
        raise DataError(f"{path}: more than {MAX_PIXELS:,} pixels; make it smaller or take it out of the data set") from None
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable picture ({error}); repair it or take it out of the data set") from None


def open_image(path: str | Path, num_channels: int = 3) -> Image.Image:
    """The picture in a file, upright, as 8-bit RGB (or grey for one channel), from any mode Pillow reads.

    Raises DataError as opened() does.
    """
    with opened(path) as image:
        return convert(ImageOps.exif_transpose(image), num_channels)


def orientation(image: Image.Image) -> int:
    """EXIF's number of an opened picture: 1 upright; from 5 on turned by a quarter, so that the header's sides are swapped."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def decode_jpeg(image: Image.Image, num_channels: int, shrink: int = 1) -> Tensor | None:
    """The pixels of an opened picture, uint8 (C, height, width), if it is an upright JPEG in RGB or grey that libjpeg-turbo
    finds no fault with; else None. By its fast decoder, some levels beside Pillow's: for training alone.

    shrink: 1, 2, 4 or 8; each side is divided by it, rounded up, which saves most of the work of decoding.
    """
    file = getattr(image, "fp", None)
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or orientation(image) != 1 or file is None:
        return None
    file.seek(0)
    height, width = ((-(-side // shrink) if shrink > 1 else 0) for side in (image.height, image.width))
    try:
        pixels = simplejpeg.decode_jpeg(file.read(), "RGB" if num_channels == 3 else "GRAY", fastdct=True, fastupsample=True,
                                        min_height=height, min_width=width, min_factor=shrink)
    except ValueError:  # Pillow will tell what is wrong with it, or read it all the same
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def convert(image: Image.Image, num_channels: int) -> Image.Image:
    """8-bit RGB or grey. 16-bit greys are scaled first, since Pillow would clip them; transparency is laid on white."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        values = np.asarray(image, dtype=np.float64)
        scale = 255.0 if values.max(initial=0) <= 1 else 1.0 if values.max() <= 255 and image.mode != "I;16" else 255 / 65535
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB" if num_channels == 3 else "L")


def to_pixels(image: Image.Image) -> Tensor:
    """A PIL image as uint8 (C, height, width)."""
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def match_channels(pixels: Tensor, num_channels: int) -> Tensor:
    """(B, c, height, width) → (B, num_channels, …): grey is repeated, RGB becomes luma (ITU-R BT.601)."""
    if pixels.shape[1] == num_channels:
        return pixels
    if num_channels == 1:
        return transforms.rgb_to_grayscale(pixels)
    return pixels.expand(-1, num_channels, -1, -1)


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to the model's input in evaluation; stored in every checkpoint.

    image_size      (height, width) of the model's input, pixels
    num_channels    1 or 3
    mean, std       of pixels scaled to 0..1, one number or one per channel
    eval_crop       the shorter side is resized to image_size / eval_crop and the centre cut out; None: squashed to image_size
    interpolation   bilinear or bicubic, with antialiasing
    """

    image_size: tuple[int, int]
    num_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_crop: float | None
    interpolation: str

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Preprocessing":
        """The inverse of plain(): lists come back as tuples."""
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**fields)

    def plain(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def fit_size(self, image: Image.Image) -> Image.Image:
        """Resize and crop a picture to image_size, as evaluation sees it."""
        height, width = self.image_size
        resampling = PIL_RESAMPLING[self.interpolation]
        if self.eval_crop is None:
            return image if image.size == (width, height) else image.resize((width, height), resampling)
        # In whole numbers as torchvision and timm have them; the fraction's float may lie just below one
        rows, columns = int(height / self.eval_crop + 1e-6), int(width / self.eval_crop + 1e-6)
        if rows * image.width <= columns * image.height:
            size = (columns, max(height, int(columns * image.height / image.width)))
        else:
            size = (max(width, int(rows * image.width / image.height)), rows)
        resized = image if image.size == size else image.resize(size, resampling)
        left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
        return resized.crop((left, top, left + width, top + height))

    def to_input(self, pixels: Tensor) -> Tensor:
        """uint8 (B, c, height, width) of any size → float32 (B, C, *image_size), normalised; on the pixels' device."""
        # In place: four passes over fresh memory would take five times as long on a CPU
        images = match_channels(pixels, self.num_channels).to(torch.float32, copy=True).div_(255)
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(images, self.image_size, mode=self.interpolation, antialias=True, align_corners=False)
        return images.sub_(self.channels(self.mean, images)).div_(self.channels(self.std, images))

    def to_picture(self, images: Tensor) -> Tensor:
        """The inverse of to_input's normalisation, for a person to look at: floats in 0..1."""
        return (images * self.channels(self.std, images) + self.channels(self.mean, images)).clamp(0, 1)

    def channels(self, values: Sequence[float], like: Tensor) -> Tensor:
        """Per-channel numbers as (1, C, 1, 1); three for one grey channel are averaged, one for RGB is repeated."""
        tensor = torch.tensor(values, dtype=like.dtype, device=like.device)
        tensor = tensor.mean().expand(1) if self.num_channels == 1 else tensor.expand(self.num_channels)
        return tensor.reshape(1, -1, 1, 1)

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """One picture, or the path of one, → float32 (C, *image_size)."""
        if not isinstance(image, Image.Image):
            image = open_image(image, self.num_channels)
        return self.to_input(to_pixels(self.fit_size(convert(image, self.num_channels)))[None])[0]


class TrainingTransform:
    """The picture in a file → uint8 (C, *image_size) with the random changes of training, from torch's default generator.

    crop_scale: share of the area that the random crop takes (Szegedy et al. 2015), None: resized as in evaluation;
    flip: probability; policies: vit.policies.
    """

    def __init__(self, preprocessing: Preprocessing, crop_scale: Sequence[float] | None, flip: float,
                 policies: Sequence[Policy] = ()):
        self.preprocessing, self.crop_scale, self.flip, self.policies = preprocessing, crop_scale, flip, policies

    def __call__(self, path: str | Path) -> Tensor:
        """Raises DataError as opened() does."""
        if self.crop_scale is None:
            pixels = to_pixels(self.preprocessing.fit_size(open_image(path, self.preprocessing.num_channels)))
        else:
            pixels = self.random_crop(path, list(self.crop_scale))
        if torch.rand(()) < self.flip:
            pixels = pixels.flip(-1)
        return self.apply_policies(pixels) if self.policies else pixels.contiguous()

    def random_crop(self, path: str | Path, scale: list[float]) -> Tensor:
        """A random piece of the picture, resized to image_size. Where the piece is at least twice as large, a JPEG is decoded
        smaller, but never so small that the piece would have to be enlarged."""
        (height, width), channels = self.preprocessing.image_size, self.preprocessing.num_channels
        with opened(path) as image:
            size = (image.height, image.width) if orientation(image) < 5 else (image.width, image.height)
            top, left, rows, columns = RandomResizedCrop.get_params(torch.empty(1, *size, device="meta"), scale, [3 / 4, 4 / 3])
            shrink = next(factor for factor in (8, 4, 2, 1) if factor == 1 or min(rows // height, columns // width) >= factor)
            pixels = decode_jpeg(image, channels, shrink)
            if pixels is None:
                pixels, shrink = to_pixels(convert(ImageOps.exif_transpose(image), channels)), 1
        rows, columns = round(rows / shrink), round(columns / shrink)
        top, left = min(round(top / shrink), pixels.shape[1] - rows), min(round(left / shrink), pixels.shape[2] - columns)
        return transforms.resize(pixels[:, top:top + rows, left:left + columns], [height, width],
                                 InterpolationMode(self.preprocessing.interpolation), antialias=True)

    def apply_policies(self, pixels: Tensor) -> Tensor:
        image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())
        for policy in self.policies:
            for change in policy.draw(torch.rand(policy.numbers).tolist(), image.height, image.width):
                changed = apply(image, change, policy)
                assert isinstance(changed, Image.Image)
                image = changed
        return to_pixels(image)
