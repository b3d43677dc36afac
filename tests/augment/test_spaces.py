"""The policies' tables against the libraries that they come from."""

import timm.data.auto_augment as timm_augment
from reference_names import TIMM_NAMES, TORCHVISION_NAMES
from torchvision.transforms import AutoAugmentPolicy, v2

from vit.augment.batch_operations import BATCH_OPERATIONS
from vit.augment.operations import COLOR_OPERATIONS, GEOMETRIC_OPERATIONS
from vit.augment.spaces import (
    AUTOAUGMENT_CIFAR10,
    AUTOAUGMENT_OPERATIONS,
    BIG_VISION_OPERATIONS,
    TIMM_OPERATIONS,
    torchvision_randaugment_operations,
)


def test_torchvisions_randaugment_has_these_operations():
    names = {TORCHVISION_NAMES[op.name] for op in torchvision_randaugment_operations()}
    assert names == set(v2.RandAugment()._AUGMENTATION_SPACE)


def test_timms_randaugment_has_these_operations_in_this_order():
    names = [TIMM_NAMES[operation.name] for operation in TIMM_OPERATIONS]
    assert names == timm_augment._RAND_INCREASING_TRANSFORMS


def test_big_visions_randaugment_is_at_full_scale_at_level_one():
    assert len(BIG_VISION_OPERATIONS) == 16
    strengths = {op.name: op.strength(1.0, 224) for op in BIG_VISION_OPERATIONS}
    expected = {"solarize": 256, "posterize": 4, "rotate": 30, "translate_x": 100}
    assert {name: strengths[name] for name in expected} == expected


def test_autoaugments_table_is_torchvisions():
    reference = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)._policies
    ours = [
        tuple((TORCHVISION_NAMES[name], *rest) for name, *rest in pair)
        for pair in AUTOAUGMENT_CIFAR10
    ]
    assert ours == [
        tuple((name, probability, magnitude or 0) for name, probability, magnitude in pair)
        for pair in reference
    ]


def test_every_operation_can_be_applied():
    names = {operation.name for operation in torchvision_randaugment_operations()}
    names |= {operation.name for operation in BIG_VISION_OPERATIONS + TIMM_OPERATIONS}
    names |= set(AUTOAUGMENT_OPERATIONS)
    assert names <= COLOR_OPERATIONS.keys() | GEOMETRIC_OPERATIONS.keys()
    assert not COLOR_OPERATIONS.keys() & GEOMETRIC_OPERATIONS.keys()
    of_images = COLOR_OPERATIONS.keys() | GEOMETRIC_OPERATIONS.keys()
    assert BATCH_OPERATIONS.keys() == of_images - {"identity"}
