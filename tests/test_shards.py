"""Tar shards: what is written is read again, to the same training as from single files."""

import io
import os
import shutil
import tarfile

import pytest
import torch
from helpers import ROOT, losses_by_workers, make_images, start, wait_until
from PIL import Image

from vit.data.datasets import load_data
from vit.data.image_files import open_image
from vit.data.labeled_sources import find_sources
from vit.errors import ConfigError, DataError
from vit.shards import ShardWriter, main


def load(root):
    return load_data(
        name="shards",
        root=str(root),
        val_fraction=0.2,
        test_fraction=0.2,
        limit=None,
        image_size=(16, 16),
        num_channels=3,
        settings={},
        device=torch.device("cpu"),
    )


def write(tmp_path, *arguments, splits=None):
    """Write shards of images in tmp_path/in to tmp_path/out."""
    make_images(tmp_path / "in", splits or {"train": 10, "val": 3, "test": 4})
    pack(tmp_path, *arguments)
    return tmp_path / "out"


def pack(tmp_path, *arguments):
    folders = [str(tmp_path / "in"), str(tmp_path / "out")]
    main([*folders, "--per-shard", "8", "--workers", "1", *arguments])


def read_member(path):
    shard, _, position = path.decode().rpartition("!")
    offset, _, size = position.partition("+")
    with open(shard, "rb") as file:
        file.seek(int(offset))
        return file.read(int(size))


def test_every_image_is_found_again_with_its_class(tmp_path):
    data = load(write(tmp_path))
    assert data.classes == ["cat", "dog"]
    assert [len(data.train), len(data.val), len(data.test)] == [20, 6, 8]
    assert len(list((tmp_path / "out").glob("train-*.tar"))) == 3
    expected = {
        (path.read_bytes(), path.parent.name) for path in (tmp_path / "in" / "train").rglob("*.jpg")
    }
    names = [data.classes[label] for label in data.train.labels]
    contents = [read_member(path) for path in data.train.paths.tolist()]
    assert set(zip(contents, names, strict=True)) == expected
    for path in data.train.paths.tolist():
        assert open_image(path.decode()).size == (40, 30)


def test_classes_are_mixed_within_a_shard(tmp_path):
    data = load(write(tmp_path, splits={"train": 40, "val": 1, "test": 1}))
    assert 1 < data.train.labels[:8].sum() < 7


def renumber(out, labels, split=""):
    """Write other labels into shards, {old: new}, and remove the names of their classes."""
    for shard in out.glob(f"{split}*.tar"):
        with tarfile.open(shard) as old:
            members = [(member, old.extractfile(member).read()) for member in old]
        with tarfile.open(shard, "w") as new:
            for member, content in members:
                if member.name.endswith(".cls"):
                    content = str(labels[int(content)]).encode()
                    member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    (out / "classes.txt").unlink(missing_ok=True)


@pytest.mark.parametrize("numbers", [(0, 1), (1, 2), (7, 10**12)])
def test_without_names_the_numbers_that_occur_are_the_classes(tmp_path, numbers):
    out = write(tmp_path)
    expected = load(out)
    renumber(out, dict(enumerate(numbers)))
    data = load(out)
    assert data.classes == [str(number) for number in numbers]
    for split in ("train", "val", "test"):
        assert data.split(split).labels.tolist() == expected.split(split).labels.tolist()


def test_a_number_that_train_lacks_is_refused(tmp_path):
    out = write(tmp_path)
    renumber(out, {0: 0, 1: 5}, "test")
    with pytest.raises(DataError, match=r"out test has the label 5, .* not among those of train"):
        load(out)


def test_a_negative_number_is_no_class(tmp_path):
    out = write(tmp_path)
    renumber(out, {0: 0, 1: -1})
    with pytest.raises(DataError, match=r"out train has the label -1"):
        load(out)


def test_images_can_be_made_smaller_on_the_way(tmp_path):
    data = load(write(tmp_path, "--short-side", "12"))
    assert {open_image(path.decode()).size for path in data.train.paths.tolist()} == {(16, 12)}


def test_images_of_other_formats_can_be_made_smaller(tmp_path):
    """They become JPEGs, whose name in the shard has to fit that of their label."""
    make_images(tmp_path / "in", {"train": 2})
    for number in range(4):
        Image.new("RGBA", (40, 30), "blue").save(tmp_path / "in/train/cat" / f"{number}.png")
    pack(tmp_path, "--short-side", "12")
    data = load(tmp_path / "out")
    assert len(data.train) + len(data.val) + len(data.test) == 8


def test_unreadable_images_are_named_and_the_others_written(tmp_path):
    make_images(tmp_path / "in", {"train": 5})
    (tmp_path / "in" / "train" / "cat" / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"(?s)bad\.jpg: .*\n1 images were left out$"):
        pack(tmp_path)
    data = load(tmp_path / "out")
    assert len(data.train) + len(data.val) + len(data.test) == 10


