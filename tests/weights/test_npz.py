"""Google's .npz: as timm loads them, and what timm doesn't load."""

import numpy as np
import pytest
import torch
from foreign_models import SIZES, TOLERANCE, difference, jax_arrays, own_model, timm_model

from vit.errors import CheckpointError
from vit.model.vision_transformer import VisionTransformer
from vit.weights.loading import build, load_into, read
from vit.weights.npz import to_jax, to_torch


@pytest.mark.parametrize("patch", [16, 32])
@pytest.mark.parametrize("size", SIZES)
def test_vit_jax_as_timm_loads_it(tmp_path, size, patch):
    path, (width, heads) = tmp_path / "weights.npz", SIZES[size]
    ours = own_model(
        image_size=64, patch_size=patch, hidden_size=width, num_heads=heads, activation="gelu_tanh"
    )
    np.savez(path, **jax_arrays(ours))
    theirs = timm_model(
        "vit_base_patch16_224",
        patch_size=patch,
        embed_dim=width,
        num_heads=heads,
        act_layer="gelu_tanh",
    )
    theirs.load_pretrained(str(path))
    loaded = build(path)
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert difference(loaded, theirs) < TOLERANCE


def test_a_hybrid_as_timm_loads_it(tmp_path):
    path = tmp_path / "hybrid.npz"
    sizes = {"hidden_size": 192, "num_heads": 3, "num_layers": 1}
    ours = own_model(image_size=64, patch_size=16, resnet_stages=[3, 4, 9], **sizes)
    np.savez(path, **jax_arrays(ours))
    theirs = timm_model(
        "vit_base_r50_s16_224", depth=1, embed_dim=192, num_heads=3, act_layer="gelu_tanh"
    )
    theirs.load_pretrained(str(path))
    weights = read(path)
    assert weights.model["resnet_style"] == "jax"
    loaded = VisionTransformer(**{**weights.model, "resnet_style": "timm"})
    report = load_into(loaded, weights)
    assert "trained with resnet_style=jax, the model has timm" in report.notes
    assert difference(loaded.eval(), theirs) < TOLERANCE


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
def test_big_vision(tmp_path, prefix):
    ours = own_model(
        cls_token=False,
        global_pool="mean",
        position="sincos2d",
        representation_size=64,
        image_size=224,
        patch_size=56,
        activation="gelu_tanh",
    )
    arrays = {prefix + name: array for name, array in jax_arrays(ours, big_vision=True).items()}
    state = {"opt/0/count": np.zeros(1, np.float32)} if prefix else {}
    np.savez(tmp_path / "s16.npz", **arrays, **state)
    assert difference(build(tmp_path / "s16.npz"), ours, 224) == 0
    assert read(tmp_path / "s16.npz").left_over == tuple(state)
    arrays[prefix + "MAPHead_0/probe"] = np.zeros((1, 1, 64), np.float32)
    np.savez(tmp_path / "map.npz", **arrays)
    with pytest.raises(CheckpointError, match=r"map\.npz: pools by attention"):
        read(tmp_path / "map.npz")


def test_big_visions_stacked_blocks_and_folded_cls_position(tmp_path):
    ours = own_model(cls_position=False, activation="gelu_tanh")
    arrays = jax_arrays(ours, big_vision=True)
    for name in [name for name in arrays if "encoderblock_0" in name]:
        stack = np.stack([arrays.pop(name), arrays.pop(name.replace("_0/", "_1/", 1))])
        arrays[name.replace("encoderblock_0", "encoderblock")] = stack
    np.savez(tmp_path / "a.npz", **arrays)
    assert difference(build(tmp_path / "a.npz"), ours, 32) == 0

    # In older files the class token has a position, which big_vision adds to it when it loads them
    position = np.full((1, 1, 64), 0.25, np.float32)
    arrays["cls"] = arrays["cls"] - position
    arrays["pos_embedding"] = np.concatenate([position, arrays["pos_embedding"]], axis=1)
    np.savez(tmp_path / "b.npz", **arrays)
    assert difference(build(tmp_path / "b.npz"), ours, 32) < TOLERANCE


def test_bfloat16(tmp_path):
    ours = own_model(activation="gelu_tanh").bfloat16().float()
    arrays = jax_arrays(ours)
    kernel = torch.from_numpy(np.ascontiguousarray(arrays["head/kernel"])).bfloat16()
    arrays["head/kernel"] = kernel.view(torch.int16).numpy().view("V2")  # as numpy reads jax's
    np.savez(tmp_path / "x.npz", **arrays)
    assert difference(build(tmp_path / "x.npz"), ours, 32) == 0


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("embedding/kernel", np.zeros(3, np.float32)),
        ("head/kernel", np.zeros((), np.float32)),
        ("Transformer/encoder_norm/scale", np.array("text")),
        ("Transformer/encoder_norm/scale", np.ones(64, np.int8)),
        ("Transformer/encoder_norm/scale", np.zeros((64, 3), "V3")),
        # A query without an axis of heads would be one of 64 heads
        (
            "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel",
            np.zeros((64, 64), np.float32),
        ),
        (
            "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel",
            np.zeros((64, 2, 32), np.float32),
        ),
        (
            "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel",
            np.zeros(64, np.float32),
        ),
        (
            "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel",
            np.zeros(64, np.float32),
        ),
        ("Transformer/encoderblock_0/LayerNorm_1/scale", np.zeros(64, np.float32)),
    ],
    ids=range(10),
)
def test_arrays_that_are_not_googles_are_refused(tmp_path, name, array):
    np.savez(tmp_path / "x.npz", **(jax_arrays(own_model()) | {name: array}))
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "x.npz")
    assert str(caught.value).startswith(str(tmp_path / "x.npz"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("head/kernel", (12, 5)),
        ("embedding/kernel", (4, 4, 3, 12)),
        ("Transformer/encoder_norm/scale", (12,)),
        ("block1/unit1/gn1/scale", (1, 1, 1, 12)),
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel", (12, 3, 4)),
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/bias", (3, 4)),
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel", (3, 4, 12)),
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/bias", (12,)),
        ("cls", (1, 1, 12)),
    ],
)
def test_layouts_come_back_as_they_were(name, shape):
    array = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    there = to_torch(torch.from_numpy(array), name)
    assert there.is_contiguous()
    assert np.array_equal(to_jax(there, name, num_heads=3), array)
