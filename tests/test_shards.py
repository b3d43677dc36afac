"""Tar shards: what is written is read again, to the same training as from single files."""

import io
import json
import tarfile

import pytest
import torch
from helpers import make_images, train

from vit.data.datasets import load_data
from vit.data.image_files import open_image
from vit.errors import ConfigError, DataError
from vit.shards import main

CPU = torch.device("cpu")


def load(root):
    return load_data(
        name="shards",
        root=str(root),
        val_fraction=0.2,
        test_fraction=0.2,
        limit=None,
        image_size=(16, 16),
        num_channels=3,
        num_classes=None,
        num_images=None,
        device=CPU,
    )


def write(tmp_path, *arguments, splits=None):
    make_images(tmp_path / "in", splits or {"train": 10, "val": 3, "test": 4})
    main(
        [
            str(tmp_path / "in"),
            str(tmp_path / "out"),
            "--per-shard",
            "8",
            "--workers",
            "1",
            *arguments,
        ]
    )
    return tmp_path / "out"


def test_every_picture_is_found_again_with_its_class(tmp_path):
    data = load(write(tmp_path))
    assert (data.classes, len(data.train), len(data.val), len(data.test)) == (
        ["cat", "dog"],
        20,
        6,
        8,
    )
    assert len(list((tmp_path / "out").glob("train-*.tar"))) == 3
    wanted = {
        (path.read_bytes(), path.parent.name) for path in (tmp_path / "in" / "train").rglob("*.jpg")
    }
    found = set()
    for place, label in zip(data.train.paths.tolist(), data.train.labels.tolist(), strict=True):
        shard, _, where = place.decode().rpartition("!")
        offset, _, size = where.partition("+")
        with open(shard, "rb") as file:
            file.seek(int(offset))
            found.add((file.read(int(size)), data.classes[label]))
        assert open_image(place.decode()).size == (40, 30)
    assert found == wanted
    again = load(tmp_path / "out")  # by the index that was kept
    assert again.train.paths.tolist() == data.train.paths.tolist()
    assert (tmp_path / "out" / ".index-train.npz").exists()


def test_an_index_of_other_shards_is_not_believed(tmp_path):
    out = write(tmp_path, splits={"train": 10})
    assert len(load(out).train) > 0
    (out / "train-000002.tar").unlink()
    data = load(out)
    assert len(data.train) + len(data.val) + len(data.test) == 16
    (out / ".index-train.npz").write_bytes(b"no index")
    assert len(load(out).train) == len(data.train)


def test_pictures_can_be_made_smaller_on_the_way(tmp_path):
    data = load(write(tmp_path, "--short-side", "12"))
    assert {open_image(place.decode()).size for place in data.train.paths.tolist()} == {(16, 12)}


def test_training_from_shards_is_training_from_files(tmp_path):
    """The same pictures in another order, so the losses differ; but it learns, resumes, and any number of workers agree."""
    out = write(tmp_path, splits={"train": 40})
    losses = []
    for workers in (0, 2):
        done = train(
            tmp_path,
            "data=shards",
            f"data.root={out}",
            "model=vit_ti4",
            "model.image_size=16",
            "model.num_layers=1",
            "train.batch_size=16",
            "train.steps=6",
            "train.log_every=1",
            f"runtime.workers={workers}",
            f"hydra.run.dir=run{workers}",
        )
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / f"run{workers}" / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if row["split"] == "train"])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_mistakes_are_told(tmp_path):
    with pytest.raises(DataError, match=r"no .*/train-\*\.tar; write shards"):
        load(tmp_path)
    with pytest.raises(DataError, match="no folder train"):
        main([str(tmp_path), str(tmp_path / "out")])
    out = write(tmp_path)
    with pytest.raises(ConfigError, match="holds shards already"):
        main([str(tmp_path / "in"), str(out)])
    (out / "train-000003.tar").write_bytes(b"not a tar")
    with pytest.raises(DataError, match=r"train-000003\.tar: not a shard"):
        load(out)
    with tarfile.open(out / "train-000003.tar", "w") as tar:
        member = tarfile.TarInfo("7.cls")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"9"))
    with pytest.raises(DataError, match="7 has not both a picture and a label"):
        load(out)
    with tarfile.open(out / "train-000003.tar", "w") as tar:
        for name, content in (
            ("7.jpg", (tmp_path / "in" / "train" / "cat" / "0.jpg").read_bytes()),
            ("7.cls", b"9"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match="labels must be from 0 to 1"):
        load(out)
