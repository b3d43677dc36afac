"""What the policies draw, how often and how strong; pixels are compared in test_operations.py."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from vit.augment.operations import DrawnOperation, apply_operation
from vit.augment.policies import (
    NUMBERS_PER_OPERATION,
    POLICIES,
    build_policies,
    draw_color_jitter,
)
from vit.augment.spaces import torchvision_randaugment_operations
from vit.errors import ConfigError


def build(name):
    (policy,) = build_policies(name, None, None, 0.0)
    return policy


def uniform(count, policy):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, policy.num_random, generator=generator)


def test_torchvisions_randaugment_chooses_evenly():
    policy = build("randaugment")
    drawn = [policy.draw(own, 32, 32) for own in uniform(20000, policy).tolist()]
    counts = Counter(operation.name for operations in drawn for operation in operations)
    assert set(counts) == {operation.name for operation in torchvision_randaugment_operations()}
    assert all(2857 * 0.9 < count < 2857 * 1.1 for count in counts.values())


def test_timms_randaugment_applies_half_and_varies_the_level():
    policy = build("randaugment_timm")
    drawn = [policy.draw(own, 100, 100) for own in uniform(20000, policy).tolist()]
    operations = [operation for own in drawn for operation in own]
    assert len(operations) / 40000 == pytest.approx(0.5, abs=0.01)
    rotations = [abs(operation.strength) for operation in operations if operation.name == "rotate"]
    levels = np.array(rotations) / 30 * 10
    assert levels.mean() == pytest.approx(9, abs=0.1)  # a little below: cut off at 10
    assert levels.max() == 10
    assert np.quantile(levels, 0.16) == pytest.approx(8.5, abs=0.1)


def test_autoaugment_follows_its_table():
    policy = build("autoaugment")
    numbers = uniform(30000, policy)
    # Contrast with probability 0.6 and magnitude 7, then sharpness with 0.6 and 5
    numbers[:, 0] = (9 + 0.5) / 25
    drawn = [operation for own in numbers.tolist() for operation in policy.draw(own, 32, 32)]
    counts = Counter(operation.name for operation in drawn)
    assert counts["contrast"] / 30000 == pytest.approx(0.6, abs=0.01)
    assert counts["sharpness"] / 30000 == pytest.approx(0.6, abs=0.01)
    strengths = {round(op.strength, 4) for op in drawn if op.name == "contrast"}
    assert strengths == {0.3, 1.7}


def test_three_augment_chooses_evenly():
    policy = build("three_augment")
    drawn = [op for own in uniform(9000, policy).tolist() for op in policy.draw(own, 9, 9)]
    assert len(drawn) == 9000
    for count in Counter(operation.name for operation in drawn).values():
        assert count == pytest.approx(3000, rel=0.06)
    radii = [operation.strength for operation in drawn if operation.name == "blur"]
    assert (min(radii), max(radii)) == (pytest.approx(0.1, abs=0.01), pytest.approx(2.0, abs=0.01))


def test_color_jitter_is_torchvisions():
    numbers = [0.0, 0.5, 1.0, 0.9, 0.1, 0.5]
    drawn = draw_color_jitter(numbers, 32, 40, strength=0.3)
    assert drawn == [
        DrawnOperation("contrast", 1.0),
        DrawnOperation("saturation", 1.3),
        DrawnOperation("brightness", 0.7),
    ]
    pixels = torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8)
    image = v2.functional.to_pil_image(pixels)
    expected = v2.functional.adjust_brightness(v2.functional.adjust_saturation(image, 1.3), 0.7)
    (policy,) = build_policies("none", None, None, 0.3)
    for operation in policy.draw(numbers, 32, 40):
        image = apply_operation(image, operation, policy.settings)
    assert np.array_equal(image, expected)


def test_factors_of_the_color_jitter_are_never_negative():
    drawn = draw_color_jitter([0.0] * 6, 1, 1, strength=1.0)
    assert {operation.strength for operation in drawn} == {0.0}
    assert min(op.strength for op in draw_color_jitter([0.0] * 6, 1, 1, strength=2.0)) == 0.0


@pytest.mark.parametrize(
    ("name", "published", "scale"),
    [
        ("randaugment", 9, 30),
        ("randaugment_timm", 9, 10),
        ("randaugment_big_vision", 10, 10),
    ],
)
def test_randaugments_take_their_number_of_operations_and_magnitude(name, published, scale):
    assert build(name).num_random == 2 * NUMBERS_PER_OPERATION
    assert build(name).draw.keywords["level"] == published / scale
    (policy,) = build_policies(name, 3, 4, 0.0)
    assert policy.num_random == 3 * NUMBERS_PER_OPERATION
    assert policy.draw.keywords["level"] == 4 / scale


def test_unknown_policies_are_refused():
    with pytest.raises(ConfigError, match=r"augment\.policy must be one of none, randaugment"):
        build_policies("trivial", None, None, 0.0)


def test_the_color_jitter_comes_last():
    assert build_policies("none", None, None, 0.0) == []
    _, jitter = build_policies("three_augment", None, None, 0.3)
    assert len(jitter.draw([0.5] * jitter.num_random, 8, 8)) == 3


@pytest.mark.parametrize("name", POLICIES)
def test_policies_can_be_sent_to_other_processes(name):
    """Where worker processes are spawned, they receive the policies by pickle."""
    for policy in build_policies(name, None, None, 0.3):
        received = pickle.loads(pickle.dumps(policy))
        numbers = uniform(1, policy)[0].tolist()
        assert received.draw(numbers, 32, 32) == policy.draw(numbers, 32, 32)
        assert received.settings == policy.settings
