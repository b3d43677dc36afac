import torch

from vit.augment.boxes import (
    NUMBERS_PER_BOX,
    box_mask,
    erasing_boxes,
    resized_crop_boxes,
    sample_numbers,
)
from vit.randomness import random_uniform


def numbers_for(count):
    return random_uniform(0, "test", torch.arange(count)[:, None], torch.arange(NUMBERS_PER_BOX))


def test_crops_have_the_requested_areas_and_ratios():
    boxes = resized_crop_boxes(numbers_for(5000), 200, 200, [0.05, 1.0])
    top, left, height, width = boxes.unbind(1)
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


def test_a_crop_that_never_fits_is_the_whole_image():
    boxes = resized_crop_boxes(numbers_for(5000), 1, 30, [1.0, 1.0])
    assert torch.equal(boxes[0], torch.tensor([0.0, 0, 1, 30]))


def test_an_erased_box_that_never_fits_is_empty():
    boxes = erasing_boxes(numbers_for(50), 1, 1)
    assert boxes[:, 2:].abs().sum() == 0


def test_a_mask_is_true_inside_the_box_alone():
    boxes = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0]])
    mask = box_mask(boxes, 6, 8, torch.device("cpu"))
    assert mask.shape == (2, 1, 6, 8)
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[1:4, 2:6] = True
    assert torch.equal(mask[0, 0], expected)
    assert not mask[1].any()


def test_numbers_belong_to_the_sample_not_to_its_position_in_the_batch():
    epochs, indices = torch.tensor([0, 0, 1]), torch.tensor([5, 9, 5])
    numbers = sample_numbers(3, epochs, indices, "crop", 4)
    assert numbers.shape == (3, 4)
    assert torch.equal(numbers[1:2], sample_numbers(3, epochs[1:2], indices[1:2], "crop", 4))
    assert not torch.equal(numbers[0], numbers[2])
    assert not torch.equal(numbers, sample_numbers(3, epochs, indices, "flip", 4))
