"""Parquet files of images as Hugging Face's `datasets` writes them, and those of others."""

import io
import json
import os
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import close_folder, error_line, losses_by_workers, make_images, train
from PIL import Image
from pyarrow import parquet

from vit import shards
from vit.data.image_files import open_image
from vit.data.layouts import find_layout
from vit.data.listing import list_images
from vit.data.parquet_index import find_parquet
from vit.data.parquet_rows import open_row
from vit.data.tar_index import index_split
from vit.errors import DataError

NAMES = ["cat", "dog"]
TWO = [b"a", b"b"]


def encode(number, label, image_format="PNG"):
    """An image whose pixel (0, 0) is (its number, its label, 7)."""
    pixels = np.full((20, 24, 3), 40 + 120 * abs(label), dtype=np.uint8)
    pixels[0, 0] = (number, abs(label), 7)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


def features(columns):
    """The metadata that `datasets` writes; columns: {name: names of its classes}."""
    described = {name: {"names": names, "_type": "ClassLabel"} for name, names in columns.items()}
    info = {"info": {"features": {"image": {"_type": "Image"}, **described}}}
    return {"huggingface": json.dumps(info)}


def write(path, labels, columns=("label",), names=NAMES, group=3, first=0, images=None):
    """A parquet file of one image for each label. names: None writes no metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = images or [encode(first + number, label) for number, label in enumerate(labels)]
    structs = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(images)]
    table = pa.table({"image": structs, **{column: labels for column in columns}})
    if names is not None:
        table = table.replace_schema_metadata(features(dict.fromkeys(columns, names)))
    parquet.write_table(table, path, row_group_size=group)
    return path


def pixels_of(images):
    """(number, label) that each image itself says, in the order of the split."""
    found = []
    for path in images.paths.tolist():
        number, label, mark = open_image(os.fsdecode(path)).getpixel((0, 0))
        assert mark == 7
        found.append((number, label))
    return found


def test_the_files_of_hugging_face(tmp_path):
    write(tmp_path / "data/train-00000-of-00002.parquet", [0, 1, 1, 0, 1, 0, 1])
    write(tmp_path / "data/train-00001-of-00002.parquet", [1, 1], first=7)
    write(tmp_path / "data/validation-00000-of-00001.parquet", [0, 1, 0, 0], first=20)
    write(tmp_path / "data/test-00000-of-00001.parquet", [-1, -1])
    (tmp_path / "README.md").write_text("a card")
    splits = list_images(tmp_path)
    assert splits.classes == NAMES
    assert splits.train.labels.tolist() == [0, 1, 1, 0, 1, 0, 1, 1, 1]
    assert splits.train.labels.dtype == torch.int64
    assert pixels_of(splits.train) == list(enumerate(splits.train.labels.tolist()))
    assert pixels_of(splits.val) == [(20, 0), (21, 1), (22, 0), (23, 0)]
    assert splits.test is None
    assert splits.layout.endswith("9 train, 4 val; test is left out, since its labels are all -1")


@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_a_closed_folder_beside_the_splits_does_no_harm(tmp_path, monkeypatch, kind):
    """As lost+found is on a disk of its own."""
    if kind == "images":
        make_images(tmp_path, {"train": 2})
    else:
        write(tmp_path / "data/train.parquet", [0, 1, 1, 0])
    (tmp_path / "lost+found").mkdir()
    close_folder(tmp_path / "lost+found", monkeypatch)
    assert len(list_images(tmp_path).train) == 4


def test_images_are_read_at_random_and_the_fingerprint_survives_a_move(tmp_path):
    write(tmp_path / "a" / "train.parquet", [0, 1] * 20, group=7)
    images = list_images(tmp_path / "a").train
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    expected = [(number, number % 2) for number in order.tolist()]
    assert pixels_of(images.subset(order)) == expected
    assert list_images(tmp_path / "a" / "train.parquet").train.fingerprint() == images.fingerprint()


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (None, [0, 2, 1], ["0", "1", "2"]),
        (None, [10**12, 7, 7], ["7", "1000000000000"]),
        (None, ["fox", "cat", "fox"], ["cat", "fox"]),
    ],
)
def test_files_without_metadata(tmp_path, names, labels, classes):
    images = [encode(number, 0) for number in range(3)]
    splits = list_images(write(tmp_path / "x.parquet", labels, names=names, images=images))
    assert splits.classes == classes
    assert [splits.classes[label] for label in splits.train.labels] == [str(v) for v in labels]


@pytest.mark.parametrize("labels", [[0, 5], ["cat", "dog"]])
def test_a_label_that_train_lacks_is_refused(tmp_path, labels):
    write(tmp_path / "train.parquet", [0, 7], names=None, images=TWO)
    write(tmp_path / "test.parquet", labels, names=None, images=TWO)
    with pytest.raises(DataError, match=rf"label {labels[1]}|label cat, .* 2 classes \(0, 7\)"):
        list_images(tmp_path)


def test_images_may_be_plain_bytes(tmp_path):
    table = pa.table({"jpeg": [encode(5, 0), encode(6, 1)], "class": ["a", "b"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert pixels_of(list_images(tmp_path / "x.parquet").train) == [(5, 0), (6, 1)]


def test_of_two_columns_of_labels_one_is_chosen(tmp_path):
    write(tmp_path / "x.parquet", [0, 1], columns=("fine_label", "coarse_label"))
    with pytest.raises(DataError, match=r"fine_label and coarse_label can each be the label; choo"):
        list_images(tmp_path)
    assert list_images(tmp_path, "fine_label").classes == NAMES
    with pytest.raises(DataError, match=r"no column size; it has image, fine_label"):
        list_images(tmp_path, "size")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], "1 of 3 files are missing, .* 00001"),
        (["test-00000-of-00001"], "no parquet file of train"),
        (["train", "more"], r"more\.parquet: names no split"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, files, message):
    for name in files:
        write(tmp_path / f"{name}.parquet", [0, 1])
    with pytest.raises(DataError, match=message):
        list_images(tmp_path)


def test_files_of_one_split_with_other_classes_are_refused(tmp_path):
    write(tmp_path / "train-0.parquet", [0, 1])
    write(tmp_path / "train-1.parquet", [0, 1], names=NAMES[::-1])
    with pytest.raises(DataError, match=r"train-1\.parquet: its metadata name other classes"):
        list_images(tmp_path)


def test_a_file_without_names_between_does_not_hide_other_classes(tmp_path):
    write(tmp_path / "train-0.parquet", [0, 1])
    write(tmp_path / "train-1.parquet", [0, 1], names=None)
    write(tmp_path / "train-2.parquet", [0, 1], names=NAMES[::-1])
    with pytest.raises(DataError, match=r"train-2\.parquet: its metadata name other classes"):
        list_images(tmp_path)


def write_columns(path, **columns):
    parquet.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "not a readable parquet file"),
        (lambda path: path.write_bytes(b"PAR1 cut short"), "not a readable parquet file"),
        (
            lambda path: write(path, [0, 5], images=TWO),
            r"image 1 .* label 5, .*\(cat",
        ),
        (
            lambda path: write(path, [0.5, 1.0], names=None, images=TWO),
            "neither whole numbers nor names",
        ),
        (lambda path: write(path, [-1, 1, 2], names=None, images=[*TWO, b"c"]), "label -1"),
        (lambda path: write(path, [0, 1], columns=("size",), names=None), "no column label .*size"),
        (lambda path: write_columns(path, label=[0, 1]), "no column holds bytes of images"),
        (
            lambda path: write_columns(path, label=[0, None], image=[b"a", b"b"]),
            "1 rows have no label",
        ),
        (
            lambda path: write_columns(path, label=[0, 1], a=[b"", b""], b=[b"", b""]),
            "a and b each hold bytes",
        ),
    ],
)
def test_files_that_cannot_be_understood_are_refused(tmp_path, make, message):
    path = tmp_path / "x.parquet"
    make(path)
    with pytest.raises(DataError, match=message):
        list_images(path)


def test_images_that_cannot_be_read_are_named(tmp_path):
    write(tmp_path / "x.parquet", [0, 1, 1], images=[encode(0, 0), b"no image", None])
    paths = [os.fsdecode(path) for path in list_images(tmp_path).train.paths]
    with pytest.raises(DataError, match=r"x\.parquet!0\+1: not a readable image"):
        open_image(paths[1])
    with pytest.raises(DataError, match=r"x\.parquet!0\+2: .*holds no bytes of an image"):
        open_image(paths[2])
    with pytest.raises(FileNotFoundError):
        open_row("x.parquet!a")


def test_a_link_that_leads_to_itself_is_passed_over(tmp_path):
    """What `ln -s images images` makes where there is such a folder already."""
    write(tmp_path / "images" / "train.parquet", [0, 1])
    (tmp_path / "images" / "images").symlink_to("images")
    assert find_parquet(tmp_path) == [tmp_path / "images" / "train.parquet"]


def test_a_file_without_rows_changes_nothing(tmp_path):
    """Spark writes one for each part that is empty."""
    write(tmp_path / "train-0.parquet", [1, 0], names=None)
    empty = parquet.read_table(tmp_path / "train-0.parquet").slice(0, 0)
    parquet.write_table(empty, tmp_path / "train-1.parquet")
    assert list_images(tmp_path).train.labels.tolist() == [1, 0]


def test_the_extension_may_be_in_upper_case(tmp_path):
    images = list_images(write(tmp_path / "PETS.PARQUET", [0, 1])).train
    assert pixels_of(images) == [(0, 0), (1, 1)]


def test_folders_of_images_are_not_searched_through(tmp_path):
    make_images(tmp_path, {"train": 2})
    write(tmp_path / "train" / "cat" / "z" / "x.parquet", [0, 1])
    assert find_parquet(tmp_path / "train" / "cat" / "z") == [tmp_path / "train/cat/z/x.parquet"]
    (tmp_path / "train" / "cat" / "z").rename(tmp_path / "train" / ".hidden")
    assert find_parquet(tmp_path) == []
    assert find_layout(tmp_path).folders == {"train": tmp_path / "train"}


def test_shards_are_written_from_parquet_files(tmp_path):
    write(tmp_path / "in/train-0.parquet", [0, 1, 1, 0, 1])
    write(tmp_path / "in/test-0.parquet", [1, 0], first=9)
    shards.main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"])
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"
    paths, labels = index_split(tmp_path / "out", "train")
    assert labels.tolist() == [0, 1, 1, 0, 1]
    contents = [open_image(os.fsdecode(path)).getpixel((0, 0)) for path in paths.tolist()]
    assert contents == [(number, label, 7) for number, label in enumerate(labels.tolist())]


def test_a_split_without_rows_has_no_shards(tmp_path):
    write(tmp_path / "in/train-0.parquet", [0, 1])
    empty = parquet.read_table(tmp_path / "in/train-0.parquet").slice(0, 0)
    parquet.write_table(empty, tmp_path / "in/test-0.parquet")
    shards.main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["classes.txt", "train-000000.tar"]


def test_shards_are_written_from_a_table(tmp_path):
    make_images(tmp_path / "pets", {".": 3})
    lines = ["path,kind"]
    lines += [f"{name}/{number}.jpg,{name}" for name in NAMES for number in range(3)]
    (tmp_path / "pets" / "pets.csv").write_text("\n".join(lines))
    source = str(tmp_path / "pets" / "pets.csv")
    with pytest.raises(DataError, match="no column label"):
        shards.main([source, str(tmp_path / "out"), "--workers", "1"])
    shards.main([source, str(tmp_path / "out"), "--workers", "1", "--label-column", "kind"])
    paths, labels = index_split(tmp_path / "out", "train")
    expected = {
        (path.read_bytes(), NAMES.index(path.parent.name))
        for path in (tmp_path / "pets").rglob("*.jpg")
    }
    found = set()
    for path, label in zip(paths.tolist(), labels.tolist(), strict=True):
        shard, offset, size = re.fullmatch(r"(.*)!(\d+)\+(\d+)", path.decode()).groups()
        with open(shard, "rb") as file:
            file.seek(int(offset))
            found.add((file.read(int(size)), label))
    assert found == expected


@pytest.mark.slow
def test_training_on_parquet_files(tmp_path):
    """The same with any number of workers, and a damaged file ends it in one line."""
    write(tmp_path / "hf/data/train-00000-of-00001.parquet", [0, 1] * 16, group=5)
    losses = losses_by_workers(
        tmp_path,
        "data=folder",
        "data.root=hf",
        "model=vit_nano4",
        "model.num_channels=3",
        "model.num_layers=1",
        "train.batch_size=8",
        "train.steps=4",
    )
    assert losses[0] == losses[1]
    (tmp_path / "hf/data/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    line = error_line(train(tmp_path, "data=folder", "data.root=hf"))
    assert "train-00000-of-00001.parquet: not a readable parquet file" in line
