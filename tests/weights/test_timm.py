"""Weights and folders of timm: loaded here they give the logits they give there."""

import json
import re

import pytest
import timm
import torch
from foreign_models import TOLERANCE, difference, images, own_model, timm_model
from safetensors.torch import save_file

from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError
from vit.weights.loading import build, load_into, read


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
    ],
    ids=str,
)
def test_variants(tmp_path, changes):
    theirs = timm_model(**changes)
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    assert difference(build(tmp_path / "x.pth"), theirs) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reg_tokens": 4},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "map", "fc_norm": False},
    ],
    ids=str,
)
def test_features_are_timms_pre_logits(tmp_path, changes):
    theirs = timm_model(**changes)
    timm.models.save_for_hf(theirs, tmp_path / "timm", safe_serialization=True)
    ours = build(tmp_path / "timm")
    with torch.inference_mode():
        expected = theirs.forward_head(theirs.forward_features(images()), pre_logits=True)
        features = ours.features(images())
    assert (features - expected).abs().max() < TOLERANCE
    assert expected.abs().max() > 0.5  # not equal for being near zero


@pytest.mark.parametrize(
    ("name", "stages"),
    [("vit_small_r26_s32_224", [2, 2, 2, 2]), ("vit_base_r50_s16_224", [3, 4, 9])],
)
def test_hybrids(tmp_path, name, stages):
    theirs = timm_model(name, depth=1)
    save_file(theirs.state_dict(), tmp_path / "x")
    assert read(tmp_path / "x").model["resnet_stages"] == stages
    # Fifty convolutions: in float32 their rounding depends on the CPU, by more than the tolerance
    assert difference(build(tmp_path / "x").double(), theirs.double()) < TOLERANCE


def test_a_mean_before_the_norm(tmp_path):
    theirs = timm_model(global_pool="avg")
    save_file(theirs.state_dict(), tmp_path / "x")
    ours = build(tmp_path / "x")
    assert (ours.global_pool, ours.encoder.norm_last) == ("mean", False)
    assert difference(ours, theirs) < TOLERANCE
    plain = own_model(hidden_size=192, num_heads=3, patch_size=16, image_size=64)
    notes = load_into(plain, read(tmp_path / "x")).notes
    assert "trained with fc_norm=True, the model has False" in notes


def save(model, folder):
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "fc_norm": False},
        {"pos_embed": "none"},
        {"act_layer": "quick_gelu", "num_heads": 6},
        {"img_size": (32, 64), "reg_tokens": 2},
        {"img_size": (32, 64), "reg_tokens": 2, "no_embed_class": True},
        {"in_chans": 1, "qk_norm": True, "proj_drop_rate": 0.1},
    ],
    ids=str,
)
def test_what_only_a_config_tells(tmp_path, changes):
    theirs = timm_model(**changes)
    ours = build(save(theirs, tmp_path / "timm"))
    patches = ours.embeddings.patch_embedding
    batch = torch.randn(2, patches.num_channels, *patches.image_size)
    with torch.inference_mode():
        assert (ours(batch) - theirs(batch)).abs().max() < TOLERANCE


def test_a_mean_without_a_class_token_needs_a_config(tmp_path):
    """Models with these names differ in their activation and in the width of a head."""
    theirs = timm_model(class_token=False, global_pool="avg", fc_norm=False)
    save_file(theirs.state_dict(), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"x: timm's models without a class token .* heads"):
        read(tmp_path / "x")


def test_positions_that_are_not_stored_are_refused(tmp_path):
    save_file(timm_model(pos_embed="none").state_dict(), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"x: timm weights without pos_embed, .* rotary"):
        read(tmp_path / "x")


def test_files_of_deit3_need_the_name_of_their_architecture(tmp_path):
    """RoPE-ViT has the same names, and rotary positions besides."""
    theirs = timm_model("deit3_small_patch16_224")
    state = {
        re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): tensor
        for name, tensor in theirs.state_dict().items()
    }
    rope = timm_model("vit_small_patch16_rope_ape_224").state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in rope.items()
    }
    torch.save({"model": state}, tmp_path / "deit_3_small_224.pth")
    with pytest.raises(CheckpointError, match="gamma_1 is in DeiT-III's own files and in those of"):
        read(tmp_path / "deit_3_small_224.pth")
    (tmp_path / "config.json").write_text('{"architecture": "deit3_small_patch16_224"}')
    assert difference(build(tmp_path / "deit_3_small_224.pth"), theirs) < TOLERANCE


