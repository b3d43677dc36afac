"""The model of a checkpoint: vit.load, and weights that belong to another."""

import pytest
import torch

import vit
from vit.checkpoints.file import read_checkpoint, write_checkpoint
from vit.checkpoints.model import (
    build_model,
    build_on_meta,
    load_weights,
    parse_pruned_heads,
)
from vit.data.preprocessing import Preprocessing
from vit.errors import CheckpointError, ConfigError
from vit.model.vision_transformer import VisionTransformer

MODEL = {
    "name": "small",
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
}
PREPROCESSING = Preprocessing((8, 8), 3, (0.5,), (0.5,), None, "bilinear")


def make_header(**changes):
    return {
        "kind": "best",
        "config": {"model": MODEL},
        "classes": ["cat", "dog"],
        "preprocessing": PREPROCESSING.to_dict(),
        **changes,
    }


@pytest.fixture
def model():
    model = build_model(MODEL, 2)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def test_load_gives_the_model_its_classes_and_preprocessing(tmp_path, model):
    write_checkpoint(tmp_path / "best.safetensors", model.state_dict(), make_header())
    loaded = vit.load(tmp_path / "best.safetensors")
    assert not loaded.training
    assert loaded.classes == ["cat", "dog"]
    assert loaded.preprocessing == PREPROCESSING
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(images), model(images))


def test_a_whole_state_is_not_a_model(tmp_path, model):
    path = tmp_path / "last.safetensors"
    write_checkpoint(path, model.state_dict(), make_header(kind="last"))
    with pytest.raises(CheckpointError, match=r"last\.safetensors: .*best\.safetensors"):
        vit.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"model": {**MODEL, "wings": 2}}},
        {"config": {"model": {**MODEL, "num_heads": 3}}},
        {"config": {}},
        {"preprocessing": {}},
    ],
    ids=["unknown key", "impossible", "no model", "no preprocessing"],
)
def test_a_header_of_another_version_is_refused(tmp_path, model, changes):
    path = tmp_path / "best.safetensors"
    write_checkpoint(path, model.state_dict(), make_header(**changes))
    with pytest.raises(CheckpointError, match=r"best\.safetensors: "):
        vit.load(path)


def test_a_header_without_classes_is_refused(tmp_path, model):
    header = make_header()
    del header["classes"]
    write_checkpoint(tmp_path / "best.safetensors", model.state_dict(), header)
    with pytest.raises(CheckpointError, match=r"best\.safetensors: .*classes"):
        vit.load(tmp_path / "best.safetensors")


def test_the_weights_of_another_model_are_refused(tmp_path):
    other = build_model({**MODEL, "num_layers": 2}, 2)
    write_checkpoint(tmp_path / "best.safetensors", other.state_dict(), make_header())
    with pytest.raises(CheckpointError, match=r"best\.safetensors: .*encoder\.blocks\.1"):
        vit.load(tmp_path / "best.safetensors")


@pytest.mark.parametrize(
    ("changes", "num_classes", "difference"),
    [
        ({"num_layers": 2}, 2, r"encoder\.blocks\.1"),
        ({}, 3, r"head\.weight is \(3, 16\), expected \(2, 16\)"),
        ({"qkv_bias": False}, 2, r"attention\.\w+\.bias is missing"),
    ],
    ids=["too many", "another shape", "missing"],
)
def test_differences_are_named_and_nothing_is_changed(model, changes, num_classes, difference):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = build_model({**MODEL, **changes}, num_classes)
    with pytest.raises(CheckpointError, match=difference):
        load_weights(model, other.state_dict(), "file")
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_removed_heads_survive_json(tmp_path):
    settings = {**MODEL, "pruned_heads": {0: [1]}}
    pruned = build_model(settings, 2)
    header = make_header(config={"model": settings})
    write_checkpoint(tmp_path / "best.safetensors", pruned.state_dict(), header)
    # JSON has made text of the layer's number
    saved = read_checkpoint(tmp_path / "best.safetensors")[1]["config"]["model"]
    assert saved["pruned_heads"] == {"0": [1]}
    loaded = vit.load(tmp_path / "best.safetensors")
    assert loaded.encoder.blocks[0].attention.query.out_features == 8


def test_an_init_range_of_an_earlier_version_does_not_matter(tmp_path):
    """It was written beside every init; now it belongs to one of them."""
    settings = {**MODEL, "init": "jax", "init_range": 0.02}
    model = build_model(MODEL, 2)
    path = tmp_path / "best.safetensors"
    write_checkpoint(path, model.state_dict(), make_header(config={"model": settings}))
    for loaded in (vit.load(path), VisionTransformer.load_from(path)):
        assert torch.equal(loaded.head.weight, model.head.weight)
    # Whoever builds a new model of it is told
    with pytest.raises(ValueError, match="init_range"):
        build_model(settings, 2)


def test_removed_heads_that_make_no_sense_are_refused():
    assert parse_pruned_heads({"3": [0, 2]}) == {3: [0, 2]}
    for nonsense in ([1, 2], "first", {"a": [1]}, {0: 1}):
        with pytest.raises(ValueError, match="pruned_heads"):
            parse_pruned_heads(nonsense)


def test_a_model_that_can_not_be_built_is_a_mistake_of_the_configuration():
    assert build_on_meta(MODEL).head.weight.device.type == "meta"
    with pytest.raises(ConfigError, match=r"model=small: .*num_heads"):
        build_on_meta({**MODEL, "num_heads": 3})
