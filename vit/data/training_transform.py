"""From an image file to the pixels that training sees, in a worker process."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from vit.augment.affine import NUMBERS, Affine, warp
from vit.augment.flips import AlternatingFlip
from vit.augment.image import Crop, apply_policies, draw_crop, random_flip
from vit.augment.policies import Policy
from vit.data.image_files import (
    decode_jpeg,
    exif_orientation,
    open_lazily,
    to_mode,
    to_pixels,
    upright,
)
from vit.data.preprocessing import Preprocessing


class TrainingTransform:
    """An image file → uint8 (C, *image_size) with random changes from torch's default generator.

    crop_scale  fractions of the area that the random crop takes (Szegedy et al. 2015); None: the
                image is resized and cropped as in evaluation
    flip        probability of mirroring, or which images are mirrored in a pass
    policies    see vit.augment.policies
    affine      rotation, translation, scaling and shear
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        crop_scale: Sequence[float] | None,
        flip: float | AlternatingFlip,
        policies: Sequence[Policy] = (),
        affine: Affine | None = None,
    ):
        self.preprocessing = preprocessing
        self.crop_scale = crop_scale
        self.flip = flip
        self.policies = policies
        self.affine = affine or Affine()

    def __call__(self, path: str | Path, epoch: int, index: int) -> Tensor:
        """Raises DataError, naming the path, for a file that cannot be read.

        epoch, index: which pass over the data and which sample it is.
        """
        if self.crop_scale is None:
            pixels = self.preprocessing.read_pixels(path)
        else:
            pixels = self.random_crop(path, self.crop_scale)
        if isinstance(self.flip, AlternatingFlip):
            flipped = self.flip(torch.tensor(epoch), torch.tensor(index))
            pixels = pixels.flip(-1) if flipped else pixels
        else:
            pixels = random_flip(pixels, self.flip)
        if self.affine:
            height, width = pixels.shape[-2:]
            matrices = self.affine.matrices(torch.rand(1, NUMBERS), height, width)
            pixels = warp(pixels[None], matrices, (height, width))[0]
        if not self.policies:
            return pixels.contiguous()
        image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())
        return to_pixels(apply_policies(image, self.policies))

    def random_crop(self, path: str | Path, scale: Sequence[float]) -> Tensor:
        """A random piece of the image, resized to image_size: uint8 (C, *image_size)."""
        preprocessing = self.preprocessing
        with open_lazily(path) as image:
            # Only JPEGs are decoded by the crop. Until a TIFF's pixels are read, its size does not
            # fit its orientation
            if image.format != "JPEG":
                image.load()
            # Drawn for the whole image, whichever way it is decoded then
            crop = draw_crop(*upright_size(image), scale)
            shrink = possible_shrink(crop, preprocessing.image_size)
            pixels = decode_jpeg(image, preprocessing.num_channels, shrink)
            # Pillow reads the rest, and says what is wrong with a damaged file
            if pixels is None:
                shrink = 1
                pixels = to_pixels(to_mode(upright(image), preprocessing.num_channels))
        return transforms.resize(
            cut_out(pixels, crop, shrink),
            list(preprocessing.image_size),
            InterpolationMode(preprocessing.interpolation),
            antialias=True,
        )


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) in pixels of an opened image as it is meant to be looked at."""
    if exif_orientation(image) >= 5:
        return image.width, image.height
    return image.height, image.width


def possible_shrink(crop: Crop, image_size: tuple[int, int]) -> int:
    """By how much a JPEG may be shrunk on decoding: 8, 4, 2 or 1.

    Never so far that the crop would have to be enlarged to image_size afterwards.
    """
    height, width = image_size
    # Both sides are shrunk alike, so the one with less to spare decides
    spare = min(crop.height // height, crop.width // width)
    for factor in (8, 4, 2):
        if spare >= factor:
            return factor
    return 1


def cut_out(pixels: Tensor, crop: Crop, shrink: int) -> Tensor:
    """The crop of an image (C, height, width) that was decoded `shrink` times smaller."""
    height = round(crop.height / shrink)
    width = round(crop.width / shrink)
    # Rounding may pass the last row or column by one
    top = min(round(crop.top / shrink), pixels.shape[1] - height)
    left = min(round(crop.left / shrink), pixels.shape[2] - width)
    return pixels[:, top : top + height, left : left + width]
