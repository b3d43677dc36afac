"""Weights put into a model of other sizes, and the report of it."""

import numpy as np
import pytest
import timm
import torch
from foreign_models import (
    TOLERANCE,
    difference,
    hf_model,
    jax_arrays,
    own_model,
    timm_model,
    torchvision_model,
)
from safetensors.torch import save_file

from vit.errors import CheckpointError
from vit.model.vision_transformer import VisionTransformer
from vit.weights.fitting import adapt_channels
from vit.weights.loading import load_into, read

HEAD = ["head.weight", "head.bias"]
POOLER = ["pooler.dense.weight", "pooler.dense.bias"]


@pytest.fixture
def saved(tmp_path):
    """(path of timm weights at 64 px with 5 classes, their state_dict)."""
    state = timm_model().state_dict()
    save_file(state, tmp_path / "timm")
    return tmp_path / "timm", state


def tiny(**changes) -> VisionTransformer:
    arguments = {
        "image_size": 64,
        "patch_size": 16,
        "hidden_size": 192,
        "num_layers": 2,
        "num_heads": 3,
        "num_classes": 5,
        **changes,
    }
    return VisionTransformer(**arguments)  # pyright: ignore


def test_positions_and_channels_are_resized_and_the_head_starts_anew(saved):
    path, state = saved
    model = tiny(image_size=96, num_channels=1, num_classes=7)
    report = load_into(model, read(path))
    assert report.fresh == HEAD == report.left_over
    assert not model.head.weight.any()
    kernel = state["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    assert torch.equal(model.embeddings.patch_embedding.projection.weight, kernel)
    positions = timm.layers.resample_abs_pos_embed(state["pos_embed"], [6, 6], num_prefix_tokens=1)
    assert torch.allclose(model.embeddings.position_embedding, positions, atol=1e-6)


def test_an_oblong_that_was_taken_for_a_square_is_not_resized(tmp_path):
    """The number of positions doesn't tell 4 × 9 patches from 6 × 6."""
    theirs = own_model(image_size=(32, 72))
    save_file(theirs.state_dict(), tmp_path / "bare")
    weights = read(tmp_path / "bare")
    assert weights.model["image_size"] == 48
    assert "image_size" in weights.assumed
    ours = VisionTransformer(**{**weights.model, "image_size": (32, 72)}).eval()
    report = load_into(ours, weights)
    assert report.resized == []
    assert any("image_size=48 is assumed" in note for note in report.notes)
    batch = torch.randn(2, 3, 32, 72)
    assert torch.equal(ours(batch), theirs(batch))


def test_the_report_says_what_became_of_the_weights(saved):
    path, _ = saved
    model = tiny(image_size=96, num_channels=1, num_classes=7, layer_norm_eps=1e-5)
    report = load_into(model, read(path))
    lines = str(report).split("\n")
    assert lines[0] == f"{path} (timm): {len(report.used)} tensors used"
    assert set(report.used) == model.state_dict().keys() - set(HEAD)
    assert "position_embedding from 4x4 to 6x6" in lines[1]
    assert "from 3 to 1 channels" in lines[1]
    assert lines[2] == "  newly initialized: head.weight, head.bias"
    assert lines[3] == "  not used: head.weight, head.bias"
    notes = "\n".join(lines[4:])
    assert "num_heads=3 is assumed" in notes
    assert "trained with layer_norm_eps=1e-06, the model has 1e-05" in notes


def test_settings_that_change_what_is_computed_are_noted(saved):
    notes = load_into(tiny(activation="relu", global_pool="mean"), read(saved[0])).notes
    assert any("activation=gelu" in note and "ReLU" in note for note in notes)
    assert any("global_pool=cls" in note and "mean" in note for note in notes)
    notes = load_into(tiny(), read(saved[0])).notes
    assert [note for note in notes if "trained with" in note] == []


def test_a_stem_of_convolutions_takes_other_channels_and_notes_other_strides(tmp_path):
    theirs = own_model(conv_stem=[16, 32])
    save_file(theirs.state_dict(), tmp_path / "bare")
    weights = read(tmp_path / "bare")
    sizes = {"patch_size": 4, "image_size": 16, "num_channels": 1}
    ours = VisionTransformer(**{**weights.model, **sizes, "conv_stem_strides": [1, 2]}).eval()
    report = load_into(ours, weights)
    assert "trained with conv_stem_strides=[2, 2], the model has [1, 2]" in report.notes
    assert any("conv_stem_strides=[2, 2] is assumed" in note for note in report.notes)
    kernel = ours.embeddings.patch_embedding.stem.convolutions()[0].weight
    reference = theirs.embeddings.patch_embedding.stem.convolutions()[0].weight
    torch.testing.assert_close(kernel, reference.sum(dim=1, keepdim=True))


def test_a_class_tokens_position_comes_and_goes(saved):
    path, _ = saved
    without = tiny(cls_position=False)
    load_into(without, read(path))
    assert difference(without.eval(), timm_model()) < TOLERANCE

    theirs = timm_model(no_embed_class=True)
    save_file(theirs.state_dict(), path)
    model = tiny()
    load_into(model, read(path))
    assert difference(model.eval(), theirs) < TOLERANCE


def test_more_channels_repeat_the_kernel_and_keep_its_sum():
    kernel = torch.randn(8, 3, 4, 4)
    wider = adapt_channels(kernel, 5)
    assert wider.shape == (8, 5, 4, 4)
    torch.testing.assert_close(wider, kernel[:, [0, 1, 2, 0, 1]] * 3 / 5)
    gray = torch.ones(8, 1, 4, 4)
    torch.testing.assert_close(adapt_channels(gray, 3).sum(1), gray.sum(1))


def test_a_head_of_other_classes_starts_anew(tmp_path):
    theirs = hf_model(id2label={0: "cat", 1: "dog"})
    theirs.save_pretrained(tmp_path)
    model = tiny(num_classes=2)
    assert load_into(model, read(tmp_path)).fresh == []
    assert load_into(model, read(tmp_path), ["cat", "dog"]).fresh == []
    assert load_into(model, read(tmp_path), ["dog", "cat"]).fresh == HEAD


def test_a_pooler_is_left_out_with_the_head_only(tmp_path):
    torch.save(torchvision_model(representation_size=48).state_dict(), tmp_path / "x.pth")
    weights = read(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="pooler"):
        load_into(tiny(), weights)
    assert load_into(tiny(num_classes=3), weights).left_over == HEAD + POOLER
    report = load_into(tiny(num_classes=3, representation_size=48), weights)
    assert report.fresh == HEAD
    report = load_into(tiny(num_classes=3, representation_size=24), weights)
    assert report.fresh == HEAD + POOLER


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, "num_layers is 2 in the file, 3 in the model"),
        ({"hidden_size": 384}, "hidden_size is 192 in the file, 384 in the model"),
        (
            {"patch_size": 32},
            r"projection.weight is \(192, 3, 16, 16\), the model's \(192, 3, 32, 32\)",
        ),
        ({"num_registers": 1}, "embeddings.registers is missing"),
        ({"qkv_bias": False}, "query.bias is no part of the model"),
    ],
    ids=str,
)
def test_another_model_is_refused_and_left_alone(saved, changes, message):
    path, _ = saved
    model = tiny(**changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_into(model, read(path))
    assert str(caught.value).startswith(str(path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_heads_that_the_file_states_must_agree(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **jax_arrays(own_model(hidden_size=192, num_heads=6)))
    with pytest.raises(CheckpointError, match="num_heads is 6 in the file, 3 in the model"):
        load_into(tiny(image_size=32, patch_size=8), read(path))
