"""Weights of any format: the format is recognized, and a model is built for them."""

import pytest
import torch
from foreign_models import TOLERANCE, timm_model
from safetensors.torch import save_file

from vit.config.resume import MODEL_SETTINGS_OF_WEIGHTS
from vit.errors import CheckpointError
from vit.model.vision_transformer import Block, VisionTransformer
from vit.weights.loading import build, read


def test_unknown_names_are_listed(tmp_path):
    path, state = tmp_path / "x", timm_model().state_dict()
    surplus = {"dist_token": torch.zeros(1), "norm_pre.weight": torch.zeros(1)}
    save_file(state | surplus, path)
    with pytest.raises(
        CheckpointError, match=r"no part for dist_token, norm_pre\.weight"
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


def test_a_model_is_built_in_evaluation_mode(tmp_path):
    save_file(timm_model().state_dict(), tmp_path / "x")
    model = VisionTransformer.load_from(tmp_path / "x")
    assert not model.training
    assert not hasattr(model, "classes")  # the file states neither
    assert not hasattr(model, "preprocessing")
    assert VisionTransformer.load_from(tmp_path / "x", num_classes=9).head.out_features == 9


def test_settings_that_come_with_weights_are_arguments_of_the_model():
    assert set(MODEL_SETTINGS_OF_WEIGHTS) <= set(VisionTransformer.__init__.__kwdefaults__)