def test_training_from_shards_learns_the_same_with_any_number_of_workers(tmp_path):
    out = write(tmp_path, splits={"train": 40})
    losses = losses_by_workers(
        tmp_path,
        "data=shards",
        f"data.root={out}",
        "model=vit_ti4",
        "model.image_size=16",
        "model.num_layers=1",
        "train.batch_size=16",
        "train.steps=6",
    )
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_folders_without_shards_or_images_are_refused(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}/train-\*\.tar; write shards"):
        load(tmp_path)
    with pytest.raises(DataError, match=rf"{tmp_path}: holds no folders of images"):
        main([str(tmp_path), str(tmp_path / "out")])


def test_the_layouts_of_folders_are_those_of_shards(tmp_path, capsys):
    write(tmp_path / "named", splits={"Train": 6, "validation": 3, "testing": 2})
    data = load(tmp_path / "named" / "out")
    assert [len(data.train), len(data.val), len(data.test)] == [12, 6, 4]
    assert "in holds Train/, validation/ and testing/" in capsys.readouterr().out
    write(tmp_path / "flat", splits={".": 10})
    data = load(tmp_path / "flat" / "out")
    assert data.classes == ["cat", "dog"]
    assert len(data.train) + len(data.val) + len(data.test) == 20
    assert "train: 20 images" in capsys.readouterr().out


def test_other_classes_in_a_split_are_refused_before_anything_is_written(tmp_path):
    make_images(tmp_path / "in", {"train": 2, "val": 1})
    make_images(tmp_path / "in", {"val": 1}, ("fox",))
    with pytest.raises(DataError, match=r"in/val: .*has besides fox"):
        pack(tmp_path)
    assert not (tmp_path / "out").exists()


def test_shards_do_not_become_a_class(tmp_path):
    make_images(tmp_path, {".": 2})
    with pytest.raises(ConfigError, match="cat/out: would be a class folder"):
        main([str(tmp_path), str(tmp_path / "cat" / "out")])


def test_shards_are_not_overwritten(tmp_path):
    write(tmp_path)
    with pytest.raises(ConfigError, match="out: already holds shards"):
        pack(tmp_path)


def test_the_shards_of_a_killed_command_are_refused(tmp_path):
    """Those that are whole would pass for a smaller data set, with test cut from its train."""
    make_images(tmp_path / "in", {"train": 1, "test": 1})
    for number in range(2000):
        os.link(tmp_path / "in/train/cat/0.jpg", tmp_path / f"in/train/cat/{number + 1}.jpg")
    folders = (str(tmp_path / "in"), str(tmp_path / "out"))
    options = ("--per-shard", "2", "--workers", "1")
    with start("vit.shards", *folders, *options, cwd=ROOT) as process:
        wait_until(lambda: len(list((tmp_path / "out").rglob("train-*.tar"))) > 2, process)
        process.kill()
    with pytest.raises(DataError, match=rf"{tmp_path}/out: .*was ended before it was done"):
        load(tmp_path / "out")
    with pytest.raises(DataError, match="was ended before it was done"):
        next(find_sources([str(tmp_path / "out")]))
    with pytest.raises(ConfigError, match="out: another command is writing shards there"):
        pack(tmp_path)

    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "in")
    assert len(load(write(tmp_path)).train) == 20


def test_nothing_is_left_of_a_command_that_fails(tmp_path, monkeypatch):
    def fill(writer, name, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write_member", fill)
        with pytest.raises(ConfigError, match="out: can't write there"):
            write(tmp_path)
    assert list((tmp_path / "out").iterdir()) == []
    pack(tmp_path)
    assert len(load(tmp_path / "out").train) == 20


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"a\r"])
def test_class_names_of_other_than_one_line_are_refused_before_anything_is_written(tmp_path, name):
    make_images(tmp_path / "in", {"train": 1}, ("cat", os.fsdecode(name)))
    with pytest.raises(DataError, match=r"class (folder )?'(a|caf).*; rename the"):
        pack(tmp_path)
    assert not (tmp_path / "out").exists()


def test_labels_without_a_class_are_refused(tmp_path):
    out = write(tmp_path)
    (out / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match=rf"{out}: .*the label 1, .* classes\.txt, 0 to 0$"):
        load(out)


def test_names_of_classes_that_are_not_utf8_are_refused(tmp_path):
    out = write(tmp_path)
    (out / "classes.txt").write_bytes(b"caf\xe9\ndog\n")
    for look in (load, lambda root: list(find_sources([str(root)]))):
        with pytest.raises(DataError, match=rf"{out}/classes\.txt: can't read the names of the"):
            look(out)


@pytest.mark.parametrize("option", ["--per-shard=0", "--short-side=0", "--workers=0"])
def test_options_out_of_range_are_refused(tmp_path, option, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "in"), str(tmp_path / "out"), option])
    assert ended.value.code == 2
    assert option.partition("=")[0] in capsys.readouterr().err
