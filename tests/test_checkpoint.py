import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

import vit
from vit.checkpoints.file import read_checkpoint, write_checkpoint
from vit.checkpoints.model import build_model, load_weights
from vit.checkpoints.run import LAST, PREVIOUS, check_classes, read_last
from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1, 2], dtype=torch.int64),
    "c": torch.zeros(0),
    "d": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5),
}
HEADER = {"kind": "last", "names": ["ü", "猫"], "value": 0.1}


def test_round_trip(tmp_path):
    write_checkpoint(tmp_path / "x.safetensors", TENSORS, HEADER)
    tensors, header = read_checkpoint(tmp_path / "x.safetensors")
    assert header == HEADER
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype
        for name in TENSORS
    )
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_truncated_or_changed_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, TENSORS, HEADER)
    whole = path.read_bytes()
    for length in range(0, len(whole), 17):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            read_checkpoint(path)
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            tensors, header = read_checkpoint(path)
        except CheckpointError:
            continue
        # A flip in padding between the parts of the file changes nothing that is read
        assert header == HEADER
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        read_checkpoint(path)
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return (canary.write_text, ("ran",))

    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not canary.exists()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "missing.safetensors")


def test_the_one_before_is_kept_and_used_where_the_last_is_damaged(tmp_path):
    last, previous = tmp_path / LAST, tmp_path / PREVIOUS
    for step in range(3):
        write_checkpoint(last, TENSORS, {**HEADER, "step": step}, keep=previous)
    assert read_last(tmp_path)[1]["step"] == 2
    assert read_checkpoint(previous)[1]["step"] == 1
    last.write_bytes(last.read_bytes()[:-3])
    _, header, warning = read_last(tmp_path)
    assert header["step"] == 1
    assert "last.safetensors" in warning
    previous.unlink()
    with pytest.raises(CheckpointError, match="nothing to resume from"):
        read_last(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, TENSORS, HEADER)
    with pytest.raises(TypeError):
        write_checkpoint(path, TENSORS, {"not json": object()})
    assert read_checkpoint(path)[1] == HEADER


MODEL = {
    "name": "small",
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
}


def write_best(path, model, kind="best"):
    preprocessing = Preprocessing((8, 8), 3, (0.5,), (0.5,), None, "bilinear")
    write_checkpoint(
        path,
        model.state_dict(),
        {
            "kind": kind,
            "config": {"model": MODEL},
            "classes": ["cat", "dog"],
            "preprocessing": preprocessing.to_dict(),
        },
    )


def test_load_gives_the_model_its_classes_and_preprocessing(tmp_path):
    model = build_model(MODEL, 2)
    torch.nn.init.normal_(model.head.weight)
    write_best(tmp_path / "best.safetensors", model)
    loaded = vit.load(tmp_path / "best.safetensors")
    assert not loaded.training
    assert loaded.classes == ["cat", "dog"]
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(images), model.eval()(images))
    assert loaded.preprocessing.image_size == (8, 8)
    write_best(tmp_path / "last.safetensors", model, kind="last")
    with pytest.raises(CheckpointError, match="use best"):
        vit.load(tmp_path / "last.safetensors")


def test_weights_of_another_model_name_the_differences_and_change_nothing():
    model, other = build_model(MODEL, 2), build_model({**MODEL, "num_layers": 2}, 3)
    before = json.dumps({name: tensor.tolist() for name, tensor in model.state_dict().items()})
    with pytest.raises(
        CheckpointError, match=r"encoder.blocks.1.* belongs to no part of this model"
    ):
        load_weights(model, other.state_dict(), "file")
    with pytest.raises(CheckpointError, match=r"head\.weight is \(3, 16\), expected \(2, 16\)"):
        load_weights(model, build_model(MODEL, 3).state_dict(), "file")
    assert (
        json.dumps({name: tensor.tolist() for name, tensor in model.state_dict().items()}) == before
    )


def test_classes_must_be_the_data_sets():
    check_classes(["a", "b"], ["a", "b"], "file")
    with pytest.raises(CheckpointError, match="class 1 is 'b' there and 'c' here"):
        check_classes(["a", "b"], ["a", "c"], "file")
    with pytest.raises(CheckpointError, match="2 there, 3 here"):
        check_classes(["a", "b"], ["a", "b", "c"], "file")
