"""Weights of any format: the format is recognized, and a model is built for them."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from foreign_models import (
    TOLERANCE,
    hf_model,
    jax_arrays,
    own_checkpoint,
    own_model,
    timm_model,
)
from safetensors.torch import save_file

from vit.config.model import MODEL_SETTINGS_OF_WEIGHTS
from vit.errors import CheckpointError
from vit.model.vision_transformer import Block, VisionTransformer
from vit.weights.loading import read


def test_unknown_names_are_listed(tmp_path):
    path, state = tmp_path / "x", timm_model().state_dict()
    surplus = {"mask_token": torch.zeros(1), "norm_post.weight": torch.zeros(1)}
    save_file(state | surplus, path)
    with pytest.raises(
        CheckpointError, match=r"no part for mask_token, norm_post\.weight"
    ) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_names_are_listed(tmp_path):
    path, state = tmp_path / "x", timm_model().state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"encoder.blocks.1.mlp.fc2.bias is missing"):
        read(path)


def test_names_of_no_library_are_listed_with_what_a_config_says(tmp_path):
    save_file({"vision_model.embeddings.class_embedding": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"x: tensors of no known library \(vision_model"):
        read(tmp_path / "x")
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(CheckpointError, match=r"x: clip_vision_model \(by its config.json\) can't"):
        read(tmp_path / "x")


def test_the_prefix_of_distributed_training_is_dropped(tmp_path):
    theirs = timm_model().state_dict()
    save_file({f"module.{name}": tensor for name, tensor in theirs.items()}, tmp_path / "x")
    save_file(theirs, tmp_path / "plain")
    assert read(tmp_path / "x").tensors.keys() == read(tmp_path / "plain").tensors.keys()


def test_one_block_alone(tmp_path):
    path, theirs = tmp_path / "x", timm_model()
    save_file(theirs.state_dict(), path)
    block, x = Block(192, 3, 768).eval(), torch.randn(2, 7, 192)
    block.load_from(read(path).tensors, 1)
    with torch.inference_mode():
        assert (block(x) - theirs.blocks[1](x)).abs().max() < TOLERANCE
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    with pytest.raises(CheckpointError, match="block 2: weights of another model"):
        block.load_from(read(path).tensors, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def google_model(**changes) -> VisionTransformer:
    return own_model(num_heads=4, activation="gelu_tanh", **changes)


def same_block(block: Block, whole: VisionTransformer, n: int) -> bool:
    """Whether a block has taken the weights of block n, and computes the same."""
    x = torch.randn(2, 5, 64)
    state = whole.encoder.blocks[n].state_dict()
    copied = all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())
    with torch.inference_mode():
        return copied and torch.equal(block.eval()(x), whole.encoder.blocks[n](x))


def arrays_of(whole: VisionTransformer, kind: str) -> dict[str, np.ndarray]:
    """A model's weights as arrays under Google's names, as different files hold them."""
    arrays = jax_arrays(whole, big_vision=kind == "stacked")
    if kind == "state":
        arrays = {f"opt/target/{name}": array for name, array in arrays.items()}
    if kind == "blocks alone":
        arrays = {name: array for name, array in arrays.items() if "encoderblock" in name}
    if kind == "stacked":
        for name in [name for name in arrays if "encoderblock_0" in name]:
            stack = np.stack([arrays.pop(name), arrays.pop(name.replace("_0/", "_1/", 1))])
            arrays[name.replace("encoderblock_0", "encoderblock")] = stack
    return arrays


@pytest.mark.parametrize("kind", ["arrays", "state", "blocks alone", "stacked"])
def test_one_block_of_googles_arrays(tmp_path, kind):
    np.savez(tmp_path / "whole.npz", **jax_arrays(google_model()))
    whole = VisionTransformer.load_from(tmp_path / "whole.npz")
    arrays = arrays_of(google_model(), kind)
    np.savez(tmp_path / "x.npz", **arrays)
    for n in (0, 1):
        block = Block(64, 4, 256, activation="gelu_tanh")
        block.load_from(arrays, n)
        assert same_block(block, whole, n)
        block = Block(64, 4, 256, activation="gelu_tanh")
        with np.load(tmp_path / "x.npz") as file:
            block.load_from(file, n)
        assert same_block(block, whole, n)
    with pytest.raises(CheckpointError, match="no block 2 among"):
        Block(64, 4, 256).load_from(arrays, 2)
    with pytest.raises(CheckpointError, match="Google's arrays: not readable"):
        Block(64, 4, 256).load_from(file, 0)  # it is closed


def save_own(path):
    own_checkpoint(path, google_model(), num_heads=4, activation="gelu_tanh")


def save_timm(path):
    path.mkdir()
    changes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 4}
    model = timm_model(**changes, act_layer="gelu_tanh")
    timm.models.save_for_hf(model, path, safe_serialization=True)


def save_hf(path):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256}
    hf_model(**sizes, hidden_act="gelu_new", layer_norm_eps=1e-6).save_pretrained(path)


def save_npz(path):
    with open(path, "wb") as file:
        np.savez(file, **jax_arrays(google_model()))


@pytest.mark.parametrize("save", [save_own, save_timm, save_hf, save_npz])
@pytest.mark.parametrize("kind", [str, Path])
def test_one_block_of_a_file(tmp_path, save, kind):
    save(tmp_path / "x")
    whole = VisionTransformer.load_from(tmp_path / "x")
    for n in (0, 1):
        block = Block(64, 4, 256, activation="gelu_tanh")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            block.load_from(kind(tmp_path / "x"), n)
        assert same_block(block, whole, n)
    with pytest.raises(CheckpointError, match=r"block 2: weights of another model") as caught:
        block.load_from(tmp_path / "x", 2)
    assert str(caught.value).startswith(str(tmp_path / "x"))
    with pytest.raises(CheckpointError, match="no readable file"):
        block.load_from(tmp_path / "missing", 0)


def test_a_block_with_other_settings(tmp_path):
    """The shapes would fit, but it would compute something else."""
    arrays = jax_arrays(google_model())
    block = Block(64, 2, 256)
    before = block.state_dict()["mlp.fc1.weight"].clone()
    with pytest.raises(CheckpointError, match="block 0: num_heads is 4 there, 2 in the block"):
        block.load_from(arrays, 0)
    assert torch.equal(block.mlp.fc1.weight, before)
    with pytest.warns(UserWarning, match="block 0: trained with activation=gelu_tanh"):
        Block(64, 4, 256).load_from(arrays, 0)
    save_npz(tmp_path / "x")
    with pytest.warns(UserWarning, match="block 0: trained with layer_norm_eps=1e-06"):
        Block(64, 4, 256, "gelu_tanh", layer_norm_eps=1e-5).load_from(tmp_path / "x", 0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "block 0: weights of another model: .* is missing"),
        ({"encoder.blocks.0.norm1.weight": np.zeros(64)}, "block 0: must be of tensors"),
        ({"Transformer/encoderblock_0/LayerNorm_0/scale": np.zeros(64)}, "block 0: .* is missing"),
        ({"Transformer/encoderblock_0/wings": np.zeros(64)}, "no part for .*wings"),
        ({"Transformer/encoderblock/LayerNorm_0/scale": np.zeros(())}, "not readable"),
    ],
    ids=range(5),
)
def test_what_is_no_block_is_refused(weights, message):
    with pytest.raises(CheckpointError, match=message):
        Block(64, 4, 256).load_from(weights, 0)


def test_a_model_is_built_in_evaluation_mode(tmp_path):
    save_file(timm_model().state_dict(), tmp_path / "x")
    model = VisionTransformer.load_from(tmp_path / "x")
    assert not model.training
    assert not hasattr(model, "classes")  # the file states neither
    assert not hasattr(model, "preprocessing")
    assert VisionTransformer.load_from(tmp_path / "x", num_classes=9).head.out_features == 9


def test_settings_that_come_with_weights_are_arguments_of_the_model():
    assert set(MODEL_SETTINGS_OF_WEIGHTS) <= set(VisionTransformer.__init__.__kwdefaults__)


@pytest.mark.parametrize("safe", [True, False])
def test_a_model_in_several_files(tmp_path, safe):
    """Hugging Face's shards: an index lists which file has which tensors."""
    theirs = hf_model().state_dict()
    names = sorted(theirs)
    kind, ending = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    table = {}
    for number, inside in enumerate((names[::2], names[1::2])):
        shard = f"{kind}-0000{number}-of-00002.{ending}"
        table |= dict.fromkeys(inside, shard)
        tensors = {name: theirs[name] for name in inside}
        (save_file if safe else torch.save)(tensors, tmp_path / shard)
    index = tmp_path / f"{kind}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    config = {"model_type": "vit", "num_attention_heads": 3, "image_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))

    save_file(theirs, tmp_path / "whole")
    weights, whole = read(tmp_path), read(tmp_path / "whole")
    assert weights.model["num_heads"] == 3
    assert weights.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(weights.tensors[name], whole.tensors[name]) for name in whole.tensors)

    other = dict(table)
    other[names[0]] = table[names[1]]
    index.write_text(json.dumps({"weight_map": other}))
    with pytest.raises(CheckpointError, match=f"they differ in {names[0]}"):
        read(tmp_path)
    index.write_text(json.dumps({"weight_map": table}))
    (tmp_path / table[names[1]]).unlink()
    with pytest.raises(CheckpointError, match="no readable file"):
        read(tmp_path)
