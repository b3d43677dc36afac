"""Hugging Face's models beside ViT, of every size's parts: what the table's examples leave out."""

import json

import pytest
import torch
import transformers
from foreign_models import TOLERANCE, images, shaken
from transformers import (
    CLIPConfig,
    CLIPModel,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
)

from vit.errors import CheckpointError
from vit.model.vision_transformer import VisionTransformer
from vit.weights.config_file import read_config
from vit.weights.huggingface import preprocessing_of
from vit.weights.loading import build, load_into, read

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
SIZES_OF_DINOV3 = SIZES | {"intermediate_size": 256, "num_register_tokens": 4}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def changed(folder, file: str, **changes) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def loaded(folder) -> VisionTransformer:
    """The model of a folder, with a head of zeros where it has none."""
    weights = read(folder)
    model = VisionTransformer(**{"num_classes": 2, **weights.model}).eval()
    load_into(model, weights)
    return model


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        # DINOv2's giant, DINOv3's S+, H+ and 7B
        ("Dinov2Model", Dinov2Config(**SIZES, use_swiglu_ffn=True)),
        (
            "Dinov2WithRegistersModel",
            Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4, use_swiglu_ffn=True),
        ),
        (
            "DINOv3ViTModel",
            DINOv3ViTConfig(**SIZES_OF_DINOV3, use_gated_mlp=True, hidden_act="silu"),
        ),
        (
            "DINOv3ViTModel",
            DINOv3ViTConfig(
                **SIZES_OF_DINOV3,
                use_gated_mlp=True,
                hidden_act="silu",
                query_bias=False,
                value_bias=False,
            ),
        ),
        ("DINOv3ViTModel", DINOv3ViTConfig(**SIZES_OF_DINOV3)),
    ],
    ids=str,
)
def test_features(tmp_path, kind, config):
    theirs = shaken(getattr(transformers, kind)(config))
    theirs.save_pretrained(tmp_path)
    trace = loaded(tmp_path).trace(images())
    with torch.inference_mode():
        features = theirs(images()).last_hidden_state
    assert (trace.sequence - features).abs().max() < TOLERANCE


@pytest.mark.parametrize(("kind", "config"), [(CLIPModel, CLIPConfig), (SiglipModel, SiglipConfig)])
def test_the_image_tower_of_a_file_with_both(tmp_path, kind, config):
    vision = {**SIZES, "intermediate_size": 256}
    theirs = shaken(kind(config(vision_config=vision, text_config=TEXT)))
    theirs.save_pretrained(tmp_path)
    weights = read(tmp_path)
    assert weights.assumed == ()
    assert weights.preprocessing is None  # CLIP's mean is not 0.5
    assert any(name.startswith("text_model.") for name in weights.left_over)
    pooled = loaded(tmp_path).trace(images()).pooled
    with torch.inference_mode():
        expected = theirs.vision_model(images()).pooler_output
    assert (pooled - expected).abs().max() < TOLERANCE


def test_what_a_config_leaves_out(tmp_path):
    """Files of the hub list what differs from the library's defaults."""
    theirs = SiglipModel(
        SiglipConfig(vision_config={"num_hidden_layers": 1}, text_config={**TEXT})
    ).eval()
    theirs.save_pretrained(tmp_path)
    changed(tmp_path, "config.json", vision_config={"model_type": "siglip_vision_model"})
    model = read(tmp_path).model
    stated = {"num_heads": 12, "activation": "gelu_tanh", "layer_norm_eps": 1e-6, "image_size": 224}
    assert {key: model[key] for key in stated} == stated