def test_registers_whose_positions_could_be_of_either_grid(tmp_path):
    """9 positions: of 3 × 3 patches, or of 2 × 2 patches, the class token and four registers."""
    changes = {"img_size": 48, "reg_tokens": 4, "no_embed_class": True}
    theirs = timm_model(**changes)
    save_file(theirs.state_dict(), tmp_path / "x")
    with pytest.raises(CheckpointError, match="x: 9 positions are of a grid of patches, or of a"):
        read(tmp_path / "x")
    for changes in ({"img_size": 48, "no_embed_class": True}, {"img_size": 32}):
        theirs = timm_model(reg_tokens=4, **changes)
        assert theirs.pos_embed.shape[1] == 9
        size = changes["img_size"]
        ours = build(save(theirs, tmp_path / f"timm {size}"))
        assert difference(ours, theirs, size) < TOLERANCE


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": {"act_layer": "mish"}}, "act_layer mish"),
        ({"model_args": {"global_pool": "max"}}, "global_pool max"),
        ({"model_args": {"pos_embed": "rotary"}}, "pos_embed rotary"),
        ({"model_args": {"norm_layer": "rmsnorm"}}, "model_args.norm_layer=rmsnorm"),
        ({"model_args": {"pool_include_prefix": True}}, "model_args.pool_include_prefix=True"),
        ({"model_args": {"wings": 2}}, "model_args.wings=2"),
        ({"architecture": "vit_base_patch16_rpn_224"}, "timm's vit_base_patch16_rpn_224"),
        ({"architecture": "resnet50"}, "timm's resnet50"),
        ({"architecture": None, "model_type": "vit"}, "is of vit, but the tensors"),
        ({"architecture": None}, "names no architecture"),
    ],
    ids=str,
)
def test_what_is_not_ours_is_refused(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"architecture": 5}, "architecture"),
        ({"model_args": []}, "model_args"),
        ({"model_args": {"num_heads": "three"}}, "num_heads"),
        ({"model_args": {"num_heads": True}}, "num_heads"),
        ({"model_args": {"img_size": [64, 64, 64]}}, "img_size"),
        ({"model_args": {"qkv_bias": "yes"}}, "qkv_bias"),
        ({"model_args": {"act_layer": ["gelu"]}}, "act_layer"),
        ({"model_args": {"pre_norm": "no"}}, "pre_norm"),
        ({"global_pool": 1}, "global_pool"),
        ({"label_names": "cat"}, "label_names"),
        ({"label_names": {"first": "cat"}}, "label_names"),
        ({"pretrained": {"mean": "0.5"}}, "mean"),
        ({"pretrained": {"mean": [0.5, 0.5]}}, "mean"),
        ({"pretrained": {"std": [0, 0, 0]}}, "std"),
        ({"pretrained": {"input_size": 64}}, "input_size"),
        ({"pretrained": {"input_size": [1, 64, 64]}}, "input_size"),
        ({"pretrained": {"crop_pct": "all"}}, "crop_pct"),
        ({"pretrained": {"interpolation": 3}}, "interpolation"),
    ],
    ids=str,
)
def test_fields_of_wrong_types_are_named(folder, changes, key):
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*\b{key}\b") as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_size_is_refused(folder):
    change_config(folder, model_args={"depth": 12})
    with pytest.raises(CheckpointError, match="num_layers is 2 by its tensors but stated as 12"):
        read(folder)


def test_labels_may_be_numbered(folder):
    change_config(folder, label_names={str(number): name for number, name in enumerate("abcde")})
    assert read(folder).classes == list("abcde")
    # Not a name for every logit
    change_config(folder, label_names={"0": "a", "4": "e"})
    assert read(folder).classes is None
    change_config(folder, label_names=["a", "b"])
    assert read(folder).classes is None
