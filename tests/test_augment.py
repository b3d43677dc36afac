import pytest
import torch
from torchvision.transforms import v2

from vit.augment.batch import BatchAugmentation, apply_policy, crop_and_flip, resize_boxes
from vit.augment.boxes import erasing_boxes, resized_crop_boxes
from vit.augment.erasing import random_erase
from vit.augment.mixing import MixupCutmix
from vit.augment.operations import apply_operation
from vit.augment.policies import build_policies
from vit.randomness import random_uniform

POLICIES = (
    "randaugment",
    "randaugment_big_vision",
    "randaugment_timm",
    "autoaugment",
    "three_augment",
)


def pictures(count=6, channels=3, side=32):
    return torch.randint(
        0,
        256,
        (count, channels, side, side),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(1),
    )


def test_crop_and_flip_is_what_a_loop_would_cut():
    images = pictures()
    offsets = torch.tensor([[0, 0], [8, 8], [4, 4], [0, 8], [3, 5], [7, 2]])
    flipped = torch.tensor([False, True, False, True, True, False])
    out = crop_and_flip(images, offsets, flipped, pad=4)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for i, (top, left) in enumerate(offsets.tolist()):
        expected = padded[i, :, top : top + 32, left : left + 32]
        assert torch.equal(out[i], expected.flip(-1) if flipped[i] else expected)


@pytest.mark.parametrize("name", POLICIES)
def test_each_image_gets_its_own_changes_in_turn(name):
    (policy,) = build_policies(name, None, None, 0.0)
    images, numbers = (
        pictures(12),
        random_uniform(0, "test", torch.arange(12)[:, None], torch.arange(policy.numbers)),
    )
    together = apply_policy(images, numbers, policy)
    for image, own, out in zip(images, numbers.tolist(), together, strict=True):
        alone = image[None]
        for change in policy.draw(own, 32, 32):
            alone = apply_operation(alone, change, policy)
        assert (
            out.int() - alone[0].int()
        ).abs().max() <= 1  # sums over a batch may round another way


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_is_changed_alike_in_any_batch(channels):
    augmentation = BatchAugmentation(
        3, (32, 32), 0.125, None, 0.5, build_policies("randaugment", 2, 9, 0.3)
    )
    images, epochs, indices = pictures(16, channels), torch.arange(16) // 8, torch.arange(100, 116)
    together = augmentation(images, epochs, indices)
    assert together.shape == images.shape
    assert together.dtype == torch.uint8
    order = torch.tensor([9, 3, 15])
    assert torch.equal(together[order], augmentation(images[order], epochs[order], indices[order]))
    again = augmentation(images, epochs + 1, indices)
    assert (again != together).flatten(1).any(1).sum() > 12


