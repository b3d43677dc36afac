"""What tensors alone say about their model, and what formats can express of it."""

from pathlib import Path

import pytest
import torch
from foreign_models import own_model

from vit.errors import CheckpointError
from vit.model.vision_transformer import VisionTransformer
from vit.weights.description import Weights, describe, with_learned_positions

PATH = Path("some.file")
POSITIONS = "embeddings.position_embedding"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_size": 48, "patch_size": 6},
        {"cls_position": False},
        {"cls_token": False, "global_pool": "mean"},
        {"num_registers": 3},
        {"representation_size": 12},
        {"qkv_bias": False},
        {"qk_norm": True, "num_heads": 4},
        {"layer_scale": 1e-5},
        {"num_channels": 1},
        {"hidden_size": 1152, "num_heads": 16, "num_layers": 1},
        {"resnet_stages": [1, 2], "patch_size": 8},
        {"conv_stem": [16, 32], "conv_stem_strides": [2, 2], "num_channels": 1},
    ],
    ids=str,
)
def test_the_model_is_known_from_its_tensors(changes):
    with torch.device("meta"):
        arguments = {
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 1,
            "num_classes": 5,
            **changes,
        }
        tensors = VisionTransformer(**arguments).state_dict()
        described, assumed = describe(tensors, PATH, {})
        again = VisionTransformer(**described)
    assert {key: described[key] for key in arguments} == arguments
    expected = {name: tensor.shape for name, tensor in tensors.items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == expected
    assert ("num_heads" in assumed) == ("qk_norm" not in changes)
    assert {"layer_norm_eps", "activation"} <= set(assumed)


def test_what_the_file_states_wins_and_is_not_assumed():
    known = {
        "num_heads": 4,
        "activation": "relu",
        "layer_norm_eps": 1e-3,
        "global_pool": "mean",
        "fc_norm": True,
        "image_size": 32,
    }
    described, assumed = describe(own_model().state_dict(), PATH, known)
    assert {key: described[key] for key in known} == known
    assert assumed == ()


def test_without_positions_only_a_statement_tells_what_they_are():
    tensors = own_model(position="none").state_dict()
    with pytest.raises(CheckpointError, match=r"some.file: holds no positions"):
        describe(tensors, PATH, {})
    with pytest.raises(CheckpointError, match=r"some.file: holds no positions"):
        describe(tensors, PATH, {"position": "learned"})
    with pytest.raises(CheckpointError, match=r"holds learned positions but states position=none"):
        describe(own_model().state_dict(), PATH, {"position": "none"})
    described, assumed = describe(tensors, PATH, {"position": "none"})
    assert described["image_size"] == 224
    assert "image_size" in assumed
    described, assumed = describe(tensors, PATH, {"position": "rope2d", "image_size": 32})
    assert described["position"] == "rope2d"
    assert "image_size" not in assumed


def test_the_positions_of_an_oblong_image_need_its_size():
    tensors = own_model(image_size=(32, 48)).state_dict()
    described, _ = describe(tensors, PATH, {"image_size": [32, 48]})
    assert described["image_size"] == [32, 48]
    assert described["cls_position"] is True
    with pytest.raises(
        CheckpointError, match=r"some.file: 25 positions fit .* 8x8 px in \[16, 16\]"
    ):
        describe(tensors, PATH, {"image_size": [16, 16]})
    tensors[POSITIONS] = torch.zeros(1, 24, 64)
    with pytest.raises(CheckpointError, match=r"some.file: 24 positions fit .* config.json"):
        describe(tensors, PATH, {})


def test_a_position_for_a_class_token_that_is_not_there_is_refused():
    tensors = own_model().state_dict()
    del tensors["embeddings.cls_token"]
    with pytest.raises(CheckpointError, match=r"some.file: 17 positions fit no grid"):
        describe(tensors, PATH, {})


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.patch_embedding.projection.weight",
        "encoder.norm.weight",
        "encoder.blocks.0.mlp.fc1.weight",
        "encoder.blocks.0.attention.query.weight",
    ],
)
def test_missing_parts_are_named(name):
    tensors = own_model().state_dict()
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"some.file: {name} missing"):
        describe(tensors, PATH, {})


