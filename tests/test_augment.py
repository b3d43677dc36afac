import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from vit.augment import (
    BatchAugmentation,
    crop_and_flip,
    randaugment,
    randaugment_operations,
    resize_boxes,
    resized_crop_boxes,
)
from vit.randomness import random_uniform

NAMES = ["Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
         "Posterize", "Solarize", "AutoContrast", "Equalize"]


def pictures(count=6, channels=3, side=32):
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_crop_and_flip_is_what_a_loop_would_cut():
    images = pictures()
    offsets = torch.tensor([[0, 0], [8, 8], [4, 4], [0, 8], [3, 5], [7, 2]])
    flipped = torch.tensor([False, True, False, True, True, False])
    out = crop_and_flip(images, offsets, flipped, pad=4)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for i, (top, left) in enumerate(offsets.tolist()):
        expected = padded[i, :, top:top + 32, left:left + 32]
        assert torch.equal(out[i], expected.flip(-1) if flipped[i] else expected)


@pytest.mark.parametrize("magnitude", [0, 9, 10, 30])
@pytest.mark.parametrize("number", range(14))
def test_every_operation_is_torchvisions(number, magnitude):
    """The policy's operation at its strength, against torchvision.transforms.v2.RandAugment's own."""
    reference = v2.RandAugment(num_ops=1, magnitude=magnitude)
    assert list(reference._AUGMENTATION_SPACE) == NAMES
    images = pictures()
    magnitudes, signed = reference._AUGMENTATION_SPACE[NAMES[number]]
    values = magnitudes(31, 32, 32)
    strength = 0.0 if values is None else float(values[magnitude])
    assert randaugment_operations(magnitude, 32, 32)[number][2] == signed
    for sign in (False, True) if signed else (False,):
        choices, signs = torch.full((6, 1), number), torch.full((6, 1), sign)
        expected = reference._apply_image_or_video_transform(images, NAMES[number], -strength if sign else strength,
                                                             InterpolationMode.NEAREST, {torch.Tensor: None})
        assert torch.equal(randaugment(images, choices, signs, magnitude), expected)


def test_operations_of_an_image_follow_each_other():
    images = pictures()
    choices, signs = torch.tensor([[5, 11]] * 6), torch.zeros(6, 2, dtype=torch.bool)
    once = randaugment(images, choices[:, :1], signs[:, :1], 9)
    assert torch.equal(randaugment(images, choices, signs, 9), randaugment(once, choices[:, 1:], signs[:, 1:], 9))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_is_changed_alike_in_any_batch(channels):
    augmentation = BatchAugmentation(3, (32, 32), 0.125, None, flip=0.5, randaugment_ops=2, randaugment_magnitude=9)
    images, epochs, indices = pictures(16, channels), torch.arange(16) // 8, torch.arange(100, 116)
    together = augmentation(images, epochs, indices)
    assert together.shape == images.shape
    assert together.dtype == torch.uint8
    order = torch.tensor([9, 3, 15])
    assert torch.equal(together[order], augmentation(images[order], epochs[order], indices[order]))
    again = augmentation(images, epochs + 1, indices)
    assert (again != together).flatten(1).any(1).sum() > 12


def test_all_offsets_and_both_sides_are_drawn():
    augmentation = BatchAugmentation(0, (8, 8), 0.125, None, flip=0.5, randaugment_ops=0, randaugment_magnitude=0)
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[0, 0, 3, 2] = 255
    out = augmentation(image.expand(2000, -1, -1, -1), torch.zeros(2000, dtype=torch.int64), torch.arange(2000))
    places = out.flatten(1).float().argmax(1)
    counts = {(place // 8, place % 8): int((places == place).sum()) for place in places.unique().tolist()}
    assert set(counts) == {(row, column) for row in (2, 3, 4) for column in (1, 2, 3, 4, 5, 6)}
    assert all(70 < count < 160 for count in counts.values())


def test_no_augmentation_changes_nothing():
    images = pictures()
    out = BatchAugmentation(0, (32, 32), 0.0, None, 0.0, 0, 0)(images, torch.zeros(6, dtype=torch.int64), torch.arange(6))
    assert torch.equal(out, images)


def test_boxes_are_resized_as_torchvision_does():
    images = pictures()
    boxes = torch.tensor([[0.0, 0, 32, 32], [3, 5, 20, 17], [31, 31, 1, 1], [10, 0, 22, 9], [0, 4, 13, 28], [8, 8, 16, 16]])
    flipped = torch.tensor([False, True, False, True, False, True])
    out = resize_boxes(images, boxes, flipped, (48, 64))
    for image, box, flip, ours in zip(images, boxes.int().tolist(), flipped, out, strict=True):
        expected = v2.functional.resized_crop(image, *box, size=[48, 64], antialias=True)
        difference = (ours.int() - (expected.flip(-1) if flip else expected).int()).abs()
        assert difference.max() <= 1


def test_boxes_have_the_areas_and_ratios_asked_for():
    numbers = random_uniform(0, "test", torch.arange(5000)[:, None], torch.arange(22))
    top, left, height, width = resized_crop_boxes(numbers, 200, 200, [0.05, 1.0]).unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height).max() <= 200
    assert (left + width).max() <= 200
    area = height * width / 200**2
    assert 0.045 < area.min() < 0.07
    assert area.max() > 0.95
    assert 0.42 < area.mean() < 0.53
    assert 0.7 < (width / height).min() < 0.8
    assert 1.25 < (width / height).max() < 1.4
    assert torch.equal(resized_crop_boxes(numbers, 1, 30, [1.0, 1.0])[0], torch.tensor([0.0, 0, 1, 30]))


def test_resized_crops_reach_the_models_size():
    augmentation = BatchAugmentation(0, (48, 64), 0.0, [0.3, 1.0], 0.5, 0, 0)
    out = augmentation(pictures(), torch.zeros(6, dtype=torch.int64), torch.arange(6))
    assert out.shape == (6, 3, 48, 64)
    assert out.dtype == torch.uint8