def test_all_offsets_and_both_sides_are_drawn():
    augmentation = BatchAugmentation(0, (8, 8), 0.125, None, flip=0.5)
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[0, 0, 3, 2] = 255
    out = augmentation(
        image.expand(2000, -1, -1, -1), torch.zeros(2000, dtype=torch.int64), torch.arange(2000)
    )
    places = out.flatten(1).float().argmax(1)
    counts = {
        (place // 8, place % 8): int((places == place).sum()) for place in places.unique().tolist()
    }
    assert set(counts) == {(row, column) for row in (2, 3, 4) for column in (1, 2, 3, 4, 5, 6)}
    assert all(70 < count < 160 for count in counts.values())


def test_no_augmentation_changes_nothing():
    images = pictures()
    out = BatchAugmentation(0, (32, 32), 0.0, None, 0.0)(
        images, torch.zeros(6, dtype=torch.int64), torch.arange(6)
    )
    assert torch.equal(out, images)


def test_boxes_are_resized_as_torchvision_does():
    images = pictures()
    boxes = torch.tensor(
        [
            [0.0, 0, 32, 32],
            [3, 5, 20, 17],
            [31, 31, 1, 1],
            [10, 0, 22, 9],
            [0, 4, 13, 28],
            [8, 8, 16, 16],
        ]
    )
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
    assert torch.equal(
        resized_crop_boxes(numbers, 1, 30, [1.0, 1.0])[0], torch.tensor([0.0, 0, 1, 30])
    )


def test_resized_crops_reach_the_models_size():
    augmentation = BatchAugmentation(0, (48, 64), 0.0, [0.3, 1.0], 0.5)
    out = augmentation(pictures(), torch.zeros(6, dtype=torch.int64), torch.arange(6))
    assert out.shape == (6, 3, 48, 64)
    assert out.dtype == torch.uint8


def shares_of(images, mixed):
    """Of each mixed image the share of pixels that are the image's own, for images of one value each."""
    return (mixed == images).float().mean((1, 2, 3))


@pytest.mark.parametrize("count", [8, 9])
def test_cutmix_gives_labels_the_share_of_the_pixels(count):
    images = torch.arange(1.0, count + 1)[:, None, None, None].expand(-1, 3, 32, 24)
    labels = torch.arange(count)
    for step in range(20):
        mixed, targets = MixupCutmix(0, count, 0.0, 1.0, 1.0)(images, labels, step)
        torch.testing.assert_close(targets.sum(1), torch.ones(count))
        torch.testing.assert_close(targets[labels, labels], shares_of(images, mixed))
        partner = [
            min(number ^ 1, count - 1) if (number ^ 1) < count else number
            for number in range(count)
        ]
        assert all(
            value in (number + 1, partner[number] + 1)
            for number, image in enumerate(mixed)
            for value in image.unique().tolist()
        )


def test_mixup_blends_images_as_their_labels():
    images, labels = torch.rand(64, 3, 8, 8), torch.arange(64) % 5
    mixed, targets = MixupCutmix(3, 5, 0.8, 0.0, 1.0)(images, labels, 7)
    for number in range(64):
        own, other = labels[number], labels[number ^ 1]
        if own != other:
            share = targets[number, own]
            torch.testing.assert_close(
                mixed[number], share * images[number] + (1 - share) * images[number ^ 1]
            )
            assert targets[number, other] == pytest.approx(float(1 - share), abs=1e-6)
        else:
            assert targets[number, own] == pytest.approx(1.0)


def test_shares_follow_the_beta_distribution_and_either_way_is_as_frequent():
    images = torch.arange(2.0)[:, None, None, None].expand(2, 1, 16, 16).repeat(4000, 1, 1, 1)
    labels = torch.arange(2).repeat(4000)
    _, targets = MixupCutmix(0, 2, 0.4, 0.0, 1.0)(images, labels, 0)
    shares = targets[torch.arange(8000), labels][::2].double()
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.05)  # of Beta(α, α)
    mixed, targets = MixupCutmix(0, 2, 1.0, 1.0, 0.5)(images, labels, 0)
    untouched = (mixed == images).flatten(1).all(1) & (targets.max(1).values == 1)
    cut = ~untouched & ((mixed == 0) | (mixed == 1)).flatten(1).all(1)
    assert untouched.float().mean() == pytest.approx(0.5, abs=0.03)
    assert cut.float().mean() == pytest.approx(0.25, abs=0.03)


def test_mixing_depends_on_the_step_and_the_place_alone():
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8)
    mixing = MixupCutmix(1, 8, 0.8, 1.0, 0.9)
    again, part = mixing(images, labels, 5), mixing(images[:4], labels[:4], 5)
    assert torch.equal(mixing(images, labels, 5)[0], again[0])
    assert torch.equal(part[0], again[0][:4])
    assert not torch.equal(mixing(images, labels, 6)[1], again[1])
    assert not MixupCutmix(1, 8, 0.0, 0.0, 1.0)
    assert not MixupCutmix(1, 8, 0.8, 1.0, 0.0)


def test_erasing_fills_a_box_with_noise():
    images, epochs, indices = (
        torch.zeros(2000, 3, 32, 32),
        torch.zeros(2000, dtype=torch.int64),
        torch.arange(2000),
    )
    out = random_erase(images, epochs, indices, seed=0, probability=0.25)
    erased = (out != 0).any(1)
    touched = erased.flatten(1).any(1)
    assert touched.float().mean() == pytest.approx(0.25, abs=0.03)
    for mask in erased[touched][:50]:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert mask.sum() == height * width  # one box, whole
        assert 0.01 < height * width / 1024 < 0.37
        assert 0.2 < height / width < 5
    noise = out[touched][:, :, :, :][erased[touched][:, None].expand(-1, 3, -1, -1)]
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert torch.equal(random_erase(images[:7], epochs[:7], indices[:7], 0, 0.25), out[:7])
    assert (
        erasing_boxes(random_uniform(0, "x", torch.arange(50)[:, None], torch.arange(22)), 1, 1)[
            :, 2:
        ]
        .abs()
        .sum()
        == 0
    )
