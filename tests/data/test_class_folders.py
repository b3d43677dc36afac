import os

import numpy as np
import pytest
from helpers import close_folder, make_images
from PIL import Image

from vit.data.class_folders import (
    is_imagenet,
    list_annotated,
    list_class_folders,
    list_same_classes,
    readable_names,
)
from vit.errors import DataError


def test_images_are_listed_by_class_at_any_depth(tmp_path):
    make_images(tmp_path, {"train": 2})
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    deep = tmp_path / "train" / "dog" / "more" / "deep"
    deep.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(deep / "last.PNG")
    classes, images = list_class_folders(tmp_path / "train", "title")
    assert classes == ["cat", "dog"]
    assert images.title == "title"
    assert images.labels.tolist() == [0, 0, 1, 1, 1]
    names = ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg", "dog/more/deep/last.PNG"]
    assert images.paths.tolist() == [os.fsencode(tmp_path / "train" / name) for name in names]


def test_linked_folders_are_read_once_and_those_above_not_at_all(tmp_path):
    make_images(tmp_path / "store", {"2024": 1, "2025": 2}, classes=("cat",))
    make_images(tmp_path, {"train": 1})
    cat = tmp_path / "train" / "cat"
    (cat / "2024").symlink_to(tmp_path / "store" / "2024")
    (cat / "again").symlink_to("2024")
    (cat / "all").symlink_to("..")  # would make dogs cats
    (tmp_path / "store" / "2024" / "up").symlink_to(cat)
    (tmp_path / "train" / "lynx").symlink_to(tmp_path / "store" / "2025" / "cat")
    classes, images = list_class_folders(tmp_path / "train", "title")
    assert classes == ["cat", "dog", "lynx"]
    assert images.labels.tolist() == [0, 0, 1, 2, 2]
    names = ["cat/0.jpg", "cat/2024/cat/0.jpg", "dog/0.jpg", "lynx/0.jpg", "lynx/1.jpg"]
    assert images.paths.tolist() == [os.fsencode(tmp_path / "train" / name) for name in names]


def test_hidden_folders_in_a_class_are_left_out(tmp_path):
    """Picasa, for example, keeps the originals of edited images in one, and others thumbnails."""
    make_images(tmp_path, {"train": 1})
    make_images(tmp_path / "train" / "cat", {".picasaoriginals": 2}, classes=("Originals",))
    _, images = list_class_folders(tmp_path / "train", "title")
    assert images.labels.tolist() == [0, 1]


def test_folders_of_programs_are_no_classes_and_hold_no_images(tmp_path):
    """macOS packs one into every zip file, and Synology's disks have one in each folder."""
    make_images(tmp_path, {"train": 1})
    make_images(tmp_path, {"train": 1}, classes=("__MACOSX", "@eaDir"))
    make_images(tmp_path / "train" / "cat", {"@eaDir": 2}, classes=("0.jpg",))
    classes, images = list_class_folders(tmp_path / "train", "title")
    assert (classes, images.labels.tolist()) == (["cat", "dog"], [0, 1])


def test_a_class_whose_name_is_no_text_is_refused(tmp_path):
    """Old archives of Windows unpack to such names, which TensorBoard and pages can't hold."""
    make_images(tmp_path, {"train": 1}, classes=("cat", os.fsdecode(b"caf\xe9")))
    with pytest.raises(DataError, match=r"train: the name of the class folder 'caf\\udce9' is not"):
        list_class_folders(tmp_path / "train", "title")


def test_folders_without_classes_or_images_are_refused(tmp_path):
    make_images(tmp_path, {"train": 1})
    (tmp_path / "train" / "wolf").mkdir()
    with pytest.raises(DataError, match="train/wolf: no images"):
        list_class_folders(tmp_path / "train", "title")
    with pytest.raises(DataError, match="train/cat: found 0 class folders"):
        list_class_folders(tmp_path / "train" / "cat", "title")


@pytest.mark.parametrize("closed", ["train", "train/cat", "train/dog/more"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, closed):
    make_images(tmp_path, {"train": 1})
    (tmp_path / "train" / "dog" / "more").mkdir()
    close_folder(tmp_path / closed, monkeypatch)
    with pytest.raises(DataError, match=rf"{closed}: can't open this folder \(Permission denied\)"):
        list_class_folders(tmp_path / "train", "title")


def test_another_split_has_to_have_the_same_classes(tmp_path):
    make_images(tmp_path, {"val": 1})
    assert len(list_same_classes(tmp_path / "val", ["cat", "dog"], "val")) == 2
    with pytest.raises(DataError, match=r"val: .*lacks fox"):
        list_same_classes(tmp_path / "val", ["cat", "dog", "fox"], "val")


def test_annotations_of_tiny_imagenet(tmp_path):
    lines = ["0.JPEG\tn2\t0\t0\t62\t62", "1.JPEG\tn1\t0\t0\t62\t62", ""]
    (tmp_path / "val_annotations.txt").write_text("\n".join(lines))
    images = list_annotated(tmp_path, ["n1", "n2"], "title")
    assert images.labels.tolist() == [1, 0]
    expected = [os.fsencode(tmp_path / "images" / name) for name in ("0.JPEG", "1.JPEG")]
    assert np.array_equal(images.paths, expected)
    with pytest.raises(DataError, match=r"val_annotations\.txt: .*lacks n3"):
        list_annotated(tmp_path, ["n1", "n2", "n3"], "title")


@pytest.mark.parametrize("line", [b"1.JPEG n1 0 0", b"\x89PNG\xff\x00" * 100])
def test_a_damaged_line_of_the_annotations_is_named(tmp_path, line):
    (tmp_path / "val_annotations.txt").write_bytes(b"0.JPEG\tn2\t0\n\n" + line)
    with pytest.raises(
        DataError, match=r"val_annotations\.txt: line 3, .{,110} is not a file name"
    ):
        list_annotated(tmp_path, ["n1", "n2"], "title")


def test_imagenets_thousand_folders_get_readable_names():
    from timm.data import ImageNetInfo

    wnids = sorted(ImageNetInfo("imagenet-1k").label_names())
    assert is_imagenet(wnids)
    names = readable_names(wnids)
    assert (names[0], names[1], names[999]) == ("tench", "goldfish", "toilet tissue")
    others = [*wnids[:-1], "n99999999"]
    assert not is_imagenet(others)
    assert readable_names(others) == others


def test_names_that_are_not_unicode_are_no_imagenet():
    assert not is_imagenet(["\udcff", "cat"])
