"""Rotation, translation, scaling and shear against torchvision's, for batches and for files."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from vit.augment.affine import NUMBERS, Affine, affine_positions, side_centers, warp
from vit.augment.batch import BatchAugmentation

ALL = Affine(rotate=30, translate=0.2, scale=0.3, shear=20)


def smooth_images(count, height, width):
    """Waves, whose interpolation differs little from one implementation to another."""
    y = torch.linspace(0, 6, height)[:, None]
    x = torch.linspace(0, 6, width)
    waves = [torch.sin(x + phase) * torch.cos(y - phase) for phase in range(count)]
    return ((torch.stack(waves)[:, None] + 1) * 127).to(torch.uint8)


@pytest.mark.parametrize("size", [(40, 40), (24, 48)])
@pytest.mark.parametrize(
    "affine", [ALL, Affine(rotate=45), Affine(translate=0.3), Affine(scale=0.5), Affine(shear=30)]
)
def test_pixels_are_torchvisions_within_the_image(affine, size):
    height, width = size
    images = smooth_images(6, height, width)
    numbers = torch.rand(6, NUMBERS, generator=torch.Generator().manual_seed(0))
    ours = warp(images, affine.matrices(numbers, height, width), size)
    for image, own, number in zip(images, ours, (2 * numbers - 1).tolist(), strict=True):
        rotate, down, right, scale, shear = number
        arguments = {
            "angle": rotate * affine.rotate,
            # Without rounding: torchvision rounds translations only where it interpolates nearest
            "translate": [right * affine.translate * width, down * affine.translate * height],
            "scale": 1 + scale * affine.scale,
            "shear": [shear * affine.shear, 0.0],
        }
        bilinear = {"interpolation": InterpolationMode.BILINEAR}
        theirs = transforms.affine(image, **arguments, **bilinear)
        # What comes in from outside is black there and the border's color here
        white = torch.full_like(image, 255)
        inside = transforms.affine(white, **arguments, **bilinear) == 255
        difference = (own.int() - theirs.int()).abs()[inside]
        assert inside.float().mean() > 0.3
        assert difference.max() <= 1


@pytest.mark.parametrize("size", [(40, 40), (24, 48), (1, 1)])
def test_positions_are_those_of_a_matrix_product(size):
    height, width = size
    matrices = ALL.matrices(torch.rand(6, NUMBERS), height, width)
    device = torch.device("cpu")
    x, y = side_centers(width, device), side_centers(height, device)
    expected = F.affine_grid(matrices, [6, 1, height, width], align_corners=False)
    torch.testing.assert_close(affine_positions(matrices, x, y), expected, atol=1e-6, rtol=0)


def test_nothing_is_changed_by_amounts_of_zero():
    images = smooth_images(3, 8, 8)
    matrices = Affine().matrices(torch.rand(3, NUMBERS), 8, 8)
    assert torch.equal(warp(images, matrices, (8, 8)), images)
    assert not Affine()
    assert ALL


def test_the_border_is_repeated():
    images = torch.full((4, 1, 8, 8), 200, dtype=torch.uint8)
    changed = warp(images, ALL.matrices(torch.rand(4, NUMBERS), 8, 8), (8, 8))
    assert torch.equal(changed, images)


def test_the_size_changes_in_the_same_sampling():
    images = smooth_images(2, 8, 8)
    enlarged = warp(images, Affine().matrices(torch.rand(2, NUMBERS), 8, 8), (16, 16))
    expected = torch.nn.functional.interpolate(
        images.float(), (16, 16), mode="bilinear", align_corners=False
    )
    assert (enlarged.float() - expected).abs().max() <= 0.5


def test_a_samples_change_depends_on_seed_epoch_and_index_alone():
    images = smooth_images(6, 8, 8)
    augmentation = BatchAugmentation(3, (16, 16), 0.0, None, 0.0, affine=ALL)
    epochs = torch.tensor([0, 0, 1, 1, 2, 2])
    indices = torch.arange(6)
    whole = augmentation(images, epochs, indices)
    assert whole.shape == (6, 1, 16, 16)
    parts = [
        augmentation(images[i : i + 2], epochs[i : i + 2], indices[i : i + 2]) for i in (0, 2, 4)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(augmentation(images, epochs + 1, indices), whole)
    other_seed = BatchAugmentation(4, (16, 16), 0.0, None, 0.0, affine=ALL)
    assert not torch.equal(other_seed(images, epochs, indices), whole)
