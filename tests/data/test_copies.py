"""Held-out images that are copies of training images."""

import os
import re
import shutil

import pytest
from helpers import make_images

from vit.data.class_folders import list_class_folders
from vit.data.copies import COMPARED, describe_copies
from vit.data.listing import list_images


@pytest.fixture
def root(tmp_path):
    """train/ and val/, whose images are others under the same names."""
    make_images(tmp_path, {"train": 4, "val": 4})
    for path in (tmp_path / "val").rglob("*.jpg"):
        path.write_bytes(path.read_bytes() + b"another")
    return tmp_path


def found(root) -> str | None:
    splits = [list_class_folders(root / name, name)[1] for name in ("train", "val")]
    return describe_copies(*splits)


def test_other_images_under_the_same_names_are_none(root):
    assert found(root) is None


def test_a_copy_is_told(root):
    shutil.copy(root / "train" / "cat" / "1.jpg", root / "val" / "cat" / "1.jpg")
    assert re.match(r"val has 8 images with .*; 8 were compared, and 1 are the same", found(root))


def test_a_link_is_a_copy(root):
    (root / "val" / "cat" / "1.jpg").unlink()
    os.link(root / "train" / "cat" / "1.jpg", root / "val" / "cat" / "1.jpg")
    assert "and 1 are the same file" in found(root)


def test_images_of_another_class_or_name_are_not_compared(root):
    shutil.copy(root / "train" / "cat" / "1.jpg", root / "val" / "dog" / "1.jpg")
    shutil.copy(root / "train" / "cat" / "1.jpg", root / "val" / "cat" / "other.jpg")
    assert found(root) is None


def test_so_many_are_compared_at_most_and_from_all_classes(tmp_path):
    make_images(tmp_path, {"train": COMPARED})
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    for path in (tmp_path / "val" / "cat").iterdir():
        path.write_bytes(b"another")
    half = COMPARED // 2
    assert f"; {COMPARED} were compared, and {half} are the same" in found(tmp_path)


def test_a_file_that_cannot_be_read_is_no_copy(root):
    (root / "val" / "cat" / "1.jpg").unlink()
    (root / "val" / "cat" / "1.jpg").symlink_to("nowhere")
    assert found(root) is None


def test_the_listing_tells_of_them(root):
    assert "were compared" not in list_images(root).layout
    shutil.copy(root / "train" / "dog" / "0.jpg", root / "val" / "dog" / "0.jpg")
    assert f"; {root.name} val has 8 images" in list_images(root).layout
