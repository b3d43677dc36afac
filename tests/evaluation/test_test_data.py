"""A data set that foreign weights are measured on gets their labels: by names, or else in order."""

from pathlib import Path

import pytest
import torch

from vit.config.data import DataConfig
from vit.data.class_folders import imagenet_wnids, readable_names
from vit.data.splits import ImageDataset, ImageSplit
from vit.errors import CheckpointError, DataError
from vit.evaluation.test_data import labeled_for_weights

WNIDS = list(imagenet_wnids())


def labeled(found: list[str], outputs: int, classes: list[str] | None) -> ImageDataset:
    """A data set with one image of each class, train, val and test alike, for such weights."""
    labels = torch.arange(len(found))
    images = ImageSplit("pets", labels, torch.zeros(len(found), 1, 2, 2, dtype=torch.uint8))
    dataset = ImageDataset(found, images, images, images)
    data = DataConfig(name="shards", root="pets")
    return labeled_for_weights(Path("weights"), dataset, data, outputs, classes)


def test_names_count_and_not_their_order():
    dataset = labeled(["cat", "dog"], 3, ["fox", "dog", "cat"])
    assert dataset.classes == ["fox", "dog", "cat"]
    for split in ("train", "val", "test"):
        assert dataset.split(split).labels.tolist() == [2, 1]


def test_names_that_the_weights_do_not_know_are_refused():
    with pytest.raises(DataError, match=r"1 of its 2 classes .* 2: Dog; .*fine-tune first"):
        labeled(["cat", "Dog"], 2, ["cat", "dog"])
    with pytest.raises(DataError, match=r"2 of its 3 classes"):
        labeled(["0", "1", "cat"], 3, ["cat", "dog", "fox"])


@pytest.mark.parametrize(
    ("found", "classes"),
    [
        (["cat", "dog", "fox"], None),
        # As in shards without classes.txt, and an export of weights without names
        (["0", "1", "2"], ["dog", "cat", "fox"]),
        (["cat", "dog", "fox"], ["0", "1", "2"]),
    ],
)
def test_without_names_the_order_counts(found, classes, capsys):
    dataset = labeled(found, 3, classes)
    assert dataset.classes == found
    assert dataset.test.labels.tolist() == [0, 1, 2]
    assert "in order" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="its head has 4 classes, data=shards has 3"):
        labeled(found, 4, classes and [*classes, str(len(classes))])


def test_numbers_may_be_names(capsys):
    dataset = labeled(["0", "1", "10"], 11, [str(number) for number in range(11)])
    assert dataset.test.labels.tolist() == [0, 1, 10]
    assert not capsys.readouterr().out


@pytest.mark.parametrize("names", [WNIDS, [f"{name}, a synonym" for name in readable_names(WNIDS)]])
def test_imagenet_has_one_order_under_any_names(names):
    dataset = labeled(readable_names(WNIDS), 1000, names)
    assert dataset.test.labels.tolist() == list(range(1000))
