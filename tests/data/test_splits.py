import pytest
import torch
from helpers import make_images

from vit.data.class_folders import list_class_folders
from vit.data.splits import ImageDataset, ImageSplit, check_classes, hold_out, sample_evenly
from vit.errors import DataError


def numbered_split(labels):
    pixels = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return ImageSplit("all", labels, pixels=pixels)


def test_hold_out_takes_its_fraction_of_every_class_and_no_image_twice():
    everything = numbered_split(torch.tensor([0] * 100 + [1] * 50 + [2] * 2 + [3]))
    rest, held_out = hold_out(everything, 0.1, "held out")
    assert held_out.title == "held out"
    assert torch.bincount(held_out.labels, minlength=4).tolist() == [10, 5, 1, 0]
    pixels = torch.cat([rest.pixels, held_out.pixels])
    assert pixels.flatten().sort().values.tolist() == list(range(153))


def test_hold_out_is_the_same_each_time_and_a_larger_fraction_holds_out_more():
    everything = numbered_split(torch.tensor([0] * 100 + [1] * 50 + [2] * 2 + [3]))
    held_out = hold_out(everything, 0.1, "held out")[1]
    assert torch.equal(held_out.pixels, hold_out(everything, 0.1, "held out")[1].pixels)
    more = hold_out(everything, 0.2, "held out")[1]
    assert set(held_out.pixels.flatten().tolist()) < set(more.pixels.flatten().tolist())


def test_samples_are_spread_evenly_over_the_classes():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 2)
    chosen = sample_evenly(labels, 11)
    assert torch.bincount(labels[chosen]).tolist() == [5, 4, 2]
    assert torch.equal(chosen, chosen.sort().values)
    assert len(sample_evenly(labels, 1000)) == 152


def test_a_fingerprint_does_not_depend_on_where_the_files_are(tmp_path):
    make_images(tmp_path / "a", {"train": 12})
    images = list_class_folders(tmp_path / "a" / "train", "train")[1]
    (tmp_path / "a").rename(tmp_path / "b")
    moved = list_class_folders(tmp_path / "b" / "train", "train")[1]
    assert moved.paths.tolist() != images.paths.tolist()
    assert moved.fingerprint() == images.fingerprint()
    assert moved.subset(torch.arange(12)).fingerprint() != images.fingerprint()


def test_a_fingerprint_depends_on_pixels_and_labels():
    labels = torch.arange(10)
    images = numbered_split(labels)
    assert images.fingerprint() == numbered_split(labels).fingerprint()
    assert ImageSplit("x", labels, images.pixels ^ 1).fingerprint() != images.fingerprint()
    assert ImageSplit("x", labels.flip(0), images.pixels).fingerprint() != images.fingerprint()


def test_a_split_is_found_by_its_name():
    train, test = numbered_split(torch.arange(3)), numbered_split(torch.arange(2))
    data = ImageDataset(["a", "b", "c"], train, None, test)
    assert data.split("train") is train
    assert data.split("test") is test
    with pytest.raises(DataError, match=r"data\.val_fraction=0"):
        data.split("val")


def test_other_classes_are_refused_with_the_differences(tmp_path):
    check_classes(["a", "b"], ["a", "b"], tmp_path)
    with pytest.raises(DataError, match=rf"{tmp_path}: .*lacks b and has besides c"):
        check_classes(["a", "b"], ["a", "c"], tmp_path)
    with pytest.raises(DataError, match="are not those of train: it has them in another order"):
        check_classes(["a", "b"], ["b", "a"], tmp_path)
    many = [str(number) for number in range(10, 20)]
    with pytest.raises(DataError, match="has besides 10, 11, 12 …"):
        check_classes(["a"], ["a", *many], tmp_path)
