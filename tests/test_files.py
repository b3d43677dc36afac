"""Files that are written whole or not at all, and JSON in and out."""

import json
import os
import stat

import pytest

from vit.files import (
    atomic_write,
    read_json,
    read_jsonl,
    sync_folder,
    truncate_after_step,
    write_json,
    write_text,
)


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """Sets the umask; that of before comes back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def fail_while_writing(path, error, durable=False):
    with atomic_write(path, durable) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("durable", [False, True])
def test_the_new_file_takes_the_place_of_the_old(tmp_path, durable):
    path = tmp_path / "x"
    path.write_text("old")
    with atomic_write(path, durable) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyError("planted"), KeyboardInterrupt()])
@pytest.mark.parametrize("durable", [False, True])
def test_a_block_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path, error, durable):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(type(error)):
        fail_while_writing(path, error, durable)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_block_that_fails_leaves_no_file_where_there_was_none(tmp_path):
    with pytest.raises(KeyError):
        fail_while_writing(tmp_path / "x", KeyError("planted"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask_whatever_the_block_gives(tmp_path, umask, mask, expected):
    umask(mask)
    path = tmp_path / "x"
    with atomic_write(path) as temporary:
        # As libraries do that create their file themselves
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    assert permissions(path) == expected


def test_a_durable_file_and_its_folder_reach_the_disk(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(descriptor):
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr("vit.files.os.fsync", note)
    path = tmp_path / "x"
    with atomic_write(path, durable=True) as temporary:
        temporary.write_text("new")
    assert synced == [str(temporary), str(tmp_path)]
    sync_folder(tmp_path)
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert len(synced) == 3


def test_a_folder_that_is_missing_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "nowhere" / "x", "new")


def test_text_is_utf_8(tmp_path):
    write_text(tmp_path / "x", "ü 猫\n")
    assert (tmp_path / "x").read_bytes() == "ü 猫\n".encode()


def test_json(tmp_path):
    path = tmp_path / "x.json"
    assert read_json(path) == {}
    write_json(path, {"a": 1, "b": [0.1, None]})
    assert read_json(path) == {"a": 1, "b": [0.1, None]}
    assert path.read_text().endswith("}\n")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path)["a"] == 1
    path.write_text("{")
    with pytest.raises(ValueError, match="line 1"):
        read_json(path)


def test_only_whole_objects_of_a_log_are_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n\xff\n{"step": 2}\n{"step": 3, "lo')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_lines_of_later_steps_of_test_and_cut_ones_are_dropped(tmp_path):
    steps = ((1, "train"), (2, "val"), (2, "test"), (3, "train"))
    lines = [{"step": step, "split": split} for step, split in steps]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "spl')
    truncate_after_step(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:2]
    truncate_after_step(path, 0)
    assert path.read_text() == ""


def test_a_log_that_does_not_exist_is_left_alone(tmp_path):
    truncate_after_step(tmp_path / "x.jsonl", 2)
    assert os.listdir(tmp_path) == []
