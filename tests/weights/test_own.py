"""This project's own weights: checkpoints of both kinds, and bare tensors."""

import pytest
import torch
from foreign_models import difference, own_checkpoint, own_model
from safetensors.torch import save_file

import vit
from vit.errors import CheckpointError
from vit.weights import own
from vit.weights.loading import build, read


@pytest.mark.parametrize("kind", ["best", "last"])
def test_the_same_logits(tmp_path, kind):
    ours = own_model(position="rope2d", num_registers=2)
    own_checkpoint(tmp_path / "best.safetensors", ours, kind, position="rope2d", num_registers=2)
    loaded = build(tmp_path)
    assert loaded.classes == list("abcde")
    assert loaded.preprocessing.image_size == (32, 32)
    assert difference(loaded, ours, 32) == 0


@pytest.mark.parametrize("strides", [[1, 2], None])
def test_a_stem_of_convolutions(tmp_path, strides):
    settings = {"conv_stem": [16, 32], "conv_stem_strides": strides, "num_registers": 1}
    ours = own_model(**settings)
    own_checkpoint(tmp_path / "best.safetensors", ours, **settings)
    assert read(tmp_path).model["conv_stem_strides"] == (strides or [2, 2])
    for loaded in (build(tmp_path), vit.load(tmp_path / "best.safetensors")):
        assert difference(loaded, ours, 32) == 0


def test_bare_tensors(tmp_path):
    save_file(own_model().state_dict(), tmp_path / "bare")
    assert difference(build(tmp_path / "bare"), own_model(), 32) == 0


def test_surplus_tensors_are_refused(tmp_path):
    state = own_model().state_dict()
    for surplus in ("extra.weight", "encoder.blocks.0.attention.extra", "pooler.dense.bias"):
        save_file(state | {surplus: torch.zeros(3)}, tmp_path / "bare")
        with pytest.raises(CheckpointError, match=rf"bare: .*{surplus} is no part") as caught:
            read(tmp_path / "bare")
        assert "\n" not in str(caught.value)


def test_missing_and_misshaped_tensors_are_refused(tmp_path):
    state = own_model().state_dict()
    name = "encoder.blocks.1.mlp.fc2.bias"
    save_file({key: tensor for key, tensor in state.items() if key != name}, tmp_path / "bare")
    with pytest.raises(CheckpointError, match=rf"bare: .*{name} is missing"):
        read(tmp_path / "bare")
    save_file(state | {name: torch.zeros(3)}, tmp_path / "bare")
    with pytest.raises(CheckpointError, match=rf"bare: .*{name} is \(3,\)"):
        read(tmp_path / "bare")


def test_whole_numbers_are_no_weights(tmp_path):
    state = own_model().state_dict()
    name = "encoder.blocks.1.mlp.fc2.weight"
    save_file(state | {name: state[name].to(torch.int8)}, tmp_path / "bare")
    with pytest.raises(CheckpointError, match=rf"bare: {name} .*int8.*quantized"):
        read(tmp_path / "bare")


@pytest.mark.parametrize("position", ["none", "rope2d", "sincos2d"])
def test_positions_that_no_tensor_shows_are_not_guessed(tmp_path, position):
    save_file(own_model(position=position).state_dict(), tmp_path / "bare")
    with pytest.raises(CheckpointError, match="bare: holds no positions"):
        read(tmp_path / "bare")


def test_removed_heads(tmp_path):
    ours = own_model(num_heads=4, pruned_heads={1: [0, 2]})
    own_checkpoint(tmp_path / "x", ours, num_heads=4, pruned_heads={"1": [0, 2]})
    assert difference(build(tmp_path / "x"), ours, 32) == 0


def test_classes_without_names_are_numbered(tmp_path):
    save_file(own_model().state_dict(), tmp_path / "bare")
    assert own.write(read(tmp_path / "bare"), tmp_path / "written") == []
    loaded = vit.load(tmp_path / "written")
    assert loaded.classes == ["0", "1", "2", "3", "4"]
    assert difference(loaded, own_model(), 32) == 0


def test_weights_without_a_head_are_no_classifier_to_write(tmp_path):
    state = own_model().state_dict()
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    save_file(headless, tmp_path / "bare")
    with pytest.raises(CheckpointError, match="holds no head"):
        own.write(read(tmp_path / "bare"), tmp_path / "written")
    assert not (tmp_path / "written").exists()
