"""One checkpoint file: what is written comes back, and nothing else is taken for it."""

import errno
import os
import pickle
import re

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vit.checkpoints import file as checkpoint_file
from vit.checkpoints.file import read_checkpoint, require_header_keys, write_checkpoint
from vit.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1, 2], dtype=torch.int64),
    "c": torch.zeros(0),
    "d": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5),
}
HEADER = {"kind": "last", "names": ["ü", "猫"], "value": 0.1}


@pytest.fixture
def path(tmp_path):
    """A whole checkpoint."""
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, TENSORS, HEADER)
    return path


def test_round_trip(path):
    tensors, header = read_checkpoint(path)
    assert header == HEADER
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_files_that_were_cut_short_are_refused(path):
    whole = path.read_bytes()
    for length in range(0, len(whole), 17):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            read_checkpoint(path)


def test_files_with_changed_bytes_are_refused(path):
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            tensors, header = read_checkpoint(path)
        except CheckpointError:
            continue
        # A flip in padding between the parts of the file changes nothing that is read
        assert header == HEADER
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_other_safetensors_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .* not a checkpoint"):
        read_checkpoint(path)


def test_reading_never_runs_code(tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return (canary.write_text, ("ran",))

    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not canary.exists()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing\.safetensors: no such checkpoint"):
        read_checkpoint(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("folder", ["run", "run/checkpoints"])
def test_the_folder_of_a_run_stands_for_its_best_checkpoint(tmp_path, folder):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    write_checkpoint(tmp_path / "run" / "checkpoints" / "best.safetensors", TENSORS, HEADER)
    assert read_checkpoint(tmp_path / folder)[1] == HEADER
    (tmp_path / "run" / "checkpoints" / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{folder}: no such checkpoint"):
        read_checkpoint(tmp_path / folder)


def test_a_failed_write_leaves_the_old_file(path):
    with pytest.raises(TypeError):
        write_checkpoint(path, TENSORS, {"not json": object()})
    assert read_checkpoint(path)[1] == HEADER
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("something else", errno.EIO),
    ],
    ids=["full", "unknown"],
)
def test_an_error_of_the_disk_is_told_from_the_librarys_text(path, monkeypatch, text, number):
    def fail(*arguments):
        raise SafetensorError(text)

    monkeypatch.setattr(checkpoint_file, "save_file", fail)
    with pytest.raises(OSError, match=re.escape(text)) as raised:
        write_checkpoint(path, TENSORS, {"kind": "other"})
    assert raised.value.errno == number
    assert read_checkpoint(path)[1] == HEADER


def test_the_file_before_is_kept_under_a_second_name(path):
    second = path.with_name("previous.safetensors")
    for step in (1, 2):
        write_checkpoint(path, TENSORS, {**HEADER, "step": step}, keep=second)
    assert read_checkpoint(path)[1]["step"] == 2
    assert read_checkpoint(second)[1]["step"] == 1
    assert sorted(os.listdir(path.parent)) == [second.name, path.name]


@pytest.fixture
def no_hard_links(monkeypatch):
    """As on exFAT and some file systems of networks."""

    def refuse(*arguments):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(checkpoint_file.os, "link", refuse)


@pytest.mark.usefixtures("no_hard_links")
def test_without_hard_links_the_file_before_is_copied(path):
    second = path.with_name("previous.safetensors")
    for step in (1, 2, 3):
        write_checkpoint(path, TENSORS, {**HEADER, "step": step}, keep=second)
    assert read_checkpoint(path)[1]["step"] == 3
    assert read_checkpoint(second)[1]["step"] == 2
    assert sorted(os.listdir(path.parent)) == [second.name, path.name]


@pytest.mark.usefixtures("no_hard_links")
def test_a_disk_that_is_full_while_copying_costs_neither_file(path, monkeypatch):
    second = path.with_name("previous.safetensors")
    write_checkpoint(path, TENSORS, {**HEADER, "step": 1}, keep=second)

    def half_a_copy(source, target):
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_file.shutil, "copyfile", half_a_copy)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(path, TENSORS, {**HEADER, "step": 2}, keep=second)
    assert read_checkpoint(path)[1]["step"] == 1
    assert read_checkpoint(second)[1] == HEADER
    assert sorted(os.listdir(path.parent)) == [second.name, path.name]


def test_missing_keys_of_a_header_are_named():
    assert require_header_keys(HEADER, "file", "kind", "value") == HEADER
    with pytest.raises(CheckpointError, match=r"file: .*config, classes"):
        require_header_keys(HEADER, "file", "kind", "config", "classes")
