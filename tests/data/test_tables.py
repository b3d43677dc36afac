"""CSV and TSV files that name images: their splits and classes, and what is wrong with others."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import error_line, make_images, read_result, rows, train

from vit.data.listing import list_images
from vit.data.tables import list_table
from vit.errors import ConfigError, DataError


def write(path, *lines):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def names_of(images):
    return [os.path.basename(os.fsdecode(path)) for path in images.paths.tolist()]


@pytest.fixture
def pets(tmp_path):
    """Five empty files, since they are listed and not opened."""
    for name in "abcde":
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.jpg").touch()
    return tmp_path / "pets.csv"


def test_splits_and_classes_are_those_of_the_columns(pets):
    write(
        pets,
        "id,Path,Label,Split",
        "1,images/b.jpg,dog,train",
        "2,images/a.jpg,cat,TRAIN",
        "3,images/c.jpg,dog,validation",
        "",
        "4,images/e.jpg,cat,testing",
        f"5,{pets.parent}/images/d.jpg,cat,Dev",
    )
    splits = list_images(pets)
    assert splits.classes == ["cat", "dog"]
    assert names_of(splits.train) == ["b.jpg", "a.jpg"]
    assert splits.train.labels.tolist() == [1, 0]
    assert splits.train.labels.dtype == torch.int64
    assert (names_of(splits.val), splits.val.labels.tolist()) == (["c.jpg", "d.jpg"], [1, 0])
    assert names_of(splits.test) == ["e.jpg"]
    assert splits.val.title == "pets.csv val"
    expected = "pets.csv names 5 images of 2 classes: 2 train, 2 val, 1 test"
    assert splits.layout == expected


@pytest.mark.parametrize(
    ("name", "separator", "mark"),
    [("x.csv", ",", ""), ("x.csv", ";", ""), ("x.csv", "\t", ""), ("x.TSV", "\t", "\ufeff")],
)
def test_what_spreadsheets_write(pets, name, separator, mark):
    lines = [("filename", "class"), ("images/a.jpg", '"a ""cat"""'), ("images/b.jpg", "hänschen")]
    table = write(pets.parent / name, mark + separator.join(lines[0]))
    with open(table, "a", encoding="utf-8", newline="") as file:
        file.writelines(f"{separator.join(line)}\r\n" for line in lines[1:])
    splits = list_table(table)
    assert splits.classes == ['a "cat"', "hänschen"]
    assert splits.val is None
    assert names_of(splits.train) == ["a.jpg", "b.jpg"]


def test_whole_numbers_are_sorted_by_value(pets):
    lines = [f"images/{name}.jpg,{label}" for name, label in zip("abc", (10, 9, 2), strict=True)]
    assert list_table(write(pets, "path,label", *lines)).classes == ["2", "9", "10"]


def test_the_column_of_the_classes_can_be_chosen(pets):
    lines = ["path,label,color", "images/a.jpg,cat,red", "images/b.jpg,dog,blue"]
    write(pets, *lines)
    assert list_images(pets).classes == ["cat", "dog"]
    assert list_images(pets, "color").classes == ["blue", "red"]
    with pytest.raises(DataError, match=r"no column size \(data.label_column\); .*label, color"):
        list_images(pets, "size")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"pets\.csv: no column path .*its first line has no names"),
        (["images/a.jpg,cat"], r"no column path \(or file, .*has images/a\.jpg, cat"),
        (["path,kind", "images/a.jpg,cat"], r"no column label \(or class, .*has path, kind"),
        (["path,class,target"], "class and target can each be the column label"),
        (["path,label", "images/a.jpg,"], "line 2 has no label"),
        (["path,label", "images/a.jpg"], "line 2 has no label"),
        (["path,label", ",cat"], "line 2 has no path"),
        (["path,label,split", "images/a.jpg,cat,holdout"], "line 2 has an unknown split 'holdout'"),
        (["path,label,split", "images/a.jpg,cat,"], "unknown split ''; expected train, val, test"),
        (["path,label", "images/a.jpg,cat"], "train has the class 'cat' alone"),
        (["path,label,split", "images/a.jpg,cat,test"], "train has no images"),
        (["path,label", '"images/a.jpg,cat'], "can't read this table"),
    ],
)
def test_tables_that_cannot_be_understood_are_refused(pets, lines, message):
    with pytest.raises(DataError, match=message):
        list_table(write(pets, *lines))