@pytest.mark.parametrize(
    ("key", "stated"),
    [
        ("hidden_size", 128),
        ("num_layers", 1),
        ("intermediate_size", 128),
        ("patch_size", [8, 4]),
        ("num_channels", 1),
        ("qkv_bias", False),
        ("qk_norm", True),
        ("cls_token", False),
        ("num_registers", 1),
        ("resnet_stages", [2]),
        ("conv_stem", [16]),
        ("representation_size", 64),
    ],
)
def test_what_is_stated_must_not_contradict_the_tensors(key, stated):
    tensors = own_model().state_dict()
    with pytest.raises(CheckpointError, match=f"some.file: {key} is .* stated as "):
        describe(tensors, PATH, {key: stated})
    described, _ = describe(tensors, PATH, {})
    assert describe(tensors, PATH, {"patch_size": [8, 8], "resnet_stages": []})[0] is not None
    assert described["patch_size"] == 8


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.patch_embedding.projection.weight",
        "embeddings.position_embedding",
        "encoder.blocks.0.attention.query.weight",
        "encoder.blocks.0.mlp.fc1.weight",
        "head.weight",
    ],
)
def test_tensors_of_other_dimensions_are_refused(name):
    tensors = own_model().state_dict()
    for shape in ((), (3,), (2, 2, 2, 2, 2)):
        wrong = tensors | {name: torch.zeros(shape)}
        with pytest.raises(CheckpointError, match=f"some.file: {name} .* instead of"):
            describe(wrong, PATH, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"gated_mlp": True, "activation": "silu"},
        {"distill_token": True},
        {"pre_norm": True},
        {"global_pool": "map", "cls_token": False},
        {"global_pool": "cls_mean"},
    ],
    ids=str,
)
def test_parts_are_seen_in_the_tensors(changes):
    described, _ = describe(own_model(**changes).state_dict(), PATH, {})
    assert {key: described[key] for key in changes} == changes
    assert described["intermediate_size"] == 256


def test_settings_that_were_assumed_are_told_with_the_architecture():
    described, assumed = describe(own_model().state_dict(), PATH, {}, layer_norm_eps=1e-5)
    weights = Weights(PATH, "test", {}, described, assumed, convention="their ViT")
    expected = "layer_norm_eps=1e-05 is assumed, as in their ViT; the file doesn't state it"
    assert expected in weights.assumptions()
    assert len(weights.assumptions()) == len(assumed) == 5


def test_a_resnet_without_units_is_refused():
    tensors = own_model().state_dict()
    tensors["embeddings.patch_embedding.stem.conv.weight"] = torch.zeros(64, 3, 7, 7)
    with pytest.raises(CheckpointError, match=r"some.file: a hybrid .*root alone"):
        describe(tensors, PATH, {})


def test_the_strides_of_convolutions_are_stated_or_assumed():
    tensors = own_model(conv_stem=[16, 32], conv_stem_strides=[1, 2]).state_dict()
    described, assumed = describe(tensors, PATH, {"conv_stem_strides": [1, 2]})
    assert described["patch_size"] == 8
    assert described["conv_stem_strides"] == [1, 2]
    assert "conv_stem_strides" not in assumed
    described, assumed = describe(tensors, PATH, {})
    assert described["patch_size"] == 16
    assert described["conv_stem_strides"] == [2, 2]
    assert "conv_stem_strides" in assumed
    for strides in ([2], [1, 3], "[1, 2]"):
        with pytest.raises(
            CheckpointError, match=r"some.file: conv_stem_strides .* 2 convolutions"
        ):
            describe(tensors, PATH, {"conv_stem_strides": strides})
    name = "embeddings.patch_embedding.stem.layers.1.conv.weight"
    with pytest.raises(CheckpointError, match=f"some.file: {name} .* instead of 4-dimensional"):
        describe(tensors | {name: torch.zeros(())}, PATH, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "sincos2d"},
        {"position": "sincos1d", "cls_token": False, "global_pool": "mean"},
        {"position": "none"},
        {"cls_position": False},
    ],
    ids=str,
)
def test_learned_positions_compute_the_same(changes):
    model = own_model(**changes)
    known = {"image_size": 32, "num_heads": 1, **changes}
    described, _ = describe(model.state_dict(), PATH, known)
    weights = Weights(PATH, "test", model.state_dict(), described)
    same = with_learned_positions(weights, "test", "global_pool", "cls_token")
    assert same.model["position"] == "learned"
    learned = VisionTransformer(**same.model).eval()
    learned.load_state_dict(same.tensors)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(learned(images), model(images), atol=1e-5, rtol=1e-5)
