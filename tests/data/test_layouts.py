"""Folders of images as people have them, and those that can't be understood in one way."""

import shutil
from pathlib import Path

import pytest
from helpers import close_folder, make_images

from vit.data.layouts import find_layout, folder_name
from vit.data.listing import list_images
from vit.errors import DataError


def make_flat(root, classes=("cat", "dog"), count=2):
    return make_images(root, {".": count}, classes)


@pytest.mark.parametrize("train", ["train", "training", "Train", "TRAIN"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev", "VAL", "Validation", None])
@pytest.mark.parametrize("test", ["test", "testing", "Test", None])
def test_the_splits_are_found_by_the_names_people_give_them(tmp_path, train, val, test):
    names = {"train": train, "val": val, "test": test}
    names = {split: name for split, name in names.items() if name is not None}
    for name in [*names.values(), "annotations", ".cache"]:
        (tmp_path / name).mkdir()
    layout = find_layout(tmp_path)
    assert layout.folders == {split: tmp_path / name for split, name in names.items()}
    assert not layout.is_flat
    for split, name in names.items():
        assert layout.title(split) == f"{tmp_path.name} {name}"
        assert f"{name}/" in layout.describe()


def test_class_folders_without_splits(tmp_path):
    root = make_flat(tmp_path / "pets", ("cat", "dog", "fox", "wolf"))
    layout = find_layout(root)
    assert layout.is_flat
    assert layout.folders == {"train": root}
    assert layout.title("train") == "pets"
    assert "4 class folders (cat, dog, fox …)" in layout.describe()
    assert "left out" not in layout.describe()


def test_images_outside_of_the_class_folders_are_mentioned(tmp_path):
    root = make_flat(tmp_path)
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(root / "cat" / "0.jpg", root / name)
    assert "; 2 images outside of these folders are left out" in find_layout(root).describe()


def test_images_of_formats_that_are_not_read_are_counted(tmp_path):
    root = make_images(tmp_path, {"train": 2, "val": 1}, ("cat", "dog"))
    for name in ("train/cat/a.heic", "val/dog/b.HEIC"):
        (root / name).touch()
    splits = list_images(root)
    assert splits.layout.endswith("; 2 .heic files can't be read; convert them to JPEG")
    assert len(splits.train) == 4


def test_a_class_of_images_that_are_not_read_says_so(tmp_path):
    root = make_flat(tmp_path)
    (root / "phone").mkdir()
    (root / "phone" / "a.heic").touch()
    with pytest.raises(DataError, match=r"phone: no images .*; its 1 \.heic file can't be read"):
        list_images(root)


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (("train", "val", "validation"), "val/ and validation/ .* val split"),
        (("train", "dev", "valid", "val"), "dev/ and val/ and valid/ .* val split"),
        (("train", "test", "testing"), "test/ and testing/ .* test split"),
        (("train", "Train"), "Train/ and train/ .* train split"),
    ],
)
def test_two_folders_of_one_split_are_refused(tmp_path, folders, named):
    make_images(tmp_path, dict.fromkeys(folders, 1))
    with pytest.raises(DataError, match=f"{tmp_path}: {named}"):
        find_layout(tmp_path)


def test_class_folders_beside_train_are_ambiguous(tmp_path):
    make_images(tmp_path, {"train": 1})
    make_flat(tmp_path)
    with pytest.raises(DataError, match=rf"{tmp_path}: train/ .*\(cat, dog\) lie side by side"):
        find_layout(tmp_path)


def test_a_split_without_train_is_refused(tmp_path):
    make_images(tmp_path, {"test": 1})
    make_flat(tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path}: holds test/ but no train/; .*another name"):
        find_layout(tmp_path)


def test_images_without_any_folder_are_refused(tmp_path):
    root = make_flat(tmp_path)
    with pytest.raises(DataError, match=rf"{root}/cat: holds images, but no folders .*<class>"):
        find_layout(root / "cat")


def test_a_folder_too_high_says_which_one_may_be_meant(tmp_path):
    make_flat(tmp_path / "pets")
    advice = rf"{tmp_path}: holds one folder alone, pets/.*data\.root={tmp_path}/pets"
    with pytest.raises(DataError, match=advice):
        find_layout(tmp_path)
    shutil.rmtree(tmp_path / "pets" / "cat")
    with pytest.raises(DataError, match=r"pets/, and there must be two classes; expected"):
        find_layout(tmp_path)


def test_nothing_to_find_is_refused(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: holds no folders of images"):
        find_layout(tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path}/nowhere: no such folder"):
        find_layout(tmp_path / "nowhere")


def test_a_folder_has_a_name_however_it_is_given(tmp_path, monkeypatch):
    root = make_flat(tmp_path / "pets")
    monkeypatch.chdir(root)
    names = {str(root): "pets", ".": "pets", "..": tmp_path.name, "/": "/"}
    for given, name in names.items():
        assert folder_name(Path(given)) == name
    assert find_layout(Path()).title("train") == "pets"


def test_a_folder_in_a_closed_one_ends_in_one_line(tmp_path, monkeypatch):
    root = make_flat(tmp_path / "other" / "pets")
    close_folder(tmp_path / "other", monkeypatch)
    with pytest.raises(DataError, match="other/pets: no such folder, or it may not be opened"):
        list_images(root)
