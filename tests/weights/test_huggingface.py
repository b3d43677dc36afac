"""Weights and folders of Hugging Face: loaded here they give the logits they give there."""

import json

import pytest
import torch
from foreign_models import SIZES, TOLERANCE, difference, hf_model, images
from safetensors.torch import load_file, save_file
from transformers import ViTModel

from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError
from vit.model.vision_transformer import VisionTransformer
from vit.weights.loading import build, read


@pytest.mark.parametrize("patch", [16, 32])
@pytest.mark.parametrize("size", SIZES)
def test_the_same_logits(tmp_path, size, patch):
    theirs = hf_model(size, patch)
    theirs.save_pretrained(tmp_path)
    ours = VisionTransformer.load_from(tmp_path)
    assert difference(ours, theirs) < TOLERANCE
    assert ours.encoder.norm.eps == 1e-12


def test_the_names_of_today_and_other_settings(tmp_path):
    theirs = hf_model(
        hidden_act="gelu_new", layer_norm_eps=1e-3, qkv_bias=False, id2label={0: "cat", 1: "dog"}
    )
    theirs.save_pretrained(tmp_path)
    # save_pretrained writes the older names
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    assert "vit.layers.0.attention.q_proj.weight" in load_file(tmp_path / "model.safetensors")
    ours = build(tmp_path)
    assert difference(ours, theirs) < TOLERANCE
    assert ours.classes == ["cat", "dog"]
    assert ours.encoder.blocks[0].attention.query.bias is None


def test_placeholders_are_no_class_names(tmp_path):
    hf_model().save_pretrained(tmp_path)
    assert read(tmp_path).classes is None


def test_a_model_with_a_pooler_and_no_head(tmp_path):
    theirs = hf_model(kind=ViTModel, pooler_output_size=48)
    theirs.save_pretrained(tmp_path)
    ours = build(tmp_path, num_classes=3)
    with torch.inference_mode():
        trace, outputs = ours.trace(images()), theirs(images())
    assert (trace.pooled - outputs.pooler_output).abs().max() < TOLERANCE
    assert not trace.logits.any()  # a new head is zero
    with pytest.raises(CheckpointError, match="holds no head; give num_classes"):
        build(tmp_path)


def test_what_masked_image_modeling_adds_is_left_over(tmp_path):
    theirs = hf_model()
    surplus = {"vit.embeddings.mask_token": torch.zeros(1), "decoder.0.bias": torch.zeros(1)}
    save_file(theirs.state_dict() | surplus, tmp_path / "x")
    assert set(read(tmp_path / "x").left_over) == surplus.keys()


def test_the_preprocessing_of_a_model_alone_is_hugging_faces_default(tmp_path):
    hf_model().save_pretrained(tmp_path)
    expected = Preprocessing((64, 64), 3, (0.5,) * 3, (0.5,) * 3, None, "bilinear")
    assert read(tmp_path).preprocessing == expected


CROP = {"do_center_crop": True, "crop_size": {"height": 64, "width": 64}}
RGB = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
HALF = ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"size": {"shortest_edge": 80}, **CROP, "resample": 3, **RGB},
            Preprocessing((64, 64), 3, (0.1, 0.2, 0.3), (1, 2, 3), 0.8, "bicubic"),
        ),
        (
            {"size": {"shortest_edge": 80}, "do_center_crop": True, "crop_size": 64},
            Preprocessing((64, 64), 3, *HALF, 0.8, "bilinear"),
        ),
        ({"size": 48}, Preprocessing((48, 48), 3, *HALF, None, "bilinear")),
        (
            {"size": {"height": 48, "width": 64}, "do_normalize": False},
            Preprocessing((48, 64), 3, (0.0,), (1.0,), None, "bilinear"),
        ),
    ],
    ids=["crop", "crop by one number", "squash", "not normalized"],
)
def test_the_preprocessing_is_read(tmp_path, config, expected):
    hf_model().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert read(tmp_path).preprocessing == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not readable as JSON"),
        ('{"resample": 0}', "resample"),
        ('{"do_resize": false}', "resize"),
        ('{"size": {"shortest_edge": 80}}', "give height and width"),
        ('{"size": 64, "do_center_crop": true}', "shortest_edge"),
        (
            '{"size": {"shortest_edge": 80}, "do_center_crop": true, '
            '"crop_size": {"height": 64, "width": 48}}',
            "square crop_size",
        ),
    ],
)
def test_a_preprocessing_that_is_not_ours_is_refused(tmp_path, config, message):
    hf_model().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: .*{message}"):
        read(tmp_path)


@pytest.mark.parametrize("change", [{"hidden_act": "tanh"}, {"pooler_act": "relu"}], ids=str)
def test_settings_that_are_not_ours_are_refused(tmp_path, change):
    hf_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"config\.json: hidden_act .* pooler_act"):
        read(tmp_path)
