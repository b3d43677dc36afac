"""Several views of one image in evaluation: the five crops of its corners and its center."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vit.data.image_files import open_image, to_pixels
from vit.data.preprocessing import Preprocessing

NUM_CROPS = 5


@dataclass(frozen=True)
class FiveCrops:
    """Reads an image as Preprocessing does, but for five crops where that takes the center alone.

    Source: Krizhevsky et al. 2012, section 4.1, of the image as evaluation resizes it.
    """

    preprocessing: Preprocessing

    def read_pixels(self, path: str | Path) -> Tensor:
        """Decode, resize and crop an image file: uint8 (5·C, *image_size), crop after crop.

        The crops are top left, top right, bottom left, bottom right and center. Raises DataError,
        naming the path, for a file that cannot be read.
        """
        image = open_image(path, self.preprocessing.num_channels)
        size = self.preprocessing.size_before_crop(image.width, image.height)
        height, width = self.preprocessing.image_size
        right, bottom = size[0] - width, size[1] - height
        # Rounded as the center of Preprocessing.resize_and_crop
        center = (round(right / 2), round(bottom / 2))
        corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), center]
        crops = self.preprocessing.cut_out(image, size, corners)
        return torch.cat([to_pixels(crop) for crop in crops])

    def to_input(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 5·C, height, width) → float32 (B·5, C, *image_size), normalized."""
        crops = pixels.unflatten(1, (NUM_CROPS, -1)).flatten(0, 1)
        return self.preprocessing.to_input(crops)
