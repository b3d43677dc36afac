"""Folders that a model is tested on: taken whole, and the layouts of ImageNet's test sets."""

import json
import os
import shutil

import pytest
import torch
from judged_models import write_classes, write_noise

from vit.data.class_folders import imagenet_wnids, readable_names
from vit.data.test_sets import TEST_SETS, read_test_set, read_whole_folder
from vit.errors import DataError

WNIDS = list(imagenet_wnids())
NAMES = readable_names(WNIDS)
CLASSES = ["cat", "dog", "fox"]


def names_of(images):
    return [os.fsdecode(path).split("/")[-2] for path in images.paths.tolist()]


def test_class_folders_alone_are_taken_whole(tmp_path):
    root = write_classes(tmp_path / "pets", ["fox", "cat"], count=3)
    test_set = read_whole_folder(root, CLASSES)
    assert [CLASSES[label] for label in test_set.data.test.labels] == names_of(test_set.data.test)
    assert len(test_set.data.test) == 6
    assert test_set.data.classes == CLASSES
    assert test_set.data.val is None
    assert test_set.taken == "pets taken whole"
    assert test_set.competing is None
    for split in ("train", "val"):
        with pytest.raises(DataError, match=f"split={split}: pets is for tests alone"):
            test_set.data.split(split)


def test_one_class_is_enough(tmp_path):
    test_set = read_whole_folder(write_classes(tmp_path, ["dog"]), CLASSES)
    assert test_set.data.test.labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("splits", "test", "val"),
    [
        (("test",), "test", None),
        (("Testing", "train"), "Testing", None),
        (("train", "val", "test"), "test", "val"),
        (("val",), "val, used as test", None),
        (("train", "val"), "val, used as test", None),
    ],
)
def test_folders_of_splits(tmp_path, splits, test, val):
    for split in splits:
        write_classes(tmp_path / "pets" / split, ["cat", "fox"])
    data = read_whole_folder(tmp_path / "pets", CLASSES).data
    assert data.test.title == f"pets {test}"
    assert (data.val and data.val.title) == (val and f"pets {val}")
    assert len(data.train) == (4 if "train" in splits else 0)
    assert data.test.labels.tolist() == [0, 0, 2, 2]


def test_mistakes_of_folders(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder"):
        read_whole_folder(tmp_path / "nowhere", CLASSES)
    with pytest.raises(DataError, match="no class folders"):
        read_whole_folder(tmp_path, CLASSES)
    write_classes(tmp_path / "a" / "train", ["cat"])
    with pytest.raises(DataError, match=r"train/ alone.*data\.root=.*train takes it whole"):
        read_whole_folder(tmp_path / "a", CLASSES)
    write_classes(tmp_path / "b", ["cat"])
    write_classes(tmp_path / "b" / "test", ["cat"])
    with pytest.raises(DataError, match="side by side"):
        read_whole_folder(tmp_path / "b", CLASSES)
    (tmp_path / "c" / "dog").mkdir(parents=True)
    with pytest.raises(DataError, match="no images in this class folder"):
        read_whole_folder(tmp_path / "c", CLASSES)


def test_a_limit_keeps_images_and_answers_together(tmp_path):
    root = real_folder(tmp_path)
    whole = read_test_set("imagenet_real", root, NAMES)
    limited = whole.limited(2)
    assert len(limited.data.test) == len(limited.answers) == 2
    rows = limited.answers[torch.arange(2), limited.data.test.labels]
    assert rows.all()
    assert whole.limited(None) is whole


def test_imagenet_v2_numbers_its_folders(tmp_path):
    write_noise(tmp_path / "image.png", 0, (4, 4))
    root = tmp_path / "imagenetv2"
    for number in range(1000):
        (root / str(number)).mkdir(parents=True)
        shutil.copy(tmp_path / "image.png", root / str(number))
    images = read_test_set("imagenet_v2", root, NAMES).data.test
    assert images.labels.tolist() == [int(name) for name in names_of(images)]
    assert sorted(images.labels.tolist()) == list(range(1000))
    (root / "1000").mkdir()
    with pytest.raises(DataError, match="also holds 1000/"):
        read_test_set("imagenet_v2", root, NAMES)
    (root / "1000").rmdir()
    shutil.rmtree(root / "7")
    with pytest.raises(DataError, match="holds 999 of them"):
        read_test_set("imagenet_v2", root, NAMES)


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_the_classes_of_the_folders_alone_compete(tmp_path, name):
    root = write_classes(tmp_path, [WNIDS[900], WNIDS[3], WNIDS[77]])
    (tmp_path / "README.txt").write_text("of the archive")
    test_set = read_test_set(name, root, NAMES)
    assert test_set.competing.tolist() == [3, 77, 900]
    assert sorted(test_set.data.test.labels.tolist()) == [3, 3, 77, 77, 900, 900]


def real_folder(root, right=((1, 2), (), (5,), (7, 9))):
    """Validation images, some of them in class folders, and their ReaL labels."""
    for number in range(1, len(right) + 1):
        folder = root / "val" / (WNIDS[0] if number % 2 else "")
        write_noise(folder / f"ILSVRC2012_val_{number:08}.JPEG", number)
    (root / "real.json").write_text(json.dumps(right))
    return root


def test_real_labels_belong_to_the_images_by_name(tmp_path):
    test_set = read_test_set("imagenet_real", real_folder(tmp_path), NAMES)
    paths = [os.fsdecode(path) for path in test_set.data.test.paths.tolist()]
    assert [path.removesuffix(".JPEG")[-1] for path in paths] == ["1", "3", "4"]
    right = [row.nonzero().flatten().tolist() for row in test_set.answers]
    assert right == [[1, 2], [5], [7, 9]]
    assert test_set.taken == "ImageNet's validation images, without 1 that have no ReaL label"


def test_mistakes_of_real_labels(tmp_path):
    root = real_folder(tmp_path)
    (root / "val" / "other.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"other\.png: expected the official name"):
        read_test_set("imagenet_real", root, NAMES)
    (root / "val" / "other.png").unlink()
    for wrong in ("[[1], [2]]", "[[1], [2], [3], [1000]]", '{"a": 1}', "[[1", '["a"]'):
        (root / "real.json").write_text(wrong)
        with pytest.raises(DataError, match=r"real\.json|00000003"):
            read_test_set("imagenet_real", root, NAMES)
    (root / "real.json").write_text("[[], [], [], []]")
    with pytest.raises(DataError, match="none of its images has a label"):
        read_test_set("imagenet_real", root, NAMES)
    (root / "real.json").unlink()
    with pytest.raises(DataError, match=r"real\.json: can't be read"):
        read_test_set("imagenet_real", root, NAMES)


@pytest.mark.parametrize("name", TEST_SETS)
def test_they_say_where_to_get_them_and_for_which_models(tmp_path, name):
    with pytest.raises(DataError, match=rf"data={name}: no folder .*data\.root=FOLDER"):
        read_test_set(name, tmp_path / "nowhere", NAMES)
    with pytest.raises(DataError, match=rf"data={name} is for models of ImageNet's 1,000"):
        read_test_set(name, tmp_path, CLASSES)
