"""Mixup and CutMix of a normalized batch on the device."""

from typing import NamedTuple

import torch
from scipy.special import betaincinv
from torch import Tensor

from vit.augment.boxes import box_mask
from vit.randomness import random_uniform
from vit.runtime.device import send


class Mix(NamedTuple):
    """How each image of a batch is mixed.

    partner     int64 (B,), the image it is mixed with, or itself
    is_cut      bool (B,), by CutMix rather than mixup
    own_weight  float32 (B,), λ in the papers: how much of the image, and of its label, is kept
    boxes       float32 (B, 4), what CutMix takes from the partner; empty for mixup
    """

    partner: Tensor
    is_cut: Tensor
    own_weight: Tensor
    boxes: Tensor


class MixupCutmix:
    """Mixup (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899).

    The order of a batch is random, so neighbors are mixed: images 0 and 1, 2 and 3, and so on.
    Each pair has its own λ, which depends on (seed, step) and the pair's position alone; an odd
    last image stays as it is.

    mixup, cutmix  α of their Beta(α, α); 0: off. With both on, a pair gets either half the time.
    probability    of mixing a pair at all
    """

    def __init__(
        self, seed: int, num_classes: int, mixup: float, cutmix: float, probability: float
    ):
        self.seed = seed
        self.num_classes = num_classes
        self.mixup = mixup
        self.cutmix = cutmix
        self.probability = probability

    def __bool__(self) -> bool:
        """Whether anything is mixed at all."""
        return bool(self.probability and (self.mixup or self.cutmix))

    def __call__(
        self, images: Tensor, labels: Tensor, step: int, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Mix normalized images (B, C, height, width) with labels int64 (B,).

        first: position of the first of these images in the step's global batch, an even number.
        Returns the mixed images and targets float32 (B, num_classes), whose rows sum to 1.
        """
        height, width = images.shape[-2:]
        mix = self.draw(step, first, len(labels), height, width)
        mix = Mix(*(send(part, images.device) for part in mix))
        return mix_images(images, mix), mix_labels(labels, mix, self.num_classes)

    def draw(self, step: int, first: int, count: int, height: int, width: int) -> Mix:
        """Draw, on the CPU, how images from position `first` of a step's global batch are mixed."""
        positions = torch.arange(count)
        neighbor = positions.bitwise_xor(1)
        partner = torch.where(neighbor < count, neighbor, positions)

        # Counted by pair, so that both of a pair get the same numbers
        pairs = (first + positions)[:, None] // 2
        numbers = random_uniform(self.seed, "mixing", step, pairs, torch.arange(5))
        apply, method, quantile, row, column = numbers.unbind(1)
        if self.mixup and self.cutmix:
            is_cut = method < 0.5
        else:
            is_cut = torch.full_like(method, bool(self.cutmix), dtype=torch.bool)

        own_weight = torch.where(
            is_cut, beta_quantile(quantile, self.cutmix), beta_quantile(quantile, self.mixup)
        )
        is_mixed = (apply < self.probability) & (partner != positions)
        own_weight = torch.where(is_mixed, own_weight, torch.ones_like(own_weight))

        # A box is cut off at the image's edges, so λ is counted again from the pixels that remain
        boxes = cutmix_boxes(torch.where(is_cut, own_weight, 1.0), row, column, height, width)
        remaining = 1 - boxes[:, 2] * boxes[:, 3] / (height * width)
        return Mix(partner, is_cut, torch.where(is_cut, remaining, own_weight), boxes)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """Images (B, C, height, width), each mixed with its partner."""
    partners = images[mix.partner]
    # CutMix blends nothing: outside the box the image stays as it is
    own_weight = torch.where(mix.is_cut, 1.0, mix.own_weight).to(images.dtype)
    blended = partners.lerp(images, own_weight[:, None, None, None])
    height, width = images.shape[-2:]
    in_box = box_mask(mix.boxes, height, width, images.device)
    return torch.where(in_box, partners, blended)


def mix_labels(labels: Tensor, mix: Mix, num_classes: int) -> Tensor:
    """Labels int64 (B,) → the weight of each class, float32 (B, num_classes)."""
    targets = torch.zeros(len(labels), num_classes, device=labels.device)
    targets.scatter_(1, labels[:, None], mix.own_weight[:, None])
    # Added, since partners may be of the same class
    targets.scatter_add_(1, labels[mix.partner][:, None], 1 - mix.own_weight[:, None])
    return targets


def beta_quantile(numbers: Tensor, alpha: float) -> Tensor:
    """Uniform numbers (n,) → numbers of Beta(alpha, alpha); ones for alpha 0.

    By the inverse of the distribution: a generator's own sampling would take as many random
    numbers as it likes.
    """
    if not alpha:
        return torch.ones_like(numbers)
    quantiles = betaincinv(alpha, alpha, numbers.double().numpy())
    return torch.from_numpy(quantiles).to(numbers.dtype)


def cutmix_boxes(
    own_weight: Tensor, row: Tensor, column: Tensor, height: int, width: int
) -> Tensor:
    """Boxes (B, 4) of top, left, height and width in pixels, about a center drawn anywhere.

    own_weight, row, column: (B,) in [0, 1]. A box is cut off at the edges, so more of an image than
    own_weight may remain.
    """
    side_fraction = (1 - own_weight).sqrt()
    half_height = side_fraction * height // 2
    half_width = side_fraction * width // 2
    center_row = (row * height).floor()
    center_column = (column * width).floor()
    top = (center_row - half_height).clamp(0, height)
    bottom = (center_row + half_height).clamp(0, height)
    left = (center_column - half_width).clamp(0, width)
    right = (center_column + half_width).clamp(0, width)
    return torch.stack([top, left, bottom - top, right - left], dim=1)
