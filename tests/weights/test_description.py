"""What tensors alone say about their model, and what formats can express of it."""

from pathlib import Path

import pytest
import torch
from foreign_models import own_model

from vit.errors import CheckpointError
from vit.model.vision_transformer import VisionTransformer
from vit.weights.description import Weights, describe, read_config, with_learned_positions

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
    known = {"num_heads": 4, "activation": "relu", "layer_norm_eps": 1e-3, "global_pool": "mean"}
    described, assumed = describe(own_model().state_dict(), PATH, known)
    assert {key: described[key] for key in known} == known
    assert assumed == ()


def test_without_positions_the_image_size_is_assumed():
    tensors = own_model(position="none").state_dict()
    described, assumed = describe(tensors, PATH, {})
    assert described["position"] == "none"
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


def test_a_resnet_without_units_is_refused():
    tensors = own_model().state_dict()
    tensors["embeddings.patch_embedding.stem.conv.weight"] = torch.zeros(64, 3, 7, 7)
    with pytest.raises(CheckpointError, match=r"some.file: a hybrid .*root alone"):
        describe(tensors, PATH, {})


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


def test_a_config_that_is_not_json_is_refused_and_a_missing_one_is_empty(tmp_path):
    assert read_config(tmp_path / "config.json") == {}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not readable as JSON"):
        read_config(tmp_path / "config.json")
