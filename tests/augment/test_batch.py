import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from vit.augment.affine import Affine
from vit.augment.batch import BatchAugmentation, apply_policy, crop_and_flip, sample_boxes
from vit.augment.batch_operations import apply_drawn
from vit.augment.policies import POLICIES, build_policies
from vit.augment.resizing import filter_boxes
from vit.data.preprocessing import Preprocessing
from vit.randomness import random_uniform


def make_pixels(count=6, channels=3, side=32):
    generator = torch.Generator().manual_seed(1)
    shape = (count, channels, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_crop_and_flip_is_what_a_loop_would_cut():
    images = make_pixels()
    offsets = torch.tensor([[0, 0], [8, 8], [4, 4], [0, 8], [3, 5], [7, 2]])
    flipped = torch.tensor([False, True, False, True, True, False])
    out = crop_and_flip(images, offsets, flipped, pad=4)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for i, (top, left) in enumerate(offsets.tolist()):
        expected = padded[i, :, top : top + 32, left : left + 32]
        assert torch.equal(out[i], expected.flip(-1) if flipped[i] else expected)


@pytest.mark.parametrize("name", POLICIES)
def test_each_image_gets_its_own_operations_in_turn(name):
    (policy,) = build_policies(name, None, None, 0.0)
    images = make_pixels(12)
    numbers = random_uniform(0, "test", torch.arange(12)[:, None], torch.arange(policy.num_random))
    together = apply_policy(images, numbers, policy)
    for image, own, out in zip(images, numbers.tolist(), together, strict=True):
        alone = image[None]
        for operation in policy.draw(own, 32, 32):
            alone = apply_drawn(alone, [[operation]], policy.settings)
        assert torch.equal(out, alone[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_is_changed_alike_in_any_batch(channels):
    policies = build_policies("randaugment", 2, 9, 0.3)
    augmentation = BatchAugmentation(3, (32, 32), 0.125, None, 0.5, policies)
    images = make_pixels(16, channels)
    epochs = torch.arange(16) // 8
    indices = torch.arange(100, 116)
    together = augmentation(images, epochs, indices)
    assert together.shape == images.shape
    assert together.dtype == torch.uint8
    order = torch.tensor([9, 3, 15])
    assert torch.equal(together[order], augmentation(images[order], epochs[order], indices[order]))
    next_epoch = augmentation(images, epochs + 1, indices)
    assert (next_epoch != together).flatten(1).any(1).sum() > 12


def test_all_offsets_and_both_sides_are_drawn():
    augmentation = BatchAugmentation(0, (8, 8), 0.125, None, flip=0.5)
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[0, 0, 3, 2] = 255
    images = image.expand(2000, -1, -1, -1)
    out = augmentation(images, torch.zeros(2000, dtype=torch.int64), torch.arange(2000))
    positions = out.flatten(1).float().argmax(1)
    counts = {
        (position // 8, position % 8): int((positions == position).sum())
        for position in positions.unique().tolist()
    }
    assert set(counts) == {(row, column) for row in (2, 3, 4) for column in (1, 2, 3, 4, 5, 6)}
    assert all(70 < count < 160 for count in counts.values())


def test_no_augmentation_changes_nothing():
    images = make_pixels()
    augmentation = BatchAugmentation(0, (32, 32), 0.0, None, 0.0)
    out = augmentation(images, torch.zeros(6, dtype=torch.int64), torch.arange(6))
    assert torch.equal(out, images)


BOXES = torch.tensor(
    [
        [0.0, 0, 32, 32],
        [3, 5, 20, 17],
        [31, 31, 1, 1],
        [10, 0, 22, 9],
        [0, 4, 13, 28],
        [8, 8, 16, 16],
    ]
)
FLIPPED = torch.tensor([False, True, False, True, False, True])


def resized_by_torchvision(images, size, interpolation):
    """BOXES of the images, computed in floats: in bytes it clips between rows and columns."""
    resized = []
    for image, box, flip in zip(images.float(), BOXES.int().tolist(), FLIPPED, strict=True):
        options = {"interpolation": InterpolationMode(interpolation), "antialias": True}
        crop = v2.functional.resized_crop(image, *box, size=list(size), **options)
        resized.append(crop.flip(-1) if flip else crop)
    return torch.stack(resized).round().clamp(0, 255)


def test_boxes_are_sampled_as_torchvision_resizes_them():
    images = make_pixels()
    out = sample_boxes(images, BOXES, FLIPPED, (48, 64))
    expected = resized_by_torchvision(images, (48, 64), "bilinear")
    assert (out.float() - expected).abs().max() <= 1


@pytest.mark.parametrize("size", [(16, 12), (5, 48), (32, 32), (48, 64)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_boxes_are_filtered_as_torchvision_resizes_them(size, interpolation):
    images = make_pixels()
    out = filter_boxes(images, BOXES, FLIPPED, size, interpolation)
    expected = resized_by_torchvision(images, size, interpolation)
    assert (out.float() - expected).abs().max() <= 1
    assert out.is_contiguous()


@pytest.mark.parametrize("change", ["crop", "affine"])
@pytest.mark.parametrize(
    ("size", "interpolation"),
    [
        ((16, 16), "bilinear"),
        ((16, 16), "bicubic"),
        ((48, 64), "bicubic"),
        ((48, 64), "bilinear"),
        ((16, 64), "bilinear"),
    ],
)
def test_training_resizes_as_evaluation_does(change, size, interpolation):
    images = make_pixels()
    # The whole image, and a rotation that is none
    crop_scale = [1.0, 1.0] if change == "crop" else None
    affine = Affine(rotate=1e-9 if change == "affine" else 0.0)
    augmentation = BatchAugmentation(0, size, 0.0, crop_scale, 0.0, (), affine, interpolation)
    out = augmentation(images, torch.zeros(6, dtype=torch.int64), torch.arange(6))
    evaluation = Preprocessing(size, 3, (0.0,), (1 / 255,), None, interpolation)
    expected = evaluation.to_input(images).clamp(0, 255)
    assert (out.float() - expected).abs().max() <= 1


def test_resized_crops_reach_the_size_of_the_models_input():
    augmentation = BatchAugmentation(0, (48, 64), 0.0, [0.3, 1.0], 0.5)
    out = augmentation(make_pixels(), torch.zeros(6, dtype=torch.int64), torch.arange(6))
    assert out.shape == (6, 3, 48, 64)
    assert out.dtype == torch.uint8


def test_padding_wins_over_the_resized_crop():
    images = make_pixels()
    epochs, indices = torch.zeros(6, dtype=torch.int64), torch.arange(6)
    padded = BatchAugmentation(0, (48, 64), 0.125, [0.3, 1.0], 0.5)(images, epochs, indices)
    alone = BatchAugmentation(0, (48, 64), 0.125, None, 0.5)(images, epochs, indices)
    assert torch.equal(padded, alone)
