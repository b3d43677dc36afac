"""Corruptions get stronger with the severity and are the same every time."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from vit.evaluation.corruptions import CORRUPTIONS, NUM_SEVERITIES, corrupt


def smooth_images(count: int, shape: tuple[int, int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, shape[0], 5, 5, generator=generator)
    smooth = F.interpolate(coarse, shape[1:], mode="bicubic")
    return (smooth.clamp(0, 1) * 200 + 20).to(torch.uint8)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 20, 12)])
def test_corruptions_rise_and_repeat(kind, shape):
    pixels = smooth_images(300, shape)
    corrupted = [corrupt(pixels, kind, level) for level in range(1, NUM_SEVERITIES + 1)]
    errors = []
    for images in corrupted:
        assert images.shape == pixels.shape
        assert images.dtype == torch.uint8
        errors.append((images.float() - pixels.float()).square().mean().sqrt().item())
    assert errors[0] < errors[-1]
    if shape[1] >= 32:
        assert all(after > 0.95 * before for before, after in pairwise(errors))
    assert torch.equal(corrupt(pixels, kind, 3), corrupted[2])
    # Nor does an image depend on the ones after it
    assert torch.equal(corrupt(pixels[:256], kind, 3), corrupted[2][:256])


@pytest.mark.parametrize("kind", ["gaussian blur", "defocus blur", "motion blur", "pixelate"])
def test_blurs_keep_a_flat_image(kind):
    flat = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(corrupt(flat, kind, 5), flat)


def test_brightness_and_contrast_by_hand():
    pixels = torch.tensor([0, 100, 200, 250], dtype=torch.uint8).reshape(1, 1, 2, 2)
    brighter = corrupt(pixels, "brightness", 3)  # 0.15 of 255 is 38.25
    assert brighter.flatten().tolist() == [38, 138, 238, 255]
    grayer = corrupt(pixels, "contrast", 2)  # half the distance to the mean, 137.5
    assert grayer.flatten().tolist() == [69, 119, 169, 194]


def test_noise_has_its_standard_deviation():
    gray = torch.full((64, 3, 32, 32), 128, dtype=torch.uint8)
    noise = corrupt(gray, "gaussian noise", 3).float() / 255
    assert noise.std().item() == pytest.approx(0.08, rel=0.02)