def test_a_classifier_on_siglip(tmp_path):
    config = SiglipConfig(vision_config={**SIZES, "intermediate_size": 256}, text_config=TEXT)
    config.num_labels = 5
    theirs = shaken(SiglipForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    weights = read(tmp_path)
    assert "vision_model.head.probe" in weights.left_over
    with torch.inference_mode():
        assert (build(tmp_path)(images()) - theirs(images()).logits).abs().max() < TOLERANCE


def test_images_that_whole_patches_do_not_tile(tmp_path):
    """As 384 px and patches of 14 in SigLIP's so400m: its convolution leaves 6 px out."""
    config = SiglipConfig(
        vision_config={**SIZES, "intermediate_size": 256, "image_size": 70}, text_config=TEXT
    )
    theirs = shaken(SiglipModel(config))
    theirs.save_pretrained(tmp_path)
    assert read(tmp_path).model["image_size"] == 64
    with torch.inference_mode():
        expected = theirs.vision_model(images(70)).pooler_output
        pooled = loaded(tmp_path).features(images(70)[..., :64, :64])
    assert (pooled - expected).abs().max() < TOLERANCE


def test_what_is_not_ours_is_refused(tmp_path):
    config = CLIPConfig(vision_config={**SIZES, "intermediate_size": 256}, text_config=TEXT)
    shaken(transformers.CLIPForImageClassification(config)).save_pretrained(tmp_path / "clip")
    with pytest.raises(CheckpointError, match="CLIPForImageClassification can't be loaded"):
        read(tmp_path / "clip")
    config = DINOv3ViTConfig(**SIZES, intermediate_size=256)
    shaken(transformers.DINOv3ViTModel(config)).save_pretrained(tmp_path / "dino")
    changed(tmp_path / "dino", "config.json", rope_theta=10000.0)
    with pytest.raises(CheckpointError, match="rope_theta must be 100, got 10000"):
        read(tmp_path / "dino")
    changed(tmp_path / "dino", "config.json", rope_theta=100.0, hidden_act="mish")
    with pytest.raises(CheckpointError, match=r"hidden_act must be one of .*got mish"):
        read(tmp_path / "dino")
    changed(tmp_path / "dino", "config.json", hidden_act="gelu", num_attention_heads=48)
    with pytest.raises(CheckpointError, match="has no 48 heads"):
        read(tmp_path / "dino")


@pytest.mark.parametrize(
    ("processor", "crop"),
    [
        # As openai/clip-vit-base-patch16 and facebook/deit-base-distilled-patch16-224 have it
        ({"size": 64, "crop_size": 64, "do_center_crop": True, "resample": 3}, 1.0),
        ({"size": 80, "crop_size": 64, "do_center_crop": True, "resample": 3}, 0.8),
        (
            {
                "size": {"height": 80, "width": 80},
                "crop_size": {"height": 64, "width": 64},
                "do_center_crop": True,
                "resample": 3,
            },
            0.8,
        ),
        ({"size": {"height": 64, "width": 64}, "resample": 3}, None),
    ],
)
def test_preprocessing(tmp_path, processor, crop):
    config = DeiTConfig(**SIZES, intermediate_size=256)
    shaken(transformers.DeiTForImageClassification(config)).save_pretrained(tmp_path)
    changed(tmp_path, "preprocessor_config.json", **processor)
    preprocessing = read(tmp_path).preprocessing
    assert preprocessing is not None
    assert (preprocessing.image_size, preprocessing.eval_crop) == ((64, 64), crop)


def test_the_preprocessing_beside_that_of_text(tmp_path):
    """transformers 5 writes a processor of images and text into processor_config.json."""
    config = DeiTConfig(**SIZES, intermediate_size=256)
    shaken(transformers.DeiTForImageClassification(config)).save_pretrained(tmp_path)
    images = {"size": {"height": 64, "width": 64}, "resample": 3, "image_mean": [0.1, 0.2, 0.3]}
    processor = {"image_processor": images, "processor_class": "CLIPProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    preprocessing = read(tmp_path).preprocessing
    assert preprocessing is not None
    assert (preprocessing.mean, preprocessing.interpolation) == ((0.1, 0.2, 0.3), "bicubic")

    # One without images says nothing of them
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIP"}))
    assert read(tmp_path).preprocessing is None


def test_a_center_crop_of_images_of_many_shapes_is_refused(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"size": {"longest_edge": 80}, "do_center_crop": true}')
    with pytest.raises(CheckpointError, match="a center crop needs a size by its shortest_edge"):
        preprocessing_of(read_config(path), {"num_channels": 3}, by_shortest_edge=True)


def test_a_preprocessing_of_smaller_images_than_the_positions(tmp_path):
    """DINOv2's positions are of 518 px, and its preprocessing makes images of 224 px."""
    config = Dinov2Config(**SIZES)
    shaken(transformers.Dinov2Model(config)).save_pretrained(tmp_path)
    crop = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    changed(tmp_path, "preprocessor_config.json", do_center_crop=True, resample=3, **crop)
    model = build(tmp_path, num_classes=3)
    assert model.preprocessing.image_size == (64, 64)
    assert model.preprocessing.eval_crop == 0.8
