"""The table of docs/weights.md: what it says can be loaded is exact, and all else is refused."""

import json
import re
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import timm
import torch
from foreign_families import (
    BUILDERS,
    Row,
    largest_difference,
    rows,
    save_folder,
    true_setting,
)
from foreign_models import TOLERANCE, images
from timm.models import _registry as registry

from vit.errors import CheckpointError
from vit.model.vision_transformer import VisionTransformer
from vit.weights.loading import load_into, read
from vit.weights.timm_config import settings_of

ROWS = rows()
TIMM_ROWS = [row for row in ROWS if row.library == "timm"]
FOLDERS = [row for row in ROWS if row.folder != "—"]
# timm's modules with models of this kind, that cut an image into patches once
MODULES = (
    "beit",
    "cait",
    "deit",
    "eva",
    "naflexvit",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
)
ARCHITECTURES = [name for name in timm.list_models() if registry._model_to_module[name] in MODULES]
LOADABLE = [name for name in ARCHITECTURES if settings_of(name) is not None]


def row_of(architecture: str) -> Row:
    """The last row whose families an architecture of timm's is of."""
    matching = [
        row
        for row in TIMM_ROWS
        if any(fnmatchcase(architecture, family) for family in row.families)
    ]
    assert matching, f"{architecture} is in no row"
    return matching[-1]


def check_verdict(verdict: str, path, theirs: torch.nn.Module) -> str:
    """Loaded, the model computes what theirs does; else the message of the refusal."""
    if verdict == "refused":
        with pytest.raises(CheckpointError) as caught:
            read(path)
        message = str(caught.value)
        # It begins with the file, or the config.json beside it
        assert message.startswith(str(path))
        assert "\n" not in message
        return message
    weights = read(path)
    assumption = re.fullmatch("loads, assuming (.*)", verdict)
    if assumption is None:
        assert verdict == "loads"
    else:
        # It is reported; with the true value the rest is exact
        key = assumption[1]
        assert key in weights.assumed
        truth = true_setting(theirs, key)
        assert weights.model[key] != truth
        weights = replace(weights, model=weights.model | {key: truth})
    ours = VisionTransformer(**{"num_classes": 2, **weights.model}).eval()
    load_into(ours, weights)
    size = ours.embeddings.patch_embedding.image_size[0]
    trace = ours.trace(images(size))
    assert largest_difference(theirs, trace, size) < TOLERANCE
    return ""


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_file_alone(tmp_path, row):
    theirs = BUILDERS[row.library](row.example)
    torch.save(theirs.state_dict(), tmp_path / "weights.bin")
    message = check_verdict(row.bare, tmp_path / "weights.bin", theirs)
    if message:
        parts = re.findall("`(.*?)`", row.reason)
        assert parts, "the remark names nothing"
        assert all(part in message for part in parts), message


@pytest.mark.parametrize("row", FOLDERS, ids=str)
def test_a_folder_of_the_library(tmp_path, row):
    theirs = BUILDERS[row.library](row.example)
    save_folder(row, theirs, tmp_path / "folder")
    message = check_verdict(row.folder, tmp_path / "folder", theirs)
    if message:
        kind = row.example if row.library == "timm" else row.families[0]
        assert kind in message
    else:
        assert read(tmp_path / "folder").assumed == ()


def test_a_wrong_activation_would_be_noticed(tmp_path):
    """The random weights are far enough from 0 for every setting to make a difference."""
    theirs = BUILDERS["timm"]("vit_base_patch32_siglip_gap_256")
    row = row_of("vit_base_patch32_siglip_gap_256")
    save_folder(row, theirs, tmp_path / "folder")
    weights = read(tmp_path / "folder")
    for change in ({"activation": "gelu"}, {"num_heads": 4}, {"layer_norm_eps": 1e-3}):
        changed = replace(weights, model=weights.model | change)
        ours = VisionTransformer(**changed.model).eval()
        load_into(ours, changed)
        assert largest_difference(theirs, ours.trace(images(64)), 64) > 2 * TOLERANCE


def test_every_architecture_of_timm_is_in_the_table():
    assert len(ARCHITECTURES) > 300
    wrong = [
        name
        for name in ARCHITECTURES
        if (row_of(name).folder == "loads") != (settings_of(name) is not None)
    ]
    assert wrong == []
    assert all(row_of(row.example) is row for row in TIMM_ROWS)


@pytest.mark.parametrize("name", LOADABLE)
def test_what_a_name_of_timm_stands_for(name):
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    activations = {
        "GELU(approximate='none')": "gelu",
        "GELUTanh()": "gelu_tanh",
        "QuickGELU()": "quick_gelu",
        "SiLU()": "silu",
    }
    block = model.blocks[0]
    expected = {
        "activation": activations[str(block.mlp.act)],
        "layer_norm_eps": block.norm1.eps,
        "global_pool": {"token": "cls", "avg": "mean", "map": "map"}[model.global_pool],
        "num_heads": block.attn.num_heads,
    }
    kinds = ("Block", "Attention")
    if "dinov3" in name:
        expected["position"] = "rope_dinov3"
        kinds = ("EvaBlock", "EvaAttention")
        assert model.rope.temperature == 100.0
    assert settings_of(name) == expected
    assert (type(block).__name__, type(block.attn).__name__) == kinds


def test_names_of_earlier_versions_of_timm():
    for name in ("vit_base_patch16_224_in21k", "vit_small_patch8_224_dino"):
        assert settings_of(name) == settings_of(re.sub("_(in21k|dino)$", "", name))
    assert settings_of("deit3_base_patch16_384_in21ft1k") == settings_of("deit3_base_patch16_384")
    assert settings_of("vit_base_patch16_224_somebody") is None


def test_the_name_alone_states_the_settings(tmp_path):
    """timm's own folders list no arguments that are the architecture's."""
    changes = {"depth": 1, "num_classes": 3}
    theirs = timm.create_model("vit_tiny_patch16_224", **changes).eval()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "global_pool": "token"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = read(tmp_path)
    assert weights.model["num_heads"] == 3
    assert weights.assumed == ("image_size",)
