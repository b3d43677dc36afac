"""TODO: say what this file is for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from vit.data.image_files import open_image, to_mode, to_pixels

PIL_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


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
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """The inverse of to_dict(): lists come back as tuples."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Resize and crop a picture to image_size, as evaluation sees it."""
        height, width = self.image_size
        resampling = PIL_RESAMPLING[self.interpolation]
        if self.eval_crop is None:
            return (
                image
                if image.size == (width, height)
                else image.resize((width, height), resampling)
            )
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
            images = F.interpolate(
                images,
                self.image_size,
                mode=self.interpolation,
                antialias=True,
                align_corners=False,
            )
        return images.sub_(self.channels(self.mean, images)).div_(self.channels(self.std, images))

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of to_input's normalisation, for a person to look at: floats in 0..1."""
        return (images * self.channels(self.std, images) + self.channels(self.mean, images)).clamp(
            0, 1
        )

    def channels(self, values: Sequence[float], like: Tensor) -> Tensor:
        """Per-channel numbers as (1, C, 1, 1); three for one grey channel are averaged, one for RGB is repeated."""
        tensor = torch.tensor(values, dtype=like.dtype, device=like.device)
        tensor = (
            tensor.mean().expand(1) if self.num_channels == 1 else tensor.expand(self.num_channels)
        )
        return tensor.reshape(1, -1, 1, 1)

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """One picture, or the path of one, → float32 (C, *image_size)."""
        if not isinstance(image, Image.Image):
            image = open_image(image, self.num_channels)
        return self.to_input(
            to_pixels(self.resize_and_crop(to_mode(image, self.num_channels)))[None]
        )[0]
