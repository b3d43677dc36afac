import numpy as np
import pytest
import torch
from PIL import Image

from vit.augment.image import apply_policies, draw_crop, random_flip
from vit.augment.operations import DrawnOperation
from vit.augment.policies import Policy, build_policies


def test_crops_lie_inside_the_image_and_have_the_requested_area():
    torch.manual_seed(0)
    for _ in range(200):
        crop = draw_crop(60, 80, [0.2, 0.5])
        assert crop.top >= 0
        assert crop.left >= 0
        assert crop.top + crop.height <= 60
        assert crop.left + crop.width <= 80
        assert 0.18 < crop.height * crop.width / (60 * 80) < 0.52


def test_half_the_images_are_mirrored():
    torch.manual_seed(0)
    image = torch.arange(3).reshape(1, 1, 3)
    flipped = [torch.equal(random_flip(image, 0.5), image.flip(-1)) for _ in range(1000)]
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(random_flip(image, 0.0), image)


def test_policies_are_applied_one_after_another():
    def draw_posterize(numbers, height, width):
        assert (len(numbers), height, width) == (2, 4, 6)
        return [DrawnOperation("posterize", 1)]

    def draw_invert(numbers, height, width):
        return [DrawnOperation("invert")]

    image = Image.new("L", (6, 4), 200)
    out = apply_policies(image, [Policy(2, draw_posterize), Policy(0, draw_invert)])
    assert np.unique(np.asarray(out)).tolist() == [255 - 128]
    assert np.unique(np.asarray(image)).tolist() == [200]


def test_the_generator_decides():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    policies = build_policies("randaugment", 2, 9, 0.3)

    def augmented(seed):
        torch.manual_seed(seed)
        return np.asarray(apply_policies(image, policies))

    assert np.array_equal(augmented(1), augmented(1))
    assert not np.array_equal(augmented(1), augmented(2))
