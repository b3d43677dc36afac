"""Weights and folders of Hugging Face: loaded here they give the logits they give there."""

import json

import pytest
import torch
from foreign_models import SIZES, TOLERANCE, difference, hf_model, images
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel, ViTMSNConfig, ViTMSNForImageClassification

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
        ('{"do_flip_channel_order": true}', "do_flip_channel_order"),
        ('{"do_pad": true}', "do_pad"),
        ('{"crop_pct": 0.9}', "crop_pct"),
        ('{"do_rescale": false}', "rescale"),
        ('{"rescale_factor": 0.00784}', "rescale_factor"),
        ('{"image_mean": [0.5, 0.5]}', "image_mean"),
        # Of wrong types
        ("[]", "instead of a JSON object"),
        ('{"size": "224"}', "size"),
        ('{"size": {"height": "64", "width": 64}}', "height"),
        ('{"do_resize": "yes"}', "do_resize"),
        ('{"do_pad": "no"}', "do_pad"),
        ('{"resample": "bicubic"}', "resample"),
        ('{"image_std": 0.5}', "image_std"),
        ('{"do_center_crop": true, "crop_size": [1, 2, 3]}', "crop_size"),
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


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("change", [{"hidden_act": "tanh"}, {"pooler_act": "relu"}], ids=str)
def test_settings_that_are_not_ours_are_refused(tmp_path, change):
    hf_model().save_pretrained(tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(CheckpointError, match=r"config\.json: hidden_act .* pooler_act"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", 5),
        ("model_type", "dinov3_vit"),
        ("num_attention_heads", "twelve"),
        ("num_attention_heads", -3),
        ("hidden_act", ["gelu"]),
        ("layer_norm_eps", "1e-12"),
        ("image_size", [64, 64, 64]),
        ("image_size", {"height": 64}),
        ("qkv_bias", 1),
        ("hidden_size", 192.0),
        ("id2label", ["cat"]),
        ("id2label", {"first": "cat"}),
    ],
    ids=str,
)
def test_fields_of_wrong_types_are_named(tmp_path, key, value):
    hf_model().save_pretrained(tmp_path)
    change_config(tmp_path, **{key: value})
    message = "dinov3_vit" if value == "dinov3_vit" else f"{key} must be"
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "value", "ours"),
    [
        ("num_hidden_layers", 1, "num_layers"),
        ("hidden_size", 768, "hidden_size"),
        ("patch_size", 8, "patch_size"),
        ("num_channels", 1, "num_channels"),
        ("qkv_bias", False, "qkv_bias"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, theirs, value, ours):
    """Hugging Face would leave out layers without a word."""
    hf_model().save_pretrained(tmp_path)
    change_config(tmp_path, **{theirs: value})
    with pytest.raises(CheckpointError, match=rf"safetensors: {ours} is .* stated as .*{value}"):
        read(tmp_path)


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    hf_model().save_pretrained(tmp_path)
    change_config(tmp_path, num_attention_heads=5)
    with pytest.raises(CheckpointError, match=r"safetensors: no model fits .*num_heads"):
        read(tmp_path)


def test_what_a_config_leaves_out_is_as_in_their_class(tmp_path):
    hf_model(kind=ViTMSNForImageClassification).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit_msn", "image_size": 64}')
    model = read(tmp_path).model
    assert model["layer_norm_eps"] == ViTMSNConfig().layer_norm_eps == 1e-6
    assert model["num_heads"] == ViTMSNConfig().num_attention_heads
    (tmp_path / "config.json").write_text('{"model_type": "vit", "image_size": 64}')
    assert read(tmp_path).model["layer_norm_eps"] == ViTConfig().layer_norm_eps == 1e-12


def test_a_file_alone_is_taken_for_a_vit(tmp_path):
    save_file(hf_model().state_dict(), tmp_path / "x")
    weights = read(tmp_path / "x")
    assert weights.model["layer_norm_eps"] == 1e-12
    assumed = {"num_heads", "layer_norm_eps", "activation", "global_pool", "image_size"}
    assert set(weights.assumed) == assumed
    assert all("Hugging Face's ViT" in line for line in weights.assumptions())


def test_a_part_that_is_there_twice_is_refused(tmp_path):
    state = hf_model().state_dict()
    surplus = {"embeddings.cls_token": torch.zeros(1, 1, 192)}
    save_file(state | surplus, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"x: holds embeddings\.cls_token twice"):
        read(tmp_path / "x")
