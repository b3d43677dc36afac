"""Random changes of one image in a worker process, drawn from torch's default generator.

The caller seeds the generator for each sample (vit/data/loader.py). The changes come in this order:
draw_crop, random_flip, apply_policies.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from vit.augment.operations import apply_operation
from vit.augment.policies import Policy


class Crop(NamedTuple):
    """A piece of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_crop(height: int, width: int, scale: Sequence[float]) -> Crop:
    """The random crop of Szegedy et al. 2015 from an image of height x width pixels.

    scale: the smallest and the largest area, as fractions of the image's.
    """
    # torchvision asks for an image, of which it reads the size alone
    image = torch.empty(1, height, width, device="meta")
    return Crop(*RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]))


def random_flip(pixels: Tensor, probability: float) -> Tensor:
    """Mirror an image (C, height, width) with `probability`."""
    return pixels.flip(-1) if torch.rand(()) < probability else pixels


def apply_policies(image: Image.Image, policies: Sequence[Policy]) -> Image.Image:
    """Draw from one policy after another and apply what was drawn."""
    for policy in policies:
        # Uniform numbers, so that files and batches share what is drawn from them
        numbers = torch.rand(policy.num_random).tolist()
        for operation in policy.draw(numbers, image.height, image.width):
            image = apply_operation(image, operation, policy.settings)
    return image
