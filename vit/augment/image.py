"""TODO: say what this file is for."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from vit.augment.operations import Policy, apply_operation
from vit.data.image_files import (
    decode_jpeg,
    exif_orientation,
    open_image,
    open_lazily,
    to_mode,
    to_pixels,
)
from vit.data.preprocessing import Preprocessing


class TrainingTransform:
    """The picture in a file → uint8 (C, *image_size) with the random changes of training, from torch's default generator.

    crop_scale: share of the area that the random crop takes (Szegedy et al. 2015), None: resized as in evaluation;
    flip: probability; policies: vit.augment.policies.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        crop_scale: Sequence[float] | None,
        flip: float,
        policies: Sequence[Policy] = (),
    ):
        self.preprocessing, self.crop_scale, self.flip, self.policies = (
            preprocessing,
            crop_scale,
            flip,
            policies,
        )

    def __call__(self, path: str | Path) -> Tensor:
        """Raises DataError as opened() does."""
        if self.crop_scale is None:
            pixels = to_pixels(
                self.preprocessing.resize_and_crop(
                    open_image(path, self.preprocessing.num_channels)
                )
            )
        else:
            pixels = self.random_crop(path, list(self.crop_scale))
        if torch.rand(()) < self.flip:
            pixels = pixels.flip(-1)
        return self.apply_policies(pixels) if self.policies else pixels.contiguous()

    def random_crop(self, path: str | Path, scale: list[float]) -> Tensor:
        """A random piece of the picture, resized to image_size. Where the piece is at least twice as large, a JPEG is decoded
        smaller, but never so small that the piece would have to be enlarged."""
        (height, width), channels = self.preprocessing.image_size, self.preprocessing.num_channels
        with open_lazily(path) as image:
            size = (
                (image.height, image.width)
                if exif_orientation(image) < 5
                else (image.width, image.height)
            )
            top, left, rows, columns = RandomResizedCrop.get_params(
                torch.empty(1, *size, device="meta"), scale, [3 / 4, 4 / 3]
            )
            shrink = next(
                factor
                for factor in (8, 4, 2, 1)
                if factor == 1 or min(rows // height, columns // width) >= factor
            )
            pixels = decode_jpeg(image, channels, shrink)
            if pixels is None:
                pixels, shrink = to_pixels(to_mode(ImageOps.exif_transpose(image), channels)), 1
        rows, columns = round(rows / shrink), round(columns / shrink)
        top, left = (
            min(round(top / shrink), pixels.shape[1] - rows),
            min(round(left / shrink), pixels.shape[2] - columns),
        )
        return transforms.resize(
            pixels[:, top : top + rows, left : left + columns],
            [height, width],
            InterpolationMode(self.preprocessing.interpolation),
            antialias=True,
        )

    def apply_policies(self, pixels: Tensor) -> Tensor:
        image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())
        for policy in self.policies:
            for change in policy.draw(
                torch.rand(policy.numbers).tolist(), image.height, image.width
            ):
                changed = apply_operation(image, change, policy)
                assert isinstance(changed, Image.Image)
                image = changed
        return to_pixels(image)
