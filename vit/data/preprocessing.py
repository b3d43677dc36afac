"""From an image to the model's input in evaluation: resize, crop, match channels, normalize."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from vit.data.image_files import MAX_PIXELS, open_image, to_mode, to_pixels, upright
from vit.runtime.device import send

PIL_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Normalization:
    """What normalizing takes, (1, C, 1, 1) each, on one device.

    mean, std: of pixels in 0..1; scale, shift: the same as a factor and a summand of pixels in
    0..255.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Preprocessing:
    """Stored in every checkpoint, so that images are prepared as the model knows them.

    image_size      (height, width) of the model's input, pixels
    num_channels    1 or 3
    mean, std       of pixels scaled to 0..1, one number or one per channel
    eval_crop       the shorter side is resized to image_size / eval_crop and the center cut out;
                    None: the whole image is squashed to image_size
    interpolation   bilinear or bicubic, with antialiasing
    """

    image_size: tuple[int, int]
    num_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_crop: float | None
    interpolation: str

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """The inverse of to_dict(); lists come back as tuples."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them: lists instead of tuples."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image to image_size, as evaluation sees it."""
        height, width = self.image_size
        size = self.size_before_crop(image.width, image.height)
        center = (round((size[0] - width) / 2), round((size[1] - height) / 2))
        return self.cut_out(image, size, [center])[0]

    def cut_out(
        self, image: Image.Image, size: tuple[int, int], corners: Sequence[tuple[int, int]]
    ) -> list[Image.Image]:
        """Pieces of image_size out of the image resized to a size, (width, height).

        corners: the left column and the top row of each piece.
        """
        height, width = self.image_size
        resampling = PIL_RESAMPLING[self.interpolation]
        boxes = [(left, top, left + width, top + height) for left, top in corners]
        # A strip of one pixel by thousands would take gigabytes; its pieces alone look the same
        if size[0] * size[1] > MAX_PIXELS:
            x, y = image.width / size[0], image.height / size[1]
            boxes = [(box[0] * x, box[1] * y, box[2] * x, box[3] * y) for box in boxes]
            return [image.resize((width, height), resampling, box) for box in boxes]
        resized = image if image.size == size else image.resize(size, resampling)
        return [resized.crop(box) for box in boxes]

    def size_before_crop(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to resize an image of this size to, before the center is cut out."""
        crop_height, crop_width = self.image_size
        if self.eval_crop is None:
            return crop_width, crop_height
        # Whole numbers, as in torchvision and timm; the quotient of floats may lie just below one
        rows = int(crop_height / self.eval_crop + 1e-6)
        columns = int(crop_width / self.eval_crop + 1e-6)
        # The side that is scaled most decides, so that the crop fits
        if rows * width <= columns * height:
            return columns, max(crop_height, int(columns * height / width))
        return max(crop_width, int(rows * width / height)), rows

    def read_pixels(self, path: str | Path) -> Tensor:
        """Decode, resize and crop an image file: uint8 (C, *image_size).

        Raises DataError, naming the path, for a file that cannot be read.
        """
        return to_pixels(self.resize_and_crop(open_image(path, self.num_channels)))

    def to_input(self, pixels: Tensor) -> Tensor:
        """uint8 (B, c, height, width) of any size → float32 (B, C, *image_size), normalized.

        On the device of the pixels.
        """
        images = match_channels(pixels, self.num_channels).to(torch.float32, copy=True)
        on_cpu = images.device.type == "cpu"
        # In place: four passes over fresh memory would take five times as long on a CPU
        if on_cpu:
            images.div_(255)
        # Small images are enlarged here, on the device, and not in the workers
        if images.shape[-2:] != self.image_size:
            images = self.resize_batch(images)
        constants = self.constants(images.device)
        if on_cpu:
            return images.sub_(constants.mean).div_(constants.std)
        # One kernel in place of three, whose last bits differ from those of the CPU
        return torch.addcmul(constants.shift, images, constants.scale)

    def resize_batch(self, images: Tensor) -> Tensor:
        """(B, C, any height and width) → (B, C, *image_size), antialiased."""
        return F.interpolate(
            images,
            self.image_size,
            mode=self.interpolation,
            antialias=True,
            align_corners=False,
        )

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of to_input's normalization, to look at: floats in 0..1."""
        constants = self.constants(images.device)
        return (images * constants.std + constants.mean).clamp(0, 1)

    def constants(self, device: torch.device) -> "Normalization":
        """Mean and std on a device. They are sent there once."""
        if device not in self.sent:
            mean = self.per_channel(self.mean)
            std = self.per_channel(self.std)
            tensors = (mean, std, 1 / (255 * std), -mean / std)
            self.sent[device] = Normalization(*(send(tensor, device) for tensor in tensors))
        return self.sent[device]

    @functools.cached_property
    def sent(self) -> dict[torch.device, "Normalization"]:
        """The constants by the device on which they are."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        # Other processes must not be given tensors of a GPU
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def per_channel(self, values: Sequence[float]) -> Tensor:
        """Numbers as (1, C, 1, 1): three are averaged for gray, one is repeated for RGB."""
        tensor = torch.tensor(values, dtype=torch.float32)
        if self.num_channels == 1:
            tensor = tensor.mean().expand(1)
        else:
            tensor = tensor.expand(self.num_channels)
        return tensor.reshape(1, -1, 1, 1)

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """One image, or the path of one, → float32 (C, *image_size), upright as its EXIF says.

        Raises DataError for a path that can't be read.
        """
        if isinstance(image, Image.Image):
            image = to_mode(upright(image), self.num_channels)
            pixels = to_pixels(self.resize_and_crop(image))
        else:
            pixels = self.read_pixels(image)
        return self.to_input(pixels[None])[0]


def match_channels(pixels: Tensor, num_channels: int) -> Tensor:
    """Pixels (B, c, height, width) → (B, num_channels, height, width).

    Gray is repeated; RGB becomes luma (ITU-R BT.601).
    """
    if pixels.shape[1] == num_channels:
        return pixels
    if num_channels == 1:
        return transforms.rgb_to_grayscale(pixels)
    return pixels.expand(-1, num_channels, -1, -1)