GOOD = ["path,label,split", "images/a.jpg,cat,train", "images/b.jpg,dog,train"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["images/c.jpg,fox,val"], "line 4 has the label 'fox', which no image of train has"),
        (["images/x.jpg,cat,val"], r"line 4: no file .*/images/x\.jpg; paths are relative"),
        (["images\\x.jpg,cat,val"], r"line 4: no file .* of the table, with / between folders"),
        (["no/x.jpg,cat,val", "images/y,dog,val"], r"line 4: no file .*no/x\.jpg \(and 1 others\)"),
        (
            ["images/../images/b.jpg,dog,test"],
            r"lines 3 \(train\) and 4 \(test\) name the same image, .*images/b\.jpg",
        ),
        (["images/a.jpg,dog,train"], r"lines 2 \(train\) and 4 \(train\) name the same image"),
    ],
)
def test_rows_that_contradict_others_or_the_disk_are_refused(pets, lines, message):
    list_table(write(pets, *GOOD))
    with pytest.raises(DataError, match=message):
        list_table(write(pets, *GOOD, *lines))


def test_a_table_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv: can't read this table \(No such file"):
        list_images(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("path,label\nä.jpg,ü".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.csv: can't read this table .*UTF-8"):
        list_images(tmp_path / "latin.csv")


def test_an_archive_has_to_be_unpacked_first(tmp_path):
    (tmp_path / "pets.zip").touch()
    with pytest.raises(
        DataError, match=r"pets\.zip: neither .*python -m vit\.unpack .*pets\.zip F"
    ):
        list_images(tmp_path / "pets.zip")


def test_where_the_command_is_started_makes_no_difference(pets, monkeypatch):
    write(pets.parent / "images" / "x.csv", "path,label", "a.jpg,cat", "b.jpg,dog")
    fingerprint = list_images(pets.parent / "images" / "x.csv").train.fingerprint()
    monkeypatch.chdir(pets.parent / "images")
    assert list_images(Path("x.csv")).train.fingerprint() == fingerprint


def test_folders_have_no_label_column(tmp_path):
    make_images(tmp_path, {".": 2})
    with pytest.raises(ConfigError, match=r"data\.label_column does nothing here"):
        list_images(tmp_path, "color")


def write_table(root, count):
    """A table of images of two classes in one flat folder, so that their names say nothing."""
    make_images(root / "sorted", {".": count})
    (root / "flat").mkdir()
    lines = ["file,class"]
    for number, image in enumerate(sorted((root / "sorted").rglob("*.jpg"))):
        shutil.move(image, root / "flat" / f"{number}.jpg")
        lines.append(f"flat/{number}.jpg,{image.parent.name}")
    return write(root / "table.tsv", *(line.replace(",", "\t") for line in lines))


TRAIN = [
    "data=folder",
    "schedule=constant",
    "data.val_fraction=0.2",
    "data.test_fraction=0.2",
    "model=vit_nano4",
    "model.num_channels=3",
    "model.num_layers=1",
    "train.batch_size=16",
    "train.log_every=1",
    "train.save_every=2",
    "runtime.workers=1",
]


def test_training_and_resuming_on_a_table(tmp_path):
    """The resumed run, on the moved table, ends as the whole one; a missing image is one line."""
    write_table(tmp_path / "pets", 20)
    root = "data.root=pets/table.tsv"
    done = train(tmp_path, *TRAIN, root, "train.steps=6", "hydra.run.dir=whole")
    assert done.returncode == 0, done.stderr
    assert "table.tsv names 40 images of 2 classes: 40 train" in done.stdout
    done = train(tmp_path, *TRAIN, root, "train.steps=4", "hydra.run.dir=half")
    assert done.returncode == 0, done.stderr

    (tmp_path / "pets").rename(tmp_path / "moved")
    changes = ["data.root=moved/table.tsv", "train.steps=6", "resume_changed=allow"]
    done = train(tmp_path, "resume=half", *changes)
    assert done.returncode == 0, done.stderr
    assert "training images" not in done.stdout
    whole, half = read_result(tmp_path / "whole"), read_result(tmp_path / "half")
    assert whole["status"] == half["status"] == "finished"
    losses = [
        [row["loss"] for row in rows(tmp_path / run / "metrics.jsonl") if row["split"] == "train"]
        for run in ("whole", "half")
    ]
    assert losses[0] == losses[1]

    (tmp_path / "moved" / "flat" / "7.jpg").unlink()
    line = error_line(train(tmp_path, *TRAIN, "data.root=moved/table.tsv", "hydra.run.dir=bad"))
    assert f"line 9: no file {tmp_path}/moved/flat/7.jpg" in line
