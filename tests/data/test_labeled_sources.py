"""Images as a user names them, with their labels: their order, and what is missing or damaged."""

import io
import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from helpers import close_folder, make_images
from PIL import Image
from pyarrow import parquet

from vit import shards
from vit.data.image_files import file_of
from vit.data.image_stream import stream_batches
from vit.data.labeled_sources import find_sources, takes_label_column
from vit.data.preprocessing import Preprocessing
from vit.errors import DataError

PREPROCESSING = Preprocessing((8, 8), 3, (0.5,), (0.5,), None, "bilinear")


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """pets/{train,test}/{cat,dog}/{0,1}.jpg and pets/loose.jpg below the current folder."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "pets", {"train": 2, "test": 1})
    Image.new("RGB", (8, 8)).save("pets/loose.jpg")
    return tmp_path / "pets"


def found(*names, **options):
    return [tuple(source) for source in find_sources(names, **options)]


def readable(*names):
    """How many of the images the loader opens."""
    paths = (source.path for source in find_sources(names))
    batches = list(stream_batches(paths, PREPROCESSING, 4, workers=0))
    assert [error for batch in batches for error in batch.errors] == []
    return sum(len(batch.paths) for batch in batches)


def test_labels_are_the_class_folders_below_the_one_that_is_named(pets):
    assert found("pets") == [
        ("pets/loose.jpg", ""),
        ("pets/test/cat/0.jpg", "cat"),
        ("pets/test/dog/0.jpg", "dog"),
        ("pets/train/cat/0.jpg", "cat"),
        ("pets/train/cat/1.jpg", "cat"),
        ("pets/train/dog/0.jpg", "dog"),
        ("pets/train/dog/1.jpg", "dog"),
    ]
    assert found("pets/test/", "pets/loose.jpg", "pets/test/cat") == [
        ("pets/test/cat/0.jpg", "cat"),
        ("pets/test/dog/0.jpg", "dog"),
        ("pets/loose.jpg", ""),
        ("pets/test/cat/0.jpg", ""),
    ]


def test_a_closed_folder_is_an_error_after_the_images(pets, monkeypatch):
    os.remove("pets/loose.jpg")
    close_folder(Path("pets/train/cat"), monkeypatch)
    *images, (error, _) = found("pets")
    assert [label for _, label in images] == ["cat", "dog", "dog", "dog"]
    assert str(error) == "pets/train/cat: can't open this folder (Permission denied)"


def test_paths_from_a_pipe_and_what_is_not_there(pets, monkeypatch):
    lines = io.TextIOWrapper(io.BytesIO(b"pets/loose.jpg\npets/none*.jpg\n"))
    monkeypatch.setattr(sys, "stdin", lines)
    (first, label), (error, _) = found("-")
    assert (first, label) == ("pets/loose.jpg", "")
    assert isinstance(error, DataError)


def test_rows_of_a_table_in_their_order(pets):
    rows = ["path,label,split", "train/dog/1.jpg,dog,train", "test/cat/0.jpg,,test", "loose.jpg"]
    (pets / "x.csv").write_text("\n".join(rows))
    assert found("pets/x.csv") == [
        ("pets/train/dog/1.jpg", "dog"),
        ("pets/test/cat/0.jpg", ""),
        ("pets/loose.jpg", ""),
    ]
    assert readable("pets/x.csv") == 3
    assert takes_label_column("pets/x.csv")
    assert not takes_label_column("pets")
    (pets / "x.csv").write_text("path,label\n,dog\n")
    with pytest.raises(DataError, match=r"x\.csv: line 2 has no path"):
        found("pets/x.csv")


def write_parquet(path, **columns):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    count = len(next(iter(columns.values())))
    table = pa.table({"image": [file.getvalue()] * count, **columns})
    parquet.write_table(table, path, row_group_size=2)


def test_rows_of_parquet_files_with_labels_and_without(pets):
    write_parquet(pets / "b.parquet", label=["cat", None, "dog"])
    write_parquet(pets / "a.parquet", number=[1])
    assert found("pets/b.parquet", "pets/a.parquet") == [
        ("pets/b.parquet!0+0", "cat"),
        ("pets/b.parquet!0+1", ""),
        ("pets/b.parquet!1+0", "dog"),
        ("pets/a.parquet!0+0", ""),
    ]
    assert readable("pets/b.parquet") == 3
    assert [label for _, label in found("pets/a.parquet", label_column="number")] == ["1"]
    with pytest.raises(DataError, match="no column kind"):
        found("pets/a.parquet", label_column="kind")
    (pets / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file"):
        found("pets/a.parquet")


def test_images_of_shards(pets):
    os.remove(pets / "loose.jpg")
    shards.main(["pets", "packed", "--per-shard", "3", "--workers", "1"])
    sources = found("packed")
    assert [label for _, label in sources[:2]] == ["cat", "dog"]  # of test
    assert len(sources) == readable("packed") == 6
    assert sources == found(*sorted(map(str, Path("packed").glob("*.tar"))))
    assert file_of(sources[0][0]) == "packed/test-000000.tar"
    os.remove("packed/classes.txt")
    assert [label for _, label in found("packed")[:2]] == ["0", "1"]
