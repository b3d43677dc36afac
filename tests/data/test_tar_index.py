import io
import tarfile

import numpy as np
import pytest

from vit.data.tar_index import index_split
from vit.errors import DataError


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_shard(root, name, numbers, label=1):
    """A shard whose images are their numbers, as text."""
    members = {}
    for number in numbers:
        members[f"{number}.jpg"] = f"image {number}".encode()
        members[f"{number}.cls"] = str(label).encode()
    write_tar(root / name, members)


def read_members(paths):
    contents = []
    for path in paths.tolist():
        shard, _, position = path.decode().rpartition("!")
        offset, _, size = position.partition("+")
        with open(shard, "rb") as file:
            file.seek(int(offset))
            contents.append(file.read(int(size)).decode())
    return contents


def test_every_image_is_found_with_its_label(tmp_path):
    write_shard(tmp_path, "train-0.tar", [3, 1], label=7)
    write_shard(tmp_path, "train-1.tar", [2], label=8)
    write_shard(tmp_path, "val-0.tar", [9])
    paths, labels = index_split(tmp_path, "train")
    assert read_members(paths) == ["image 3", "image 1", "image 2"]
    assert labels.tolist() == [7, 7, 8]
    assert labels.dtype == np.int64
    assert index_split(tmp_path, "test") is None


def test_the_index_is_kept(tmp_path, capsys):
    write_shard(tmp_path, "train-0.tar", range(5))
    first = index_split(tmp_path, "train")
    assert "1 train shards" in capsys.readouterr().out
    again = index_split(tmp_path, "train")
    assert capsys.readouterr().out == ""
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert {file.name for file in tmp_path.iterdir()} == {"train-0.tar", ".index-train.npz"}
    with np.load(tmp_path / ".index-train.npz") as index:
        assert set(index.files) == {"state", "places", "labels"}


@pytest.mark.parametrize("content", [b"", b"no index", b"PK\x03\x04 cut"])
def test_a_damaged_index_is_written_again(tmp_path, content):
    write_shard(tmp_path, "train-0.tar", range(5))
    expected = index_split(tmp_path, "train")[0].tolist()
    (tmp_path / ".index-train.npz").write_bytes(content)
    assert index_split(tmp_path, "train")[0].tolist() == expected
    with np.load(tmp_path / ".index-train.npz") as index:
        assert index["places"].tolist() == expected


def test_an_index_of_other_shards_is_written_again(tmp_path):
    write_shard(tmp_path, "train-0.tar", [0, 1])
    write_shard(tmp_path, "train-1.tar", [2, 3])
    index_split(tmp_path, "train")
    (tmp_path / "train-1.tar").unlink()
    assert read_members(index_split(tmp_path, "train")[0]) == ["image 0", "image 1"]
    write_shard(tmp_path, "train-0.tar", [4])
    assert read_members(index_split(tmp_path, "train")[0]) == ["image 4"]


def test_a_folder_that_cannot_be_written_is_indexed_at_each_start(tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr("vit.files.os.replace", refuse)
    write_shard(tmp_path, "train-0.tar", [5])
    for _ in range(2):
        assert read_members(index_split(tmp_path, "train")[0]) == ["image 5"]
        assert "looking up" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["train-0.tar"]


def test_damaged_shards_are_refused(tmp_path):
    shard = tmp_path / "train-0.tar"
    shard.write_bytes(b"not a tar")
    with pytest.raises(DataError, match=r"train-0\.tar: not a shard"):
        index_split(tmp_path, "train")
    write_tar(shard, {"7.cls": b"9"})
    with pytest.raises(DataError, match=r"train-0\.tar: 7 lacks its image or its label"):
        index_split(tmp_path, "train")
    write_tar(shard, {"7.jpg": b"image"})
    with pytest.raises(DataError, match=r"train-0\.tar: 7 lacks its image or its label"):
        index_split(tmp_path, "train")
    write_tar(shard, {"7.jpg": b"image", "7.cls": b"cat"})
    with pytest.raises(DataError, match=r"train-0\.tar: not a shard .*cat"):
        index_split(tmp_path, "train")


def test_a_shard_that_is_cut_between_two_samples_is_refused(tmp_path):
    write_shard(tmp_path, "train-0.tar", range(5))
    with tarfile.open(tmp_path / "train-0.tar") as tar:
        third = tar.getmember("2.jpg").offset
    with open(tmp_path / "train-0.tar", "rb+") as file:
        file.truncate(third)
    with pytest.raises(DataError, match=rf"train-0\.tar: not a shard .*breaks off .*{third:,}"):
        index_split(tmp_path, "train")
