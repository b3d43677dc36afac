"""The folders of another data set are matched with a model's classes by name or by wnid."""

from pathlib import Path

import pytest

from vit.data.class_folders import imagenet_wnids, is_imagenet, readable_names
from vit.data.class_matching import knows_imagenet, match_classes
from vit.errors import DataError

WNIDS = list(imagenet_wnids())
NAMES = readable_names(WNIDS)
SOURCE = Path("somewhere")


def test_the_wnids_are_those_of_ilsvrc():
    assert is_imagenet(WNIDS)


def test_a_subset_in_any_order():
    assert match_classes(["fox", "cat"], ["cat", "dog", "fox"], SOURCE) == [2, 0]


@pytest.mark.parametrize("classes", [WNIDS, NAMES, [f"{name}, a synonym" for name in NAMES]])
def test_imagenet_by_wnid_and_by_name(classes):
    assert knows_imagenet(classes)
    assert match_classes(["n01440764", "goldfish"], classes, SOURCE) == [0, 1]
    assert match_classes([classes[5]], classes, SOURCE) == [5]


def test_wnids_mean_nothing_to_other_models():
    others = [f"class {number}" for number in range(1000)]
    assert not knows_imagenet(others)
    assert not knows_imagenet(NAMES[::-1])
    assert not knows_imagenet(NAMES[:999])
    with pytest.raises(DataError, match="n01440764"):
        match_classes(["n01440764"], others, SOURCE)


def test_an_unknown_class_is_named():
    with pytest.raises(
        DataError, match=r"somewhere: 1 of its 2 classes .* 2: wolf; .*\(cat, dog\)"
    ):
        match_classes(["cat", "wolf"], ["cat", "dog"], SOURCE)


def test_a_name_of_two_classes_needs_its_wnid():
    # As WordNet calls the bird, and the machine
    cranes = [*NAMES[:134], "crane", *NAMES[135:]]
    with pytest.raises(DataError, match=r"several .* classes are called crane; .* wnid"):
        match_classes(["crane"], cranes, SOURCE)
    assert match_classes(["n02012849", "n03126707"], cranes, SOURCE) == [134, 517]
