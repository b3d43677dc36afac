"""Weights and folders of timm: loaded here they give the logits they give there."""

import json

import pytest
import timm
import torch
from foreign_models import TOLERANCE, difference, timm_model
from safetensors.torch import save_file

from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError
from vit.weights.loading import build, read


@pytest.fixture
def folder(tmp_path):
    """A folder as timm saves them for the Hugging Face hub."""
    timm.models.save_for_hf(timm_model(), tmp_path / "timm", safe_serialization=True)
    return tmp_path / "timm"


def change_config(folder, pretrained=(), **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    config["pretrained_cfg"] |= dict(pretrained)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("patch", [16, 32])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_same_logits(tmp_path, size, patch):
    theirs = timm_model(f"vit_{size}_patch16_224", patch_size=patch)
    save_file(theirs.state_dict(), tmp_path / "some.name")
    assert difference(build(tmp_path / "some.name"), theirs) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"reg_tokens": 4},
        {"reg_tokens": 4, "no_embed_class": True},
        {"no_embed_class": True, "init_values": 0.1},
        {"qk_norm": True, "num_heads": 6},
        {"qkv_bias": False},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ],
    ids=str,
)
def test_variants(tmp_path, changes):
    theirs = timm_model(**changes)
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    assert difference(build(tmp_path / "x.pth"), theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "stages"),
    [("vit_small_r26_s32_224", [2, 2, 2, 2]), ("vit_base_r50_s16_224", [3, 4, 9])],
)
def test_hybrids(tmp_path, name, stages):
    theirs = timm_model(name, depth=1)
    save_file(theirs.state_dict(), tmp_path / "x")
    assert read(tmp_path / "x").model["resnet_stages"] == stages
    assert difference(build(tmp_path / "x"), theirs) < TOLERANCE


def test_a_mean_before_the_norm_is_refused(tmp_path):
    save_file(timm_model(global_pool="avg").state_dict(), tmp_path / "x")
    with pytest.raises(CheckpointError, match="fc_norm take the mean before the norm") as caught:
        read(tmp_path / "x")
    assert str(caught.value).startswith(str(tmp_path / "x"))


def test_the_preprocessing_is_read_of_a_folder_alone(folder, tmp_path):
    expected = Preprocessing((64, 64), 3, (0.5,) * 3, (0.5,) * 3, 0.9, "bicubic")
    assert read(folder).preprocessing == expected
    assert read(folder / "model.safetensors").preprocessing == expected
    save_file(timm_model().state_dict(), tmp_path / "bare")
    assert read(tmp_path / "bare").preprocessing is None


def test_a_squash_is_ours_where_it_takes_the_whole_image(folder):
    change_config(folder, pretrained={"crop_mode": "squash", "crop_pct": 1.0})
    assert read(folder).preprocessing.eval_crop is None
    for other in (
        {"crop_mode": "squash", "crop_pct": 0.9},
        {"crop_mode": "border"},
        {"crop_mode": "center", "interpolation": "lanczos"},
    ):
        change_config(folder, pretrained=other)
        assert read(folder).preprocessing is None


def test_what_a_config_states_of_the_model(folder):
    arguments = {"img_size": [64, 64], "num_heads": 6, "act_layer": "gelu_tanh"}
    change_config(folder, model_args=arguments, global_pool="avg", label_names=list("abcde"))
    weights = read(folder)
    stated = {
        "image_size": 64,
        "num_heads": 6,
        "activation": "gelu_tanh",
        "global_pool": "mean",
    }
    assert {key: weights.model[key] for key in stated} == stated
    assert weights.assumed == ()
    assert weights.classes == list("abcde")


def test_an_activation_that_is_not_ours_is_refused(folder):
    change_config(folder, model_args={"act_layer": "mish"})
    with pytest.raises(CheckpointError, match=r"config\.json: act_layer mish"):
        read(folder)
