"""TODO: say what this file is for."""

import torch
from scipy.special import betaincinv
from torch import Tensor

from vit.augment.boxes import box_mask
from vit.randomness import random_uniform


class MixupCutmix:
    """Mixup (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899) of neighbours in a batch.

    The order of a batch is random, so images 0 and 1, 2 and 3, … are mixed with each other, each pair with its own share,
    which depends on (seed, step) and the pair's place alone; a last odd one stays as it is.
    mixup, cutmix: α of their Beta(α, α), 0: off; probability: of mixing a pair at all; with both on, either half the time.
    """

    def __init__(
        self, seed: int, num_classes: int, mixup: float, cutmix: float, probability: float
    ):
        self.seed, self.num_classes, self.mixup, self.cutmix, self.probability = (
            seed,
            num_classes,
            mixup,
            cutmix,
            probability,
        )

    def __bool__(self) -> bool:
        return bool(self.probability and (self.mixup or self.cutmix))

    def __call__(
        self, images: Tensor, labels: Tensor, step: int, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, height, width), labels int64 (B,) → mixed images, targets float32 (B, num_classes) whose
        rows sum to 1. first: the place in the step's global batch of the first of these images, an even number."""
        count, (height, width) = len(labels), images.shape[-2:]
        places = torch.arange(count)
        partner = torch.where(places.bitwise_xor(1) < count, places.bitwise_xor(1), places)
        numbers = random_uniform(
            self.seed, "mixing", step, (first + places)[:, None] // 2, torch.arange(5)
        )
        mixed, cut, share, row, column = numbers.unbind(1)
        cuts = (
            (cut < 0.5)
            if self.mixup and self.cutmix
            else torch.full_like(cut, bool(self.cutmix), dtype=torch.bool)
        )
        kept = torch.where(
            cuts, beta_quantile(share, self.cutmix), beta_quantile(share, self.mixup)
        )  # of the image itself; λ in the papers
        # Both of a pair keep the same λ: an image's own label then has the share of its own pixels in both
        kept = torch.where(
            (mixed < self.probability) & (partner != places), kept, torch.ones_like(kept)
        )
        boxes = cutmix_boxes(torch.where(cuts, kept, 1.0), row, column, height, width)
        kept = torch.where(cuts, 1 - boxes[:, 2] * boxes[:, 3] / (height * width), kept)
        device = images.device
        blended = torch.where(cuts, 1.0, kept).to(device, images.dtype, non_blocking=True)[
            :, None, None, None
        ]
        partner, weights = (numbers.to(device, non_blocking=True) for numbers in (partner, kept))
        partners = images[partner]
        out = torch.where(
            box_mask(boxes, height, width, device), partners, partners.lerp(images, blended)
        )
        targets = torch.zeros(count, self.num_classes, device=device)
        targets.scatter_(1, labels[:, None], weights[:, None])
        targets.scatter_add_(1, labels[partner][:, None], 1 - weights[:, None])
        return out, targets


def beta_quantile(numbers: Tensor, alpha: float) -> Tensor:
    """Uniform numbers (n,) → numbers of Beta(alpha, alpha), by the inverse of its distribution; ones for alpha 0."""
    if not alpha:
        return torch.ones_like(numbers)
    return torch.from_numpy(betaincinv(alpha, alpha, numbers.double().numpy())).to(numbers.dtype)


def cutmix_boxes(kept: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """Boxes (B, 4) of top, left, height, width in pixels about a centre drawn anywhere, cut off at the edges, so that what is
    left of an image may be more than `kept`. kept, row, column: (B,) in [0, 1]."""
    half_height, half_width = ((1 - kept).sqrt() * side // 2 for side in (height, width))
    centre_row, centre_column = (row * height).floor(), (column * width).floor()
    top, bottom = ((centre_row + half).clamp(0, height) for half in (-half_height, half_height))
    left, right = ((centre_column + half).clamp(0, width) for half in (-half_width, half_width))
    return torch.stack([top, left, bottom - top, right - left], dim=1)
